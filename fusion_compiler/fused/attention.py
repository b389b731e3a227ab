"""Attention over keys and values as they are, or stored as codes or in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch

from .size import Size


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
    staggered: bool = False  # that is what the last query sees; the one before it one key less, and so on
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
    scale_operand: bool = False  # q·k is also multiplied with the site's last operand
    scale_layout: Layout | None = None  # brings that into [B or 1, H or 1, Lq or 1, 1]; None: it has one element
    scale_divides: bool = False  # it is divided by it instead
    modification: Modification | None = None  # says the same as a mask of kind "tensor", and of what it is made
    vendor: str = ""  # the attention kernel that the graph already calls, if it does
    logarithm: Layout | None = None  # brings log Σ exp(score) of each row, [B, H, Lq], into the shape of its output
    results: tuple[str, ...] = ("out",)  # what the site's outputs are, in their order: also "logarithm" if it is one


WORD = 4  # codes that a kernel reads together


@dataclass(frozen=True)
class Codes:
    """How keys or values are stored: each is (code − shift − zero) · scale.

    A code is an integer or float of 8 bits, or one of two in a byte: the low ones are the even elements of a row
    where `packed` is "pairs", its first half where it is "halves". A row has one scale and one zero, and its codes are
    whole words of `WORD`, which lie aligned. `in_pages`: scale and zero differ from position to position and lie in
    pages as the codes do, [blocks, size, Hkv] or [blocks, Hkv, size], or with one more axis of one element.
    """

    dtype: torch.dtype
    packed: Literal["", "pairs", "halves"] = ""
    shift: float = 0.0
    has_zero: bool = False
    in_pages: bool = False


@dataclass(frozen=True)
class Pages:
    """Keys and values lie in blocks of `size` positions each, which a table names for each element of the batch.

    The caches are [blocks, size, Hkv, D], or [blocks, Hkv, size, D] where `heads_first`.
    """

    size: int
    heads_first: bool = False


@dataclass(frozen=True)
class StoredAttention:
    """An attention whose keys or values are stored as codes, or in pages: `attention` says what it computes of what
    they stand for.

    Operands of a site: those of the attention with k and v as they are stored, then scale and [zero] of k, then those
    of v, then the table of blocks [B, most blocks] or [B · most blocks] where there are pages; a block's number may be
    negative, counted from the last.
    """

    attention: Attention
    k: Codes | None
    v: Codes | None
    pages: Pages | None = None
