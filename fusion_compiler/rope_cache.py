"""Recognises what stands before an attention with a static cache: q and k turned, k and v written into the cache.

A write puts new rows along the third axis of a cache [B, heads, S, D] (`cache_writes`). The keys are written as a
rotation (see `rope`), the values at the same positions; the queries are what the same angles turn nearest to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from .cache_codes import Rows, exchanges, rows_of, unswapped
from .cache_writes import Write, written
from .fused import CacheCodes, Declared, RopeCache, RowNorm
from .match import Match, NearMiss
from .raising.registry import arguments
from .rope import UNBOUND_ANGLES, complex_rope, find_rope, rope
from .semantics import SemanticView
from .shapes import shape_of
from .sites import site_of

aten = torch.ops.aten
PATTERN = "rope_cache"
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
ARITHMETIC = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor)
FEW = 64  # up to so many tokens a linear is likely a generated kernel, which writes the cast of its result that follows


@dataclass(frozen=True)
class Turned:
    """`node` holds x after the rotation of `match`: of its first `rotary` elements, where that is not 0."""

    match: Match
    node: Node
    x: Node
    rotary: int = 0

    @property
    def angles(self) -> tuple[Node, ...]:
        return self.match.site.operands[1:]


@dataclass(frozen=True)
class Source:
    """Where a kernel reads q or k from: the node, whether its second and third axis are exchanged against what is
    turned, and the norm of each head that the kernel applies, with its weight."""

    node: Node
    swapped: bool = False
    norm: RowNorm | None = None
    weight: Node | None = None


def find_rope_cache(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    writes = [w for w in map(written, view.graph_module.graph.nodes) if w is not None]
    if not writes:
        return [], []
    position = {node: i for i, node in enumerate(view.graph_module.graph.nodes)}
    ropes = find_rope(view)[0]
    rotations = _rotations(view, ropes)
    matches: list[Match] = []
    misses: list[NearMiss] = []
    taken: set[Node] = set()
    for keys in writes:
        rows = rows_of(keys.rows, keys.tokens_first, rotations)
        turned, tokens_first = rows.node, rows.tokens_first
        if turned not in rotations:
            between = _between(view, keys, ropes)
            misses += [NearMiss(PATTERN, keys.node, between, keys.node)] if between else []
            continue
        product = _product(rotations[turned])
        if rows.steps and product is None:
            why = f"{keys.node.name} writes codes of keys that are turned in several dtypes, each of which rounds"
            misses.append(NearMiss(PATTERN, keys.node, why, keys.node))
            continue
        values = [w for w in writes if w is not keys and w.at == keys.at and _alike(w, keys)]
        values = [w for w in values if w.node not in taken and rows_of(w.rows, False, rotations).node not in rotations]
        values = [w for w in values if bool(rows_of(w.rows, False).steps) == bool(rows.steps)]
        angles = rotations[turned].angles
        others = [r for r in rotations if r not in taken and r is not turned and _turns(view, rotations[r], angles)]
        others = [r for r in others if rotations[r].rotary == rotations[turned].rotary]
        others = [r for r in others if _is_query(r, turned, tokens_first)]
        if not values or not others:
            what = (
                "no queries are turned by the same angles" if values else "no values are written at the same positions"
            )
            misses.append(NearMiss(PATTERN, keys.node, f"{keys.node.name} writes turned keys, but {what}", keys.node))
            continue

        def distance(node: Node) -> int:
            return abs(position[node] - position[turned])  # noqa: B023

        query, value = min(others, key=distance), min((w.node for w in values), key=distance)
        taken |= {query, turned, value, keys.node}
        beside = next(w for w in values if w.node is value)
        matches.append(_match(view, rotations[query], rotations[turned], keys, rows, beside))
    return matches, misses


def _rotations(view: SemanticView, ropes: Sequence[Match]) -> dict[Node, Turned]:
    """What is turned, by the node that holds it: all of a tensor's last axis, or the first part of it."""
    found = [m for m in ropes if isinstance(m.op, Declared) and m.op.function is rope]
    whole = {m.site.output: Turned(m, m.site.output, m.site.operands[0]) for m in found}
    partly = (_partly(view, whole, node) for node in view.graph_module.graph.nodes)
    return whole | {turned.node: turned for turned in partly if turned is not None}


def _between(view: SemanticView, write: Write, ropes: Sequence[Match]) -> str:
    """What stands between a rotation and the write of what is made of it; nothing where nothing is turned."""
    turned, waiting, seen = {m.site.output: m for m in ropes}, [write.rows], set[Node]()
    while waiting and waiting[0] not in turned:
        node = waiting.pop(0)
        if node.target not in PRODUCTS and node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    if not waiting:
        return ""
    rotation = turned[waiting[0]]
    written = f"{write.node.name} writes what {rotation.site.output.name} turns"
    function = rotation.op.function if isinstance(rotation.op, Declared) else None
    if function is complex_rope:
        return f"{written}, but as complex numbers; the kernel reads real ones, as in x·cos + rotate_half(x)·sin"
    if function is not rope:
        return f"{written}, but {UNBOUND_ANGLES}; the kernel reads those of x·cos + rotate_half(x)·sin"
    if view.value(unswapped(write.rows)[0]).op == "rms_norm":
        return f"{written}, but normalised behind the rotation; a norm in front of it would be part of the kernel"
    return f"{written}, but {unswapped(write.rows)[0].name} stands between them; the kernel writes what it has turned"


def _partly(view: SemanticView, whole: dict[Node, Turned], node: Node) -> Turned | None:
    """`node` as the first elements of each row of a tensor, turned, beside the others as they are."""
    if node.target is not aten.cat.default:
        return None
    parts, dim = arguments(node, (None, 0))
    shape = shape_of(node)
    if len(parts) != 2 or dim % len(shape) != len(shape) - 1:
        return None
    turned, rest, width = whole.get(unswapped(parts[0])[0]), _slice(parts[1]), shape_of(parts[0])[-1]
    first = _slice(turned.x) if turned is not None else None
    if turned is None or first is None or rest is None or (first[1], rest[1]) != (0, width):
        return None
    fits = shape_of(rest[0]) == shape and _same(view, first[0], rest[0])
    return Turned(turned.match, node, rest[0], width) if fits else None


def _slice(node: Node) -> tuple[Node, int] | None:
    """(x, i) where `node` is x[..., i:] or a part of it."""
    if node.target is not aten.slice.Tensor:
        return None
    x, dim, first, _, step = arguments(node, (None, 0, None, None, 1))
    last = len(shape_of(node)) - 1
    return (x, first or 0) if dim % (last + 1) == last and step == 1 else None


def _same(view: SemanticView, a: Node, b: Node) -> bool:
    return a is b or view.value(a) is view.value(b)


def _alike(values: Write, keys: Write) -> bool:
    """Whether two caches have the same heads, positions and dtype."""
    same = values.cache.meta["val"].dtype == keys.cache.meta["val"].dtype
    return same and shape_of(values.cache)[:3] == shape_of(keys.cache)[:3] and values.shape[:3] == keys.shape[:3]


def _product(rotation: Turned) -> torch.dtype | None:
    """The one dtype that the products of a rotation and their sums are rounded to."""
    found = {n.meta["val"].dtype for n in rotation.match.site.interior if n.target in ARITHMETIC}
    return found.pop() if len(found) == 1 else None


def _turns(view: SemanticView, rotation: Turned, angles: Sequence[Node]) -> bool:
    return all(_same(view, a, b) for a, b in zip(rotation.angles, angles, strict=True))


def _is_query(query: Node, keys: Node, tokens_first: bool) -> bool:
    q, k = shape_of(query), shape_of(keys)
    head = 2 if tokens_first else 1
    beside = [d for d in range(4) if d != head]
    return len(q) == 4 and [q[d] for d in beside] == [k[d] for d in beside] and q[head] % k[head] == 0


def _match(view: SemanticView, query: Turned, key: Turned, keys: Write, rows: Rows, values: Write) -> Match:
    # of keys that are rounded to codes a norm stays where it is: its sums, taken in another order, would change codes
    q, k = _source(view, query.x), Source(key.x) if rows.steps else _source(view, key.x)
    tokens_first, product = rows.tokens_first, _product(key)
    v = rows_of(values.rows, values.tokens_first) if rows.steps else Rows(values.rows, values.tokens_first)
    codes = None
    if rows.steps and product is not None:
        codes = CacheCodes(product, key.node.meta["val"].dtype, rows.steps, v.steps)
    scales = [scale for scale in (rows.scale, v.scale) if scale is not None]
    out, swapped = _seen_as(query.node)
    outputs = sorted((out, keys.node, values.node))
    names = {out: "out", keys.node: "keys", values.node: "values"}
    last, others = outputs[-1], tuple(outputs[:-1])
    weights = [s.weight for s in (q, k) if s.weight is not None]
    index = (keys.at.node,) if keys.at.node is not None else ()
    operands = (q.node, k.node, v.node, *key.angles, keys.cache, values.cache, *index, *weights, *scales)
    first = {
        "q": tokens_first ^ q.swapped, "k": tokens_first ^ k.swapped, "out": tokens_first ^ swapped,
        "angles": tokens_first, "v": v.tokens_first, "key_scale": rows.scale_tokens_first,
        "value_scale": v.scale_tokens_first,
    }  # fmt: skip
    assert isinstance(key.match.op, Declared)
    batch, kv_heads, cache_length, width = shape_of(keys.cache)
    op = RopeCache(
        batch=batch, heads=shape_of(query.node)[2 if tokens_first else 1], kv_heads=kv_heads,
        length=keys.shape[2], cache_length=cache_length, head_dim=width, v_dim=shape_of(values.cache)[3],
        results=tuple(names[n] for n in (last, *others)), dtype=query.node.meta["val"].dtype,
        interleaved=bool(key.match.op.arguments[-1]), tokens_first=frozenset(n for n in first if first[n]),
        index=keys.at.kind, offset=keys.at.offset, q_norm=q.norm, k_norm=k.norm,
        rotary=key.rotary, codes=codes,
    )  # fmt: skip
    return Match(PATTERN, op, site_of(view, last, operands, others))


def _seen_as(node: Node) -> tuple[Node, bool]:
    """`node`, or what alone reads it and exchanges its second and third axis, and whether it is that."""
    reader = next(iter(node.users)) if len(node.users) == 1 else node
    return (reader, True) if exchanges(reader) else (node, False)


def _source(view: SemanticView, node: Node) -> Source:
    """`node`, or what it is the norm of each head of."""
    normed, swapped = unswapped(node)
    value = view.value(normed)
    if value.op != "rms_norm" or value.attr("size") != shape_of(node)[-1]:
        return Source(node)
    inner = [n for n in view.nodes(value.args[0]) if n < normed and shape_of(n) == shape_of(normed)]
    weights = [n for n in view.nodes(value.args[1]) if len(shape_of(n)) == 1] if len(value.args) > 1 else []
    if not inner or (len(value.args) > 1 and not weights):
        return Source(node)
    norm = RowNorm("rms", value.attr("eps"), bool(weights), offset=value.attr("offset"))
    tokens = shape_of(node)[0] * shape_of(node)[1 if swapped else 2]
    return Source(inner[-1] if tokens <= FEW else inner[0], swapped, norm, weights[0] if weights else None)
