"""The closed vocabulary of fused operations: what a pattern asks for, never how it is done.

A fused op says everything a lowering needs to make a kernel and to count its traffic, and nothing of
FX nodes: those travel beside it as a `Site`. Sizes may be `int` or `torch.SymInt`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import sympy
import torch

from .algebra import Value

if TYPE_CHECKING:
    from torch.fx import Node

Size = int | torch.SymInt


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
    A "col" may be part of a longer tensor, as a packed bias is: N elements from `first` on.
    """

    kind: Literal["full", "row", "col", "scalar"]
    dtype: torch.dtype
    first: int = 0


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
    bytes:    8 bits, two's complement

    Without a scale it is 1. `zero` is one number, or lies in a tensor as scales do.
    """

    order: Literal["halves", "sequence", "bytes"]
    first: int
    row: int
    block: int
    scale: PerGroup | None
    zero: float | PerGroup

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
    N output features to take from its operand. Empty where every operand is the whole weight.

    Where `packed` is not empty, each weight is stored as it says, and its operands are the tensors that hold it. With
    `q8_activations` x is rounded to eight bits in blocks of 32 (Q8_1), as ggml does.

    Operands of a site, in this order: x, [norm weight], [norm bias], w_0, w_1, …, extras….
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
    packed: tuple[Packed, ...] = ()
    q8_activations: bool = False

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


@dataclass(frozen=True)
class RowReduction:
    """results[i] = what each row [N] of the operands gives: a row [N] ("full") or one number ("row").

    A result is a `Value` in the space of one row, over the leaves `extra(index=j)`: pointwise operations, and
    mean/sum/amax(v; size=N) of the row. A number of the row meets the row's elements as it is, without `bcast`.
    Operands of a site are the extras, in order; "full" ones are [M, N] with rows `strides[j]` elements apart (the
    others have 0 there). Results are in the order of the site's outputs, contiguous.

    `apart` counts the bytes that one kernel of these nodes and their pointwise neighbours would not move: what leaving
    them to Inductor saves beyond the price of the nodes themselves.
    """

    m: Size
    n: int
    results: tuple[Value, ...]
    kinds: tuple[Literal["full", "row"], ...]
    out_dtypes: tuple[torch.dtype, ...]
    extras: tuple[Extra, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype  # of the first full operand
    apart: Size = 0


@dataclass(frozen=True)
class Mask:
    """What is known about which keys a query may see, beyond the bounds of the tensors.

    none:    every key.
    causal:  query i sees keys j <= i + offset (+ position). Offset 0 without position is
             top-left causal, torch's `is_causal`.
    length:  every query sees keys j <= offset (+ position): static-cache decode.
    tensor:  what the mask tensor says.

    `position` tells that a device-side integer scalar is added to the offset: the site's operand of that name. Unless
    the kind is none or causal without a position, the mask is also there as a tensor operand that says the same, where
    the graph has one.
    """

    kind: Literal["none", "causal", "length", "tensor"]
    offset: Size | sympy.Expr = 0
    window: int | None = None  # sliding window: also j > i + offset (+ position) − window
    position: bool = False
    chunk: int | None = None  # chunked: also j // chunk == (i + offset (+ position)) // chunk
    padding: int | None = None  # by length: also j < lengths[b] + padding, the site's operand `lengths`, [B] or [1]
    tensor: Literal["none", "additive", "visible", "hidden"] = "none"  # mask operand: added, or True = visible, hidden
    # rows that see no key: proved that there is none, or what the graph gives for them (NaN also where unknown)
    empty_rows: Literal["none", "mean", "nan", "zero"] = "nan"
    proof: str = ""  # a sentence: how the mask was recognised

    @property
    def is_top_left(self) -> bool:
        """Whether it is torch's `is_causal` and nothing else."""
        shifted = self.position or not isinstance(self.offset, int) or self.offset != 0
        limited = (self.window, self.chunk, self.padding) != (None, None, None)
        return self.kind == "causal" and not shifted and not limited


@dataclass(frozen=True)
class Modification:
    """How scores are modified where no `Mask` says it all, as functions of batch, head, query and key.

    The numbers `added` come to a score, after its cap. A key is seen where both `mask` (of kind none, causal or length)
    and `visible` say so. Expressions are sympy's or `attention.index_functions.Choice`, over the symbols batch, head,
    query and key and over functions named in `reads`, which are elements of operands of the site; `reads` also names
    those of the mask, "position" and "lengths".
    """

    mask: Mask
    added: tuple[Any, ...]
    visible: Any
    finite: bool  # rows that see no key average all values; otherwise `empty_rows` tells what they give
    unknown: bool  # what is added is read, and may hide a key
    empty_rows: Literal["none", "nan", "zero"]
    reads: tuple[str, ...]
    sink: Any = None  # one more score of each row, of batch and head alone, which no value is weighted with


@dataclass(frozen=True)
class Layout:
    """How an operand becomes the tensor that its fused op documents, without a copy where strides allow.

    reshape to `split`, permute by `order`, reshape to `merged`, expand to `shape`, cast to `dtype`; each step is
    left out where it changes nothing.
    """

    split: tuple[Size, ...]
    order: tuple[int, ...]
    merged: tuple[Size, ...]
    shape: tuple[Size, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Attention:
    """softmax(score(q·kᵀ)·…)·v over heads, in layout BHSD.

    q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv]; query head h reads key head h // (H / Hkv).
    score = scale · q·k, then softcap·tanh(score / softcap) where softcap is set, then the mask.
    Operands of a site, in this order: q, k, v, [mask tensor where mask.tensor is not "none"], [position scalar where
    mask.position], [lengths where mask.padding is set], [those that `modification` reads], [scale where scale_operand].
    `layouts` brings q, k, v and the mask tensor into the shapes above (the mask into one that broadcasts to
    [B, H, Lq, Lk]); `out` brings the result [B, H, Lq, Dv] into the shape of the site's output.
    """

    batch: Size
    heads: Size
    kv_heads: Size
    q_len: Size
    kv_len: Size
    head_dim: int
    v_dim: int
    scale: float
    mask: Mask
    dtype: torch.dtype
    layouts: tuple[Layout, ...]
    out: Layout
    softcap: float | None = None
    scale_operand: bool = False  # q·k is also multiplied with the site's last operand, a tensor of one element
    scale_divides: bool = False  # it is divided by it instead
    modification: Modification | None = None  # says the same as a mask of kind "tensor", and of what it is made
    vendor: str = ""  # the attention kernel that the graph already calls, if it does


@dataclass(frozen=True)
class Codes:
    """How keys or values are stored: each is (code − shift − zero) · scale.

    A code is an integer or float of 8 bits, or one of two in a byte: the low ones are the even elements of a row
    where `packed` is "pairs", its first half where it is "halves". A row has one scale and one zero.
    """

    dtype: torch.dtype
    packed: Literal["", "pairs", "halves"] = ""
    shift: float = 0.0
    has_zero: bool = False


@dataclass(frozen=True)
class QuantisedAttention:
    """An attention whose keys or values are stored as codes: `attention` says what it computes of what they stand for.

    Operands of a site: those of the attention with the codes as k and v, then scale and [zero] of k, then those of v.
    """

    attention: Attention
    k: Codes | None
    v: Codes | None


@dataclass(frozen=True)
class RopeCache:
    """What stands before an attention with a static cache: q and k turned, k and v written where they belong.

    q [B, H, L, D], k [B, Hkv, L, D], v [B, Hkv, L, Dv], the caches [B, Hkv, S, D] and [B, Hkv, S, Dv]; "out" are the
    turned queries. What of "q", "k" and "out" `tokens_first` names stands as [B, L, heads, D]; cos and sin broadcast to
    the shape of q, as [B, L, heads, D] where it names "angles", or to half of its last axis. The halves (a, b) of D, or
    its even and odd elements where `interleaved`, become (a·cos − b·sin, b·cos + a·sin), after a norm of each head
    where there is one. Token t goes to position `offset` + scalar + t, or to the t-th of the indices where `indexed`.

    Operands of a site, in this order: q, k, v, cos, sin, key cache, value cache, the scalar or indices [L], [norm
    weight of q], [norm weight of k]. `results` names the site's outputs in their order: "out", "keys", "values".
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    cache_length: int
    head_dim: int
    v_dim: int
    results: tuple[str, ...]
    dtype: torch.dtype
    interleaved: bool = False
    tokens_first: frozenset[str] = frozenset()
    indexed: bool = False
    offset: int = 0
    q_norm: RowNorm | None = None
    k_norm: RowNorm | None = None


@dataclass(frozen=True)
class Declared:
    """What a pattern's own function computes of these arguments; only kernels registered for the pattern compute it.

    `arguments` are those of the function in its own order: fake tensors, bound numbers, chosen alternatives, None where
    an optional parameter is absent. The operands of a site are the tensors among them, in order; a `transposed` operand
    is stored the other way round and is transposed before it is passed. The function's result has the elements
    of the site's output in the same order, and maybe another shape; of a function with several results `kept` gives
    the positions of those that the site's outputs are, in their order.
    """

    pattern: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = field(compare=False)
    transposed: tuple[bool, ...]  # one per operand
    dtype: torch.dtype  # of the first operand
    out: tuple[Any, ...] = field(compare=False)  # the function's results, fake tensors
    flops: float | sympy.Expr
    sizes: tuple[Size, ...]  # the symbolic ones among the arguments' sizes
    kept: tuple[int, ...] = (0,)
    ungenerated: str = ""  # why no kernel is generated for it
    respelled: str = ""  # says how, where the function itself is a better spelling of what stands in the graph


FusedOp = MatmulFamily | MatmulGroup | RowReduction | Attention | QuantisedAttention | RopeCache | Declared


@dataclass(frozen=True)
class Site:
    """Where a fused op stands in an FX graph.

    `operands` are the nodes it reads, in the order its fused op documents. Each may have any shape that is a
    contiguous reshape of the documented one (the emitter reshapes). `output` is the node it replaces, `others` are
    further ones, before it in the graph; `interior` all nodes that become dead unless used elsewhere (the outputs
    included); `escaping` the interior nodes other than outputs that are used elsewhere and therefore stay.
    """

    operands: tuple[Node, ...]
    output: Node
    interior: tuple[Node, ...]
    escaping: tuple[Node, ...] = field(default=())
    others: tuple[Node, ...] = field(default=())

    @property
    def outputs(self) -> tuple[Node, ...]:
        """All nodes that the fused op replaces; `output`, the last in the graph, comes first here."""
        return (self.output, *self.others)

    @property
    def place(self) -> Node:
        """The node before which the fused op stands: its output, or what reads another of its results earlier."""
        inside = set(self.interior)
        readers = [user for node in self.others for user in node.users if user not in inside]
        return min([self.output, *readers])
