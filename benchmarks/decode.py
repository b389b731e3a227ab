"""Decode attention, kernel by kernel: the plan that the cost model takes, or every plan of a sweep, beside cuDNN.

python -m benchmarks.decode --json figures.json            what the cost model takes
python -m benchmarks.decode --json figures.json --sweep    plans around it
python -m benchmarks.decode --json figures.json --grid     lengths and batches for models of three sizes
python -m benchmarks.decode --merge figures.json --plot lengths.svg    draws them (needs matplotlib)

Times are medians of CUDA-graph replays, the caches rotated beyond L2. Kernels are launched as a compiled graph launches
them, before the kernel in front has ended where the device can ("us"), and after it ("us_in_order"). "cudnn" is torch's
cuDNN attention reading the un-repeated cache with a mask tensor. Errors are against float64, over those of the plain
formula. Keys and values are stored in bfloat16, as they are or in pages in random order, or as codes: int8 and int4
with a scale (and for int4 a zero) per token and head, fp8 with one scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_compiler import dependent_launch
from fusion_compiler.fused import Attention, Codes, Layout, Mask, Pages, StoredAttention
from fusion_compiler.lowering.triton_codegen.decode import predict
from fusion_compiler.lowering.triton_codegen.decode.operands import (
    KernelSource,
    Operand,
    Operands,
    Plan,
    Table,
    query_rows,
    row_tiles,
)
from fusion_compiler.lowering.triton_codegen.decode.source import write
from fusion_compiler.machine import TABLE
from fusion_compiler.splice import load_kernel

from . import harness
from .provenance import provenance

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
    stored: str = ""
    page: int = 0

    def op(self) -> Attention:
        mask = Mask("causal" if self.queries > 1 else "length", position=True, tensor="additive", empty_rows="none")
        same = Layout((), (), (), (), self.dtype)
        return Attention(
            self.batch, self.heads, self.kv_heads, self.queries, self.length, self.width, self.width,
            self.width**-0.5, mask, self.dtype, (same, same, same), same,
        )  # fmt: skip

    def asked(self) -> StoredAttention:
        codes = CODES.get(self.stored)
        return StoredAttention(self.op(), codes, codes, Pages(self.page) if self.page else None)

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of q and of each of k and v, were they not in pages."""
        return (
            (self.batch, self.heads, self.queries, self.width),
            (self.batch, self.kv_heads, self.length, self.width),
        )

    def operands(self) -> Operands:
        q, k = (Operand(self.dtype, _strides(shape)) for shape in self.shapes())
        if self.stored:
            codes = CODES[self.stored]
            rows = self.shapes()[1][:3]
            every_row = Operand(self.dtype, (0,) * 4 if self.stored == "fp8" else _strides((*rows, 1)))
            shape = (*rows, self.width // (2 if codes.packed else 1))
            k = Operand(codes.dtype, _strides(shape), codes, every_row, every_row if codes.has_zero else None)
        table = None
        if self.page:
            blocks, rows, heads, columns = torch.empty(self.paged(), device="meta").stride()
            k = Operand(self.dtype, (blocks, heads, rows, columns), page=self.page)
            each = self.length // self.page
            table = Table(torch.int32, (each, 1), self.batch * each)
        return Operands(q, k, k, q, position=POSITION, table=table)

    def paged(self) -> tuple[int, ...]:
        """The shape of a cache in pages."""
        return self.batch * self.length // self.page, self.page, self.kv_heads, self.width

    def floor(self) -> float:
        """Microseconds to read what is visible once at the copy bandwidth."""
        bits = 8 * self.dtype.itemsize if not self.stored else 4 if self.stored == "int4" else 8
        moved = 2 * self.batch * self.kv_heads * self.filled * self.width * bits / 8
        return moved / MACHINE.memory_bandwidth * 1e6


CODES = {
    "int8": Codes(torch.int8), "int4": Codes(torch.uint8, "pairs", has_zero=True), "fp8": Codes(torch.float8_e4m3fn),
}  # fmt: skip
GROUPED = (32, 8, 128)  # query heads, key heads, width
CASES = (
    Case("B1 D128 cache 8192", 1, *GROUPED, 8192, 8192),
    Case("B16 D128 cache 4096", 16, *GROUPED, 4096, 4096),
    Case("B1 D128 cache 131072", 1, *GROUPED, 131072, 131072),
    Case("B1 D128 cache 32768", 1, *GROUPED, 32768, 32768),
    *(Case(f"B1 D128 cache {n} {s}", 1, *GROUPED, n, n, stored=s) for n in (32768, 131072) for s in CODES),
    *(Case(f"B16 D128 cache 4096 {s}", 16, *GROUPED, 4096, 4096, stored=s) for s in CODES),
    *(Case(f"B1 D128 cache 8192 pages of {n}", 1, *GROUPED, 8192, 8192, page=n) for n in (16, 64, 256)),
    *(Case(f"B16 D128 cache 4096 pages of {n}", 16, *GROUPED, 4096, 4096, page=n) for n in (16, 64, 256)),
    Case("B1 D128 cache 8192 holding 512", 1, *GROUPED, 8192, 512),
    Case("B1 D128 cache 512", 1, *GROUPED, 512, 512),
    Case("B1 D128 cache 128", 1, *GROUPED, 128, 128),
    Case("B64 D128 cache 1024", 64, *GROUPED, 1024, 1024),
    Case("B1 4 queries D128 cache 8192", 1, *GROUPED, 8192, 8192, queries=4),
    Case("B1 D64 cache 1024", 1, 32, 8, 64, 1024, 1024),
    Case("B1 D64 cache 8192", 1, 32, 8, 64, 8192, 8192),
    Case("B4 D128 cache 2048", 4, *GROUPED, 2048, 2048),
    Case("B1 32 heads D128 cache 4096", 1, 32, 32, 128, 4096, 4096),
    Case("B1 71/1 heads D64 cache 4096", 1, 71, 1, 64, 4096, 4096),
    Case("B1 D256 cache 8192", 1, 16, 8, 256, 8192, 8192),
    Case("B1 D80 cache 4096 fp16", 1, 32, 32, 80, 4096, 4096, dtype=torch.float16),
    Case("B1 16 queries D128 cache 8192", 1, *GROUPED, 8192, 8192, queries=16),
)
SIZES = {"small": (16, 16, 64), "medium": (16, 16, 128), "large": GROUPED}  # hidden 1024, 2048, 4096
LARGEST_CACHE = 5e9  # bytes


def grid() -> Iterator[Case]:
    """Full caches of many lengths and batches."""
    for batch, length, (size, heads) in itertools.product((1, 16, 64), (128, 1024, 8192, 32768, 131072), SIZES.items()):
        case = Case(f"{size} B{batch} cache {length}", batch, *heads, length, length)
        if 2 * math.prod(case.shapes()[1]) * case.dtype.itemsize <= LARGEST_CACHE:
            yield case


def _strides(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    batch, heads, rows, columns = (
        0 if n == 1 else s for n, s in zip(shape, torch.empty(shape, device="meta").stride(), strict=True)
    )
    return batch, heads, rows, columns


def sweep(case: Case) -> Iterator[Plan]:
    """Plans around what may be good, whatever the cost model thinks of them."""
    if case.stored:
        yield from predict.plans(case.asked(), MACHINE)
        return
    pairs = case.batch * case.kv_heads
    rows = min(64, max(8, 1 << (query_rows(case.op()) - 1).bit_length()))
    for per_sm, block, warps, stages in itertools.product((0.5, 1, 2, 4), (32, 64, 128), (2, 4), (3, 4)):
        splits = max(1, round(per_sm * MACHINE.num_sms / pairs))
        tile = 2 * block * case.width * case.dtype.itemsize
        if (
            splits <= min(128, math.ceil(case.filled / block))
            and 12e3 < tile
            and stages * tile < 200e3 / max(1, per_sm / 2)
        ):
            yield Plan(rows, block, splits, warps, stages)


def chosen(case: Case) -> Plan:
    """What the cost model takes."""
    plan = predict.best_plan(case.asked(), MACHINE)
    assert plan is not None, case.name
    return plan


# ---- building -------------------------------------------------------------------------------------
def source(case: Case, plan: Plan) -> KernelSource:
    return write(case.op(), plan, case.operands(), native=True)


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
        self.generator = generator
        self.caches = [tuple(self.drawn(case.paged() if case.page else kv_shape)) for _ in range(copies)]
        if case.page:
            order = torch.randperm(case.paged()[0], device="cuda", generator=generator).to(torch.int32)
            self.table = order.view(case.batch, -1)
        self.position = torch.tensor(case.filled - case.queries, device="cuda", dtype=POSITION)
        keys = torch.arange(case.length, device="cuda")
        newest = self.position + torch.arange(case.queries, device="cuda")
        self.visible = keys[None] <= newest[:, None]
        least = torch.finfo(case.dtype).min
        self.mask = torch.where(self.visible, 0.0, least).to(case.dtype)[None, None]

    def drawn(self, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """k and v, then where they are codes their scales, then their zeros."""
        case, make = self.case, {"device": "cuda", "generator": self.generator}
        codes = CODES.get(case.stored)
        for _ in range(2):
            if codes is None or case.stored == "fp8":
                yield torch.randn(shape, **make, dtype=case.dtype).to(codes.dtype if codes else case.dtype)
            else:
                low, high, columns = (0, 256, case.width // 2) if codes.packed else (-127, 128, case.width)
                yield torch.randint(low, high, (*shape[:3], columns), **make, dtype=codes.dtype)
        if codes is not None:
            rows = (1,) if case.stored == "fp8" else shape[:3]
            largest = 7.0 if codes.packed else 70.0 if case.stored == "int8" else 1.0
            yield from ((torch.rand(rows, **make) + 0.5).div(largest).to(case.dtype) for _ in range(2))
            if codes.has_zero:
                yield from ((torch.rand(rows, **make) * 3 + 6).round().to(case.dtype) for _ in range(2))

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The visible keys and values of the first copy, dequantised in `dtype`."""
        tensors = list(self.caches[0])
        if self.case.page:
            tensors = [t[self.table].flatten(1, 2).transpose(1, 2) for t in tensors]
        tensors = [t[:, :, : self.case.filled] if t.dim() > 1 else t for t in tensors]
        codes = CODES.get(self.case.stored)
        if codes is None:
            return tuple(t.to(dtype) for t in tensors)
        found = []
        for side in range(2):
            held, scale, *zero = (t for t in tensors[side::2])
            if codes.packed:
                held = torch.stack((held & 15, held >> 4), -1).flatten(-2)
            x = held.to(dtype) - (zero[0].to(dtype)[..., None] if zero else 0)
            found.append(x * scale.to(dtype)[..., None])
        return tuple(found)

    def formula(self, dtype: torch.dtype) -> Tensor:
        """The plain formula on the first copy, in `dtype`."""
        group = self.case.heads // self.case.kv_heads
        k, v = self.plain(dtype)
        q = self.q.to(dtype).unflatten(1, (self.case.kv_heads, group))
        scores = torch.einsum("bhgqd,bhkd->bhgqk", q, k) * self.case.width**-0.5
        scores = scores.masked_fill(~self.visible[:, : self.case.filled], -math.inf)
        p = scores.softmax(-1, dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)
        return torch.einsum("bhgqk,bhkd->bhgqd", p, v).flatten(1, 2)


def launcher(case: Case, plan: Plan, inputs: Inputs, *, in_order: bool = False) -> tuple[Tensor, Callable[..., None]]:
    """(result, function of a cache that launches the kernel of a plan)."""
    pairs, made = case.batch * case.kv_heads, source(case, plan)
    slots = (pairs, plan.splits, query_rows(case.op()))
    tiles = pairs * row_tiles(case.op(), plan)
    out = torch.full_like(inputs.q, float("nan"))
    fixed = {
        "q": inputs.q,
        "position": inputs.position,
        "out": out,
        "partial": torch.full((*slots, case.width), float("nan"), device="cuda"),
        "stats": torch.full((*slots, 2), float("nan"), device="cuda"),
        "arrivals": torch.zeros(tiles, dtype=torch.int32, device="cuda"),
    }
    fixed |= {"table": inputs.table} if case.page else {}
    kernel, grid = load_kernel(made.text, made.name), (tiles, plan.splits)
    options: dict[str, Any] = {"num_warps": plan.num_warps, "num_stages": made.num_stages}
    if not in_order and dependent_launch.supported(inputs.q.device):
        kernel, options["launch_pdl"] = dependent_launch.waiting(kernel, list(made.tensors)), True

    def launch(*cache: Tensor) -> None:
        tensors = fixed | dict(zip(("k", "v", "k_scale", "v_scale", "k_zero", "v_zero"), cache, strict=False))
        kernel[grid](*(tensors[n] for n in made.tensors), **options)

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


def measure(case: Case, plans: list[Plan]) -> dict[str, Any]:
    inputs = Inputs(case)
    reference = inputs.formula(torch.float64)
    eager_error = harness.relative_error(inputs.formula(case.dtype), reference)
    result: dict[str, Any] = {"case": dataclasses.asdict(case) | {"dtype": str(case.dtype)}, "floor": case.floor()}
    for name, mask in (("cudnn", inputs.mask), ("cudnn_unmasked", None)):
        result[name] = math.nan
        if case.stored or case.page:
            continue
        try:
            result[name] = microseconds(cudnn(inputs, mask), inputs)
        except RuntimeError as error:
            print(f"  {name}:", str(error)[:100])
    result["variants"] = []
    for plan in plans:
        try:
            out, launch = launcher(case, plan, inputs)
            launch(*inputs.caches[0])
            error = harness.relative_error(out, reference) / eager_error
            times = {"us": microseconds(launch, inputs)}
            times["us_in_order"] = microseconds(launcher(case, plan, inputs, in_order=True)[1], inputs)
        except Exception as problem:  # a plan that cannot run is a result of the sweep
            print(f"  {plan.label}: {type(problem).__name__}: {problem}"[:200])
            continue
        predicted = predict.seconds(case.asked(), plan, MACHINE, case.filled) * 1e6
        found = {"plan": dataclasses.asdict(plan), "label": plan.label, "error": error, "predicted": predicted}
        result["variants"].append(found | times)
    return result


def _row(result: dict[str, Any], shown: int) -> str:
    ranked = sorted(result["variants"], key=lambda v: v["us"])
    wrong = [v["label"] for v in ranked if not v["error"] <= 1.5]
    head = f"{result['case']['name']:30s} floor {result['floor']:6.2f} cudnn {result['cudnn']:6.2f}"
    head += f" unmasked {result['cudnn_unmasked']:6.2f}"
    head += f" ours in order {min((v['us_in_order'] for v in ranked), default=math.nan):.2f}"
    best = " | ".join(f"{v['label']} {v['us']:.2f} predicted {v['predicted']:.2f}" for v in ranked[:shown])
    return f"{head} | {best} | {len(wrong)} wrong of {len(ranked)} {wrong[:3]}"


def plot(path: Path, results: list[dict[str, Any]]) -> None:
    """Time over the length of the cache, one picture for each size of a model."""
    from matplotlib import pyplot

    _, pictures = pyplot.subplots(1, len(SIZES), figsize=(4.5 * len(SIZES), 4))
    for size, picture in zip(SIZES, pictures, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for found in (r for r in results if r["case"]["name"].startswith(f"{size} ") and r["variants"]):
            for name, value in (
                ("ours", found["variants"][0]["us"]),
                ("cuDNN", found["cudnn"]),
                ("floor", found["floor"]),
            ):
                lines.setdefault(f"{name}, batch {found['case']['batch']}", []).append((found["case"]["length"], value))
        for label, points in lines.items():
            style = {"o": "o-", "c": "x--", "f": ":"}[label[0]]
            picture.loglog(*zip(*sorted(points), strict=True), style, base=2, label=label)
        picture.set(title=size, xlabel="keys in the cache", ylabel="µs")
    pictures[0].legend(fontsize="x-small")
    pyplot.tight_layout()
    pyplot.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there, after every case")
    parser.add_argument("--only", help="parts of the names of the cases to run, with commas between")
    parser.add_argument("--sweep", action="store_true", help="every plan, not only the one that the cost model takes")
    parser.add_argument("--grid", action="store_true", help="lengths and batches for models of three sizes")
    parser.add_argument("--merge", type=Path, help="measure nothing, take these figures")
    parser.add_argument("--plot", type=Path, help="draw the figures of a grid there")
    args = parser.parse_args()
    results = json.loads(args.merge.read_text())["results"] if args.merge else []
    cases = () if args.merge else grid() if args.grid else CASES
    for case in (c for c in cases if any(part in c.name for part in (args.only or "").split(","))):
        results.append(measure(case, list(sweep(case)) if args.sweep else [chosen(case)]))
        if args.json:
            args.json.write_text(json.dumps({**provenance(torch.device("cuda")), "results": results}))
        print(_row(results[-1], 4), flush=True)
        torch.cuda.empty_cache()
    if args.plot:
        plot(args.plot, results)


if __name__ == "__main__":
    main()
