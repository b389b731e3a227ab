"""RMSNorm and gated MLP, bf16: silu(norm(x) @ Wg.T) * (norm(x) @ Wu.T) for few rows, where the weights are the cost.

python -m benchmarks.gated_mlp                       M = 1 and 16 at K/N 2048/8192 and 4096/14336
python -m benchmarks.gated_mlp --rows 1,4,64,256,4096 --only 2048/8192 --json figures.json
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness

SHAPES = {"2048/8192": (2048, 8192), "4096/14336": (4096, 14336)}
EPS = 1e-5


def gated_mlp(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """As transformers' Llama spells it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    h = norm * wide.to(x.dtype)
    return F.silu(F.linear(h, gate)) * F.linear(h, up)


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--rows", default="1,16", help="values of M (default %(default)s)")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), torch.bfloat16
    shapes = {"64/128": (64, 128)} if args.tiny else SHAPES
    cases = {f"{name} M={m}": (m, *shape) for name, shape in shapes.items() for m in map(int, args.rows.split(","))}
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name in harness.chosen(list(cases), args.only):
            m, k, n = cases[name]

            def make(m: int = m, k: int = k, n: int = n) -> tuple[Tensor, ...]:
                x = torch.randn(m, k, device=device, dtype=dtype)
                norm = torch.rand(k, device=device, dtype=dtype) + 0.5
                gate, up = (torch.randn(n, k, device=device, dtype=dtype) / k**0.5 for _ in range(2))
                return x, norm, gate, up

            moved = (2 * n * k + m * k + m * n + k) * dtype.itemsize
            floor = harness.floor_seconds(moved, 4 * m * n * k, dtype)
            rows.append(harness.compare(name, gated_mlp, make, floor, args))
    harness.write_json(args.json, device, [asdict(row) for row in rows])
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
