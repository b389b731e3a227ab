"""Writes the Triton source of one kernel of the matmul family.

out = epilogue(norm(x) @ w_iᵀ), the norm being part of the kernel. With g the norm's weight and b its bias it is either

folded (rms): (Σ_k x_k g_k W_nk) · rstd; Σ x² grows beside the products, so x is read once;
first (layer): mean and rstd of each row come from a pass over x before the weights are touched, and
               y = (x − mean) · rstd · g + b meets the weights. x is shifted throughout by the mean c of the row's first
               elements, so that no large mean has to cancel: variance = Σ (x − c)² / K − (Σ (x − c) / K)².

In float16 a matrix unit would be fed x·g, which can overflow where eager's normalised x does not: RMSNorm goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...fused import MatmulFamily
from .plans import Plan
from .pointwise import literal, print_pointwise

INT32_ELEMENTS = 2**31
INDENT = "    "
STATISTICS_ELEMENTS = 64  # of x per thread and step of the pass that computes mean and rstd


@dataclass(frozen=True)
class KernelSource:
    """A Triton module's text, the kernel's name in it, and the names of its tensor arguments (the output last).

    Further arguments are `M` where `runtime_m`, then the constexprs x_stride, w_stride, N, K, BLOCK_N, BLOCK_K.
    """

    text: str
    name: str
    tensors: tuple[str, ...]
    runtime_m: bool


@dataclass(frozen=True)
class Facts:
    """What the text depends on besides the fused op and the plan's kind, rows and lanes."""

    m: int | None  # None: M is a runtime argument, at most `rows`
    even_n: bool
    even_k: bool
    wide_weight: bool  # offsets into a weight pass 2³¹
    wide_output: bool
    input_precision: str  # of a float32 dot


def facts(op: MatmulFamily, plan: Plan, input_precision: str = "ieee") -> Facts:
    m = op.m if isinstance(op.m, int) else None
    k, n = int(op.k), int(op.n)
    return Facts(
        m=m,
        even_n=n % plan.block_n == 0,
        even_k=k % plan.block_k == 0,
        wide_weight=(n + max(op.features, default=0)) * k >= INT32_ELEMENTS,
        wide_output=(m or plan.rows) * n >= INT32_ELEMENTS,
        input_precision=input_precision,
    )


def norm_mode(op: MatmulFamily, plan: Plan) -> Literal["none", "folded", "first"]:
    if op.norm is None:
        return "none"
    overflows = plan.kind == "swap" and op.dtype == torch.float16
    return "first" if op.norm.kind == "layer" or overflows else "folded"


def statistics_block(op: MatmulFamily, plan: Plan) -> int:
    """Elements of a row per step of the pass that computes mean and rstd."""
    rows = plan.rows if plan.kind == "swap" else 1
    return min(1 << (int(op.k) - 1).bit_length(), max(16, STATISTICS_ELEMENTS * 32 * plan.num_warps // rows))


def write(op: MatmulFamily, plan: Plan, known: Facts) -> KernelSource:
    """The kernel that computes `op` by `plan`."""
    return (_Gemv if plan.kind == "gemv" else _Swap)(op, plan, known).write()


class _Writer:
    """What the two kinds share: signature, indices, weights, extras."""

    axis = ""  # suffix that makes a vector over n broadcast against the accumulator

    def __init__(self, op: MatmulFamily, plan: Plan, known: Facts) -> None:
        self.op, self.plan, self.known = op, plan, known
        self.lines: list[str] = []
        self.level = 1
        self.mode = norm_mode(op, plan)
        norm = op.norm
        self.tensors = (
            "x",
            *(["norm_weight"] if norm and norm.has_weight else []),
            *(["norm_bias"] if norm and norm.has_bias else []),
            *(f"w{i}" for i in range(op.weights)),
            *(f"extra{j}" for j in range(len(op.extras))),
            "out",
        )

    def emit(self, *lines: str) -> None:
        self.lines.extend(INDENT * self.level + line for line in lines)

    def write(self) -> KernelSource:
        runtime_m = self.known.m is None
        norm = [f"{self.op.norm.kind}_norm"] if self.op.norm else []
        name = "_".join([*norm, f"linear{self.op.weights}", self.plan.kind])
        signature = [*self.tensors, *(["M"] if runtime_m else [])]
        signature += [f"{c}: tl.constexpr" for c in ("x_stride", "w_stride", "N", "K", "BLOCK_N", "BLOCK_K")]
        self.indices()
        self.hoisted_extras()
        if self.mode == "first":
            self.statistics()
        self.start()
        # without a dot, Triton pipelines a loop only where asked to
        asked = self.plan.kind == "gemv" and self.plan.num_stages > 1
        walk = f"tl.range(0, K, BLOCK_K, num_stages={self.plan.num_stages})" if asked else "range(0, K, BLOCK_K)"
        self.emit(f"for start in {walk}:")
        self.level += 1
        self.step()
        self.level -= 1
        self.finish()
        head = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {name}("]
        head += [f"{INDENT}{argument}," for argument in signature] + ["):"]
        return KernelSource("\n".join([*head, *self.lines]) + "\n", name, self.tensors, runtime_m)

    # ---- pieces that differ -----------------------------------------------------------------
    def statistics(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    # ---- pieces in common -------------------------------------------------------------------
    def indices(self) -> None:
        self.emit("n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)")
        if not self.known.even_n:
            self.emit("n_in = n < N")

    def load_weights(self) -> None:
        """Weights are read once and never again, so they leave the caches first."""
        wide = ".to(tl.int64)" if self.known.wide_weight else ""
        inside = [*([] if self.known.even_n else ["n_in[:, None]"]), *([] if self.known.even_k else ["k_in[None, :]"])]
        for i in range(self.op.weights):
            feature = self.op.features[i] if self.op.features else 0
            n = f"(n + {feature})" if feature else "n"
            offset = f"{n}{wide}[:, None] * w_stride + k[None, :]"
            if self.op.weight_is_kn:
                offset = f"k{wide}[None, :] * w_stride + {n}[:, None]"
            self.emit(f'w{i}_tile = tl.load(w{i} + {offset}{_mask(inside)}, eviction_policy="evict_first")')

    def load_norm(self) -> None:
        """g and b along K as `g` and `b`. Past K they may be anything: there the weights are 0."""
        norm = self.op.norm
        mask = _mask([] if self.known.even_k else ["k_in"])
        if norm and norm.has_weight:
            self.emit(f"g = tl.load(norm_weight + k{mask}){'' if self.native() else '.to(tl.float32)'}")
            if norm.offset:
                self.emit(f"g = g + {literal(norm.offset)}")
        if norm and norm.has_bias:
            self.emit(f"b = tl.load(norm_bias + k{mask}).to(tl.float32)")

    def native(self) -> bool:
        """Whether x · g is computed in the operands' own dtype: the product of two rounds to the same number there as
        through float32, and saves the conversions."""
        return False

    def hoisted_extras(self) -> None:
        """Column and scalar extras, loaded before the loop so that their latency hides under it."""
        mask = _mask([] if self.known.even_n else ["n_in"])
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "col":
                first = f"{extra.first} + " if extra.first else ""
                self.emit(f"e{j} = tl.load(extra{j} + {first}n{mask}).to(tl.float32){self.axis}")
            elif extra.kind == "scalar":
                self.emit(f"e{j} = tl.load(extra{j}).to(tl.float32)")


def _mask(bounds: list[str], other: str = ", other=0.0") -> str:
    return f", mask={' & '.join(bounds)}{other}" if bounds else ""


class _Gemv(_Writer):
    """Multiply-adds; names ending in _r belong to row r of x."""

    @property
    def rows(self) -> int:
        return self.plan.rows if self.known.m is None else self.known.m

    def bounds(self, r: int) -> list[str]:
        return [f"({r} < M)"] if self.known.m is None else []

    def x(self, r: int) -> str:
        inside = [*self.bounds(r), *([] if self.known.even_k else ["k_in"])]
        return f"tl.load(x + {r} * x_stride + k{_mask(inside)}).to(tl.float32)"

    def statistics(self) -> None:
        assert self.op.norm is not None
        block = statistics_block(self.op, self.plan)
        even = int(self.op.k) % block == 0
        count = min(int(self.op.k), block)
        self.emit(f"j = tl.arange(0, {block})")
        for r in range(self.rows):
            inside = [*self.bounds(r), *([] if even else ["(j < K)"])]
            head = f"tl.load(x + {r} * x_stride + j{_mask(inside)}).to(tl.float32)"
            self.emit(f"near_{r} = tl.sum({head}, 0) / {count}")
            self.emit(*(f"{name}_{r} = tl.zeros(({block},), tl.float32)" for name in ("total", "squares")))
        self.emit(f"for start in range(0, K, {block}):")
        self.level += 1
        self.emit(f"j = start + tl.arange(0, {block})")
        for r in range(self.rows):
            inside = [*self.bounds(r), *([] if even else ["(j < K)"])]
            shifted = f"tl.load(x + {r} * x_stride + j{_mask(inside)}).to(tl.float32) - near_{r}"
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
            self.emit(f"y_{r} = {self.x(r)}")
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
            self.store(r)

    def store(self, r: int) -> None:
        n = "n.to(tl.int64)" if self.known.wide_output else "n"
        inside = [*self.bounds(r), *([] if self.known.even_n else ["n_in"])]
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "full":
                self.emit(f"e{j} = tl.load(extra{j} + {r} * N + {n}{_mask(inside)}).to(tl.float32)")
            elif extra.kind == "row":
                self.emit(f"e{j} = tl.load(extra{j} + {r}{_mask(self.bounds(r))}).to(tl.float32)")
        lines, result = print_pointwise(
            self.op.epilogue,
            lambda leaf: f"acc{leaf.attr('index')}_{r}" if leaf.op == "acc" else f"e{leaf.attr('index')}",
            f"t{r}_",
        )
        self.emit(*lines, f"tl.store(out + {r} * N + {n}, {result}{_mask(inside, '')})")


class _Swap(_Writer):
    """`tl.dot` of a weight tile [BLOCK_N, BLOCK_K] with the rows of x, transposed; accumulators [BLOCK_N, rows]."""

    axis = "[:, None]"

    @property
    def all_rows(self) -> bool:
        return self.known.m == self.plan.rows

    def native(self) -> bool:
        return self.mode == "folded" and not (self.op.norm and self.op.norm.offset)

    def indices(self) -> None:
        super().indices()
        self.emit(f"m = tl.arange(0, {self.plan.rows})")
        if not self.all_rows:
            self.emit(f"m_in = m < {'M' if self.known.m is None else self.known.m}")

    def x(self, k: str, *bounds: str) -> str:
        inside = [*([] if self.all_rows else ["m_in[:, None]"]), *bounds]
        return f"tl.load(x + m[:, None] * x_stride + {k}[None, :]{_mask(inside)})"

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
        if self.mode == "folded":
            shape = f"{self.plan.rows}, {self.plan.rows if self.plan.gram else 'BLOCK_K // 8'}"
            self.emit(f"squares = tl.zeros(({shape}), tl.float32)")

    def step(self) -> None:
        norm = self.op.norm
        self.emit("k = start + tl.arange(0, BLOCK_K)")
        if not self.known.even_k:
            self.emit("k_in = k < K")
        self.load_weights()
        self.emit(f"y = {self.x('k', *([] if self.known.even_k else ['k_in[None, :]']))}")
        self.load_norm()
        weight = norm is not None and norm.has_weight
        if self.mode == "folded":
            if self.plan.gram:
                self.emit("squares = tl.dot(y, tl.trans(y), squares)")
            else:
                square = "y.to(tl.float32) * y.to(tl.float32)"
                self.emit(f"squares += tl.sum(tl.reshape({square}, ({self.plan.rows}, BLOCK_K // 8, 8)), 2)")
            if weight:
                self.emit("y = (y * g[None, :]).to(w0_tile.dtype)")
        elif self.mode == "first":
            centred = " - near[:, None] - mean[:, None]" if norm and norm.kind == "layer" else ""
            self.emit(f"y = (y.to(tl.float32){centred}) * rstd[:, None]")
            if weight:
                self.emit(f"y = y * g[None, :]{' + b[None, :]' if norm and norm.has_bias else ''}")
            self.emit("y = y.to(w0_tile.dtype)")
        precision = f', input_precision="{self.known.input_precision}"' if self.op.dtype == torch.float32 else ""
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.dot(w{i}_tile, tl.trans(y), acc{i}{precision})")

    def finish(self) -> None:
        if self.mode == "folded":
            assert self.op.norm is not None
            if self.plan.gram:
                self.emit("squares = tl.where(m[:, None] == m[None, :], squares, 0.0)")
            self.emit(f"rstd = tl.rsqrt(tl.sum(squares, 1) / K + {literal(self.op.norm.eps)})")
            self.emit(*(f"acc{i} = acc{i} * rstd[None, :]" for i in range(self.op.weights)))
        m = "m.to(tl.int64)" if self.known.wide_output else "m"
        at = f"{m}[None, :] * N + n[:, None]"
        rows = [] if self.all_rows else ["m_in"]
        inside = [*(f"{row}[None, :]" for row in rows), *([] if self.known.even_n else ["n_in[:, None]"])]
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "full":
                self.emit(f"e{j} = tl.load(extra{j} + {at}{_mask(inside)}).to(tl.float32)")
            elif extra.kind == "row":
                self.emit(f"e{j} = tl.load(extra{j} + m{_mask(rows)}).to(tl.float32)[None, :]")
        lines, result = print_pointwise(
            self.op.epilogue, lambda leaf: f"{'acc' if leaf.op == 'acc' else 'e'}{leaf.attr('index')}", "t"
        )
        self.emit(*lines, f"tl.store(out + {at}, {result}{_mask(inside, '')})")
