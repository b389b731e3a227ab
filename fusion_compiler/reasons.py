"""Why a verdict fell as it did, in a sentence with its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from .candidates import MARGIN, Candidate
from .cost.baseline import Plan
from .fused import Attention, FusedOp, MatmulFamily, RowReduction
from .machine import Machine
from .report import Work
from .report_text import duration, size

SEVERED = (
    "Inductor's kernel of the last of these operations does what follows too, which would be left a kernel of its own"
)
EMPTY = "the result is empty, so there is nothing to compute"
UNKNOWN = (
    "the size {} is known only when the graph runs (it depends on data, or is ragged), so no time can be predicted; "
    "torch._dynamo.mark_dynamic instead of mark_unbacked, or padding, gives it a value"
)
FEW_RANGES = "it is given up so that few ranges of sizes need a compilation of their own"
UNGUARDED = (
    "it pays for some sizes only, and this graph serves all: it is a backward graph, an exported program, or the last "
    "that torch._dynamo.config.recompile_limit allows, or mark_dynamic asked for all sizes between a least and a "
    "greatest; static sizes would fuse it, mark_dynamic with neither or with narrower ones may"
)
ON_CPU = "Triton kernels are generated for GPUs; on a CPU the graph stays with Inductor"
MEASURE = 'options={"autotune": True}'


def fused_reason(op: FusedOp, before: Work, after: Work, measured: bool) -> str:
    how = "measured" if measured else "predicted"
    saved = 100 * (1 - after.seconds / before.seconds)
    gains = []
    if after.launches < before.launches:
        gains.append(f"{before.launches} kernels become {after.launches}")
    if after.bytes < 0.99 * before.bytes:
        gains.append(f"{size(before.bytes - after.bytes)} less to move")
    if after.flops < 0.9 * before.flops:
        gains.append(f"{100 * (1 - after.flops / before.flops):.0f} % less arithmetic")
    better = "each row is read once and kept in registers" if isinstance(op, RowReduction) else "a faster kernel"
    return f"{how} {saved:.0f} % less time: {', '.join(gains) or better}"


def in_front_reason(after: Work, reading: tuple[str, Work] | None, refusals: Sequence[str]) -> str:
    """Why keys and values are dequantised or gathered in front of the kernel that was chosen: `reading` is the cheapest
    that reads what is stored."""
    if reading is None:
        return f"; what is stored is dequantised or gathered in front: {'; '.join(dict.fromkeys(refusals))}"
    name, work = reading
    return (
        f"; what is stored is dequantised or gathered in front, {duration(after.seconds)} in all: {name}, which would "
        f"read it as it is, is predicted at {duration(work.seconds)}"
    )


def kept_reason(
    op: FusedOp,
    machine: Machine,
    plan: Plan,
    before: Work,
    closest: tuple[str, Work] | None,
    unavailable: Sequence[str],
    invalid: Sequence[Candidate],
    measured: tuple[bool, bool] = (False, False),
    *,
    error: float = MARGIN,
    severed: bool = False,
    given_up: str = FEW_RANGES,
) -> str:
    """`closest` is the cheapest candidate that may be used here, with what it leaves to Inductor. `measured` tells
    whether its time and Inductor's are measured rather than predicted, `error` by how much its prediction may be off;
    `severed`, whether it ends where Inductor's kernel goes on; `given_up`, why it is kept where it would win."""
    cause = _cause(op, machine, plan, before) or (SEVERED if severed else "")
    if closest is None:
        if invalid:
            return f"no kernel for this size: {'; '.join(dict.fromkeys(f'{c.name} needs {c.valid}' for c in invalid))}"
        refusals = "; ".join(dict.fromkeys(unavailable)) or "no lowering handles this operation"
        return f"{cause + '; ' if cause else ''}no kernel for {machine.name}: {refusals}"
    name, after = closest
    change = 100 * (after.seconds / before.seconds - 1)
    how, rival = ("measured" if m else "predicted" for m in measured)
    rival = "" if rival == how else f" {rival}"
    figures = f"{name} is {how} at {duration(after.seconds)}, Inductor{rival} at {duration(before.seconds)}"
    if all(measured):
        return figures
    if change < -100 * error:
        figures += f"; {given_up}"
    elif change < 0:
        figures += f"; a gain of {-change:.0f} % is within the error of prediction ({MEASURE} would measure it)"
    return f"{cause}: {figures}" if cause and change >= 0 else figures


def _cause(op: FusedOp, machine: Machine, plan: Plan, before: Work) -> str:
    """What makes fusing unprofitable here, or "" where nothing stands out."""
    if not before.bytes:
        return ""
    if isinstance(op, Attention) and not op.vendor:  # a vendor's kernel writes no scores
        written = [k.traffic.bytes_written for k in plan.kernels if k.l2_bytes != 0]
        scores = max((w for w in written if isinstance(w, (int, float))), default=0)
        if 0 < scores <= machine.l2_bytes / 2:
            cache = f"{machine.l2_bytes / 2**20:.0f} MB {'cache' if machine.kind == 'cpu' else 'L2'}"
            return f"the scores ({size(scores)}) fit the {cache}, so fusing saves no memory traffic"
    if isinstance(op, RowReduction):
        if op.apart != 0:
            return "Inductor puts these nodes into one kernel with their neighbours, which a kernel of their own cannot"
        if before.launches <= 1:
            return "Inductor makes one kernel of these nodes too, which moves the same bytes"
    if isinstance(op, MatmulFamily):
        intensity, ridge = before.flops / before.bytes, machine.rate(op.dtype) / machine.memory_bandwidth
        if intensity > ridge:
            return (
                f"compute-bound: {intensity:.0f} flops per byte, where {machine.name} balances at {ridge:.0f}, "
                "so moving fewer bytes gains little"
            )
    return ""
