"""Linears with Q4_0 weights, fp16: what our kernels make of the eager spelling, beside what else could be done.

python -m benchmarks.q4_linear                            M = 1 … 1024 at 4096², 4096×14336 (K×N) and 8192²
python -m benchmarks.q4_linear --only "4096×14336 M=1 " --json figures.json --plot figure.svg

fp16: cuBLAS on a weight that is stored dequantised. tinygemm: torch's int4 kernel, its own format. ours, Q8_1: with
options={"activations": "q8_1"}, its error beside ggml's exact integer product as well. two kernels: the activations
are rounded to Q8_1 by the graph, so that Inductor's kernel writes them and ours for the product reads them. floor:
every byte of the packed weight, x and the result once, or the arithmetic.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler import ggml
from fusion_compiler.ggml import q4_0

from . import harness

SHAPES = {"4096×4096": (4096, 4096), "4096×14336": (4096, 14336), "8192×8192": (8192, 8192)}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
GROUP = 32
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


def plot(path: Path, rows: list[harness.Row]) -> None:
    """Times over M as lines on a logarithmic grid, one panel per shape; an SVG of its own, no library needed."""
    shapes = list(dict.fromkeys(row.name.split(" M=")[0] for row in rows))
    colours = ("#444", "#c33", "#38c", "#e90", "#2a2", "#93c", "#999")
    parts = []
    for panel, shape in enumerate(shapes):
        here = [row for row in rows if row.name.startswith(f"{shape} M=")]
        left = 60 + 420 * panel
        parts.append(f'<text x="{left}" y="20">{shape}, µs over M</text>')
        columns = [*dict.fromkeys(c for row in here for c in row.seconds), "floor"]
        for number, column in enumerate(columns):
            points = []
            for row in here:
                seconds = row.floor if column == "floor" else row.seconds.get(column)
                if seconds:
                    x = left + 32 * (int(row.name.split("M=")[1]).bit_length() - 1)
                    points.append((x, 380 - 100 * (torch.tensor(seconds * 1e6).log10().item() - 0.3)))
            line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
            colour = colours[number % len(colours)]
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<text x="{left}" y="{40 + 14 * number}" fill="{colour}" font-size="11">{column}</text>')
    size = f'width="{60 + 420 * len(shapes)}" height="400"'
    path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{"".join(parts)}</svg>\n')


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="values of M (default %(default)s)")
    parser.add_argument("--plot", metavar="PATH", type=Path, help="draw the figures there (SVG)")
    parser.add_argument("--ours-only", action="store_true", help="leave the slow columns out: eager and Inductor")
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes = {"128×64": (128, 64)} if args.tiny else SHAPES
    cases = {f"{name} M={m}": (m, *shape) for name, shape in shapes.items() for m in map(int, args.rows.split(","))}
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name in harness.chosen(list(cases), args.only):
            m, k, n = cases[name]
            stored = n * k * 18 / 32 + 2 * m * (k + n)
            inputs = harness.rotated(lambda m=m, k=k, n=n: make(m, k, n, device), device, stored)  # type: ignore[misc]
            x, qs, d = (t.double() if t.is_floating_point() else t for t in inputs[0][:3])
            reference = split(x, qs, d)
            columns = harness.standard_columns(split, args.max_autotune)
            if args.ours_only:
                columns = {"ours": columns["ours"]}
            if m <= FEW:
                columns["ours, Q8_1"] = harness.compiled(split, "fusion_compiler", options={"activations": "q8_1"})
                columns["two kernels"] = harness.compiled(rounded, "fusion_compiler")
            columns["fp16"] = stored_dequantised
            if device.type == "cuda":
                columns["tinygemm"] = tinygemm
            floor = harness.floor_seconds(stored, 2 * m * n * k, torch.float16)
            rows.append(harness.measure(harness.Row(name, floor=floor), columns, inputs, reference, args.rounds))
            if "ours, Q8_1" in rows[-1].error:
                wanted = exact(*inputs[0][:3])
                rows[-1].error[EXACT] = harness.relative_error(columns["ours, Q8_1"](*inputs[0]), wanted)
            print(harness.row_table(rows[-1:]), flush=True)
            harness.write_json(args.json, device, [asdict(row) for row in rows])
            harness.clean_slate(device)
    if args.plot:
        plot(args.plot, rows)
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
