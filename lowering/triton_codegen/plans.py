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
shared: as tile, with as many blocks as fit the device at a time, which walk over the tiles in rounds. The tiles that do
      not fill a last round are owned by some blocks, and the others help these with the end of K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

HANDED_ON = 5  # steps: what beginning and ending a piece and handing it on takes


@dataclass(frozen=True)
class Shares:
    """Who computes what where `blocks` blocks share tiles: all take part in `rounds`; of the `left` tiles, each owner
    walks the first `kept` steps of K of one, and each helper the rest of up to `pieces`, which it does first of all."""

    rounds: int
    left: int
    helpers: int
    pieces: int
    kept: int


@dataclass(frozen=True)
class Plan:
    """One division of the work. Block sizes, warps and stages reach the kernel as constexprs or launch options, so
    plans that agree in the others (and divide N and K alike) share one source text."""

    kind: Literal["gemv", "swap", "sliced", "split", "tile", "shared", "direct"]
    rows: int  # of x in one program
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    lanes: int = 1  # gemv: neighbouring elements of K summed inside a thread at every step
    group: int = 1  # tile: so many tiles along M follow each other with the same weights
    slices: int = 1  # sliced: pieces of K that are walked side by side; direct: that are asked for ahead
    splits: int = 1  # split: blocks that share K
    blocks: int = 0  # shared: of the launch
    gram: bool = False  # swap: an RMSNorm's Σ x² is the diagonal of x·xᵀ, taken from the matrix unit

    @property
    def step_k(self) -> int:
        """Elements of K per step of the walk."""
        return self.slices * self.block_k

    @property
    def wide(self) -> bool:
        """Whether a tile fills wgmma, which multiplies 64 rows of weights by four warps."""
        return self.block_n >= 64

    @property
    def tiled(self) -> bool:
        return self.kind in ("tile", "shared")

    def part_of(self, k: int) -> int:
        """Elements of K that one program walks, in whole steps."""
        return math.ceil(k / (self.splits * self.step_k)) * self.step_k

    def programs(self, m: int, n: int) -> int:
        """How many programs compute an output of [m, n]."""
        return self.blocks or math.ceil(n / self.block_n) * (math.ceil(m / self.rows) if self.tiled else self.splits)

    def shares(self, m: int, n: int, k: int) -> Shares:
        tiles, steps = math.ceil(m / self.rows) * math.ceil(n / self.block_n), math.ceil(k / self.block_k)
        rounds, left = divmod(tiles, self.blocks)
        helpers = self.blocks - left
        pieces = math.ceil(left / helpers)
        kept = math.ceil((pieces * steps + (pieces - 1) * HANDED_ON) / (pieces + 1))
        return Shares(rounds, left, helpers, pieces, min(kept, steps - 1))

    @property
    def label(self) -> str:
        lanes = f"l{self.lanes}" if self.lanes > 1 else ""
        lanes += f"x{self.slices}" if self.slices > 1 else ""
        lanes += f"/{self.splits}" if self.splits > 1 else ""
        lanes += "g" if self.gram else ""
        lanes += f"g{self.group}" if self.tiled else ""
        lanes += f"b{self.blocks}" if self.blocks else ""
        return f"{self.kind}{self.rows}_n{self.block_n}k{self.block_k}w{self.num_warps}s{self.num_stages}{lanes}"
