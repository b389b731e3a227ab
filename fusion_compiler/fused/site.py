"""Where a fused operation stands in a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node


@dataclass(frozen=True)
class Site:
    """Where a fused op stands in an FX graph.

    `operands` are the nodes it reads, in the order its fused op documents. Each may have any shape that is a
    contiguous reshape of the documented one (the emitter reshapes). `output` is the node it replaces, `others` are
    further ones, before it in the graph; `interior` all nodes that become dead unless used elsewhere (the outputs
    included); `escaping` the interior nodes other than outputs that are used elsewhere and therefore stay.
    """

    operands: tuple[Node, ...]
    output: Node
    interior: tuple[Node, ...]
    escaping: tuple[Node, ...] = field(default=())
    others: tuple[Node, ...] = field(default=())

    @property
    def outputs(self) -> tuple[Node, ...]:
        """All nodes that the fused op replaces; `output`, the last in the graph, comes first here."""
        return (self.output, *self.others)

    @property
    def place(self) -> Node:
        """The node before which the fused op stands: its output, or what reads another of its results earlier."""
        inside = set(self.interior)
        readers = [user for node in self.others for user in node.users if user not in inside]
        return min([self.output, *readers])
