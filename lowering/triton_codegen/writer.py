"""What the writers of the matmul family share: the signature, indices, weights, the norm's vectors and the extras."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ...fused import MatmulFamily, MatmulGroup
from .plans import Plan
from .pointwise import literal, print_pointwise

INDENT = "    "
THIN = 8  # the narrowest second operand of the matrix unit
EARLY = 16  # elements of an extra that a thread may hold while it walks along K
STATISTICS_ELEMENTS = 64  # of x per thread and step of the pass that computes mean and rstd


@dataclass(frozen=True)
class KernelSource:
    """A Triton module's text, the kernel's name in it, and the names of its tensor arguments (the outputs last).

    Further arguments are `M` where `runtime_m`, then the constexprs of `aot.constexprs`. `blocks` names the tensors
    that the kernel reads through a descriptor, with the block that each load brings.
    """

    text: str
    name: str
    tensors: tuple[str, ...]
    runtime_m: bool
    outputs: tuple[str, ...]
    blocks: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Facts:
    """What the text depends on besides the fused op and the plan's kind, rows and lanes."""

    m: int | None  # None: M is a runtime argument, at most `rows`
    even_n: bool
    even_k: bool
    wide_weight: bool  # offsets into a weight pass 2³¹
    wide_output: bool
    input_precision: str  # of a float32 dot
    input_strides: tuple[int, ...] = ()  # elements between rows of the inputs of an activation
    weights_first: bool = False  # x is still being written by the kernel in front: see `dependent_launch.late`


def norm_mode(op: MatmulFamily, plan: Plan) -> Literal["none", "folded", "first"]:
    if op.norm is None:
        return "none"
    overflows = plan.kind != "gemv" and op.dtype == torch.float16
    # the sums that put a LayerNorm's mean right come from the matrix unit too
    apart = op.norm.kind == "layer" and (not plan.gram or op.norm.offset != 0)
    return "first" if apart or overflows else "folded"


def statistics_block(op: MatmulFamily, plan: Plan) -> int:
    """Elements of a row per step of the pass that computes mean and rstd."""
    rows = plan.rows if plan.kind == "swap" else 1
    return min(1 << (int(op.k) - 1).bit_length(), max(16, STATISTICS_ELEMENTS * 32 * plan.num_warps // rows))


class Parts:
    """What the arguments are called that the parts of an op read and write."""

    parts: Sequence[MatmulFamily]

    @property
    def several(self) -> bool:
        return len(self.parts) > 1

    def numbered(self, p: int, j: int) -> int:
        """The number that the j-th extra of part p has among all extras."""
        return sum(len(part.extras) for part in self.parts[:p]) + j

    def stored(self, i: int) -> tuple[str, ...]:
        """The names of what the i-th of all weights is read from."""
        return (f"w{i}",)

    def read_by(self, p: int) -> list[str]:
        """The names of what part p reads: weights, then extras."""
        part = self.parts[p]
        weights = [name for i in range(part.weights) for name in self.stored(p + i)]
        return [*weights, *(f"extra{self.numbered(p, j)}" for j in range(len(part.extras)))]

    def out(self, p: int) -> str:
        return f"out{p}" if self.several else "out"


class Writer(Parts):
    """What the kinds share: signature, indices, weights, extras."""

    axis = ""  # suffix that makes a vector over n broadcast against the accumulator
    outer, inner = "[:, None]", "[None, :]"  # suffixes of a vector over n or m, and of one over k, in a tile
    constants: tuple[str, ...] = ("x_stride", "w_stride", "N", "K", "BLOCK_N", "BLOCK_K")

    def __init__(self, op: MatmulFamily | MatmulGroup, plan: Plan, known: Facts) -> None:
        self.op, self.parts, self.plan, self.known = op.whole, op.parts, plan, known
        self.lines: list[str] = []
        self.level = 1
        self.mode = norm_mode(self.op, plan)
        norm = self.op.norm
        self.tensors = (
            *((f"x{j}" for j in range(len(self.op.inputs))) if self.op.activation else ["x"]),
            *(["norm_weight"] if norm and norm.has_weight else []),
            *(["norm_bias"] if norm and norm.has_bias else []),
            *(name for p in range(len(self.parts)) for name in self.read_by(p)),
            *self.workspace,
            *(self.out(p) for p in range(len(self.parts))),
        )

    @property
    def workspace(self) -> Sequence[str]:
        """Tensors that are neither operands nor results."""
        return ()

    @property
    def block(self) -> str:
        """The number of a block of columns."""
        return "tl.program_id(0)"

    def emit(self, *lines: str) -> None:
        self.lines.extend(INDENT * self.level + line for line in lines)

    def write(self) -> KernelSource:
        runtime_m = self.known.m is None
        norm = [f"{self.op.norm.kind}_norm"] if self.op.norm else ["activation"] if self.op.activation else []
        linears = f"linear{self.op.weights}" if not self.several else f"linears{len(self.parts)}"
        name = "_".join([*norm, linears, self.plan.kind])
        signature = [*self.tensors, *(["M"] if runtime_m else [])]
        signature += [f"{c}: tl.constexpr" for c in self.constants]
        self.indices()
        self.hoisted_extras()
        self.hoisted_inputs()
        if self.mode == "first":
            self.statistics()
        self.start()
        self.walk()
        self.finish()
        head = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {name}("]
        head += [f"{INDENT}{argument}," for argument in signature] + ["):"]
        text = "\n".join([*head, *self.lines]) + "\n"
        outputs = self.tensors[-len(self.parts) :]
        return KernelSource(text, name, self.tensors, runtime_m, outputs, tuple(self.blocks().items()))

    def walk(self) -> None:
        """The loop along K."""
        # without a dot, Triton pipelines a loop only where asked to
        asked = self.plan.kind == "gemv" and self.plan.num_stages > 1
        walk = f"tl.range(0, K, BLOCK_K, num_stages={self.plan.num_stages})" if asked else f"range(0, K, {self.step_k})"
        self.emit(f"for start in {walk}:")
        self.level += 1
        self.step()
        self.level -= 1

    def blocks(self) -> dict[str, tuple[int, ...]]:
        """The blocks of tensors that are read through descriptors."""
        return {}

    # ---- pieces that differ -----------------------------------------------------------------
    def statistics(self) -> None:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        raise NotImplementedError

    @property
    def step_k(self) -> str:
        """How far the walk along K goes in a step."""
        return "BLOCK_K"

    # ---- several results --------------------------------------------------------------------
    def width(self, p: int) -> str:
        """Columns of a result."""
        return str(self.parts[p].n) if self.several else "N"

    def finish_parts(self) -> None:
        """Every result's epilogue, of which a block needs the one of its own part."""
        for p in range(len(self.parts)):
            if self.several:
                self.emit(f"if part == {p}:")
                self.level += 1
            self.store(p)
            self.level -= self.several

    def store(self, p: int) -> None:
        raise NotImplementedError

    # ---- pieces in common -------------------------------------------------------------------
    def indices(self) -> None:
        if self.several:
            self.emit(f"block = {self.block}")
            self.part_of_block(weight=True)
            self.emit("n = (block - first) * BLOCK_N + tl.arange(0, BLOCK_N)")
        else:
            self.emit(f"n = {self.block} * BLOCK_N + tl.arange(0, BLOCK_N)")
        if not self.known.even_n:
            self.emit(f"n_in = n < {'width' if self.several else 'N'}")

    def part_of_block(self, weight: bool = False) -> None:
        """Which part `block` belongs to, its first block and its width, and the pointer to its weight."""
        names = "w, part, first, width" if weight else "part, first, width"
        before: list[str] = []
        for p, part in enumerate(self.parts):
            found = f"{f'w{p}, ' if weight else ''}{p}, {' + '.join(before) or 0}, {part.n}"
            if before:
                self.emit(f"if block >= {' + '.join(before)}:")
            self.emit(f"{INDENT if before else ''}{names} = {found}")
            before.append(f"tl.cdiv({part.n}, BLOCK_N)")

    def load_weights(self) -> None:
        """Weights are read once and never again, so they leave the caches first."""
        wide = ".to(tl.int64)" if self.known.wide_weight else ""
        inside = [
            *([] if self.known.even_n else [f"n_in{self.outer}"]),
            *([] if self.known.even_k else [f"k_in{self.inner}"]),
        ]
        for i in range(self.op.weights):
            feature = self.op.features[i] if self.op.features else 0
            n = f"n * {self.op.feature_step}" if self.op.feature_step > 1 else "n"
            n = f"({n} + {feature})" if feature else f"({n})" if n != "n" else n
            offset = f"{n}{wide}{self.outer} * w_stride + k{self.inner}"
            if self.op.weight_is_kn:
                offset = f"k{wide}{self.inner} * w_stride + {n}{self.outer}"
            pointer = "w" if self.several else f"w{i}"
            line = f'tl.load({pointer} + {offset}{mask_argument(inside)}, eviction_policy="evict_first")'
            self.emit(f"w{i}_tile = {line}")

    def load_norm(self) -> None:
        """g and b along K as `g` and `b`. Past K they may be anything: there the weights are 0."""
        norm = self.op.norm
        k, mask = "k", mask_argument([] if self.known.even_k else ["k_in"])
        if self.copies > 1:
            k = f"k[None, :] + 0 * tl.arange(0, {self.copies})[:, None]"
            mask = mask_argument([] if self.known.even_k else ["k_in[None, :]"])
        if norm and norm.has_weight:
            self.emit(f"g = tl.load(norm_weight + {k}{mask}){'' if self.native() else '.to(tl.float32)'}")
            if norm.offset:
                self.emit(f"g = g + {literal(norm.offset)}")
        if norm and norm.has_bias and self.mode == "first":
            self.emit(f"b = tl.load(norm_bias + {k}{mask}).to(tl.float32)")

    @property
    def copies(self) -> int:
        """How often g and b are loaded side by side."""
        return 1

    def native(self) -> bool:
        """Whether x · g is computed in the operands' own dtype: the product of two rounds to the same number there as
        through float32, and saves the conversions."""
        return False

    def hoisted_extras(self) -> None:
        """Column and scalar extras, loaded before the loop so that their latency hides under it."""
        for p, part in enumerate(self.parts):
            mine = [f"(part == {p})"] if self.several else []
            mask = mask_argument([*mine, *([] if self.known.even_n else ["n_in"])])
            for j, extra in enumerate(part.extras):
                number = self.numbered(p, j)
                if extra.kind == "col":
                    first = f"{extra.first} + " if extra.first else ""
                    n = f"n * {extra.step}" if extra.step > 1 else "n"
                    self.emit(f"e{number} = tl.load(extra{number} + {first}{n}{mask}).to(tl.float32){self.axis}")
                elif extra.kind == "scalar":
                    self.emit(f"e{number} = tl.load(extra{number}).to(tl.float32)")

    @property
    def early(self) -> bool:
        """Whether extras with rows are loaded before the loop too."""
        return not self.several and self.plan.rows * self.plan.block_n <= EARLY * 32 * self.plan.num_warps

    # ---- an activation in front -------------------------------------------------------------
    @property
    def along_k(self) -> str:
        """Suffix that makes a vector over k broadcast against x."""
        return ""

    def hoisted_inputs(self) -> None:
        """Inputs that do not vary along K, loaded before the loop."""
        for j, given in enumerate(self.op.inputs):
            if given.kind == "scalar":
                self.emit(f"i{j} = tl.load(x{j}).to(tl.float32)")
            elif given.kind == "row":
                self.load_row_input(j)

    def load_row_input(self, j: int) -> None:
        raise NotImplementedError

    def activated(self, y: str, full: Callable[[str, str], str], suffix: str = "") -> None:
        """Loads the inputs of a step and computes `y` from them; `full` loads from (tensor, distance of its rows)."""
        assert self.op.activation is not None
        inside = mask_argument([] if self.known.even_k else ["k_in"])
        for j, given in enumerate(self.op.inputs):
            if given.kind == "full":
                self.emit(f"i{j}{suffix} = {full(f'x{j}', str(self.known.input_strides[j]))}.to(tl.float32)")
            elif given.kind == "col":
                at = f"{given.first} + k * {given.step}"
                self.emit(f"i{j}{suffix} = tl.load(x{j} + {at}{inside}).to(tl.float32){self.along_k}")
        kinds = [given.kind for given in self.op.inputs]
        lines, result = print_pointwise(
            self.op.activation,
            lambda v: f"i{v.attr('index')}{'' if kinds[v.attr('index')] == 'scalar' else suffix}",
            f"a{suffix}_",
        )
        # past K weights are 0, and what they meet must be a number
        self.emit(*lines, f"{y} = {result if self.known.even_k else f'tl.where(k_in{self.along_k}, {result}, 0.0)'}")


def mask_argument(bounds: list[str], other: str = ", other=0.0") -> str:
    return f", mask={' & '.join(bounds)}{other}" if bounds else ""
