"""Rotation of queries and keys and the write of keys and values into a static cache, of bf16 or of codes.

python -m benchmarks.cache_writes                            on a GPU in bf16
python -m benchmarks.cache_writes --only "fp8 B16" --json part.json       a part of it

32/8 heads of 128; "N at P" are N new tokens at position P of a cache of 4096. Codes: k / scale with a scale for each
head, clamped and cast to float8, or rounded, clamped and cast to int8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from . import harness
from .harness import Row

HEADS, KV_HEADS, WIDTH, CACHE = 32, 8, 128, 4096
BF16 = torch.bfloat16
STORED = {"bf16": BF16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


@dataclass(frozen=True)
class Case:
    codes: str
    batch: int
    tokens: int
    position: int

    @property
    def name(self) -> str:
        return f"{self.codes} B{self.batch} {self.tokens} at {self.position}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """q, k, v as a projection leaves them, cos, sin, both caches, position, both scales."""
        made = {"device": device, "dtype": BF16}
        heads = (torch.randn(self.batch, self.tokens, n * WIDTH, **made) for n in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[call-overload]
        angles = torch.rand(1, 1, self.tokens, WIDTH // 2, device=device).repeat(1, 1, 1, 2) * 3
        shape = (self.batch, KV_HEADS, CACHE, WIDTH)
        caches = (torch.zeros(shape, device=device).to(STORED[self.codes]) for _ in range(2))
        scales = (torch.rand(KV_HEADS, 1, 1, device=device).add(0.5).div(40).to(BF16) for _ in range(2))
        return *heads, angles.cos().to(BF16), angles.sin().to(BF16), *caches, self.at(device), *scales

    def at(self, device: torch.device) -> Tensor:
        return torch.tensor([self.position], device=device)

    def stored(self, rows: Tensor, scale: Tensor) -> Tensor:
        if self.codes == "bf16":
            return rows.to(BF16)
        if self.codes == "fp8":
            return (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (rows / scale).round().clamp(-128, 127).to(torch.int8)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor,
        ks: Tensor, vs: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, v = (t.view(self.batch, self.tokens, -1, WIDTH).transpose(1, 2) for t in (q, k, v))
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        places = at + torch.arange(self.tokens, device=q.device)
        keys[:, :, places] = self.stored(k, ks)
        values[:, :, places] = self.stored(v, vs)
        return q

    def floor(self) -> float:
        tokens = self.batch * self.tokens * WIDTH
        read = 2 * tokens * (2 * HEADS + 2 * KV_HEADS)
        return harness.floor_seconds(read + STORED[self.codes].itemsize * tokens * 2 * KV_HEADS, 0, BF16)


CASES = tuple(Case(c, b, n, p) for b, n, p in ((1, 1, 1000), (16, 1, 1000), (1, 2048, 0)) for c in STORED)


def measured(case: Case, rounds: int, device: torch.device) -> Row:
    torch.manual_seed(0)
    inputs = harness.rotated(lambda: case.inputs(device), device)
    step: Callable[..., Tensor] = case.step
    row = Row(case.name, floor=case.floor())
    reference = step(*(t.float() if i < 5 else t.clone() for i, t in enumerate(inputs[0])))
    found = harness.measure(row, harness.standard_columns(step), inputs, reference, rounds)
    harness.clean_slate(device)
    return found


def main() -> None:
    args = harness.arguments(__doc__, rounds=20).parse_args()
    device, rows = torch.device(args.device), []
    cases = {case.name: case for case in CASES}
    for name in harness.chosen(list(cases), args.only):
        with torch.no_grad():
            rows.append(measured(cases[name], args.rounds, device))
        harness.write_json(args.json, device, [asdict(row) for row in rows])
        print(harness.row_table(rows[-1:]), flush=True)
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
