"""Attention as models spell it, before any kernel, with whatever they do to the scores.

python -m benchmarks.attention                       the GPU table in bf16, or on a CPU the CPU table
python -m benchmarks.attention --only "S2048 D128 bfloat16 softcap" --json part.json      a part of it
python -m benchmarks.attention --merge part.json more.json --json all.json --plot all.svg   parts put together

--plot draws the lines of sequence lengths (needs matplotlib). With several --jobs, processes prepare rows at the same
time and then measure one after the other.

Beside eager, Inductor and ours: "flex", FlexAttention told by hand what is done to the scores, and "cudnn" and
"flash-2", F.scaled_dot_product_attention by hand with that kernel: on causal or plain attention where that is what is
computed, otherwise on the full causal attention, of which ours sees a part or to whose scores more happens. The
unnamed spelling is transformers' eager attention, which computes its causal mask in the graph. Rows of one size and
many lengths hold 8192 tokens each (small, medium and large models: hidden 1024, 2048 and 4096); what writes scores out
is left out where they do not fit, and the row says so.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import harness, parts
from .attention_cases import CPU_CASES, FP32, GPU_CASES, TINY_CASES, Case, documents, flex, plain, t5
from .harness import Row

MOST_SCORES = 1e10  # bytes
VENDORS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash-2": SDPBackend.FLASH_ATTENTION}


def vendor(case: Case, kernel: SDPBackend) -> Callable[..., Tensor]:
    causal, grouped = case.spelling is not plain, case.heads != case.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    return call


def prepare(args: argparse.Namespace, case: Case) -> Callable[[], dict[str, Any]]:
    device = torch.device(args.device)
    torch.manual_seed(0)
    inputs = harness.rotated(lambda: case.inputs(device), device)
    columns = harness.standard_columns(case.spelling, args.max_autotune)
    if device.type == "cuda":
        if case.spelling is not t5:
            columns |= {name: vendor(case, kernel) for name, kernel in VENDORS.items()}
        columns["flex"] = flex(case, device)
    row = Row(case.name, floor=case.floor())
    if case.scores_bytes > MOST_SCORES:
        why = f"its scores, {case.scores_bytes / 1e9:.0f} GB and several copies of them, do not fit"
        row.left_out = {name: why for name in ("eager", "inductor", "max-autotune") if name in columns}
    columns = {name: fn for name, fn in columns.items() if name not in row.left_out}
    reference = reference_of(case, inputs[0], torch.float64 if case.dtype is FP32 else FP32, columns)
    turn = harness.prepared(row, columns, inputs, reference, args.rounds)
    return lambda: asdict(turn())


def reference_of(case: Case, inputs: tuple[Tensor, ...], better: torch.dtype, columns: dict[str, Any]) -> Tensor:
    """The result in better floats, one batch entry at a time; FlexAttention's where the scores do not fit."""
    if "eager" not in columns:
        found: Tensor = columns["flex"](*inputs)
        return found
    batched = len(inputs) if case.spelling is documents else 3
    entries = ([t[i : i + 1] if n < batched else t for n, t in enumerate(inputs)] for i in range(case.batch))
    wide = ([t.to(better) if t.is_floating_point() else t for t in entry] for entry in entries)
    return torch.cat([case.spelling(*entry) for entry in wide])


def measured(cases: Sequence[Case], args: argparse.Namespace) -> Iterator[Row]:
    """The rows of all cases, written to the file as they come."""
    device, preparing = torch.device(args.device), functools.partial(prepare, args)
    rows = []

    def one_by_one() -> Iterator[dict[str, Any]]:
        for case in cases:
            with torch.no_grad():
                yield preparing(case)()
            harness.clean_slate(device)

    for figures in parts.measured(cases, preparing, args.jobs, args.seconds) if args.jobs > 1 else one_by_one():
        rows.append(figures)
        harness.write_json(args.json, device, rows)
        yield Row(**figures)


def kernels_table(cases: dict[str, Case], rows: list[Row]) -> str:
    """Ours beside the fastest kernels there are: of vendors for plain and causal attention, FlexAttention for the rest;
    and what these reach against Inductor."""
    header = ["", "ours µs", "best vendor µs", "ours / vendor", "Inductor / ours", "Inductor / vendor", "flex / ours"]
    lines = []
    for row in rows:
        ours, times = row.seconds.get("ours"), row.seconds
        if ours is None:
            continue
        best = min((times[name] for name in VENDORS if name in times), default=None)
        same = best if row.name in cases and cases[row.name].is_full else None
        pairs = (ours, same), (times.get("inductor"), ours), (times.get("inductor"), same), (times.get("flex"), ours)
        ratios = [f"{a / b:.2f}" if a is not None and b is not None else "–" for a, b in pairs]
        lines.append([row.name, harness.microseconds(ours), harness.microseconds(best), *ratios])
    return harness.markdown(header, lines)


def memory_table(rows: list[Row]) -> str:
    """Device memory beyond the inputs that each column needs at its peak, in MB."""
    columns = list(dict.fromkeys(c for row in rows for c in row.peak))
    lines = []
    for row in rows:
        held = [f"{row.peak[c] / 1e6:.0f}" if c in row.peak else "–" for c in columns]
        eager, ours = row.peak.get("eager"), row.peak.get("ours")
        lines.append([row.name, *held, f"{1 - ours / eager:.1%}" if eager and ours is not None else "–"])
    return harness.markdown(["peak MB", *columns, "ours saves of eager's"], lines)


def plot(path: Path, cases: dict[str, Case], rows: list[Row]) -> None:
    """Time over sequence length, one line per column, one picture for each modification and size of which there are
    several lengths: rows of one batch entry, or of 8192 tokens."""
    from matplotlib import pyplot

    of: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        case = cases[row.name]
        if case.batch not in (1, 8192 // case.length):
            continue
        title = f"{case.spelling.__name__}, {'/'.join(map(str, case.of_heads[:2]))} heads of {case.width}"
        of.setdefault(title, []).append((case.length, row))
    lines = {title: found for title, found in of.items() if len({n for n, _ in found}) > 1}
    if not lines:
        return
    _, pictures = pyplot.subplots(1, len(lines), figsize=(4.5 * len(lines), 4), squeeze=False)
    for (title, found), picture in zip(lines.items(), pictures[0], strict=True):
        for column in dict.fromkeys(c for _, row in found for c in row.seconds):
            points = sorted((n, row.seconds[column] * 1e6) for n, row in found if column in row.seconds)
            picture.loglog(*zip(*points, strict=True), marker="o", base=2, label=column)
        picture.set(title=title, xlabel="sequence length", ylabel="µs")
        picture.legend()
    pyplot.tight_layout()
    pyplot.savefig(path)


def main() -> None:
    parser = harness.arguments(__doc__, rounds=20)
    parser.add_argument("--plot", metavar="PATH", type=Path, help="draw the figures there")
    parser.add_argument("--merge", nargs="+", type=Path, help=parts.MERGE)
    parser.add_argument("--jobs", type=int, default=1, help=parts.JOBS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=parts.SECONDS)
    args = parser.parse_args()
    device = torch.device(args.device)
    table = TINY_CASES if args.tiny else GPU_CASES if device.type == "cuda" or args.merge else CPU_CASES
    cases = {case.name: case for case in table}
    if args.merge:
        order = {name: i for i, name in enumerate(cases)}
        found = parts.merged(args.merge, lambda row: order.get(row["name"], len(order)), args.json)
        rows = harness.rows_of(found)
    else:
        rows = []
        for row in measured([cases[name] for name in harness.chosen(list(cases), args.only)], args):
            rows.append(row)
            print(harness.row_table([row]), flush=True)
    print(harness.row_table(rows))
    if any(row.peak for row in rows):
        print(f"\n{kernels_table(cases, rows)}\n\n{memory_table(rows)}")
    if args.plot:
        plot(args.plot, cases, rows)


if __name__ == "__main__":
    main()
