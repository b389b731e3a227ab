"""Linears with what stands around them, bf16: a norm or activation in front, a residual or activation behind, several
of one input; weights in float8.

python -m benchmarks.linears                                    every case at 1 and 16 rows
python -m benchmarks.linears --rows 1,4,16,64 --only qkv --max-autotune --json figures.json

Shapes are those of Llama 1B and 8B, where these linears are. On a GPU every row is compiled in a process of its own,
all at the same time; then they measure one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness

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
    function: Callable[..., Any]
    k: int
    widths: tuple[int, ...]
    stored: torch.dtype = torch.bfloat16


CASES = {
    "rms_qkv 8B": Case(rms_qkv, 4096, (4096, 1024, 1024)),
    "residual o 8B": Case(residual, 4096, (4096,)),
    "residual down 1B": Case(residual, 8192, (2048,)),
    "gelu up 1B": Case(gelu, 2048, (8192,)),
    "layer_linear 8B": Case(layer_linear, 4096, (4096,)),
    "rms_qkv 1B": Case(rms_qkv, 2048, (2048, 512, 512)),
    "residual down 8B": Case(residual, 14336, (4096,)),
    "residual down 1B ×4": Case(residual, 8192, (2048,) * 4),
    "activated o 8B": Case(activated, 4096, (4096,)),
    "float8 up 8B": Case(float8, 4096, (14336,), torch.float8_e4m3fn),
}


def place(name: str, args: argparse.Namespace) -> tuple[Callable[..., Any], Callable[[], tuple[Tensor, ...]], float]:
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
    results = m * (2 * widths[0] if case.function is residual else features)
    moved = case.stored.itemsize * k * features + dtype.itemsize * (m * k + results)
    return case.function, make, harness.floor_seconds(moved, 2 * m * k * features, dtype)


def work(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """Compiles, waits for its turn, measures, sends the figures (or what went wrong)."""
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            function, make, floor = place(name, args)
            inputs = harness.rotated(make, torch.device(args.device))
            columns = harness.standard_columns(function, args.max_autotune)
            for column in columns.values():
                with contextlib.suppress(Exception):  # met again, and recorded, when measuring
                    column(*inputs[0])
            pipe.send(None)
            pipe.recv()
            reference = function(*(t.float() for t in inputs[0]))
            row = harness.Row(name, floor=floor)
            pipe.send(harness.measure(row, columns, inputs, reference, args.rounds))
    except Exception:
        pipe.send(f"{name}: {traceback.format_exc()[-1500:]}")


def in_turn(names: list[str], args: argparse.Namespace) -> list[harness.Row]:
    """Every row from a process of its own."""
    spawn, running, rows = multiprocessing.get_context("spawn"), [], []
    for name in names:
        ours, theirs = spawn.Pipe()
        spawn.Process(target=work, args=(name, args, theirs), daemon=True).start()
        running.append(ours)
    ready = [(pipe, pipe.recv()) for pipe in running]
    for pipe, problem in ready:
        if problem is None:
            pipe.send("your turn")
            problem = pipe.recv()
        if isinstance(problem, harness.Row):
            rows.append(problem)
            harness.write_json(args.json, torch.device(args.device), [asdict(row) for row in rows])
            print(harness.row_table([problem]).splitlines()[-1], flush=True)
        else:
            print(problem, flush=True)
    return rows


def main() -> None:
    parser = harness.arguments(__doc__, rounds=15)
    parser.add_argument("--rows", default="16,1", help="values of M (default %(default)s)")
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
