"""Statements of a kernel that make codes of numbers as a graph does: one operation at a time, each rounded as there."""

from __future__ import annotations

import struct

import torch

from ...fused import CacheStep
from .pointwise import TYPES, literal

# What is too large for float8_e4m3fn torch makes NaN of, newer ones the largest number.
SATURATES = bool(torch.tensor(1e4).to(torch.float8_e4m3fn).float() == 448)
TOO_LARGE = (
    "code = tl.where(size > 0x7F800000, 127, tl.minimum(code, 126))" if SATURATES
    else f"code = tl.where(size < {1087 << 20}, code, 127)"
)  # fmt: skip
# As torch rounds, to even; Triton's interpreter, whose own cast rounds wrongly, computes the same.
FLOAT8 = (
    "bits = y.to(tl.int32, bitcast=True)",
    "size = bits & 0x7FFFFFFF",
    f"small = (size.to(tl.float32, bitcast=True) + {2.0**14}).to(tl.int32, bitcast=True) - {141 << 23}",
    f"code = tl.where(size < {121 << 23}, small, (size - {(120 << 23) - 0x7FFFF} + ((size >> 20) & 1)) >> 20)",
    TOO_LARGE,
    "code = (code | ((bits >> 24) & 128)).to(tl.uint8).to(tl.float8e4nv, bitcast=True)",
)
# A zero that the compiler does not know: what has been combined with its bits is a number of its own, where a product
# would otherwise be joined to the sum behind it, through casts even, and not be rounded by itself as in eager.
NOTHING = ("nothing = tl.program_id(2)", "nothing16 = nothing.to(tl.int16)")
HALVES = 2.0**22  # from here on no float32 lies half between two integers
WHOLE = 1.5 * 2.0**23  # a float32 near this number is an integer


def code_statements(value: str, steps: tuple[CacheStep, ...], scale: str, narrowed: bool) -> list[str]:
    """What makes `code` of `value`, a float32. `scale` holds the scale as float32, `narrowed` tells that products in
    half precision take it rounded."""
    *first, last = steps
    lines = [f"y = {value}", *(f"y = {rounded(_result(step, scale, narrowed), step.dtype)}" for step in first)]
    if not last.dtype.is_floating_point:
        return [*lines, f"code = y.to(tl.{str(last.dtype).removeprefix('torch.')})"]
    return [*lines, *FLOAT8]


def rounded(value: str, dtype: torch.dtype) -> str:
    """A float32 with the value that `dtype` has for `value`, rounded by itself; needs `NOTHING`."""
    if dtype == torch.float32:
        return f"(({value}).to(tl.int32, bitcast=True) ^ nothing).to(tl.float32, bitcast=True)"
    half = TYPES[dtype]
    return f"(({value}).to({half}).to(tl.int16, bitcast=True) ^ nothing16).to({half}, bitcast=True).to(tl.float32)"


def _result(step: CacheStep, scale: str, narrowed: bool) -> str:
    if step.function == "cast":
        return "y"
    if step.function == "round":
        return f"tl.where(tl.abs(y) < {HALVES}, (y + {WHOLE}) - {WHOLE}, y)"
    if step.number is None:
        held = rounded(scale, step.dtype) if narrowed else scale
        return f"y * {held}" if step.function == "mul" else f"tl.div_rn(y, {held})"
    if step.function in ("clamp_min", "clamp_max"):
        function = "maximum" if step.function == "clamp_min" else "minimum"
        return f"tl.{function}(y, {literal(step.number)}, propagate_nan=tl.PropagateNan.ALL)"
    number = _single(step.number)
    if step.function == "add":
        return f"y + {literal(number)}"
    # torch divides by a number so: times its reciprocal
    factor = literal(_single(1.0 / number) if step.function == "div" else number)
    return f"y * {factor}"


def _single(number: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", number))[0])
