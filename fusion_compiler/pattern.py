"""Patterns, declared as plain PyTorch functions.

    @pattern(name="gated_mlp", examples=[Example(lambda: (x, w_gate, w_up))])
    def gated_mlp(x, w_gate, w_up, b_gate=None, act=choice(F.silu, F.gelu)):
        return act(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up)

The function is traced once on its first example and raised by the same code as the user's graph, so one declaration
covers all spellings, dtypes and ranks. A parameter whose default is None is optional; one whose default is a `choice`
stands for each of the alternatives. Everything else is a tensor, and matches any tensor.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from . import decompositions, matmul_family
from .algebra import Value
from .fused import FusedOp, Site
from .match import Match, NearMiss
from .semantics import SemanticView
from .sites import outputs_of
from .unify import Furthest, Unifier, is_telling

Constraint = Callable[[FusedOp, Site], str | None]


@dataclass(frozen=True)
class Choice:
    alternatives: tuple[Callable[..., Any], ...]


def choice(*alternatives: Callable[..., Any]) -> Any:
    """A parameter of a pattern that stands for any one of these functions."""
    return Choice(alternatives)


@dataclass(frozen=True)
class Example:
    """Inputs for a function that the pattern must match, or must refuse.

    inputs:   makes the arguments (tensors), positionally; fresh ones at each call.
    function: what is compiled; the pattern's own function where None.
    refused:  words that the reason contains, where the pattern must not match; None where it must.
    """

    inputs: Callable[[], tuple[Any, ...]]
    function: Callable[..., Any] | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Variant:
    """One raised form of a pattern: its root, and its parameters among the leaves."""

    root: Value
    parameters: Mapping[Value, str]


@dataclass(frozen=True)
class Pattern:
    """A declared pattern. `constraints` look at the fused op and say why it is refused, or return None."""

    name: str
    function: Callable[..., Any]
    constraints: tuple[Constraint, ...] = ()
    examples: tuple[Example, ...] = field(default=(), compare=False)

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Every combination of optional parameters and choices, raised."""
        parameters = inspect.signature(self.function).parameters
        values = dict(zip(parameters, self.examples[0].inputs(), strict=False))
        alternatives: list[list[Any]] = []
        for name, p in parameters.items():
            if isinstance(p.default, Choice):
                alternatives.append(list(p.default.alternatives))
            elif p.default is None:
                alternatives.append([None, values[name]])
            else:
                alternatives.append([values[name]])
        forms: dict[str, Variant] = {}
        for arguments in itertools.product(*alternatives):
            variant = _raise(self.function, dict(zip(parameters, arguments, strict=True)))
            forms.setdefault(repr(variant.root), variant)
        return tuple(forms.values())

    def find(self, view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
        """Every place where the pattern stands in a graph, and every place where most of it does."""
        matched: dict[Value, list[Match]] = {}
        missed: list[tuple[Value, NearMiss]] = []
        for value in view.values():
            variants = [v for v in self.variants if v.root.op == value.op]
            for output in outputs_of(view, value) if variants else ():
                found = self._at(view, value, output, variants)
                if isinstance(found, Match):
                    matched.setdefault(value, []).append(found)
                elif isinstance(found, NearMiss):
                    missed.append((value, found))
        # what fails one step above a match (the residual added to a linear that matched) is no near miss
        near_misses = [n for value, n in missed if not any(a in matched for a in value.args)]
        return [m for found in matched.values() for m in found], near_misses

    def _at(
        self, view: SemanticView, value: Value, output: Any, variants: Sequence[Variant]
    ) -> Match | NearMiss | None:
        shape = output.meta["val"].shape
        single_row = all(s == 1 for s in shape[:-1] if not isinstance(s, torch.SymInt)) and not any(
            isinstance(s, torch.SymInt) for s in shape[:-1]
        )
        closest: Furthest | None = None
        for variant in variants:
            unifier = Unifier(variant.parameters, single_row)
            if unifier.match(variant.root, value) is not None:
                return self._matched(view, value, output)
            reached = unifier.furthest
            if reached is not None and is_telling(reached) and (closest is None or reached.depth > closest.depth):
                closest = reached
        if closest is None:
            return None
        node = next(iter(view.nodes(closest.found)), output)
        return NearMiss(self.name, node, closest.reason)

    def _matched(self, view: SemanticView, value: Value, output: Any) -> Match | NearMiss | None:
        if matmul_family.is_piece(view, value):
            return None  # the packed linear that it is a piece of is looked at as a whole
        families = matmul_family.build(view, value, output)
        if isinstance(families, str):
            return NearMiss(self.name, output, families)
        reasons = []
        legal = []
        for family in families:
            reason = next((r for c in self.constraints if (r := c(family.op, family.site)) is not None), None)
            if reason is None:
                legal.append(family)
            else:
                reasons.append(reason)
        if not legal:
            return NearMiss(self.name, output, reasons[0])
        first, *others = legal
        alternatives = tuple((f.op, f.site) for f in others)
        return Match(self.name, first.op, first.site, alternatives, first.prologue)


@dataclass(frozen=True)
class RecognisedPattern:
    """A pattern that code of its own looks for, where one function cannot say what all may vary.

    `function` is one spelling of it, which the examples run where they bring no other.
    """

    name: str
    function: Callable[..., Any]
    find: Callable[[SemanticView], tuple[list[Match], list[NearMiss]]]
    examples: tuple[Example, ...] = field(default=(), compare=False)


class AnyPattern(Protocol):
    """What the compiler asks of a pattern, declared or recognised."""

    @property
    def name(self) -> str: ...
    @property
    def function(self) -> Callable[..., Any]: ...
    @property
    def examples(self) -> tuple[Example, ...]: ...
    @property
    def find(self) -> Callable[[SemanticView], tuple[list[Match], list[NearMiss]]]: ...


def pattern(
    *, name: str, constraints: Sequence[Constraint] = (), examples: Sequence[Example]
) -> Callable[[Callable[..., Any]], Pattern]:
    """Declare a pattern. The first example is also what the function is traced with, so it gives every argument.

    Raises ValueError where there is no example to trace with.
    """
    if not examples:
        raise ValueError(f"pattern {name!r} has no example; give one, so that the function can be traced")

    def declare(function: Callable[..., Any]) -> Pattern:
        return Pattern(name, function, tuple(constraints), tuple(examples))

    return declare


def trace(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """The functional, decomposed ATen graph of a function on inputs of these shapes."""
    with torch.no_grad():
        graph_module = make_fx(function, decomposition_table=decompositions.table(), tracing_mode="fake")(*inputs)
        if any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in graph_module.graph.nodes):
            # some decompositions update in place; the graphs we match never do
            functional = torch.func.functionalize(graph_module, remove="mutations")
            graph_module = make_fx(functional, tracing_mode="fake")(*inputs)
        return graph_module


def _raise(function: Callable[..., Any], arguments: dict[str, Any]) -> Variant:
    tensors = {name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)}
    fixed = {name: a for name, a in arguments.items() if name not in tensors}
    graph_module = trace(
        lambda *values: function(**dict(zip(tensors, values, strict=True)), **fixed), [*tensors.values()]
    )
    view = SemanticView(graph_module)
    inputs = graph_module.graph.find_nodes(op="placeholder")
    parameters = {view.value(n): name for n, name in zip(inputs, tensors, strict=True)}
    root = view.value(graph_module.graph.output_node().args[0])  # type: ignore[arg-type]
    return Variant(root, parameters)
