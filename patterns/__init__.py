"""Fusion patterns, one fusion per file: what it matches, its constraints, its examples.

The package can be called: `fusion_compiler.patterns()` lists every pattern in use, the user's own too.
"""

from __future__ import annotations

import sys

from fusion_compiler.pattern import AnyPattern
from fusion_compiler.registry import PatternPackage

from .activation_linear import activation_linear
from .add_norm import add_norm
from .attention import attention
from .counters import counters
from .gated_mlp import gated_mlp
from .linear_epilogue import linear_epilogue
from .norm import norm
from .norm_linear import norm_linear
from .qkv_projection import qkv_projection
from .quantised_linear import quantised_linear
from .rope import rope
from .rope_cache import rope_cache
from .softmax import softmax

BUILTIN: tuple[AnyPattern, ...] = (
    gated_mlp,
    norm_linear,
    qkv_projection,
    linear_epilogue,
    activation_linear,
    attention,
    norm,
    add_norm,
    softmax,
    rope,
    rope_cache,
    counters,
    quantised_linear,
)

sys.modules[__name__].__class__ = PatternPackage
