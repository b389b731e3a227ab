"""Kernels that users register for patterns, by the pattern's function, in the order in which they came."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .machine import Machine


@dataclass(frozen=True)
class RegisteredKernel:
    """A function that computes what a pattern does, of the same arguments in the same order.

    `machines` names machines or kinds of them ("h200", "cuda"); None: all. `cost(machine, *arguments)` gives its
    seconds, with fake tensors for tensors; None: its traffic at the machine's roofline.
    """

    name: str
    pattern: str
    computes: Callable[..., Any]  # the pattern's function
    function: Callable[..., Any]
    machines: frozenset[str] | None = None
    cost: Callable[..., Any] | None = field(default=None, compare=False)

    def serves(self, machine: Machine) -> bool:
        return self.machines is None or bool(self.machines & {machine.name, machine.kind})


_kernels: dict[Callable[..., Any], list[RegisteredKernel]] = {}


def kernels_of(function: Callable[..., Any]) -> tuple[RegisteredKernel, ...]:
    """The kernels registered for the pattern with this function."""
    return tuple(_kernels.get(function, ()))


def add(kernel: RegisteredKernel) -> None:
    """Registers a kernel; its name must be new for its pattern."""
    known = _kernels.setdefault(kernel.computes, [])
    if any(k.name == kernel.name for k in known):
        raise ValueError(
            f"pattern {kernel.pattern!r} has a kernel {kernel.name!r} already; give this one another name=, or "
            "remove the old one with unregister_kernel"
        )
    known.append(kernel)


def remove(kernel: RegisteredKernel) -> None:
    """Removes a registered kernel; one that is not there any more is no error."""
    known = _kernels.get(kernel.computes, [])
    if kernel in known:
        known.remove(kernel)
