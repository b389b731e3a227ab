"""RMSNorm and gated MLP from one row to thousands: every plan beside what the judge chooses.

python -m benchmarks.matmul_family --shapes 8B --m 1,16,64 --json part.json    a part of the sweep
python -m benchmarks.matmul_family --merge part.json more.json --json all.json --plot all.svg

Shapes (K, N) are those of Llama 1B and 8B, and of a shard of 70B on eight devices; float32 is with TF32. Columns in
µs: eager, Inductor, max-autotune where asked for, ours (whatever the judge chose), the best of the generated kernels,
the floor (bytes and flops at the machine's reached rates) and the prediction for ours. A kernel that takes its input
normalised is timed with the norm as Inductor computes it. Regret is the time of ours over the best of all columns.

Points are compiled by several processes at the same time; then they measure one after the other. All columns of a row
are of one process. max-autotune is compiled twice: with the others, to have its kernels, and in its turn, to choose
among them alone on the device.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusion_compiler
from fusion_compiler.cost.efficiency import dtype_name, efficiency
from fusion_compiler.cost.roofline import matmul_traffic
from fusion_compiler.fused import MatmulFamily, RowNorm
from fusion_compiler.lowering.triton_codegen import matmul
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.machine import machine

from . import harness, parts
from .gated_mlp import EPS, gated_mlp
from .matmul_kernels import SWIGLU, Variant, compiled, launcher

SHAPES = {"1B": (2048, 8192), "8B": (4096, 14336), "70B/8": (8192, 3584)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
REGRET = 1.05
PLAUSIBLE = 1.3  # of the fastest predicted of a form: with the norm folded in, or without
CLOSE = 1.15  # of the fastest of both
ROUNDS = 15


@dataclass(frozen=True)
class Point:
    shape: str
    m: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        dtype = "" if self.dtype == torch.bfloat16 else f" {dtype_name(self.dtype)}"
        return f"{self.shape} M={self.m}{dtype}"

    def op(self, norm: bool) -> MatmulFamily:
        k, n = SHAPES[self.shape]
        folded = RowNorm("rms", EPS, has_weight=True) if norm else None
        return MatmulFamily(self.m, k, n, 2, folded, SWIGLU, (), self.dtype, self.dtype)


@dataclass
class Kernel:
    """A generated kernel at a point; seconds, with the norm where it does not fold it."""

    plan: str
    folded: bool
    predicted: float
    seconds: float = 0.0
    error: float = 0.0
    resources: dict[str, int] = field(default_factory=dict)
    failure: str = ""


def floor_seconds(moved: float, flops: float, dtype: torch.dtype) -> float:
    """As everywhere; the matrix units multiply float32 as TF32, at half the rate of 16 bits."""
    if dtype == torch.float32:
        dtype, flops = torch.bfloat16, 2 * flops
    return harness.floor_seconds(moved, flops, dtype)


def norm_only(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


# ---- one point ----------------------------------------------------------------------------------------------------
def prepare(args: argparse.Namespace, point: Point) -> Callable[[], dict[str, Any]]:
    torch.set_float32_matmul_precision("high")
    k, n = SHAPES[point.shape]
    device, dtype = torch.device("cuda"), point.dtype
    torch.manual_seed(0)

    def make() -> tuple[Tensor, ...]:
        x = torch.randn(point.m, k, device=device, dtype=dtype)
        norm = torch.rand(k, device=device, dtype=dtype) + 0.5
        return x, norm, *(torch.randn(n, k, device=device, dtype=dtype) / k**0.5 for _ in range(2))

    inputs = harness.rotated(make, device)
    traffic = matmul_traffic(point.op(norm=True))
    moved = float(traffic.bytes_read + traffic.bytes_written)
    row = harness.Row(point.name, floor=floor_seconds(moved, float(traffic.flops), dtype))
    reference = gated_mlp(*(t.double() for t in inputs[0]))
    columns = {"eager": gated_mlp, "inductor": harness.compiled(gated_mlp, "inductor")}
    columns["ours"] = harness.compiled(gated_mlp, "fusion_compiler")
    tuned = args.max_autotune and point.m in map(int, args.tuned.split(","))
    if tuned:
        parts.tuned(gated_mlp, inputs[0])
    for name, fn in columns.items():
        row.error[name] = harness.relative_error(fn(*inputs[0]), reference)
    report = fusion_compiler.last_report()
    chosen = next(d for d in report.decisions if d.pattern == "gated_mlp") if report else None
    if chosen is not None:
        row.predicted, row.verdict = (chosen.after or chosen.before).seconds, chosen.kernel or chosen.verdict
    before = harness.compiled(norm_only, "inductor")
    planned = contenders(point, args.plans)
    kernels = [prepared(point.op(norm), plan, before, inputs, reference) for norm, plan in planned]

    def turn() -> dict[str, Any]:
        if tuned:
            columns["max-autotune"] = parts.tuned(gated_mlp, inputs[0])
            row.error["max-autotune"] = harness.relative_error(columns["max-autotune"](*inputs[0]), reference)
        timers = {name: harness.graph_timer(fn, inputs) for name, fn in columns.items()}
        for kernel, call in kernels:
            if call is not None:
                timers[kernel.plan] = harness.graph_timer(call, inputs)
        samples = harness.interleaved(timers, args.rounds)
        times = {name: statistics.median(values) for name, values in samples.items()}
        row.seconds = {name: times[name] for name in columns}
        for kernel, _ in kernels:
            kernel.seconds = times.get(kernel.plan, 0.0)
        speedups = {name: harness.ratio(samples, name, "ours") for name in columns if name != "ours"}
        row.speedup = {name: value for name, value in speedups.items() if value is not None}
        used = next((k.resources for k, _ in kernels if f"triton {k.plan.split()[0]}" == row.verdict), {})
        place = {"shape": point.shape, "m": point.m, "dtype": dtype_name(point.dtype), "resources": used}
        return {**asdict(row), **place, "kernels": [asdict(kernel) for kernel, _ in kernels]}

    return turn


def contenders(point: Point, most: int) -> list[tuple[bool, Plan]]:
    """The plans predicted fastest, with the norm folded in and without, where that is not clearly slower."""
    here = machine()
    loop, moved = efficiency(here).reduction, 2 * point.m * SHAPES[point.shape][0] * point.dtype.itemsize
    before = moved / (here.memory_bandwidth * loop.memory) + loop.latency + here.launch_overhead
    timed = []
    for norm in (True, False):
        op = point.op(norm)
        plans = matmul.plausible_plans(op, here, point.m, within=PLAUSIBLE)[:most]
        timed += [(Variant(op, plan).predicted() * 1e-6 + (0.0 if norm else before), norm, plan) for plan in plans]
    least = min((seconds for seconds, _, _ in timed), default=0.0)
    return [(norm, plan) for seconds, norm, plan in timed if seconds <= CLOSE * least]


def prepared(
    op: MatmulFamily, plan: Plan, before: harness.Call, inputs: harness.Inputs, reference: Tensor
) -> tuple[Kernel, harness.Call | None]:
    """A kernel with its error, and the call that runs it on the inputs of the formula; `before` computes the norm."""
    variant, folded = Variant(op, plan), op.norm is not None
    kernel = Kernel(f"{plan.label}{'' if folded else ' after norm'}", folded, variant.predicted() * 1e-6)
    kernel.resources, kernel.failure = compiled(variant)
    if kernel.failure:
        return kernel, None
    run = launcher(op, plan, variant.source())

    def call(x: Tensor, weight: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty(op.m, op.n, device=x.device, dtype=op.out_dtype)
        run(x=x if folded else before(x, weight), norm_weight=weight, w0=gate, w1=up, out=out)
        return out

    kernel.error = harness.relative_error(call(*inputs[0]), reference)
    return kernel, call


# ---- all points -------------------------------------------------------------------------------------------------
def sweep(points: Sequence[Point], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    preparing = functools.partial(prepare, args)
    for row in parts.measured(points, preparing, args.jobs, args.seconds, ["benchmarks.matmul_kernels"]):
        rows.append(row)
        print(line(row), flush=True)
        harness.write_json(args.json, torch.device("cuda"), rows)
    return rows


# ---- tables -----------------------------------------------------------------------------------------------------
def best_kernel(row: dict[str, Any]) -> dict[str, Any] | None:
    return min((k for k in row["kernels"] if k["seconds"] > 0), key=lambda k: float(k["seconds"]), default=None)


def regret(row: dict[str, Any]) -> float:
    """Ours over the best of what it could have been: a generated kernel, or Inductor's as they are."""
    best = best_kernel(row)
    times = [row["seconds"]["ours"], row["seconds"]["inductor"], *([best["seconds"]] if best else [])]
    return float(row["seconds"]["ours"] / min(times))


def line(row: dict[str, Any]) -> str:
    best = best_kernel(row)
    times = " ".join(f"{name} {harness.microseconds(s)}" for name, s in row["seconds"].items())
    told = f"best {best['plan']} {harness.microseconds(best['seconds'])}" if best else "no kernel"
    return (
        f"{row['name']:14s} {times} floor {harness.microseconds(row['floor'])} "
        f"predicted {harness.microseconds(row['predicted'])} [{row['verdict']}] {told} regret {regret(row):.3f}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    header = ["µs", *columns, "best kernel", "floor", "predicted", "ours/floor", "vs max-autotune", "regret", "ours is"]
    header += ["registers, spilled and shared bytes"]
    lines = []
    for row in rows:
        best, ours = best_kernel(row), row["seconds"]["ours"]
        lines.append(
            [row["name"], *(harness.microseconds(row["seconds"].get(c)) for c in columns)]
            + [harness.microseconds(best["seconds"] if best else None), harness.microseconds(row["floor"])]
            + [harness.microseconds(row["predicted"]), f"{ours / row['floor']:.2f}"]
            + [f"{row['speedup']['max-autotune']:.2f}×" if "max-autotune" in row["speedup"] else "–"]
            + [f"{regret(row):.3f}", row["verdict"], ", ".join(map(str, row["resources"].values())) or "–"]
        )
    good = sum(regret(row) <= REGRET for row in rows)
    return f"{harness.markdown(header, lines)}\n\nregret ≤ {REGRET} in {good} of {len(rows)} points"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Times over the floor, one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = [shape for shape in SHAPES if any(row["shape"] == shape for row in rows)]
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4), sharey=True, squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        own = sorted((row for row in rows if row["shape"] == shape), key=lambda row: int(row["m"]))
        for name in dict.fromkeys(name for row in own for name in row["seconds"]):
            measured = [(row["m"], row["seconds"][name] / row["floor"]) for row in own if name in row["seconds"]]
            axis.plot(*zip(*measured, strict=True), marker=".", label=name)
        axis.plot([r["m"] for r in own], [r["predicted"] / r["floor"] for r in own], "k:", label="predicted for ours")
        axis.set_xscale("log", base=2)
        axis.set(title=f"{shape} ({SHAPES[shape][0]} → {SHAPES[shape][1]})", xlabel="rows", ylabel="time / floor")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = harness.arguments(__doc__, rounds=ROUNDS)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of which models (default %(default)s)")
    parser.add_argument("--m", default=",".join(map(str, ROWS)), help="values of M (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tuned", default="2,16,64,256,1024", help="M with --max-autotune (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=8, help=parts.JOBS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=parts.SECONDS)
    parser.add_argument("--plans", type=int, default=4, help="generated kernels to time, of each kind (default 4)")
    parser.add_argument("--merge", nargs="+", type=Path, help=parts.MERGE)
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the times over the floor")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    points = {p.name: p for p in (Point(s, int(m), dtype) for m in args.m.split(",") for s in args.shapes.split(","))}
    if args.merge:
        order = list(SHAPES)
        rows = parts.merged(args.merge, lambda row: (row["dtype"], order.index(row["shape"]), row["m"]), args.json)
    elif torch.cuda.is_available():
        rows = sweep([points[name] for name in harness.chosen(list(points), args.only)], args)
    else:
        raise SystemExit("the sweep needs a CUDA device; --merge shows figures measured before")
    if args.plot:
        plot(rows, args.plot)
    print(table(rows))


if __name__ == "__main__":
    main()
