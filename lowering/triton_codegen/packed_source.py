"""Writes the kernel for few rows of x and packed weights: the tiles of `swap`, whose codes become numbers on the way.

A tile of bytes goes through shared memory as it lies in the weight; in registers each byte becomes two numbers, code −
zero, which are multiplied by their scales and fed to the matrix unit. No code ever moves to another thread.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...fused import MatmulFamily, Packed, PerGroup
from .plans import Plan
from .pointwise import TYPES
from .swap_source import Swap
from .writer import Facts, KernelSource


# A byte with 0x64 (0x43) above it is the float16 1024 + byte (the bfloat16 128 + byte): no conversion is needed. A high
# code stays where it is in float16: 1024 + 16 · code becomes code − zero in one exact step. bfloat16 has no subtraction
# before sm_90, so it is 1 · a − b there, and no room for 16 · code.
def _unpacking(dtype: torch.dtype, zero: int) -> str:
    """A function of four bytes at a time in PTX: (low − zero, high − zero) as `dtype`."""
    half = dtype == torch.float16
    above = 0x64646464 if half else 0x43434343
    merges = "".join(
        f"prmt.b32 ${out}, {part}, c, {selector:#x};"
        for out, part, selector in ((0, "a", 0x4140), (1, "a", 0x4342), (2, "b", 0x4140), (3, "b", 0x4342))
    )
    if half:
        high, pair, sixteenth = "and.b32 b, $4, 0xf0f0f0f0;", (0x6400 + zero) * 0x10001, 0x2C002C00
        low = "".join(f"sub.f16x2 ${i}, ${i}, c;" for i in (0, 1))
        offset = (0xD400 + 16 * zero) * 0x10001  # −(64 + zero)
        moved = "".join(f"fma.rn.f16x2 ${i}, ${i}, one, c;" for i in (2, 3))
        numbers = f"mov.b32 c, {pair:#x}; {low} mov.b32 one, {sixteenth:#x}; mov.b32 c, {offset:#x}; {moved}"
    else:
        high, pair = "shr.u32 b, $4, 4; and.b32 b, b, 0x0f0f0f0f;", (0xC300 + zero) * 0x10001
        moved = "".join(f"fma.rn.bf16x2 ${i}, ${i}, one, c;" for i in range(4))
        numbers = f"mov.b32 one, 0x3f803f80; mov.b32 c, {pair:#x}; {moved}"
    return f"""@triton.jit
def unpacked(codes):
    return tl.inline_asm_elementwise(
        "{{ .reg .b32 a, b, c, one; and.b32 a, $4, 0x0f0f0f0f; {high} mov.b32 c, {above:#x}; {merges}"
        "{numbers} }}",
        "=&r,=&r,=&r,=&r,r", [codes], dtype=({TYPES[dtype]}, {TYPES[dtype]}), is_pure=True, pack=4,
    )
"""


def _portable(dtype: torch.dtype, zero: int) -> str:
    low, high = (f"({part}).to({TYPES[dtype]}) - {zero}" for part in ("codes & 15", "codes >> 4"))
    return f"@triton.jit\ndef unpacked(codes):\n    return {low}, {high}\n"


class PackedSwap(Swap):
    """`Swap` on packed weights; `native`: for NVIDIA's instructions. BLOCK_K counts elements of K and divides it."""

    constants = ("x_stride", "N", "K", "BLOCK_N", "BLOCK_K")

    def __init__(self, op: MatmulFamily, plan: Plan, known: Facts, *, native: bool) -> None:
        super().__init__(op, plan, known)
        self.native_code = native
        held = [
            [f"w{i}", *([f"s{i}"] if p.scale else []), *([f"z{i}"] if isinstance(p.zero, PerGroup) else [])]
            for i, p in enumerate(op.packed)
        ]
        extras = [f"extra{j}" for j in range(len(op.extras))]
        self.tensors = ("x", *(name for names in held for name in names), *extras, "out")

    @property
    def order(self) -> str:
        return self.op.packed[0].order

    def indices(self) -> None:
        """The features and rows of a program; tiles along M that share their weights follow each other."""
        if self.plan.kind != "tile":
            return super().indices()
        rows = self.plan.rows
        self.emit(f"tiles = tl.cdiv({'M' if self.known.m is None else self.known.m}, {rows})")
        self.emit("n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)")
        self.emit(*([] if self.known.even_n else ["n_in = n < N"]))
        self.emit(f"m = tl.program_id(0) % tiles * {rows} + tl.arange(0, {rows})")
        self.rows_inside()

    def write(self) -> KernelSource:
        made = super().write()
        if self.order == "bytes":
            return made
        zero = _subtracted(self.op.packed[0])
        unpacked = (_unpacking if self.native_code else _portable)(self.op.dtype, zero)
        text = made.text.replace("@triton.jit\n", f"{unpacked}\n\n@triton.jit\n", 1)
        return replace(made, text=text)

    @property
    def apart(self) -> bool:
        """Whether low and high codes are two products, each with its columns of x. With up to 8 rows that is faster;
        with more, x is the larger part of the traffic and has to be copied in one piece."""
        return self.order == "halves" and self.plan.rows < 16

    @property
    def across(self) -> int:
        """Numbers of a row that are scaled at a time."""
        return self.plan.block_k // (2 if self.apart else 1)

    def step(self) -> None:
        if self.apart:
            self.emit("i = tl.arange(0, BLOCK_K // 2)")
            self.x_parts()
        else:
            self.emit(f"i = tl.arange(0, BLOCK_K{'' if self.order == 'bytes' else ' // 2'})")
            self.emit("k = start + tl.arange(0, BLOCK_K)", f"y = {self.x('k')}")
        inside = "" if self.known.even_n else ", mask=n_in[:, None], other=0"
        for i, packed in enumerate(self.op.packed):
            self.emit(f'w{i}_tile = tl.load({self.codes(i, packed)}{inside}, eviction_policy="evict_first")')
            if packed.scale and not self.of_rows(i):
                self.per_group(f"s{i}", packed.scale)
            if isinstance(packed.zero, PerGroup):
                self.per_group(f"z{i}", packed.zero)
        for i, packed in enumerate(self.op.packed):
            for side, number in self.numbers(i).items():
                if isinstance(packed.zero, PerGroup):
                    number = f"({number} - z{i}_tile)"
                elif self.order == "bytes" and packed.zero:
                    number = f"({number} - {packed.zero})"
                scaled = f"{number} * s{i}_tile" if packed.scale and not self.of_rows(i) else number
                self.emit(f"acc{i} = tl.dot({scaled}, tl.trans(y{side}), acc{i})")

    def x_parts(self) -> None:
        """The columns of x that low codes meet, and those of the high ones."""
        self.emit("k = start + i // 16 * 32 + i % 16")
        self.emit(f"y_low = {self.x('k')}", f"y_high = {self.x('(k + 16)')}")

    def of_rows(self, i: int) -> bool:
        """Whether all of a feature's codes have one scale, which then multiplies their sum."""
        scale = self.op.packed[i].scale
        return scale is not None and scale.group >= int(self.op.k)

    def finish(self) -> None:
        inside = "" if self.known.even_n else ", mask=n_in, other=0.0"
        for i, packed in enumerate(self.op.packed):
            if packed.scale and self.of_rows(i):
                pointer = f"s{i}.to(tl.pointer_type({TYPES[packed.scale.dtype]}))"
                at = f"{pointer} + {packed.scale.first} + n * {packed.scale.row}"
                self.emit(f"acc{i} = acc{i} * tl.load({at}{inside}).to(tl.float32)[:, None]")
        super().finish()

    def numbers(self, i: int) -> dict[str, str]:
        """The tile of codes as numbers, by the part of x that they belong to."""
        if self.order == "bytes":
            float8 = self.op.packed[i].float8
            floats = f".to({TYPES[float8]}, bitcast=True)" if float8 else ""
            return {"": f"w{i}_tile{floats}.to({TYPES[self.op.dtype]})"}
        self.emit(f"w{i}_low, w{i}_high = unpacked(w{i}_tile)")
        if self.apart:
            return {"_low": f"w{i}_low", "_high": f"w{i}_high"}
        both = f"tl.join(w{i}_low, w{i}_high)"
        if self.order == "halves":
            # the layouts of the matrix unit hold these codes in this order already
            both = f"tl.permute(tl.reshape({both}, (BLOCK_N, BLOCK_K // 32, 16, 2)), (0, 1, 3, 2))"
        self.emit(f"w{i}_numbers = tl.reshape({both}, (BLOCK_N, BLOCK_K))")
        return {"": f"w{i}_numbers"}

    def codes(self, i: int, packed: Packed) -> str:
        """Where the bytes of a tile lie."""
        kind = "tl.int8" if packed.order == "bytes" else "tl.uint8"
        n = "n.to(tl.int64)" if self.known.wide_weight else "n"
        along = "start + i" if packed.order == "bytes" else "start // 2 + i"
        if packed.order == "halves" and packed.block != 16:
            along = f"(start // 32 + i // 16) * {packed.block} + i % 16"
        first = f"{packed.first} + " if packed.first else ""
        return f"w{i}.to(tl.pointer_type({kind})) + {first}{n}[:, None] * {packed.row} + ({along})[None, :]"

    def per_group(self, name: str, held: PerGroup) -> None:
        """The numbers of the groups of a tile, repeated for each byte of them."""
        groups = max(1, self.plan.block_k // held.group)
        n = "n.to(tl.int64)" if self.known.wide_weight else "n"
        along = f"start // {held.group} + tl.arange(0, {groups})"
        first = f"{held.first} + " if held.first else ""
        pointer = f"{name}.to(tl.pointer_type({TYPES[held.dtype]}))"
        inside = "" if self.known.even_n else ", mask=n_in[:, None], other=0.0"
        at = f"{pointer} + {first}{n}[:, None] * {held.row} + ({along})[None, :] * {held.step}"
        self.emit(f"{name}_group = tl.load({at}{inside}, eviction_policy='evict_first').to({TYPES[self.op.dtype]})")
        repeated = f"tl.broadcast_to({name}_group[:, :, None], (BLOCK_N, {groups}, {self.across // groups}))"
        self.emit(f"{name}_tile = tl.reshape({repeated}, (BLOCK_N, {self.across}))")


def _subtracted(packed: Packed) -> int:
    """The zero point that unpacking subtracts at once."""
    return 0 if isinstance(packed.zero, PerGroup) else int(packed.zero)
