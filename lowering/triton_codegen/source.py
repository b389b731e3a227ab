"""Writes the Triton source of one kernel of the matmul family.

out = epilogue(norm(x) @ w_iᵀ), the norm being part of the kernel. With g the norm's weight and b its bias it is either

folded: (Σ_k x_k g_k W_nk) · rstd; Σ x² grows beside the products, so x is read once. A LayerNorm's mean is taken off
        afterwards: Σ (x − mean) g W = Σ x g W − mean · Σ g W, the last sum growing on the matrix unit too;
first:  mean and rstd of each row come from a pass over x before the weights are touched, and
               y = (x − mean) · rstd · g + b meets the weights. x is shifted throughout by the mean c of the row's first
               elements, so that no large mean has to cancel: variance = Σ (x − c)² / K − (Σ (x − c) / K)².

In float16 a matrix unit would be fed x·g, which can overflow where eager's normalised x does not: RMSNorm goes first.
"""

from __future__ import annotations

from ...fused import MatmulFamily, MatmulGroup
from .gemv_source import Gemv
from .plans import Plan
from .shared_source import Shared
from .sliced_source import Sliced
from .split_source import Split
from .swap_source import Swap
from .tile_source import Tile
from .writer import Facts, KernelSource

INT32_ELEMENTS = 2**31


def facts(op: MatmulFamily | MatmulGroup, plan: Plan, input_precision: str = "ieee") -> Facts:
    m = op.m if isinstance(op.m, int) else None
    whole = op.whole
    k, n = int(whole.k), int(whole.n)
    return Facts(
        m=m,
        even_n=all(int(part.n) % plan.block_n == 0 for part in op.parts),
        even_k=k % (plan.splits * plan.step_k) == 0,
        wide_weight=(n * whole.feature_step + max(whole.features, default=0)) * k >= INT32_ELEMENTS,
        wide_output=(m or plan.rows) * n >= INT32_ELEMENTS or (plan.tiled and m is None),
        input_precision=input_precision,
        input_strides=(k,) * len(whole.inputs),
    )


def write(op: MatmulFamily | MatmulGroup, plan: Plan, known: Facts) -> KernelSource:
    """The kernel that computes `op` by `plan`."""
    kinds = {"gemv": Gemv, "swap": Swap, "sliced": Sliced, "split": Split, "tile": Tile, "shared": Shared}
    return kinds[plan.kind](op, plan, known).write()
