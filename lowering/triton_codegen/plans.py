"""How a kernel of the matmul family divides its work.

gemv and swap read every weight exactly once and need M <= rows: one program keeps all rows of x and BLOCK_N
columns of the output, and walks along K. tile cuts the output along M too, so it takes any M.

gemv: float32 multiply-adds on the ordinary units; `rows` rows of x are unrolled. Each thread keeps a partial sum for
      every `lanes` neighbouring elements of K, and the sums meet once, after the loop.
swap: `tl.dot` with the weight tile as the M operand of the matrix unit ("swap-AB"), because the rows of x are too few
      to fill it; x, padded to `rows`, is the N operand. Narrow tiles run on mma, with both operands in registers,
      where Σ x² as a product of its own (`gram`) is nearly free, and what a LayerNorm's mean needs; wide ones on
      wgmma, where the machine has it.
sliced: as swap, with the warps side by side along K instead of N: narrow outputs leave too few blocks otherwise.
split: as swap, with `splits` blocks side by side along K; the last of them to arrive adds up what all have left.
tile: `tl.dot` of `rows` rows of x with the weight tile, on wgmma, every operand brought by the copy engine (TMA). Tiles
      that share their weights follow each other, so that the weights come from L2 after the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Plan:
    """One division of the work. Block sizes, warps and stages reach the kernel as constexprs or launch options, so
    plans that agree in the others (and divide N and K alike) share one source text."""

    kind: Literal["gemv", "swap", "sliced", "split", "tile"]
    rows: int  # of x in one program
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    lanes: int = 1  # gemv: neighbouring elements of K summed inside a thread at every step
    group: int = 1  # tile: so many tiles along M follow each other with the same weights
    slices: int = 1  # sliced: pieces of K that are walked side by side
    splits: int = 1  # split: blocks that share K
    gram: bool = False  # swap: an RMSNorm's Σ x² is the diagonal of x·xᵀ, taken from the matrix unit

    @property
    def step_k(self) -> int:
        """Elements of K per step of the walk."""
        return self.slices * self.block_k

    @property
    def wide(self) -> bool:
        """Whether a tile fills wgmma, which multiplies 64 rows of weights by four warps."""
        return self.block_n >= 64

    def part_of(self, k: int) -> int:
        """Elements of K that one program walks, in whole steps."""
        return math.ceil(k / (self.splits * self.step_k)) * self.step_k

    def programs(self, m: int, n: int) -> int:
        """How many programs compute an output of [m, n]."""
        return math.ceil(n / self.block_n) * (math.ceil(m / self.rows) if self.kind == "tile" else self.splits)

    @property
    def label(self) -> str:
        lanes = f"l{self.lanes}" if self.lanes > 1 else ""
        lanes += f"x{self.slices}" if self.slices > 1 else ""
        lanes += f"/{self.splits}" if self.splits > 1 else ""
        lanes += "g" if self.gram else ""
        lanes += f"g{self.group}" if self.kind == "tile" else ""
        return f"{self.kind}{self.rows}_n{self.block_n}k{self.block_k}w{self.num_warps}s{self.num_stages}{lanes}"
