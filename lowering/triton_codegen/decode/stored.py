"""How the kernel reads keys or values: as they are, or as codes from which it makes them.

With codes c, k = (c − zero) · scale and the same for v: the scale of a key multiplies its score and that of a value
its probability, and Σ c·q − zero · Σ q is the product with a key. Codes are exact in the dtypes of the matrix units, so
only what eager rounds too is rounded. In float32, where a difference of large sums would be less exact than eager,
zeros are taken from codes before the product. Two codes in a byte make two products, one for each half of the byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pointwise import literal
from .operands import Operand, power_of_two
from .widening import widening


@dataclass(frozen=True)
class Stored:
    """The reading of `name`, "k" or "v": rows of `size` elements, indexed by `index`, as `dtype` in a product."""

    name: str
    index: str
    size: int
    operand: Operand
    dtype: torch.dtype
    native: bool

    @property
    def widening(self) -> str:
        """The function of a tile that makes numbers of codes; nothing where casts do."""
        codes = self.operand.codes
        if codes is None or not self.native or self.dtype == torch.float32:
            return ""
        return widening(f"{self.name}_numbers", codes, self.dtype)

    @property
    def turned(self) -> bool:
        """Whether a tile is read as [columns, keys]. Numbers made of codes are turned behind, not byte by byte."""
        return self.name == "v" and not self.widening

    @property
    def widened(self) -> tuple[str, ...]:
        """Names of the parts of a tile, where a function made them."""
        return tuple(f"{self.name}_part{suffix}" for suffix in self.parts)

    @property
    def packed(self) -> str:
        return self.operand.codes.packed if self.operand.codes is not None else ""

    @property
    def length(self) -> int:
        """Stored elements of a row."""
        return self.size // 2 if self.packed else self.size

    @property
    def width(self) -> int:
        return power_of_two(max(16, self.length))

    @property
    def parts(self) -> dict[str, str]:
        """By suffix, the elements of a row that one product is of, as text."""
        if not self.packed:
            return {"": self.index}
        if self.packed == "pairs":
            return {"_low": f"2 * {self.index}", "_high": f"2 * {self.index} + 1"}
        return {"_low": self.index, "_high": f"{self.index} + {self.length}"}

    def bound(self, axis: str) -> str:
        return f"({self.index} < {self.length}){axis}" if self.length != self.width else ""

    def decoded(self, suffix: str) -> str:
        """What the product of a part is of, from the tile that was loaded."""
        if self.widening:
            part = f"{self.name}_part{suffix}"
            return f"tl.trans({part})" if self.name == "v" else part
        tile = {"": f"{self.name}_tile", "_low": f"({self.name}_tile & 15)", "_high": f"({self.name}_tile >> 4)"}[
            suffix
        ]
        same = self.operand.dtype == self.dtype
        tile = tile if same else f"{tile}.to(tl.{str(self.dtype).removeprefix('torch.')})"
        if self._shifted and not self.shifts:
            tile += f" - {self.along_keys(self.zero(), 'zero', '[None, :]' if self.turned else '[:, None]')}"
        return tile

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

    def along_keys(self, text: str, what: str, axis: str = "[:, None]") -> str:
        return f"{text}{axis}" if self.by_key(what) else text
