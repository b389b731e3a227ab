"""Puts a flash kernel into the graph: operands as views of what is there, the result as what follows wants it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ....attention.operands import apart, arranged, named, rows_in_one_piece, scaled_queries
from ....candidates import Amount
from ....cost.amounts import amount
from ....fused import Attention, Site, StoredAttention
from ....splice import DESCRIPTOR_STEP, SpliceError, load_kernel
from ..decode.attention import coded
from ..decode.operands import Operand, as_stored
from .blocks import listed
from .expressions import Read
from .plan import Plan
from .source import NAME, Strides
from .stored import tiles, write_stored

if TYPE_CHECKING:
    from ....splice import Builder


def emit(
    asked: Attention | StoredAttention, plan: Plan, builder: Builder, site: Site, *, native: bool = False
) -> Node | tuple[Node, ...]:
    """Adds the kernel of `plan`, with NVIDIA's instructions for codes if `native`; returns what takes the place of the
    output, or of each of two."""
    stored = as_stored(asked)
    op = stored.attention
    site, beside = apart(stored, site)
    q = arranged(builder, site.operands[0], op.layouts[0])
    q = rows_in_one_piece(builder, scaled_queries(op, builder, site, q))
    (k, k_codes), (v, v_codes) = (_side(name, stored, builder, site, beside) for name in "kv")
    if plan.descriptors and not (_describable(k) and _describable(v)):
        plan = replace(plan, descriptors=False)
    reads, lengths_stride, read = _reads(op, builder, site)
    out, out_strides, in_place = _result(op, builder, site)
    own = [_strides(node.meta["val"]) for node in (q, k, v)]
    strides = Strides(own[0], own[1], own[2], out_strides, lengths_stride, read)
    source = write_stored(op, plan, strides, k_codes, v_codes, native=native)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, **beside, **reads, "out": out}
    if op.logarithm is not None:
        rows, device = [op.batch, op.heads, op.q_len], q.meta["val"].device
        arguments["logarithm"] = builder.empty(rows, torch.float32, device)
    if plan.listed:
        arguments["blocks"] = listed(op, plan, strides, builder, reads, q)
    arguments |= {name: _size(builder, name) for name in source.symbols}
    arguments |= {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
    grid = [op.heads, builder.ceil_div(op.q_len, plan.block_m), op.batch]
    described = tiles(stored, plan)
    launched = builder.triton(
        load_kernel(source.text, NAME), grid, arguments, list(op.results), num_warps=plan.num_warps,
        num_stages=plan.num_stages, blocks=described,
        waits=not described,  # to wait is worth nothing to kernels that run for so long
    )  # fmt: skip
    out = launched["out"]
    out = builder.reshape(out, op.out.merged) if in_place else arranged(builder, out, op.out)
    if op.logarithm is None:
        return out
    done = {"out": out, "logarithm": arranged(builder, launched["logarithm"], op.logarithm)}
    return tuple(done[name] for name in op.results)


def _side(
    name: str, stored: StoredAttention, builder: Builder, site: Site, beside: dict[str, Node]
) -> tuple[Node, Operand | None]:
    """Keys or values as the kernel reads them, and where they are codes how scales and zeros lie."""
    place, codes = (1, stored.k) if name == "k" else (2, stored.v)
    node, layout = site.operands[place], stored.attention.layouts[place]
    if codes is None:
        return rows_in_one_piece(builder, arranged(builder, node, layout)), None
    operand = coded(builder, {name: node, **beside}, name, codes, layout, heads_first=False)
    if list(layout.order) != sorted(layout.order):
        node = builder.call(torch.ops.aten.permute.default, node, list(layout.order))
    return node, operand


def _reads(op: Attention, builder: Builder, site: Site) -> tuple[dict[str, Node], Amount, dict[str, Read]]:
    """What the kernel reads beside q, k and v by the names of its arguments, the stride of the lengths, and how the
    functions of the modification are read."""
    nodes = named(op, site)
    if op.modification is not None:
        nodes = {name: nodes[f"modification.{name}"] for name in op.modification.reads}
    found: dict[str, Node] = {name: nodes[name] for name in ("position", "lengths") if name in nodes}
    lengths_stride: Amount = 0
    if "lengths" in found:
        found["lengths"] = builder.reshape(found["lengths"], [-1])
        value = found["lengths"].meta["val"]
        lengths_stride = 0 if value.shape[0] == 1 else amount(value.stride(0))
    read = {}
    made = op.modification
    others = [n for n in made.reads if n not in found] if made is not None else []
    for i, name in enumerate(others):
        node = nodes[name]
        value = node.meta["val"]
        read[name] = Read(f"read{i}", _strides(value), value.dtype)
        found[f"read{i}"] = node
    return found, lengths_stride, read


def _describable(node: Node) -> bool:
    """Whether a descriptor can hold a tensor as it lies: see `Builder.described`."""
    value = node.meta["val"]
    steps = [s * value.element_size() for s in (*value.stride()[:-1], value.storage_offset())]
    repeated = any(s == 0 for s in value.stride()[:-1])
    return not repeated and all(statically_known_true(s % DESCRIPTOR_STEP == 0) for s in steps)


def _strides(value: torch.Tensor) -> tuple[Any, ...]:
    return tuple(map(amount, value.stride()))


def _result(op: Attention, builder: Builder, site: Site) -> tuple[Node, tuple[Any, ...], bool]:
    """(an empty tensor for the result, its strides along batch, heads, queries and width, whether it lies in memory as
    the site's output does, which it then reshapes to)."""
    layout, device = op.out, site.output.meta["val"].device
    shape = [layout.split[d] for d in layout.order]
    inverse = [layout.order.index(d) for d in range(len(shape))]
    own = [op.batch, op.heads, op.q_len, op.v_dim]
    out = builder.empty(shape, layout.dtype, device)
    try:
        with builder.fake_mode:
            return out, _strides(out.meta["val"].permute(inverse).view(own)), True
    except (RuntimeError, ValueError):  # heads that are apart there; torch 2.13 has another error for it
        out = builder.empty(own, layout.dtype, device)
        return out, _strides(out.meta["val"]), False


def _size(builder: Builder, name: str) -> torch.SymInt:
    """The symbolic size of the graph that is the symbol `name`."""
    for node in builder.gm.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol) and str(size) == name:
                return size
    raise SpliceError(f"no tensor of the graph has the size {name}")
