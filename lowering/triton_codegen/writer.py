"""What the writers of the matmul family share: the signature, indices, weights, the norm's vectors and the extras."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...fused import MatmulFamily
from .plans import Plan
from .pointwise import literal

INDENT = "    "
STATISTICS_ELEMENTS = 64  # of x per thread and step of the pass that computes mean and rstd


@dataclass(frozen=True)
class KernelSource:
    """A Triton module's text, the kernel's name in it, and the names of its tensor arguments (the output last).

    Further arguments are `M` where `runtime_m`, then the constexprs of `aot.constexprs`. `blocks` names the tensors
    that the kernel reads through a descriptor, with the block that each load brings.
    """

    text: str
    name: str
    tensors: tuple[str, ...]
    runtime_m: bool
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


def norm_mode(op: MatmulFamily, plan: Plan) -> Literal["none", "folded", "first"]:
    if op.norm is None:
        return "none"
    overflows = plan.kind != "gemv" and op.dtype == torch.float16
    return "first" if op.norm.kind == "layer" or overflows else "folded"


def statistics_block(op: MatmulFamily, plan: Plan) -> int:
    """Elements of a row per step of the pass that computes mean and rstd."""
    rows = plan.rows if plan.kind == "swap" else 1
    return min(1 << (int(op.k) - 1).bit_length(), max(16, STATISTICS_ELEMENTS * 32 * plan.num_warps // rows))


class Writer:
    """What the kinds share: signature, indices, weights, extras."""

    axis = ""  # suffix that makes a vector over n broadcast against the accumulator
    constants: tuple[str, ...] = ("x_stride", "w_stride", "N", "K", "BLOCK_N", "BLOCK_K")

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
        signature += [f"{c}: tl.constexpr" for c in self.constants]
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
        text = "\n".join([*head, *self.lines]) + "\n"
        return KernelSource(text, name, self.tensors, runtime_m, tuple(self.blocks().items()))

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
            self.emit(f'w{i}_tile = tl.load(w{i} + {offset}{mask_argument(inside)}, eviction_policy="evict_first")')

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
        if norm and norm.has_bias:
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
        mask = mask_argument([] if self.known.even_n else ["n_in"])
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "col":
                first = f"{extra.first} + " if extra.first else ""
                self.emit(f"e{j} = tl.load(extra{j} + {first}n{mask}).to(tl.float32){self.axis}")
            elif extra.kind == "scalar":
                self.emit(f"e{j} = tl.load(extra{j}).to(tl.float32)")


def mask_argument(bounds: list[str], other: str = ", other=0.0") -> str:
    return f", mask={' & '.join(bounds)}{other}" if bounds else ""
