"""Writes the kernel for up to 32 rows of x and packed weights in which every warp has its own part of K.

Codes, scales and x go from memory to the registers in which the matrix unit wants them: there is no shared memory and
no barrier until the warps add up their sums at the end. For that the elements of K are taken in another order, the
same for weights and x: where the matrix unit looks for element k, a thread puts one of the blocks that it has loaded.
A tensor's axes are the threads of four (q) that share a row of the matrix unit, its eight rows (g), warps, and eights
of features or of rows of x; the last axis is what one load brings. Triton hands out axes that are equally good to load
along in their order, so that each thread gets the part that the matrix unit expects of it, and nothing has to move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...fused import MatmulFamily, MatmulGroup, Packed, PerGroup
from .plans import Plan
from .pointwise import TYPES
from .predict import power_of_two
from .split_source import Split
from .writer import INDENT, Facts, KernelSource, mask_argument

WORD = 8  # weights in 32 bits
GROUP = 32  # weights of one scale
AXES = ("q", "g", "warp", "eights")
X_AXES = (*AXES, "words", "e")
_FOUR = """@triton.jit
def four(a, b, c, d):
    return tl.join(tl.join(a, b), tl.join(c, d))
"""


# As in packed_source; the scale is a factor of both halves of a register here.
def _numbers(dtype: torch.dtype, zero: int) -> str:
    """A function of a word and its scale in PTX: the four numbers of low codes, then those of high ones."""
    half = dtype == torch.float16
    registers = [f"r{i}" for i in range(4)]
    above, kind = (0x64646464, "f16x2") if half else (0x43434343, "bf16x2")
    high = "and.b32 b, $8, 0xf0f0f0f0;" if half else "shr.u32 b, $8, 4; and.b32 b, b, 0x0f0f0f0f;"
    merged = "".join(
        f"prmt.b32 {out}, {part}, c, {selector:#x};"
        for out, part, selector in zip(registers, "aabb", (0x4140, 0x4342, 0x4140, 0x4342), strict=True)
    )
    if half:
        low = "".join(f"sub.f16x2 {r}, {r}, c;" for r in registers[:2])
        moved = "".join(f"fma.rn.f16x2 {r}, {r}, one, c;" for r in registers[2:])
        pair, offset = (0x6400 + zero) * 0x10001, (0xD400 + 16 * zero) * 0x10001
        exact = f"mov.b32 c, {pair:#x}; {low} mov.b32 one, 0x2c002c00; mov.b32 c, {offset:#x}; {moved}"
        scaled = "".join(f"mul.f16x2 {r}, {r}, s;" for r in registers)
    else:
        moved = "".join(f"fma.rn.bf16x2 {r}, {r}, one, c;" for r in registers)
        exact = f"mov.b32 one, 0x3f803f80; mov.b32 c, {(0xC300 + zero) * 0x10001:#x}; {moved}"
        scaled = "mov.b32 c, 0x80008000;" + "".join(f"fma.rn.{kind} {r}, {r}, s, c;" for r in registers)
    parted = "".join(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {r};" for i, r in enumerate(registers))
    return f"""@triton.jit
def numbers(word, scale):
    return tl.inline_asm_elementwise(
        "{{ .reg .b32 a, b, c, one, s, {", ".join(registers)}; and.b32 a, $8, 0x0f0f0f0f; {high}"
        "mov.b32 c, {above:#x}; mov.b32 s, {{$9, $9}}; {merged}"
        "{exact}"
        "{scaled}"
        "{parted} }}",
        "{"=h," * 8}r,h", [word, scale], dtype=({f"{TYPES[dtype]}, " * 8}), is_pure=True, pack=1,
    )
"""


def _portable(dtype: torch.dtype, zero: int) -> str:
    codes = ", ".join(f"number(word >> {8 * byte + 4 * high}, scale)" for high in (0, 1) for byte in range(4))
    return f"""@triton.jit
def number(code, scale):
    return ((code & 15).to({TYPES[dtype]}) - {zero}) * scale


@triton.jit
def numbers(word, scale):
    return {codes}
"""


def _last_first() -> bool:
    """Whether Triton hands out axes that are equally good from the last to the first, as it does since 3.7."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)


def along(vector: str, axes: Sequence[str], axis: str = "") -> str:
    """`vector` along the axis of that name, or of its own, among `axes`."""
    return f"{vector}[{', '.join(':' if a == (axis or vector) else 'None' for a in axes)}]"


class PackedDirect(Split):
    """The text for a plan: `block_k` elements of K a step for all warps together, `slices` steps asked for before they
    are used. A block of features may be any multiple of 8; programs share K where there are `splits`."""

    constants = ("x_stride", "N", "K", "BLOCK_N", "BLOCK_K")

    def __init__(self, op: MatmulFamily | MatmulGroup, plan: Plan, known: Facts, *, native: bool) -> None:
        self.wide = power_of_two(plan.block_n)
        super().__init__(op, plan, replace(known, even_n=known.even_n and self.wide == plan.block_n))
        self.native_code, self.warps = native, plan.num_warps
        step = -1 if _last_first() else 1
        self.axes, self.x_axes = AXES[::step], (*X_AXES[:-1][::step], X_AXES[-1])
        self.per_warp = plan.block_k // plan.num_warps
        self.words = self.per_warp // (4 * WORD)  # of a row that a thread loads at a time

    @property
    def workspace(self) -> Sequence[str]:
        return super().workspace if self.plan.splits > 1 else ()

    def stored(self, i: int) -> tuple[str, ...]:
        """Codes and scales."""
        return f"w{i}", f"s{i}"

    @property
    def block(self) -> str:
        return "tile"

    def write(self) -> KernelSource:
        made = super().write()
        zero = self.op.packed[0].zero
        assert not isinstance(zero, PerGroup)
        numbers = (_numbers if self.native_code else _portable)(self.op.dtype, int(zero))
        return replace(made, text=made.text.replace("@triton.jit\n", f"{numbers}\n\n{_FOUR}\n\n@triton.jit\n", 1))

    # ---- where things lie -----------------------------------------------------------------------
    def indices(self) -> None:
        splits, rows = self.plan.splits, self.plan.rows
        self.emit(f"tile, split = tl.program_id(0) // {splits}, tl.program_id(0) % {splits}")
        self.emit(f"i, m = tl.arange(0, {self.wide}), tl.arange(0, {rows})")
        self.emit("q, g = tl.arange(0, 4), tl.arange(0, 8)", f"warp = tl.arange(0, {self.warps})")
        self.emit(f"words, eights = tl.arange(0, {self.words}), tl.arange(0, {self.wide // 8})")
        self.choose_part()
        self.emit("n0 = (tile - first) * BLOCK_N", "n = n0 + i")
        if not self.known.even_n:
            self.emit("n_in = (i < BLOCK_N) & (n < width)")
            self.emit("eights_in = (eights * 8 < BLOCK_N) & (n0 + eights * 8 < width)")
        self.rows_inside()
        # offsets of a thread and those of its registers stay apart: the latter are constants in the loads
        self.emit("lane_row, register_row = g.to(tl.int64), eights.to(tl.int64) * 8")
        self.emit(f"k0 = split * {self.plan.part_of(int(self.op.k))}")
        for i in range(self.op.weights):
            self.weight_pointers(i)
        self.x_pointers()

    def choose_part(self) -> None:
        """The part that a program works for, where its tiles begin and what its weights are read from."""
        for i in range(self.op.weights):
            self.emit(f"w{i}_from, s{i}_from = {self.stored_at(i, self.op.packed[i])}")
        self.emit(f"part, first, width = 0, 0, {self.parts[0].n}")
        begin = 0
        for p, part in enumerate(self.parts[1:], 1):
            begin += -(-int(self.parts[p - 1].n) // self.plan.block_n)
            self.emit(f"if tile >= {begin}:", f"{INDENT}part, first, width = {p}, {begin}, {part.n}")
            self.emit(f"{INDENT}w0_from, s0_from = {self.stored_at(p, part.packed[0])}")

    def stored_at(self, i: int, packed: Packed) -> str:
        """Pointers to a weight's first word and first scale."""
        scale = packed.scale
        assert scale is not None
        words = f"w{i}.to(tl.pointer_type(tl.int32)) + {packed.first // 4}"
        return f"{words}, s{i}.to(tl.pointer_type({TYPES[scale.dtype]})) + {scale.first}"

    def weight_pointers(self, i: int) -> None:
        packed, words = self.op.packed[i], self.words
        scale, row = packed.scale, packed.row // 4
        assert scale is not None
        axes = (*self.axes, "words")
        at = f"n0.to(tl.int64) * {row} + k0 // {WORD} + {along('lane_row', axes, 'g')} * {row}"
        self.emit(f"at = {at} + {along('warp', axes)} * {4 * words} + {along('q', axes)} * {words}")
        self.emit(f"w{i}_at = w{i}_from + at")
        at = f"{along('register_row', axes, 'eights')} * {row} + {along('words', axes)}"
        self.emit(f"w{i}_at = w{i}_at + ({at})")
        axes = self.axes
        at = f"n0.to(tl.int64) * {scale.row} + k0 // {GROUP} + {along('lane_row', axes, 'g')} * {scale.row}"
        self.emit(f"at = {at} + {along('warp', axes)} * {words} + {along('q', axes)} * {words} // 4")
        # threads of four have neighbouring scales: one that loaded all of them would have to hand them out
        self.emit(f"s{i}_at = s{i}_from + tl.max_contiguous(at, [1, 1, 1, 1])")
        self.emit(f"s{i}_at = s{i}_at + {along('register_row', axes, 'eights')} * {scale.row}")

    def x_pointers(self) -> None:
        axes = self.x_axes
        # the words of a thread hold low and high codes of a block, or of half of one
        block, apart = ("q * 32", 8) if self.words == 4 else ("q // 2 * 32 + q % 2 * 8", 16)
        self.emit(f"rows, x_lane = tl.arange(0, {self.plan.rows // 8}), {block}")
        at = f"k0 + {along('lane_row', axes, 'g')} * x_stride + {along('warp', axes)} * {self.per_warp}"
        self.emit(f"x_at = x + ({at} + {along('x_lane', axes, 'q')})")
        self.emit("x_row = rows.to(tl.int64) * 8 * x_stride", "e = tl.arange(0, 8)")
        at = f"{along('x_row', axes, 'eights')} + {along('words', axes)} * {apart} + {along('e', axes)}"
        self.emit(f"x_at = x_at + ({at})")
        if not self.all_rows:
            m = "M" if self.known.m is None else self.known.m
            self.emit(f"x_in = {along('rows', axes, 'eights')} * 8 + {along('g', axes)} < {m}")

    # ---- the walk ---------------------------------------------------------------------------------
    def start(self) -> None:
        for i in range(self.op.weights):
            self.emit(f"acc{i} = tl.zeros(({self.warps}, {self.wide}, {self.plan.rows}), tl.float32)")

    def walk(self) -> None:
        part, step, ahead = self.plan.part_of(int(self.op.k)), self.plan.block_k, self.plan.slices
        for slot in range(ahead):
            self.ask(slot, str(slot * step))
        self.emit(f"for k in range(0, {part - ahead * step}, {ahead * step}):")
        self.level += 1
        for slot in range(ahead):
            self.use(slot)
            self.ask(slot, f"(k + {(slot + ahead) * step})")
        self.level -= 1
        for slot in range(ahead):
            self.use(slot)

    def ask(self, slot: int, k: str) -> None:
        """Loads of the step at `k`."""
        masks = [
            [] if self.known.even_n else [along("eights_in", axes, "eights")]
            for axes in ((*self.axes, "words"), self.axes)
        ]
        for i in range(self.op.weights):
            codes, scales = mask_argument(masks[0], ", other=0"), mask_argument(masks[1])
            self.emit(f'w{i}_{slot} = tl.load(w{i}_at + {k} // {WORD}{codes}, eviction_policy="evict_first")')
            self.emit(f's{i}_{slot} = tl.load(s{i}_at + {k} // {GROUP}{scales}, eviction_policy="evict_first")')
        self.emit(f"x_{slot} = tl.load(x_at + {k}{mask_argument([] if self.all_rows else ['x_in'])})")

    def use(self, slot: int) -> None:
        warps, words, k = self.warps, self.words, self.per_warp
        # in the order of the product: high or low, upper bits of the byte, q, lower bits; then eights and g
        self.emit(f"y = tl.permute(x_{slot}, {tuple(self.x_axes.index(a) for a in X_AXES)})")
        self.emit(f"y = tl.reshape(y, (4, 8, {warps}, {self.plan.rows // 8}, 2, {words // 2}, 2, 4))")
        self.emit(f"y = tl.reshape(tl.permute(y, (2, 4, 5, 6, 0, 7, 3, 1)), ({warps}, {k}, {self.plan.rows}))")
        order = (*(self.axes.index(a) for a in ("warp", "eights", "g")), 7, 4, self.axes.index("q"), 6, 5)
        for i in range(self.op.weights):
            scale = f"s{i}_{slot}.to({TYPES[self.op.dtype]})[:, :, :, :, None]"
            self.emit(f"l0, l1, l2, l3, h0, h1, h2, h3 = numbers(w{i}_{slot}, {scale})")
            self.emit(f"both = tl.permute(tl.join(four(l0, l1, l2, l3), four(h0, h1, h2, h3)), {order})")
            self.emit(f"acc{i} = tl.dot(tl.reshape(both, ({warps}, {self.wide}, {k})), y, acc{i})")

    def finish(self) -> None:
        self.emit(*(f"acc{i} = tl.sum(acc{i}, 0)" for i in range(self.op.weights)))
        if self.plan.splits > 1:
            super().finish()
        else:
            self.finish_parts()
