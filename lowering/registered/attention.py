"""Kernels that users registered for "attention": see `attention.reference` for what they compute."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Node

from fusion_compiler.attention.operands import added_mask, arranged, expanded, scaled_queries
from fusion_compiler.attention.reference import attention
from fusion_compiler.candidates import Candidate, Unavailable
from fusion_compiler.cost.roofline import attention_traffic, roofline
from fusion_compiler.fused import Attention, Declared, Site
from fusion_compiler.kernels import RegisteredKernel, kernels_of
from fusion_compiler.machine import Machine
from fusion_compiler.splice import Builder, SpliceError

from .inlined import inline, stated


def candidates(op: Attention, machine: Machine) -> list[Candidate] | Unavailable:
    known = [kernel for kernel in kernels_of(attention) if kernel.serves(machine)]
    refusal = _refusal(op)
    if not known or refusal:
        return Unavailable(refusal) if known else []
    return [_candidate(op, kernel, machine) for kernel in known]


def _refusal(op: Attention) -> str:
    """Why the arguments of a registered kernel cannot say what the mask says."""
    mask = op.mask
    if op.logarithm is not None:
        return "the logarithm of the sums is read too, which a registered kernel does not give"
    if mask.kind == "none" or mask.is_top_left:
        return ""
    if mask.tensor == "none":
        return f"the mask would have to be passed as one tensor, and there is none: {mask.proof}"
    if mask.empty_rows == "zero":
        return f"a row that sees no key would be NaN, and is 0 in eager: {mask.proof}"
    return ""


def _candidate(op: Attention, kernel: RegisteredKernel, machine: Machine) -> Candidate:
    traffic = attention_traffic(op)
    known = kernel.cost is None
    return Candidate(
        name=f"registered.{kernel.name}",
        kernel=f"{kernel.name} (registered)",
        traffic=traffic,
        seconds=roofline(traffic, machine, op.dtype) if known else stated(kernel, machine, op),
        emit=functools.partial(_emit, op, kernel),
        details=(("predicted from", "its traffic" if known else "its own cost function"),),
    )


def _emit(op: Attention, kernel: RegisteredKernel, builder: Builder, site: Site) -> Node:
    q, k, v = (arranged(builder, node, layout) for node, layout in zip(site.operands[:3], op.layouts[:3], strict=True))
    q = scaled_queries(op, builder, site, q)
    causal = op.mask.is_top_left
    mask = None
    if not causal and op.mask.kind != "none":
        mask = expanded(builder, added_mask(op, builder, site), (op.batch, op.heads, op.q_len, op.kv_len))
    operands = [q, k, v, *([mask] if mask is not None else [])]
    values: list[Any] = [node.meta["val"] for node in operands]
    arguments = (*values[:3], values[3] if mask is not None else None, causal, op.scale, op.softcap)
    called = Declared("attention", attention, arguments, (False,) * len(operands), op.dtype, (), 0, ())
    results = inline(builder, kernel, called, operands)
    wanted = (op.batch, op.heads, op.q_len, op.v_dim)
    if len(results) != 1 or list(results[0].meta["val"].shape) != list(wanted):
        shown = " and ".join(str(list(r.meta["val"].shape)) for r in results)
        raise SpliceError(f"kernel {kernel.name!r} returns {shown} where attention returns {list(wanted)}")
    result = results[0]
    if result.meta["val"].dtype != op.dtype:
        result = builder.call(torch.ops.prims.convert_element_type.default, result, op.dtype)
    return arranged(builder, result, op.out)
