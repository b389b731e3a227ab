"""Attention as FlashAttention 3, where its package is installed (`flash_attn_interface`, for compute capability 9.0).

Beside plain and causal attention it takes caps, sliding windows and fewer queries than keys. Nobody measured it for the
cost model: it is priced as cuDNN's kernel and `UNTRIED` of that more, so that `autotune` is what takes it.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from fusion_compiler.attention.operands import arranged, queries_keys_values
from fusion_compiler.candidates import Candidate, Unavailable
from fusion_compiler.cost.amounts import Condition, amount, settled
from fusion_compiler.cost.roofline import attention_seconds, attention_traffic
from fusion_compiler.fused import Attention, FusedOp, Mask, Site
from fusion_compiler.machine import Machine
from fusion_compiler.splice import Builder

PACKAGE = "flash_attn_interface"
UNTRIED = 0.3
CAPABILITY = 90  # its kernels are written for this one alone


class FlashAttention3:
    """See `candidates.Lowering`."""

    name = "vendor.flash-3"

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        if not isinstance(op, Attention) or machine.kind != "cuda" or machine.capability != CAPABILITY:
            return []
        if importlib.util.find_spec(PACKAGE) is None:
            return []
        refusal = _refusal(op)
        if refusal:
            return Unavailable(refusal)
        valid = _valid(op)
        if valid is False:
            return Unavailable("it counts a causal mask from the last key, this one is counted otherwise")
        seconds = (1 + UNTRIED) * attention_seconds(op, machine, "cudnn", masked=False)
        emit = partial(_emit, op)
        details = (("predicted from", f"cuDNN's kernel, and {UNTRIED:.0%} more: it has not been measured"),)
        kernel = f"{PACKAGE}.flash_attn_func"
        return [Candidate(self.name, kernel, attention_traffic(op), seconds, emit, valid, details)]


def _refusal(op: Attention) -> str:
    if op.logarithm is not None:
        return "the logarithm of the sums is read too, which is not asked of it"
    if op.dtype not in (torch.float16, torch.bfloat16):
        return f"it is not used for {op.dtype}"
    if op.head_dim % 8 or op.v_dim % 8 or op.head_dim > 256:
        return f"heads are {op.head_dim} wide; it takes multiples of 8 up to 256"
    if op.v_dim != op.head_dim and not (128 < op.head_dim <= 192 and 96 < op.v_dim <= 128):
        return f"values are {op.v_dim} wide, queries {op.head_dim}"
    if not op.scale > 0:
        return f"the scale {op.scale:g} is not positive; multiply the queries by it instead"
    if op.q_len == 1:
        return "it works by blocks of queries, and one query is served faster by a kernel that splits the keys"
    mask = op.mask
    if mask.kind not in ("none", "causal") or (mask.chunk, mask.padding) != (None, None) or mask.position:
        return f"of masks it takes causal ones and windows only: {mask.proof or mask.kind}"
    return ""


def _valid(op: Attention) -> Condition:
    """For which sizes its place of the diagonal, under which the last query sees the last key, is that of the mask."""
    if op.mask.kind == "none":
        return True
    queries, keys = amount(op.q_len), amount(op.kv_len)
    # with more queries than keys the first ones would see none
    return settled(sympy.And(sympy.Eq(amount(op.mask.offset), keys - queries), sympy.Ge(keys, queries)))


def _window(mask: Mask) -> tuple[int, int]:
    """Keys seen before and after the diagonal, −1 for all."""
    return (-1 if mask.window is None else mask.window - 1, 0 if mask.kind == "causal" else -1)


def _emit(op: Attention, builder: Builder, site: Site) -> Node:
    q, k, v = queries_keys_values(op, builder, site)
    cap = op.softcap or 0.0
    out = builder.call(torch.ops.fusion_compiler.flash_attention_3.default, q, k, v, op.scale, *_window(op.mask), cap)
    return arranged(builder, out, op.out)


@torch.library.custom_op("fusion_compiler::flash_attention_3", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int, after: int, softcap: float) -> Tensor:
    """Of q [B, H, Lq, D], k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv]; `before` and `after` as of `_window`."""
    from flash_attn_interface import flash_attn_func

    turned = (t.transpose(1, 2) for t in (q, k, v))
    is_causal = (before, after) == (-1, 0)
    limits: dict[str, Any] = {"causal": True} if is_causal else {"window_size": (before, after)}
    done = flash_attn_func(*turned, softmax_scale=scale, softcap=softcap, **limits)
    # releases differ in whether the logarithms of the sums come with it
    out: Tensor = done[0] if isinstance(done, tuple) else done
    return out.transpose(1, 2)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, before: int, after: int, softcap: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
