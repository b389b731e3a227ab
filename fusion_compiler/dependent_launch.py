"""Kernels that are launched before the kernel in front of them has ended (programmatic dependent launch).

From compute capability 9 on, the blocks of such a kernel take their places as soon as those of the last one have left,
while its results are still on their way to memory, and wait there: 0.1 to 0.5 µs less between two kernels on an H200.
Nothing may be read or written before the wait.

A small kernel leaves most of the device idle: behind its own wait it lets the next kernel's blocks take their places
while it runs. They wait for all that it writes, and all in front of it has ended by then. So what comes from outside of
the graph may be read before that wait (`late`), which then stands where the small kernel's results are read.

The wait is written as an assembly that returns zero, which is added to every pointer, and to a coordinate of all that
is loaded through a descriptor. So data and not order keeps each access behind it, and the assembly need not have side
effects, of which Inductor's analysis of kernels accepts none.
Source: CUDA Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Sequence
from typing import Any

import torch

from .torch_private.source_files import module_from_source, source_of

WAIT, LET = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"
ALIGNED = 16  # elements: a multiple of the zero leaves pointers known to be as aligned as they were


def supported(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched so."""
    import triton

    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available() or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def late(loop: str) -> str:
    """A zero to add to a pointer or coordinate: what is read there in a step of the loop over `loop` waits."""
    return f'tl.inline_asm_elementwise("{WAIT} mov.u32 $0, 0;", "=r,r", [{loop}], tl.int32, True, 1) * {ALIGNED}'


def waiting(kernel: Any, pointers: Sequence[str], described: Collection[str] = (), lets: bool = False) -> Any:
    """`kernel` with a wait at its head. Its arguments that are tensors are `pointers` and `described`, which come as
    descriptors. With `lets` the next kernel may take its places from there on.

    A kernel that we did not generate is left as it is: it starts when everything in front of it has ended.
    """
    source, name = source_of(kernel.fn), kernel.__name__
    if source is None:
        return kernel
    return getattr(module_from_source(with_wait(source, name, pointers, described, lets)), name)


def with_wait(
    source: str, name: str, pointers: Sequence[str], described: Collection[str] = (), lets: bool = False
) -> str:
    """The module `source` with a wait at the head of its kernel `name`."""
    kernel = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    control = f'"{WAIT} {LET + " " if lets else ""}mov.u32 $0, $1;", "=r,r"'
    head = [
        f"waited = tl.inline_asm_elementwise({control}, [tl.program_id(0) * 0], tl.int32, True, 1) * {ALIGNED}",
        *(f"{pointer} += waited" for pointer in pointers),
    ]
    for tensor in described:
        source = re.sub(rf"\b{tensor}\.load\(\[", f"{tensor}.load([waited + ", source)
    lines = source.split("\n")
    first = kernel.body[0]
    lines[first.lineno - 1 : first.lineno - 1] = [" " * first.col_offset + line for line in head]
    return "\n".join(lines)
