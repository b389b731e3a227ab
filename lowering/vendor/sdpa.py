"""Attention as one of torch's own scaled-dot-product kernels.

Each backend is one ATen operator that Inductor calls as it stands, so what runs is known beforehand: no dispatcher
chooses again. What a backend takes is written in the table; what it cannot take is refused with a sentence. float32 on
GPUs is left alone: the one kernel that computes it (efficient) errs up to twice as much as eager does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch.fx import Node

from fusion_compiler.attention.operands import added_mask, arranged, expanded, number, queries_keys_values
from fusion_compiler.candidates import Candidate, Traffic, Unavailable
from fusion_compiler.cost.amounts import Condition, amount, settled
from fusion_compiler.cost.roofline import attention_seconds, attention_traffic
from fusion_compiler.fused import Attention, FusedOp, Site
from fusion_compiler.machine import Machine
from fusion_compiler.splice import Builder

aten = torch.ops.aten
HALF = frozenset({torch.float16, torch.bfloat16})
FLOAT = HALF | {torch.float32}

OFFER = 'fusion_compiler.register_kernel("attention", …) offers yours'

# (query, key, value, mask, is_causal, scale) -> positional and keyword arguments of the operator
Arguments = Callable[[Node, Node, Node, Node | None, bool, float], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Backend:
    """One SDPA kernel and what it takes. `square_causal`: causal only for as many queries as keys."""

    name: str
    operator: Any
    arguments: Arguments
    kinds: frozenset[str]
    dtypes: frozenset[torch.dtype]
    head_dim: int
    takes_mask: bool
    grouped: bool  # reads fewer key/value heads than query heads
    square_causal: bool = False
    dim_multiple: int = 1
    wider_values: bool = False  # v may have another width than q and k
    narrower_values: int = 0  # the compute capability from which v may be narrower than q and k; 0: nowhere
    capability: int = 0  # least compute capability (CUDA)
    mask_per_head: bool = False  # the mask must have all of batch and heads
    blocks_of_queries: bool = False  # works on many query rows at once and does badly on a single one
    masked_rows: frozenset[torch.dtype] = frozenset()  # dtypes where rows with only finite fills average, as in eager


BACKENDS = (
    Backend(
        "cudnn", aten._scaled_dot_product_cudnn_attention.default,
        lambda q, k, v, mask, causal, scale: ((q, k, v, mask, False, 0.0, causal), {"scale": scale}),
        frozenset({"cuda"}), HALF, 256, takes_mask=True, grouped=True, dim_multiple=8, capability=80,
        narrower_values=90,
    ),
    Backend(
        "flash", aten._scaled_dot_product_flash_attention.default,
        lambda q, k, v, mask, causal, scale: ((q, k, v, 0.0, causal), {"scale": scale}),
        frozenset({"cuda", "rocm"}), HALF, 256, takes_mask=False, grouped=True, square_causal=True, dim_multiple=8,
        capability=80,
    ),
    Backend(
        "efficient", aten._scaled_dot_product_efficient_attention.default,
        lambda q, k, v, mask, causal, scale: ((q, k, v, mask, False, 0.0, causal), {"scale": scale}),
        frozenset({"cuda", "rocm"}), HALF, 512, takes_mask=True, grouped=False, dim_multiple=8, wider_values=True,
        capability=50, mask_per_head=True,
    ),
    Backend(
        "cpu_flash", aten._scaled_dot_product_flash_attention_for_cpu.default,
        lambda q, k, v, mask, causal, scale: ((q, k, v, 0.0, causal), {"attn_mask": mask, "scale": scale}),
        frozenset({"cpu"}), FLOAT, 65536, takes_mask=True, grouped=True, blocks_of_queries=True,
        masked_rows=frozenset({torch.float32, torch.bfloat16}),
    ),
)  # fmt: skip


class VendorSdpa:
    """torch's scaled-dot-product kernels, each a candidate of its own."""

    name = "vendor.sdpa"

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        if not isinstance(op, Attention):
            return []
        if op.logarithm is not None:
            return Unavailable("the logarithm of the sums is read too, which these kernels do not give")
        found, refusals = [], []
        for backend in BACKENDS:
            if machine.kind not in backend.kinds:
                continue
            made = offer(op, machine, backend)
            if isinstance(made, Candidate) and backend.blocks_of_queries and amount(op.q_len) == 1:
                # measured on 2 cores, 512 and 2048 keys: 0.7–1.4 times Inductor's time in float32, 4–8 in bfloat16
                made = "it works by blocks of queries, and one query is served faster by Inductor's own loops"
            if isinstance(made, Candidate):
                found.append(made)
            else:
                refusals.append(f"{backend.name}: {made}")
        return found or Unavailable("; ".join(refusals) or f"torch has no SDPA kernel for {machine.kind}")


def offer(op: Attention, machine: Machine, backend: Backend) -> Candidate | str:
    """The backend as a candidate, or why it cannot serve."""
    refusal = _refusal(op, machine, backend)
    if refusal:
        return refusal
    causal = op.mask.is_top_left
    valid: Condition = True
    if causal and backend.square_causal:
        valid = _equal(op.q_len, op.kv_len)
        if valid is False:
            return "it aligns a causal mask to the last key, this one is aligned to the first"
    masked = not causal and op.mask.kind != "none"
    known = replace(op, mask=replace(op.mask, kind="tensor")) if masked else op
    traffic = attention_traffic(known)
    seconds = attention_seconds(known, machine, backend.name)
    if masked and op.mask.empty_rows == "nan":
        traffic += (rewriting := _rewriting(op))
        seconds += (rewriting.bytes_read + rewriting.bytes_written) / machine.memory_bandwidth
        seconds += rewriting.launches * machine.launch_overhead
    details = (("backend", backend.name), ("is_causal", causal), ("mask tensor", masked), ("grouped", _grouped(op)))
    emit = partial(_emit, op, backend, causal, masked)
    return Candidate(f"{VendorSdpa.name}.{backend.name}", str(backend.operator), traffic, seconds, emit, valid, details)


def _refusal(op: Attention, machine: Machine, backend: Backend) -> str:
    if op.softcap is not None:
        return f"no SDPA kernel caps scores (softcap {op.softcap:g}); {OFFER}"
    if not op.scale > 0:  # kernels take maxima, and put −∞ in, before they scale
        return f"the scale {op.scale:g} is not positive; multiply the queries by it instead"
    if op.dtype not in backend.dtypes:
        return f"it is not used for {op.dtype}"
    if machine.kind == "cuda" and machine.capability < backend.capability:
        return f"it needs compute capability {backend.capability / 10}"
    if op.head_dim > backend.head_dim or op.v_dim > backend.head_dim:
        return f"head dimension {max(op.head_dim, op.v_dim)} exceeds {backend.head_dim}"
    if backend.name == "cudnn" and machine.capability < 90 and op.head_dim > 128:
        return f"head dimension {op.head_dim} exceeds 128, its limit before compute capability 9.0"
    if op.head_dim % backend.dim_multiple or op.v_dim % backend.dim_multiple:
        return f"head dimension {op.head_dim} is no multiple of {backend.dim_multiple}"
    narrower = op.v_dim < op.head_dim and 0 < backend.narrower_values <= machine.capability
    narrower = narrower and isinstance(op.q_len, int) and op.q_len > 1  # tried with many queries only
    if op.v_dim != op.head_dim and not backend.wider_values and not narrower:
        return f"values are {op.v_dim} wide, queries {op.head_dim}"
    if _grouped(op) and not backend.grouped:
        return f"it needs as many key heads as query heads ({op.kv_heads} for {op.heads} here)"
    if op.mask.is_top_left or op.mask.kind == "none":
        return ""
    if not backend.takes_mask:
        return "it takes no mask tensor"
    if op.mask.tensor == "none":
        return f"the mask would have to be passed as one tensor, and there is none: {op.mask.proof}"
    # what is added may be −∞ or any other number, where its values are not known
    averages = op.mask.empty_rows == "mean" or (op.mask.empty_rows == "nan" and op.mask.tensor == "additive")
    if averages and op.dtype not in backend.masked_rows:
        return (
            "a row that sees no key averages all values in eager where the mask is finite; it does not do so here, and "
            f"such rows may exist: {op.mask.proof}"
        )
    return ""


def _rewriting(op: Attention) -> Traffic:
    """What it costs to find the rows that see no key and to write what eager has there: not a number."""
    b, h, lq, lk = (amount(s) for s in (op.batch, op.heads, op.q_len, op.kv_len))
    out = op.dtype.itemsize * b * h * lq * op.v_dim
    return Traffic(0, out + op.dtype.itemsize * lq * lk, out, 2)


def _grouped(op: Attention) -> bool:
    return _equal(op.heads, op.kv_heads) is not True


def _equal(a: int | torch.SymInt, b: int | torch.SymInt) -> Condition:
    return settled(sympy.Eq(amount(a), amount(b)))


# ---- emission -------------------------------------------------------------------------------------
def _emit(op: Attention, backend: Backend, causal: bool, masked: bool, builder: Builder, site: Site) -> Node:
    q, k, v = queries_keys_values(op, builder, site)
    added = added_mask(op, builder, site) if masked else None
    mask = _mask(op, backend, builder, added) if added is not None else None
    positional, keywords = backend.arguments(q, k, v, mask, causal, op.scale)
    out = builder.call(operator.getitem, builder.call(backend.operator, *positional, **keywords), 0)
    if added is not None and op.mask.empty_rows == "nan":
        out = _not_a_number_where_all_is_hidden(builder, added, out)
    return arranged(builder, out, op.out)


def _mask(op: Attention, backend: Backend, builder: Builder, added: Node) -> Node:
    """The mask as SDPA kernels want it: not broadcast in its last two dimensions."""
    batch, heads = (op.batch, op.heads) if backend.mask_per_head else added.meta["val"].shape[:2]
    return expanded(builder, added, (batch, heads, op.q_len, op.kv_len))


def _not_a_number_where_all_is_hidden(builder: Builder, added: Node, out: Node) -> Node:
    """The softmax over nothing but −∞ is 0/0; SDPA kernels give 0 there."""
    most = builder.call(aten.amax.default, added, [-1], True)
    hidden = builder.call(aten.eq.Scalar, most, float("-inf"))
    return builder.call(aten.where.self, hidden, number(builder, float("nan"), out.meta["val"].dtype, like=out), out)
