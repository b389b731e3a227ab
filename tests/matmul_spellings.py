"""Spellings of the gated MLP and of norms in front of a linear, and what looks like one and is none.

Each is a function of rows x [..., K] and of `Weights`. `MATCHED` must be found whatever the dtype and whether or not
the sizes of x are symbolic; `REFUSED` must not be taken for what it resembles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from norm_spellings import ADD_NORM, LAYER, NORM, NOT_NORMS, NOT_SOFTMAX, RMS, SOFTMAX, rms_llama
from spelled_graphs import Activation, Function, Weights
from torch import Tensor

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


def residual(x: Tensor, w: Weights) -> Tensor:
    """Some tensor of the shape of a linear's result."""
    return torch.cat((x, x), dim=-1)[..., : len(w.gate)].tanh()


def _added_in_place(x: Tensor, w: Weights) -> Tensor:
    h = residual(x, w)
    h += F.linear(x, w.gate, w.b_gate)
    return h


EPILOGUES: dict[str, Function] = {
    "residual": lambda x, w: F.linear(x, w.gate) + residual(x, w),
    "residual first": lambda x, w: residual(x, w) + F.linear(x, w.gate, w.b_gate),
    "residual in place": _added_in_place,
    "residual in float32": lambda x, w: (residual(x, w).float() + F.linear(x, w.gate).float()).to(x.dtype),
    "residual subtracted": lambda x, w: residual(x, w) - F.linear(x, w.gate),
    "residual of half": lambda x, w: torch.add(residual(x, w), F.linear(x, w.gate), alpha=0.5),
    "residual flat": lambda x, w: (_flat(residual(x, w)) + F.linear(_flat(x), w.gate)).view(*x.shape[:-1], len(w.gate)),
    "residual by addmm": lambda x, w: torch.addmm(_flat(residual(x, w)), _flat(x), w.gate.t()).view(
        *x.shape[:-1], len(w.gate)
    ),
    "of matmul": lambda x, w: residual(x, w) + x @ w.gate_kn,
    "of einsum": lambda x, w: residual(x, w) + torch.einsum("...k,nk->...n", x, w.gate),
    "column": lambda x, w: F.linear(x, w.gate) * w.b_up + residual(x, w),
    "row": lambda x, w: F.linear(x, w.gate) * x.amax(-1, keepdim=True),
    "number": lambda x, w: F.linear(x, w.gate, w.b_gate) * 0.125,
    "gate": lambda x, w: F.linear(x, w.gate) * torch.sigmoid(residual(x, w)),
    "activation and residual": lambda x, w: F.gelu(F.linear(x, w.gate, w.b_gate)) + residual(x, w),
    "tanh": lambda x, w: torch.tanh(F.linear(x, w.gate)),
    "clamped": lambda x, w: F.linear(x, w.gate).clamp(-1, 1),
    "leaky": lambda x, w: F.leaky_relu(F.linear(x, w.gate, w.b_gate)),
    "softcap": lambda x, w: 30 * torch.tanh(F.linear(x, w.gate) / 30),
    "RMSNorm in front": lambda x, w: F.linear(rms_llama(x, w), w.gate) + residual(x, w),
} | {f"act: {name}": (lambda x, w, act=act: act(F.linear(x, w.gate, w.b_gate))) for name, act in ACTIVATIONS.items()}


NORM_LINEAR: dict[str, Function] = (
    {f"RMSNorm: {name}": before_a_linear(norm) for name, norm in RMS.items()}
    | {f"LayerNorm: {name}": before_a_linear(norm) for name, norm in LAYER.items()}
    | {f"linear: {name}": before_a_linear(rms_llama, linear) for name, linear in LINEARS.items()}
)
MATCHED: dict[str, dict[str, Function]] = {
    "gated_mlp": GATED, "linear_epilogue": EPILOGUES, "norm_linear": NORM_LINEAR, "norm": NORM, "add_norm": ADD_NORM,
    "softmax": SOFTMAX,
}  # fmt: skip

# ---- what is none -------------------------------------------------------------------------------
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
NOT_EPILOGUES: dict[str, Function] = {
    "nothing": lambda x, w: F.linear(x, w.gate),
    "a bias alone": lambda x, w: F.linear(x, w.gate) + w.b_gate,
    "summed": lambda x, w: F.linear(x, w.gate).sum(-1),
    "softmax": lambda x, w: F.linear(x, w.gate).softmax(-1),
    "transposed": lambda x, w: F.linear(_flat(x), w.gate).T + residual(_flat(x), w).T,
    "repeated": lambda x, w: F.linear(x, w.gate)[None].expand(3, *x.shape[:-1], len(w.gate)) * 2,
    "of two pieces": lambda x, w: (
        (h := F.linear(x, w.packed))[..., : len(w.gate)].relu() + h[..., len(w.gate) :].amax(-1, keepdim=True)
    ),
    "of two linears": lambda x, w: F.linear(x, w.gate) + F.linear(x, w.up),
}
REFUSED: dict[str, dict[str, Function]] = {
    "linear_epilogue": NOT_EPILOGUES,
    "gated_mlp": NOT_GATED,
    "norm_linear": {name: before_a_linear(norm) for name, norm in NOT_NORMS.items()},
    "norm": NOT_NORMS,
    "softmax": NOT_SOFTMAX,
}
