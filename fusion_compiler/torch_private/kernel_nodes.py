"""User-defined Triton kernels as FX nodes (`torch._higher_order_ops.triton_kernel_wrap`).

A kernel and those of its arguments that FX cannot hold live in a side table; the node names them by index. The
functional form clones the tensors it writes; on a fresh `aten.empty` Inductor's re-inplacing pass drops that clone.
Tried on torch 2.11.0 (triton 3.6.0) and 2.13.0 (triton 3.7.1).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

KERNEL_NODE = triton_kernel_wrapper_functional


@functools.cache
def configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """`kernel` with launch parameters, which a kernel node can only carry as an autotuner of one configuration.

    Inductor tells kernels of one graph apart by the identity of their Python function and not by their configuration,
    so every configuration gets a function of its own.
    """
    import triton

    fn = kernel.fn
    twin = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__annotations__ = fn.__annotations__
    twin.__module__, twin.__qualname__, twin.__doc__ = fn.__module__, fn.__qualname__, fn.__doc__
    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune(configs=[config], key=[])(triton.jit(twin))


def kernel_node_arguments(
    kernel: Any,
    grid: tuple[Any, ...],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    outputs: list[str],
    blocks: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a node that runs `kernel`: `arguments` may hold nodes, `constants` only Python values. The
    arguments that `blocks` names reach the kernel as host-made descriptors of tensors, read in blocks of that shape."""
    import triton.language as tl

    dtypes = {k: getattr(tl, str(v).split(".")[-1]) for k, v in constants.items() if isinstance(v, torch.dtype)}
    return {
        "kernel_idx": kernel_side_table.add_kernel(kernel),
        "constant_args_idx": kernel_side_table.add_constant_args({**constants, **dtypes}),
        "grid": [(*grid, 1, 1)[:3]],
        "tma_descriptor_metadata": {name: ("stable", (list(block),)) for name, block in (blocks or {}).items()},
        "kwargs": arguments,
        "tensors_to_clone": outputs,
    }
