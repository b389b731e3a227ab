"""Fusion patterns, one fusion per file: what it matches, its constraints, its examples."""

from __future__ import annotations

from fusion_compiler.pattern import AnyPattern

from .attention import attention
from .gated_mlp import gated_mlp
from .norm_linear import norm_linear

BUILTIN: tuple[AnyPattern, ...] = (gated_mlp, norm_linear, attention)
