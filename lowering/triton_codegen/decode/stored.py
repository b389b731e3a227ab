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
from ..pointwise import TYPES, literal
from .operands import Axes, Operand, power_of_two

FLOATS = {torch.float8_e4m3fn: "tl.float8e4nv", torch.float8_e5m2: "tl.float8e5"}


@dataclass(frozen=True)
class _Pair:
    """Two 16-bit floating-point numbers in a register: 2^`lowest` is the least one, 2^`largest` the largest power.

    An integer below 256 as the lowest bits of a number is that many times the least one, exactly, subnormal or not.
    Multiplied by the largest power it is far from both ends.
    """

    name: str
    mantissa: int
    bias: int
    lowest: int
    largest: int

    def bits(self, power: int, *, negative: bool = False) -> str:
        """2^`power`, twice."""
        return f"{(power + self.bias << self.mantissa | negative << 15) * 0x10001:#010x}"


PAIRS = {torch.bfloat16: _Pair("bf16x2", 7, 127, -133, 127), torch.float16: _Pair("f16x2", 10, 15, -24, 15)}


@dataclass(frozen=True)
class Stored:
    """The reading of `name`, "k" or "v": rows of `size` elements, indexed by `index`, as `dtype` in a product.

    `native`: by instructions of NVIDIA.
    """

    name: str
    index: str
    size: int
    operand: Operand
    dtype: torch.dtype
    native: bool = False

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

    # ---- codes --------------------------------------------------------------------------------------
    @property
    def _paired(self) -> bool:
        """Whether two numbers at a time are made of codes by instructions of NVIDIA."""
        codes = self.operand.codes
        return self.native and codes is not None and not codes.dtype.is_floating_point and self.dtype in PAIRS

    @property
    def unit(self) -> float:
        """What the numbers of a product are to be multiplied by."""
        return 2.0 ** -(PAIRS[self.dtype].lowest + PAIRS[self.dtype].largest) if self._paired else 1.0

    @property
    def function(self) -> str:
        """A function of words, the four numbers of each."""
        body = self._instructions() if self._paired else ", ".join(self._number(i) for i in range(WORD))
        return f"@triton.jit\ndef {self.name}_numbers(words):\n    return {body}\n\n"

    def _number(self, place: int) -> str:
        codes = self.operand.codes
        assert codes is not None
        byte = f"words >> {8 * place} & 255"
        if codes.dtype.is_floating_point:
            number = f"({byte}).to(tl.uint8).to({FLOATS[codes.dtype]}, bitcast=True).to(tl.float16).to(tl.float32)"
        else:
            # an integer below 2²³ in the mantissa of 2²³ needs no conversion; signed ones are counted from −128
            code = f"words.to(tl.int32) >> {4 * place} & 15" if codes.packed else byte
            code, middle = (f"{code} ^ 128", 128.0) if codes.dtype == torch.int8 else (code, self._middle)
            number = f"(({code} | 0x4B000000).to(tl.float32, bitcast=True) - {2.0**23 + middle})"
        return f"({number}).to({TYPES[self.dtype]})"

    def _instructions(self) -> str:
        """Two words at a time, of which each register of a result has one number."""
        codes, pair = self.operand.codes, PAIRS[self.dtype]
        assert codes is not None
        factor = pair.bits(pair.largest)
        if codes.packed:
            high = pair.bits(pair.largest - 4)  # of a nibble that stands four bits further up
            made = "".join(
                f"{'shr.u32 a, $4, 8;' if i == 2 else ''}and.b32 ${i}, {'a' if i > 1 else '$4'}, {mask};"
                f"fma.rn.{pair.name} ${i}, ${i}, {times}, less;"
                for i, (mask, times) in enumerate((("0x000f000f", "low"), ("0x00f000f0", "high")) * 2)
            )
            less = pair.bits(3 + pair.lowest + pair.largest, negative=True)
            text = f"mov.b32 low, {factor}; mov.b32 high, {high}; mov.b32 less, {less}; {made}"
            registers, inputs = "a, low, high, less", "r"
        else:
            less = pair.bits(7 + pair.lowest + pair.largest, negative=True)
            sign = "0x00800080" if codes.dtype == torch.int8 else "0"
            shifts = "shr.u32 a, a, 8; shr.u32 b, b, 8;"
            made = "".join(
                f"{shifts if i == 2 else ''}lop3.b32 ${i}, {'ab'[i % 2]}, 0x00ff00ff, {sign}, 0x6a;"
                f"fma.rn.{pair.name} ${i}, ${i}, times, less;"
                for i in range(WORD)
            )
            text = f"mov.b32 times, {factor}; mov.b32 less, {less};"
            text += f"prmt.b32 a, $4, $5, 0x6420; prmt.b32 b, $4, $5, 0x7531; {made}"
            registers, inputs = "a, b, times, less", "r,r"
        outputs = ", ".join([TYPES[self.dtype]] * WORD)
        return (
            f'tl.inline_asm_elementwise(\n        "{{ .reg .b32 {registers}; {text} }}",\n'
            f'        "=&r,=&r,=&r,=&r,{inputs}", [words], dtype=({outputs}), is_pure=True, pack=2,\n    )'
        )

    @property
    def shifts(self) -> bool:
        """Whether zeros are taken from the product with codes."""
        return self._shifted and self.dtype != torch.float32

    @property
    def moved(self) -> bool:
        """Whether zeros are taken from numbers before the product."""
        return self._shifted and not self.shifts

    @property
    def _shifted(self) -> bool:
        codes = self.operand.codes
        return codes is not None and (codes.has_zero or codes.shift != self._middle)

    @property
    def _middle(self) -> float:
        """What numbers have less than codes without a sign. Zeros are near it: the sums of numbers and of zeros remain
        small, and their difference exact, over however many keys."""
        codes = self.operand.codes
        if codes is not None and codes.packed:
            return 8.0
        return 128.0 if codes is not None and codes.dtype == torch.uint8 else 0.0

    def zero(self) -> str:
        """What is to be taken from numbers."""
        codes = self.operand.codes
        assert codes is not None
        shift = codes.shift - self._middle
        if not codes.has_zero:
            return literal(shift)
        held = f"{self.name}_zero_here"
        return held if shift == 0.0 else f"({held} + {literal(shift)})"

    def by_key(self, what: str) -> bool:
        """Whether the scale or zero differs from key to key."""
        found = self.operand.scale if what == "scale" else self.operand.zero
        return found is not None and found.strides[2] != 0

    def along_keys(self, text: str, what: str, axis: str) -> str:
        return f"{text}{axis}" if self.by_key(what) else text
