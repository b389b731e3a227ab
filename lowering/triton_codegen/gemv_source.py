"""Writes the kernel for one to four rows of x: multiply-adds on the ordinary units."""

from __future__ import annotations

import functools

from .pointwise import literal, print_pointwise
from .writer import Writer, mask_argument, statistics_block


class Gemv(Writer):
    """Multiply-adds; names ending in _r belong to row r of x."""

    @property
    def rows(self) -> int:
        return self.plan.rows if self.known.m is None else self.known.m

    def bounds(self, r: int) -> list[str]:
        return [f"({r} < M)"] if self.known.m is None else []

    def x(self, r: int, x: str = "x", stride: str = "x_stride") -> str:
        inside = [*self.bounds(r), *([] if self.known.even_k else ["k_in"])]
        return f"tl.load({x} + {r} * {stride} + k{mask_argument(inside)})"

    def load_row_input(self, j: int) -> None:
        for r in range(self.rows):
            self.emit(f"i{j}_{r} = tl.load(x{j} + {r}{mask_argument(self.bounds(r))}).to(tl.float32)")

    def statistics(self) -> None:
        assert self.op.norm is not None
        block = statistics_block(self.op, self.plan)
        even = int(self.op.k) % block == 0
        count = min(int(self.op.k), block)
        self.emit(f"j = tl.arange(0, {block})")
        for r in range(self.rows):
            inside = [*self.bounds(r), *([] if even else ["(j < K)"])]
            head = f"tl.load(x + {r} * x_stride + j{mask_argument(inside)}).to(tl.float32)"
            self.emit(f"near_{r} = tl.sum({head}, 0) / {count}")
            self.emit(*(f"{name}_{r} = tl.zeros(({block},), tl.float32)" for name in ("total", "squares")))
        self.emit(f"for start in range(0, K, {block}):")
        self.level += 1
        self.emit(f"j = start + tl.arange(0, {block})")
        for r in range(self.rows):
            inside = [*self.bounds(r), *([] if even else ["(j < K)"])]
            shifted = f"tl.load(x + {r} * x_stride + j{mask_argument(inside)}).to(tl.float32) - near_{r}"
            self.emit(f"centred = {shifted if even else f'tl.where(j < K, {shifted}, 0.0)'}")
            self.emit(f"total_{r} += centred", f"squares_{r} += centred * centred")
        self.level -= 1
        for r in range(self.rows):
            self.emit(f"mean_{r} = tl.sum(total_{r}, 0) / K")
            self.emit(f"variance_{r} = tl.sum(squares_{r}, 0) / K - mean_{r} * mean_{r}")
            self.emit(f"rstd_{r} = tl.rsqrt(variance_{r} + {literal(self.op.norm.eps)})")

    def start(self) -> None:
        width = "BLOCK_K" if self.plan.lanes == 1 else f"BLOCK_K // {self.plan.lanes}"
        for i in range(self.op.weights):
            for r in range(self.rows):
                self.emit(f"acc{i}_{r} = tl.zeros((BLOCK_N, {width}), tl.float32)")
        if self.mode == "folded":
            for r in range(self.rows):
                self.emit(f"squares_{r} = tl.zeros((BLOCK_K,), tl.float32)")

    def step(self) -> None:
        norm = self.op.norm
        self.emit("k = start + tl.arange(0, BLOCK_K)")
        if not self.known.even_k:
            self.emit("k_in = k < K")
        self.load_weights()
        self.load_norm()
        for r in range(self.rows):
            if self.op.activation:
                self.activated(f"y_{r}", functools.partial(self.x, r), f"_{r}")
            else:
                self.emit(f"y_{r} = {self.x(r)}.to(tl.float32)")
            if self.mode == "folded":
                self.emit(f"squares_{r} += y_{r} * y_{r}")
            elif self.mode == "first":
                self.emit(f"y_{r} = (y_{r} - near_{r} - mean_{r}) * rstd_{r}")
            if norm and norm.has_weight:
                self.emit(f"y_{r} = y_{r} * g{' + b' if norm.has_bias else ''}")
        for i in range(self.op.weights):
            self.emit(f"w{i}_tile = w{i}_tile.to(tl.float32)")
            for r in range(self.rows):
                product = f"w{i}_tile * y_{r}[None, :]"
                if self.plan.lanes > 1:
                    shape = f"(BLOCK_N, BLOCK_K // {self.plan.lanes}, {self.plan.lanes})"
                    product = f"tl.sum(tl.reshape({product}, {shape}), 2)"
                self.emit(f"acc{i}_{r} += {product}")

    def finish(self) -> None:
        for r in range(self.rows):
            for i in range(self.op.weights):
                self.emit(f"acc{i}_{r} = tl.sum(acc{i}_{r}, 1)")
            if self.mode == "folded":
                assert self.op.norm is not None
                self.emit(f"rstd_{r} = tl.rsqrt(tl.sum(squares_{r}, 0) / K + {literal(self.op.norm.eps)})")
                self.emit(*(f"acc{i}_{r} = acc{i}_{r} * rstd_{r}" for i in range(self.op.weights)))
        self.finish_parts()

    def store(self, p: int) -> None:
        for r in range(self.rows):
            self.store_row(p, r)

    def store_row(self, p: int, r: int) -> None:
        part, width = self.parts[p], self.width(p)
        n = "n.to(tl.int64)" if self.known.wide_output else "n"
        inside = [*self.bounds(r), *([] if self.known.even_n else ["n_in"])]
        for j, extra in enumerate(part.extras):
            e = self.numbered(p, j)
            if extra.kind == "full":
                self.emit(f"e{e} = tl.load(extra{e} + {r} * {width} + {n}{mask_argument(inside)}).to(tl.float32)")
            elif extra.kind == "row":
                self.emit(f"e{e} = tl.load(extra{e} + {r}{mask_argument(self.bounds(r))}).to(tl.float32)")
        lines, result = print_pointwise(
            part.epilogue,
            lambda v: f"acc{v.attr('index')}_{r}" if v.op == "acc" else f"e{self.numbered(p, v.attr('index'))}",
            f"t{r}_",
        )
        self.emit(*lines, f"tl.store({self.out(p)} + {r} * {width} + {n}, {result}{mask_argument(inside, '')})")
