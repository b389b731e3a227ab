"""The linears of a graph whose weights are stored packed, and the matches of other patterns that read such weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch.fx import Node

from ..algebra import Value
from ..fused import FusedOp, MatmulFamily, Site
from ..match import Match, NearMiss
from ..matmul_family import build
from ..semantics import SemanticView
from ..sites import outputs_of, site_of
from ..torch_private.fake_tensors import really
from .packed import Storage, storage_of
from .walk import Walk

PATTERN = "quantised_linear"


class Reader:
    """Remembers how the weights of a graph are stored."""

    def __init__(self, view: SemanticView) -> None:
        self.view = view
        self.walk = Walk(view.graph_module)
        self.known: dict[tuple[Node, bool], Storage | str | None] = {}

    def storage(self, weight: Node, op: MatmulFamily) -> Storage | str | None:
        if not isinstance(op.n, int) or not isinstance(op.k, int) or op.features:
            return None
        at = (weight, op.weight_is_kn)
        if at not in self.known:
            with really():
                self.known[at] = storage_of(self.walk, weight, op.n, op.k, kn=op.weight_is_kn)
        return self.known[at]

    def packed(self, op: MatmulFamily, site: Site) -> tuple[MatmulFamily, Site] | str | None:
        """The same op on its packed weights."""
        before = 1 + (op.norm is not None and op.norm.has_weight) + (op.norm is not None and op.norm.has_bias)
        weights = site.operands[before : before + op.weights]
        found = [self.storage(w, op) for w in weights]
        reason = next((f for f in found if isinstance(f, str)), None)
        if reason is not None:
            return reason
        stored = [f for f in found if isinstance(f, Storage)]
        if not stored or len(stored) < len(found):
            return None
        sources = tuple(s for f in stored for s in f.sources)
        operands = (*site.operands[:before], *sources, *site.operands[before + op.weights :])
        made = replace(op, packed=tuple(f.packed for f in stored), weight_is_kn=False)
        return made, site_of(self.view, site.output, operands)


def find_quantised(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    """Every linear with a packed weight, a bias or a scale per feature behind it included."""
    reader = Reader(view)
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


def with_packed_weights(view: SemanticView, matches: Iterable[Match], *, q8_activations: bool = False) -> list[Match]:
    """`matches`, those around linears with packed weights (a gated MLP) offered on these too; with `q8_activations`
    each is also offered with its input rounded to 8 bits."""
    matches = list(matches)
    found = {m.site.output for m in matches if m.pattern == PATTERN}
    if not found:
        return matches
    reader = Reader(view)
    result = []
    for match in matches:
        forms = [(match.op, match.site), *match.alternatives]
        more: list[tuple[FusedOp, Site]] = []
        if match.site.output not in found:
            made = [reader.packed(op, site) for op, site in forms if isinstance(op, MatmulFamily)]
            more += [m for m in made if isinstance(m, tuple)]
        if q8_activations:
            packed = [(op, site) for op, site in (*forms, *more) if isinstance(op, MatmulFamily) and op.packed]
            more += [(replace(op, q8_activations=True), site) for op, site in packed]
        result.append(replace(match, alternatives=(*more, *match.alternatives)) if more else match)
    return result
