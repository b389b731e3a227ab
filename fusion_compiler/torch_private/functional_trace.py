"""Tracing into functional ATen, Triton kernels included (`torch._subclasses.functional_tensor`).

Under functionalisation by dispatch a `torch.library.triton_op` opens up, and the kernels it wraps become the functional
kernel nodes that Inductor launches itself. Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from .. import decompositions


def functional_trace(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], fake_mode: FakeTensorMode
) -> GraphModule:
    """The functional, decomposed graph of a function on fake tensors of `fake_mode`."""
    with fake_mode, torch.no_grad():
        functional: Callable[..., Any] = dispatch_functionalize(function)
        graph_module = make_fx(functional, decomposition_table=decompositions.table(), tracing_mode="fake")(*inputs)
    graph_module.graph.eliminate_dead_code()
    return graph_module
