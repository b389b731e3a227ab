"""Candidates for the matmul family: generated Triton kernels, emitted as nodes of the graph."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import TYPE_CHECKING, Any

import sympy
import torch

from ... import dependent_launch
from ...candidates import Candidate, Unavailable
from ...cost.amounts import amount
from ...cost.roofline import matmul_traffic
from ...fused import MatmulFamily, MatmulGroup, Site
from ...machine import Machine
from ...reasons import ON_CPU
from ...splice import load_kernel
from . import footprint, predict, tiles
from .aot import constexprs
from .plans import Plan
from .pointwise import unsupported
from .source import facts, write

if TYPE_CHECKING:
    from torch.fx import Node

    from ...splice import Builder

Matmuls = MatmulFamily | MatmulGroup
# where M is symbolic, the plans that are best for so many rows are offered: for any number if tiled, else up to so many
ROW_LIMITS = (4, 16, 32, 64, 128, 512, 4096)
ACTIVATED_ROWS = 16  # beyond, an activation is computed once, by a kernel of its own
WEIGHTS_FIRST = ("swap", "sliced", "tile")  # kinds that can wait for x in the loop
PLAUSIBLE = 4  # plans worth a measurement
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def candidates(op: Matmuls, machine: Machine) -> list[Candidate] | Unavailable:
    """The best plan of each kind for each range of M, cheapest first; for a known M also what is predicted to be nearly
    as fast as the best, for autotuning to choose from."""
    refusal = _refusal(op, machine)
    if refusal is not None:
        return Unavailable(refusal)
    m = amount(op.m)
    planned: list[tuple[Plan, Any]]
    if isinstance(m, int):
        several = [*best_plans(op, machine, m), *plausible_plans(op, machine, m)[:PLAUSIBLE]]
        planned = [(plan, m) for plan in dict.fromkeys(several)]
    else:
        likely = ((plan, limit) for limit in ROW_LIMITS for plan in best_plans(op, machine, limit))
        # how blocks share tiles is part of the text, so these need to know M
        likely = ((plan, limit) for plan, limit in likely if plan.kind != "shared")
        planned = list(dict.fromkeys((plan, m if plan.kind == "tile" else limit) for plan, limit in likely))
    found = [_candidate(op, machine, plan, rows) for plan, rows in planned]
    if not found:
        return Unavailable(_no_plan(op, machine))
    few = dict.fromkeys(sympy.sympify(m).free_symbols, 2)
    return sorted(found, key=lambda c: float(sympy.sympify(c.seconds).subs(few)))


def plausible_plans(op: Matmuls, machine: Machine, rows: int, within: float = 1.1) -> list[Plan]:
    """The plans predicted within a factor of the fastest, fastest first."""
    timed = sorted(_predicted(op, machine, rows), key=lambda pair: pair[0])
    return [plan for seconds, plan in timed if seconds <= within * timed[0][0]]


def best_plans(op: Matmuls, machine: Machine, rows: int) -> list[Plan]:
    """The fastest predicted plan of each kind for up to `rows` rows."""
    best: dict[str, tuple[float, Plan]] = {}
    for seconds, plan in _predicted(op, machine, rows):
        if plan.kind not in best or seconds < best[plan.kind][0]:
            best[plan.kind] = (seconds, plan)
    return [plan for _, plan in best.values()]


def _predicted(op: Matmuls, machine: Machine, rows: int) -> list[tuple[float, Plan]]:
    moved = float(sympy.sympify(_moved(op)).subs(amount(op.m), rows))
    whole = op.whole
    # blocks that share tiles or K are counted for one result
    single = ("shared", "split")
    plans = (p for p in predict.plans(whole, machine, rows) if p.kind not in single or len(op.parts) == 1)
    if whole.activation:
        # with the tile of x in its registers as well, a thread of the other kinds has too few of them
        plans = (p for p in plans if p.kind in ("gemv", "sliced"))
    if inexact(op.dtype):
        plans = (p for p in plans if p.kind == "gemv")
    return [(predict.seconds(whole, plan, machine, moved, rows), plan) for plan in plans]


def _moved(op: Matmuls) -> Any:
    traffic = matmul_traffic(op)
    return traffic.bytes_read + traffic.bytes_written


def _refusal(op: Matmuls, machine: Machine) -> str | None:
    if machine.kind == "cpu":
        return ON_CPU
    if op.dtype not in DTYPES:
        return f"the generator makes kernels for bfloat16, float16 and float32, not {op.dtype}"
    if op.dtype == torch.bfloat16 and op.dtype not in machine.flops:
        return f"{machine.name} ({machine.arch}) has no bfloat16 units; use float16 there"
    stored = next((part.computed_from for part in op.parts if part.computed_from is not None), None)
    if stored is not None:
        return (
            f"its weight is computed from {stored} in the graph: these kernels read 16 and 32 bits, and Inductor can "
            f"read it as it is stored; keep the weight in {op.dtype} if it fits"
        )
    if not all(isinstance(amount(size), int) for part in op.parts for size in (part.k, part.n)):
        return "K and N are symbolic: mark only the rows of the input as dynamic"
    m = amount(op.m)
    if op.whole.activation and isinstance(m, int) and m > ACTIVATED_ROWS:
        return (
            f"M = {m}: every block of columns would compute the activation again, which costs more than a kernel of "
            f"its own from {ACTIVATED_ROWS + 1} rows on"
        )
    values = (v for part in op.parts for v in (part.epilogue, part.activation) if v is not None)
    return next(filter(None, map(unsupported, values)), None)


def _no_plan(op: Matmuls, machine: Machine) -> str:
    m = amount(op.m)
    if isinstance(m, int) and m > predict.MOST_ROWS:
        why = tiles.refusal(op.whole, machine, m)
        return f"M = {m}: beyond {predict.MOST_ROWS} rows kernels are tiled, and {why or 'no tile fits this machine'}"
    return inexact(op.dtype) or f"no plan for {m} rows of {op.dtype} fits {machine.name} ({machine.arch})"


def _candidate(op: Matmuls, machine: Machine, plan: Plan, rows: Any) -> Candidate:
    """`rows`: the most that the plan is to serve, or the symbolic number there is where it serves any."""
    m = amount(op.m)
    symbolic = not isinstance(m, int)
    return Candidate(
        name=f"triton_{plan.kind}",
        kernel=f"triton {plan.label}",
        traffic=matmul_traffic(op),
        seconds=predict.seconds(op.whole, plan, machine, _moved(op) if symbolic else float(_moved(op)), rows),
        emit=functools.partial(emit, op, plan),
        once=predict.constants().zeroing if plan.kind in ("split", "shared") else 0.0,
        valid=sympy.Le(m, rows) if symbolic and rows != m else True,
        error=predict.error(op, plan, machine),
        details=(
            ("rows", plan.rows), ("block_n", plan.block_n), ("block_k", plan.block_k), ("num_warps", plan.num_warps),
            ("num_stages", plan.num_stages), *([] if symbolic else [("blocks", programs(op, plan))]),
            ("blocks_per_sm", footprint.resident_blocks(op.whole, plan, machine)),
        ),
    )  # fmt: skip


def float32_precision() -> str:
    """What a float32 matmul may be computed in, as torch has been told."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def imprecise(dtype: torch.dtype) -> str:
    """Why `tl.dot` is not used for products of `dtype`; empty where it is.

    It adds up float32 in one chain along K. Measured on an H200 at K = 520: 2.5 times the rounding error of eager.
    """
    if dtype != torch.float32 or float32_precision() == "tf32":
        return ""
    return (
        "float32 products of tiles are added up in one chain, whose rounding errors are more than twice eager's; use "
        "half precision, or allow TF32 (torch.set_float32_matmul_precision('high'))"
    )


def inexact(dtype: torch.dtype) -> str:
    """Why a linear of `dtype` is not computed by `tl.dot`; empty where it is.

    Measured on an H200 with TF32, K = 2048 and 4096: an error of 1.6e-3, the library's 4.2e-4.
    """
    if dtype != torch.float32 or interpreted():
        return imprecise(dtype)
    return imprecise(dtype) or (
        "Triton cuts float32 operands off to TF32 where the library rounds them, and the errors add up to four times "
        "eager's; use half precision"
    )


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which knows no PTX and multiplies float32 in full."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def programs(op: Matmuls, plan: Plan) -> int:
    """How many programs a launch has: no block of columns belongs to two results."""
    return sum(plan.programs(int(op.m), int(part.n)) for part in op.parts)


def emit(op: Matmuls, plan: Plan, builder: Builder, site: Site, *, behind: bool = False) -> Node | tuple[Node, ...]:
    """Adds the kernel of `plan` to the graph; returns what takes the place of the output, or of each of several.
    `behind`: x is written by a kernel that lets this one in."""
    known = facts(op, plan, float32_precision())
    values = [output.meta["val"] for output in site.outputs]
    outs = [builder.empty(list(v.shape), p.out_dtype, v.device) for v, p in zip(values, op.parts, strict=True)]
    operands, strides = (_described if plan.tiled else _strided)(op, builder, site)
    if op.whole.activation:
        inputs = _inputs(op.whole, builder, operands)
        operands[: op.whole.head] = [node for _, node in inputs]
        known = dataclasses.replace(known, input_strides=tuple(stride for stride, _ in inputs))
    if behind and plan.kind in WEIGHTS_FIRST and dependent_launch.supported(values[0].device):
        # nothing in this graph writes what comes from outside, and all that ran before has ended
        outside = all(node.op in ("placeholder", "get_attr") for node in operands[1:])
        known = dataclasses.replace(known, weights_first=outside)
    source = write(op, plan, known)
    workspace = _workspace(op, plan, builder, values[0].device)
    arguments: dict[str, Any] = dict(zip(source.tensors, [*operands, *workspace, *outs], strict=True))
    if source.runtime_m:
        arguments["M"] = op.m
    arguments |= constexprs(op, plan, *strides)
    columns = sum(math.ceil(int(part.n) / plan.block_n) for part in op.parts)
    rows = builder.ceil_div(op.m, plan.rows) if plan.kind == "tile" else 1
    columns *= plan.splits
    blocks = plan.blocks or (rows * columns if isinstance(rows, int) else builder.call(operator.mul, rows, columns))
    written = [*source.outputs, *(["partial"] if workspace else [])]
    launched = builder.triton(
        load_kernel(source.text, source.name), [blocks], arguments, written,
        num_warps=plan.num_warps, num_stages=plan.num_stages, blocks=dict(source.blocks),
        waits=not known.weights_first,
    )  # fmt: skip
    made = tuple(launched[name] for name in source.outputs)
    return made if len(made) > 1 else made[0]


def _weights(op: Matmuls) -> list[int]:
    """The positions of the weights among a site's operands."""
    found: list[int] = []
    at = op.whole.head
    for part in op.parts:
        found += range(at, at + part.weights)
        at += part.weights + len(part.extras)
    return found


def _strided(op: Matmuls, builder: Builder, site: Site) -> tuple[list[Node], tuple[int, ...]]:
    """The operands as tensors, with the distances between rows of x and of the weights."""
    operands, x_stride = list(site.operands), int(op.whole.k)
    if not op.whole.activation:
        x_stride, operands[0] = rows_of(builder, operands[0], int(op.whole.k))
    weights, strides = _weights(op), set()
    for i in range(len(op.whole.inputs) or 1, len(operands)):
        if i in weights:
            # a packed weight is passed whole: the kernel itself starts at its features
            stride, operands[i] = rows_of(builder, operands[i], int(operands[i].meta["val"].shape[-1]))
            strides.add(stride)
        else:
            operands[i] = builder.contiguous(operands[i])
    if len(strides) > 1:
        raise ValueError(f"the weights of {site.output.name} have row strides {sorted(strides)}; one kernel needs one")
    return operands, (x_stride, strides.pop())


def _described(op: Matmuls, builder: Builder, site: Site) -> tuple[list[Node], tuple[int, ...]]:
    """The operands as descriptors and tensors."""
    operands, weights = list(site.operands), _weights(op)
    operands[0] = builder.described(operands[0], (op.m, op.whole.k))
    for i in range(1, len(operands)):
        if i < weights[0]:
            operands[i] = builder.described(operands[i], (op.whole.k,))
        elif i in weights:
            *_, rows, columns = operands[i].meta["val"].shape
            operands[i] = _apart(op.whole, i - weights[0], builder, builder.reshape(operands[i], (rows, columns)))
            operands[i] = builder.described(operands[i], operands[i].meta["val"].shape)
        else:
            operands[i] = builder.contiguous(operands[i])
    return operands, ()


def _inputs(op: MatmulFamily, builder: Builder, operands: list[Node]) -> list[tuple[int, Node]]:
    """The inputs of an activation, each with the distance between its rows."""
    found = []
    for given, node in zip(op.inputs, operands, strict=False):
        whole = given.kind == "full"
        found.append(rows_of(builder, node, int(op.k)) if whole else (0, builder.contiguous(node)))
    return found


def _workspace(op: Matmuls, plan: Plan, builder: Builder, device: torch.device) -> list[Node]:
    """What blocks that share K leave for each other, and that they have; nothing for those that do not."""
    held = footprint.sums_left(op.whole, plan)
    if not held:
        return []
    return [builder.empty([held], torch.float32, device), builder.zeros(predict.ARRIVALS, torch.int32, device)]


def _apart(op: MatmulFamily, i: int, builder: Builder, weight: Node) -> Node:
    """The rows of the i-th weight, as a view where its features lie apart."""
    if op.feature_step == 1:
        return weight
    first, n = op.features[i], int(op.n)
    end = first + (n - 1) * op.feature_step + 1
    return builder.call(torch.ops.aten.slice.Tensor, weight, 0, first, end, op.feature_step)


def rows_of(builder: Builder, node: Node, columns: int) -> tuple[int, Node]:
    """(distance between rows, node) of a matrix with `columns` columns; copied where its rows are not evenly spaced."""
    value = node.meta["val"]
    if value.is_contiguous():
        return columns, node
    spread = [(size, stride) for size, stride in zip(value.shape, value.stride(), strict=True) if size != 1]
    if len(spread) == 2 and spread[1] == (columns, 1) and isinstance(spread[0][1], int):
        return spread[0][1], node
    if len(spread) == 1 and spread[0] == (columns, 1):
        return columns, node
    return columns, builder.contiguous(node)
