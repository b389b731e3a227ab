"""How eager models spell a linear with quantised weights: each a module of x [M, K], with its weight in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler import ggml
from fusion_compiler.ggml import q4_0, q8_0

K, N, GROUP = 128, 48, 64


def relative(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


class Spelling(torch.nn.Module):
    """Weights drawn once; `weight()` is what they stand for, in float64 [N, K]."""

    def __init__(self, k: int = K, n: int = N, seed: int = 0) -> None:
        super().__init__()
        self.k, self.n = k, n
        self.make(torch.Generator().manual_seed(seed))

    def make(self, g: torch.Generator) -> None:
        raw = q4_0.quantise(torch.randn(self.n, self.k, generator=g) / self.k**0.5)
        self.register_buffer("raw", raw)

    def weight(self) -> Tensor:
        return q4_0.dequantise(self.raw, torch.float64)

    def shift(self) -> Tensor | float:
        """What is added to the product."""
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class RawBytes(Spelling):
    """As loaders of GGUF files do it."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.raw.detach().view(-1, 18)
        d, qs = torch.split(blocks, [2, 16], dim=-1)
        d = d.contiguous().view(torch.float16)
        shifts = torch.tensor([0, 4], device=qs.device, dtype=torch.uint8).reshape(1, 1, 2, 1)
        codes = (qs.reshape(len(blocks), -1, 1, 16) >> shifts & 0x0F).reshape(len(blocks), -1).to(torch.int8) - 8
        weight = (d * codes).view(self.n, self.k)
        return x @ weight.to(x.dtype).t()


class OfGgml(Spelling):
    def make(self, g: torch.Generator) -> None:
        super().make(g)
        self.linear = ggml.Linear(self.raw, torch.randn(self.n, generator=g))

    def shift(self) -> Tensor | float:
        return self.linear.bias.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class OfGgmlSplit(OfGgml):
    def make(self, g: torch.Generator) -> None:
        super().make(g)
        ggml.split(self)


class EightBitsOfGgml(OfGgmlSplit):
    def make(self, g: torch.Generator) -> None:
        self.raw = q8_0.quantise(torch.randn(self.n, self.k, generator=g) / self.k**0.5)
        self.linear = ggml.Linear(self.raw, torch.randn(self.n, generator=g), form="Q8_0")
        ggml.split(self)

    def weight(self) -> Tensor:
        return q8_0.dequantise(self.raw, torch.float64)


class Split(Spelling):
    """Codes [N, K/32, 16] and scales [N, K/32] apart."""

    def make(self, g: torch.Generator) -> None:
        super().make(g)
        blocks = self.raw.view(self.n, -1, 18)
        self.register_buffer("qs", blocks[..., 2:].contiguous())
        self.register_buffer("d", blocks[..., :2].contiguous().view(torch.float16).squeeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.qs & 0xF, self.qs >> 4
        codes = torch.cat([low, high], -1).to(x.dtype) - 8
        return F.linear(x, (codes * self.d.to(x.dtype)[..., None]).reshape(self.n, self.k))


class RoundedActivations(Split):
    """With the activations rounded to Q8_1 in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, 32))
        d = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(blocks / d).to(torch.int8)
        return super().forward((codes * d).flatten(-2))


class BlockByBlock(Split):
    """The same with a product of integers for each block, scaled afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, 32))
        d = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.round(blocks / d).to(torch.int8).to(x.dtype)
        weights = torch.cat([self.qs & 15, self.qs >> 4], -1).to(x.dtype) - 8
        products = torch.einsum("mbj,nbj->mnb", codes, weights)
        return (products * d.squeeze(-1)[:, None] * self.d.to(x.dtype)).sum(-1)


class IntegerWeights(Spelling):
    """Eight bits, one scale per output feature."""

    def make(self, g: torch.Generator) -> None:
        self.register_buffer("w", torch.randint(-127, 128, (self.n, self.k), generator=g).to(torch.int8))
        self.register_buffer("scales", torch.rand(self.n, generator=g).half() / 500)

    def weight(self) -> Tensor:
        return self.w.double() * self.scales.double()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.to(x.dtype)) * self.scales.to(x.dtype)


class Float8(Spelling):
    """Floats of eight bits, one scale per output feature."""

    dtype = torch.float8_e4m3fn

    def make(self, g: torch.Generator) -> None:
        self.register_buffer("w", torch.randn(self.n, self.k, generator=g).to(self.dtype))
        self.register_buffer("scales", torch.rand(self.n, generator=g) / 20)

    def weight(self) -> Tensor:
        return self.w.double() * self.scales.double()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.w.float() * self.scales[:, None]).to(x.dtype))


class Float8OneScale(Float8):
    """One scale for all, and another type of float."""

    dtype = torch.float8_e5m2

    def make(self, g: torch.Generator) -> None:
        super().make(g)
        self.scales = torch.rand((), generator=g).half()

    def weight(self) -> Tensor:
        return self.w.double() * self.scales.double()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.to(x.dtype) * self.scales.to(x.dtype))


class Float8Groups(Float8):
    """A scale for each group of 64 along K."""

    def make(self, g: torch.Generator) -> None:
        super().make(g)
        self.scales = torch.rand(self.n, self.k // GROUP, generator=g).half() / 20

    def weight(self) -> Tensor:
        return self.w.double() * self.scales.double().repeat_interleave(GROUP, 1)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.w.view(self.n, -1, GROUP).to(x.dtype)
        return F.linear(x, (groups * self.scales.to(x.dtype)[..., None]).flatten(1))


class Float8ScaledAfterwards(Float8):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.to(x.dtype)) * self.scales.to(x.dtype)


class Grouped(Spelling):
    """Words of eight codes along K, with a scale and a zero point for each group of 64."""

    def make(self, g: torch.Generator) -> None:
        words = torch.randint(-(2**31), 2**31, (self.n, self.k // 8), generator=g)
        self.register_buffer("qweight", words.to(torch.int32))
        self.register_buffer("zeros", torch.randint(0, 16, (self.n, self.k // GROUP), generator=g).half())
        self.register_buffer("scales", torch.rand(self.n, self.k // GROUP, generator=g).half() / 50)

    def weight(self) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        codes = (self.qweight.long()[:, :, None] >> shifts & 15).reshape(self.n, -1, GROUP)
        return ((codes - self.zeros.double()[..., None]) * self.scales.double()[..., None]).reshape(self.n, self.k)

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4, device=x.device, dtype=torch.int32)
        codes = ((self.qweight[:, :, None] >> shifts) & 15).reshape(self.n, -1, GROUP).to(x.dtype)
        weight = (codes - self.zeros.to(x.dtype)[..., None]) * self.scales.to(x.dtype)[..., None]
        return F.linear(x, weight.reshape(self.n, self.k))


SPELLINGS: dict[str, Callable[..., Spelling]] = {
    "raw bytes": RawBytes,
    "ggml.Linear": OfGgml,
    "ggml.split": OfGgmlSplit,
    "ggml.split, Q8_0": EightBitsOfGgml,
    "split": Split,
    "rounded activations": RoundedActivations,
    "integer weights": IntegerWeights,
    "grouped": Grouped,
    "float8": Float8,
    "float8, one scale": Float8OneScale,
    "float8 in groups": Float8Groups,
    "float8, scaled afterwards": Float8ScaledAfterwards,
}
