"""Reductions of rows with pointwise operations around them, as one generated Triton kernel.

A program takes `rows` rows. Where a row fits the registers it is loaded once, and every statistic and result is
computed from it; a longer row is walked in blocks, once per statistic that needs another one and once for the results.
Everything is float32 between loading and storing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...algebra import Algebra, Value
from ...candidates import Candidate, Traffic, Unavailable
from ...cost.amounts import amount, maximum
from ...cost.efficiency import efficiency
from ...fused import RowReduction, Site
from ...machine import Machine
from ...reasons import ON_CPU
from ...splice import load_kernel
from .pointwise import print_pointwise, unsupported

if TYPE_CHECKING:
    from torch.fx import Node

    from ...splice import Builder

REDUCTIONS = ("mean", "sum", "amax")
WHOLE_ROW = 16384  # elements of a row that are kept in registers
BLOCK = 4096  # elements per step where the row is longer
TILE = 2048  # elements that a program takes at least, in several rows where these are short
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAME = "row_reduction"


@dataclass(frozen=True)
class Plan:
    """`rows` rows per program, `block` elements at a time."""

    rows: int
    block: int
    num_warps: int

    @property
    def label(self) -> str:
        return f"rows{self.rows}_b{self.block}w{self.num_warps}"


@dataclass(frozen=True)
class Statistic:
    """The `index`-th number per row: `op` over the row of `value`, which reads earlier ones as `statistic(index=i)`.

    `stage` counts the passes over the row that must have ended before."""

    op: str
    value: Value
    stage: int


def candidates(op: RowReduction, machine: Machine) -> list[Candidate] | Unavailable:
    refusal = _refusal(op, machine)
    if refusal is not None:
        return Unavailable(refusal)
    plan = plan_of(op)
    moved = traffic(op)
    return [
        Candidate(
            name="triton_rows",
            kernel=f"triton {plan.label}",
            traffic=moved,
            seconds=seconds(op, moved, machine),
            emit=functools.partial(emit, op, plan),
            details=(("rows", plan.rows), ("block", plan.block), ("num_warps", plan.num_warps)),
        )
    ]


def _refusal(op: RowReduction, machine: Machine) -> str | None:
    if machine.kind == "cpu":
        return ON_CPU
    bad = next((t for t in (*op.out_dtypes, *(e.dtype for e in op.extras)) if t not in (*DTYPES, torch.bool)), None)
    if bad is not None:
        return f"the generator makes kernels for bfloat16, float16 and float32, not {bad}"
    if torch.bfloat16 in (op.dtype, *op.out_dtypes) and torch.bfloat16 not in machine.flops:
        return f"{machine.name} ({machine.arch}) has no bfloat16 units; use float16 there"
    statistics, results = schedule(op)
    return next(filter(None, (unsupported(v) for v in (*(s.value for s in statistics), *results))), None)


# ---- cost -------------------------------------------------------------------------------------------
def plan_of(op: RowReduction) -> Plan:
    width = 1 << max(0, op.n - 1).bit_length()
    block = width if width <= WHOLE_ROW else BLOCK
    rows = max(1, TILE // block)
    # measured on an H200: 4 warps for up to 2048 elements, 8 for 4096, 16 beyond and for rows that are walked
    return Plan(rows, block, num_warps=min(16, max(4, rows * block // 512)) if block == width else 16)


def traffic(op: RowReduction) -> Traffic:
    """Rows are read once where they fit the registers, else once per stage and once for the results: see `Loop`."""
    m = amount(op.m)
    statistics, results = schedule(op)
    passes = 1 if plan_of(op).block >= op.n else _stages(statistics)
    passes += passes > 1
    size = {"full": m * op.n, "row": m, "col": op.n, "scalar": 1}
    read = sum((e.dtype.itemsize * size[e.kind] * (passes if e.kind == "full" else 1) for e in op.extras), 0)
    written = sum((t.itemsize * size[k] for t, k in zip(op.out_dtypes, op.kinds, strict=True)), 0)
    flops = m * op.n * sum(sum(1 for _ in v.walk()) for v in (*(s.value for s in statistics), *results))
    return Traffic(flops, read, written, 1)


def _stages(statistics: Iterable[Statistic]) -> int:
    return 1 + max((s.stage for s in statistics), default=0)


def seconds(op: RowReduction, moved: Traffic, machine: Machine) -> Any:
    """As fast as Inductor's reductions, and what it costs to stand apart from their neighbours besides."""
    loop = efficiency(machine).reduction
    bandwidth = machine.memory_bandwidth * loop.memory
    memory = (moved.bytes_read + moved.bytes_written) / bandwidth
    if plan_of(op).block < op.n and _stages(schedule(op)[0]) == 1 and "full" in op.kinds:
        wide = sum(e.dtype.itemsize for e in op.extras if e.kind == "full")
        memory = memory + amount(op.m) * op.n * wide / (machine.memory_bandwidth * loop.again)
    severed = amount(op.apart) / bandwidth + (machine.launch_overhead if op.apart != 0 else 0.0)
    return maximum(moved.flops / machine.vector_flops, memory) + loop.latency + machine.launch_overhead + severed


# ---- source -----------------------------------------------------------------------------------------
def schedule(op: RowReduction) -> tuple[tuple[Statistic, ...], tuple[Value, ...]]:
    """The statistics that the results need, in the order in which they can be computed, and the results over them."""
    algebra = Algebra()
    statistics: list[Statistic] = []
    memo: dict[Value, Value] = {}

    def rewritten(value: Value) -> Value:
        if value not in memo:
            args = [rewritten(a) for a in value.args]
            if value.op in REDUCTIONS:
                needed = [v.attr("index") for v in args[0].walk() if v.op == "acc"]
                stage = max((statistics[i].stage + 1 for i in needed), default=0)
                memo[value] = algebra.make("acc", index=len(statistics))
                statistics.append(Statistic(value.op, args[0], stage))
            else:
                memo[value] = algebra.make(value.op, *args, **dict(value.attrs))
        return memo[value]

    results = tuple(rewritten(r) for r in op.results)
    return tuple(statistics), results


def write(op: RowReduction, plan: Plan) -> str:
    """The text of a module with the kernel `NAME`: its arguments are `argument_names`."""
    return _Writer(op, plan).write()


def argument_names(op: RowReduction) -> tuple[list[str], list[str], list[str]]:
    """Tensors (the outputs last), the number of rows, and constexprs."""
    tensors = [f"extra{j}" for j in range(len(op.extras))] + [f"out{i}" for i in range(len(op.results))]
    return tensors, ["M"], [f"stride{j}" for j, s in enumerate(op.strides) if s] + ["N", "ROWS", "BLOCK"]


class _Writer:
    def __init__(self, op: RowReduction, plan: Plan) -> None:
        self.op, self.plan = op, plan
        self.whole = plan.block >= op.n
        self.even = op.n % plan.block == 0
        self.statistics, self.results = schedule(op)
        self.lines: list[str] = []
        self.level = 1
        self.prints = 0

    def emit(self, *lines: str) -> None:
        self.lines += ["    " * self.level + line for line in lines]

    def write(self) -> str:
        tensors, numbers, constants = argument_names(self.op)
        self.emit("m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]", "m_in = m < M")
        for j, extra in enumerate(self.op.extras):
            if extra.kind == "row":
                self.emit(f"e{j} = tl.load(extra{j} + m, mask=m_in, other=0.0).to(tl.float32)")
            elif extra.kind == "scalar":
                self.emit(f"e{j} = tl.load(extra{j}).to(tl.float32)")
        if self.whole:
            self.columns("tl.arange(0, BLOCK)", (*(s.value for s in self.statistics), *self.results))
            for index in range(len(self.statistics)):
                self.reduce(index, self.taken(index))
        else:
            for stage in sorted({s.stage for s in self.statistics}):
                self.walk([i for i, s in enumerate(self.statistics) if s.stage == stage])
            self.loop([r for r, k in zip(self.results, self.op.kinds, strict=True) if k == "full"])
        if self.whole or "full" in self.op.kinds:
            self.store("full")
        self.level = 1
        self.store("row")
        head = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {NAME}("]
        head += [f"    {a}," for a in (*tensors, *numbers, *(f"{c}: tl.constexpr" for c in constants))] + ["):"]
        return "\n".join([*head, *self.lines]) + "\n"

    def walk(self, indices: list[int]) -> None:
        """One pass over a long row for the statistics of one stage."""
        for i in indices:
            start = 'float("-inf")' if self.statistics[i].op == "amax" else "0.0"
            self.emit(f"total{i} = tl.full((ROWS, BLOCK), {start}, tl.float32)")
        self.loop([self.statistics[i].value for i in indices])
        for i in indices:
            part = self.taken(i)
            larger = f"tl.where(({part} > total{i}) | ({part} != {part}), {part}, total{i})"
            self.emit(f"total{i} = {larger if self.statistics[i].op == 'amax' else f'total{i} + {part}'}")
        self.level = 1
        for i in indices:
            self.reduce(i, f"total{i}")

    def loop(self, values: list[Value]) -> None:
        if values:
            self.emit("for start in range(0, N, BLOCK):")
            self.level += 1
            self.columns("start + tl.arange(0, BLOCK)", values)

    def columns(self, n: str, values: Any) -> None:
        """Loads what `values` read along the row."""
        self.emit(f"n = ({n})[None, :]")
        if not self.even:
            self.emit("n_in = n < N")
        needed = {v.attr("index") for value in values for v in value.walk() if v.op == "extra"}
        for j in sorted(needed):
            extra = self.op.extras[j]
            if extra.kind == "full":
                place = f"extra{j} + m * stride{j} + n"
                self.emit(f"e{j} = tl.load({place}, mask={self.inside()}, other=0.0).to(tl.float32)")
            elif extra.kind == "col":
                mask = "" if self.even else ", mask=n_in, other=0.0"
                self.emit(f"e{j} = tl.load(extra{j} + n{mask}).to(tl.float32)")

    def inside(self) -> str:
        return "m_in" if self.even else "m_in & n_in"

    def printed(self, value: Value) -> str:
        """Statements that compute `value`, and its name."""
        self.prints += 1
        leaf = lambda v: f"{'s' if v.op == 'acc' else 'e'}{v.attr('index')}"  # noqa: E731
        lines, name = print_pointwise(value, leaf, f"t{self.prints}_")
        self.emit(*lines)
        return name

    def taken(self, index: int) -> str:
        """What the `index`-th statistic is taken of, in the shape of the tile; beyond the row, what changes nothing."""
        statistic = self.statistics[index]
        tile = f"tl.broadcast_to({self.printed(statistic.value)}, (ROWS, BLOCK))"
        if not self.even:
            neutral = 'float("-inf")' if statistic.op == "amax" else "0.0"
            tile = f"tl.where(n_in, {tile}, {neutral})"
        self.emit(f"v{index} = {tile}")
        return f"v{index}"

    def reduce(self, index: int, tile: str) -> None:
        statistic = self.statistics[index]
        if statistic.op == "amax":  # tl.max drops what is not a number, torch keeps it
            self.emit(f"poisoned = tl.sum(({tile} != {tile}).to(tl.int32), 1, keep_dims=True) > 0")
            self.emit(f's{index} = tl.where(poisoned, float("nan"), tl.max({tile}, 1, keep_dims=True))')
        else:
            self.emit(f"s{index} = tl.sum({tile}, 1, keep_dims=True){' / N' if statistic.op == 'mean' else ''}")

    def store(self, kind: str) -> None:
        for i, (result, has) in enumerate(zip(self.results, self.op.kinds, strict=True)):
            if has != kind:
                continue
            name = self.printed(result)
            if kind == "row":
                self.emit(f"tl.store(out{i} + m, tl.broadcast_to({name}, (ROWS, 1)), mask=m_in)")
            else:
                tile = f"tl.broadcast_to({name}, (ROWS, BLOCK))"
                self.emit(f"tl.store(out{i} + m * N + n, {tile}, mask={self.inside()})")


# ---- emission ---------------------------------------------------------------------------------------
def emit(op: RowReduction, plan: Plan, builder: Builder, site: Site) -> tuple[Node, ...]:
    """Adds the kernel; returns the nodes that take the places of the site's outputs."""
    values = [node.meta["val"] for node in site.outputs]
    outputs = [
        builder.empty(list(v.shape), dtype, v.device) for v, dtype in zip(values, op.out_dtypes, strict=True)
    ]  # fmt: skip
    return launch(op, plan, builder, site.operands, outputs)


def launch(
    op: RowReduction, plan: Plan, builder: Builder, operands: Sequence[Node], outputs: Sequence[Node],
    lets: bool = False,
) -> tuple[Node, ...]:  # fmt: skip
    """Adds the kernel, which writes `outputs`; returns what it has written. `lets`: see `Builder.triton`."""
    tensors, _, _ = argument_names(op)
    arguments: dict[str, Any] = dict(zip(tensors, [*operands, *outputs], strict=True))
    arguments |= {"M": op.m, **constexprs(op, plan)}
    names = tensors[len(op.extras) :]
    launched = builder.triton(
        load_kernel(write(op, plan), NAME), [builder.ceil_div(op.m, plan.rows)], arguments, names,
        num_warps=plan.num_warps, num_stages=1, lets=lets,
    )  # fmt: skip
    return tuple(launched[name] for name in names)


def constexprs(op: RowReduction, plan: Plan) -> dict[str, int]:
    strides = {f"stride{j}": s for j, s in enumerate(op.strides) if s}
    return {**strides, "N": op.n, "ROWS": plan.rows, "BLOCK": plan.block}
