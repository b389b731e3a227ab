"""The closed vocabulary of fused operations: what a pattern asks for, never how it is done.

A fused op says everything a lowering needs to make a kernel and to count its traffic, and nothing of
FX nodes: those travel beside it as a `Site`. Sizes may be `int` or `torch.SymInt`.
"""

from __future__ import annotations

from .attention import WORD, Attention, Codes, Layout, Mask, Modification, Pages, StoredAttention
from .counters import Counters
from .declared import Declared
from .matmul import Extra, MatmulFamily, MatmulGroup, Packed, PerGroup, RowNorm
from .rope_cache import CacheCodes, CacheStep, RopeCache
from .rows import RowReduction
from .site import Site
from .size import Size

FusedOp = MatmulFamily | MatmulGroup | RowReduction | Attention | StoredAttention | RopeCache | Counters | Declared

__all__ = [
    "WORD",
    "Attention",
    "CacheCodes",
    "CacheStep",
    "Codes",
    "Counters",
    "Declared",
    "Extra",
    "FusedOp",
    "Layout",
    "Mask",
    "MatmulFamily",
    "MatmulGroup",
    "Modification",
    "Packed",
    "Pages",
    "PerGroup",
    "StoredAttention",
    "RopeCache",
    "RowNorm",
    "RowReduction",
    "Site",
    "Size",
]
