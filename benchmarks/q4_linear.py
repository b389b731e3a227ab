"""Linears with Q4_0 weights, fp16: what our kernels make of the eager spelling, beside what else could be done.

python -m benchmarks.q4_linear                            M = 1 … 1024 at 4096², 4096×14336 (K×N) and 8192²
python -m benchmarks.q4_linear --only 4096×14336 --rows 1,16 --json figures.json
python -m benchmarks.q4_linear --merge one.json other.json --json figures.json --plot figure.svg

fp16: cuBLAS on a weight that is stored dequantised. tinygemm: torch's int4 kernel, its own format. ours, Q8_1: with
options={"activations": "q8_1"}, its error beside ggml's exact integer product as well, where it rounds to eight bits.
two kernels: the activations are rounded to Q8_1 by the graph, so that Inductor's kernel writes them and ours for the
product reads them. floor: every byte of the packed weight, x and the result once, or the arithmetic. nmse: the error
squared. codes: shares of the codes that the kernel makes of one row, read off its products with an identity, that are
those of the reference, or one off. On a GPU several processes prepare the rows at the same time; then they measure one
after the other.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler import ggml
from fusion_compiler.ggml import q4_0, q8_1

from . import harness, parts

SHAPES = {"4096×4096": (4096, 4096), "4096×14336": (4096, 14336), "8192×8192": (8192, 8192)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
GROUP = 32
EIGHT_BITS = 1e-3  # an error that rounding to eight bits makes, and float16 does not
FEW = 4  # rows for which activations may be quantised in the kernel
EXACT = "ours, Q8_1, beside the exact product"


def split(x: Tensor, qs: Tensor, d: Tensor, *others: Tensor) -> Tensor:
    """Codes [N, K/32, 16] and scales [N, K/32] apart."""
    codes = torch.cat([qs & 15, qs >> 4], -1).to(torch.int8) - 8
    return F.linear(x, (codes.to(x.dtype) * d[..., None].to(x.dtype)).flatten(1))


def rounded(x: Tensor, *others: Tensor) -> Tensor:
    """The same of activations that are rounded to Q8_1 first."""
    blocks = x.unflatten(-1, (-1, 32))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    return split((torch.round(blocks / d).to(torch.int8) * d).flatten(-2), *others)


def exact(x: Tensor, qs: Tensor, d: Tensor) -> Tensor:
    return ggml.exact(x, torch.cat([d.unsqueeze(-1).view(torch.uint8), qs], -1).flatten(1))


def stored_dequantised(x: Tensor, qs: Tensor, d: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    return F.linear(x, weight)


def tinygemm(x: Tensor, qs: Tensor, d: Tensor, weight: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x.bfloat16(), words, GROUP, scales).to(x.dtype)


def make(m: int, k: int, n: int, device: torch.device) -> tuple[Tensor, ...]:
    raw = q4_0.quantise(torch.randn(n, k, device=device) / k**0.5)
    blocks = raw.view(n, -1, 18)
    qs, d = blocks[..., 2:].contiguous(), blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    inputs = (torch.randn(m, k, device=device).half(), qs, d, q4_0.dequantise(raw, torch.float16))
    if device.type != "cuda":
        return inputs
    codes = (torch.cat([qs & 15, qs >> 4], -1).flatten(1)).to(torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    scales = torch.stack([d.t(), torch.zeros_like(d.t())], -1).bfloat16().contiguous()
    return (*inputs, words, scales)


@dataclass(frozen=True)
class Item:
    name: str  # of a row
    m: int
    k: int
    n: int


def identity(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight that gives x back."""
    at = torch.arange(k, device=device)
    qs = torch.full((k, k // 32, 16), 0x88, dtype=torch.uint8, device=device)
    qs[at, at // 32, at % 16] += torch.where(at % 32 < 16, 1, 16).to(torch.uint8)
    return qs, torch.ones(k, k // 32, dtype=torch.float16, device=device)


def codes(x: Tensor) -> dict[str, float]:
    """Shares of the codes made of x [1, K] that are equal to the reference's, one off, and further off."""
    run = harness.compiled(split, "fusion_compiler", options={"activations": "q8_1"})
    d, _, wanted = q8_1.parts(q8_1.quantise(x))
    made = run(x, *identity(x.shape[1], x.device)).view(wanted.shape).double() / d.double()
    off = torch.where(d == 0, 0, made.round() - wanted.double()).abs()
    return {
        name: float(part.double().mean())
        for name, part in (("equal", off == 0), ("one off", off == 1), ("more", off > 1))
    }


def prepare(args: argparse.Namespace, item: Item) -> Callable[[], dict[str, Any]]:
    torch.manual_seed(0)
    device, m, k, n = torch.device(args.device), item.m, item.k, item.n
    stored = n * k * 18 / 32 + 2 * m * (k + n)
    inputs = harness.rotated(lambda: make(m, k, n, device), device, stored)
    x, qs, d = (t.double() if t.is_floating_point() else t for t in inputs[0][:3])
    columns = harness.standard_columns(split, args.max_autotune)
    if args.ours_only:
        columns = {"ours": columns["ours"]}
    few = m <= FEW
    if few:
        columns["ours, Q8_1"] = harness.compiled(split, "fusion_compiler", options={"activations": "q8_1"})
        columns["two kernels"] = harness.compiled(rounded, "fusion_compiler")
    columns["fp16"] = stored_dequantised
    if device.type == "cuda":
        columns["tinygemm"] = tinygemm
    floor = harness.floor_seconds(stored, 2 * m * n * k, torch.float16)
    row = harness.Row(item.name, floor=floor)
    turn = harness.prepared(row, columns, inputs, split(x, qs, d), args.rounds)
    if row.error.get("ours, Q8_1", 0.0) > EIGHT_BITS:
        row.error[EXACT] = harness.relative_error(columns["ours, Q8_1"](*inputs[0]), exact(*inputs[0][:3]))
    more = {
        "nmse": {name: error**2 for name, error in row.error.items()},
        "codes": codes(inputs[0][0]) if m == 1 else None,
    }
    return lambda: asdict(turn()) | more


def in_turn(items: list[Item], args: argparse.Namespace) -> list[dict[str, Any]]:
    device, rows, preparing = torch.device(args.device), [], functools.partial(prepare, args)
    if device.type == "cuda":
        measured = parts.measured(items, preparing, args.jobs, args.seconds)
    else:
        measured = (preparing(item)() for item in items)
    for figures in measured:
        rows.append(figures)
        print(table(rows[-1:]), flush=True)
        harness.write_json(args.json, device, rows)
        harness.clean_slate(device)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Times and verdicts, and below them what is known of the errors."""
    lines = [harness.row_table(harness.rows_of(rows))]
    for row in rows:
        errors = ", ".join(f"{name} {error**2:.1e}" for name, error in row["error"].items())
        shares = ", ".join(f"{name} {share:.3%}" for name, share in (row.get("codes") or {}).items())
        lines.append(f"{row['name']}: nmse {errors}" + (f"; codes {shares}" if shares else ""))
    return "\n".join(lines)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Times over M as lines on a logarithmic grid, one panel per shape; an SVG of its own, no library needed."""
    shapes = list(dict.fromkeys(row["name"].split(" M=")[0] for row in rows))
    colours = ("#444", "#c33", "#38c", "#e90", "#2a2", "#93c", "#999")
    parts = []
    for panel, shape in enumerate(shapes):
        here = [row for row in rows if row["name"].startswith(f"{shape} M=")]
        left = 60 + 420 * panel
        parts.append(f'<text x="{left}" y="20">{shape}, µs over M</text>')
        columns = [*dict.fromkeys(c for row in here for c in row["seconds"]), "floor"]
        for number, column in enumerate(columns):
            points = []
            for row in here:
                seconds = row["floor"] if column == "floor" else row["seconds"].get(column)
                if seconds:
                    x = left + 32 * (int(row["name"].split("M=")[1]).bit_length() - 1)
                    points.append((x, 380 - 100 * (torch.tensor(seconds * 1e6).log10().item() - 0.3)))
            line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
            colour = colours[number % len(colours)]
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<text x="{left}" y="{40 + 14 * number}" fill="{colour}" font-size="11">{column}</text>')
    size = f'width="{60 + 420 * len(shapes)}" height="400"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{"".join(parts)}</svg>\n')


@torch.no_grad()
def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="values of M (default %(default)s)")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="draw the figures there (SVG)")
    parser.add_argument("--ours-only", action="store_true", help="leave the slow columns out: eager and Inductor")
    parser.add_argument("--jobs", type=int, default=10, help=parts.JOBS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=parts.SECONDS)
    parser.add_argument("--merge", nargs="+", type=Path, help=parts.MERGE)
    args = parser.parse_args()
    shapes = {"128×64": (128, 64)} if args.tiny else SHAPES
    numbers = [*map(int, args.rows.split(","))]
    items = {f"{name} M={m}": Item(f"{name} M={m}", m, *shape) for m in numbers for name, shape in shapes.items()}
    if args.merge:
        order = [f"{name} M={m}" for name in shapes for m in ROWS]
        rows = parts.merged(args.merge, lambda row: order.index(row["name"]), args.json)
    else:
        rows = in_turn([items[name] for name in harness.chosen(list(items), args.only)], args)
    if args.plot:
        plot(args.plot, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
