"""Norms and softmax of rows, bf16: one generated kernel beside Inductor's own, where the choice is close.

python -m benchmarks.rows                            every operation at 4096 rows
python -m benchmarks.rows --rows 16,4096,65536 --only add_norm --json figures.json

"ours" is what the cost model chose; "kernel" is the generated kernel whether it was chosen or not, so that a wrong
choice shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_compiler.lowering.triton_codegen import row_reduction

from . import harness

WIDTHS = (1024, 2048, 4096, 8192, 16384, 32768)
EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, eps=EPS)


def softmax(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def add_norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return rms_norm(h, weight, residual), h


# how many tensors of the size of x each reads and writes at least
OPERATIONS: dict[Callable[..., Any], int] = {rms_norm: 2, layer_norm: 2, softmax: 2, add_norm: 4}


def whatever_it_costs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` under our backend, with the generated kernel taken to need no time."""
    compiled = harness.compiled(fn, "fusion_compiler")

    def call(*args: Any) -> Any:
        with mock.patch.object(row_reduction, "seconds", lambda op, moved, machine: 0.0):
            return compiled(*args)

    return call


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rows", default="4096", help="numbers of rows (default %(default)s)")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), torch.bfloat16
    heights, widths = ((4,), (64,)) if args.tiny else (tuple(map(int, args.rows.split(","))), WIDTHS)
    cases = {f"{f.__name__} {m}x{n}": (f, m, n) for f in OPERATIONS for m in heights for n in widths}
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name in harness.chosen(list(cases), args.only):
            fn, m, n = cases[name]

            def make(m: int = m, n: int = n) -> tuple[Tensor, ...]:
                x, residual = torch.randn(2, m, n, device=device, dtype=dtype)
                return x, torch.rand(n, device=device, dtype=dtype) + 0.5, residual

            floor = harness.floor_seconds(OPERATIONS[fn] * m * n * dtype.itemsize, 0, dtype)
            rows.append(harness.compare(name, fn, make, floor, args, {"kernel": whatever_it_costs(fn)}))
    harness.write_json(args.json, device, [asdict(row) for row in rows])
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
