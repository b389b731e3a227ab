"""Kernels of kinds "swap" and "tile": `tl.dot` of the weights with all rows of x.

A swap kernel whose plan has a split walks along K with `split` slices of BLOCK_K at a time, one for each warp: every
tile then has a leading axis over slices, and the slices' sums meet after the loop.
"""

from __future__ import annotations

import torch

from .pointwise import literal
from .writer import Writer, masked, statistics_block

RIDERS = 8  # rows of the tile that holds g and b: the fewest that a matrix unit multiplies
NEAR = 128  # elements of a row whose mean stands in for the row's mean until that is known


class MatrixWriter(Writer):
    """Axes of a tile are named by suffixes: `n[:, None]`, or `n[None, :, None]` where there are slices."""

    @property
    def all_rows(self) -> bool:
        return self.known.m == self.plan.rows

    @property
    def slices(self) -> str:
        """The leading axis of every shape."""
        return f"{self.plan.split}, " if self.plan.split > 1 else ""

    def outer(self, name: str = "") -> str:
        """`name`, a vector over n or m, as the first axis of a tile."""
        return f"{name}[None, :, None]" if self.plan.split > 1 else f"{name}[:, None]"

    def inner(self, name: str = "") -> str:
        """`name`, over k, as the second axis of a tile."""
        return f"{name}[:, None, :]" if self.plan.split > 1 else f"{name}[None, :]"

    def transposed(self, name: str) -> str:
        return f"tl.permute({name}, (0, 2, 1))" if self.plan.split > 1 else f"tl.trans({name})"

    def indices(self) -> None:
        super().indices()
        self.emit(f"m = tl.arange(0, {self.plan.rows})")
        if not self.all_rows:
            self.emit(f"m_in = m < {'M' if self.known.m is None else self.known.m}")

    def x(self, m: str, k: str, *bounds: str) -> str:
        """A tile of x; `m` and `k` broadcast the rows and name the columns."""
        inside = [*([] if self.all_rows else [f"m_in{m}"]), *bounds]
        return f"tl.load(x + m{m} * x_stride + {k}{masked(inside)})"

    # ---- statistics -------------------------------------------------------------------------
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
            self.emit(f"total = tl.zeros(({rows}, {block // 8}), tl.float32)")
            self.near(block)
        self.emit(f"for start in tl.range(0, K, {block}, num_stages=3):")
        self.level += 1
        tile = self.x("[:, None]", "j[None, :]", *inside)
        self.emit(f"j = start + tl.arange(0, {block})", f"centred = {tile}.to(tl.float32)")
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

    def near(self, block: int) -> None:
        """`near`, an estimate of each row's mean: subtracting it first keeps a large mean from cancelling."""
        inside = [] if int(self.op.k) >= block else ["(j[None, :] < K)"]
        self.emit(f"j = tl.arange(0, {block})")
        head = self.x("[:, None]", "j[None, :]", *inside)
        self.emit(f"near = tl.sum({head}.to(tl.float32), 1) / {min(int(self.op.k), block)}")

    # ---- the walk along K -------------------------------------------------------------------
    def zeros(self, name: str, *shape: object) -> None:
        self.emit(f"{name} = tl.zeros(({self.slices}{', '.join(str(s) for s in shape)}), tl.float32)")

    def start(self) -> None:
        rows = self.plan.rows
        for i in range(self.products):
            self.zeros(f"acc{i}", *self.accumulator())
        if self.mode == "folded":
            self.start_squares()
        elif self.mode == "shifted":
            self.near(NEAR)
            self.zeros("squares", rows, rows)
            self.zeros("total", rows, RIDERS)
            for i in range(self.products):
                self.zeros(f"riders{i}", "BLOCK_N", RIDERS)
            self.emit(f"ones = tl.full(({self.slices}BLOCK_K, {RIDERS}), 1.0, x.dtype.element_ty)")
            self.emit(f"rider = tl.arange(0, {RIDERS})")

    def walk(self) -> str:
        return f"range(0, K, {self.plan.split} * BLOCK_K)" if self.plan.split > 1 else super().walk()

    def step(self) -> None:
        split = self.plan.split
        along = f"tl.arange(0, {split})[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]"
        self.emit(f"k = start + {along if split > 1 else 'tl.arange(0, BLOCK_K)'}")
        if not self.known.even_k:
            self.emit("k_in = k < K")
        k_in = [] if self.known.even_k else [self.inner("k_in")]
        n_in = [] if self.known.even_n else [self.outer("n_in")]
        self.weights(self.outer(), self.inner(), [*n_in, *k_in])
        self.emit(f"y = {self.x(self.outer(), self.inner('k'), *k_in)}")
        # the product of two numbers rounds to the same in their own type as through float32, without the conversions
        native = self.mode == "folded" and not (self.op.norm and self.op.norm.offset)
        self.norm_parameters("k_in", native)
        self.normalise()
        for i in range(self.products):
            self.product(i)

    def normalise(self) -> None:
        """`y` becomes what the weights are multiplied with."""
        norm = self.op.norm
        if norm is None:
            return
        if self.mode == "folded":
            self.square()
            if norm.has_weight:
                self.emit(f"y = (y * {self.inner('g')}).to(x.dtype.element_ty)")
        elif self.mode == "shifted":
            self.shifted()
        else:
            centred = f" - {self.outer('near')} - {self.outer('mean')}" if norm.kind == "layer" else ""
            self.emit(f"y = (y.to(tl.float32){centred}) * {self.outer('rstd')}")
            if norm.has_weight:
                bias = f" + {self.inner('b')}" if norm.has_bias else ""
                self.emit(f"y = y * {self.inner('g')}{bias}")
            self.emit("y = y.to(x.dtype.element_ty)")

    def shifted(self) -> None:
        """(x − near) · g for the weights; Σ (x − near), Σ (x − near)² and, per output feature, Σ g·W and Σ b·W beside."""
        norm = self.op.norm
        assert norm is not None
        difference = f"y.to(tl.float32) - {self.outer('near')}"
        inside = "" if self.known.even_k else self.inner("k_in")
        self.emit(f"y = {f'tl.where({inside}, {difference}, 0.0)' if inside else difference}")
        self.emit("centred = y.to(x.dtype.element_ty)")
        self.emit(f"squares = tl.dot(centred, {self.transposed('centred')}, squares{self.precision})")
        self.emit(f"total = tl.dot(centred, ones, total{self.precision})")
        first = self.outer("rider")
        g = self.inner("g") if norm.has_weight else f"tl.full(({self.slices}1, BLOCK_K), 1.0, tl.float32)"
        b = f"tl.where({first} == 1, {self.inner('b')}, 0.0)" if norm.has_bias else "0.0"
        self.emit(f"beside = tl.where({first} == 0, {g}, {b}).to(x.dtype.element_ty)")
        if norm.has_weight:
            self.emit(f"y = y * {self.inner('g')}")
        self.emit("y = y.to(x.dtype.element_ty)")
        for i in range(self.products):
            line = f"tl.dot(w{i}_tile, {self.transposed('beside')}, riders{i}{self.precision})"
            self.emit(f"riders{i} = {line}")

    @property
    def precision(self) -> str:
        single = self.op.dtype == torch.float32
        return f', input_precision="{self.known.input_precision}"' if single else ""

    # ---- after the loop ---------------------------------------------------------------------
    def meet(self, name: str, *shape: object) -> None:
        """Sums `name` over slices, halving: `tl.split` moves the data once, without the bank conflicts of a reduction
        across warps, and in an order that is always the same."""
        size, count = ", ".join(str(s) for s in shape), self.plan.split
        while count > 1:
            halves = f"tl.permute(tl.reshape({name}, (2, {count // 2}, {size})), (1, 2, 3, 0))"
            if count == 2:
                halves = f"tl.permute({name}, (1, 2, 0))"
            self.emit(f"low, high = tl.split({halves})", f"{name} = low + high")
            count //= 2

    def finish(self) -> None:
        rows = self.plan.rows
        for i in range(self.products):
            self.meet(f"acc{i}", *self.accumulator())
        if self.mode in ("folded", "shifted"):
            assert self.op.norm is not None
            self.variance()
            if self.mode == "shifted":
                self.meet("total", rows, RIDERS)
                self.emit(f"mean = tl.sum(total, 1) / ({RIDERS} * K)", "variance -= mean * mean")
            self.emit(f"rstd = tl.rsqrt(variance + {literal(self.op.norm.eps)})")
            for i in range(self.products):
                self.scale(i)
        m, n = (("m.to(tl.int64)" if self.known.wide_output else "m") + self.row_axis), f"n{self.axis}"
        bounds = [] if self.all_rows else ["m_in"]
        inside = [*(f"{b}{self.row_axis}" for b in bounds), *([] if self.known.even_n else [f"n_in{self.axis}"])]
        self.epilogue(f"{m} * {self.width} + {n}", "m", inside, bounds)

    def scale(self, i: int) -> None:
        if self.mode == "shifted":
            self.meet(f"riders{i}", "BLOCK_N", RIDERS)
            g, b = (f"tl.sum(tl.where(rider[None, :] == {r}, riders{i}, 0.0), 1)[:, None]" for r in (0, 1))
            self.emit(f"acc{i} = (acc{i} - {g} * mean[None, :]) * rstd[None, :]")
            if self.op.norm and self.op.norm.has_bias:
                self.emit(f"acc{i} = acc{i} + {b}")
        else:
            self.emit(f"acc{i} = acc{i} * rstd{self.row_axis}")

    # ---- pieces that differ -----------------------------------------------------------------
    def accumulator(self) -> tuple[object, object]:
        """The shape of a product, slices left out."""
        raise NotImplementedError

    def start_squares(self) -> None:
        raise NotImplementedError

    def square(self) -> None:
        """Adds the squares of `y` to `squares`."""
        raise NotImplementedError

    def variance(self) -> None:
        """`variance`, the mean of `squares`."""
        raise NotImplementedError

    def product(self, i: int) -> None:
        raise NotImplementedError


class SwapWriter(MatrixWriter):
    """Accumulators [BLOCK_N, rows]."""

    axis, row_axis = "[:, None]", "[None, :]"

    def accumulator(self) -> tuple[object, object]:
        return "BLOCK_N", self.plan.rows

    def start_squares(self) -> None:
        self.zeros("squares", self.plan.rows, self.plan.rows if self.plan.gram else "BLOCK_K // 8")

    def square(self) -> None:
        if self.plan.gram:
            self.emit(f"squares = tl.dot(y, {self.transposed('y')}, squares{self.precision})")
        else:
            shape = f"({self.slices}{self.plan.rows}, BLOCK_K // 8, 8)"
            square = f"tl.reshape(y.to(tl.float32) * y.to(tl.float32), {shape})"
            self.emit(f"squares += tl.sum({square}, {3 if self.plan.split > 1 else 2})")

    def variance(self) -> None:
        if self.plan.gram or self.mode == "shifted":
            column = "m[None, None, :]" if self.plan.split > 1 else "m[None, :]"
            self.emit(f"squares = tl.where({self.outer('m')} == {column}, squares, 0.0)")
        total = "tl.sum(tl.sum(squares, 2), 0)" if self.plan.split > 1 else "tl.sum(squares, 1)"
        self.emit(f"variance = {total} / K")

    def product(self, i: int) -> None:
        self.emit(f"acc{i} = tl.dot(w{i}_tile, {self.transposed('y')}, acc{i}{self.precision})")


class TileWriter(MatrixWriter):
    """Accumulators [rows, BLOCK_N]; x passes from shared memory into registers once, as the operand it will be.

    Squares are summed by the matrix unit too, multiplied with a tile of ones: any other reader of x would make Triton
    store it without a swizzle, and every read would meet bank conflicts. A square in bfloat16 is off by 2⁻⁹ of itself
    at most, their sum too, and rstd by half of that: a quarter of the last place of the output.
    """

    axis, row_axis = "[None, :]", "[:, None]"

    def accumulator(self) -> tuple[object, object]:
        return self.plan.rows, "BLOCK_N"

    def start_squares(self) -> None:
        self.zeros("squares", self.plan.rows, RIDERS)
        self.emit(f"ones = tl.full((BLOCK_K, {RIDERS}), 1.0, x.dtype.element_ty)")

    def square(self) -> None:
        self.emit(f"squares = tl.dot(y * y, ones, squares{self.precision})")

    def variance(self) -> None:
        self.emit(f"variance = tl.sum(squares, 1) / ({RIDERS} * K)")

    def product(self, i: int) -> None:
        self.emit(f"acc{i} = tl.dot(y, tl.trans(w{i}_tile), acc{i}{self.precision})")
