"""What a fused kernel cuts apart: the loops that Inductor would have run in one kernel with the end of the fused nodes.

A residual added behind a linear costs Inductor next to nothing where a norm of the sum follows, for the norm's kernel
does it on the way; a fused kernel that ends with the sum leaves the norm a kernel of its own all the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.fx import Node

from .candidates import Amount
from .cost.amounts import maximum
from .cost.baseline import inductor_plan
from .cost.node_work import is_constant, is_library_call, readers_of
from .fused import Site
from .machine import Machine
from .row_reduction import call_between, is_pointwise

MOST = 32  # nodes that follow; a longer chain is another kernel by then


def severed_seconds(
    site: Site, taken: Sequence[Collection[Node]], machine: Machine, *, activation: bool = False
) -> Amount:
    """Seconds that Inductor saves by running the loops of `site` and those that read its results together, or those of
    an activation and what its inputs are computed by.

    `taken` are the nodes that each of the fusions chosen so far takes away. They follow no longer, unless the fusion
    and this one exclude each other.
    """
    inside = set(site.interior)
    gone = {n for nodes in taken if not any(n in inside for n in nodes) for n in nodes}
    behind: dict[Node, None] = {}
    front = list(site.outputs)
    while front and len(behind) < MOST:
        for reader in readers_of(front.pop()):
            known = reader in inside or reader in gone or reader in behind
            if not known and is_pointwise(reader) and not any(call_between(o, [reader]) for o in site.outputs):
                behind[reader] = None
                front.append(reader)
    loops = [n for n in site.interior if is_pointwise(n)]
    ahead = _ahead(site, gone) if activation else []
    if not (behind or ahead) or not loops:
        return 0.0
    apart = sum(inductor_plan(nodes, machine).seconds for nodes in (ahead, loops, sorted(behind)))
    return maximum(0.0, apart - inductor_plan(sorted([*ahead, *loops, *behind]), machine).seconds)


def _ahead(site: Site, gone: Collection[Node]) -> list[Node]:
    """The loops that operands of `site` are computed by."""
    found: dict[Node, None] = {}
    front = list(site.operands)
    while front and len(found) < MOST:
        node = front.pop()
        if node in found or node in gone or node.op != "call_function" or is_library_call(node) or is_constant(node):
            continue
        found[node] = None
        front += node.all_input_nodes
    return sorted(found)
