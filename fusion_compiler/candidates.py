"""What a lowering offers for a fused op, and the traffic it predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import sympy

from .fused import FusedOp, Site

if TYPE_CHECKING:
    from torch.fx import Node

    from .machine import Machine
    from .splice import Builder

Amount: TypeAlias = int | float | sympy.Expr
MARGIN = 0.10  # by how much predictions may be wrong whose error nobody measured


@dataclass(frozen=True)
class Traffic:
    """Work of one way of computing something. Bytes are of device memory; sympy where sizes are symbolic."""

    flops: Amount
    bytes_read: Amount
    bytes_written: Amount
    launches: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
            self.launches + other.launches,
        )


@dataclass(frozen=True)
class Candidate:
    """One way of carrying out a fused op on one machine.

    `seconds` is the predicted time (sympy over the site's symbolic sizes where there are any). `valid` is a
    condition under which the kernel may run at all, besides being cheapest (sympy relation or True).
    `emit(builder, site)` adds the nodes to the graph and returns the one that replaces `site.output`, or one for each
    of `site.outputs`.
    `details` goes to the report: tile sizes, split-K, backend, registers …
    `once` are the seconds that a graph pays once for all such candidates together, for what their kernels share.
    `error` is by how much the prediction may flatter it beside Inductor's: a relative gain of less is not taken.
    """

    name: str
    kernel: str
    traffic: Traffic
    seconds: Amount
    emit: Callable[[Builder, Site], Node | tuple[Node, ...]]
    valid: sympy.Basic | bool = True
    details: tuple[tuple[str, Any], ...] = ()
    once: float = 0.0
    error: Amount = MARGIN


@dataclass(frozen=True)
class Unavailable:
    """Why a lowering offers nothing for a fused op: a sentence, with the cure where there is one."""

    reason: str


class Lowering(Protocol):
    """One way of making kernels. Never imports patterns; never imports another lowering."""

    @property
    def name(self) -> str: ...

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        """What it has for `op`: nothing where it does not make kernels of this kind at all, a sentence where it does
        but not for this one."""
