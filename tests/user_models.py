"""Models as people write them without transformers: each block in the idiom of a well-known small code base."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LENGTH = 32, 4, 12


class NanoGPT(nn.Module):
    """A tril buffer, masked_fill, a packed c_attn split three ways, tanh GELU by its formula."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c_fc, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(16, 16)).view(1, 1, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(WIDTH, dim=2)
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        att = self.attn_dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(b, t, c)
        x = x + self.c_proj(y)
        h = self.c_fc(self.ln_2(x))
        h = 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))
        return x + self.out(h)


class Llama2C(nn.Module):
    """RMSNorm by hand, RoPE on interleaved pairs, repeat_kv, a mask made by full and triu, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.g1, self.g2 = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, WIDTH // 2, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.w2 = nn.Linear(48, WIDTH, bias=False)
        mask = torch.triu(torch.full((1, 1, 16, 16), float("-inf")), diagonal=1)
        self.register_buffer("mask", mask)
        angles = torch.outer(torch.arange(16), 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def norm(self, x: Tensor, g: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x) * g

    def turned(self, x: Tensor) -> Tensor:
        r, i = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = (t[None, : x.shape[1], None] for t in (self.cos, self.sin))
        return torch.stack((r * cos - i * sin, r * sin + i * cos), dim=-1).flatten(3).type_as(x)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.norm(x, self.g1)
        q, k, v = (w(h).view(b, t, -1, 8) for w in (self.wq, self.wk, self.wv))
        q, k = self.turned(q), self.turned(k)
        k, v = (y[:, :, :, None, :].expand(b, t, 2, 2, 8).reshape(b, t, 4, 8) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(8) + self.mask[:, :, :t, :t]
        y = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
        x = x + self.wo(y.transpose(1, 2).contiguous().view(b, t, -1))
        h = self.norm(x, self.g2)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class XTransformers(nn.Module):
    """einsum with named axes, rearranged by hand, a mask filled with the least float, GEGLU by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_q, self.to_out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.to_kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.ff_in, self.ff_out = nn.Linear(WIDTH, 96), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h = self.norm(x)
        q, (k, v) = self.to_q(h), self.to_kv(h).chunk(2, dim=-1)
        q, k, v = (t.view(b, n, HEADS, -1).permute(0, 2, 1, 3) for t in (q, k, v))
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5
        causal = torch.ones((n, n), dtype=torch.bool, device=x.device).triu(1)
        sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
        out = torch.einsum("bhij,bhjd->bhid", sim.softmax(dim=-1), v)
        x = x + self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, -1))
        y, gate = self.ff_in(self.norm2(x)).chunk(2, dim=-1)
        return x + self.ff_out(y * F.gelu(gate))


class LitGPT(nn.Module):
    """A qkv packed by groups, (1 + w) norms, attention through the library's function with a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.weight2 = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.qkv, self.proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.fc_1, self.fc_2 = (nn.Linear(WIDTH, 48, bias=False) for _ in range(2))
        self.down = nn.Linear(48, WIDTH, bias=False)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        return (x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-6) * (1 + weight)).to(self.qkv.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        qkv = self.qkv(self.norm(x, self.weight)).view(b, t, 2, 4, 8).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((2, 1, 1), dim=2)
        k, v = (y.expand(b, 2, 2, t, 8) for y in (k, v))
        q, k, v = (y.reshape(b, -1, t, 8) for y in (q, k, v))
        mask = torch.tril(torch.ones((t, t), dtype=torch.bool, device=x.device))[None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=8**-0.5)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, c))
        h = self.norm(x, self.weight2)
        return x + self.down(F.gelu(self.fc_1(h), approximate="tanh") * self.fc_2(h))


class Timm(nn.Module):
    """A ViT block: qkv reshaped to five axes and unbound, q scaled before the product, a residual scaled by gamma."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, WIDTH))
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        attn = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        x = x + self.gamma * self.proj((attn @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.gamma * self.mlp(self.norm2(x))


class Diffusers(nn.Module):
    """Cross attention with baddbmm on heads folded into the batch, context of another width, GEGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(24, WIDTH, bias=False) for _ in range(2))
        self.to_out, self.proj, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 96), nn.Linear(48, WIDTH)

    def split(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, HEADS, c // HEADS).permute(0, 2, 1, 3).reshape(b * HEADS, n, c // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        context = x[:, :5, :24] + 1.0
        q, k, v = (self.split(t) for t in (self.to_q(self.norm(x)), self.to_k(context), self.to_v(context)))
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=8**-0.5)
        y = torch.bmm(scores.softmax(dim=-1), v)
        y = y.reshape(b, HEADS, n, c // HEADS).permute(0, 2, 1, 3).reshape(b, n, c)
        x = x + self.to_out(y)
        h, gate = self.proj(self.norm3(x)).chunk(2, dim=-1)
        return x + self.out(h * F.gelu(gate))


class Conformer(nn.Module):
    """Half steps around attention, SiLU by multiplication, a gated depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.pointwise, self.depthwise = (
            nn.Conv1d(WIDTH, 2 * WIDTH, 1),
            nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.up(self.norms[0](x))
        x = x + 0.5 * self.down(h * h.sigmoid())
        y = self.norms[1](x)
        q, k, v = (w(y).view(b, t, HEADS, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
        weights = torch.softmax(torch.matmul(q, k.mT) / math.sqrt(q.shape[-1]), -1)
        x = x + self.o(torch.matmul(weights, v).transpose(1, 2).reshape(b, t, c))
        z = F.glu(self.pointwise(self.norms[2](x).transpose(1, 2)), dim=1)
        return x + F.silu(self.depthwise(z)).transpose(1, 2)


class T5(nn.Module):
    """Relative position bias by buckets, no scale, scores biased in place, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.weight2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.bias = nn.Embedding(8, HEADS)
        self.wi, self.wo = nn.Linear(WIDTH, 64, bias=False), nn.Linear(64, WIDTH, bias=False)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        h = self.norm(x, self.weight)
        q, k, v = (w(h).view(b, t, HEADS, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2))
        at = torch.arange(t, device=x.device)
        scores += self.bias((at[None] - at[:, None]).clamp(-4, 3) + 4).permute(2, 0, 1).unsqueeze(0)
        y = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)
        x = x + self.o(y.transpose(1, 2).contiguous().view(b, t, c))
        return x + self.wo(F.relu(self.wi(self.norm(x, self.weight2))))


class ESM(nn.Module):
    """RoPE by rotate_half in [length, batch] order with bmm, the exact GELU by erf."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def turned(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device).type_as(x)
        angles = torch.outer(at, 1.0 / 10000 ** (torch.arange(0, 8, 2, device=x.device).type_as(x) / 8))
        angles = torch.cat((angles, angles), dim=-1)[None]
        a, b = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-b, a), dim=-1) * angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        t, b, c = x.size()
        h = self.norm(x)
        q, k, v = self.q(h) * 8**-0.5, self.k(h), self.v(h)
        q, k, v = (y.contiguous().view(t, b * HEADS, -1).transpose(0, 1) for y in (q, k, v))
        q, k = self.turned(q), self.turned(k)
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
        y = torch.bmm(weights, v).transpose(0, 1).contiguous().view(t, b, c)
        x = x + self.o(y)
        h = self.fc1(self.norm2(x))
        return (x + self.fc2(h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))))).transpose(0, 1)


class EncoderLayer(nn.Module):
    """The library's own layer, before its norm and after it, and its attention across."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, norm_first=True, batch_first=True, activation="gelu")
        self.post = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, batch_first=True)
        self.across = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y = self.post(self.pre(x, src_mask=mask), x)
        return y + self.across(y, x, x, need_weights=False)[0]


# The attentions that must be found in each, and the other fusions.
USER_MODELS: dict[type[nn.Module], tuple[int, frozenset[str]]] = {
    NanoGPT: (1, frozenset({"norm_linear", "linear_epilogue"})),
    Llama2C: (1, frozenset({"norm_linear", "gated_mlp", "rope", "add_norm"})),
    XTransformers: (1, frozenset({"norm_linear", "gated_mlp"})),
    LitGPT: (1, frozenset({"norm_linear", "gated_mlp", "add_norm"})),
    Timm: (1, frozenset({"norm_linear", "linear_epilogue"})),
    Diffusers: (1, frozenset({"norm_linear", "gated_mlp"})),
    # Inductor's own rewrite leaves fused attention where the mask is none
    Conformer: (0, frozenset({"norm_linear", "linear_epilogue"})),
    T5: (0, frozenset({"norm_linear", "linear_epilogue", "add_norm"})),
    ESM: (0, frozenset({"norm_linear", "linear_epilogue", "rope"})),
    EncoderLayer: (0, frozenset({"linear_epilogue"})),
}
