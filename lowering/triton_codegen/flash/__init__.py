"""Flash attention: one generated Triton kernel for whatever was recognised between the two products.

plan: how the work is divided · limits: which keys a block of queries visits · source: the kernel's text ·
sizes: sizes and strides in it · predict: what it takes · emit: its nodes in the graph.
"""

from __future__ import annotations

from .predict import candidates

__all__ = ["candidates"]
