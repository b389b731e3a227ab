"""How the kernel reads keys or values: as they are, or as codes from which it makes them.

With codes c, k = (c − zero) · scale and the same for v: the scale of a key multiplies its score and that of a value
its probability, and Σ c·q − zero · Σ q is the product with a key. Codes are exact in the dtypes of the matrix units, so
only what eager rounds too is rounded. In float32, where a difference of large sums would be less exact than eager,
zeros are taken from codes before the product.

Codes are read as words of four, 32 or 16 bits, each of which makes four products: a word goes to the thread that needs
its codes without a detour, where single bytes would be moved one by one, and numbers twice through shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....fused import WORD
from ..pointwise import literal
from .operands import Axes, Operand, power_of_two

FLOATS = {torch.float8_e4m3fn: "tl.float8e4nv", torch.float8_e5m2: "tl.float8e5"}


@dataclass(frozen=True)
class Stored:
    """The reading of `name`, "k" or "v": rows of `size` elements, indexed by `index`, as `dtype` in a product."""

    name: str
    index: str
    size: int
    operand: Operand
    dtype: torch.dtype

    @property
    def word(self) -> str:
        """The integers that codes are read as; nothing where there are none."""
        codes = self.operand.codes
        return "" if codes is None else "int16" if codes.packed else "int32"

    @property
    def strides(self) -> Axes:
        """In words."""
        if not self.word:
            return self.operand.strides
        size = WORD // 2 if self.operand.codes and self.operand.codes.packed else WORD
        batch, head, row, _ = (s // size for s in self.operand.strides)
        return batch, head, row, 1

    @property
    def length(self) -> int:
        """Elements, or words of a row."""
        return self.size // WORD if self.word else self.size

    @property
    def width(self) -> int:
        return power_of_two(max(16, self.length))

    @property
    def parts(self) -> dict[str, str]:
        """By suffix, the elements of a row that one product is of, as text."""
        codes = self.operand.codes
        if codes is None:
            return {"": self.index}
        if codes.packed == "halves":
            half = self.size // 2
            return {f"_{i}": f"2 * {self.index} + {i // 2 + i % 2 * half}" for i in range(WORD)}
        return {f"_{i}": f"{WORD} * {self.index} + {i}" for i in range(WORD)}

    def bound(self, axis: str) -> str:
        return f"({self.index} < {self.length}){axis}" if self.length != self.width else ""

    def decoded(self, suffix: str, axis: str) -> str:
        """What the product of a part is of, from the tile that was loaded; keys lie along `axis`."""
        codes, tile = self.operand.codes, f"{self.name}_tile"
        if codes is None:
            return tile
        place = int(suffix.removeprefix("_"))
        if codes.dtype.is_floating_point:
            byte = f"({tile} >> {8 * place} & 255).to(tl.uint8).to({FLOATS[codes.dtype]}, bitcast=True)"
            number = f"{byte}.to(tl.float16).to(tl.float32)"
        else:
            # an integer below 2²³ in the mantissa of 2²³ needs no conversion; signed ones are counted from −128
            code = f"{tile}.to(tl.int32) >> {4 * place} & 15" if codes.packed else f"{tile} >> {8 * place} & 255"
            code, less = (f"{code} ^ 128", 8388736.0) if codes.dtype == torch.int8 else (code, 8388608.0)
            number = f"(({code} | 0x4B000000).to(tl.float32, bitcast=True) - {less})"
        if self._shifted and not self.shifts:
            number += f" - {self.along_keys(self.zero(), 'zero', axis)}"
        return f"({number}).to(tl.{str(self.dtype).removeprefix('torch.')})"

    @property
    def shifts(self) -> bool:
        """Whether zeros are taken from the product with codes."""
        return self._shifted and self.dtype != torch.float32

    @property
    def _shifted(self) -> bool:
        codes = self.operand.codes
        return codes is not None and (codes.has_zero or codes.shift != 0.0)

    def zero(self) -> str:
        """What is to be taken from codes."""
        codes = self.operand.codes
        assert codes is not None
        shift = literal(codes.shift)
        if not codes.has_zero:
            return shift
        held = f"{self.name}_zero_here"
        return held if codes.shift == 0.0 else f"({held} + {shift})"

    def by_key(self, what: str) -> bool:
        """Whether the scale or zero differs from key to key."""
        found = self.operand.scale if what == "scale" else self.operand.zero
        return found is not None and found.strides[2] != 0

    def along_keys(self, text: str, what: str, axis: str) -> str:
        return f"{text}{axis}" if self.by_key(what) else text
