"""Split-KV decode attention, kernel by kernel: every plan of a sweep, or the one the cost model takes, beside cuDNN.

python -m benchmarks.decode_attention --json figures.json            what the cost model takes
python -m benchmarks.decode_attention --json figures.json --sweep    every plan

Times are medians of CUDA-graph replays, the caches rotated beyond L2 where they fit it. "cudnn" is torch's cuDNN
attention reading the un-repeated cache with a mask tensor. Errors are against float64, over those of the plain formula.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_compiler.fused import Attention, Layout, Mask
from fusion_compiler.lowering.triton_codegen import decode_predict
from fusion_compiler.lowering.triton_codegen.decode_aot import compile_source
from fusion_compiler.lowering.triton_codegen.decode_source import (
    DecodePlan,
    KernelSource,
    Operand,
    Operands,
    query_rows,
    row_tiles,
    write_combine,
    write_split,
)
from fusion_compiler.machine import TABLE
from fusion_compiler.splice import load_kernel

from . import harness

MACHINE = TABLE["h200"]
POSITION = torch.int64


@dataclass(frozen=True)
class Case:
    """One decode step: a cache for `length` positions of which `filled` are visible."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    width: int
    length: int
    filled: int
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16

    def op(self) -> Attention:
        mask = Mask("causal" if self.queries > 1 else "length", position=True, tensor="additive", empty_rows="none")
        same = Layout((), (), (), (), self.dtype)
        return Attention(
            self.batch, self.heads, self.kv_heads, self.queries, self.length, self.width, self.width,
            self.width**-0.5, mask, self.dtype, (same, same, same), same,
        )  # fmt: skip

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of q and of each of k and v."""
        return (
            (self.batch, self.heads, self.queries, self.width),
            (self.batch, self.kv_heads, self.length, self.width),
        )

    def operands(self) -> Operands:
        q, k = (Operand(self.dtype, _strides(shape)) for shape in self.shapes())
        return Operands(q, k, k, q, position=POSITION)

    def floor(self) -> float:
        """Microseconds to read what is visible once at the copy bandwidth."""
        moved = 2 * self.batch * self.kv_heads * self.filled * self.width * self.dtype.itemsize
        return moved / MACHINE.memory_bandwidth * 1e6


CASES = (
    Case("B1 D128 cache 8192", 1, 32, 8, 128, 8192, 8192),
    Case("B16 D128 cache 4096", 16, 32, 8, 128, 4096, 4096),
    Case("B1 D128 cache 131072", 1, 32, 8, 128, 131072, 131072),
    Case("B1 D64 cache 8192", 1, 32, 8, 64, 8192, 8192),
    Case("B1 D64 cache 8192 holding 512", 1, 32, 8, 64, 8192, 512),
    Case("B1 D64 cache 512", 1, 32, 8, 64, 512, 512),
    Case("B1 D64 cache 1024", 1, 32, 8, 64, 1024, 1024),
    Case("B4 D128 cache 2048", 4, 32, 8, 128, 2048, 2048),
    Case("B1 32 heads D128 cache 4096", 1, 32, 32, 128, 4096, 4096),
    Case("B1 4 queries D128 cache 8192", 1, 32, 8, 128, 8192, 8192, queries=4),
    Case("B1 16 queries D128 cache 8192", 1, 32, 8, 128, 8192, 8192, queries=16),
    Case("B1 71/1 heads D64 cache 4096", 1, 71, 1, 64, 4096, 4096),
    Case("B1 D80 cache 4096 fp16", 1, 32, 32, 80, 4096, 4096, dtype=torch.float16),
    Case("B1 D256 cache 8192", 1, 16, 8, 256, 8192, 8192),
    Case("B1 D128 cache 4096 fp32", 1, 32, 8, 128, 4096, 4096, dtype=torch.float32),
)


def _strides(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    batch, heads, rows, columns = (
        0 if n == 1 else s for n, s in zip(shape, torch.empty(shape, device="meta").stride(), strict=True)
    )
    return batch, heads, rows, columns


def sweep(case: Case) -> Iterator[DecodePlan]:
    """Plans around what may be good, whatever the cost model thinks of them."""
    pairs = case.batch * case.kv_heads
    rows = min(64, max(8, 1 << (query_rows(case.op()) - 1).bit_length()))
    blocks = (64, 128) if case.width == 64 or case.length > 8192 else (32, 64, 128)
    for per_sm, block, warps, stages in itertools.product((0.5, 1, 2, 4), blocks, (2, 4, 8), (2, 3, 4)):
        splits = max(1, round(per_sm * MACHINE.num_sms / pairs))
        if splits > math.ceil(case.length / block) or splits > 128:
            continue
        if (per_sm, stages) in ((0.5, 2), (1, 2)) and case.length > 1024:
            continue
        if stages * block * case.width * case.dtype.itemsize * 2 > 200e3 / (2 if per_sm == 4 else 1):
            continue
        yield DecodePlan(rows, block, splits, warps, stages)


def chosen(case: Case) -> DecodePlan:
    """What the cost model takes."""
    plan = decode_predict.best_plan(case.op(), MACHINE)
    assert plan is not None, case.name
    return plan


# ---- building -------------------------------------------------------------------------------------
def sources(case: Case, plan: DecodePlan) -> list[tuple[KernelSource, int, int, tuple[int, int]]]:
    """(kernel, warps, stages, grid) of every launch."""
    op, operands = case.op(), case.operands()
    pairs = case.batch * case.kv_heads
    split = write_split(op, plan, operands)
    found = [(split, plan.num_warps, plan.num_stages, (pairs * row_tiles(op, plan), plan.splits))]
    if plan.splits > 1:
        grid = (pairs * query_rows(op), -(-op.v_dim // plan.combine_columns))
        found.append((write_combine(op, plan, operands), 4, 1, grid))
    return found


def compiled(job: tuple[Case, DecodePlan]) -> str:
    """The compiler's complaint about a plan, if any. Fills Triton's cache on disk for the launches to come."""
    from triton.backends.compiler import GPUTarget

    try:
        for source, warps, stages, _ in sources(*job):
            compile_source(source, GPUTarget("cuda", 90, 32), warps, stages)
    except Exception as error:  # a plan the compiler refuses is a result of the sweep
        return f"{job[1].label}: {type(error).__name__}: {error}"[:200]
    return ""


# ---- measuring ------------------------------------------------------------------------------------
class Inputs:
    """Operands of a case on the device, with enough copies of the cache to overflow L2."""

    def __init__(self, case: Case) -> None:
        self.case = case
        q_shape, kv_shape = case.shapes()
        visible = 2 * math.prod(kv_shape) * case.dtype.itemsize * case.filled / case.length
        copies = min(64, max(2, math.ceil(harness.ROTATED_BYTES / visible)))
        generator = torch.Generator("cuda").manual_seed(0)
        self.q = torch.randn(q_shape, device="cuda", generator=generator).to(case.dtype)
        self.caches = [
            tuple(torch.randn(kv_shape, device="cuda", generator=generator, dtype=case.dtype) for _ in range(2))
            for _ in range(copies)
        ]
        self.position = torch.tensor(case.filled - case.queries, device="cuda", dtype=POSITION)
        keys = torch.arange(case.length, device="cuda")
        newest = self.position + torch.arange(case.queries, device="cuda")
        self.visible = keys[None] <= newest[:, None]
        least = torch.finfo(case.dtype).min
        self.mask = torch.where(self.visible, 0.0, least).to(case.dtype)[None, None]

    def formula(self, dtype: torch.dtype) -> Tensor:
        """The plain formula on the first copy, in `dtype`."""
        group = self.case.heads // self.case.kv_heads
        k, v = (t[:, :, : self.case.filled] for t in self.caches[0])
        q = self.q.to(dtype).unflatten(1, (self.case.kv_heads, group))
        scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k.to(dtype)) * self.case.width**-0.5
        scores = scores.masked_fill(~self.visible[:, : self.case.filled], -math.inf)
        p = scores.softmax(-1, dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
        return torch.einsum("bhgqk,bhkd->bhgqd", p, v.to(dtype)).flatten(1, 2)


def launcher(case: Case, plan: DecodePlan, inputs: Inputs, parts: int = 2) -> tuple[Tensor, Callable[..., None]]:
    """(result, function of k and v that launches the kernels of a plan, or the first `parts` of them)."""
    rows, pairs = query_rows(case.op()), case.batch * case.kv_heads
    out = torch.full_like(inputs.q, float("nan"))
    partial = torch.full((pairs, plan.splits, rows, case.width), float("nan"), device="cuda")
    stats = torch.full((pairs, plan.splits, rows, 2), float("nan"), device="cuda")
    fixed = {"q": inputs.q, "position": inputs.position, "out": out, "partial": partial, "stats": stats}
    built = [(load_kernel(s.text, s.name), list(s.tensors), *rest) for s, *rest in sources(case, plan)][:parts]

    def launch(k: Tensor, v: Tensor) -> None:
        tensors = fixed | {"k": k, "v": v}
        for kernel, names, warps, stages, grid in built:
            kernel[grid](*(tensors[n] for n in names), num_warps=warps, num_stages=stages)

    return out, launch


def microseconds(call: Callable[..., object], inputs: Inputs, replays: int = 10) -> float:
    """Median time of one call, every copy of the cache in turn, all captured in one CUDA graph."""
    rounds = math.ceil(16 / len(inputs.caches))
    call(*inputs.caches[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for cache in inputs.caches:
                call(*cache)
    times = []
    for _ in range(replays + 2):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) * 1e3 / (rounds * len(inputs.caches)))
    return statistics.median(times[2:])


def cudnn(inputs: Inputs, mask: Tensor | None) -> Callable[..., object]:
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    scale = inputs.case.width**-0.5
    return lambda k, v: operator(inputs.q, k, v, mask, False, 0.0, False, scale=scale)


def measure(case: Case, plans: list[DecodePlan]) -> dict[str, Any]:
    inputs = Inputs(case)
    reference = inputs.formula(torch.float64)
    eager_error = harness.relative_error(inputs.formula(case.dtype), reference)
    result: dict[str, Any] = {"case": dataclasses.asdict(case) | {"dtype": str(case.dtype)}, "floor": case.floor()}
    for name, mask in (("cudnn", inputs.mask), ("cudnn_unmasked", None)):
        try:
            result[name] = microseconds(cudnn(inputs, mask), inputs)
        except RuntimeError as error:
            result[name] = math.nan
            print(f"  {name}:", str(error)[:100])
    result["variants"] = []
    for plan in plans:
        try:
            out, launch = launcher(case, plan, inputs)
            launch(*inputs.caches[0])
            error = harness.relative_error(out, reference) / eager_error
            times = {"us": microseconds(launch, inputs)}
            if plan.splits > 1:
                times["split_us"] = microseconds(launcher(case, plan, inputs, parts=1)[1], inputs)
        except Exception as problem:  # a plan that cannot run is a result of the sweep
            print(f"  {plan.label}: {type(problem).__name__}: {problem}"[:200])
            continue
        predicted = decode_predict.seconds(case.op(), plan, MACHINE, case.filled) * 1e6
        found = {"plan": dataclasses.asdict(plan), "label": plan.label, "error": error, "predicted": predicted}
        result["variants"].append(found | times)
    return result


def _row(result: dict[str, Any], shown: int) -> str:
    ranked = sorted(result["variants"], key=lambda v: v["us"])
    wrong = [v["label"] for v in ranked if not v["error"] <= 1.5]
    times = " ".join(f"{name} {result[name]:6.2f}" for name in ("floor", "cudnn", "cudnn_unmasked"))
    head = f"{result['case']['name']:30s} {times}"
    best = " | ".join(
        f"{v['label']} {v['us']:.2f} ({v.get('split_us', v['us']):.2f}) predicted {v['predicted']:.2f}"
        for v in ranked[:shown]
    )
    return f"{head} | {best} | {len(wrong)} wrong of {len(ranked)} {wrong[:3]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", help="part of the names of the cases to run")
    parser.add_argument("--sweep", action="store_true", help="every plan, not only the one that the cost model takes")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    cases = [c for c in CASES if not args.only or args.only in c.name]
    plans = {c: list(sweep(c)) if args.sweep else [chosen(c)] for c in cases}
    jobs = [(c, p) for c in cases for p in plans[c]]
    began = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        complaints = {job: text for job, text in zip(jobs, pool.map(compiled, jobs, chunksize=2), strict=True) if text}
    print(f"{len(jobs)} plans compiled in {time.perf_counter() - began:.0f} s", flush=True)
    for text in sorted(set(complaints.values())):
        print("  refused:", text)
    if not torch.cuda.is_available():
        print("no device: nothing measured")
        return
    began, results = time.perf_counter(), []
    for case in cases:
        results.append(measure(case, [p for p in plans[case] if (case, p) not in complaints]))
        args.json.write_text(json.dumps({**harness.provenance(torch.device("cuda")), "results": results}))
        print(_row(results[-1], 4), flush=True)
        torch.cuda.empty_cache()
    print(f"measured in {time.perf_counter() - began:.0f} s; times in µs, in brackets without the second kernel")


if __name__ == "__main__":
    main()
