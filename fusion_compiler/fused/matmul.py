"""Linears of one input, with a norm in front and pointwise operations behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..algebra import Value
from .size import Size


@dataclass(frozen=True)
class RowNorm:
    """Normalisation of each row of x [M, K] before the matmul.

    rms:   x · rsqrt(mean(x²) + eps) · (w + offset)
    layer: (x − mean(x)) · rsqrt(var(x) + eps) · (w + offset) + b      (population variance)
    `offset` is 1.0 for Gemma's (1 + w), else 0.0; without a weight the factor is 1.
    """

    kind: Literal["rms", "layer"]
    eps: float
    has_weight: bool
    has_bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Extra:
    """A further tensor that the epilogue reads, in the output's index space [M, N].

    kind: "full" [M, N], "row" [M] (one value per row), "col" [N] (one per column), "scalar" [].
    A "col" may be part of a longer tensor, as a packed bias is: N elements from `first` on, `step` apart.
    """

    kind: Literal["full", "row", "col", "scalar"]
    dtype: torch.dtype
    first: int = 0
    step: int = 1


@dataclass(frozen=True)
class PerGroup:
    """A float for each output feature n and group of `group` neighbours along K: it lies
    first + n · row + (k // group) · step elements behind the first of its tensor."""

    dtype: torch.dtype
    group: int
    first: int
    row: int
    step: int


@dataclass(frozen=True)
class Packed:
    """How a weight is stored: w[n, k] = scale(n, k) · (code(n, k) − zero(n, k)).

    The codes of a row lie `row` bytes behind those of the row before, the first of all `first` bytes into the tensor:
    halves:   4 bits, unsigned; 16 bytes for 32 neighbours, of which byte j has element j low and j + 16 high;
              the next 32 lie `block` bytes further (16, or 18 where each block brings its scale, as in Q4_0)
    sequence: 4 bits, unsigned; element k is the low (even k) or high half of byte k // 2
    bytes:    8 bits, two's complement, or the float type `float8`

    Without a scale it is 1. `zero` is one number, or lies in a tensor as scales do.
    """

    order: Literal["halves", "sequence", "bytes"]
    first: int
    row: int
    block: int
    scale: PerGroup | None
    zero: float | PerGroup
    float8: torch.dtype | None = None

    @property
    def operands(self) -> int:
        """How many tensors hold it: the codes, [scales], [zeros]."""
        return 1 + (self.scale is not None) + isinstance(self.zero, PerGroup)

    @property
    def bits(self) -> int:
        return 8 if self.order == "bytes" else 4

    @property
    def bytes_per_weight(self) -> float:
        """With its share of scales and zeros."""
        held = [p for p in (self.scale, self.zero) if isinstance(p, PerGroup)]
        return self.bits / 8 + sum(p.dtype.itemsize / p.group for p in held)


@dataclass(frozen=True)
class MatmulFamily:
    """out [M, N] = epilogue(norm(x) @ w_0ᵀ, norm(x) @ w_1ᵀ, …, extras).

    x is [M, K] with unit stride along K; each weight is [N, K] with unit stride along K (an `nn.Linear`
    weight), or [K, N] with unit stride along N where `weight_is_kn`. All weights of a family with an
    epilogue that mixes them have the same N.

    `epilogue` is a `Value` over the leaves `acc(index=i)` (the i-th product, float32) and
    `extra(index=j)`; plain linear has `acc(index=0)` itself. A linear's bias is a "col" extra.

    A weight may be part of a larger stored one (a packed gate|up): `features` then gives, per weight, the first of the
    N output features to take from its operand, `feature_step` apart (2 where gate and up alternate; never with
    `weight_is_kn`). Empty where every operand is the whole weight.

    Where `packed` is not empty, each weight is stored as it says, and its operands are the tensors that hold it. With
    `q8_activations` x is rounded to eight bits in blocks of 32 (Q8_1), as ggml does.

    `computed_from` is the float type of 8 bits that a weight, not packed, is computed from in the graph.

    Where there is an `activation`, x is not read but computed: it is that `Value` over the leaves `extra(index=j)`,
    which are the `inputs`, seen in the space [M, K]. There is no norm then. Rows of "full" ones may lie further apart.

    Operands of a site, in this order: x or the inputs, [norm weight], [norm bias], w_0, w_1, …, extras….
    """

    m: Size
    k: Size
    n: Size
    weights: int
    norm: RowNorm | None
    epilogue: Value
    extras: tuple[Extra, ...]
    dtype: torch.dtype  # of x and the weights
    out_dtype: torch.dtype
    weight_is_kn: bool = False
    features: tuple[int, ...] = ()
    feature_step: int = 1
    packed: tuple[Packed, ...] = ()
    q8_activations: bool = False
    computed_from: torch.dtype | None = None
    activation: Value | None = None
    inputs: tuple[Extra, ...] = ()

    @property
    def head(self) -> int:
        """How many operands of a site come before the weights."""
        norm = self.norm
        vectors = 0 if norm is None else norm.has_weight + norm.has_bias
        return (len(self.inputs) if self.activation else 1) + vectors

    @property
    def parts(self) -> tuple[MatmulFamily, ...]:
        return (self,)

    @property
    def whole(self) -> MatmulFamily:
        return self


@dataclass(frozen=True)
class MatmulGroup:
    """Several matmul families of one x and one norm, with a result each: one launch walks all their weights.

    The parts agree in m, k, norm, dtype and weight_is_kn and have one whole weight each; n, epilogue, extras and
    out_dtype are their own. Operands of a site, in this order: x, [norm weight], [norm bias], then of each part its
    weight and its extras. Results are in the order of the parts, which is that of the site's outputs.
    """

    m: Size
    parts: tuple[MatmulFamily, ...]

    @property
    def whole(self) -> MatmulFamily:
        """One linear with as many output features, which is the same work."""
        return replace(self.parts[0], n=sum(p.n for p in self.parts), extras=())

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype
