"""Triton kernels generated per fused op. Triton itself is imported only where a kernel is loaded or compiled."""

from __future__ import annotations

from dataclasses import dataclass

from ...candidates import Candidate, Unavailable
from ...fused import Attention, FusedOp, MatmulFamily, RowReduction
from ...machine import Machine
from . import decode, matmul, row_reduction

SHORTEST_NORM = 8


@dataclass(frozen=True)
class TritonCodegen:
    """Generated Triton kernels: see `candidates.Lowering`."""

    name: str = "triton"

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        if isinstance(op, MatmulFamily):
            if op.norm is not None and isinstance(op.k, int) and op.k < SHORTEST_NORM:
                return Unavailable(
                    f"a norm over K = {op.k}: the generated kernels sum {SHORTEST_NORM} neighbours in a thread"
                )
            return matmul.candidates(op, machine)
        if isinstance(op, RowReduction):
            return row_reduction.candidates(op, machine)
        if isinstance(op, Attention):
            return decode.candidates(op, machine)
        return []


lowering = TritonCodegen()
