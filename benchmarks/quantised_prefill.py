"""Prompts against keys and values that are stored as codes, as models spell it: dequantised, repeated, masked, softmax.

python -m benchmarks.quantised_prefill                       on a GPU in bf16
python -m benchmarks.quantised_prefill --only "512 of 8192" --json part.json      a part of it
python -m benchmarks.quantised_prefill --merge part.json more.json --json all.json     parts put together

"N of S" are N queries behind the last of S keys, "N in S" so many at the beginning of a cache for S. Beside Inductor
and ours: "codes", the kernel that reads the codes, whether it was chosen or not, and behind Inductor's kernels for the
dequantisation "flex", FlexAttention, and "cudnn", causal cuDNN.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusion_compiler.lowering.triton_codegen.flash import predict

from . import harness, parts
from .harness import Row

MOST_SCORES = 5e9  # bytes
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """`codes`: "int8", "int4" (two in a byte, with zero points) or "fp8"; scales for each token and head but for fp8,
    which has one for all. `position` is where a prompt begins that does not end with the last key."""

    codes: str
    queries: int
    keys: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    position: int | None = None

    @property
    def name(self) -> str:
        place = "of" if self.position is None else "in"
        return f"{self.codes} B{self.batch} {self.heads}/{self.kv_heads} {self.queries} {place} {self.keys}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """q, and the codes, scale and zero of keys, then of values, then the position."""
        shape = (self.batch, self.kv_heads, self.keys)
        q = torch.randn(self.batch, self.heads, self.queries, self.width, device=device, dtype=BF16)
        found = [q]
        for _ in range(2):
            if self.codes == "fp8":
                found += [torch.randn(*shape, self.width, device=device).to(torch.float8_e4m3fn)]
                found += [torch.full((), 0.7, device=device, dtype=BF16)]
                continue
            low, high, dtype = (-127, 128, torch.int8) if self.codes == "int8" else (0, 256, torch.uint8)
            columns = self.width // (1 if self.codes == "int8" else 2)
            found += [torch.randint(low, high, (*shape, columns), device=device, dtype=dtype)]
            top = 60.0 if self.codes == "int8" else 5.0
            found += [((torch.rand(*shape, 1, device=device) + 0.5) / top).to(BF16)]
            if self.codes == "int4":
                found += [(torch.rand(*shape, 1, device=device) * 4 + 6).round().to(BF16)]
        return tuple(found) if self.position is None else (*found, torch.tensor([self.position], device=device))

    def numbers(self, q: Tensor, *stored: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        each = 3 if self.codes == "int4" else 2

        def made(codes: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
            if self.codes == "int4":
                codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
                return (codes.to(q.dtype) - zero[0]) * scale
            return codes.to(q.dtype) * scale

        return made(*stored[:each]), made(*stored[each : 2 * each])

    def attention(self, q: Tensor, *stored: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in self.numbers(q, *stored))
        scores = torch.matmul(q, k.transpose(2, 3)) * self.width**-0.5
        rows = torch.arange(self.queries, device=q.device)[:, None]
        first = stored[-1] if self.position is not None else self.keys - self.queries
        hidden = torch.arange(self.keys, device=q.device) > rows + first
        return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1) @ v

    @property
    def scores_bytes(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys

    def floor(self) -> float:
        seen = (self.position or 0) + self.queries / 2 if self.position is not None else self.keys - self.queries / 2
        flops = 4 * self.batch * self.heads * self.queries * seen * self.width
        rows = 2 * 2 * self.batch * self.heads * self.queries * self.width
        held = (0.5 if self.codes == "int4" else 1) * 2 * self.batch * self.kv_heads * self.keys * self.width
        return harness.floor_seconds(rows + held, flops, BF16)


SHAPES: tuple[dict[str, Any], ...] = (
    {"queries": 128, "keys": 4096, "batch": 4, "kv_heads": 32}, {"queries": 64, "keys": 4096, "batch": 16},
    {"queries": 512, "keys": 8192}, {"queries": 512, "keys": 8192, "position": 0},
    {"queries": 2048, "keys": 2048, "batch": 4}, {"queries": 2048, "keys": 2048, "batch": 4, "kv_heads": 32},
    {"queries": 8192, "keys": 8192},
)  # fmt: skip
KINDS = ("int8", "int4", "fp8")
CASES = tuple(Case(codes, **shape) for shape in SHAPES for codes in KINDS)
TINY = tuple(Case(codes, 32, 64, 1, 4, 2, 32, at) for codes in KINDS for at in (None, 3))


def reading_codes(case: Case) -> Callable[..., Tensor]:
    """Ours, with numbers taken to be made of codes in no time."""

    def attention(*args: Tensor) -> Tensor:  # of its own: what is compiled of one function serves all who ask for it
        return case.attention(*args)

    compiled = harness.compiled(attention, "fusion_compiler")
    free = replace(predict.constants(), code=0.0, float8=0.0, scale=0.0, product=0.0, score=0.0)

    def call(*args: Tensor) -> Tensor:
        with mock.patch.object(predict, "constants", lambda: free):
            found: Tensor = compiled(*args)
        return found

    return call


def rivals(case: Case, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """What is told by hand what is seen, behind the dequantisation."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first = case.keys - case.queries if case.position is None else case.position
    sizes = (None, None, case.queries, case.keys)
    seen = create_block_mask(lambda b, h, i, j: j <= i + first, *sizes, device=device)

    def flex(q: Tensor, *stored: Tensor) -> Tensor:
        found: Any = flex_attention(q, *case.numbers(q, *stored), block_mask=seen, enable_gqa=True)
        return found

    def cudnn(q: Tensor, *stored: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            k, v = case.numbers(q, *stored)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads)

    found = {"codes": reading_codes(case), "flex": torch.compile(flex, dynamic=False)}
    return found | ({"cudnn": torch.compile(cudnn, dynamic=False)} if case.queries == case.keys else {})


def measured(case: Case, args: argparse.Namespace) -> Row:
    device = torch.device(args.device)
    torch.manual_seed(0)
    inputs = harness.rotated(lambda: case.inputs(device), device)
    columns = harness.standard_columns(case.attention, args.max_autotune)
    columns |= rivals(case, device) if device.type == "cuda" else {}
    row = Row(case.name, floor=case.floor())
    if case.scores_bytes > MOST_SCORES:
        row.left_out = dict.fromkeys(("eager", "inductor"), "its scores and their copies take too long to look at")
    columns = {name: fn for name, fn in columns.items() if name not in row.left_out}
    wide = torch.float64 if device.type == "cpu" else torch.float32
    exact = tuple(t.to(wide) if t.dtype == BF16 else t for t in inputs[0])
    reference = columns["flex"](*inputs[0]) if row.left_out else case.attention(*exact)
    found = harness.measure(row, columns, inputs, reference, args.rounds)
    harness.clean_slate(device)
    return found


def main() -> None:
    parser = harness.arguments(__doc__, rounds=20)
    parser.add_argument("--merge", nargs="+", type=Path, help=parts.MERGE)
    args = parser.parse_args()
    device = torch.device(args.device)
    cases = {case.name: case for case in (TINY if args.tiny else CASES)}
    if args.merge:
        order = {name: i for i, name in enumerate(cases)}
        rows = harness.rows_of(parts.merged(args.merge, lambda row: order.get(row["name"], len(order)), args.json))
    else:
        rows = []
        for name in harness.chosen(list(cases), args.only):
            with torch.no_grad():
                rows.append(measured(cases[name], args))
            harness.write_json(args.json, device, [asdict(row) for row in rows])
            print(harness.row_table(rows[-1:]), flush=True)
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
