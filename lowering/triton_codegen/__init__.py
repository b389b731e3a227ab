"""Triton kernels generated per fused op. Triton itself is imported only where a kernel is loaded or compiled."""

from __future__ import annotations

from dataclasses import dataclass

from ...candidates import Candidate, Unavailable
from ...fused import Attention, Counters, FusedOp, MatmulFamily, MatmulGroup, RopeCache, RowReduction, StoredAttention
from ...machine import Machine
from . import counters, decode, flash, matmul, norm_apart, packed_linear, rope_cache, row_reduction

SHORTEST_NORM = 8


@dataclass(frozen=True)
class TritonCodegen:
    """Generated Triton kernels: see `candidates.Lowering`."""

    name: str = "triton"

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        if isinstance(op, (MatmulFamily, MatmulGroup)) and op.whole.packed:
            return packed_linear.candidates(op, machine)
        if isinstance(op, (MatmulFamily, MatmulGroup)):
            k = op.whole.k
            if op.whole.norm is not None and isinstance(k, int) and k < SHORTEST_NORM:
                return Unavailable(
                    f"a norm over K = {k}: the generated kernels sum {SHORTEST_NORM} neighbours in a thread"
                )
            return _either(matmul.candidates(op, machine), norm_apart.candidates(op, machine))
        if isinstance(op, RowReduction):
            return row_reduction.candidates(op, machine)
        if isinstance(op, Counters):
            return counters.candidates(op, machine)
        if isinstance(op, RopeCache):
            return rope_cache.candidates(op, machine)
        if isinstance(op, (Attention, StoredAttention)):
            return _either(decode.candidates(op, machine), flash.candidates(op, machine))
        return []


def _either(*offers: list[Candidate] | Unavailable) -> list[Candidate] | Unavailable:
    """What several generators of kernels offer for one op, or why none of them does."""
    found = [candidate for offer in offers if isinstance(offer, list) for candidate in offer]
    reasons = dict.fromkeys(offer.reason for offer in offers if isinstance(offer, Unavailable))
    return found or Unavailable("; ".join(reasons))


lowering = TritonCodegen()
