"""Llama-1B (16 layers, hidden 2048, FFN 8192, 32/8 heads, vocabulary 128256), bf16, eager attention, random weights.

python -m benchmarks.llama                                   prefill 2048, decode at static caches of 1024 and 8192
python -m benchmarks.llama --only "decode 8192" --columns inductor,ours --json figures.json
python -m benchmarks.llama --max-autotune                    adds Inductor's max-autotune (minutes of compiling)

Columns run one after the other, each from cold compile caches. wall: one call at a time, waiting for each; pipelined:
calls issued back to back; busy: time with a kernel running; compile: the first call. Errors are of the logits, against
the same weights in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from . import harness
from .llama_model import LLAMA_1B, build, in_higher_precision, rewind, static_cache

# name: (backend, mode); None is eager
COLUMNS: dict[str, tuple[str, str | None] | None] = {
    "eager": None,
    "inductor": ("inductor", None),
    "inductor reduce-overhead": ("inductor", "reduce-overhead"),
    "max-autotune": ("inductor", "max-autotune"),
    "ours": ("fusion_compiler", None),
    "ours reduce-overhead": ("fusion_compiler", "reduce-overhead"),
}
TINY = LLAMA_1B | {
    "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96,
}  # fmt: skip
SPARE = 128  # positions left free in a cache, for the steps that are timed


@dataclass
class Phase:
    """One workload on one model: `prepare` undoes what `call` leaves behind, such as positions taken in a cache."""

    call: Callable[[], Tensor]
    prepare: Callable[[], None]


def prefill(model: Any, plain: Any, length: int, last_only: bool) -> Phase:
    source = torch.Generator(plain.device).manual_seed(2)
    ids = torch.randint(plain.config.vocab_size, (1, length), generator=source, device=plain.device)
    keep = 1 if last_only else 0
    return Phase(lambda: model(ids, use_cache=False, logits_to_keep=keep).logits, lambda: None)


def decode(model: Any, plain: Any, length: int) -> Phase:
    position = max(1, length - SPARE)
    cache = static_cache(plain, length, position)
    token = torch.full((1, 1), 7, device=plain.device)
    return Phase(lambda: model(token, past_key_values=cache).logits, lambda: rewind(cache, position))


def measure(phase: Phase, steps: int, device: torch.device) -> dict[str, float]:
    """Wall and pipelined seconds per call, and on a GPU kernels per call and busy seconds."""

    def call() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        phase.call()

    phase.prepare()
    for _ in range(3):  # CUDA graphs are recorded in the first calls
        call()
    phase.prepare()
    harness.synchronize(device)
    walls = []
    for _ in range(steps):
        start = time.perf_counter()
        call()
        harness.synchronize(device)
        walls.append(time.perf_counter() - start)
    figures = {"wall": statistics.median(walls)}
    if device.type == "cuda":
        batches = []
        for _ in range(3):
            phase.prepare()
            harness.synchronize(device)
            start = time.perf_counter()
            for _ in range(steps):
                call()
            harness.synchronize(device)
            batches.append((time.perf_counter() - start) / steps)
        phase.prepare()
        work = harness.device_work(call, ())
        figures |= {"pipelined": min(batches), "kernels": work.kernels, "busy": work.busy_seconds}
    return figures


def warm_up_compilers(device: torch.device) -> None:
    """Start the compile workers and load the compilers, so that the first column does not pay for it."""
    x = torch.randn(64, 64, device=device)
    for backend in ("inductor", "fusion_compiler"):
        harness.compiled(lambda x: torch.softmax(x @ x, -1), backend)(x)
        torch._dynamo.reset()


def run_column(
    name: str, plain: Any, make: Callable[[Any, Any], Phase], reference: Tensor, eager: dict[str, Any], steps: int
) -> dict[str, Any]:
    return prepared_column(name, plain, make, reference, eager, steps)()


def prepared_column(
    name: str, plain: Any, make: Callable[[Any, Any], Phase], reference: Tensor, eager: dict[str, Any], steps: int
) -> Callable[[], dict[str, Any]]:
    """Compiles and checks a column; what is returned takes its times."""
    device, how = plain.device, COLUMNS[name]
    model = plain if how is None else harness.compiled(plain, *how)
    phase = make(model, plain)
    phase.prepare()
    harness.synchronize(device)
    start = time.perf_counter()
    out = phase.call().clone()
    harness.synchronize(device)
    row: dict[str, Any] = {"compile": None if how is None else time.perf_counter() - start}
    row["error"] = harness.relative_error(out, reference)
    if how is None:
        eager["out"], eager["error"] = out, row["error"]
    elif "out" in eager:
        row["error_ratio"] = row["error"] / eager["error"] if eager["error"] else None
        row["same_argmax"] = float((out.argmax(-1) == eager["out"].argmax(-1)).float().mean())
    if how is not None and how[0] == "fusion_compiler":
        report = harness.fusion_compiler.last_report()
        counts = Counter(f"{d.pattern} {d.kernel or d.verdict}" for d in report.decisions) if report else {}
        row["verdicts"] = dict(counts)
        row["predicted_fused"] = harness.predicted()[0]
    return lambda: row | measure(phase, steps, device)


def parse() -> argparse.Namespace:
    parser = harness.arguments(__doc__, rounds=40)
    parser.add_argument("--columns", default="", help=f"only these, separated by commas: {', '.join(COLUMNS)}")
    parser.add_argument("--last-logits", action="store_true", help="prefill: logits of the last position only")
    args = parser.parse_args()
    args.columns = [c for c in args.columns.split(",") if c] or [
        c for c in COLUMNS if c != "max-autotune" or args.max_autotune
    ]
    if args.rounds > SPARE - 8:
        parser.error(f"--rounds is at most {SPARE - 8}: the caches have {SPARE} positions free")
    unknown = [c for c in args.columns if c not in COLUMNS]
    if unknown:
        parser.error(f"no column {unknown[0]!r}; there are {', '.join(COLUMNS)}")
    if args.device == "cpu":
        args.columns = [c for c in args.columns if "reduce-overhead" not in c]
    return args


def table(rows: list[dict[str, Any]]) -> str:
    header = ["phase", "column", "wall µs", "pipelined µs", "kernels", "busy µs", "compile s"]
    header += ["error", "÷ eager's", "same argmax"]
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["phase"], row["column"], "failed", *["–"] * 7])
            continue
        times = [harness.microseconds(row.get(key)) for key in ("wall", "pipelined")]
        counts = [f"{row['kernels']:.0f}" if "kernels" in row else "–", harness.microseconds(row.get("busy"))]
        compiling = "–" if row["compile"] is None else f"{row['compile']:.1f}"
        agreement = ["–" if row.get(key) is None else f"{row[key]:.3f}" for key in ("error_ratio", "same_argmax")]
        lines.append([row["phase"], row["column"], *times, *counts, compiling, f"{row['error']:.2e}", *agreement])
    return harness.markdown(header, lines)


@torch.no_grad()
def main() -> None:
    args = parse()
    device = torch.device(args.device)
    prompt, caches = (32, (160,)) if args.tiny else (2048, (1024, 8192))
    phases: dict[str, Callable[[Any, Any], Phase]] = {
        f"prefill {prompt}": lambda model, plain: prefill(model, plain, prompt, args.last_logits)
    }
    for length in caches:
        phases[f"decode {length}"] = lambda model, plain, length=length: decode(model, plain, length)
    plain = build(TINY if args.tiny else LLAMA_1B, device, torch.bfloat16)
    warm_up_compilers(device)
    rows: list[dict[str, Any]] = []
    for name in harness.chosen(list(phases), args.only):
        exact = in_higher_precision(plain, torch.float32)
        ideal = phases[name](exact, exact)
        ideal.prepare()
        reference = ideal.call()
        del exact, ideal
        eager: dict[str, Any] = {}
        for column in args.columns:
            harness.clean_slate(device)
            row: dict[str, Any] = {"phase": name, "column": column}
            rows.append(row)
            try:
                with fresh_cache():
                    row |= run_column(column, plain, phases[name], reference, eager, args.rounds)
            except Exception as problem:
                row["failed"] = harness.complain(f"{name} {column}", problem)
            harness.write_json(args.json, device, rows, sizes=TINY if args.tiny else LLAMA_1B)
    print(table(rows))


if __name__ == "__main__":
    main()
