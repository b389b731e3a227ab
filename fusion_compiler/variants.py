"""From a pattern's plain function to the forms that are looked for: traced on its first example and raised.

Optional parameters and choices give one form per combination. Literals are traced with two sets of values: a number
that moves from one trace to the other is factor · literal ** exponent of one of them. Whatever could never match, or
would match what was not meant, is an error here, while the user looks.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from . import decompositions
from .algebra import Value
from .semantics import SemanticView
from .unify import LiteralUse, Variant

EXPONENTS = (1.0, -1.0, 2.0, -2.0, 0.5, -0.5)


class PatternError(ValueError):
    """A pattern that could match nothing, or not what was meant; the message says what to change."""


@dataclass(frozen=True)
class Choice:
    """A parameter that stands for any one of these alternatives."""

    alternatives: tuple[Any, ...]


@dataclass(frozen=True)
class Literal:
    """A parameter that is a number of the graph, from `lo` to `hi` where given. The default is used where an
    optional part of the pattern, and the number with it, is absent."""

    default: float
    lo: float | None = None
    hi: float | None = None

    def value(self, bound: float) -> float:
        """What the function is to be given for a bound number."""
        return round(bound) if isinstance(self.default, int) else bound

    def refusal(self, name: str, bound: float) -> str | None:
        """Why the literal cannot stand for `bound`, or None."""
        if isinstance(self.default, int) and not math.isclose(bound, round(bound), abs_tol=1e-6):
            return f"`{name}` is {bound:g} here; the pattern takes whole numbers"
        if self.lo is not None and bound < self.lo:
            return f"`{name}` is {bound:g} here; the pattern takes at least {self.lo:g}"
        if self.hi is not None and bound > self.hi:
            return f"`{name}` is {bound:g} here; the pattern takes at most {self.hi:g}"
        return None

    def probes(self, index: int) -> tuple[float, float]:
        """Two values to trace with, in a proportion that no other literal has."""
        if isinstance(self.default, int):
            return self.default + 3 + 2 * index, self.default + 11 + 7 * index
        base = self.default or 0.37
        return base * (1.0837 + 0.0837 * index), base * (1.2113 + 0.2113 * index)


@dataclass(frozen=True)
class Parameters:
    """The parameters of a pattern's function, told apart by their defaults: none for a tensor, None for an optional
    tensor, a number for a literal, a `Choice` for alternatives."""

    names: tuple[str, ...]
    tensors: tuple[str, ...]
    optional: frozenset[str]
    literals: Mapping[str, Literal]
    choices: Mapping[str, Choice]

    @staticmethod
    def of(pattern: str, function: Callable[..., Any]) -> Parameters:
        tensors: list[str] = []
        optional: set[str] = set()
        literals: dict[str, Literal] = {}
        choices: dict[str, Choice] = {}
        for name, p in (found := inspect.signature(function).parameters).items():
            if p.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
                raise PatternError(
                    f"pattern {pattern!r}: `{name}` must be an ordinary parameter; {p.kind.description} is not"
                )
            if isinstance(p.default, Choice):
                choices[name] = p.default
            elif isinstance(p.default, Literal):
                literals[name] = p.default
            elif isinstance(p.default, (int, float)) and not isinstance(p.default, bool):
                literals[name] = Literal(p.default)
            elif p.default is None or p.default is inspect.Parameter.empty:
                tensors.append(name)
                optional.update({name} if p.default is None else ())
            else:
                raise PatternError(
                    f"pattern {pattern!r}: `{name}` has the default {p.default!r}; a parameter is a tensor (no "
                    "default), an optional tensor (None), a number, or a choice(...) of anything else"
                )
        return Parameters(tuple(found), tuple(tensors), frozenset(optional), literals, choices)


def example_arguments(pattern: str, parameters: Parameters, inputs: Callable[[], Sequence[Any]]) -> dict[str, Any]:
    """The tensors of an example by parameter; making them leaves the random state alone."""
    with torch.random.fork_rng(devices=()):
        given = tuple(inputs())
    wanted = parameters.tensors
    if len(given) != len(wanted) or not all(isinstance(g, torch.Tensor) for g in given):
        kinds = ", ".join(type(g).__name__ for g in given)
        raise PatternError(
            f"pattern {pattern!r}: its first example gives {len(given)} arguments ({kinds}) and must give one tensor "
            f"for each of {', '.join(wanted)}, the optional ones too"
        )
    return dict(zip(wanted, given, strict=True))


def raise_variants(
    pattern: str, function: Callable[..., Any], inputs: Callable[[], Sequence[Any]]
) -> tuple[Variant, ...]:
    """Every combination of optional parameters and choices, raised.

    Raises PatternError where the function cannot be a pattern.
    """
    parameters = Parameters.of(pattern, function)
    example = example_arguments(pattern, parameters, inputs)
    forms: dict[str, Variant] = {}
    used: set[str] = set()
    for decided in _combinations(parameters):
        tensors = {name: t for name, t in example.items() if name not in decided}
        variant = _variant(pattern, function, parameters, tensors, decided)
        forms.setdefault(repr(variant.roots), variant)
        leaves = {v for root in variant.roots for v in root.walk() if v in variant.parameters}
        used |= {variant.parameters[v] for v in leaves} | {use.name for use in variant.literals.values()}
    ignored = [name for name in (*parameters.tensors, *parameters.literals) if name not in used]
    if ignored:
        raise PatternError(
            f"pattern {pattern!r}: its result does not depend on `{ignored[0]}`; leave that parameter out"
        )
    return tuple(forms.values())


def _combinations(parameters: Parameters) -> Iterator[dict[str, Any]]:
    """What optional parameters and choices may be: None for one left out, an alternative for each choice."""
    options: list[list[dict[str, Any]]] = [
        [{name: None}, {}] for name in parameters.tensors if name in parameters.optional
    ]
    options += [[{name: a} for a in choice.alternatives] for name, choice in parameters.choices.items()]
    for combination in itertools.product(*options):
        yield {name: value for part in combination for name, value in part.items()}


def _variant(
    pattern: str,
    function: Callable[..., Any],
    parameters: Parameters,
    tensors: Mapping[str, torch.Tensor],
    decided: Mapping[str, Any],
) -> Variant:
    probes = [literal.probes(i) for i, literal in enumerate(parameters.literals.values())]
    numbers = [dict(zip(parameters.literals, values, strict=True)) for values in zip(*probes, strict=True)] or [{}]
    first, *second = (raise_once(pattern, function, tensors, {**decided, **given})[0] for given in numbers)
    held = [v for root in first.roots for v in root.walk()]
    unknown = next((v for v in held if v.op == "leaf" and v not in first.parameters), None)
    if unknown is not None:
        raise PatternError(
            f"pattern {pattern!r}: it uses {unknown.attr('node').target}, which is not in the compiler's vocabulary, "
            "so it could match nothing; write it with pointwise operations, linears and reductions of the last axis"
        )
    if any(root in first.parameters or root.op == "const" for root in first.roots):
        raise PatternError(f"pattern {pattern!r}: a result of it computes nothing, so there is nothing to fuse")
    literals = _literals(pattern, held, second[0], *numbers) if second else {}
    return Variant(first.roots, first.parameters, literals, decided)


def raise_once(
    pattern: str, function: Callable[..., Any], tensors: Mapping[str, torch.Tensor], given: Mapping[str, Any]
) -> tuple[Variant, tuple[torch.Tensor, ...]]:
    """The function raised for these tensors (real or fake) and other arguments, and its results as fake tensors."""
    try:
        graph_module = trace(
            lambda *values: function(**dict(zip(tensors, values, strict=True)), **given), [*tensors.values()]
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise PatternError(
            f"pattern {pattern!r}: its function cannot be traced with {_written(given)}: {type(error).__name__}: "
            f"{''.join(reason)}; tensors that it uses must be its arguments, numbers that decide shapes its own"
        ) from error
    results = results_of(graph_module)
    if results is None:
        returned = _kind(graph_module.graph.output_node().args[0])
        raise PatternError(f"pattern {pattern!r}: its function returns {returned}; a pattern returns tensors")
    view = SemanticView(graph_module)
    inputs = graph_module.graph.find_nodes(op="placeholder")
    leaves = {view.value(n): name for n, name in zip(inputs, tensors, strict=True)}
    variant = Variant(tuple(view.value(r) for r in results), leaves, fixed=given)
    return variant, tuple(r.meta["val"] for r in results)


def results_of(graph_module: torch.fx.GraphModule) -> tuple[torch.fx.Node, ...] | None:
    """The nodes that a traced function returns, one tensor or several; None where it returns something else."""
    returned: Any = graph_module.graph.output_node().args[0]
    results = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    return results if results and all(isinstance(r, torch.fx.Node) for r in results) else None


def _literals(
    pattern: str, first: Sequence[Value], second: Variant, before: Mapping[str, float], after: Mapping[str, float]
) -> dict[tuple[Value, str], LiteralUse]:
    """The numbers that differ between two traces, as uses of the literals that were `before` and `after`."""
    uses: dict[tuple[Value, str], LiteralUse] = {}
    for a, b in itertools.zip_longest(first, (v for root in second.roots for v in root.walk())):
        if a is None or b is None or (a.op, len(a.args), len(a.attrs)) != (b.op, len(b.args), len(b.attrs)):
            raise PatternError(
                f"pattern {pattern!r}: its form depends on the value of a number among {', '.join(before)}"
            )
        for (name, x), (_, y) in zip(a.attrs, b.attrs, strict=True):
            if not isinstance(x, float) or x == y:
                continue
            use = next((u for u in _powers(x, before) if _same(y, _number(u, after))), None)
            if use is None:
                raise PatternError(
                    f"pattern {pattern!r}: a number that depends on {', '.join(before)} is no multiple of one of them "
                    "or of its power, so the literal cannot be told from the graph; let that number be the literal"
                )
            uses[a, name] = use
    return uses


def _powers(number: float, literals: Mapping[str, float]) -> Iterator[LiteralUse]:
    for name, value in literals.items():
        for exponent in EXPONENTS:
            if value > 0 or exponent == int(exponent):
                factor = number / value**exponent
                yield LiteralUse(name, float(round(factor)) if _same(factor, round(factor)) else factor, exponent)


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)  # decompositions round numbers to float32


def _number(use: LiteralUse, literals: Mapping[str, float]) -> float:
    return float(use.factor * literals[use.name] ** use.exponent)


def _written(given: Mapping[str, Any]) -> str:
    shown = [f"{name}={getattr(value, '__name__', value)}" for name, value in given.items()]
    return ", ".join(shown) or "its first example"


def _kind(result: Any) -> str:
    return f"{len(result)} values" if isinstance(result, (tuple, list)) else f"a {type(result).__name__}"


def trace(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> torch.fx.GraphModule:
    """The functional, decomposed ATen graph of a function on inputs of these shapes."""
    with torch.no_grad():
        graph_module = make_fx(function, decomposition_table=decompositions.table(), tracing_mode="fake")(*inputs)
        if any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in graph_module.graph.nodes):
            # some decompositions update in place; the graphs we match never do
            functional = torch.func.functionalize(graph_module, remove="mutations")
            graph_module = make_fx(functional, tracing_mode="fake")(*inputs)
        return graph_module
