"""Calls of the zoo's models: eagerly, in float64, and compiled so that whatever can be fused on this machine is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from model_zoo import build, static_cache

import fusion_compiler as fc
from fusion_compiler.machine import TABLE, cpu_machine

# On a CPU with next to no memory bandwidth whatever saves traffic pays: attention is replaced.
STARVED = {"machine": dataclasses.replace(cpu_machine(2, 2**16, "avx2"), memory_bandwidth=1e5, l2_bandwidth=1e5)}
# On a GPU where starting a kernel costs a millisecond every kernel saved pays. The generated kernels run in Triton's
# interpreter; the vendor's attention kernels need the device.
DEAR_LAUNCHES = {"machine": dataclasses.replace(TABLE["h200"], launch_overhead=1e-3), "disable": ["attention"]}

# Forms of a prompt beside the plain one
FORMS = ("dynamic", "batch 1", "batch 3", "left padding", "bfloat16")

Arguments = dict[str, Any]


def call(name: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Callable[[], Arguments]]:
    """(model, a function making the keyword arguments of one call). `kind` is "prompt", "decode" (one more token for a
    static cache that holds the prompt) or one of FORMS; with left padding the first row has the most."""
    model, make_inputs = build(name, dtype, {"batch 1": 1, "batch 3": 3}.get(kind, 2))
    inputs = make_inputs()
    if kind == "left padding":
        inputs["attention_mask"] = (torch.arange(16) >= torch.tensor([[5], [2]])).long()
    if kind == "decode":
        inputs = {"past_key_values": static_cache(model, inputs), "input_ids": torch.randint(3, 100, (2, 1))}
    return model, lambda: copy.deepcopy(inputs)


def compiled(model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    """`model` through the whole compiler; what is not fused runs eagerly, and a stage that fails raises."""

    def backend(gm: Any, inputs: Any, **context: Any) -> Any:
        return fc.backend.fusion_compiler(
            gm, inputs, options={"remainder": "eager", "strict": True, **options}, **context
        )

    return torch.compile(model, backend=backend, dynamic=dynamic)


def in_double(arguments: Arguments) -> Arguments:
    wide = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments
    )
    for layer in getattr(wide.get("past_key_values"), "layers", ()):
        layer.keys, layer.values, layer.dtype = layer.keys.double(), layer.values.double(), torch.float64
    return wide


def results(run: Any, arguments: Arguments) -> list[torch.Tensor]:
    """Every floating-point tensor that a call returns, and what it left in its cache."""
    out = run(**arguments)
    tensors = torch.utils._pytree.tree_leaves(out.to_tuple() if hasattr(out, "to_tuple") else out)
    for layer in getattr(arguments.get("past_key_values"), "layers", ()):
        tensors += [layer.keys, layer.values]
    return [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]


@torch.no_grad()
def error(model: torch.nn.Module, run: Any, make: Callable[[], Arguments]) -> float:
    """The largest error of `run` over its results, against float64, in units of eager's own error."""
    got, eager = results(run, make()), results(model, make())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for numbers that a model makes tensors of
    try:
        exact = results(copy.deepcopy(model).double(), in_double(make()))
    finally:
        torch.set_default_dtype(before)
    assert len(got) == len(eager) == len(exact) > 0
    return max(map(_ratio, got, eager, exact))


def _ratio(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> float:
    assert got.shape == eager.shape and got.dtype == eager.dtype and got.isfinite().equal(eager.isfinite())
    # rows that see no key are no numbers in float64 for some models, and for these all that comes behind
    lost = eager.isfinite() & ~exact.isfinite()
    if lost.any():
        apart, size = (t[lost].double().norm() for t in (got - eager, eager))
        assert apart <= 10 * torch.finfo(eager.dtype).eps * size, (float(apart), float(size))
    finite = eager.isfinite() & exact.isfinite()
    got, eager, exact = got[finite].double(), eager[finite].double(), exact[finite]
    own = (eager - exact).norm() + 1e-7 * exact.norm()  # what eager happens to hit exactly
    return float((got - exact).norm() / own) if own else float((got - exact).norm() > 0)
