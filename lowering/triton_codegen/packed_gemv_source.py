"""Writes the kernel for one row of x and Q4_0 weights, on integer dot products.

x is made of integers on chip, once in a program, which then walks over tiles of the output with all of K in registers:
per block of 32, x ≈ step · (128 · coarse + fine) with steps of 1/16256 of the block's maximum, two digits of 8 bits
that err less than float16 does; or, as ggml has it (Q8_1), one digit in steps of 1/127. A thread holds whole blocks, so
that what belongs to a block is summed as integers inside of it. The next tile is asked for before this one is used.
"""

from __future__ import annotations

from ...fused import MatmulFamily, Packed
from .plans import Plan
from .pointwise import print_pointwise
from .writer import INDENT, KernelSource

_NATIVE = """@triton.jit
def dot8(low, high, x_low, x_high):
    return tl.inline_asm_elementwise(
        "mov.b32 $0, 0; dp4a.u32.s32 $0, $1, $3, $0; dp4a.u32.s32 $0, $2, $4, $0;",
        "=&r,r,r,r,r", [low, high, x_low, x_high], dtype=tl.int32, is_pure=True, pack=1,
    )
"""
_PORTABLE = """@triton.jit
def dot8(low, high, x_low, x_high):
    total = 0 * low
    for e in tl.static_range(0, 4):
        total += (low >> 8 * e & 255) * (x_low << (24 - 8 * e) >> 24)
        total += (high >> 8 * e & 255) * (x_high << (24 - 8 * e) >> 24)
    return total
"""
_SHARED = """
@triton.jit
def element(four, e: tl.constexpr, like):
    return (four >> (16 * e)).to(tl.int16).to(like.dtype.element_ty, bitcast=True).to(tl.float32)

@triton.jit
def rounded(x, inverse):
    x = x * inverse
    return (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int32)

@triton.jit
def word(a, b, c, d):
    return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24)

"""
FOURS = ("low", "high")


def blocks_of(op: MatmulFamily) -> int:
    """Blocks of 32 in a row, rounded up to a power of two."""
    return 1 << (int(op.k) // 32 - 1).bit_length()


class PackedGemv:
    """The text for a plan: `block_n` features per tile, in a grid of `programs`."""

    def __init__(self, op: MatmulFamily, plan: Plan, programs: int, *, native: bool) -> None:
        self.op, self.plan, self.programs, self.native = op, plan, programs, native
        self.blocks = blocks_of(op)
        self.even = self.blocks * 32 == int(op.k)
        self.digits = ("coarse",) if op.q8_activations else ("fine", "coarse")
        self.lines: list[str] = []
        held = [name for i in range(op.weights) for name in (f"w{i}", f"s{i}")]
        self.tensors = ("x", *held, *(f"extra{j}" for j in range(len(op.extras))), "out")

    def emit(self, *lines: str, level: int = 1) -> None:
        self.lines.extend(INDENT * level + line for line in lines)

    def write(self) -> KernelSource:
        n, step = int(self.op.n), self.plan.block_n * self.programs
        self.emit(f"b = tl.arange(0, {self.blocks})", "j = tl.arange(0, 4)", f"r = tl.arange(0, {self.plan.block_n})")
        self.emit(f"first = tl.program_id(0) * {self.plan.block_n}")
        for i, packed in enumerate(self.op.packed):
            self.pointers(i, packed)
        self.ask("first", level=1)
        self.digits_of_x()
        self.emit(f"for at in range(first, {n}, {step}):")
        for i in range(self.op.weights):
            self.emit(f"w{i}_now = w{i}_next", f"s{i}_now = s{i}_next.to(tl.float32)", level=2)
        self.emit(f"following = tl.minimum(at + {step}, {n - self.plan.block_n})", level=2)
        self.ask("following", level=2)
        self.products()
        self.store()
        name = f"packed{self.op.weights}_gemv"
        head = [
            (_NATIVE if self.native else _PORTABLE) + _SHARED,
            "@triton.jit",
            f"def {name}({', '.join(self.tensors)}):",
        ]
        text = "\n".join(["import triton", "import triton.language as tl", "", *head, *self.lines]) + "\n"
        return KernelSource(text, name, self.tensors, False, ("out",))

    # ---- weights -------------------------------------------------------------------------------
    def pointers(self, i: int, packed: Packed) -> None:
        scale = packed.scale
        assert scale is not None
        codes = f"w{i}.to(tl.pointer_type(tl.uint8)) + {packed.first}"
        if packed.block == 16:
            at = f"r[:, None, None] * {packed.row // 4} + b[None, :, None] * 4 + j[None, None, :]"
            self.emit(f"w{i}_at = ({codes}).to(tl.pointer_type(tl.int32)) + {at}")
        else:
            at = f"r[:, None] * {packed.row // 2} + b[None, :] * {packed.block // 2}"
            self.emit(f"w{i}_at = ({codes}).to(tl.pointer_type(tl.uint16)) + {at}")
        kind = str(scale.dtype).replace("torch", "tl")
        at = f"{scale.first} + r[:, None] * {scale.row} + b[None, :] * {scale.step}"
        self.emit(f"s{i}_at = s{i}.to(tl.pointer_type({kind})) + {at}")

    def ask(self, place: str, level: int) -> None:
        """Loads of the tile of weights at `place`."""
        plain = "" if self.even else f", mask=b[None, :] < {int(self.op.k) // 32}, other=0"
        whole = "" if self.even else f", mask=b[None, :, None] < {int(self.op.k) // 32}, other=0"
        policy = ', eviction_policy="evict_first"'
        for i, packed in enumerate(self.op.packed):
            if packed.block == 16:
                self.emit(f"w{i}_next = tl.load(w{i}_at + {place} * {packed.row // 4}{whole}{policy})", level=level)
            else:  # only half words are aligned; they stay in the thread that joins them
                at = f"w{i}_at + {place} * {packed.row // 2}"
                halves = [f"tl.load({at} + {h}{plain}).to(tl.int32)" for h in range(8)]
                for q in range(4):
                    self.emit(f"word{q} = {halves[2 * q]} | ({halves[2 * q + 1]} << 16)", level=level)
                joined = "tl.join(tl.join(word0, word2), tl.join(word1, word3))"
                self.emit(f"w{i}_next = tl.reshape({joined}, ({self.plan.block_n}, {self.blocks}, 4))", level=level)
            assert packed.scale is not None
            self.emit(f"s{i}_next = tl.load(s{i}_at + {place} * {packed.scale.row}{plain}{policy})", level=level)

    # ---- x -------------------------------------------------------------------------------------
    def digits_of_x(self) -> None:
        inside = "" if self.even else f", mask=b[:, None] < {int(self.op.k) // 32}, other=0"
        self.emit("x_at = (x + b[:, None] * 32 + j[None, :] * 4).to(tl.pointer_type(tl.int64))")
        names = {part: [f"{part}{e}" for e in range(4)] for part in FOURS}
        for part, offset in zip(FOURS, (0, 4), strict=True):
            self.emit(f"four = tl.load(x_at + {offset}{inside})")
            self.emit(*(f"{name} = element(four, {e}, x)" for e, name in enumerate(names[part])))
        self.emit("largest = tl.abs(low0)")
        everything = [*names["low"], *names["high"]]
        self.emit(*(f"largest = tl.maximum(largest, tl.abs({name}))" for name in everything[1:]))
        self.emit(f"step = tl.max(largest, 1) / {127.0 if self.op.q8_activations else 16256.0}")
        self.emit("inverse = tl.where(step == 0, 0.0, 1 / step)[:, None]")
        self.emit(*(f"{name} = rounded({name}, inverse)" for name in everything))
        self.emit(f"total = tl.sum({' + '.join(everything)}, 1)[None, :] * {int(self.op.packed[0].zero)}")  # type: ignore[arg-type]
        taken = {"fine": "{} & 127", "coarse": "{}" if self.op.q8_activations else "{} >> 7"}
        for digit in self.digits:
            for part in FOURS:
                elements = ", ".join(taken[digit].format(name) for name in names[part])
                self.emit(f"{digit}_{part} = word({elements})[None, :, :]")
        # a scale of Q8_1 is stored in float16
        self.emit(f"step = step{'.to(tl.float16).to(tl.float32)' if self.op.q8_activations else ''}[None, :]")

    def products(self) -> None:
        for i in range(self.op.weights):
            self.emit(f"low = w{i}_now & 0x0F0F0F0F", f"high = (w{i}_now >> 4) & 0x0F0F0F0F", level=2)
            for digit in self.digits:
                dots = f"dot8(low, high, {digit}_low, {digit}_high)"
                self.emit(f"{digit} = tl.sum({dots}, 2)", level=2)
            dots = "coarse" if self.op.q8_activations else "fine + coarse * 128"
            self.emit(f"acc{i} = tl.sum(({dots} - total).to(tl.float32) * (s{i}_now * step), 1)", level=2)

    # ---- the result ----------------------------------------------------------------------------
    def store(self) -> None:
        self.emit("n = at + r", level=2)
        for j, extra in enumerate(self.op.extras):
            first = f"{extra.first} + " if extra.first else ""
            at = {"full": "n", "col": f"{first}n", "row": "0", "scalar": "0"}[extra.kind]
            self.emit(f"e{j} = tl.load(extra{j} + {at}).to(tl.float32)", level=2)
        lines, result = print_pointwise(
            self.op.epilogue, lambda leaf: f"{'acc' if leaf.op == 'acc' else 'e'}{leaf.attr('index')}", "t"
        )
        self.emit(*lines, f"tl.store(out + n, {result})", level=2)
