"""What the kernels of decode attention read and write, and how the work is divided."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....fused import Attention, Codes, Size, StoredAttention

Axes = tuple[Size, Size, Size, Size]


@dataclass(frozen=True)
class Plan:
    """How the work is divided: `rows` of queries in a tile, `block` keys per step, `splits` of the keys per head.

    With `own_keys` every warp walks keys of its own, and what the warps found meets at the end; codes ask for that.
    """

    rows: int
    block: int
    splits: int
    num_warps: int
    num_stages: int
    own_keys: bool = False

    @property
    def label(self) -> str:
        own = "k" if self.own_keys else ""
        return f"decode{self.rows}_n{self.block}s{self.splits}w{self.num_warps}{own}s{self.num_stages}"


@dataclass(frozen=True)
class Operand:
    """A tensor as a kernel reads it: dtype, and strides along batch, heads, positions and columns.

    Of k and v that are `codes`, with their scale and zero: 0 where these are broadcast. In pages of `page` positions
    the first stride goes from block to block.
    """

    dtype: torch.dtype
    strides: Axes
    codes: Codes | None = None
    scale: Operand | None = None
    zero: Operand | None = None
    page: int = 0


@dataclass(frozen=True)
class Table:
    """Numbers below `blocks` of the blocks that hold keys and values; strides along batch and positions."""

    dtype: torch.dtype
    strides: tuple[Size, Size]
    blocks: Size


@dataclass(frozen=True)
class Operands:
    """`mask` only where it is read as a tensor: strides along batch, heads, queries, keys, 0 where it is broadcast.

    `position`, `lengths` and `scale` are dtypes; `lengths` has one number for all where `one_length`.
    """

    q: Operand
    k: Operand
    v: Operand
    out: Operand
    mask: Operand | None = None
    position: torch.dtype | None = None
    lengths: torch.dtype | None = None
    one_length: bool = False
    scale: torch.dtype | None = None
    table: Table | None = None


@dataclass(frozen=True)
class KernelSource:
    """One kernel: its arguments are `tensors` with their dtypes, then `sizes`, the symbolic ones; it writes `outputs`
    and is pipelined in `num_stages`."""

    text: str
    name: str
    tensors: dict[str, torch.dtype]
    sizes: dict[str, Size]
    outputs: tuple[str, ...]
    num_stages: int


def as_stored(asked: Attention | StoredAttention) -> StoredAttention:
    return asked if isinstance(asked, StoredAttention) else StoredAttention(asked, None, None)


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def group(op: Attention) -> int:
    return int(op.heads) // int(op.kv_heads)


def query_rows(op: Attention) -> int:
    """Rows of q that read one key/value head."""
    return group(op) * int(op.q_len)


def row_tiles(op: Attention, plan: Plan) -> int:
    return -(-query_rows(op) // plan.rows)
