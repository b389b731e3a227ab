"""Writes the Triton source of one kernel of the matmul family.

out = epilogue(norm(x) @ w_iᵀ), the norm being part of the kernel. With g the norm's weight and b its bias it is

folded  (rms):   (Σ_k x_k g_k W_nk) · rstd; Σ x² grows beside the products, so x is read once;
shifted (layer): Σ (x−c) g W, Σ (x−c), Σ (x−c)² and, per output feature, Σ g W and Σ b W grow together, where c is the
                 mean of the row's first elements; with d = mean − c, out = (Σ (x−c) g W − d Σ g W) · rstd + Σ b W;
first:           mean and rstd of each row come from a pass over x before the weights are touched, and
                 y = (x − mean) · rstd · g + b meets the weights.

x is shifted by c so that no large mean has to cancel: variance = Σ (x − c)² / K − d². In float16 a matrix unit would be
fed x·g, which can overflow where eager's normalised x does not: there every norm goes first.
"""

from __future__ import annotations

from ...fused import MatmulFamily
from .gemv_source import GemvWriter
from .matrix_source import SwapWriter, TileWriter
from .plans import Plan
from .writer import Facts, KernelSource

INT32_ELEMENTS = 2**31
WRITERS = {"gemv": GemvWriter, "swap": SwapWriter, "tile": TileWriter}


def facts(op: MatmulFamily, plan: Plan, input_precision: str = "ieee") -> Facts:
    m = op.m if isinstance(op.m, int) else None
    k, n = int(op.k), int(op.n)
    return Facts(
        m=m,
        even_n=all(width % plan.block_n == 0 for width in op.splits or (n,)),
        even_k=k % plan.step_k == 0,
        wide_weight=(n + max(op.features, default=0)) * k >= INT32_ELEMENTS,
        wide_output=(m or plan.rows) * n >= INT32_ELEMENTS,
        input_precision=input_precision,
    )


def write(op: MatmulFamily, plan: Plan, known: Facts) -> KernelSource:
    """The kernel that computes `op` by `plan`."""
    return WRITERS[plan.kind](op, plan, known).write()
