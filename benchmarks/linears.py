"""Linears with what stands around them, bf16: a norm or activation in front, a residual or activation behind, several
of one input; weights in float8.

python -m benchmarks.linears                                    every case at 1 and 16 rows
python -m benchmarks.linears --rows 1,4,16,64 --only qkv --max-autotune --json figures.json

Shapes are those of Llama 1B and 8B, where these linears are. On a GPU several processes compile the rows at the same
time; then they measure one after the other. max-autotune is compiled twice: with the others, to have its kernels, and
in its turn, to choose among them alone on the device.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness, parts
from .gated_mlp import gated_mlp

EPS = 1e-5


def rms_qkv(x: Tensor, norm: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    h = F.rms_norm(x, x.shape[-1:], norm, EPS)
    return tuple(F.linear(h, w) for w in weights)


def layer_linear(x: Tensor, norm: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], norm, norm, EPS), w)


def residual(x: Tensor, norm: Tensor, r: Tensor, *weights: Tensor) -> Tensor:
    """With several weights, as many layers' worth: they share what a graph needs once."""
    for w in weights:
        r = r + F.linear(x, w)
    return r


def activated(x: Tensor, norm: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.gelu(x), w)


def float8(x: Tensor, norm: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w.to(x.dtype) * norm[0])


def gelu(x: Tensor, norm: Tensor, w: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w))


@dataclass(frozen=True)
class Case:
    function: FunctionType
    k: int
    widths: tuple[int, ...]
    stored: torch.dtype = torch.bfloat16


CASES = {
    "rms_qkv 8B": Case(rms_qkv, 4096, (4096, 1024, 1024)),
    "residual o 8B": Case(residual, 4096, (4096,)),
    "residual down 1B": Case(residual, 8192, (2048,)),
    "gelu up 1B": Case(gelu, 2048, (8192,)),
    "layer_linear 8B": Case(layer_linear, 4096, (4096,)),
    "gated_mlp 1B": Case(gated_mlp, 2048, (8192, 8192)),
    "gated_mlp 8B": Case(gated_mlp, 4096, (14336, 14336)),
    "rms_qkv 1B": Case(rms_qkv, 2048, (2048, 512, 512)),
    "residual down 8B": Case(residual, 14336, (4096,)),
    "residual down 1B ×4": Case(residual, 8192, (2048,) * 4),
    "activated o 8B": Case(activated, 4096, (4096,)),
    "float8 up 8B": Case(float8, 4096, (14336,), torch.float8_e4m3fn),
}


def place(name: str, args: argparse.Namespace) -> tuple[FunctionType, Callable[[], tuple[Tensor, ...]], float]:
    """(what is computed, what makes its inputs, the least time) of a row."""
    case, m = CASES[name.rsplit(" M=", 1)[0]], int(name.rsplit("=", 1)[1])
    k, widths = (64, (64,) * len(case.widths)) if args.tiny else (case.k, case.widths)
    device, dtype = torch.device(args.device), torch.bfloat16

    def make() -> tuple[Tensor, ...]:
        x, norm = torch.randn(m, k, device=device, dtype=dtype), torch.rand(k, device=device, dtype=dtype) + 0.5
        weights = ((torch.randn(n, k, device=device, dtype=dtype) / k**0.5).to(case.stored) for n in widths)
        added = [torch.randn(m, widths[0], device=device, dtype=dtype)] if case.function is residual else []
        return x, norm, *added, *weights

    features = sum(widths)
    # a residual is read where a result is written
    results = m * {residual: 2 * widths[0], gated_mlp: widths[0]}.get(case.function, features)
    moved = case.stored.itemsize * k * features + dtype.itemsize * (m * k + results)
    return case.function, make, harness.floor_seconds(moved, 2 * m * k * features, dtype)


def prepare(args: argparse.Namespace, item: parts.Item) -> Callable[[], dict[str, Any]]:
    torch.manual_seed(0)
    function, make, floor = place(item.name, args)
    inputs = harness.rotated(make, torch.device(args.device))
    late = {}
    if args.max_autotune and any(text in item.name for text in args.tuned.split(",")):
        late["max-autotune"] = functools.partial(parts.tuned, function, inputs[0])
        parts.tuned(function, inputs[0])
    reference = function(*(t.float() for t in inputs[0]))
    row, columns = harness.Row(item.name, floor=floor), harness.standard_columns(function)
    turn = harness.prepared(row, columns, inputs, reference, args.rounds, late)
    return lambda: asdict(turn())


def in_turn(names: Sequence[str], args: argparse.Namespace) -> list[harness.Row]:
    rows: list[harness.Row] = []
    for figures in parts.measured([*map(parts.Item, names)], functools.partial(prepare, args), args.jobs, args.seconds):
        rows.append(harness.Row(**figures))
        harness.write_json(args.json, torch.device(args.device), [asdict(row) for row in rows])
        print(harness.row_table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def main() -> None:
    parser = harness.arguments(__doc__, rounds=15)
    parser.add_argument("--rows", default="16,1", help="values of M (default %(default)s)")
    parser.add_argument(
        "--tuned", default="qkv,gated", help="rows with --max-autotune, as --only (default %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=10, help=parts.JOBS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=parts.SECONDS)
    args = parser.parse_args()
    names = [f"{case} M={m}" for m in args.rows.split(",") for case in CASES]
    names = list(harness.chosen(names, args.only))
    if args.device == "cuda":
        rows = in_turn(names, args)
    else:
        with torch.no_grad():
            rows = [harness.compare(name, *place(name, args), args) for name in names]
    harness.write_json(args.json, torch.device(args.device), [asdict(row) for row in rows])
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
