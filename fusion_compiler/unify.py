"""Matching one value against another: a pattern's parameters stand for anything, sums and products match in any order.

`Unifier.match` either binds every parameter or remembers the furthest point it reached: the pattern value that was
wanted, the graph value that was there, and how much of the pattern had matched by then. That is what a near miss says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .algebra import Value

_COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"})
# Attributes that carry sizes and the numbers of a norm: they are read off the graph, not demanded by the pattern.
_FREE = frozenset({"size", "groups", "eps", "offset", "single", "kn", "shape"})


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
    """Matches `pattern` against values of a graph. `parameters` are the pattern's leaves, by name."""

    def __init__(self, parameters: Mapping[Value, str], single_row: bool = False) -> None:
        self._parameters = parameters
        self._single_row = single_row
        self._bound: dict[Value, Value] = {}
        self._matched: list[Value] = []
        self.furthest: Furthest | None = None

    def match(self, pattern: Value, value: Value) -> dict[str, Value] | None:
        """The binding of every parameter by name, or None."""
        if not self._match(pattern, value):
            return None
        return {self._parameters[leaf]: bound for leaf, bound in self._bound.items()}

    def _match(self, pattern: Value, value: Value) -> bool:
        if pattern in self._parameters:
            if value.op == "const":
                return self._fail(pattern, value)
            bound = self._bound.setdefault(pattern, value)
            return bound is value or self._fail(pattern, value, bound)
        if pattern.op == "const":
            close = value.op == "const" and math.isclose(pattern.attr("value"), value.attr("value"), rel_tol=1e-4)
            return close or self._fail(pattern, value)
        if pattern.op == "bcast" and value.op != "bcast" and self._single_row:
            return self._match(pattern.args[0], value)  # in one row, repeating along rows is nothing
        if pattern.op != value.op or len(pattern.args) != len(value.args) or not _same_attributes(pattern, value):
            return self._fail(pattern, value)
        before, binding = len(self._matched), dict(self._bound)
        self._matched.append(pattern)
        if pattern.op in _COMMUTATIVE:
            matched = self._in_any_order(list(pattern.args), list(value.args))
        else:
            matched = all(self._match(p, v) for p, v in zip(pattern.args, value.args, strict=True))
        if not matched:
            del self._matched[before:]
            self._bound = binding
        return matched

    def _in_any_order(self, patterns: list[Value], values: list[Value]) -> bool:
        if not patterns:
            return True
        # the most telling operand first: parameters match anything and come last
        first = max(patterns, key=lambda p: 0 if p in self._parameters else 1 + sum(1 for _ in p.walk()))
        rest = [p for p in patterns if p is not first]
        for candidate in values:
            before, binding = len(self._matched), dict(self._bound)
            if self._match(first, candidate):
                others = list(values)
                others.remove(candidate)
                if self._in_any_order(rest, others):
                    return True
            del self._matched[before:]
            self._bound = binding
        return False

    def _fail(self, wanted: Value, found: Value, bound: Value | None = None) -> bool:
        if self.furthest is None or len(self._matched) > self.furthest.depth:
            if bound is not None:
                name = self._parameters[wanted]
                reason = (
                    f"`{name}` is {describe(bound)} in one place and {describe(found)} here; it must be the same tensor"
                )
            else:
                reason = f"{describe(wanted)} was expected here, and this is {describe(found)}"
            self.furthest = Furthest(tuple(self._matched), wanted, found, reason)
        return False


def _same_attributes(pattern: Value, value: Value) -> bool:
    if pattern.op == "bcast":
        return [k for _, k in pattern.attr("groups")] == [k for _, k in value.attr("groups")]
    theirs = dict(value.attrs)
    return all(k in _FREE or theirs.get(k) == v for k, v in pattern.attrs)


# Operations that stand in every model; having met only these, a pattern was not really there.
_COMMON = frozenset({"add", "mul", "bcast", "linear", "pow"})
_REDUCTIONS = frozenset({"mean", "sum", "var", "amax"})
_NORMS = frozenset({"rms_norm", "layer_norm"})


def is_telling(reached: Furthest) -> bool:
    """Whether a partial match is worth a sentence: something of the pattern's own had matched, or what stands in the
    place of a norm reduces its rows as a norm does."""
    if any(v.op not in _COMMON for v in reached.matched):
        return True
    return reached.wanted.op in _NORMS and _reduces(reached.found)


def _reduces(value: Value, steps: int = 5) -> bool:
    """Whether `value` is arithmetic on a row statistic, as every norm is."""
    if value.op in _REDUCTIONS | _NORMS:
        return True
    return (
        steps > 0
        and value.op in ("add", "mul", "pow", "bcast", "cast")
        and any(_reduces(a, steps - 1) for a in value.args)
    )


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
