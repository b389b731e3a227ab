"""Compiling one graph while another is being compiled (`torch._guards.tracing`, `unset_fake_temporarily`).

Real tensors exist inside, and nothing that is guarded or specialised reaches the graph that is being compiled outside.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from .inductor import compile_aten, compile_graph


@contextmanager
def apart() -> Iterator[None]:
    """Steps out of the compilation that is under way."""
    with tracing(None), unset_fake_temporarily(), torch.no_grad():
        yield


def compile_alone(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor's code for a graph that returns a tuple, under the settings in force, for inputs of these sizes."""
    # a CUDA graph is the caller's business: Inductor's own would copy every input into it
    compiled: Callable[..., Any] = compile_graph(gm, inputs, compile_aten, {"triton.cudagraphs": False})
    return compiled
