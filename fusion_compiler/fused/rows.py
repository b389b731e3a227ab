"""Reductions of rows, with pointwise operations around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..algebra import Value
from .matmul import Extra
from .size import Size


@dataclass(frozen=True)
class RowReduction:
    """results[i] = what each row [N] of the operands gives: a row [N] ("full") or one number ("row").

    A result is a `Value` in the space of one row, over the leaves `extra(index=j)`: pointwise operations, and
    mean/sum/amax(v; size=N) of the row. A number of the row meets the row's elements as it is, without `bcast`.
    Operands of a site are the extras, in order; "full" ones are [M, N] with rows `strides[j]` elements apart (the
    others have 0 there). Results are in the order of the site's outputs, contiguous.

    `apart` counts the bytes that one kernel of these nodes and their pointwise neighbours would not move: what leaving
    them to Inductor saves beyond the price of the nodes themselves.
    """

    m: Size
    n: int
    results: tuple[Value, ...]
    kinds: tuple[Literal["full", "row"], ...]
    out_dtypes: tuple[torch.dtype, ...]
    extras: tuple[Extra, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype  # of the first full operand
    apart: Size = 0
