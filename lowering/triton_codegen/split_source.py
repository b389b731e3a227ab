"""Writes the kernel for up to 64 rows of x and few columns: the blocks of a grid share K.

Every block leaves its sums in memory; the last of those with the same columns to arrive adds them all up, always in the
same order, and goes on with the epilogue. `arrivals` counts the blocks, and the last leaves it at 0 again, so that one
tensor of zeros serves all kernels of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

from .swap_source import Swap

WORKSPACE = ("partial", "arrivals")


class Split(Swap):
    """`Swap` of one weight, with `splits` blocks in the place of each; accumulators [BLOCK_N, rows]."""

    @property
    def workspace(self) -> Sequence[str]:
        return WORKSPACE

    @property
    def block(self) -> str:
        return "tile"

    @property
    def early(self) -> bool:
        """Only the last block has a use for them, and they come together with the others' sums."""
        return False

    def indices(self) -> None:
        splits = self.plan.splits
        self.emit(f"tile, split = tl.program_id(0) // {splits}, tl.program_id(0) % {splits}")
        super().indices()

    def walk(self) -> None:
        part = self.plan.part_of(int(self.op.k))
        self.emit(f"for step in range(0, {part}, {self.step_k}):")
        self.level += 1
        self.emit(f"start = split * {part} + step")
        self.step()
        self.level -= 1

    def finish(self) -> None:
        splits, rows = self.plan.splits, self.plan.rows
        self.emit(f"at = tl.arange(0, BLOCK_N)[:, None] * {rows} + m[None, :]")
        places = [f"partial + (tile * {splits} + {s}) * (BLOCK_N * {rows}) + at" for s in ("split", *range(splits))]
        self.emit(f"tl.store({places[0]}, acc0)")
        self.emit("tl.debug_barrier()  # all of this block's sums are written before it counts as arrived")
        self.emit('arrived = tl.atomic_add(arrivals + tile, 1, sem="acq_rel")')
        self.emit(f"if arrived != {splits - 1}:", "    return", "tl.store(arrivals + tile, 0)")
        first, *others = (f'tl.load({place}, cache_modifier=".cg")' for place in places[1:])
        self.emit(f"acc0 = {first}", *(f"acc0 += {other}" for other in others))
        self.finish_parts()
