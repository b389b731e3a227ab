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
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor

import fusion_compiler
from fusion_compiler.cost.efficiency import dtype_name
from fusion_compiler.cost.roofline import matmul_traffic
from fusion_compiler.fused import MatmulFamily, RowNorm
from fusion_compiler.lowering.triton_codegen import matmul
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.machine import machine

from . import harness
from .gated_mlp import EPS, gated_mlp
from .matmul_kernels import SWIGLU, Variant, compiled, launcher

SHAPES = {"1B": (2048, 8192), "8B": (4096, 14336), "70B/8": (8192, 3584)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
COMPILERS = ("torch._inductor.compile_fx", "torch._inductor.codegen.triton", "triton.compiler")
REGRET = 1.05
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


# ---- some points, in a process of their own -----------------------------------------------------------------------
def work(points: Sequence[Point], args: argparse.Namespace, pipe: Connection) -> None:
    """Prepares its points, waits for its turn, measures one after the other and sends the figures (or what failed)."""
    turns: dict[Point, Callable[[], dict[str, Any]]] = {}
    # every point adds a specialisation of the same function, none of which may fall back to eager
    torch._dynamo.config.recompile_limit = 8 * len(points)
    torch.set_float32_matmul_precision("high")
    with torch.no_grad():
        for point in points:
            try:
                turns[point] = prepare(point, args)
            except Exception:
                pipe.send(f"{point.name}: {traceback.format_exc()[-1500:]}")
        pipe.send(None)
        pipe.recv()
        for point, turn in turns.items():
            try:
                pipe.send(turn())
            except Exception:
                pipe.send(f"{point.name}: {traceback.format_exc()[-1500:]}")
    pipe.send(None)


def prepare(point: Point, args: argparse.Namespace) -> Callable[[], dict[str, Any]]:
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
        tune(gated_mlp, inputs[0])
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
            columns["max-autotune"] = tune(tuned_alone, inputs[0])
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


def tune(fn: harness.Call, inputs: tuple[Any, ...]) -> harness.Call:
    """`fn` under max-autotune, with the choices made now: none comes from a run before."""
    run = harness.compiled(fn, "inductor", mode="max-autotune-no-cudagraphs")
    with torch._inductor.config.patch(fx_graph_cache=False, autotune_local_cache=False):
        run(*inputs)
    return run


def tuned_alone(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """A function of its own, because Dynamo would find the one compiled before."""
    return gated_mlp(x, norm, gate, up)


def contenders(point: Point, most: int) -> list[tuple[bool, Plan]]:
    """The plans predicted fastest, with the norm folded in and without."""
    return [
        (norm, plan)
        for norm in (True, False)
        for plan in matmul.plausible_plans(point.op(norm), machine(), point.m, within=1.3)[:most]
    ]


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
    # modules are imported once; whether there is a device must be asked such that forked processes can still use it
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.matmul_kernels", *COMPILERS])
    running, rows = [], list[dict[str, Any]]()
    jobs, args.began = min(args.jobs, len(points)), time.time()
    # several processes compile already; a pool in each of them would only get in the way
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    for first in range(jobs):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=work, args=(points[first::jobs], args, theirs), daemon=True)
        process.name = ", ".join(point.name for point in points[first::jobs])
        process.start()
        running.append((ours, process))
    prepared = [(pipe, process) for pipe, process in running if ready(pipe, process, args.began + args.seconds)]
    print(f"prepared in {time.time() - args.began:.0f} s", file=sys.stderr, flush=True)
    for pipe, process in prepared:
        pipe.send("your turn")
        for figures in iter(pipe.recv, None):
            if isinstance(figures, dict):
                rows.append(figures)
                print(line(figures), flush=True)
                harness.write_json(args.json, torch.device("cuda"), rows)
            else:
                print(figures, file=sys.stderr, flush=True)
        process.join()
    return rows


def ready(pipe: Connection, process: BaseProcess, until: float) -> bool:
    """Whether a process has prepared its points by then; if not, it is ended, since it would disturb the others."""
    while pipe.poll(None if until == math.inf else max(0.0, until - time.time())):
        problem = pipe.recv()
        if problem is None:
            return True
        print(problem, file=sys.stderr, flush=True)
    print(f"{process.name}: not prepared in time", file=sys.stderr, flush=True)
    process.terminate()
    return False


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
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="give up points that are not prepared by then")
    parser.add_argument("--plans", type=int, default=4, help="generated kernels to time, of each kind (default 4)")
    parser.add_argument("--merge", nargs="+", type=Path, help="read figures measured before instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the times over the floor")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    points = {p.name: p for p in (Point(s, int(m), dtype) for m in args.m.split(",") for s in args.shapes.split(","))}
    if args.merge:
        parts = [json.loads(path.read_text()) for path in args.merge]
        known = {row["name"]: {**row, "part": i} for i, part in enumerate(parts) for row in part["rows"]}
        order = list(SHAPES)
        rows = sorted(known.values(), key=lambda row: (row["dtype"], order.index(row["shape"]), row["m"]))
        if args.json:
            measured = [{key: part[key] for key in part if key != "rows"} for part in parts]
            args.json.write_text(json.dumps({"parts": measured, "rows": rows}, indent=1) + "\n")
    elif torch.cuda.is_available():
        rows = sweep([points[name] for name in harness.chosen(list(points), args.only)], args)
    else:
        raise SystemExit("the sweep needs a CUDA device; --merge shows figures measured before")
    if args.plot:
        plot(rows, args.plot)
    print(table(rows))


if __name__ == "__main__":
    main()
