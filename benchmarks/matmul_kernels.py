"""Sweep of plans for the generated matmul-family kernels: correctness, time, and what the cost model predicted.

    PYTHONPATH=. python3 benchmarks/matmul_kernels.py --out results.json [--cases mlp,qkv] [--rows 1,16]

Every plan that the cost model considers is compiled first, in parallel and without touching the device. Times are
medians of CUDA-graph replays over copies of the weights that together exceed 256 MB, so that L2 never holds them.
`floor` is the bytes over the machine's copy bandwidth; reading alone is a little faster than copying, so a large
kernel can come out below it. Without a device the script stops after compiling.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fusion_compiler.algebra import Algebra
from fusion_compiler.cost.roofline import matmul_traffic
from fusion_compiler.fused import MatmulFamily, RowNorm
from fusion_compiler.lowering.triton_codegen import matmul, predict
from fusion_compiler.lowering.triton_codegen.aot import compile_kernel, constexprs, resources
from fusion_compiler.lowering.triton_codegen.footprint import sums_left
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.lowering.triton_codegen.source import facts, write
from fusion_compiler.lowering.triton_codegen.writer import KernelSource
from fusion_compiler.machine import TABLE
from fusion_compiler.splice import load_kernel

MACHINE = TABLE["h200"]
ALGEBRA = Algebra()
PRODUCT = ALGEBRA.make("acc", index=0)
SWIGLU = ALGEBRA.mul(ALGEBRA.unary("silu", PRODUCT), ALGEBRA.make("acc", index=1))
RMS, LAYER = RowNorm("rms", 1e-5, True), RowNorm("layer", 1e-5, True, True)
ROTATE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    k: int
    n: int
    weights: int
    norm: RowNorm
    rows: tuple[int, ...]

    def op(self, m: int) -> MatmulFamily:
        epilogue = SWIGLU if self.weights == 2 else PRODUCT
        return MatmulFamily(m, self.k, self.n, self.weights, self.norm, epilogue, (), torch.bfloat16, torch.bfloat16)


CASES = (
    Case("mlp", 2048, 8192, 2, RMS, (1, 2, 4, 8, 16, 32, 64)),
    Case("mlp", 4096, 14336, 2, RMS, (1, 2, 4, 8, 16, 32, 64)),
    Case("qkv", 4096, 6144, 1, RMS, (1, 4, 16, 64)),
    Case("q", 2048, 2048, 1, RMS, (1, 16)),
    Case("kv", 2048, 512, 1, RMS, (1, 16)),
    Case("layer", 4096, 4096, 1, LAYER, (1, 16, 64)),
    Case("head", 2048, 128256, 1, RMS, (1, 16)),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    op: MatmulFamily
    plan: Plan

    def source(self) -> KernelSource:
        return write(self.op, self.plan, facts(self.op, self.plan, matmul.float32_precision()))

    def predicted(self) -> float:
        """Microseconds, as the cost model has them."""
        return float(predict.seconds(self.op, self.plan, MACHINE, bytes_moved(self.op), int(self.op.m))) * 1e6


def compiled(variant: Variant) -> tuple[dict[str, int], str]:
    """Resources of a variant, or the compiler's complaint. Fills Triton's cache on disk for the launches to come."""
    from triton.backends.compiler import GPUTarget

    try:
        kernel = compile_kernel(variant.op, variant.plan, variant.source(), GPUTarget("cuda", 90, 32))
        return dataclasses.asdict(resources(kernel)), ""
    except Exception as error:  # a plan the compiler refuses is a result of the sweep
        return {}, f"{variant.plan.label}: {type(error).__name__}: {error}"[:200]


# ---- measuring ----------------------------------------------------------------------------------
class Operands:
    """Inputs of a case on the device, with enough copies of the weights to overflow L2."""

    def __init__(self, case: Case) -> None:
        device, dtype = "cuda", torch.bfloat16
        generator = torch.Generator(device).manual_seed(0)
        copies = max(2, math.ceil(ROTATE_BYTES / (2 * case.weights * case.k * case.n)))
        self.case = case
        self.x = torch.randn(64, case.k, device=device, generator=generator).to(dtype)
        self.norm_weight = (1 + 0.2 * torch.randn(case.k, device=device, generator=generator)).to(dtype)
        self.norm_bias = (0.2 * torch.randn(case.k, device=device, generator=generator)).to(dtype)
        self.weights = [
            [
                (torch.randn(case.n, case.k, device=device, generator=generator) / case.k**0.5).to(dtype)
                for _ in range(case.weights)
            ]
            for _ in range(copies)
        ]

    def eager(self, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        return eager(self.case, x, self.norm_weight, self.norm_bias, weights)

    def reference(self, m: int) -> torch.Tensor:
        x, g, b = (t.double() for t in (self.x[:m], self.norm_weight, self.norm_bias))
        return eager(self.case, x, g, b, [w.double() for w in self.weights[0]])


def eager(case: Case, x: torch.Tensor, g: torch.Tensor, b: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    if case.norm.kind == "rms":
        wide = x if x.dtype == torch.float64 else x.float()
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + case.norm.eps)).to(x.dtype) * g
    else:
        y = F.layer_norm(x, (case.k,), g, b, case.norm.eps)
    products = [F.linear(y, w) for w in weights]
    return F.silu(products[0]) * products[1] if case.weights == 2 else products[0]


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference).norm() / reference.norm())


def microseconds(calls: list[Callable[[], object]], replays: int) -> float:
    """Median time of one call, all captured in one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / len(calls))
    return statistics.median(times[2:])


def calls_of(operands: Operands, call: Callable[[list[torch.Tensor]], object]) -> list[Callable[[], object]]:
    """One call for each copy of the weights, at least 12."""
    rounds = math.ceil(12 / len(operands.weights))
    return [(lambda w=w: call(w)) for _ in range(rounds) for w in operands.weights]


def launcher(op: MatmulFamily, plan: Plan, source: KernelSource) -> Callable[..., None]:
    """A function that launches the kernel on tensors given by name; what the kernel does not take is left out."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    kernel = load_kernel(source.text, source.name)[(plan.programs(int(op.m), int(op.n)),)]
    constants, blocks = constexprs(op, plan), dict(source.blocks)
    workspace: dict[str, torch.Tensor] = {}
    if held := sums_left(op, plan):
        arrivals = torch.zeros(predict.ARRIVALS, device="cuda", dtype=torch.int32)
        workspace = {"partial": torch.empty(held, device="cuda"), "arrivals": arrivals}

    def launch(**tensors: torch.Tensor) -> None:
        tensors |= workspace
        described = {
            name: TensorDescriptor.from_tensor(tensors[name], list(blocks[name])) if name in blocks else tensors[name]
            for name in source.tensors
        }
        kernel(**described, **constants, num_warps=plan.num_warps, num_stages=plan.num_stages)

    return launch


def measure(variant: Variant, operands: Operands, reference: torch.Tensor, replays: int) -> dict[str, Any]:
    op = variant.op
    out = torch.full((op.m, op.n), float("nan"), device="cuda", dtype=op.out_dtype)
    fixed = {"x": operands.x[: op.m], "norm_weight": operands.norm_weight, "norm_bias": operands.norm_bias}
    run = launcher(op, variant.plan, variant.source())

    def launch(weights: list[torch.Tensor]) -> None:
        run(**fixed, out=out, **{f"w{i}": weight for i, weight in enumerate(weights)})

    launch(operands.weights[0])
    return {"error": error(out, reference), "us": microseconds(calls_of(operands, launch), replays)}


def competitors(operands: Operands, m: int, inductor: bool, replays: int) -> dict[str, float]:
    x, g, b = operands.x[:m], operands.norm_weight, operands.norm_bias
    times = {"eager": microseconds(calls_of(operands, lambda w: operands.eager(x, w)), replays)}
    if inductor:
        torch._dynamo.reset()
        fast = torch.compile(lambda x, g, b, w: eager(operands.case, x, g, b, w), dynamic=False)
        times["inductor"] = microseconds(calls_of(operands, lambda w: fast(x, g, b, w)), replays)
    return times


def bytes_moved(op: MatmulFamily) -> float:
    traffic = matmul_traffic(op)
    return float(traffic.bytes_read + traffic.bytes_written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", help="names of cases, comma separated")
    parser.add_argument("--rows", help="values of M, comma separated")
    parser.add_argument("--inductor-rows", default="", help="values of M at which Inductor is measured too")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    rows, inductor_rows = _numbers(args.rows), _numbers(args.inductor_rows)
    points = [
        (case, m)
        for case in CASES
        for m in case.rows
        if (not args.cases or case.name in args.cases.split(",")) and (not rows or m in rows)
    ]
    variants = {(c, m): [Variant(c.op(m), plan) for plan in predict.plans(c.op(m), MACHINE, m)] for c, m in points}
    everything = [v for group in variants.values() for v in group]
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        built = dict(zip(everything, pool.map(compiled, everything, chunksize=4), strict=True))
    print(f"{len(everything)} plans compiled in {time.perf_counter() - began:.0f} s", flush=True)
    for complaint in sorted({c for _, c in built.values() if c}):
        print("  refused:", complaint)
    if not torch.cuda.is_available():
        print("no device: nothing measured")
        return
    results: list[dict[str, Any]] = []
    began = time.perf_counter()
    operands: Operands | None = None
    for case, m in points:
        if operands is None or operands.case is not case:
            operands = None
            torch.cuda.empty_cache()
            operands = Operands(case)
        op, reference = case.op(m), operands.reference(m)
        result: dict[str, Any] = {"case": case.name, "k": case.k, "n": case.n, "m": m}
        result["floor"] = bytes_moved(op) / MACHINE.memory_bandwidth * 1e6
        result["eager_error"] = error(operands.eager(operands.x[:m], operands.weights[0]), reference)
        result |= competitors(operands, m, m in inductor_rows, 20)
        result["variants"] = [
            {"plan": dataclasses.asdict(v.plan), "label": v.plan.label, "predicted": v.predicted(), **built[v][0],
             **measure(v, operands, reference, 12)}
            for v in variants[case, m] if built[v][0]
        ]  # fmt: skip
        results.append(result)
        args.out.write_text(json.dumps({
            "device": torch.cuda.get_device_name(), "date": str(datetime.date.today()),
            "versions": {"torch": torch.__version__, "triton": importlib.metadata.version("triton")},
            "results": results,
        }))  # fmt: skip
    print(f"measured in {time.perf_counter() - began:.0f} s; times in µs; x: over the floor; error over eager's own")
    for result in results:
        print(_row(result))


def _numbers(text: str | None) -> set[int]:
    return {int(part) for part in text.split(",")} if text else set()


def _row(result: dict[str, Any]) -> str:
    """What the cost model chose (time, over the floor, predicted), the best of all plans, and the competitors."""
    choice = min(result["variants"], key=lambda v: v["predicted"])
    best = min(result["variants"], key=lambda v: v["us"])
    wrong = sum(not v["error"] <= 1.5 * result["eager_error"] for v in result["variants"])
    spilled = sum(v["spills"] > 0 for v in result["variants"])
    others = " ".join(f"{k} {result[k]:.1f}" for k in ("eager", "inductor") if k in result)
    name = f"{result['case']} {result['k']}->{result['n']} M={result['m']}"
    return (
        f"{name:24s} floor {result['floor']:6.2f} | {others:28s} | {choice['label']} {choice['us']:.2f} "
        f"x{choice['us'] / result['floor']:.3f} predicted {choice['predicted']:.1f} "
        f"error {choice['error'] / result['eager_error']:.2f} | best {best['label']} {best['us']:.2f} "
        f"regret {choice['us'] / best['us']:.3f} | {wrong} wrong, {spilled} spill, of {len(result['variants'])}"
    )


if __name__ == "__main__":
    main()
