"""The best set of fusions that can stand together.

Two fusions conflict where both would take away the same node; taking one of each conflicting pair so that the total
saving is greatest is a maximum-weight independent set. Conflict graphs fall into small components, which are solved
exactly; a component of more than `EXACT` fusions is solved by taking the largest saving first, which loses at most the
savings of the fusions it displaces.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import networkx as nx

EXACT = 20


@dataclass(frozen=True)
class Item:
    """One fusion to choose or leave: what it saves, and the nodes that only one fusion may take.

    `reads` and `output` say where it stands in the graph, for the check that replacing makes no cycle.
    """

    saving: float
    exclusive: frozenset[Hashable]
    reads: frozenset[Hashable] = frozenset()
    output: Hashable = None


def best(items: Sequence[Item], edges: Iterable[tuple[Hashable, Hashable]] = ()) -> list[int]:
    """Indices of the chosen items, in order. `edges` (producer, consumer) are those of the graph they stand in.

    Items that save nothing are never chosen.
    """
    conflicts = nx.Graph()
    conflicts.add_nodes_from(i for i, item in enumerate(items) if item.saving > 0)
    takers: dict[Hashable, list[int]] = {}
    for i in conflicts.nodes:
        for node in items[i].exclusive:
            takers.setdefault(node, []).append(i)
    for group in takers.values():
        conflicts.add_edges_from((a, b) for k, a in enumerate(group) for b in group[k + 1 :])
    chosen: list[int] = []
    for component in nx.connected_components(conflicts):
        part = conflicts.subgraph(component)
        chosen += _independent(part, items) if len(part) <= EXACT else _largest_first(part, items)
    return sorted(_without_cycles(chosen, items, list(edges)))


def _independent(conflicts: nx.Graph, items: Sequence[Item]) -> list[int]:
    """Exact maximum-weight independent set: branch on the fusion with most conflicts, taken or not."""
    if not conflicts:
        return []
    node = max(conflicts, key=lambda i: (conflicts.degree(i), items[i].saving, -i))
    if conflicts.degree(node) == 0:
        return sorted(conflicts)
    taken = [node, *_independent(conflicts.subgraph(set(conflicts) - {node} - set(conflicts[node])), items)]
    left = _independent(conflicts.subgraph(set(conflicts) - {node}), items)
    return max(taken, left, key=lambda chosen: sum(items[i].saving for i in chosen))


def _largest_first(conflicts: nx.Graph, items: Sequence[Item]) -> list[int]:
    chosen: list[int] = []
    for i in sorted(conflicts, key=lambda i: (-items[i].saving, i)):
        if not any(c in conflicts[i] for c in chosen):
            chosen.append(i)
    return chosen


def _without_cycles(chosen: list[int], items: Sequence[Item], edges: list[tuple[Hashable, Hashable]]) -> list[int]:
    """`chosen` less the smallest savings that stand on a cycle once every fusion is one node."""
    while edges:
        gone = {node: items[i].output for i in chosen for node in items[i].exclusive}
        fused = nx.DiGraph((gone.get(a, a), gone.get(b, b)) for a, b in edges)
        fused.add_edges_from((read, items[i].output) for i in chosen for read in items[i].reads)
        fused.remove_edges_from(list(nx.selfloop_edges(fused)))
        if nx.is_directed_acyclic_graph(fused):  # linear in the graph, which looking for a cycle is not
            return chosen
        cycle = {node for edge in nx.find_cycle(fused) for node in edge[:2]}
        guilty = [i for i in chosen if items[i].output in cycle]
        if not guilty:
            raise ValueError("the graph has a cycle before anything is fused")
        chosen = [i for i in chosen if i != min(guilty, key=lambda i: items[i].saving)]
    return chosen
