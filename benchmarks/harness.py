"""What every benchmark shares: fair timing, errors against a better reference, provenance and tables.

* On a CUDA device a time is the median of CUDA-graph replays. One graph holds a call for every rotated copy of the
  inputs, together over 200 MB, so that the L2 cache never holds a weight from the call before.
* On a CPU it is the median of calls, in rounds that visit every column in turn, so that all see the same weather.
* An error is ‖y − ref‖ / ‖ref‖ against the same formula in float32 or float64; the ratio is to eager's own error.
* A column that fails is recorded with its message and the table goes on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import fusion_compiler
from fusion_compiler.backend import fusion_compiler as backend_of_ours
from fusion_compiler.machine import machine

from .provenance import provenance

ROTATED_BYTES = 200e6
GRAPH_SECONDS = 2e-3  # a replay this long hides the cost of starting it
CPU_SAMPLE_SECONDS = 10e-3

Call = Callable[..., Any]
Inputs = Sequence[tuple[Any, ...]]


# ---- what is compared ------------------------------------------------------------------------------------
def compiled(fn: Call, backend: str, mode: str | None = None, options: dict[str, Any] | None = None) -> Call:
    """`fn` under `backend` ("inductor" or "fusion_compiler") with static shapes."""
    # ours as the object: in a plain checkout its entry point is not installed
    found: Any = backend_of_ours if backend == "fusion_compiler" else backend
    result: Call = torch.compile(fn, backend=found, mode=mode, options=options, dynamic=False)
    return result


def standard_columns(fn: Call, max_autotune: bool = False) -> dict[str, Call]:
    columns = {"eager": fn, "inductor": compiled(fn, "inductor")}
    if max_autotune:
        # without its own CUDA graphs: the timing captures one around every call
        columns["max-autotune"] = compiled(fn, "inductor", mode="max-autotune-no-cudagraphs")
    columns["ours"] = compiled(fn, "fusion_compiler")
    return columns


def relative_error(result: Any, reference: Any) -> float:
    """Of all tensors of a result together."""
    pairs = list(zip(tree_leaves(result), tree_leaves(reference), strict=True))
    wrong = torch.stack([(a.double() - b.double()).norm() for a, b in pairs]).norm()
    return float(wrong / torch.stack([b.double().norm() for _, b in pairs]).norm())


def rotated(
    make: Callable[[], tuple[Any, ...]], device: torch.device, read: float | None = None
) -> list[tuple[Any, ...]]:
    """Copies of the inputs that together pass ROTATED_BYTES on a GPU, at least two; one on a CPU. `read` is how many
    bytes of them a call reads, where that is not all of them in every column."""
    first = make()
    if device.type != "cuda":
        return [first]
    size = read or sum(t.numel() * t.element_size() for t in first if isinstance(t, torch.Tensor))
    return [first, *(make() for _ in range(max(1, math.ceil(ROTATED_BYTES / size) - 1)))]


# ---- timing ----------------------------------------------------------------------------------------------
def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _capture(fn: Call, inputs: Inputs, passes: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for args in inputs:
                fn(*args)
    return graph


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def graph_timer(fn: Call, inputs: Inputs) -> Callable[[], float]:
    """A function that measures the device seconds of one call of `fn` within a CUDA graph."""
    for args in inputs:
        fn(*args)
    torch.cuda.synchronize()
    passes = 1
    graph = _capture(fn, inputs, passes)
    once = min(_replay_seconds(graph) for _ in range(3))
    if once < GRAPH_SECONDS:
        passes = math.ceil(GRAPH_SECONDS / once)
        graph = _capture(fn, inputs, passes)
        _replay_seconds(graph)
    return lambda: _replay_seconds(graph) / (passes * len(inputs))


def wall_timer(fn: Call, inputs: Inputs, device: torch.device) -> Callable[[], float]:
    """A function that measures the wall seconds of one call of `fn`, the device's work included."""
    calls = itertools.cycle(inputs)

    def sample(repeats: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            fn(*next(calls))
        synchronize(device)
        return (time.perf_counter() - start) / repeats

    sample(1)
    repeats = max(1, min(1000, math.ceil(CPU_SAMPLE_SECONDS / sample(1))))
    return lambda: sample(repeats)


def interleaved(timers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples of every timer, one each per round."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer())
    return samples


def ratio(samples: dict[str, list[float]], slow: str, fast: str) -> float | None:
    """How many times faster `fast` is than `slow`: the median over rounds, each compared with itself."""
    if slow not in samples or fast not in samples:
        return None
    return statistics.median(s / f for s, f in zip(samples[slow], samples[fast], strict=True))


# ---- memory and kernels ----------------------------------------------------------------------------------
def peak_bytes(fn: Call, args: tuple[Any, ...]) -> int | None:
    """Device memory that one call needs beyond what was allocated before it; None on a CPU."""
    if not torch.cuda.is_available() or not any(isinstance(a, torch.Tensor) and a.is_cuda for a in args):
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn(*args)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class DeviceWork:
    """Kernels per call, and the time during which at least one ran."""

    kernels: float
    busy_seconds: float


def device_work(fn: Call, args: tuple[Any, ...], calls: int = 5) -> DeviceWork:
    """What the profiler sees on the CUDA device; copies and fills count as kernels, annotations do not."""
    from torch.profiler import ProfilerActivity, profile

    fn(*args)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            fn(*args)
        torch.cuda.synchronize()
    events = [
        event
        for event in recorded.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("##", "Torch-Compiled", "ProfilerStep"))
    ]
    busy, reached = 0.0, -math.inf
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return DeviceWork(len(events) / calls, busy * 1e-6 / calls)


# ---- floors and predictions ------------------------------------------------------------------------------
def floor_seconds(bytes_moved: float, flops: float, dtype: torch.dtype) -> float:
    """The least time on this machine for work that reads and writes everything once."""
    here = machine()
    return max(bytes_moved / here.memory_bandwidth, flops / here.rate(dtype))


def predicted() -> tuple[float | None, str]:
    """Seconds that the last report expects of what it fused, or kept, and the verdicts in a few words."""
    report = fusion_compiler.last_report()
    if report is None or not report.decisions:
        return None, "no match"
    # what is kept may overlap: a gated MLP is also two linears, one of them with an activation
    seconds = [(d.after or d.before).seconds for d in report.fused or report.decisions[:1]]
    verdicts = Counter(f"{d.pattern} {d.kernel or d.verdict}" for d in report.decisions)
    return sum(seconds), ", ".join(v if n == 1 else f"{v} ×{n}" for v, n in verdicts.items())


# ---- one row ---------------------------------------------------------------------------------------------
@dataclass
class Row:
    """The figures of one shape; times in seconds."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # columns that were not tried, and why
    speedup: dict[str, float] = field(default_factory=dict)  # of "ours" over each other column
    floor: float | None = None
    predicted: float | None = None
    verdict: str = ""

    def error_ratio(self) -> float | None:
        """Ours to eager's own; an exact eager leaves nothing to compare with."""
        ours, eager = self.error.get("ours"), self.error.get("eager")
        return ours / eager if ours is not None and eager else None


def complain(where: str, problem: Exception) -> str:
    """Say at once what failed, and return what to record of it."""
    message = f"{type(problem).__name__}: {problem}"
    print(f"  {where} failed: {message.splitlines()[0][:200]}", file=sys.stderr, flush=True)
    return message[:2000]


def measure(row: Row, columns: dict[str, Call], inputs: Inputs, reference: Any, rounds: int) -> Row:
    """Fill `row`: every column's error, memory and time on the same inputs."""
    return prepared(row, columns, inputs, reference, rounds)()


def prepared(
    row: Row, columns: Mapping[str, Call], inputs: Inputs, reference: Any, rounds: int,
    late: Mapping[str, Callable[[], Call]] = MappingProxyType({}),
) -> Callable[[], Row]:  # fmt: skip
    """Fill `row` with every column's error and memory, and return what fills in the times; `late` makes columns that
    want the device for themselves already when they are made."""
    device = next(a.device for a in inputs[0] if isinstance(a, torch.Tensor))
    works: dict[str, Call] = {}

    def check(name: str, fn: Call, *, made: bool = True) -> None:
        try:
            fn = fn if made else fn()
            row.error[name] = relative_error(fn(*inputs[0]), reference)
            if name == "ours":
                row.predicted, row.verdict = predicted()
            peak = peak_bytes(fn, inputs[0])
            if peak is not None:
                row.peak[name] = peak
            works[name] = fn
        except Exception as problem:  # the other columns are still worth having
            row.failures[name] = complain(f"{row.name}, {name}", problem)

    for name, fn in columns.items():
        check(name, fn)

    def turn() -> Row:
        for name, make in late.items():
            check(name, make, made=False)
        timers: dict[str, Callable[[], float]] = {}
        for name, fn in works.items():
            try:
                timers[name] = graph_timer(fn, inputs) if device.type == "cuda" else wall_timer(fn, inputs, device)
            except Exception as problem:
                row.failures[name] = complain(f"{row.name}, {name}", problem)
        samples = interleaved(timers, rounds)
        row.seconds = {name: statistics.median(values) for name, values in samples.items()}
        speedups = {name: ratio(samples, name, "ours") for name in samples if name != "ours"}
        row.speedup = {name: value for name, value in speedups.items() if value is not None}
        return row

    return turn


def compare(
    name: str,
    fn: Call,
    make: Callable[[], tuple[Any, ...]],
    floor: float,
    args: argparse.Namespace,
    more: Mapping[str, Call] | None = None,
) -> Row:
    """The row of `fn` on what `make` gives, in the standard columns and `more`, beside `fn` in wider floats."""
    device = torch.device(args.device)
    inputs = rotated(make, device)
    reference = fn(*(t.double() if device.type == "cpu" else t.float() for t in inputs[0]))
    columns = {**standard_columns(fn, args.max_autotune), **(more or {})}
    row = measure(Row(name, floor=floor), columns, inputs, reference, args.rounds)
    clean_slate(device)
    return row


def clean_slate(device: torch.device) -> None:
    """Between rows: forget compiled code, so that a second shape is not taken for a dynamic one, and free memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- command line and output -----------------------------------------------------------------------------
def arguments(description: str | None, rounds: int = 30) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT,…", help="rows whose name is or contains a TEXT")
    parser.add_argument("--json", metavar="PATH", type=Path, help="write the figures there")
    parser.add_argument("--rounds", type=int, default=rounds, help="samples per column (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="very small sizes, to try the command itself")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-autotune", action="store_true", help="add Inductor's max-autotune (slow to compile)")
    return parser


def chosen(names: Sequence[str], only: str | None) -> Iterator[str]:
    wanted = only.split(",") if only is not None else [""]
    picked = [n for n in names if any(n == part or (part in n and part not in names) for part in wanted)]
    if not picked:
        raise SystemExit(f"--only {only!r} is in no row's name; rows: {', '.join(names)}")
    for name in picked:
        print(f"… {name}", file=sys.stderr, flush=True)
        yield name


def microseconds(seconds: float | None) -> str:
    if seconds is None or math.isnan(seconds):
        return "–"
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def row_table(rows: Sequence[Row]) -> str:
    """µs per column, then what the cost model said beside what was measured."""
    columns = list(dict.fromkeys(name for row in rows for name in (*row.seconds, *row.failures)))
    rivals = [c for c in ("inductor", "max-autotune") if c in columns]
    header = ["µs", *columns, "floor", "predicted", "ours/floor", *(f"vs {c}" for c in rivals)]
    header += ["error/eager's", "verdict"]
    lines = []
    for row in rows:
        times = ["failed" if c in row.failures else microseconds(row.seconds.get(c)) for c in columns]
        ours = row.seconds.get("ours")
        over_floor = f"{ours / row.floor:.2f}" if ours and row.floor else "–"
        faster = [f"{row.speedup[c]:.2f}×" if c in row.speedup else "–" for c in rivals]
        error = row.error_ratio()
        lines.append(
            [row.name, *times, microseconds(row.floor), microseconds(row.predicted), over_floor, *faster]
            + ["–" if error is None else f"{error:.2f}", row.verdict or "–"]
        )
    return markdown(header, lines)


def rows_of(found: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows as written, what a benchmark tells besides left out."""
    return [Row(**{key: row[key] for key in Row.__dataclass_fields__ if key in row}) for row in found]


def write_json(path: Path | None, device: torch.device, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(device), **more, "rows": list(rows)}, indent=1) + "\n")
