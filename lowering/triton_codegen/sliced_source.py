"""Writes the kernel for up to 32 rows of x and few columns: every warp walks a slice of K of its own.

A step takes `slices` pieces of BLOCK_K side by side, so that tiles have a leading axis over slices and each warp
multiplies one piece of x. The sums of the slices meet after the loop, always in the same order. There is no norm: what
a norm stands in front of is seldom narrow.
"""

from __future__ import annotations

from .swap_source import Swap


class Sliced(Swap):
    """`tl.dot` of weight tiles [slices, BLOCK_N, BLOCK_K] with x; accumulators [slices, BLOCK_N, rows]."""

    outer, inner = "[None, :, None]", "[:, None, :]"

    @property
    def step_k(self) -> str:
        return f"{self.plan.slices} * BLOCK_K"

    def start(self) -> None:
        slices, rows = self.plan.slices, self.plan.rows
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.zeros(({slices}, BLOCK_N, {rows}), tl.float32)")

    def step(self) -> None:
        pieces = f"tl.arange(0, {self.plan.slices})[:, None] * BLOCK_K"
        self.emit(f"k = start + {pieces} + tl.arange(0, BLOCK_K)[None, :]")
        if not self.known.even_k:
            self.emit("k_in = k < K")
        self.load_operands()
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.dot(w{i}_tile, tl.permute(y, (0, 2, 1)), acc{i})")

    def finish(self) -> None:
        self.emit(*(f"acc{i} = tl.sum(acc{i}, 0)" for i in range(self.op.weights)))
        self.finish_parts()
