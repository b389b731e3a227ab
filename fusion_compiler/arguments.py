"""From the bindings of a match to the arguments that the pattern's own function would have had in the graph.

Values leave out shapes and casts, so several nodes may hold what a parameter is bound to. The function is traced with
them as they are in the graph, sizes included, and the right ones are those for which it gives the matched value again:
what a kernel registered for the pattern is then called with is proved, not guessed.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from .algebra import Value
from .cost.amounts import is_symbolic
from .cost.node_work import MATMULS, flops_of, name_of
from .fused import Declared, Site
from .semantics import SemanticView
from .shapes import extent
from .sites import site_of
from .torch_private import fake_tensors
from .unify import Bindings, Unifier, Variant
from .variants import PatternError, raise_once

MOST_TRIED = 32


class Binder:
    """Binds matches of one pattern in one graph; traces are kept, since layers repeat."""

    def __init__(self, view: SemanticView, pattern: str, function: Callable[..., Any]) -> None:
        self.view = view
        self._pattern = pattern
        self._function = function
        self._traces: dict[Any, tuple[Variant, tuple[torch.Tensor, ...]] | None] = {}

    def declared(
        self, value: Value, outputs: Mapping[int, Node], bindings: Bindings, given: Mapping[str, Any], why: str = ""
    ) -> tuple[Declared, Site] | str:
        """The declared op and its site; a sentence where the graph lacks its arguments.

        `value` is what the pattern's `root` is. `outputs` are the nodes that hold its results, by their position among
        these, the last in the graph first; `given` are the arguments that are no tensors; `why` tells why no kernel is
        generated.
        """
        output, *others = outputs.values()
        order = inspect.signature(self._function).parameters
        names = [name for name in order if name in bindings.tensors]
        options = []
        for name in names:
            nodes = self._nodes(bindings.tensors[name], output)
            if not nodes:
                return f"`{name}` is no tensor of its own in the graph here, so a registered kernel cannot be given it"
            options.append(nodes)
        transposed = tuple(name in bindings.transposed for name in names)
        for chosen in itertools.islice(itertools.product(*options), MOST_TRIED):
            tensors = self._values(names, chosen, transposed)
            traced = self._traced(tensors, given) if tensors is not None else None
            if traced is None or tensors is None:
                continue
            variant, out = traced
            again = Unifier(variant, exactly=True, nearby=lambda _: bindings.roots, written=self.view.written).match(
                value
            )
            if again != dataclasses.replace(bindings, literals=again.literals if again else {}):
                continue
            site = site_of(self.view, output, chosen, tuple(others))
            op = self._op(tensors, given, transposed, out, site)
            return dataclasses.replace(op, kept=tuple(outputs), ungenerated=why), site
        return "the pattern's own function computes something else of the tensors as they are stored here"

    def _nodes(self, value: Value, output: Node) -> list[Node]:
        """The nodes before `output` that hold a value, one for each shape and dtype."""
        found: dict[Any, Node] = {}
        for node in self.view.nodes(value):
            if node < output:
                found.setdefault(_kind(node.meta["val"]), node)
        return list(found.values())

    def _values(
        self, names: list[str], nodes: tuple[Node, ...], transposed: tuple[bool, ...]
    ) -> dict[str, torch.Tensor] | None:
        values = {}
        for name, node, turned in zip(names, nodes, transposed, strict=True):
            value = node.meta["val"]
            if turned and value.dim() != 2:
                return None
            with fake_tensors.mode_of(self.view.graph_module):
                values[name] = value.t() if turned else value
        return values

    def _traced(
        self, tensors: Mapping[str, torch.Tensor], given: Mapping[str, Any]
    ) -> tuple[Variant, tuple[torch.Tensor, ...]] | None:
        key = (*((name, _kind(t)) for name, t in tensors.items()), *sorted(given.items(), key=lambda item: item[0]))
        if key not in self._traces:
            self._traces[key] = self._trace(tensors, given)
        return self._traces[key]

    def _trace(
        self, tensors: Mapping[str, torch.Tensor], given: Mapping[str, Any]
    ) -> tuple[Variant, tuple[torch.Tensor, ...]] | None:
        try:
            with fake_tensors.quietly():
                return raise_once(self._pattern, self._function, tensors, given)
        except PatternError:
            return None  # these shapes do not go together

    def _op(
        self,
        tensors: Mapping[str, torch.Tensor],
        given: Mapping[str, Any],
        transposed: tuple[bool, ...],
        out: tuple[torch.Tensor, ...],
        site: Site,
    ) -> Declared:
        arguments = {**tensors, **given}
        sizes = {extent(s): s for t in tensors.values() for s in t.shape if isinstance(s, torch.SymInt)}
        products = [n for n in site.interior if name_of(n) in MATMULS]
        return Declared(
            pattern=self._pattern,
            function=self._function,
            arguments=tuple(arguments[name] for name in inspect.signature(self._function).parameters),
            transposed=transposed,
            dtype=next(iter(tensors.values())).dtype,
            out=out,
            flops=sum((flops_of(n, {}) for n in products), 0),
            sizes=tuple(s for s in sizes.values() if is_symbolic(extent(s))),
        )


def _kind(value: torch.Tensor) -> Any:
    return (value.dtype, tuple(map(extent, value.shape)), tuple(map(extent, value.stride())))
