"""What the tables of spellings share: the weights that a spelling may use, and the decomposed graph of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion_compiler import decompositions

K, N = 24, 40


class Weights(NamedTuple):
    gate: Tensor  # [N, K]
    up: Tensor  # [N, K]
    gate_kn: Tensor  # [K, N]
    up_kn: Tensor  # [K, N]
    packed: Tensor  # [2N, K]
    b_gate: Tensor  # [N]
    b_up: Tensor  # [N]
    b_packed: Tensor  # [2N]
    g: Tensor  # [K], a norm's weight
    b: Tensor  # [K], a norm's bias


def weights(dtype: torch.dtype = torch.float32, k: int = K, n: int = N) -> Weights:
    shapes = ((n, k), (n, k), (k, n), (k, n), (2 * n, k), (n,), (n,), (2 * n,), (k,), (k,))
    return Weights(*(torch.randn(s, dtype=dtype) / (k**0.5 if len(s) > 1 else 1) for s in shapes))


Function = Callable[[Tensor, Weights], Tensor]
Activation = Callable[[Tensor], Tensor]


def graph(function: Callable[..., Any], x: Tensor, w: Weights, dynamic: bool = False) -> GraphModule:
    """The decomposed graph of `function(x, w)` on fake tensors; `dynamic`: every size of x but the last is symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(t: Tensor, leading: DimDynamic) -> Tensor:
        sizes = [leading] * (t.dim() - 1) + [DimDynamic.STATIC] * min(t.dim(), 1)
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(t, symbolic_context=context)

    rows = fake(x, DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC)
    held = [fake(t, DimDynamic.STATIC) for t in w]
    functional = torch.func.functionalize(lambda x, *w: function(x, Weights(*w)), remove="mutations")
    with torch.no_grad(), enable_python_dispatcher():
        decomposed = make_fx(functional, decomposition_table=decompositions.table(), tracing_mode="fake")(rows, *held)
        if not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in decomposed.graph.nodes):
            return decomposed
        # some decompositions update in place
        return make_fx(torch.func.functionalize(decomposed, remove="mutations"), tracing_mode="fake")(rows, *held)
