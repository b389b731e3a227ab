"""The linears of a graph whose weights are stored packed, and the matches of other patterns that read such weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..algebra import Value
from ..fused import FusedOp, MatmulFamily, MatmulGroup, Site
from ..match import Match, NearMiss
from ..matmul_family import build, stored_narrower
from ..semantics import SemanticView
from ..sites import outputs_of, site_of
from ..torch_private.fake_tensors import contents, really
from .packed import Storage, reads_codes, storage_of
from .walk import Walk

Matmuls = MatmulFamily | MatmulGroup

PATTERN = "quantised_linear"
BLOCK_BY_BLOCK = (
    "it multiplies codes block by block, and the products of every block pass through memory; multiply the rounded "
    "activations with their scales and write F.linear(scale · code, weight)"
)
ROUNDED = (
    "its activations are computed from codes of 8 bits already and are not rounded a second time: the kernel that "
    "makes them stays, and the product reads what it writes"
)
LONGEST = 256  # nodes of a formula
SMALL = 64  # elements of a constant

_readers: WeakKeyDictionary[SemanticView, Reader] = WeakKeyDictionary()


class Reader:
    """Tells how the weights of a graph are stored; what is computed alike is looked at once."""

    def __init__(self, view: SemanticView) -> None:
        self.view = view
        self.walk = Walk(view.graph_module)
        self.known: dict[Any, tuple[Storage | str | None, list[Node]]] = {}

    def storage(self, weight: Node, op: MatmulFamily) -> Storage | str | None:
        if not isinstance(op.n, int) or not isinstance(op.k, int) or op.features or op.activation:
            return None
        nodes = _computed_from(weight)
        with really():
            key = (op.n, op.k, op.weight_is_kn, *_formula(self.view.graph_module, nodes))
            if key not in self.known:
                self.known[key] = storage_of(self.walk, weight, op.n, op.k, kn=op.weight_is_kn), nodes
        found, seen = self.known[key]
        if not isinstance(found, Storage):
            return found
        here = dict(zip(seen, nodes, strict=True))
        return Storage(found.packed, tuple(here[source] for source in found.sources))

    def packed(self, op: Matmuls, site: Site) -> tuple[Matmuls, Site] | str | None:
        """The same op on its packed weights; a sentence or None where not all of them are packed."""
        at = op.whole.head
        operands, parts, missing = [*site.operands[:at]], [], False
        for part in op.parts:
            weights, extras = at + part.weights, at + part.weights + len(part.extras)
            found = [self.storage(w, part) for w in site.operands[at:weights]]
            reason = next((f for f in found if isinstance(f, str)), None)
            if reason is not None:
                return reason
            stored = [f for f in found if isinstance(f, Storage)]
            missing |= not stored or len(stored) < len(found)
            parts.append(replace(part, packed=tuple(f.packed for f in stored), weight_is_kn=False, computed_from=None))
            operands += [*(s for f in stored for s in f.sources), *site.operands[weights:extras]]
            at = extras
        if missing:
            return None
        made = MatmulGroup(op.m, tuple(parts)) if isinstance(op, MatmulGroup) else parts[0]
        return made, site_of(self.view, site.output, tuple(operands), site.others)


def _reader(view: SemanticView) -> Reader:
    if view not in _readers:
        _readers[view] = Reader(view)
    return _readers[view]


def _computed_from(weight: Node) -> list[Node]:
    """The nodes that a weight is computed from, itself first, in an order that the formula alone decides."""
    found = {weight: None}
    for node in (pending := [weight]):
        fresh = [n for n in node.all_input_nodes if n not in found] if len(found) < LONGEST else []
        found.update(dict.fromkeys(fresh))
        pending += dict.fromkeys(fresh)
    return list(found)


def _formula(gm: GraphModule, nodes: list[Node]) -> Iterator[Any]:
    """The same for weights that are computed in the same way from tensors laid out alike."""
    at = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        value = node.meta.get("val")
        laid_out = (value.dtype, *value.shape, *value.stride()) if isinstance(value, torch.Tensor) else ()
        held = contents(getattr(gm, str(node.target), None)) if node.op == "get_attr" else None
        if held is not None and held.numel() <= SMALL:
            yield str(held.dtype), *laid_out, *held.flatten().tolist()
            continue
        if node.op == "get_attr" or any(n not in at for n in node.all_input_nodes):
            yield node  # a large constant, or the rest of a long formula: only like itself
            continue
        args = map_arg((node.args, node.kwargs), lambda n: f"%{at[n]}")
        yield str(node.target) if node.op == "call_function" else node.op, str(args), *map(str, laid_out)


def find_quantised(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    """Every linear with a packed weight, a bias or a scale per feature behind it included."""
    reader = _reader(view)
    matches: list[Match] = []
    near_misses: list[NearMiss] = []
    for linear in view.linears():
        root = _whole(view, linear)
        for output in outputs_of(view, root):
            families = build(view, root, output)
            if isinstance(families, str):
                continue
            forms = [(f, reader.packed(f.op, f.site)) for f in families]
            reason = next((made for _, made in forms if isinstance(made, str)), None)
            if reason is not None:
                near_misses.append(NearMiss(PATTERN, view.products(linear)[0].weight, reason, output))
            made = [(f, m) for f, m in forms if isinstance(m, tuple)]
            if made:
                (family, (op, site)), *others = made
                matches.append(Match(PATTERN, op, site, tuple(m for _, m in others), family.prologue))
    for node in view.graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.bmm.default):
        with really():
            apart = view.value(node).op == "leaf" and any(reads_codes(reader.walk, a) for a in node.args)
        if apart:
            near_misses.append(NearMiss(PATTERN, node, BLOCK_BY_BLOCK, node))
    return matches, near_misses


def _whole(view: SemanticView, linear: Value) -> Value:
    """`linear` with what follows it one to one: a bias, a factor per output feature."""
    root = linear
    while True:
        held = view.nodes(root)
        users = {u for n in held for u in n.users if view.value(u) is not root}
        product = view.products(linear)[0].node
        if not held:  # addmm: the sum alone is a node
            root = view.value(product)
            if root is linear or not view.nodes(root):
                return linear
            continue
        if len(users) != 1:
            return root
        above = view.value(next(iter(users)))
        others = [a for a in above.args if a is not root]
        per_feature = len(others) == len(above.args) - 1 and all(a.op in ("bcast", "const") for a in others)
        if above.op not in ("add", "mul") or not per_feature:
            return root
        root = above


def with_packed_weights(
    view: SemanticView, matches: Iterable[Match], *, q8_activations: bool = False
) -> tuple[list[Match], list[NearMiss]]:
    """`matches`, those around linears with packed weights (a gated MLP, projections of one input) offered on these too;
    with `q8_activations` each is also offered with its input rounded to 8 bits, and what is rounded already is told."""
    matches = list(matches)
    found = {m.site.output for m in matches if m.pattern == PATTERN}
    if not found:
        return matches, []
    reader = _reader(view)
    result: list[Match] = []
    rounded: dict[Node, NearMiss] = {}
    for match in matches:
        forms = [(match.op, match.site), *match.alternatives]
        more: list[tuple[FusedOp, Site]] = []
        if match.site.output not in found or isinstance(match.op, MatmulGroup):
            made = [reader.packed(op, site) for op, site in forms if isinstance(op, Matmuls)]
            more += [m for m in made if isinstance(m, tuple)]
        if q8_activations:
            packed = [(op, site) for op, site in (*forms, *more) if isinstance(op, Matmuls) and op.whole.packed]
            for op, site in packed:
                if stored_narrower(site.operands[0], floating=False) is None:
                    more.append((_rounding(op), site))
                else:
                    rounded[site.output] = NearMiss(PATTERN, site.operands[0], ROUNDED, site.output)
        result.append(replace(match, alternatives=(*more, *match.alternatives)) if more else match)
    return result, list(rounded.values())


def _rounding(op: Matmuls) -> Matmuls:
    """The same op with Q8_1 activations."""
    if isinstance(op, MatmulGroup):
        return replace(op, parts=tuple(replace(part, q8_activations=True) for part in op.parts))
    return replace(op, q8_activations=True)
