"""Writes the Triton source of one flash-attention kernel.

For each block of queries the softmax is taken online, in base 2 (m is the running maximum, l the running sum):

    m' = max(m, max s)      p = 2^(s − m')      l' = l · 2^(m − m') + Σ p      acc' = acc · 2^(m − m') + p · v

and the result is acc / l. m starts at a finite number below every score, so that rows that have seen nothing yet need
no case of their own: p is 0 there. Capped scores may do without a running maximum (`Scores.bound`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ....candidates import Amount
from ....cost.amounts import amount
from ....fused import Attention
from .expressions import Read
from .limits import limits, proved
from .plan import Part, Plan, parts
from .scores import LOG2_E, Scores
from .sizes import size_text, symbols

NAME = "flash_attention"
LOWEST = -3.0e38
# Three products of TF32 in place of one, which cuts operands off: 3.1 times the error of eager's, which rounds them.
FLOAT32 = ', input_precision="tf32x3"'
INDENT = "    "


@dataclass(frozen=True)
class Strides:
    """Elements between neighbours along batch, heads, length and width."""

    q: tuple[Amount, ...]
    k: tuple[Amount, ...]
    v: tuple[Amount, ...]
    out: tuple[Amount, ...]
    lengths: Amount = 0
    reads: Mapping[str, Read] = field(default_factory=dict)  # what the modification reads, but position and lengths


def contiguous(op: Attention, reads: Mapping[str, Read]) -> Strides:
    """The strides of contiguous operands in layout BHSD."""

    def of(heads: Amount, length: Amount, width: int) -> tuple[Amount, ...]:
        return (heads * length * width, length * width, width, 1)

    heads, kv_heads, q_len, kv_len = (amount(n) for n in (op.heads, op.kv_heads, op.q_len, op.kv_len))
    q, out = of(heads, q_len, op.head_dim), of(heads, q_len, op.v_dim)
    return Strides(q, of(kv_heads, kv_len, op.head_dim), of(kv_heads, kv_len, op.v_dim), out, 1, reads)


@dataclass(frozen=True)
class FlashSource:
    """A module's text and the arguments of the kernel in it: tensors (the results last), then symbolic sizes."""

    text: str
    tensors: tuple[str, ...]
    symbols: tuple[str, ...]


def write(op: Attention, plan: Plan, strides: Strides) -> FlashSource:
    """The kernel that computes `op` by `plan`."""
    return Writer(op, plan, strides).write()


def read_arguments(op: Attention, reads: Mapping[str, Read]) -> list[str]:
    """The tensor arguments beside q, k, v and the result."""
    mask = proved(op)
    found = ["position"] if mask.position else []
    found += ["lengths"] if mask.padding is not None else []
    return [*found, *(read.argument for read in reads.values())]


def sizes_of(op: Attention, strides: Strides) -> list[Amount]:
    """Every size and stride that a kernel may compute with."""
    found = [amount(n) for n in (op.heads, op.kv_heads, op.q_len, op.kv_len, proved(op).offset)]
    for one in (strides.q, strides.k, strides.v, strides.out, (strides.lengths,)):
        found += one
    return found + [stride for read in strides.reads.values() for stride in read.strides]


class Writer:
    """One kernel: where a program stands (`place`), what it starts from, its loops over keys, and its result."""

    positions = "BLOCK_M"
    in_part: str  # whether rows see a part of a block only

    def __init__(self, op: Attention, plan: Plan, strides: Strides) -> None:
        self.op, self.plan, self.strides = op, plan, strides
        self.lines: list[str] = []
        self.level = 1
        self.limits = limits(op, plan.block_n, strides.lengths, self.positions)
        self.scores = Scores(op, plan, strides.reads)
        self.qk, self.pv = parts(op.head_dim), parts(op.v_dim)
        self.even_rows, self.even_keys = self.scores.even_rows, self.scores.even_keys

    def emit(self, *lines: str) -> None:
        self.lines += [INDENT * self.level + line for line in lines]

    def write(self) -> FlashSource:
        tensors = ["q", "k", "v", *self.other_tensors(), *self.op.results]
        sizes = self.sizes()
        self.place()
        self.emit(*self.limits.setup)
        self.start()
        self.loops()
        self.finish()
        arguments = ", ".join([*tensors, *sizes, "BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"])
        head = ["import triton", "import triton.language as tl", "", "", *self.functions()]
        head += ["@triton.jit", f"def {NAME}({arguments}):"]
        return FlashSource("\n".join([*head, *self.lines]) + "\n", tuple(tensors), tuple(sizes))

    # ---- parts ------------------------------------------------------------------------------
    def functions(self) -> list[str]:
        """What the kernel calls."""
        return []

    def other_tensors(self) -> list[str]:
        return read_arguments(self.op, self.strides.reads) + (["blocks"] if self.plan.listed else [])

    def sizes(self) -> list[str]:
        return [str(s) for s in symbols(sizes_of(self.op, self.strides))]

    def place(self) -> None:
        """Which `rows` [BLOCK_M, 1], head and batch entry this is, and the operands from there on."""
        op = self.op
        group = size_text(amount(op.heads) // amount(op.kv_heads))
        self.emit(
            "# blocks at the end of a causal sequence have the most keys: they start first",
            "block = tl.num_programs(1) - 1 - tl.program_id(1)",
            "first_row = block * BLOCK_M",
            "head = tl.program_id(0).to(tl.int64)",
            "batch = tl.program_id(2).to(tl.int64)",
            f"kv_head = head // {group}",
            "rows = first_row + tl.arange(0, BLOCK_M)[:, None]",
            "columns = tl.arange(0, BLOCK_N)",
        )
        strides = self.strides
        self.emit(*(f"{n} += batch * {size_text(by[0])} + head * {size_text(by[1])}" for n, by in self.of_rows()))
        if not self.plan.descriptors:
            for n, by in (("k", strides.k), ("v", strides.v)):
                self.emit(f"{n} += batch * {size_text(by[0])} + kv_head * {size_text(by[1])}")

    def of_rows(self) -> tuple[tuple[str, tuple[Amount, ...]], ...]:
        return ("q", self.strides.q), ("out", self.strides.out)

    def row_place(self, name: str, d: str) -> str:
        """The elements `d` of the rows of q or out."""
        _, _, row, column = dict(self.of_rows())[name]
        return f"{name} + {_wide('rows', amount(self.op.q_len), row)} * {size_text(row)} + {d} * {size_text(column)}"

    def start(self) -> None:
        op = self.op
        for i, part in enumerate(self.qk):
            mask = self.inside("rows", amount(op.q_len), self.even_rows, part, f"qd{i}[None, :]")
            self.emit(f"qd{i} = {part.columns}")
            self.emit(f"q{i} = tl.load({self.row_place('q', f'qd{i}[None, :]')}{mask})")
        for i, part in enumerate(self.pv):
            self.emit(f"vd{i} = {part.columns}")
            self.emit(f"acc{i} = tl.zeros((BLOCK_M, {part.size}), tl.float32)")
        self.emit(*self.scores.setup())
        sink = self.scores.sink()
        lowest, total = f"{LOWEST if self.scores.bound is None else self.scores.bound!r}", "0.0"
        if sink:
            lowest, total = f"tl.maximum({sink}, {LOWEST})", "1.0"
        self.emit(f"m = tl.zeros((BLOCK_M,), tl.float32) + {lowest}", f"l = tl.full((BLOCK_M,), {total}, tl.float32)")

    def inside(self, index: str, length: Amount, even: bool, part: Part, d: str) -> str:
        conditions = [] if even else [f"(({index}) < {size_text(length)})"]
        conditions += [f"({d} < {part.bound})"] if part.bound else []
        return f", mask={' & '.join(conditions)}, other=0.0" if conditions else ""

    def loops(self) -> None:
        """Over the blocks of keys that a row sees: one loop, whose pipeline never drains; masks are behind a branch."""
        if self.plan.listed:
            self.listed_blocks()
        else:
            self.blocks_within_limits()
        self.level += 1
        self.step()
        self.level -= 1

    def blocks_within_limits(self) -> None:
        found = self.limits
        self.emit(f"end = {_nested('tl.minimum', found.end)}", f"open_end = {_nested('tl.minimum', found.open_end)}")
        self.in_part = "start + BLOCK_N > open_end"
        begin = "0"
        if found.begin:
            begin = f"{_nested('tl.maximum', ('0', *found.begin))} // BLOCK_N * BLOCK_N"
            self.emit(f"open_begin = {_nested('tl.maximum', found.open_begin)}")
            self.in_part = f"(start < open_begin) | ({self.in_part})"
        self.emit(f"for start in tl.range({begin}, end, BLOCK_N):")

    def listed_blocks(self) -> None:
        """Those that `blocks.py` listed."""
        depends = self.scores.depends
        blocks = -(-int(self.op.kv_len) // self.plan.block_n)
        number = "head" if "head" in depends else "0"
        if "batch" in depends:
            number = f"(batch * {size_text(amount(self.op.heads)) if 'head' in depends else 1} + {number})"
        self.in_part = "listed % 2 == 1"
        self.emit(
            f"blocks += ({number} * tl.num_programs(1) + block) * {blocks + 1}",
            "for i in tl.range(0, tl.load(blocks)):",
            f"{INDENT}listed = tl.load(blocks + 1 + i)",
            f"{INDENT}start = listed // 2 * BLOCK_N",
        )

    def make_tile(self, name: str, i: int) -> None:
        """The part `i` of a block of keys or values."""
        part, d = (self.qk[i], f"qd{i}[None, :]") if name == "k" else (self.pv[i], f"vd{i}[None, :]")
        self.emit(f"{name}{i} = {self.loaded(name, part, d)}")

    def loaded(self, name: str, part: Part, d: str) -> str:
        """The columns `d` of a block of keys or values."""
        stride = getattr(self.strides, name)
        if self.plan.descriptors:
            place = "batch.to(tl.int32), kv_head.to(tl.int32), start, 0"
            return f"{name}.load([{place}]).reshape([BLOCK_N, {part.size}])"
        kv_len = amount(self.op.kv_len)
        mask = self.inside("start + columns[:, None]", kv_len, self.even_keys, part, d)
        row = _wide("start + columns[:, None]", kv_len, stride[2])
        place = f"{name} + {row} * {size_text(stride[2])} + {d} * {size_text(stride[3])}"
        return f"tl.load({place}{mask})"

    def step(self) -> None:
        """One block of keys."""
        precision = FLOAT32 if self.op.dtype == torch.float32 else ""
        for i in range(len(self.qk)):
            self.make_tile("k", i)
            self.emit(f"s = tl.dot(q{i}, k{i}.T{', s' if i else ''}{precision})")
        self.scored()
        lines, factor = self.scores.modified()
        self.emit(*lines)
        hidden = self.scores.hidden(self.limits.conditions)
        if hidden:
            self.emit(f"if {self.in_part}:", *(INDENT + line for line in hidden))
        scaled = "" if factor == 1.0 else f" * {factor!r}"
        bound = self.scores.bound
        if bound is not None:
            self.emit(f"p = tl.exp2(s{scaled} - {bound!r})", "l = l + tl.sum(p, 1)")
        else:
            self.emit(
                f"m_new = tl.maximum(m, tl.max(s, 1){scaled})",
                f"p = tl.exp2(s{scaled} - m_new[:, None])",
                "alpha = tl.exp2(m - m_new)",
                "l = l * alpha + tl.sum(p, 1)",
                "m = m_new",
            )
        weight = self.weighted()
        for i in range(len(self.pv)):
            if bound is None:
                self.emit(f"acc{i} = acc{i} * alpha[:, None]")
            self.make_tile("v", i)
            self.emit(f"acc{i} = tl.dot({weight}.to(v{i}.dtype), v{i}, acc{i}{precision})")

    def scored(self) -> None:
        """What makes the products `s` with what is loaded those with keys."""

    def weighted(self) -> str:
        """What loaded values are multiplied with."""
        return "p"

    def finish(self) -> None:
        op = self.op
        if "logarithm" in op.results:
            own = "first_row + tl.arange(0, BLOCK_M)"
            place = f"(batch * {size_text(amount(op.heads))} + head) * {size_text(amount(op.q_len))} + {own}"
            within = "" if self.even_rows else f", mask={own} < {size_text(amount(op.q_len))}"
            self.emit(f"tl.store(logarithm + {place}, (m + tl.log2(l)) * {1 / LOG2_E!r}{within})")
        empty = op.modification.empty_rows if op.modification is not None else op.mask.empty_rows
        if empty == "zero":
            self.emit("l = tl.where(l == 0.0, 1.0, l)")
        for i, part in enumerate(self.pv):
            mask = self.inside("rows", amount(op.q_len), self.even_rows, part, f"vd{i}[None, :]")
            mask = mask.removesuffix(", other=0.0")
            place = self.row_place("out", f"vd{i}[None, :]")
            self.emit(f"tl.store({place}, (acc{i} / l[:, None]).to(out.dtype.element_ty){mask})")


def _wide(index: str, length: Amount, stride: Amount) -> str:
    """An index in 64 bits where its product with the stride may need them."""
    narrow = isinstance(length, int) and isinstance(stride, int) and length * stride < 2**31
    return f"({index})" if narrow else f"({index}).to(tl.int64)"


def _nested(function: str, values: Iterable[str]) -> str:
    """function(a, function(b, c)) of two and more values, or the one there is."""
    first, *rest = values
    return f"{function}({first}, {_nested(function, rest)})" if rest else first
