"""How a flash kernel divides its work, and the blocks of head dimensions that matrix units take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """A program takes `block_m` queries of one head and walks over its keys, `block_n` at a time.

    `descriptors`: keys and values come through the tensor memory accelerator (Hopper and newer)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    listed: bool = False  # the blocks of keys that rows see are listed beforehand, where no limits tell them
    native: bool = False  # a cap by NVIDIA's instruction for tanh

    @property
    def label(self) -> str:
        return f"m{self.block_m}n{self.block_n}w{self.num_warps}s{self.num_stages}{'t' if self.descriptors else ''}"


def pieces(width: int) -> tuple[tuple[int, int], ...]:
    """(first, size) of blocks that cover a head dimension: sizes are powers of two of at least 16, at most two of them,
    the last one reaching beyond the width where that is needed."""
    whole = 1 << max(width.bit_length() - 1, 4)
    if whole >= width:
        return ((0, whole),)
    rest = 1 << max((width - whole - 1).bit_length(), 4)
    return ((0, 2 * whole),) if rest == whole else ((0, whole), (whole, rest))


@dataclass(frozen=True)
class Part:
    """Columns of a head dimension that one product is of: text of `size` of them, of which those from `bound` on do
    not exist (0: all do)."""

    columns: str
    size: int
    bound: int


def parts(width: int) -> tuple[Part, ...]:
    """The pieces of a head dimension as parts."""
    return tuple(
        Part(f"{first} + tl.arange(0, {size})", size, width if first + size > width else 0)
        for first, size in pieces(width)
    )
