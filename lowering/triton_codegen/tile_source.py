"""Writes the kernel for many rows of x: tiles [rows, BLOCK_N] of the output, all operands read through descriptors.

Every matrix comes by the copy engine (TMA), which fills what lies outside of it with zeros, so neither a last tile nor
a last step along K needs a mask. The products of one tile stand side by side and share the tile of x. A folded norm's
weight multiplies x in the registers from which the matrix unit takes its first operand. No descriptor can be chosen
while a kernel runs, so where there are several results, each has a loop of its own.
"""

from __future__ import annotations

import torch

from ...dependent_launch import late
from .pointwise import literal, print_pointwise
from .writer import Writer, mask_argument


class Tile(Writer):
    """`tl.dot` of tiles of x [rows, BLOCK_K] and weights; accumulators [rows, BLOCK_N]."""

    axis = "[None, :]"
    constants = ("N", "K", "BLOCK_N", "BLOCK_K")
    reading = 0  # the number of the weight that the loop which is being written reads first

    @property
    def even_m(self) -> bool:
        return self.known.m is not None and self.known.m % self.plan.rows == 0

    def blocks(self) -> dict[str, tuple[int, ...]]:
        rows, block_n, block_k = self.plan.rows, self.plan.block_n, self.plan.block_k
        weight = (block_k, block_n) if self.op.weight_is_kn else (block_n, block_k)
        blocks: dict[str, tuple[int, ...]] = {"x": (rows, block_k)}
        if self.op.norm and self.op.norm.has_weight:
            blocks["norm_weight"] = (block_k,)
        return blocks | {f"w{i}": weight for i in range(len(self.parts) - 1 + self.op.weights)}

    def indices(self) -> None:
        rows, group = self.plan.rows, self.plan.group
        m = "M" if self.known.m is None else str(self.known.m)
        columns = " + ".join(f"tl.cdiv({self.width(p)}, BLOCK_N)" for p in range(len(self.parts)))
        self.emit(
            f"tiles_m = tl.cdiv({m}, {rows})",
            f"tiles_n = {columns}",
            f"tile = {self.block}",
            f"group = tile // ({group} * tiles_n) * {group}",
            f"size = min(tiles_m - group, {group})",
            f"within = tile % ({group} * tiles_n)",
            f"first_m = (group + within % size) * {rows}",
            f"m = first_m + tl.arange(0, {rows})",
        )
        if self.several:
            self.emit("block = within // size")
            self.part_of_block()
            self.emit("first_n = (block - first) * BLOCK_N")
        else:
            self.emit("first_n = within // size * BLOCK_N")
        self.emit("n = first_n + tl.arange(0, BLOCK_N)")
        if not self.even_m:
            self.emit(f"m_in = m < {m}")
        if not self.known.even_n:
            self.emit(f"n_in = n < {'width' if self.several else 'N'}")

    def start(self) -> None:
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.zeros(({self.plan.rows}, BLOCK_N), tl.float32)")
        if self.mode == "folded":
            self.emit(f"squares = tl.zeros(({self.plan.rows}, BLOCK_K // 8), tl.float32)")

    def walk(self) -> None:
        if not self.several:
            super().walk()
            return
        for p in range(len(self.parts)):
            self.reading = p
            self.emit(f"if part == {p}:")
            self.level += 1
            super().walk()
            self.level -= 1

    def step(self) -> None:
        norm = self.op.norm
        weights = [f"w{self.reading + i}.load({self.place(i)})" for i in range(self.op.weights)]
        if self.known.weights_first:
            self.emit(*(f"tile{i} = {weight}" for i, weight in enumerate(weights)))
            weights = [f"tile{i}" for i in range(self.op.weights)]
            self.emit(f"late = {late('start')}")
        self.emit(f"y = x.load([{'late + ' if self.known.weights_first else ''}first_m, start])")
        if self.mode == "folded":
            square = "y.to(tl.float32) * y.to(tl.float32)"
            self.emit(f"squares += tl.sum(tl.reshape({square}, ({self.plan.rows}, BLOCK_K // 8, 8)), 2)")
        if norm and norm.has_weight:
            self.emit("g = norm_weight.load([start])")
            # the product of two rounds to the same number in the operands' own dtype as through float32
            product = f"y.to(tl.float32) * (g.to(tl.float32) + {literal(norm.offset)})[None, :]"
            self.emit(f"y = ({product}).to(y.dtype)" if norm.offset else "y = y * g[None, :]")
        precision = f', input_precision="{self.known.input_precision}"' if self.op.dtype == torch.float32 else ""
        turned = "" if self.op.weight_is_kn else ".T"
        for i, weight in enumerate(weights):
            self.emit(f"acc{i} = tl.dot(y, {weight}{turned}, acc{i}{precision})")

    def place(self, i: int) -> str:
        """Where the tile of the i-th weight begins."""
        # features that lie apart are the rows of a view, which the descriptor is of
        feature = self.op.features[i] if self.op.features and self.op.feature_step == 1 else 0
        n = f"first_n + {feature}" if feature else "first_n"
        return f"[start, {n}]" if self.op.weight_is_kn else f"[{n}, start]"

    def finish(self) -> None:
        if self.mode == "folded":
            assert self.op.norm is not None
            self.emit(f"rstd = tl.rsqrt(tl.sum(squares, 1) / K + {literal(self.op.norm.eps)})[:, None]")
            self.emit(*(f"acc{i} = acc{i} * rstd" for i in range(self.op.weights)))
        self.finish_parts()

    def store(self, p: int) -> None:
        part = self.parts[p]
        if not self.early:
            self.load_extras(p)
        for j, extra in enumerate(part.extras):
            if extra.kind == "full":
                self.emit(f"e{self.numbered(p, j)} = e{self.numbered(p, j)}.to(tl.float32)")
        lines, result = print_pointwise(
            part.epilogue,
            lambda v: f"acc{v.attr('index')}" if v.op == "acc" else f"e{self.numbered(p, v.attr('index'))}",
            "t",
        )
        self.emit(*lines, f"tl.store({self.out(p)} + {self.at(p)}, {result}{mask_argument(self.inside, '')})")

    # ---- extras with rows -------------------------------------------------------------------
    def hoisted_extras(self) -> None:
        super().hoisted_extras()
        if self.early:
            self.load_extras(0)

    def load_extras(self, p: int) -> None:
        """The extras of part p that have rows."""
        for j, extra in enumerate(self.parts[p].extras):
            e = self.numbered(p, j)
            if extra.kind == "full":
                self.emit(f"e{e} = tl.load(extra{e} + {self.at(p)}{mask_argument(self.inside)})")
            elif extra.kind == "row":
                rows = mask_argument([] if self.even_m else ["m_in"])
                self.emit(f"e{e} = tl.load(extra{e} + m{rows}).to(tl.float32)[:, None]")

    @property
    def inside(self) -> list[str]:
        """The bounds of a result."""
        return [*([] if self.even_m else ["m_in[:, None]"]), *([] if self.known.even_n else ["n_in[None, :]"])]

    def at(self, p: int) -> str:
        """Offsets into the result of part p."""
        m = "m.to(tl.int64)" if self.known.wide_output else "m"
        return f"{m}[:, None] * {self.width(p)} + n[None, :]"
