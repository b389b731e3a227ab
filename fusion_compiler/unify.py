"""Matching one value against another: a pattern's parameters stand for anything, sums and products match in any order.

`Unifier.match` binds every tensor parameter to a value and every literal to a number, or remembers the furthest point
it reached: the pattern value that was wanted, the graph value that was there, and how much of the pattern had matched
by then. That is what a near miss says. Numbers that a pattern's function writes down are demanded; those that it takes
as literal parameters are bound.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .algebra import Value
from .norms import NORMS, nearly

_COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"})
# Attributes that say how large the tensors of the example were and how they were stored, not what is computed.
_FREE = frozenset({"size", "groups", "single", "kn", "shape"})
_CLOSE = 1e-4  # numbers in a graph have been through float32, some through bfloat16 first

Nearby = Callable[[Iterable[Value]], Iterable[Value]]
Written = Callable[[Value], Iterable[tuple[Value, ...]]]
_State = tuple[int, dict[Value, tuple[Value, bool]], dict[str, float], dict[Value, Value]]


@dataclass(frozen=True)
class LiteralUse:
    """A number of a pattern that is factor · literal ** exponent."""

    name: str
    factor: float = 1.0
    exponent: float = 1.0

    def literal(self, number: float) -> float | None:
        """The literal for which the number comes out, or None."""
        base = number / self.factor
        if self.exponent == 1.0:
            return base
        if base < 0 or (base == 0 and self.exponent < 0):
            return None
        return float(base ** (1 / self.exponent))


@dataclass(frozen=True)
class Variant:
    """One raised form of a pattern: its roots, its parameters among the leaves, its literals among the numbers.

    `roots` are what the function returns, in order. `literals` are keyed by a value and the name of the attribute of it
    that holds the number. `fixed` holds the parameters that the form has decided: the alternative of a choice, None for
    an optional parameter left out.
    """

    roots: tuple[Value, ...]
    parameters: Mapping[Value, str]
    literals: Mapping[tuple[Value, str], LiteralUse] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def root(self) -> Value:
        """The root that is looked for first: the one that most is computed for."""
        return max(self.roots, key=lambda root: sum(1 for _ in root.walk()))


@dataclass(frozen=True)
class Bindings:
    """What the parameters of a pattern stand for, and the values that its roots are, in order. `transposed` are the
    parameters that the graph stores the other way round."""

    tensors: Mapping[str, Value]
    literals: Mapping[str, float]
    transposed: frozenset[str] = frozenset()
    roots: tuple[Value, ...] = ()


@dataclass(frozen=True)
class Furthest:
    """Where matching stopped: `matched` are the operations that had matched, `wanted` the one that did not."""

    matched: tuple[Value, ...]
    wanted: Value
    found: Value
    reason: str

    @property
    def depth(self) -> int:
        return len(self.matched)


class Unifier:
    """Matches a variant of a pattern against values of a graph.

    `single_row`: the graph computes one row, where repeating along rows is nothing. `exactly`: the variant was traced
    with the sizes of the graph, so these must agree as well. `nearby` gives, for values of the graph, those computed
    from them in a few steps: among these a second result of the pattern is looked for. `written` gives the terms of a
    sum as the graph adds them: a sum of three values is one of two where two of them are added first.
    """

    def __init__(
        self,
        variant: Variant,
        single_row: bool = False,
        *,
        exactly: bool = False,
        nearby: Nearby | None = None,
        written: Written | None = None,
    ) -> None:
        self._variant = variant
        self._parameters = variant.parameters
        self._single_row = single_row
        self._free = frozenset({"kn"}) if exactly else _FREE
        self._nearby = nearby or (lambda values: ())
        self._written = written or (lambda value: ())
        self._tensors: dict[Value, tuple[Value, bool]] = {}
        self._literals: dict[str, float] = {}
        self._pairs: dict[Value, Value] = {}
        self._matched: list[Value] = []
        self.furthest: Furthest | None = None

    def match(self, value: Value) -> Bindings | None:
        """The binding of every parameter by name, or None; `value` is what the variant's `root` has to be."""
        if not self._match(self._variant.root, value):
            return None
        roots = []
        for root in self._variant.roots:
            known = [self._pairs[root]] if root in self._pairs else self._nearby([v for v, _ in self._tensors.values()])
            found = next((v for v in known if self._match(root, v)), None)
            if found is None:
                return None
            roots.append(found)
        named = {self._parameters[leaf]: bound for leaf, bound in self._tensors.items()}
        return Bindings(
            {name: bound for name, (bound, _) in named.items()},
            dict(self._literals),
            frozenset(name for name, (_, transposed) in named.items() if transposed),
            tuple(roots),
        )

    def _match(self, pattern: Value, value: Value, transposed: bool = False) -> bool:
        if pattern in self._parameters:
            if value.op == "const":
                return self._fail(pattern, value)
            bound = self._tensors.setdefault(pattern, (value, transposed))
            return bound == (value, transposed) or self._fail(pattern, value, self._differs(pattern, value))
        if pattern.op == "bcast" and value.op != "bcast" and self._single_row:
            return self._match(pattern.args[0], value)
        forms = [value.args] if len(pattern.args) == len(value.args) else self._grouped(pattern, value)
        if pattern.op != value.op or not forms:
            return self._fail(pattern, value)
        before = self._state()
        reason = self._attributes(pattern, value)
        if reason is not None:
            self._restore(before)
            return self._fail(pattern, value, reason)
        if pattern.op == "const":
            return True
        self._matched.append(pattern)
        self._pairs[pattern] = value
        if pattern.op in _COMMUTATIVE:
            matched = any(self._in_any_order(list(pattern.args), list(args)) for args in forms)
        else:
            # a weight stored [in, out] is a transposed weight to a pattern that has it [out, in]
            flips = [False, pattern.attr("kn") != value.attr("kn")] if pattern.op == "linear" else []
            flips += [False] * (len(pattern.args) - len(flips))
            matched = all(self._match(p, v, t) for p, v, t in zip(pattern.args, value.args, flips, strict=True))
        if not matched:
            self._restore(before)
        return matched

    def _grouped(self, pattern: Value, value: Value) -> list[tuple[Value, ...]]:
        if pattern.op != "add" or value.op != "add":
            return []
        return [terms for terms in self._written(value) if len(terms) == len(pattern.args)]

    def _in_any_order(self, patterns: list[Value], values: list[Value]) -> bool:
        if not patterns:
            return True
        # the most telling operand first: parameters match anything and come last
        first = max(patterns, key=lambda p: 0 if p in self._parameters else _extent(p))
        rest = [p for p in patterns if p is not first]
        for candidate in values:
            before = self._state()
            if self._match(first, candidate):
                others = list(values)
                others.remove(candidate)
                if self._in_any_order(rest, others):
                    return True
            self._restore(before)
        return False

    def _attributes(self, pattern: Value, value: Value) -> str | None:
        """Binds the literals among the attributes of `pattern`; a sentence where another attribute differs."""
        if pattern.op == "bcast" and "groups" in self._free:
            wanted, found = ([k for _, k in v.attr("groups")] for v in (pattern, value))
            # in one row, the rows are no axis
            same = wanted == found or (self._single_row and wanted[1:] == found)
            return None if same else "a tensor is repeated along other axes here than in the pattern"
        for name, wanted in pattern.attrs:
            use, found = self._variant.literals.get((pattern, name)), value.attr(name)
            if use is not None:
                literal = use.literal(found)
                if literal is None or not _close(self._literals.setdefault(use.name, literal), literal):
                    known = self._literals.get(use.name)
                    return f"`{use.name}` is {known} in one place and not here, where {found} stands"
            elif name not in self._free and not _close(wanted, found):
                if pattern.op == "const":
                    return f"the number {wanted:g} was expected here, and this is {found:g}"
                cure = "; take it as a parameter with a number as its default to match any" * isinstance(wanted, float)
                return f"{name} is {found} in {describe(value)} here and {wanted} in the pattern{cure}"
        return None

    def _state(self) -> _State:
        return len(self._matched), dict(self._tensors), dict(self._literals), dict(self._pairs)

    def _restore(self, state: _State) -> None:
        depth, self._tensors, self._literals, self._pairs = state
        del self._matched[depth:]

    def _fail(self, wanted: Value, found: Value, reason: str = "") -> bool:
        if self.furthest is None or len(self._matched) > self.furthest.depth:
            reason = reason or _instead(wanted, found)
            self.furthest = Furthest(tuple(self._matched), wanted, found, reason)
        return False

    def _differs(self, parameter: Value, found: Value) -> str:
        first, transposed = self._tensors[parameter]
        stored = " transposed" * transposed
        return (
            f"`{self._parameters[parameter]}` is {describe(first)}{stored} in one place and {describe(found)} here; "
            "it must be the same tensor"
        )


@functools.lru_cache(maxsize=4096)
def _extent(value: Value) -> int:
    """How many values there are in an expression."""
    return sum(1 for _ in value.walk())


def _close(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return math.isclose(wanted, found, rel_tol=_CLOSE)
    return bool(wanted == found)


# Operations that stand in every model; having met only these, a pattern was not really there.
_COMMON = frozenset({"add", "mul", "bcast", "linear", "pow"})


def is_telling(reached: Furthest) -> bool:
    """Whether a partial match is worth a sentence: something of the pattern's own had matched, or what stands in the
    place of a norm nearly is one."""
    if any(v.op not in _COMMON for v in reached.matched):
        return True
    return reached.wanted.op in NORMS and nearly(reached.found)


_OWN_WEIGHTS = ("aten.bmm.default", "aten.baddbmm.default", "aten._grouped_mm.default")


def _instead(wanted: Value, found: Value) -> str:
    """What was expected and what stands there, with the cure where one is known."""
    if wanted.op in NORMS and found.op == "slice":
        return (
            f"a norm was expected here, and this is part of {describe(found.args[0])}; take the part before the norm, "
            "as in norm(x[:, 0]), and the norm can be folded in"
        )
    if wanted.op in NORMS and found.op == "permute":
        return (
            f"a norm was expected here, and this is {describe(found.args[0])} with its rows in another order "
            "(MultiheadAttention with batch_first=True turns [batch, length, …] so); take the norm after the transpose"
        )
    source = found.args[0] if found.op == "slice" else found
    if wanted.op == "linear" and source.op == "leaf" and str(source.attr("node").target) in _OWN_WEIGHTS:
        return (
            f"a linear was expected here, and this is {describe(source)} with a weight for each batch, as the experts "
            "of a mixture have; kernels are generated for products with one weight"
        )
    if wanted.op == found.op and len(wanted.args) != len(found.args):
        return f"{describe(wanted)} of {len(wanted.args)} was expected here, and this is one of {len(found.args)}"
    return f"{describe(wanted)} was expected here, and this is {describe(found)}"


_NAMES = {
    "add": "a sum", "mul": "a product", "linear": "a linear", "rms_norm": "an RMSNorm", "layer_norm": "a LayerNorm",
    "const": "a number", "pow": "a power", "bcast": "a repeated tensor", "silu": "SiLU", "gelu_erf": "GELU",
    "gelu_tanh": "tanh GELU", "relu": "ReLU", "permute": "a transpose", "slice": "a slice",
}  # fmt: skip


def describe(value: Value) -> str:
    """A value in a few words, for a sentence."""
    if value.op == "leaf":
        node = value.attr("node")
        return f"the input `{node.name}`" if node.op == "placeholder" else f"`{node.target}`"
    return _NAMES.get(value.op, value.op)
