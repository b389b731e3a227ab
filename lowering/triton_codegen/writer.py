"""What every kernel of the matmul family begins with: signature, indices, weights, extras; what is known of its sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...fused import MatmulFamily
from .plans import Plan
from .pointwise import literal, print_pointwise

INDENT = "    "
STATISTICS_ELEMENTS = 64  # of x per thread and step of the pass that computes mean and rstd

NormMode = Literal["none", "folded", "shifted", "first"]


@dataclass(frozen=True)
class KernelSource:
    """A Triton module's text, the kernel's name in it, and its tensor arguments with their types (outputs last).

    Further arguments are `M` where `runtime_m`, then the constexprs x_stride, w_stride, N, K, BLOCK_N, BLOCK_K.
    """

    text: str
    name: str
    tensors: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    runtime_m: bool


@dataclass(frozen=True)
class Facts:
    """What the text depends on besides the fused op and the plan's kind, rows, lanes and split."""

    m: int | None  # None: M is a runtime argument, at most `rows`
    even_n: bool
    even_k: bool
    wide_weight: bool  # offsets into a weight pass 2³¹
    wide_output: bool
    input_precision: str  # of a float32 dot


def norm_mode(op: MatmulFamily, plan: Plan) -> NormMode:
    if op.norm is None:
        return "none"
    overflows = plan.kind != "gemv" and op.dtype == torch.float16
    if op.norm.kind == "layer":
        return "shifted" if plan.split > 1 and not overflows else "first"
    return "first" if overflows else "folded"


def statistics_block(op: MatmulFamily, plan: Plan) -> int:
    """Elements of a row per step of the pass that computes mean and rstd."""
    rows = 1 if plan.kind == "gemv" else plan.rows
    return min(1 << (int(op.k) - 1).bit_length(), max(16, STATISTICS_ELEMENTS * 32 * plan.num_warps // rows))


def masked(bounds: list[str], other: str = ", other=0.0") -> str:
    """The mask arguments of a load or store."""
    return f", mask={' & '.join(bounds)}{other}" if bounds else ""


class Writer:
    """Collects the lines of one kernel; subclasses write the statistics, the walk along K and what follows it."""

    axis = ""  # suffix that makes a vector over n broadcast against the accumulator

    def __init__(self, op: MatmulFamily, plan: Plan, known: Facts) -> None:
        self.op, self.plan, self.known = op, plan, known
        self.lines: list[str] = []
        self.level = 1
        self.mode = norm_mode(op, plan)
        self.products = op.per_output  # accumulators of one block
        self.width = "width" if op.splits else "N"  # columns of the output that a block writes to

    def arguments(self) -> list[tuple[str, torch.dtype]]:
        """Tensor arguments in the order of a site's operands, then the outputs."""
        op, norm = self.op, self.op.norm
        found = [("x", op.dtype)]
        found += [("norm_weight", op.dtype)] if norm and norm.has_weight else []
        found += [("norm_bias", op.dtype)] if norm and norm.has_bias else []
        found += [(f"w{i}", op.dtype) for i in range(op.weights)]
        for j, extra in enumerate(op.extras):
            per_part = op.splits and extra.kind in ("full", "col")
            names = [f"extra{j}_{i}" for i in range(len(op.splits))] if per_part else [f"extra{j}"]
            found += [(name, extra.dtype) for name in names]
        return found + [(f"out{i}" if op.splits else "out", op.out_dtype) for i in range(max(1, len(op.splits)))]

    def emit(self, *lines: str) -> None:
        self.lines.extend(INDENT * self.level + line for line in lines)

    def write(self) -> KernelSource:
        runtime_m = self.known.m is None
        norm = [f"{self.op.norm.kind}_norm"] if self.op.norm else []
        name = "_".join([*norm, f"linear{self.op.weights}", self.plan.kind])
        tensors, dtypes = zip(*self.arguments(), strict=True)
        signature = [*tensors, *(["M"] if runtime_m else [])]
        signature += [f"{c}: tl.constexpr" for c in ("x_stride", "w_stride", "N", "K", "BLOCK_N", "BLOCK_K")]
        self.indices()
        self.hoisted_extras()
        if self.mode == "first":
            self.statistics()
        self.start()
        self.emit(f"for start in {self.walk()}:")
        self.level += 1
        self.step()
        self.level -= 1
        self.finish()
        head = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {name}("]
        head += [f"{INDENT}{argument}," for argument in signature] + ["):"]
        return KernelSource("\n".join([*head, *self.lines]) + "\n", name, tensors, dtypes, runtime_m)

    # ---- pieces that differ -----------------------------------------------------------------
    def statistics(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def walk(self) -> str:
        return "range(0, K, BLOCK_K)"

    def step(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    # ---- pieces in common -------------------------------------------------------------------
    def indices(self) -> None:
        """`n`, the features of this block; with splits also the pointers and the width of the part they lie in."""
        op = self.op
        if not op.splits:
            self.emit("n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)")
        else:
            self.emit("block = tl.program_id(0)")
            for i, size in enumerate(op.splits[:-1]):
                before = f"first_{i} + " if i else ""
                self.emit(f"first_{i + 1} = {before}(({size} + BLOCK_N - 1) // BLOCK_N)")
            begins = ["0", *(f"first_{i}" for i in range(1, len(op.splits)))]
            self.emit(f"n = (block - {self.of_part(begins)}) * BLOCK_N + tl.arange(0, BLOCK_N)")
            self.emit(f"width = {self.of_part([str(size) for size in op.splits])}")
            selected = [("w", "w{}"), ("out", "out{}")]
            selected += [
                (f"extra{j}", f"extra{j}_{{}}") for j, e in enumerate(op.extras) if e.kind in ("full", "col")
            ]
            for name, of in selected:
                self.emit(f"{name} = {self.of_part([of.format(i) for i in range(len(op.splits))])}")
            if any(op.features):
                self.emit(f"feature = {self.of_part([str(first) for first in op.features])}")
        if not self.known.even_n:
            self.emit(f"n_in = n < {self.width}")

    def of_part(self, values: list[str]) -> str:
        """The one of `values` that belongs to the part of the output that this block lies in."""
        if len(set(values)) == 1:
            return values[0]
        text = values[-1]
        for i in range(len(values) - 1, 0, -1):
            text = f"tl.where(block < first_{i}, {values[i - 1]}, {text})"
        return text

    def weights(self, n: str, k: str, inside: list[str]) -> None:
        """Tiles w0_tile, w1_tile, …; `n` and `k` broadcast `n` and `k` to a tile. Weights are read once and never
        again, so they leave the caches first."""
        wide = ".to(tl.int64)" if self.known.wide_weight else ""
        for i in range(self.products):
            features = "feature" if self.op.splits and any(self.op.features) else ""
            if not self.op.splits and self.op.features and self.op.features[i]:
                features = str(self.op.features[i])
            at = f"(n + {features})" if features else "n"
            offset = f"{at}{wide}{n} * w_stride + k{k}"
            if self.op.weight_is_kn:
                offset = f"k{wide}{k} * w_stride + {at}{n}"
            pointer = "w" if self.op.splits else f"w{i}"
            self.emit(f'w{i}_tile = tl.load({pointer} + {offset}{masked(inside)}, eviction_policy="evict_first")')

    def norm_parameters(self, inside: str, native: bool = False) -> None:
        """g and b along K as `g` and `b`: float32, or g in the operands' own type. Past K they may be anything: there
        the weights are 0."""
        norm = self.op.norm
        mask = masked([] if self.known.even_k else [inside])
        if norm and norm.has_weight:
            self.emit(f"g = tl.load(norm_weight + k{mask}){'' if native else '.to(tl.float32)'}")
            if norm.offset:
                self.emit(f"g = g + {literal(norm.offset)}")
        if norm and norm.has_bias:
            self.emit(f"b = tl.load(norm_bias + k{mask}).to(tl.float32)")

    def hoisted_extras(self) -> None:
        """Column and scalar extras, loaded before the loop so that their latency hides under it."""
        mask = masked([] if self.known.even_n else ["n_in"])
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "col":
                first = f"{extra.first} + " if extra.first else ""
                self.emit(f"e{j} = tl.load(extra{j} + {first}n{mask}).to(tl.float32){self.axis}")
            elif extra.kind == "scalar":
                self.emit(f"e{j} = tl.load(extra{j}).to(tl.float32)")

    def epilogue(self, at: str, row: str, inside: list[str], rows: list[str], suffix: str = "") -> None:
        """Remaining extras, the epilogue and the store. `at` is the offset into the output and `row` that of a row;
        `suffix` ends the names of the accumulators."""
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "full":
                self.emit(f"e{j} = tl.load(extra{j} + {at}{masked(inside)}).to(tl.float32)")
            elif extra.kind == "row":
                self.emit(f"e{j} = tl.load(extra{j} + {row}{masked(rows)}).to(tl.float32){self.row_axis}")
        lines, result = print_pointwise(
            self.op.epilogue,
            lambda leaf: f"acc{leaf.attr('index')}{suffix}" if leaf.op == "acc" else f"e{leaf.attr('index')}",
            f"t{suffix[1:]}_" if suffix else "t",
        )
        self.emit(*lines, f"tl.store(out + {at}, {result}{masked(inside, '')})")

    row_axis = ""  # suffix that makes a vector over m broadcast against the accumulator
