"""Writes the kernel for up to 64 rows of x: `tl.dot` with the weights as its first operand."""

from __future__ import annotations

import torch

from ...dependent_launch import late
from .pointwise import TYPES, literal, print_pointwise
from .writer import THIN, Writer, mask_argument, statistics_block

FARTHEST_MEAN = 2.0  # mean² over variance: beyond, it could show that x is rounded before the mean is taken off


class Swap(Writer):
    """`tl.dot` of a weight tile [BLOCK_N, BLOCK_K] with the rows of x, transposed; accumulators [BLOCK_N, rows]."""

    axis = "[:, None]"

    @property
    def all_rows(self) -> bool:
        return self.known.m is not None and self.known.m % self.plan.rows == 0

    def native(self) -> bool:
        return self.mode == "folded" and not (self.op.norm and self.op.norm.offset)

    @property
    def copies(self) -> int:
        """An asynchronous copy moves at least 4 bytes per thread. A vector too short for that would be loaded in the
        middle of a step, with nothing to hide its latency, so that many copies of it are loaded side by side."""
        per_thread = max(1, 4 // self.op.dtype.itemsize)
        return min(self.plan.rows, max(1, per_thread * 32 * self.plan.num_warps // self.plan.block_k))

    def normed(self, bias: bool) -> str:
        """y · g, or y · g + b, for every row of y."""
        rows = self.plan.rows
        if self.copies == 1:
            return "y * g[None, :]" + (" + b[None, :]" if bias else "")
        product = f"tl.reshape(y, ({self.copies}, {rows // self.copies}, BLOCK_K)) * g[:, None, :]"
        return f"tl.reshape({product}{' + b[:, None, :]' if bias else ''}, ({rows}, BLOCK_K))"

    def indices(self) -> None:
        super().indices()
        self.emit(f"m = tl.arange(0, {self.plan.rows})")
        self.rows_inside()

    def rows_inside(self) -> None:
        if not self.all_rows:
            self.emit(f"m_in = m < {'M' if self.known.m is None else self.known.m}")

    def x(self, k: str, *bounds: str, tensor: str = "x", stride: str = "x_stride") -> str:
        inside = [*([] if self.all_rows else [f"m_in{self.outer}"]), *bounds]
        tensor += " + late" if self.known.weights_first else ""
        return f"tl.load({tensor} + m{self.outer} * {stride} + {k}{self.inner}{mask_argument(inside)})"

    @property
    def along_k(self) -> str:
        return self.inner

    def load_row_input(self, j: int) -> None:
        rows = mask_argument([] if self.all_rows else ["m_in"])
        self.emit(f"i{j} = tl.load(x{j} + m{rows}).to(tl.float32){self.outer}")

    def hoisted_extras(self) -> None:
        super().hoisted_extras()
        if self.early:
            self.load_extras(0)

    def load_extras(self, p: int) -> None:
        """The extras of part p that have rows."""
        rows = mask_argument([] if self.all_rows else ["m_in"])
        for j, extra in enumerate(self.parts[p].extras):
            e = self.numbered(p, j)
            if extra.kind == "full":
                self.emit(f"e{e} = tl.load(extra{e} + {self.at(p)}{mask_argument(self.inside)})")
            elif extra.kind == "row":
                self.emit(f"e{e} = tl.load(extra{e} + m{rows}).to(tl.float32)[None, :]")

    @property
    def inside(self) -> list[str]:
        """The bounds of a result."""
        return [*([] if self.all_rows else ["m_in[None, :]"]), *([] if self.known.even_n else ["n_in[:, None]"])]

    def at(self, p: int) -> str:
        """Offsets into the result of part p."""
        m = "m.to(tl.int64)" if self.known.wide_output else "m"
        return f"{m}[None, :] * {self.width(p)} + n[:, None]"

    def load_y(self) -> None:
        """A tile of x, or of what is computed from the inputs, as y."""
        bounds = [] if self.known.even_k else [f"k_in{self.inner}"]
        if self.op.activation:
            self.activated("y", lambda tensor, stride: self.x("k", *bounds, tensor=tensor, stride=stride))
            self.emit(f"y = y.to({TYPES[self.op.dtype]})")
        else:
            self.emit(f"y = {self.x('k', *bounds)}")

    def load_operands(self) -> None:
        if self.known.weights_first:
            self.load_weights()
            self.emit(f"late = {late('start')}")
            self.load_y()
        else:
            # x first: its way to the matrix unit is the longer one
            self.load_y()
            self.load_norm()
            self.load_weights()

    def statistics(self) -> None:
        norm, rows = self.op.norm, self.plan.rows
        assert norm is not None
        layer = norm.kind == "layer"
        block = statistics_block(self.op, self.plan)
        even = int(self.op.k) % block == 0
        inside = [] if even else ["(j[None, :] < K)"]
        # partial sums per eight neighbours stay inside a thread; they meet once, after the loop
        partial = f"({rows}, {block // 8}, 8)"
        self.emit(f"squares = tl.zeros(({rows}, {block // 8}), tl.float32)")
        if layer:
            self.emit(f"total = tl.zeros(({rows}, {block // 8}), tl.float32)", f"j = tl.arange(0, {block})")
            self.emit(f"near = tl.sum({self.x('j', *inside)}.to(tl.float32), 1) / {min(int(self.op.k), block)}")
        self.emit(f"for start in tl.range(0, K, {block}, num_stages=3):")
        self.level += 1
        self.emit(f"j = start + tl.arange(0, {block})", f"centred = {self.x('j', *inside)}.to(tl.float32)")
        if layer:
            shifted = "centred - near[:, None]"
            self.emit(f"centred = {shifted if even else f'tl.where(j[None, :] < K, {shifted}, 0.0)'}")
            self.emit(f"total += tl.sum(tl.reshape(centred, {partial}), 2)")
        self.emit(f"squares += tl.sum(tl.reshape(centred * centred, {partial}), 2)")
        self.level -= 1
        self.emit("variance = tl.sum(squares, 1) / K")
        if layer:
            self.emit("mean = tl.sum(total, 1) / K", "variance -= mean * mean")
        self.emit(f"rstd = tl.rsqrt(variance + {literal(norm.eps)})")

    def start(self) -> None:
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.zeros((BLOCK_N, {self.plan.rows}), tl.float32)")
        if self.corrects:
            self.start_correction()
        elif self.mode == "folded":
            shape = f"{self.plan.rows}, {self.plan.rows if self.plan.gram else 'BLOCK_K // 8'}"
            self.emit(f"squares = tl.zeros(({shape}), tl.float32)")

    def step(self) -> None:
        norm = self.op.norm
        self.emit("k = start + tl.arange(0, BLOCK_K)")
        if not self.known.even_k:
            self.emit("k_in = k < K")
        self.load_operands()
        weight = norm is not None and norm.has_weight
        if self.mode == "folded":
            if self.corrects:
                self.gather_correction()
            elif self.plan.gram:
                self.emit("squares = tl.dot(y, tl.trans(y), squares)")
            else:
                square = "y.to(tl.float32) * y.to(tl.float32)"
                self.emit(f"squares += tl.sum(tl.reshape({square}, ({self.plan.rows}, BLOCK_K // 8, 8)), 2)")
            if weight:
                self.emit(f"y = ({self.normed(bias=False)}).to(w0_tile.dtype)")
        elif self.mode == "first":
            centred = " - near[:, None] - mean[:, None]" if norm and norm.kind == "layer" else ""
            self.emit(f"y = (y.to(tl.float32){centred}) * rstd[:, None]")
            if weight:
                self.emit(f"y = {self.normed(bias=norm is not None and norm.has_bias)}")
            self.emit("y = y.to(w0_tile.dtype)")
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.dot(w{i}_tile, tl.trans(y), acc{i}{self.precision})")
            if self.corrects:
                self.emit(f"along{i} = tl.dot(w{i}_tile, tl.trans(gb), along{i}{self.precision})")

    def finish(self) -> None:
        if self.corrects:
            self.correct()
        elif self.mode == "folded":
            assert self.op.norm is not None
            if self.plan.gram:
                self.emit("squares = tl.where(m[:, None] == m[None, :], squares, 0.0)")
            self.emit(f"rstd = tl.rsqrt(tl.sum(squares, 1) / K + {literal(self.op.norm.eps)})")
            self.emit(*(f"acc{i} = acc{i} * rstd[None, :]" for i in range(self.op.weights)))
        self.finish_parts()

    # ---- a LayerNorm's mean -----------------------------------------------------------------
    @property
    def corrects(self) -> bool:
        """Whether the products are put right for the mean afterwards."""
        return self.mode == "folded" and self.op.norm is not None and self.op.norm.kind == "layer"

    @property
    def precision(self) -> str:
        return f', input_precision="{self.known.input_precision}"' if self.op.dtype == torch.float32 else ""

    def start_correction(self) -> None:
        """`gram` and `sums` grow to Σ x² and Σ x of the rows, `along` to Σ g·w and Σ b·w of the columns."""
        norm, rows = self.op.norm, self.plan.rows
        assert norm is not None
        self.emit(f"gram = tl.zeros(({rows}, {rows}), tl.float32)")
        self.emit(f"sums = tl.zeros(({rows}, {THIN}), tl.float32)")
        self.emit(*(f"along{i} = tl.zeros((BLOCK_N, {THIN}), tl.float32)" for i in range(self.op.weights)))
        self.emit(f"ones = tl.full((BLOCK_K, {THIN}), 1.0, {TYPES[self.op.dtype]})", f"v = tl.arange(0, {THIN})")
        if norm.has_bias:
            self.emit("vectors = tl.where(v[:, None] == 0, norm_weight, norm_bias)")
        elif norm.has_weight:
            self.emit(f"vectors = norm_weight + tl.zeros(({THIN}, 1), tl.int32)")

    def gather_correction(self) -> None:
        norm = self.op.norm
        assert norm is not None
        self.emit(f"gram = tl.dot(y, tl.trans(y), gram{self.precision})")
        self.emit(f"sums = tl.dot(y, ones, sums{self.precision})")
        if norm.has_weight:
            inside = mask_argument([] if self.known.even_k else ["k_in[None, :]"])
            self.emit(f"gb = tl.load(vectors + k[None, :]{inside})")
        else:
            self.emit("gb = tl.trans(ones)")

    def column(self, sums: str, number: int) -> str:
        """The sums of x (0), or those of g·w (0) and of b·w (1)."""
        return f"tl.sum(tl.where(v[None, :] == {number}, {sums}, 0.0), 1)"

    def correct(self) -> None:
        """Σ (x − mean)·g·w + Σ b·w, from x that no mean was taken off. Where a mean is large beside the deviation, that
        is a small difference of large rounded numbers: then all rows are computed anew, their mean taken off first."""
        norm, mode = self.op.norm, self.mode
        assert norm is not None
        self.emit(f"mean = {self.column('sums', 0)} / K")
        # a difference of equal numbers may come out below 0; one that is none has to remain so
        self.emit("variance = tl.sum(tl.where(m[:, None] == m[None, :], gram, 0.0), 1) / K - mean * mean")
        self.emit("variance = tl.where(variance < 0.0, 0.0, variance)")
        self.emit(f"rstd = tl.rsqrt(variance + {literal(norm.eps)})")
        self.emit(f"if tl.max(mean * mean * rstd * rstd, 0) > {literal(FARTHEST_MEAN)}:")
        self.level += 1
        self.mode = "first"
        self.statistics()
        self.start()
        self.walk()
        self.mode = mode
        self.level -= 1
        self.emit("else:")
        self.level += 1
        for i in range(self.op.weights):
            self.emit(f"of_g = {self.column(f'along{i}', 0)}")
            shift = f" + {self.column(f'along{i}', 1)}[:, None]" if norm.has_bias else ""
            self.emit(f"acc{i} = (acc{i} - mean[None, :] * of_g[:, None]) * rstd[None, :]{shift}")
        self.level -= 1

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
