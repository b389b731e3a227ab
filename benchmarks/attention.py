"""Causal attention as models spell it, before any kernel: masked_fill, and transformers' eager path with repeat_kv.

python -m benchmarks.attention                       the GPU table in bf16, or on a CPU the CPU table
python -m benchmarks.attention --only S2048 --json figures.json

The column "sdpa causal" calls F.scaled_dot_product_attention(is_causal=True) by hand: the best a compiler can prove.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness
from .harness import Row


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of later keys are filled with -inf."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' eager_attention_forward: repeated keys and values, and a mask of the dtype's least number added."""
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = repeat_kv(k, times), repeat_kv(v, times)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    rows = torch.arange(q.shape[-2], device=q.device)[None, None, :, None]
    columns = torch.arange(k.shape[-2], device=q.device)[None, None, None, :]
    least = torch.finfo(q.dtype).min
    scores = scores + torch.where(columns <= rows, q.new_zeros(()), least)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@dataclass(frozen=True)
class Case:
    spelling: Callable[[Tensor, Tensor, Tensor], Tensor]
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        spelling = "" if self.spelling is additive else f" {self.spelling.__name__}"
        return f"B{self.batch} H{heads} S{self.length} D{self.width} {str(self.dtype).removeprefix('torch.')}{spelling}"

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        shape = (self.batch, self.kv_heads, self.length, self.width)
        q = torch.randn(self.batch, self.heads, self.length, self.width, device=device, dtype=self.dtype)
        k, v = (torch.randn(shape, device=device, dtype=self.dtype) for _ in range(2))
        return q, k, v

    def floor(self) -> float:
        """Every input read and the output written once; half of the scores are masked out and need no work."""
        moved = 2 * self.batch * (self.heads + self.kv_heads) * self.length * self.width * self.dtype.itemsize
        flops = 4 * self.batch * self.heads * self.length**2 * self.width / 2
        return harness.floor_seconds(moved, flops, self.dtype)


BF16, FP32 = torch.bfloat16, torch.float32
GPU_CASES = (
    Case(masked_fill, 4, 32, 32, 1024, 128, BF16),
    Case(additive, 4, 32, 32, 1024, 128, BF16),
    Case(masked_fill, 4, 32, 32, 2048, 128, BF16),
    Case(additive, 4, 32, 32, 2048, 128, BF16),
    Case(additive, 1, 32, 8, 8192, 128, BF16),
)
CPU_CASES = tuple(Case(additive, 1, 8, 2, length, 64, dtype) for length in (512, 2048) for dtype in (FP32, BF16))
TINY_CASES = (Case(masked_fill, 1, 2, 2, 64, 16, FP32), Case(additive, 1, 4, 2, 64, 16, FP32))


def main() -> None:
    args = harness.arguments(__doc__, rounds=20).parse_args()
    device = torch.device(args.device)
    table = TINY_CASES if args.tiny else GPU_CASES if device.type == "cuda" else CPU_CASES
    cases = {case.name: case for case in table}
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name in harness.chosen(list(cases), args.only):
            case = cases[name]
            inputs = harness.rotated(lambda case=case: case.inputs(device), device)
            better = torch.float64 if case.dtype is FP32 else FP32
            # one batch entry at a time, to keep the scores small
            entries = [[t[i : i + 1].to(better) for t in inputs[0]] for i in range(case.batch)]
            reference = torch.cat([case.spelling(*entry) for entry in entries])
            columns = harness.standard_columns(case.spelling, args.max_autotune) | {"sdpa causal": sdpa_causal}
            row = Row(name, floor=case.floor())
            rows.append(harness.measure(row, columns, inputs, reference, args.rounds))
            del inputs, entries, reference
            harness.clean_slate(device)
    harness.write_json(args.json, device, [asdict(row) for row in rows])
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
