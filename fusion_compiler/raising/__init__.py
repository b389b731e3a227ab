"""Raising rules: one module per kind of operator, all registered in `RULES`."""

from __future__ import annotations

from . import arithmetic, conditions, products, slices, views
from .registry import RULES

__all__ = ["RULES", "arithmetic", "conditions", "products", "slices", "views"]
