"""Writes the kernel for many rows of x: tiles [rows, BLOCK_N] of the output, all operands read through descriptors.

Every matrix comes by the copy engine (TMA), which fills what lies outside of it with zeros, so neither a last tile nor
a last step along K needs a mask. The products of one tile stand side by side and share the tile of x. A folded norm's
weight multiplies x in the registers from which the matrix unit takes its first operand.
"""

from __future__ import annotations

import torch

from .pointwise import literal, print_pointwise
from .writer import Writer, mask_argument


class Tile(Writer):
    """`tl.dot` of tiles of x [rows, BLOCK_K] and weights; accumulators [rows, BLOCK_N]."""

    axis = "[None, :]"
    constants = ("N", "K", "BLOCK_N", "BLOCK_K")

    @property
    def even_m(self) -> bool:
        return self.known.m is not None and self.known.m % self.plan.rows == 0

    def blocks(self) -> dict[str, tuple[int, ...]]:
        rows, block_n, block_k = self.plan.rows, self.plan.block_n, self.plan.block_k
        weight = (block_k, block_n) if self.op.weight_is_kn else (block_n, block_k)
        blocks: dict[str, tuple[int, ...]] = {"x": (rows, block_k)}
        if self.op.norm and self.op.norm.has_weight:
            blocks["norm_weight"] = (block_k,)
        return blocks | {f"w{i}": weight for i in range(self.op.weights)}

    def indices(self) -> None:
        rows, group = self.plan.rows, self.plan.group
        m = "M" if self.known.m is None else str(self.known.m)
        self.emit(
            f"tiles_m = tl.cdiv({m}, {rows})",
            "tiles_n = tl.cdiv(N, BLOCK_N)",
            f"tile = {self.block}",
            f"group = tile // ({group} * tiles_n) * {group}",
            f"size = min(tiles_m - group, {group})",
            f"within = tile % ({group} * tiles_n)",
            f"first_m = (group + within % size) * {rows}",
            "first_n = within // size * BLOCK_N",
            f"m = first_m + tl.arange(0, {rows})",
            "n = first_n + tl.arange(0, BLOCK_N)",
        )
        if not self.even_m:
            self.emit(f"m_in = m < {m}")
        if not self.known.even_n:
            self.emit("n_in = n < N")

    def start(self) -> None:
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.zeros(({self.plan.rows}, BLOCK_N), tl.float32)")
        if self.mode == "folded":
            self.emit(f"squares = tl.zeros(({self.plan.rows}, BLOCK_K // 8), tl.float32)")

    def step(self) -> None:
        norm = self.op.norm
        self.emit("y = x.load([first_m, start])")
        if self.mode == "folded":
            square = "y.to(tl.float32) * y.to(tl.float32)"
            self.emit(f"squares += tl.sum(tl.reshape({square}, ({self.plan.rows}, BLOCK_K // 8, 8)), 2)")
        if norm and norm.has_weight:
            self.emit("g = norm_weight.load([start])")
            # the product of two rounds to the same number in the operands' own dtype as through float32
            product = f"y.to(tl.float32) * (g.to(tl.float32) + {literal(norm.offset)})[None, :]"
            self.emit(f"y = ({product}).to(y.dtype)" if norm.offset else "y = y * g[None, :]")
        precision = f', input_precision="{self.known.input_precision}"' if self.op.dtype == torch.float32 else ""
        for i in range(self.op.weights):
            # features that lie apart are the rows of a view, which the descriptor is of
            feature = self.op.features[i] if self.op.features and self.op.feature_step == 1 else 0
            n = f"first_n + {feature}" if feature else "first_n"
            at, turned = (f"[start, {n}]", "") if self.op.weight_is_kn else (f"[{n}, start]", ".T")
            self.emit(f"acc{i} = tl.dot(y, w{i}.load({at}){turned}, acc{i}{precision})")

    def finish(self) -> None:
        if self.mode == "folded":
            assert self.op.norm is not None
            self.emit(f"rstd = tl.rsqrt(tl.sum(squares, 1) / K + {literal(self.op.norm.eps)})[:, None]")
            self.emit(*(f"acc{i} = acc{i} * rstd" for i in range(self.op.weights)))
        if not self.early:
            self.load_extras()
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "full":
                self.emit(f"e{j} = e{j}.to(tl.float32)")
        lines, result = print_pointwise(
            self.op.epilogue, lambda leaf: f"{'acc' if leaf.op == 'acc' else 'e'}{leaf.attr('index')}", "t"
        )
        self.emit(*lines, f"tl.store(out + {self.at}, {result}{mask_argument(self.inside, '')})")

    # ---- extras with rows -------------------------------------------------------------------
    def hoisted_extras(self) -> None:
        super().hoisted_extras()
        if self.early:
            self.load_extras()

    def load_extras(self) -> None:
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "full":
                self.emit(f"e{j} = tl.load(extra{j} + {self.at}{mask_argument(self.inside)})")
            elif extra.kind == "row":
                rows = mask_argument([] if self.even_m else ["m_in"])
                self.emit(f"e{j} = tl.load(extra{j} + m{rows}).to(tl.float32)[:, None]")

    @property
    def inside(self) -> list[str]:
        """The bounds of the result."""
        return [*([] if self.even_m else ["m_in[:, None]"]), *([] if self.known.even_n else ["n_in[None, :]"])]

    @property
    def at(self) -> str:
        return f"{'m.to(tl.int64)' if self.known.wide_output else 'm'}[:, None] * N + n[None, :]"
