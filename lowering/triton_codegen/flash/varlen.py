"""Launches the flash kernel for packed sequences: what `attention.direct.varlen_attention` runs on a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ....machine import Machine, machine
from ....splice import load_kernel
from ....torch_private.kernel_nodes import configured
from .packed_source import Packed, write
from .plan import Plan
from .predict import chosen, unserved
from .source import NAME


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, window: int | None,
    softcap: float | None, scale: float,
) -> Tensor | str:  # fmt: skip
    """As `attention.direct.varlen_attention`, or why there is no kernel for it."""
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    total, heads, head_dim = q.shape
    out = q.new_empty(total, heads, v.shape[2])
    packed = Packed(
        heads, k.shape[1], head_dim, v.shape[2], q.dtype, scale, causal, window, softcap,
        tuple((t.stride(0), t.stride(1)) for t in (q, k, v, out)),
    )  # fmt: skip
    plan = planned(packed, machine())
    if isinstance(plan, str):
        return plan
    kernel = torch.library.wrap_triton(_kernel(packed, plan))
    sequences = cu_seqlens_q.shape[0] - 1
    kernel[(packed.kv_heads, total // packed.tokens(plan) + sequences)](
        q, k, v, cu_seqlens_q, cu_seqlens_k, out, sequences, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n
    )
    return out


@functools.cache
def planned(packed: Packed, on: Machine) -> Plan | str:
    """The plan for a machine, or why there is none."""
    op = packed.of_a_sequence()
    if reason := unserved(op, on):
        return reason
    plan = chosen(op, on)
    if plan is None:
        return f"no block of queries and keys of {packed.dtype} fits the shared memory of {on.name}"
    if packed.group > plan.block_m:
        return f"{packed.group} heads share a key head, more than the {plan.block_m} rows of a block"
    # a sequence begins and ends anywhere: a descriptor would bring rows of the next one, with whatever they hold
    return replace(plan, descriptors=False)


@functools.cache
def _kernel(packed: Packed, plan: Plan) -> Any:
    return configured(load_kernel(write(packed, plan), NAME), plan.num_warps, plan.num_stages)
