"""The flash kernel of keys and values that are stored as codes: numbers are made of them on their way to the products.

With k = (c − zero) · scale, and v alike: the product with a key is (q·c − zero · Σ q) · scale, where the scale may be
one for all or one for each column of scores; the scale of a value is its probability's factor where it is its own, and
the result's where it is not, from which also zero · Σ p is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ....cost.amounts import amount
from ....fused import Attention, StoredAttention
from ..decode.operands import Operand, as_stored
from ..decode.stored import PAIRS, Stored
from ..pointwise import TYPES
from .plan import Part, Plan, parts, pieces
from .sizes import size_text
from .source import FlashSource, Strides, Writer


@dataclass(frozen=True)
class Bytes(Stored):
    """Codes that are read byte by byte, as neighbours of a row come into registers and leave them."""

    @property
    def packed(self) -> str:
        return self.operand.codes.packed if self.operand.codes is not None else ""

    @property
    def columns(self) -> tuple[Part, ...]:
        """Of the numbers: two parts of each piece of a row where a byte holds two codes."""
        if not self.packed:
            return parts(self.size)
        half = self.size // 2
        found = []
        for first, size in pieces(half):
            index = f"({first} + tl.arange(0, {size}))"
            pairs = self.packed == "pairs"
            texts = (f"2 * {index}", f"2 * {index} + 1") if pairs else (index, f"{index} + {half}")
            bounds = (self.size if pairs else half, self.size)
            within = first + size <= half
            found += [Part(text, size, 0 if within else bound) for text, bound in zip(texts, bounds, strict=True)]
        return tuple(found)

    @property
    def joined(self) -> tuple[Part, ...]:
        """The same columns in their order, where neighbours share a byte: what is read or written two by two elements
        apart would take a transaction for each."""
        half = self.size // 2
        return tuple(
            Part(f"{2 * first} + tl.arange(0, {2 * size})", 2 * size, self.size if first + size > half else 0)
            for first, size in pieces(half)
        )

    @property
    def function(self) -> str:
        """A function of bytes that gives their numbers: one, or the low and the high one of each."""
        codes, kind = self.operand.codes, TYPES[self.dtype]
        assert codes is not None
        if codes.dtype.is_floating_point:
            body = f"codes.to(tl.float16).to({kind})"
        elif self._paired:
            body = self._instructions()
        else:
            wide = f"{{}}.to(tl.float32) - {float(self._middle)}"
            texts = (
                [wide.format("(codes & 15)"), wide.format("(codes >> 4)")] if codes.packed else [wide.format("codes")]
            )
            body = ", ".join(f"({text}).to({kind})" for text in texts)
        return f"@triton.jit\ndef {self.name}_numbers(codes):\n    return {body}\n\n"

    def _instructions(self) -> str:
        """Four bytes at a time: a byte is the lowest bits of a number, see `decode.stored`."""
        codes, pair = self.operand.codes, PAIRS[self.dtype]
        assert codes is not None
        together = pair.lowest + pair.largest
        spread = "prmt.b32 ${0}, word, 0, 0x4140; prmt.b32 ${1}, word, 0, 0x4342;"
        times = "fma.rn.{2} ${0}, ${0}, {3}, less; fma.rn.{2} ${1}, ${1}, {3}, less;"
        low, less = pair.bits(pair.largest), pair.bits((3 if codes.packed else 7) + together, negative=True)
        text = f"mov.b32 low, {low}; mov.b32 less, {less};"
        if codes.packed:
            high = pair.bits(pair.largest - 4)  # of codes that stand four bits further up
            text += f"mov.b32 high, {high};"
            for first, mask, factor in ((0, "0x0f0f0f0f", "low"), (2, "0xf0f0f0f0", "high")):
                text += f"and.b32 word, $4, {mask};" + (spread + times).format(first, first + 1, pair.name, factor)
            registers, outputs, types = "low, high, less, word", "=&r,=&r,=&r,=&r", f"({TYPES[self.dtype]},) * 2"
        else:
            sign = "0x80808080" if codes.dtype == torch.int8 else "0"
            text += f"xor.b32 word, $2, {sign};" + (spread + times).format(0, 1, pair.name, "low")
            registers, outputs, types = "low, less, word", "=&r,=&r", TYPES[self.dtype]
        return (
            f'tl.inline_asm_elementwise(\n        "{{ .reg .b32 {registers}; {text} }}",\n'
            f'        "{outputs},r", [codes], dtype={types}, is_pure=True, pack=4,\n    )'
        )


def write_stored(
    op: Attention, plan: Plan, strides: Strides, k: Operand | None, v: Operand | None, *, native: bool
) -> FlashSource:
    """The kernel that computes `op` by `plan`, with keys and values stored as `k` and `v` say where they are codes."""
    if k is None and v is None:
        return Writer(op, plan, strides).write()
    return StoredWriter(op, plan, strides, k, v, native).write()


def tiles(asked: Attention | StoredAttention, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The blocks in which keys and values are read through descriptors."""
    if not plan.descriptors:
        return {}
    stored = as_stored(asked)
    op = stored.attention
    widths = {"k": (op.head_dim, stored.k), "v": (op.v_dim, stored.v)}
    held = {name: width // (2 if codes is not None and codes.packed else 1) for name, (width, codes) in widths.items()}
    return {name: (1, 1, plan.block_n, pieces(width)[0][1]) for name, width in held.items()}


class StoredWriter(Writer):
    """`k` and `v` tell how keys and values are stored; None where they are not codes."""

    def __init__(self, op: Attention, plan: Plan, strides: Strides, k: Operand | None, v: Operand | None, native: bool):
        self.k, self.v = (
            Bytes(name, "", size, operand, op.dtype, native) if operand is not None else None
            for name, size, operand in (("k", op.head_dim, k), ("v", op.v_dim, v))
        )
        unit = self.k.unit if self.k is not None else 1.0
        super().__init__(replace(op, scale=op.scale * unit), plan, strides)
        self.qk = self.k.columns if self.k is not None else self.qk
        self.pv = self.v.columns if self.v is not None else self.pv

    @property
    def sides(self) -> list[Bytes]:
        return [side for side in (self.k, self.v) if side is not None]

    @property
    def held(self) -> dict[str, Operand]:
        """Scales and zeros, by the names of their tensors."""
        return {
            f"{side.name}_{what}": operand
            for side in self.sides
            for what, operand in (("scale", side.operand.scale), ("zero", side.operand.zero))
            if operand is not None
        }

    def functions(self) -> list[str]:
        return [side.function for side in self.sides]

    def other_tensors(self) -> list[str]:
        return [*self.held, *super().other_tensors()]

    def by_key(self, name: str) -> bool:
        return self.held[name].strides[2] != 0

    def start(self) -> None:
        if self.k is not None and self.k.packed == "pairs":
            apart, self.qk = self.qk, self.k.joined
            super().start()
            for i in reversed(range(len(self.qk))):
                whole = f"tl.reshape(q{i}, (BLOCK_M, {apart[2 * i].size}, 2))"
                self.emit(f"q{2 * i}, q{2 * i + 1} = tl.split({whole})")
            self.qk = apart
        else:
            super().start()
        for name, operand in self.held.items():
            batch, head, _, _ = map(size_text, operand.strides)
            self.emit(f"{name} += batch * {batch} + kv_head * {head}")
            if not self.by_key(name):
                self.emit(f"{name}_here = tl.load({name}).to(tl.float32)")
        if self.k is not None and self.k.shifts:
            total = " + ".join(f"tl.sum(q{i}.to(tl.float32), 1)" for i in range(len(self.qk)))
            self.emit(f"q_total = ({total}) * {1 / self.k.unit!r}")
        if self.v is not None and self.v.shifts:
            self.emit("surplus = tl.zeros((BLOCK_M,), tl.float32)")

    def step(self) -> None:
        kv_len = size_text(amount(self.op.kv_len))
        mask = "" if self.even_keys else f", mask=start + columns < {kv_len}, other=0.0"
        for name, operand in self.held.items():
            if self.by_key(name):
                place = f"{name} + (start + columns) * {size_text(operand.strides[2])}"
                self.emit(f"{name}_here = tl.load({place}{mask}).to(tl.float32)")
        super().step()

    def make_tile(self, name: str, i: int) -> None:
        side = self.k if name == "k" else self.v
        if side is None:
            super().make_tile(name, i)
            return
        part = (self.qk if name == "k" else self.pv)[i]
        d = f"{'q' if name == 'k' else 'v'}d{i}[None, :]"
        if not side.packed:
            self.emit(f"{name}{i} = {name}_numbers({self.loaded(name, part, d)})")
        elif i % 2 == 0:
            first = pieces(side.size // 2)[i // 2][0]
            codes = Part("", part.size, side.size // 2 if part.bound else 0)
            d = f"({first} + tl.arange(0, {part.size}))[None, :]"
            self.emit(f"{name}{i}, {name}{i + 1} = {name}_numbers({self.loaded(name, codes, d)})")

    def scored(self) -> None:
        k = self.k
        if k is None:
            return
        if k.shifts:
            self.emit(f"s = s - {k.along_keys(k.zero(), 'zero', '[None, :]')} * q_total[:, None]")
        self.emit(f"s = s * {k.along_keys('k_scale_here', 'scale', '[None, :]')}")

    def weighted(self) -> str:
        v = self.v
        if v is None:
            return "p"
        p = "p * v_scale_here[None, :]" if v.by_key("scale") else "p"
        self.emit(f"weight = {p}")
        if v.shifts:
            zero = v.along_keys(v.zero(), "zero", "[None, :]")
            before = "surplus" if self.scores.bound is not None else "surplus * alpha"
            self.emit(f"surplus = {before} + tl.sum(weight * {zero}, 1)")
        return "weight"

    def finish(self) -> None:
        v = self.v
        if v is not None:
            scale = "" if v.by_key("scale") else " * v_scale_here"
            less = " - surplus[:, None]" if v.shifts else ""
            unit = f" * {v.unit!r}" if v.unit != 1.0 else ""
            self.emit(*(f"acc{i} = (acc{i}{unit}{less}){scale}" for i in range(len(self.pv))))
        if v is not None and v.packed == "pairs":
            self.pv = v.joined
            for i, part in enumerate(self.pv):
                whole = f"tl.reshape(tl.join(acc{2 * i}, acc{2 * i + 1}), (BLOCK_M, {part.size}))"
                self.emit(f"acc{i} = {whole}", f"vd{i} = {part.columns}")
        super().finish()
