"""Writes the kernel for many rows of x whose blocks share the tiles of the last round (`Plan.shares`).

A helper leaves its sums of the end of K in memory before it does anything else, and raises a flag; the owner adds them
after all else, when they have long been there, and lowers the flag, so that one tensor of zeros serves all kernels of a
graph. Helpers come first in the grid: one that an owner waits for is running, or has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

from .plans import Shares
from .split_source import WORKSPACE
from .tile_source import Tile


class Shared(Tile):
    """`Tile` in a loop over the pieces of a block."""

    @property
    def workspace(self) -> Sequence[str]:
        return WORKSPACE

    @property
    def shares(self) -> Shares:
        return self.plan.shares(int(self.op.m), int(self.op.n), int(self.op.k))

    @property
    def block(self) -> str:
        blocks = self.plan.blocks
        return f"tl.where(piece | own, {self.shares.rounds * blocks} + left, (turn - pieces) * {blocks} + block)"

    @property
    def early(self) -> bool:
        """Pieces have no use for them."""
        return False

    def indices(self) -> None:
        shares = self.shares
        rounds, left, helpers = shares.rounds, shares.left, shares.helpers
        self.emit(
            "block = tl.program_id(0)",
            f"helper = block < {helpers}",
            f"pieces = tl.where(helper, tl.cdiv({left} - block, {helpers}), 0)",
            f"for turn in range({rounds} + tl.where(helper, pieces, 1)):",
        )
        self.level += 1
        self.emit(
            "piece = turn < pieces",
            f"own = (not helper) & (turn == {rounds})",
            f"left = tl.where(piece, block + turn * {helpers}, block - {helpers})",
            f"begin = tl.where(piece, {shares.kept} * BLOCK_K, 0)",
            f"end = tl.where(own, {shares.kept} * BLOCK_K, K)",
        )
        super().indices()

    def walk(self) -> None:
        self.emit("for start in range(begin, end, BLOCK_K):")
        self.level += 1
        self.step()
        self.level -= 1

    def finish(self) -> None:
        plan, weights = self.plan, range(self.op.weights)
        # each thread of the matrix unit holds two neighbours of a row, and of the eighth row below; in this order its
        # sums are neighbours by fours, so that they go through no shared memory
        apart = (plan.rows // (16 * plan.num_warps), plan.num_warps, 2, 8, plan.block_n // 8, 4, 2)
        order = (0, 4, 1, 3, 5, 2, 6)
        together, back = tuple(apart[i] for i in order), tuple(order.index(i) for i in range(len(order)))
        size = plan.rows * plan.block_n
        self.emit(f"place = partial + left * {len(weights) * size} + tl.arange(0, {size})", "if piece:")
        self.level += 1
        for i in weights:
            sums = f"tl.reshape(tl.permute(tl.reshape(acc{i}, {apart}), {order}), ({size},))"
            self.emit(f"tl.store(place + {i * size}, {sums})")
        self.emit("tl.debug_barrier()  # all of this block's sums are written before the flag is raised")
        self.emit('tl.atomic_xchg(arrivals + left, 1, sem="release")')
        self.level -= 1
        self.emit("else:")
        self.level += 1
        self.emit("if own:")
        self.level += 1
        self.emit('while tl.atomic_cas(arrivals + left, 1, 0, sem="acquire") != 1:', "    pass")
        for i in weights:
            sums = f'tl.load(place + {i * size}, cache_modifier=".cg")'
            sums = f"tl.permute(tl.reshape({sums}, {together}), {back})"
            self.emit(f"acc{i} += tl.reshape({sums}, ({plan.rows}, BLOCK_N))")
        self.level -= 1
        super().finish()
        self.level -= 2
