"""Spellings of the gated MLP and of norms in front of a linear, and what looks like one and is none.

Each is a function of rows x [..., K] and of `Weights`. `MATCHED` must be found whatever the dtype and whether or not
the sizes of x are symbolic; `REFUSED` must not be taken for what it resembles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


# ---- activations --------------------------------------------------------------------------------
SILU: dict[str, Activation] = {
    "F.silu": F.silu,
    "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "sigmoid(x) * x": lambda x: torch.sigmoid(x) * x,
    "x / (1 + exp(-x))": lambda x: x / (1 + torch.exp(-x)),
    "x * reciprocal(1 + exp(-x))": lambda x: x * torch.reciprocal(torch.exp(x.neg()) + 1.0),
    "x · exp(x) / (1 + exp(x))": lambda x: x * torch.exp(x) / (1 + torch.exp(x)),
    "x · ½(1 + tanh(x/2))": lambda x: x * (0.5 * (1 + torch.tanh(0.5 * x))),
    "silu in float32": lambda x: F.silu(x.float()).to(x.dtype),
}
GELU: dict[str, Activation] = {
    "F.gelu": F.gelu,
    "½x(1 + erf(x/√2))": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "x · (½(erf(x·√½) + 1))": lambda x: x * (0.5 * (torch.erf(x * 0.7071067811865476) + 1.0)),
    "(x/2) · (1 + erf) in float32": lambda x: (x.float() / 2 * (1 + torch.erf(x.float() / 2**0.5))).to(x.dtype),
}
GELU_TANH: dict[str, Activation] = {
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh, pow(x, 3)": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    "tanh, x·x·x": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "tanh, factored": lambda x: x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
}
RELU2: dict[str, Activation] = {
    "relu².square": lambda x: F.relu(x).square(),
    "relu² ** 2": lambda x: torch.relu(x) ** 2,
    "relu² r·r": lambda x: x.clamp(min=0) * x.clamp(min=0),
}
GATES: dict[str, Activation] = {
    "sigmoid": torch.sigmoid,
    "1 / (1 + exp(-x))": lambda x: 1 / (1 + torch.exp(-x)),
    "relu": lambda x: torch.maximum(x, torch.zeros_like(x)),
}
ACTIVATIONS = SILU | GELU | GELU_TANH | RELU2 | GATES


def activated(act: Activation) -> Function:
    return lambda x, w: act(F.linear(x, w.gate)) * F.linear(x, w.up)


def packed(take: Callable[[Tensor], tuple[Tensor, ...]]) -> Function:
    def mlp(x: Tensor, w: Weights) -> Tensor:
        gate, up = take(F.linear(x, w.packed))
        return F.silu(gate) * up

    return mlp


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _batches(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else _flat(x)[None]


def _with_addmm(x: Tensor, w: Weights) -> Tensor:
    gate = torch.addmm(w.b_gate, _flat(x), w.gate.t())
    up = torch.addmm(w.b_up, _flat(x), w.up.t())
    return (F.silu(gate) * up).view(*x.shape[:-1], -1)


def _with_bmm(x: Tensor, w: Weights) -> Tensor:
    """One batch of all rows, as some export tools write a linear."""
    rows = _flat(x)[None]
    return (F.silu(torch.bmm(rows, w.gate.t()[None])) * torch.bmm(rows, w.up.t()[None]))[0]


def _with_broadcast_bmm(x: Tensor, w: Weights) -> Tensor:
    rows = _batches(x)
    gate, up = (t.t().expand(rows.shape[0], -1, -1) for t in (w.gate, w.up))
    return F.silu(torch.bmm(rows, gate)) * torch.bmm(rows, up)


def _with_baddbmm(x: Tensor, w: Weights) -> Tensor:
    rows = _batches(x)
    gate, up = (t.t().expand(rows.shape[0], -1, -1) for t in (w.gate, w.up))
    return F.silu(torch.baddbmm(w.b_gate, rows, gate)) * torch.baddbmm(w.b_up, rows, up)


def _behind_a_norm(x: Tensor, w: Weights) -> Tensor:
    h = rms_llama(x, w)
    return F.silu(F.linear(h, w.gate)) * F.linear(h, w.up)


def _behind_a_layer_norm(x: Tensor, w: Weights) -> Tensor:
    h = F.layer_norm(x, x.shape[-1:], w.g, w.b)
    return F.linear(h, w.up, w.b_up) * F.gelu(F.linear(h, w.gate, w.b_gate))


GATED: dict[str, Function] = {f"act: {name}": activated(act) for name, act in ACTIVATIONS.items()} | {
    "up · act(gate)": lambda x, w: F.linear(x, w.up) * F.silu(F.linear(x, w.gate)),
    "x @ W.T": lambda x, w: F.silu(x @ w.gate.T) * (x @ w.up.T),
    "matmul(x, W.transpose)": lambda x, w: torch.mul(
        torch.matmul(x, w.up.transpose(0, 1)), F.silu(torch.matmul(x, w.gate.mT))
    ),
    "weights [in, out]": lambda x, w: F.silu(x @ w.gate_kn) * (x @ w.up_kn),
    "einsum nk": lambda x, w: (
        F.silu(torch.einsum("...k,nk->...n", x, w.gate)) * torch.einsum("...k,nk->...n", x, w.up)
    ),
    "einsum kn": lambda x, w: (
        F.silu(torch.einsum("...k,kn->...n", x, w.gate_kn)) * torch.einsum("...k,kn->...n", x, w.up_kn)
    ),
    "biases": lambda x, w: F.silu(F.linear(x, w.gate, w.b_gate)) * F.linear(x, w.up, w.b_up),
    "biases added": lambda x, w: F.silu(w.b_gate + x @ w.gate.T) * (x @ w.up.T + w.b_up),
    "addmm": _with_addmm,
    "bmm of one batch": _with_bmm,
    "bmm, weight broadcast": _with_broadcast_bmm,
    "baddbmm, weight broadcast": _with_baddbmm,
    "chunk": packed(lambda h: h.chunk(2, dim=-1)),
    "split": packed(lambda h: h.split(h.shape[-1] // 2, dim=-1)),
    "slices": packed(lambda h: (h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :])),
    "up first": packed(lambda h: h.chunk(2, dim=-1)[::-1]),
    "unflatten, unbind": packed(lambda h: h.unflatten(-1, (2, -1)).unbind(-2)),
    "narrow": packed(lambda h: (h.narrow(-1, 0, h.shape[-1] // 2), h.narrow(-1, h.shape[-1] // 2, h.shape[-1] // 2))),
    "packed with bias": lambda x, w: (
        (h := F.linear(x, w.packed, w.b_packed)) is not None and F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    ),
    "F.glu": lambda x, w: F.glu(F.linear(x, w.packed), dim=-1),
    "parts of one weight": lambda x, w: F.silu(F.linear(x, w.packed.chunk(2)[0])) * F.linear(x, w.packed.chunk(2)[1]),
    "rows of every second": lambda x, w: F.silu(F.linear(x, w.packed[::2])) * F.linear(x, w.packed[1::2]),
    "casts between": lambda x, w: (
        (F.silu(F.linear(x, w.gate).float()) * F.linear(x, w.up).float()).to(x.dtype)
    ),
    "views between": lambda x, w: (F.silu(F.linear(_flat(x), w.gate)) * F.linear(_flat(x), w.up)).view(
        *x.shape[:-1], len(w.gate)
    ),
    "RMSNorm in front": _behind_a_norm,
    "LayerNorm in front": _behind_a_layer_norm,
}  # fmt: skip


# ---- norms --------------------------------------------------------------------------------------
def _mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def rms_llama(x: Tensor, w: Weights) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w.g * h.to(x.dtype)


def _rms_gemma(x: Tensor, w: Weights) -> Tensor:
    h = x.float() * torch.rsqrt(_mean_square(x.float()) + 1e-6)
    return (h * (1.0 + w.g.float())).type_as(x)


def _rms_t5(x: Tensor, w: Weights) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(variance + 1e-6)
    return w.g * h.to(w.g.dtype)


RMS: dict[str, Function] = {
    "F.rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w.g, eps=1e-6),
    "F.rms_norm, no weight": lambda x, w: F.rms_norm(x, x.shape[-1:], eps=1e-6),
    "F.rms_norm, default eps": lambda x, w: F.rms_norm(x, x.shape[-1:], w.g),
    "Llama": rms_llama,
    "Gemma (1 + w)": _rms_gemma,
    "T5": _rms_t5,
    "weight after the cast": lambda x, w: (x.float() * torch.rsqrt(_mean_square(x.float()) + 1e-6) * w.g).to(x.dtype),
    "no weight": lambda x, w: x * torch.rsqrt(_mean_square(x) + 1e-6),
    "x · x": lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w.g,
    "square": lambda x, w: w.g * (torch.rsqrt(1e-6 + torch.square(x).mean(-1, True)) * x),
    "1 / sqrt": lambda x, w: x * (1 / torch.sqrt(_mean_square(x) + 1e-6)) * w.g,
    "/ sqrt": lambda x, w: x / torch.sqrt(_mean_square(x) + 1e-6) * w.g,
    "** -0.5": lambda x, w: x * (_mean_square(x) + 1e-6) ** -0.5 * w.g,
    "sum / n": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6) * w.g,
    "norm² / n": lambda x, w: x * torch.rsqrt(x.norm(dim=-1, keepdim=True) ** 2 / x.shape[-1] + 1e-6) * w.g,
    "(norm · n^-½)²": lambda x, w: (
        x / torch.sqrt((x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** -0.5) ** 2 + 1e-6) * w.g
    ),
    "√n · x / √(Σ + n·eps)": lambda x, w: (
        math.sqrt(x.shape[-1]) * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + x.shape[-1] * 1e-6) * w.g
    ),
    "weight first": lambda x, w: (x * w.g) * torch.rsqrt(_mean_square(x) + 1e-6),
    "unsqueezed": lambda x, w: x * torch.rsqrt((x * x).mean(-1) + 1e-6).unsqueeze(-1) * w.g,
    "residual in front": lambda x, w: rms_llama(x + torch.tanh(x), w),
}
LAYER: dict[str, Function] = {
    "F.layer_norm": lambda x, w: F.layer_norm(x, x.shape[-1:], w.g, w.b),
    "no bias": lambda x, w: F.layer_norm(x, x.shape[-1:], w.g),
    "no weight (OLMo)": lambda x, w: F.layer_norm(x.float(), x.shape[-1:], eps=1e-5).to(x.dtype),
    "by hand": lambda x, w: (
        (c := x - x.mean(-1, keepdim=True)) / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + 1e-5) * w.g + w.b
    ),
    "c · c": lambda x, w: (
        w.b + w.g * ((c := x - x.mean(-1, keepdim=True)) * torch.rsqrt((c * c).mean(-1, keepdim=True) + 1e-5))
    ),
    "var(unbiased=False)": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w.g + w.b
    ),
    "var_mean": lambda x, w: (
        (x - (s := torch.var_mean(x, -1, correction=0, keepdim=True))[1]) / torch.sqrt(s[0] + 1e-5) * w.g + w.b
    ),
    "E[x²] − E[x]²": lambda x, w: (
        (x - (m := x.mean(-1, keepdim=True))) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) - m * m + 1e-5) * w.g + w.b
    ),
    "Σ/n": lambda x, w: (
        (c := x - x.sum(-1, keepdim=True) / (n := x.shape[-1])) * (c.square().sum(-1, True) / n + 1e-5) ** -0.5 * w.g
        + w.b
    ),
    "std²": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.std(-1, keepdim=True, unbiased=False) ** 2 + 1e-5) * w.g + w.b
    ),
    "addcmul": lambda x, w: torch.addcmul(w.b, w.g, F.layer_norm(x, x.shape[-1:])),
    "in float32": lambda x, w: F.layer_norm(x.float(), x.shape[-1:], w.g.float(), w.b.float()).to(x.dtype),
}  # fmt: skip
LINEARS: dict[str, Callable[[Tensor, Weights], Tensor]] = {
    "F.linear": lambda h, w: F.linear(h, w.gate),
    "with bias": lambda h, w: F.linear(h, w.gate, w.b_gate),
    "mm": lambda h, w: torch.mm(_flat(h), w.gate.t()),
    "addmm": lambda h, w: torch.addmm(w.b_gate, _flat(h), w.gate_kn),
    "einsum": lambda h, w: torch.einsum("...k,nk->...n", h, w.gate),
    "matmul [in, out]": lambda h, w: h @ w.gate_kn,
    "bmm": lambda h, w: torch.bmm(_flat(h)[None], w.gate_kn[None]),
    "every second row": lambda h, w: F.linear(h, w.packed[::2]),
}


def before_a_linear(norm: Function, linear: Function = LINEARS["F.linear"]) -> Function:
    return lambda x, w: linear(norm(x, w), w)


NORM_LINEAR: dict[str, Function] = (
    {f"RMSNorm: {name}": before_a_linear(norm) for name, norm in RMS.items()}
    | {f"LayerNorm: {name}": before_a_linear(norm) for name, norm in LAYER.items()}
    | {f"linear: {name}": before_a_linear(rms_llama, linear) for name, linear in LINEARS.items()}
)
MATCHED: dict[str, dict[str, Function]] = {"gated_mlp": GATED, "norm_linear": NORM_LINEAR}

# ---- what is none -------------------------------------------------------------------------------
NOT_NORMS: dict[str, Function] = {
    "eps outside the root": lambda x, w: x / (torch.sqrt(_mean_square(x)) + 1e-2) * w.g,
    "eps a floor": lambda x, w: x * torch.rsqrt(_mean_square(x).clamp(min=1e-2)) * w.g,
    "F.normalize · √d": lambda x, w: F.normalize(x, dim=-1) * math.sqrt(K) * w.g,
    "x / max(norm, eps) · √d": lambda x, w: x / x.norm(dim=-1, keepdim=True).clamp(min=0.1) * math.sqrt(K) * w.g,
    "sum, not mean": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w.g,
    "wrong n": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (K - 1) + 1e-6) * w.g,
    "cube": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6) * w.g,
    "sqrt, not rsqrt": lambda x, w: x * torch.sqrt(_mean_square(x) + 1e-6) * w.g,
    "other axis": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6) * w.g,
    "over all": lambda x, w: x * torch.rsqrt(x.pow(2).mean() + 1e-6) * w.g,
    "other tensor": lambda x, w: (x + 1) * torch.rsqrt(_mean_square(x) + 1e-6) * w.g,
    "sample variance": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=True) + 1e-5)
    ),
    "variance about another mean": lambda x, w: (
        (x - x.mean(-1, keepdim=True)) * torch.rsqrt((x - x.amax(-1, keepdim=True)).pow(2).mean(-1, keepdim=True))
    ),
    "std + eps": lambda x, w: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + 1e-2) * w.g,
    "centred by half the mean": lambda x, w: (
        (x - 0.5 * x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w.g
    ),
}  # fmt: skip
NOT_GATED: dict[str, Function] = {
    "act on both": lambda x, w: F.silu(F.linear(x, w.gate)) * F.silu(F.linear(x, w.up)),
    "act on none": lambda x, w: F.linear(x, w.gate) * F.linear(x, w.up),
    "two inputs": lambda x, w: F.silu(F.linear(x, w.gate)) * F.linear(x + 1, w.up),
    "product transposed": lambda x, w: (
        F.silu(w.gate @ _flat(x).T) * (w.up @ _flat(x).T)
    ),
    "sum of the two": lambda x, w: F.silu(F.linear(x, w.gate)) + F.linear(x, w.up),
    "gelu with another root": lambda x, w: (
        (g := F.linear(x, w.gate)) * 0.5 * (1 + torch.erf(g / 1.5)) * F.linear(x, w.up)
    ),
    "silu of twice": lambda x, w: (
        (g := F.linear(x, w.gate)) * torch.sigmoid(2 * g) * F.linear(x, w.up)
    ),
}  # fmt: skip
REFUSED: dict[str, dict[str, Function]] = {
    "gated_mlp": NOT_GATED,
    "norm_linear": {name: before_a_linear(norm) for name, norm in NOT_NORMS.items()},
}
