"""Integers on the device that are advanced in place, as one kernel of one warp."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ...candidates import Candidate, Traffic, Unavailable
from ...cost.efficiency import efficiency
from ...fused import Counters, Site
from ...machine import Machine
from ...reasons import ON_CPU
from ...splice import Builder, load_kernel

if TYPE_CHECKING:
    from torch.fx import Node

NAME = "counters"


def candidates(op: Counters, machine: Machine) -> list[Candidate] | Unavailable:
    if machine.kind == "cpu":
        return Unavailable(ON_CPU)
    moved = sum(dtype.itemsize for dtype in op.dtypes)
    return [
        Candidate(
            name="triton_counters",
            kernel="triton counters",
            traffic=Traffic(len(op.steps), moved, moved, 1),
            seconds=efficiency(machine).pointwise.latency + machine.launch_overhead,
            emit=functools.partial(emit, op),
            details=(("counters", len(op.steps)),),
        )
    ]


def write(op: Counters) -> str:
    """The text of a module with the kernel `NAME`, for a grid of one program."""
    names = [f"counter{i}" for i in range(len(op.steps))]
    lines = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {NAME}({', '.join(names)}):"]
    lines += [f"    tl.store({n}, tl.load({n}) + {step})" for n, step in zip(names, op.steps, strict=True)]
    return "\n".join(lines) + "\n"


def emit(op: Counters, builder: Builder, site: Site) -> tuple[Node, ...]:
    """Adds the kernel behind all that reads the old integers, so that no copies of them are needed."""
    behind = Builder(builder.gm, min(user for node in site.outputs for user in node.users), builder.origin)
    nodes = {f"counter{i}": node for i, node in enumerate(site.operands)}
    done = behind.triton(load_kernel(write(op), NAME), (1,), nodes, list(nodes), num_warps=1, num_stages=1)
    builder.kernels += behind.kernels
    return tuple(done[f"counter{i}"] for i in op.results)
