"""Writes the flash kernel for packed sequences: q [total, heads, dim], sequence s at cu_q[s] to cu_q[s + 1].

A program takes `tokens` queries of one sequence with all heads that share a key head, so that a decode step of one
token still fills its rows and keys are read once per key head. Which queries those are it finds out by itself:
sequence s has the programs from cu_q[s] // tokens + s on, which are enough for it and meet no other's; those behind
its last query have nothing to do. So no length has to be known where the kernel is launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from ....candidates import Amount
from ....fused import Attention, Layout, Mask
from .plan import Plan
from .sizes import size_text
from .source import Strides, Writer

Q_LEN, KV_LEN = sympy.symbols("q_len kv_len", integer=True, nonnegative=True)
STEP = 128  # sequences looked at together


@dataclass(frozen=True)
class Packed:
    """Attention of packed sequences: sizes, what queries see, and strides of q, k, v and out along tokens and heads.

    `causal`: the last query of a sequence sees all of its keys, the one before it all but the last, and so on; with a
    `window` only so many of these. Without any key a query gives 0.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    strides: tuple[tuple[int, int], ...]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def tokens(self, plan: Plan) -> int:
        return plan.block_m // self.group

    def of_a_sequence(self) -> Attention:
        """The attention of one sequence, whose lengths are the symbols of this module."""
        own = KV_LEN - Q_LEN if self.causal else 0
        mask = Mask("causal" if self.causal else "none", own, window=self.window, empty_rows="zero")
        same = Layout((), (), (), (), self.dtype)
        return Attention(
            1, self.heads, self.kv_heads, Q_LEN, KV_LEN, self.head_dim, self.v_dim, self.scale, mask,
            self.dtype, (same,) * 3, same, softcap=self.softcap,
        )  # fmt: skip


def write(packed: Packed, plan: Plan) -> str:
    """The text of a module with the kernel, of a grid (kv_heads, total // tokens + sequences)."""
    return _PackedWriter(packed, plan).write().text


class _PackedWriter(Writer):
    positions = "TOKENS"

    def __init__(self, packed: Packed, plan: Plan) -> None:
        q, k, v, out = (tuple[Amount, ...]((0, head, token, 1)) for token, head in packed.strides)
        super().__init__(packed.of_a_sequence(), plan, Strides(q, k, v, out))
        self.packed = packed

    def other_tensors(self) -> list[str]:
        return ["cu_q", "cu_k"]

    def sizes(self) -> list[str]:
        return ["sequences"]

    def place(self) -> None:
        group, strides = self.packed.group, self.strides
        self.emit(
            f"TOKENS: tl.constexpr = {self.packed.tokens(self.plan)}",
            "# blocks at the end of a causal sequence have the most keys: they start first",
            "program = tl.num_programs(1) - 1 - tl.program_id(1)",
            "before = tl.zeros((), tl.int32)",
            f"for first in tl.range(0, sequences, {STEP}):",
            f"    s = first + tl.arange(0, {STEP})",
            "    begins = tl.load(cu_q + s, mask=s < sequences, other=0) // TOKENS + s",
            "    before += tl.sum(((begins <= program) & (s < sequences)).to(tl.int32), 0)",
            "sequence = tl.maximum(before - 1, 0)",
            "q_begin = tl.load(cu_q + sequence)",
            "k_begin = tl.load(cu_k + sequence)",
            "q_len = (tl.load(cu_q + sequence + 1) - q_begin).to(tl.int32)",
            "kv_len = (tl.load(cu_k + sequence + 1) - k_begin).to(tl.int32)",
            "first_row = ((program - sequence - q_begin // TOKENS) * TOKENS).to(tl.int32)",
            "if (first_row < 0) | (first_row >= q_len):",
            "    return",
            "kv_head = tl.program_id(0).to(tl.int64)",
            "row = tl.arange(0, BLOCK_M)[:, None]",
            f"rows = tl.where(row < {group} * TOKENS, first_row + row // {group}, q_len)",
            f"heads = kv_head * {group} + row % {group}",
            "columns = tl.arange(0, BLOCK_N)",
        )
        self.emit(*(f"{n} += q_begin.to(tl.int64) * {size_text(by[2])}" for n, by in self.of_rows()))
        for n, by in (("k", strides.k), ("v", strides.v)):
            self.emit(f"{n} += k_begin.to(tl.int64) * {size_text(by[2])} + kv_head * {size_text(by[1])}")

    def row_place(self, name: str, d: str) -> str:
        return f"{super().row_place(name, d)} + heads * {size_text(dict(self.of_rows())[name][1])}"
