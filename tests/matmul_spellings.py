"""Spellings of the gated MLP, of norms alone, behind a residual and in front of a linear, of softmax; and lookalikes.

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
    "x · (1 − sigmoid(−x))": lambda x: x * (1 - torch.sigmoid(-x)),
    "x / (1 + 2^(−x·log₂e))": lambda x: x / (1 + torch.exp2(-x * math.log2(math.e))),
    "expit": lambda x: x * torch.special.expit(x),
    "silu in float32": lambda x: F.silu(x.float()).to(x.dtype),
}
GELU: dict[str, Activation] = {
    "F.gelu": F.gelu,
    "½x(1 + erf(x/√2))": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "x · (½(erf(x·√½) + 1))": lambda x: x * (0.5 * (torch.erf(x * 0.7071067811865476) + 1.0)),
    "x · ndtr(x)": lambda x: x * torch.special.ndtr(x),
    "(x/2) · (1 + erf) in float32": lambda x: (x.float() / 2 * (1 + torch.erf(x.float() / 2**0.5))).to(x.dtype),
}
GELU_TANH: dict[str, Activation] = {
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh, pow(x, 3)": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
    "tanh, x·x·x": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "x · sigmoid(2y)": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
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
    "(1 + tanh(x/2)) / 2": lambda x: (torch.tanh(x / 2) + 1) / 2,
    "relu": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "F.threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "relu_": lambda x: torch.relu_(x),
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
    "inner": lambda x, w: F.silu(torch.inner(x, w.gate)) * torch.inner(x, w.up),
    "tensordot": lambda x, w: (
        F.silu(torch.tensordot(x, w.gate, ([-1], [1]))) * torch.tensordot(x, w.up, ([-1], [1]))
    ),
    "in place": lambda x, w: F.silu(F.linear(x, w.gate), inplace=True).mul_(F.linear(x, w.up)),
    "bias of the gate alone": lambda x, w: F.silu(F.linear(x, w.gate, w.b_gate)) * F.linear(x, w.up),
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
    "split into sizes": packed(lambda h: h.split([h.shape[-1] // 2] * 2, dim=-1)),
    "tensor_split": packed(lambda h: h.tensor_split(2, dim=-1)),
    "up first, slices": packed(lambda h: (h[..., h.shape[-1] // 2 :], h[..., : h.shape[-1] // 2])),
    "view, select": packed(lambda h: tuple(h.unflatten(-1, (2, -1)).select(-2, i) for i in (0, 1))),
    "weights joined": lambda x, w: packed(lambda h: h.chunk(2, dim=-1))(
        x, w._replace(packed=torch.cat((w.gate, w.up)))
    ),
    "einsum of a packed weight": lambda x, w: (
        (h := torch.einsum("...k,gnk->...gn", x, w.packed.unflatten(0, (2, -1)))) is not None
        and F.silu(h[..., 0, :]) * h[..., 1, :]
    ),
    "unflatten, unbind": packed(lambda h: h.unflatten(-1, (2, -1)).unbind(-2)),
    "narrow": packed(lambda h: (h.narrow(-1, 0, h.shape[-1] // 2), h.narrow(-1, h.shape[-1] // 2, h.shape[-1] // 2))),
    "packed, bias added": lambda x, w: (
        (h := F.linear(x, w.packed) + w.b_packed) is not None and F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]
    ),
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
    "Σ · 1/n": lambda x, w: x / torch.sqrt((x * x).sum(-1, True) * (1 / x.shape[-1]) + 1e-6) * w.g,
    "Σ by einsum": lambda x, w: (
        x * torch.rsqrt(torch.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1] + 1e-6) * w.g
    ),
    "|x|²": lambda x, w: x * torch.rsqrt(x.abs().pow(2).mean(-1, True) + 1e-6) * w.g,
    "reciprocal of sqrt": lambda x, w: x * torch.reciprocal(torch.sqrt(_mean_square(x) + 1e-6)) * w.g,
    "scale first": lambda x, w: x * (w.g * torch.rsqrt(_mean_square(x) + 1e-6)),
    "eps in a tensor": lambda x, w: x * torch.rsqrt(_mean_square(x) + torch.full((1,), 1e-6, dtype=x.dtype)) * w.g,
    "weight expanded": lambda x, w: x * torch.rsqrt(_mean_square(x) + 1e-6) * w.g.expand_as(x),
    "(1 + w) behind the cast": lambda x, w: (
        (x.float() * torch.rsqrt(_mean_square(x.float()) + 1e-6)).to(x.dtype) * (1 + w.g)
    ),
    "n + n · w": lambda x, w: (n := x * torch.rsqrt(_mean_square(x) + 1e-6)) + n * w.g,
    "F.rms_norm, 1 + w": lambda x, w: F.rms_norm(x, x.shape[-1:], 1 + w.g, 1e-6),
    "over two axes": lambda x, w: F.rms_norm(
        x.unflatten(-1, (4, -1)), (4, x.shape[-1] // 4), w.g.unflatten(0, (4, -1)), 1e-6
    ).flatten(-2),
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
    "native_layer_norm": lambda x, w: torch.native_layer_norm(x, [x.shape[-1]], w.g, w.b, 1e-5)[0],
    "(1 + w)": lambda x, w: F.layer_norm(x, x.shape[-1:], w.g + 1, w.b),
    "(1 + w) by hand": lambda x, w: F.layer_norm(x, x.shape[-1:]) * (1 + w.g) + w.b,
    "RMSNorm of x − mean": lambda x, w: F.rms_norm(x - x.mean(-1, True), x.shape[-1:], w.g, 1e-5) + w.b,
    "variance of x − mean": lambda x, w: (
        (c := x - x.mean(-1, True)) * torch.rsqrt(c.var(-1, correction=0, keepdim=True) + 1e-5) * w.g + w.b
    ),
    "std_mean": lambda x, w: (
        (x - (s := torch.std_mean(x, -1, correction=0, keepdim=True))[1]) / torch.sqrt(s[0] ** 2 + 1e-5) * w.g + w.b
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
NORM: dict[str, Function] = {f"RMSNorm: {name}": norm for name, norm in RMS.items()} | {
    f"LayerNorm: {name}": norm for name, norm in LAYER.items()
}


def behind_a_residual(norm: Function) -> Function:
    return lambda x, w: norm(x + torch.sin(x), w)


ADD_NORM = {name: behind_a_residual(norm) for name, norm in list(NORM.items())[::4]}
SOFTMAX: dict[str, Function] = {
    "torch.softmax": lambda x, w: torch.softmax(x, dim=-1),
    "positive dim": lambda x, w: torch.softmax(x, dim=x.dim() - 1),
    "in float32": lambda x, w: torch.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype),
    "scaled": lambda x, w: torch.softmax(x * 0.125, dim=-1),
    "temperature": lambda x, w: F.softmax(x / 0.7, dim=-1),
    "exp over sum": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) / e.sum(-1, True),
    "max.values": lambda x, w: (e := torch.exp(x - x.max(-1, True).values)) / e.sum(-1, True),
    "reciprocal": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) * e.sum(-1, True).reciprocal(),
    "unsqueezed": lambda x, w: (e := torch.exp(x - x.amax(-1).unsqueeze(-1))) / e.sum(-1)[..., None],
    "base two": lambda x, w: (e := torch.exp2((x - x.amax(-1, True)) * math.log2(math.e))) / e.sum(-1, True),
    "softmin": lambda x, w: F.softmin(x, dim=-1),
}
MATCHED: dict[str, dict[str, Function]] = {
    "gated_mlp": GATED, "norm_linear": NORM_LINEAR, "norm": NORM, "add_norm": ADD_NORM, "softmax": SOFTMAX
}  # fmt: skip

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
NOT_SOFTMAX: dict[str, Function] = {
    "other axis": lambda x, w: torch.softmax(x, dim=-2),
    "mean for max": lambda x, w: (e := torch.exp(x - x.mean(-1, True))) / e.sum(-1, True),
    "mean for sum": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) / e.mean(-1, True),
    "maximum of all": lambda x, w: (e := torch.exp(x - x.amax())) / e.sum(-1, True),
    "sum of all": lambda x, w: (e := torch.exp(x - x.amax(-1, True))) / e.sum(),
    "base three": lambda x, w: (e := torch.pow(3.0, x - x.amax(-1, True))) / e.sum(-1, True),
}
REFUSED: dict[str, dict[str, Function]] = {
    "gated_mlp": NOT_GATED,
    "norm_linear": {name: before_a_linear(norm) for name, norm in NOT_NORMS.items()},
    "norm": NOT_NORMS,
    "softmax": NOT_SOFTMAX,
}
