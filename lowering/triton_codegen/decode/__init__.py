"""Decode attention: few queries per key/value head against a long cache.

attention: what is offered, and how it enters the graph · source, writer, operands: the kernel's text · predict: its
time, with measured constants.
"""

from __future__ import annotations

from .attention import candidates

__all__ = ["candidates"]
