"""Recognising attention in a graph: `find_attention` reads the chain back from the product with the values.

axes, arrangements: views as factorised axes, and back · contraction: batched products · scores: what lies between the
two products · softmax, late_division: the softmax in every spelling · masks: what a mask is proved to be, from
index_functions and limits · roles: which axis is which · sdpa_calls: attention that the graph already calls by name ·
refusals: why something is none ·
operands: operands as nodes of the shapes that kernels want · quantised: keys and values that are stored as codes ·
reference: what a registered kernel computes ·
declared: patterns of attention that users declare.
"""

from __future__ import annotations

from .declared import declared_attention, find_like
from .recognise import find_attention
from .reference import attention, example

__all__ = ["attention", "declared_attention", "example", "find_attention", "find_like"]
