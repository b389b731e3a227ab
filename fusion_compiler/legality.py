"""Whether a fused op may take the place of the nodes it matched, whatever it would save.

`Legality.check` answers with None or with the sentence that goes into the report. The fused node will stand where the
site's output stands and read the site's operands there, so what matters is: that nobody else needs what disappears,
that no operand has changed by then, and that the values are of a kind that fused kernels handle.

A path that leaves the site and comes back into it would have to start at an escaping intermediate. Those stay in the
graph, so nothing on such a path waits for the fused node and no cycle can arise; `select` checks the same for several.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .cost.amounts import amount
from .cost.node_work import is_view
from .fused import Site
from .purity import is_random
from .report import where
from .shapes import count, shape_of

aten = torch.ops.aten

# Fused kernels accumulate in float32, which would lose what float64 holds.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2)

# Too dear to be computed twice, once in the fused kernel and once for somebody else.
EXPENSIVE = (
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._softmax.default,
    aten.convolution.default,
)  # fmt: skip


COMPARED = "compared exactly"


def mark_compared(graph: Graph) -> None:
    """Marks the floating-point tensors that a graph of forward and backward pass asks to be equal.

    The gradient of a maximum goes where x is equal to it. The backward pass may compute x anew, and finds none unless
    it does so as the forward pass did.
    """
    for node in graph.nodes:
        if node.target in (aten.eq.Tensor, aten.ne.Tensor):
            floating = [n for n in node.all_input_nodes if n.meta["val"].is_floating_point()]
            for source in floating:  # equal positions or segments are a mask
                while is_view(source):
                    source.meta[COMPARED] = True
                    source = source.all_input_nodes[0]
                source.meta[COMPARED] = True


class Legality:
    """The facts about one graph that every site's check needs, gathered once."""

    def __init__(self, graph: Graph) -> None:
        self.position = {node: i for i, node in enumerate(graph.nodes)}
        self.compared = {node for node in graph.nodes if COMPARED in node.meta}
        self.anew = _computed_anew(self.compared, set(graph.output_node().all_input_nodes))
        self.writes = [(node, written) for node in graph.nodes for written in mutated(node)]

    def check(self, site: Site, *, complex_numbers: bool = False, codes: bool = False) -> str | None:
        """Why `site` must not be replaced by one node, or None. `complex_numbers`, `codes` (float8 that something is
        stored in): these are no obstacle."""
        return (
            _values(site, complex_numbers, CODES if codes else ())
            or self._late_operand(site)
            or _gaps(site)
            or _escapes(site)
            or _randomness(site)
            or self._comparison(site)
            or self._mutation(site)
        )

    def _comparison(self, site: Site) -> str | None:
        inside = [n for n in site.interior if n not in site.outputs]
        doubtful = [n for n in inside if n in self.compared] + [n for n in (*inside, *site.outputs) if n in self.anew]
        if not doubtful:
            return None
        return (
            f"the backward pass looks where a tensor equals its maximum, for which it computes {_named(doubtful[0])} "
            "anew; a fused kernel would round otherwise (take the maximum of x.detach() if it needs no gradient)"
        )

    def _late_operand(self, site: Site) -> str | None:
        place = self.position[site.place]
        late = next((n for n in site.operands if self.position[n] >= place), None)
        return None if late is None else f"{_named(late)} is read but only computed after {site.place.name}"

    def _mutation(self, site: Site) -> str | None:
        if not self.writes:
            return None
        interior = set(site.interior)
        first_read: dict[int | None, int] = {}
        for operand in site.operands:
            reads = [self.position[user] for user in operand.users if user in interior]
            storage = _storage(operand)
            first_read[storage] = min([*reads, first_read.get(storage, self.position[site.place])])
        inside = {_storage(node) for node in interior} - set(first_read)
        for node, written in self.writes:
            storage, at = _storage(written), self.position[node]
            if node in interior:
                return f"{_named(node)} writes to {written.name} in place, which a fused kernel would not do"
            if storage is None:
                continue
            if storage in inside:
                return f"{_named(node)} writes to {written.name}, which shares memory with an intermediate"
            if storage in first_read and first_read[storage] < at < self.position[site.output]:
                return f"{_named(node)} overwrites {written.name} after it is read, before the fused kernel would run"
        return None


def _values(site: Site, complex_numbers: bool, codes: Sequence[torch.dtype]) -> str | None:
    home = site.output.meta["val"].device if isinstance(site.output.meta.get("val"), torch.Tensor) else None
    if home is None:
        return f"{site.output.name} is not one tensor"
    for node in (*site.operands, *site.interior):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or (value.dim() == 0 and node not in site.operands):
            continue  # a constant of the formula
        if value.is_complex() and not complex_numbers:
            return f"{_named(node)} is complex ({value.dtype}); fused kernels handle real numbers"
        if value.is_floating_point() and value.dtype not in (*FLOATS, *codes):
            return f"{_named(node)} is {value.dtype}; fused kernels take float16, bfloat16 and float32"
        if value.layout is not torch.strided:
            return f"{_named(node)} has layout {value.layout}; fused kernels read strided tensors"
        if value.device != home and node in site.operands:
            return f"{_named(node)} lies on {value.device}, the result on {home}"
        if is_empty(node):
            return f"{_named(node)} is empty (shape {tuple(value.shape)}), so there is nothing to compute"
    return None


def _escapes(site: Site) -> str | None:
    interior = set(site.interior)
    for node in site.interior:
        if node in site.outputs:
            continue
        outside = [user for user in node.users if user not in interior]
        if not outside:
            continue
        user = outside[0]
        reader = "returned by the graph (or saved for backward)" if user.op == "output" else f"used by {_named(user)}"
        if node not in site.escaping:
            return f"the intermediate {_named(node)} is also {reader}, so it cannot disappear"
        if node.target in EXPENSIVE:
            return f"the intermediate {_named(node)} is also {reader}; fusing would compute it twice"
    return None


def _gaps(site: Site) -> str | None:
    """A result that the graph returns as part of a larger tensor would have to be written into such a one."""
    for output in site.outputs:
        value = output.meta["val"]
        steps = zip(value.shape, value.stride(), strict=True)
        reach = sympy.expand(sum((amount(n) - 1) * amount(s) for n, s in steps) + 1)
        if (reach != count(shape_of(output)) or amount(value.storage_offset()) != 0) and _returned(output):
            return (
                f"{_named(output)} is returned as it lies in a larger tensor (strides {tuple(value.stride())}, from "
                f"{value.storage_offset()} on), and a fused kernel writes one of its own; return a copy (clone)"
            )
    return None


def _returned(node: Node) -> bool:
    return any(user.op == "output" or (is_view(user) and _returned(user)) for user in node.users)


def _computed_anew(compared: Iterable[Node], saved: Collection[Node]) -> set[Node]:
    """What the `compared` are computed from, up to what is saved for the backward pass."""
    found: set[Node] = set()
    stack = list(compared)
    while stack:
        node = stack.pop()
        if node not in found and node not in saved and node.op == "call_function":
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _randomness(site: Site) -> str | None:
    drawn = next((n for n in site.interior if is_random(n)), None)
    return f"{_named(drawn)} draws random numbers, which a fused kernel would draw differently" if drawn else None


def is_empty(node: Node) -> bool:
    """Whether a node's value is a tensor without elements."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(statically_known_true(size == 0) for size in value.shape)


def mutated(node: Node) -> Iterator[Node]:
    """The arguments that `node` writes to in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value: Any = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Node):
                yield one


def _storage(node: Node) -> int | None:
    """Identity of the memory that a node's value lies in; views share it."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def _named(node: Node) -> str:
    return f"{node.name} ({where(node)})"
