"""Finds linears that read one and the same input and give a result each, as the projections to q, k and v do.

Their widths may differ, each may have a bias or another epilogue that reads no tensor of the rows, and a norm in front
is folded in. A packed q|k|v is one linear already.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from . import matmul_family
from .algebra import Value
from .fused import MatmulFamily, MatmulGroup, Site
from .linear_chains import chains
from .match import Match, NearMiss
from .matmul_family import Family
from .semantics import SemanticView
from .shapes import extent
from .sites import site_of

PATTERN = "qkv_projection"
MOST = 8  # results that are all written before the first is read; layers that share an encoder's output are more
STORED = (
    "it reads the same input as other linears, but its weight is stored otherwise ({}); weights of one layout and one "
    "distance between their rows would share a kernel"
)


@dataclass(frozen=True)
class _Linear:
    """One linear that might share a kernel: the ways to see it, with its norm folded in first where it has one."""

    families: tuple[Family, ...]

    @property
    def op(self) -> MatmulFamily:
        return self.families[-1].op

    @property
    def output(self) -> Node:
        return self.families[-1].site.output

    @property
    def weight(self) -> torch.Tensor:
        return self.families[-1].site.operands[1].meta["val"]  # type: ignore[no-any-return]

    @property
    def layout(self) -> Hashable:
        """What has to agree for one kernel to read all weights."""
        return self.op.weight_is_kn, extent(self.weight.stride()[-2]) if self.weight.dim() > 1 else 1


def find_siblings(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    """Every input that several linears read, and the linears among its readers whose weights are stored otherwise."""
    readers: dict[Value, list[_Linear]] = {}
    for linear in view.linears():
        found = _linear(view, linear)
        if found is not None:
            readers.setdefault(linear.args[0], []).append(found)
    matches, near_misses = [], []
    for linears in readers.values():
        groups: dict[Hashable, list[_Linear]] = {}
        for one in linears:
            groups.setdefault((one.op.dtype, extent(one.op.m), one.layout), []).append(one)
        largest = max(groups.values(), key=len)
        # weights that are computed after a result is read may be stored in what is there before
        together, computed = _in_time(largest), _in_time(largest, weights=False)
        wanted = [together, computed] if len(computed) > len(together) else [together]
        matches += [_match(view, linears) for linears in wanted if 1 < len(linears) <= MOST]
        for group in groups.values():
            if group is not largest and group[0].op.dtype == largest[0].op.dtype:
                near_misses += [NearMiss(PATTERN, g.output, _stored(g), g.output) for g in group]
    return matches, near_misses


def _in_time(linears: Sequence[_Linear], *, weights: bool = True) -> list[_Linear]:
    """Without those that read what is only computed after another of the results is read; their `weights` count too."""
    first = min((user for one in linears for user in one.output.users), default=None)

    def read(one: _Linear) -> list[Node]:
        x, weight, *extras = one.families[-1].site.operands
        return [x, *([weight] if weights else []), *extras]

    early = [one for one in linears if first is None or all(n < first for n in read(one))]
    return early if len(early) == len(linears) else _in_time(early, weights=weights)


def _stored(linear: _Linear) -> str:
    way = "[in, out]" if linear.op.weight_is_kn else "[out, in]"
    return STORED.format(f"{way}, rows {linear.weight.stride()[-2]} apart")


def _linear(view: SemanticView, linear: Value) -> _Linear | None:
    """The longest chain behind a linear that reads no tensor of the rows."""
    for chain in chains(view, linear):
        root, output = view.value(chain.root), chain.output(view)
        families = matmul_family.build(view, root, output, chain.border) if output is not None else ""
        if isinstance(families, str) or families[-1].op.features or families[-1].op.weights > 1:
            continue
        if not any(_of_rows(families[-1])):
            return _Linear(tuple(families))
    return None


def _of_rows(family: Family) -> Iterator[bool]:
    """For each extra, whether it may be computed from another of the linears."""
    for extra, node in zip(family.op.extras, family.site.operands[2:], strict=True):
        yield extra.kind in ("full", "row") and node.op == "call_function"


def _match(view: SemanticView, linears: Sequence[_Linear]) -> Match:
    ordered = sorted(linears, key=lambda one: one.output, reverse=True)
    folded = [one.families[0] for one in ordered]
    plain = [one.families[-1] for one in ordered]
    forms = [plain]
    heads = {f.site.operands[: f.op.head] for f in folded}
    if all(f.op.norm is not None for f in folded) and len(heads) == 1 and len({f.op.norm for f in folded}) == 1:
        forms.insert(0, folded)
    made = [_joined(view, form) for form in forms]
    (op, site), *others = made
    prologue = forms[0][0].prologue
    return Match(PATTERN, op, site, tuple(others), prologue)


def _joined(view: SemanticView, form: Sequence[Family]) -> tuple[MatmulGroup, Site]:
    head = form[0].site.operands[: form[0].op.head]
    tails = [n for f in form for n in f.site.operands[f.op.head :]]
    output, *others = (f.site.output for f in form)
    return MatmulGroup(form[0].op.m, tuple(f.op for f in form)), site_of(view, output, (*head, *tails), tuple(others))
