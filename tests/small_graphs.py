"""The measured workloads as decomposed FX graphs with fake tensors: no weights, no compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion_compiler.machine import cpu_machine

# The CPU of the measurements: 2 cores, 32 MB last-level cache, bf16 instructions but no AMX.
TWO_CORES = cpu_machine(2, 32 * 2**20, "avx512_bf16")


def traced(fn: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype, dynamic: bool = False) -> GraphModule:
    """`fn` of tensors without data, decomposed as Inductor does; `dynamic`: the first size of the first is symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for i, shape in enumerate(shapes):
        sizes = [DimDynamic.DYNAMIC if dynamic and i == d == 0 else DimDynamic.STATIC for d in range(len(shape))]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(torch.empty(shape, dtype=dtype, device="meta"), symbolic_context=context))
    with torch.no_grad():
        gm = make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(*fakes)
    gm.graph.eliminate_dead_code()
    return gm


def calls(gm: GraphModule) -> list[Node]:
    """The nodes that compute."""
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def gated_mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(x @ gate.T) * (x @ up.T)


def rms_linear(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (scale * h.to(x.dtype)) @ weight.T


def layer_norm_linear(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), scale, bias) @ weight.T


def repeat_kv(x: torch.Tensor, groups: int) -> torch.Tensor:
    if groups == 1:
        return x
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)


def attention(softcap: float | None = None) -> Callable[..., torch.Tensor]:
    """Causal attention as eager models spell it, q [B, H, Lq, D], k and v [B, Hkv, Lk, D]."""

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (repeat_kv(t, q.shape[1] // t.shape[1]) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / q.shape[-1] ** 0.5
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if q.shape[2] > 1:
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril().logical_not()
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)

    return forward
