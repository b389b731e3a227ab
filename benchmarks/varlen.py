"""Attention of packed sequences of many lengths: fc.varlen_attention beside torch's varlen kernel and FlexAttention.

python -m benchmarks.varlen                          on a GPU in bf16
python -m benchmarks.varlen --only mixed --json part.json     a part of it
python -m benchmarks.varlen --merge part.json more.json --json all.json     parts put together

"torch" is torch.nn.attention.varlen (FlashAttention 2), "flex" FlexAttention with the documents as its mask and its
lists of blocks made beforehand; "spelled" is the mask by cumulative lengths in plain PyTorch, compiled by us.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusion_compiler as fc
from fusion_compiler.attention.direct import reference

from . import harness, parts
from .harness import Row

MOST_SCORES = 2e10  # bytes


@dataclass(frozen=True)
class Case:
    name: str
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    dtype: torch.dtype = torch.bfloat16

    def cumulative(self, lengths: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        made = {"device": device, "dtype": self.dtype}
        q = torch.randn(sum(self.q_lens), self.heads, self.width, **made)  # type: ignore[call-overload]
        k, v = (torch.randn(sum(self.k_lens), self.kv_heads, self.width, **made) for _ in range(2))  # type: ignore[call-overload]
        return q, k, v, self.cumulative(self.q_lens, device), self.cumulative(self.k_lens, device)

    def floor(self) -> float:
        pairs = zip(self.q_lens, self.k_lens, strict=True)
        flops = 4 * self.heads * self.width * sum(q * k - q * (q - 1) / 2 for q, k in pairs)
        rows = 2 * (sum(self.q_lens) * self.heads + sum(self.k_lens) * self.kv_heads)
        return harness.floor_seconds(rows * self.width * self.dtype.itemsize, flops, self.dtype)


SKEWED = (8192, 4096, 4096, 2048, 2048, 2048, 1024, 1024, *(512,) * 8, *(256,) * 8, *(128,) * 16)
GPU_CASES = (
    Case("8 prompts of 2048", (2048,) * 8, (2048,) * 8),
    Case("40 prompts of 128 to 8192", SKEWED, SKEWED),
    Case("mixed: 4 prompts of 2048, 60 steps at 4096", (2048,) * 4 + (1,) * 60, (2048,) * 4 + (4096,) * 60),
    Case("64 steps at 4096", (1,) * 64, (4096,) * 64),
)
TINY_CASES = (
    Case("prompts", (40, 7), (40, 7), 4, 2, 16, torch.float32),
    Case("mixed", (33, 1), (33, 40), 4, 2, 16, torch.float32),
)


def ours(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    return fc.varlen_attention(q, k, v, cu_q, cu_k, causal=True)


def spelled(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
    return reference(q, k, v, cu_q, cu_k, True, None, None, q.shape[-1] ** -0.5)


def torch_varlen(case: Case) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(case.q_lens), max(case.k_lens)

    def call(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        found: Tensor = varlen_attn(q, k, v, cu_q, cu_k, *longest, window_size=(-1, 0))
        return found

    return call


def flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cu_q, cu_k = (case.cumulative(n, device) for n in (case.q_lens, case.k_lens))
    rows, keys = (torch.arange(int(n[-1]), device=device) for n in (cu_q, cu_k))
    of_row, of_key = (torch.searchsorted(n, i, right=True) for n, i in ((cu_q, rows), (cu_k, keys)))
    own = rows + (cu_k - cu_q)[of_row]
    seen = lambda b, h, q, k: (of_row[q] == of_key[k]) & (k <= own[q])  # noqa: E731
    blocks = create_block_mask(seen, None, None, len(rows), len(keys), device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        found: Tensor = compiled(q, k, v, block_mask=blocks, enable_gqa=case.heads != case.kv_heads)
        return found[0].transpose(0, 1)

    return call


def exact(case: Case, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    """Each sequence alone, in float32 (float64 of float32)."""
    better = torch.float64 if case.dtype == torch.float32 else torch.float32
    outs, at, before = [], 0, 0
    for q_len, k_len in zip(case.q_lens, case.k_lens, strict=True):
        lengths = torch.tensor([0, q_len], device=q.device), torch.tensor([0, k_len], device=q.device)
        own = q[at : at + q_len], k[before : before + k_len], v[before : before + k_len]
        outs.append(spelled(*(t.to(better) for t in own), *lengths))
        at, before = at + q_len, before + k_len
    return torch.cat(outs)


def prepare(args: argparse.Namespace, case: Case) -> Callable[[], dict[str, Any]]:
    device = torch.device(args.device)
    torch.manual_seed(0)
    inputs = harness.rotated(lambda: case.inputs(device), device)
    columns: dict[str, Any] = {"ours": ours}
    if device.type == "cuda":
        columns |= {"torch": torch_varlen(case), "flex": flex(case, device)}
    row, scores = Row(case.name, floor=case.floor()), 4 * case.heads * sum(case.q_lens) * sum(case.k_lens)
    if scores <= MOST_SCORES:
        columns |= {"eager": spelled, "inductor": harness.compiled(spelled, "inductor")}
    else:
        why = f"all scores, {scores / 1e9:.0f} GB and several copies of them, do not fit"
        row.left_out = dict.fromkeys(("eager", "inductor"), why)
    columns["spelled"] = harness.compiled(spelled, "fusion_compiler")
    turn = harness.prepared(row, columns, inputs, exact(case, *inputs[0]), args.rounds)
    row.predicted, row.verdict = None, ""  # a function that is called by name is decided by its caller
    return lambda: asdict(turn())


def main() -> None:
    parser = harness.arguments(__doc__, rounds=20)
    parser.add_argument("--jobs", type=int, default=4, help=parts.JOBS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help=parts.SECONDS)
    parser.add_argument("--merge", nargs="+", type=Path, help=parts.MERGE)
    args = parser.parse_args()
    device = torch.device(args.device)
    cases = {c.name: c for c in (GPU_CASES if device.type == "cuda" and not args.tiny else TINY_CASES)}
    if args.merge:
        order = [c.name for c in GPU_CASES]
        found = parts.merged(args.merge, lambda row: order.index(row["name"]), args.json)
        print(harness.row_table(harness.rows_of(found)))
        return
    chosen = [cases[name] for name in harness.chosen(list(cases), args.only)]
    rows = []
    for figures in parts.measured(chosen, functools.partial(prepare, args), args.jobs, args.seconds):
        rows.append(figures)
        print(harness.row_table([Row(**figures)]), flush=True)
        harness.write_json(args.json, device, rows)
    print(harness.row_table([Row(**figures) for figures in rows]))


if __name__ == "__main__":
    main()
