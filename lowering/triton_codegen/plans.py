"""How a kernel of the matmul family divides its work.

Every kind reads every weight exactly once and needs M <= rows: one program keeps all rows of x and BLOCK_N columns of
the output, and walks along K.

gemv: float32 multiply-adds on the ordinary units; `rows` rows of x are unrolled. Each thread keeps a partial sum for
      every `lanes` neighbouring elements of K, and the sums meet once, after the loop.
swap: `tl.dot` with the weight tile as the M operand of the matrix unit ("swap-AB"), because the rows of x are too few
      to fill it; x, padded to `rows`, is the N operand. With `split` > 1 the warps share a step of `split` · BLOCK_K
      along K instead of the columns: every warp handles its own part of x, and their sums meet after the loop.
tile: `tl.dot` with x, padded to `rows`, as the M operand from registers: enough rows to fill the matrix unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ...fused import MatmulFamily


@dataclass(frozen=True)
class Plan:
    """One division of the work. Block sizes, warps and stages reach the kernel as constexprs or launch options, so
    plans that agree in the others (and divide N and K alike) share one source text."""

    kind: Literal["gemv", "swap", "tile"]
    rows: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    lanes: int = 1  # gemv: neighbouring elements of K summed inside a thread at every step
    gram: bool = False  # swap: an RMSNorm's Σ x² is the diagonal of x·xᵀ, taken from the matrix unit
    split: int = 1  # swap: slices of K that are walked side by side, one for each warp

    @property
    def step_k(self) -> int:
        """Elements of K per step of the walk."""
        return self.split * self.block_k

    @property
    def label(self) -> str:
        further = f"l{self.lanes}" if self.lanes > 1 else ""
        further += f"x{self.split}" if self.split > 1 else ""
        further += "g" if self.gram else ""
        return f"{self.kind}{self.rows}_n{self.block_n}k{self.block_k}w{self.num_warps}s{self.num_stages}{further}"


def blocks(op: MatmulFamily, plan: Plan) -> int:
    """Programs of a launch: blocks of columns, counted apart in every part of a split output."""
    return sum(math.ceil(width / plan.block_n) for width in op.splits or (int(op.n),))
