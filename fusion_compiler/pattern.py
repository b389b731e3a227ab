"""Patterns, declared as plain PyTorch functions.

    @pattern(name="gated_mlp", examples=[Example(lambda: (x, w_gate, w_up, b_gate))])
    def gated_mlp(x, w_gate, w_up, b_gate=None, act=choice(F.silu, F.gelu)):
        return act(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up)

The function is traced on its first example and raised by the same code as the user's graph, so one declaration covers
all spellings, dtypes and ranks. What a parameter is, its default says:

    none                     a tensor; it matches any tensor
    None                     a tensor that may be absent
    a number (eps=1e-6)      a literal: bound to whatever number the graph has there
    literal(1e-6, hi=1e-3)   a literal in a range
    choice(F.silu, F.gelu)   any of the alternatives

Numbers that the function writes itself are demanded as they are. The function may return several tensors. A match
becomes a `MatmulFamily` or a `RowReduction`, for which kernels are generated, and, where kernels are registered for the
pattern or none is generated, a `Declared` op.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.fx import Node

from . import matmul_family, row_reduction
from .algebra import Value
from .arguments import Binder
from .attention import attention, declared_attention, example, find_like
from .fused import FusedOp, Site
from .kernels import kernels_of
from .match import Match, NearMiss
from .norms import NORMS, RESEMBLES, resembles
from .row_reduction import REDUCTIONS
from .semantics import SemanticView
from .sites import interior_between, outputs_of
from .torch_private import nested
from .unify import Bindings, Furthest, Unifier, Variant, is_telling
from .variants import Choice, Literal, Parameters, PatternError, raise_variants, trace

__all__ = [
    "AnyPattern", "Choice", "Constraint", "Example", "Literal", "Pattern", "PatternError", "RecognisedPattern",
    "choice", "literal", "pattern", "trace",
]  # fmt: skip

# Called with what its parameters name: `op`, `site`, and parameters of the pattern (a bound number, the chosen
# alternative, the node of a tensor, None for what is absent). Returns why the pattern is refused, or None.
Constraint = Callable[..., str | None]
Lookalikes = Callable[[SemanticView], Iterable[tuple[Value, str]]]


def choice(*alternatives: Any) -> Any:
    """A parameter of a pattern that stands for any one of these functions or values."""
    return Choice(alternatives)


def literal(default: float, *, lo: float | None = None, hi: float | None = None) -> Any:
    """A parameter of a pattern that is a number of the graph, from `lo` to `hi`."""
    return Literal(default, lo, hi)


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
class Pattern:
    """A declared pattern. `constraints` look at the fused op and say why it is refused, or return None; `lookalikes`
    gives (value, reason) of what the pattern does not take although it means the same."""

    name: str
    function: Callable[..., Any]
    constraints: tuple[Constraint, ...] = ()
    examples: tuple[Example, ...] = field(default=(), compare=False)
    lookalikes: Lookalikes | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns; a choice left out is its first alternative, a literal its default."""
        known = self.parameters
        defaults = {name: c.alternatives[0] for name, c in known.choices.items()}
        defaults |= {name: n.default for name, n in known.literals.items()}
        given = inspect.signature(self.function).bind(*args, **kwargs).arguments
        return self.function(**{**defaults, **given})

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Every combination of optional parameters and choices, raised."""
        # under the fake tensors and symbolic sizes of a graph that is being compiled, tracing takes four times as long
        with nested.apart():
            return raise_variants(self.name, self.function, self.examples[0].inputs)

    @cached_property
    def parameters(self) -> Parameters:
        return Parameters.of(self.name, self.function)

    def find(self, view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
        """Every place where the pattern stands in a graph, and every place where most of it does."""
        matched: dict[Value, list[Match]] = {}
        missed: list[tuple[Value, NearMiss]] = []
        binder = Binder(view, self.name, self.function)
        of_norms = any(v.root.op in NORMS for v in self.variants)
        for value in view.values():
            if of_norms and resembles(value) and view.nodes(value):
                missed.append((value, NearMiss(self.name, view.nodes(value)[0], RESEMBLES, view.nodes(value)[0])))
            variants = [v for v in self.variants if v.root.op == value.op]
            for output in outputs_of(view, value) if variants else ():
                found = self._at(binder, value, output, variants)
                if isinstance(found, Match):
                    matched.setdefault(value, []).append(found)
                elif isinstance(found, NearMiss):
                    missed.append((value, found))
        for value, reason in self.lookalikes(view) if self.lookalikes else ():
            if value not in matched:
                missed += [(value, NearMiss(self.name, n, reason, n)) for n in outputs_of(view, value)]
        matches = [m for found in matched.values() for m in found]
        # a node that others read too is no mere part of the match that contains it
        inside = {n for m in matches for n in m.site.interior if n not in (*m.site.outputs, *m.site.escaping)}
        # what fails one step above a match (the residual added to a linear that matched) or inside of one (the tanh of
        # a hand-written gelu) is no near miss, and what matches inside of one is part of it
        near_misses = [n for value, n in missed if n.root not in inside and not any(a in matched for a in value.args)]
        return [m for m in matches if m.site.output not in inside], near_misses

    def _at(self, binder: Binder, value: Value, output: Any, variants: Sequence[Variant]) -> Match | NearMiss | None:
        shape = output.meta["val"].shape
        single_row = all(s == 1 for s in shape[:-1] if not isinstance(s, torch.SymInt)) and not any(
            isinstance(s, torch.SymInt) for s in shape[:-1]
        )
        closest: Furthest | None = None
        for variant in variants:
            unifier = Unifier(
                variant, single_row, nearby=functools.partial(_nearby, binder.view), written=binder.view.written
            )
            bindings = unifier.match(value)
            if bindings is not None:
                return self._matched(binder, value, output, variant, bindings)
            reached = unifier.furthest
            if reached is not None and is_telling(reached) and (closest is None or reached.depth > closest.depth):
                closest = reached
        if closest is None:
            return None
        node = next(iter(binder.view.nodes(closest.found)), output)
        return NearMiss(self.name, node, closest.reason, output)

    def _matched(
        self, binder: Binder, value: Value, output: Any, variant: Variant, bindings: Bindings
    ) -> Match | NearMiss | None:
        view = binder.view
        if matmul_family.is_piece(view, value):
            return None  # the packed linear that it is a piece of is looked at as a whole
        literals = self.parameters.literals
        for name, number in bindings.literals.items():
            refusal = literals[name].refusal(name, number)
            if refusal is not None:
                return NearMiss(self.name, output, refusal, output)
        numbers = {name: known.value(bindings.literals.get(name, known.default)) for name, known in literals.items()}
        given = {**variant.fixed, **numbers}
        main = next(i for i, root in enumerate(variant.roots) if root is variant.root)
        outputs = _outputs(view, bindings.roots, main, output)
        forms, reasons = self._forms(binder, value, outputs, bindings, given)
        nodes = {name: next(iter(view.nodes(v)), None) for name, v in bindings.tensors.items()}
        legal = []
        for form in forms:
            facts = {"op": form[0], "site": form[1], **nodes, **given}
            refused = next((r for c in self.constraints if (r := ask(c, facts)) is not None), None)
            if refused is None:
                legal.append(form)
            else:
                reasons.append(refused)
        if not legal:
            return NearMiss(self.name, output, reasons[0], output)
        (op, site, prologue), *others = legal
        return Match(self.name, op, site, tuple((op, site) for op, site, _ in others), prologue)

    def _forms(
        self, binder: Binder, value: Value, outputs: Mapping[int, Node], bindings: Bindings, given: Mapping[str, Any]
    ) -> tuple[list[tuple[FusedOp, Site, tuple[Any, ...]]], list[str]]:
        """The fused ops that a match can be seen as, with the nodes of a folded norm; and why not as others."""
        forms: list[tuple[FusedOp, Site, tuple[Any, ...]]] = []
        reasons = []
        inside = {v.op for root in self.variants[0].roots for v in root.walk()}
        if "linear" in inside and len(self.variants[0].roots) > 1:
            reasons.append("kernels with several results are generated for reductions of rows, not for linears")
        elif "linear" in inside:
            [output] = outputs.values()
            families = matmul_family.build(binder.view, value, output, set(bindings.tensors.values()))
            if isinstance(families, str):
                reasons.append(families)
            else:
                forms += [(f.op, f.site, f.prologue) for f in families]
        elif inside & {*REDUCTIONS, *NORMS}:
            results = {bindings.roots[i]: node for i, node in outputs.items()}
            reduction = row_reduction.build(binder.view, results, bindings.tensors.values())
            if isinstance(reduction, str):
                reasons.append(reduction)
            else:
                forms.append((*reduction, ()))
        if kernels_of(self.function) or ("linear" not in inside and not forms):
            declared = binder.declared(value, outputs, bindings, given, "; ".join(reasons))
            if isinstance(declared, str):
                reasons.append(declared)
            else:
                forms.append((*declared, ()))
        return forms, reasons


STEPS = 12  # from the parameters of a pattern to a second result of it


def _nearby(view: SemanticView, values: Iterable[Value]) -> Iterator[Value]:
    """The values computed from `values` in a few steps."""
    seen: set[Value] = set()
    front = [n for v in values for n in view.nodes(v)]
    for _ in range(STEPS):
        front = list(dict.fromkeys(user for n in front for user in n.users if user.op == "call_function"))
        found = [v for v in dict.fromkeys(map(view.value, front)) if v not in seen]
        yield from found
        seen.update(found)


def _outputs(view: SemanticView, roots: Sequence[Value], main: int, output: Node) -> dict[int, Node]:
    """The nodes that hold a match's results, by position, the last in the graph first. A result that only the others
    are computed from is none."""
    held = {i: output if i == main else outputs_of(view, root)[0] for i, root in enumerate(roots)}
    inside = {n for node in held.values() for n in interior_between(node, ())} if len(held) > 1 else set()
    needed = {i: n for i, n in held.items() if i == main or any(user not in inside for user in n.users)}
    return dict(sorted(needed.items(), key=lambda item: item[1], reverse=True))


def ask(constraint: Constraint, facts: Mapping[str, Any]) -> str | None:
    """The answer of a constraint, given of the facts what its parameters name."""
    asked = inspect.signature(constraint).parameters.values()
    return constraint(**{p.name: facts.get(p.name) for p in asked if p.default is p.empty})


@dataclass(frozen=True)
class RecognisedPattern:
    """A pattern that code of its own looks for, where one function cannot say what all may vary.

    `function` is one spelling of it, which the examples run where they bring no other. `computes` is what a kernel
    registered for the pattern has to compute, of the arguments that it documents; `arguments` makes an example of them.
    """

    name: str
    function: Callable[..., Any]
    find: Callable[[SemanticView], tuple[list[Match], list[NearMiss]]]
    examples: tuple[Example, ...] = field(default=(), compare=False)
    computes: Callable[..., Any] | None = None
    arguments: Callable[[], Mapping[str, Any]] = dict


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
    *,
    name: str,
    constraints: Sequence[Constraint] = (),
    examples: Sequence[Example],
    lookalikes: Lookalikes | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Declare a pattern: a `Pattern`, or where the function is an attention a `RecognisedPattern`.

    The first example is also what the function is traced with, so it gives every argument.
    `lookalikes` may name further values that deserve a near miss, each with its reason.

    Raises PatternError where the function cannot be traced, or could match nothing.
    """
    if not examples:
        raise PatternError(f"pattern {name!r} has no example; give one, so that the function can be traced")

    def declare(function: Callable[..., Any]) -> Pattern | RecognisedPattern:
        declared = Pattern(name, function, tuple(constraints), tuple(examples), lookalikes)
        known = {"op", "site", *declared.parameters.names}
        for constraint in constraints:
            for p in inspect.signature(constraint).parameters.values():
                if p.name not in known and p.default is p.empty:
                    raise PatternError(
                        f"pattern {name!r}: a constraint asks for `{p.name}`; it can ask for {', '.join(sorted(known))}"
                    )
        try:
            assert declared.variants  # raises what is wrong with the function
        except PatternError:
            of_attention = _of_attention(declared)
            if of_attention is None:
                raise
            return of_attention
        return declared

    return declare


def _of_attention(declared: Pattern) -> RecognisedPattern | None:
    """The pattern where its function is an attention, which is more than a value."""
    with torch.random.fork_rng(devices=()):
        inputs = declared.examples[0].inputs()
    try:
        like = declared_attention(trace(declared, inputs))
    except Exception:
        return None  # the error that led here says it better
    if like is None:
        return None

    def refusal(op: FusedOp, site: Site) -> str | None:
        return next((r for c in declared.constraints if (r := ask(c, {"op": op, "site": site})) is not None), None)

    return RecognisedPattern(
        name=declared.name,
        function=declared.function,
        find=lambda view: find_like(declared.name, like, refusal, view.graph_module),
        examples=declared.examples,
        computes=attention,
        arguments=example,
    )
