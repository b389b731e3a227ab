"""Writes the kernel for up to 64 rows of x and packed weights whose blocks share K, or for up to 16 walk it alone."""

from __future__ import annotations

from ...fused import MatmulFamily
from .packed_source import PackedSwap
from .plans import Plan
from .split_source import WORKSPACE, Split
from .writer import Facts


class PackedSplit(Split, PackedSwap):
    """`Split` on packed weights. x comes in one piece. For up to 16 rows low and high codes are two products, whose
    columns of x are taken from each other in registers; for more, that would be the larger work."""

    def __init__(self, op: MatmulFamily, plan: Plan, known: Facts, *, native: bool) -> None:
        super().__init__(op, plan, known, native=native)
        if plan.splits > 1:
            self.tensors = (*self.tensors[:-1], *WORKSPACE, "out")

    @property
    def apart(self) -> bool:
        return self.order == "halves" and self.plan.rows <= 16

    def x_parts(self) -> None:
        rows, blocks = self.plan.rows, "BLOCK_K // 32"
        self.emit("k = start + tl.arange(0, BLOCK_K)", f"y = {self.x('k')}")
        self.emit(f"y = tl.permute(tl.reshape(y, ({rows}, {blocks}, 2, 16)), (0, 1, 3, 2))")
        self.emit("y_low, y_high = tl.split(y)")
        self.emit(*(f"{y} = tl.reshape({y}, ({rows}, BLOCK_K // 2))" for y in ("y_low", "y_high")))

    def finish(self) -> None:
        if self.plan.splits > 1:
            super().finish()
        else:
            self.finish_parts()
