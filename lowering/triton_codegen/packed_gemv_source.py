"""Writes the kernel for up to 4 rows of x and Q4_0 weights, on integer dot products.

x is made of integers on chip, once in a program, which then walks over tiles of the output with all of x in registers:
per block of 32, x ≈ step · (128 · coarse + fine) with steps of 1/16256 of the block's maximum, two digits of 8 bits
that err less than float16 does; or, as ggml has it (Q8_1), one digit in steps of 1/127. A thread holds whole blocks, so
that what belongs to a block is summed as integers inside of it. The next tile is asked for before this one is used.

A norm in front costs a sum over rows that are in registers already. Linears of one input follow each other in the walk:
a tile belongs to one of them, whose weight it reads and whose result it writes.

Where K is long, or no power of two of blocks, programs share it (`splits`): those of the same tiles leave their sums in
memory, and the last of them to arrive adds up, always in the same order.
"""

from __future__ import annotations

import functools

from ...algebra import Value
from ...fused import MatmulFamily, MatmulGroup
from .plans import Plan
from .pointwise import literal, print_pointwise
from .predict import power_of_two
from .split_source import WORKSPACE
from .writer import INDENT, KernelSource, Parts

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
ELEMENTS = {f"{part}{e}": e + offset for part, offset in zip(FOURS, (0, 16), strict=True) for e in range(4)}


class PackedGemv(Parts):
    """The text for a plan: `block_n` features per tile, in a grid of `programs`; rows of x lie `x_stride` apart."""

    def __init__(
        self, op: MatmulFamily | MatmulGroup, plan: Plan, programs: int, x_stride: int, *, native: bool
    ) -> None:
        self.op, self.parts, self.plan, self.programs, self.native = op.whole, op.parts, plan, programs, native
        self.rows, self.x_stride = int(op.m), x_stride
        self.packed = self.op.packed[0]  # all are laid out alike
        self.blocks = plan.block_k // 32
        self.even = plan.splits * plan.block_k == int(self.op.k)
        self.digits = ("coarse",) if self.op.q8_activations else ("fine", "coarse")
        self.lines: list[str] = []
        norm = self.op.norm
        held = [name for p in range(len(self.parts)) for name in self.read_by(p)]
        self.outputs = tuple(self.out(p) for p in range(len(self.parts)))
        before = [*(["norm_weight"] if norm and norm.has_weight else [])]
        before += ["norm_bias"] if norm and norm.has_bias else []
        self.tensors = ("x", *before, *held, *(WORKSPACE if plan.splits > 1 else ()), *self.outputs)

    def stored(self, i: int) -> tuple[str, ...]:
        """Codes and scales."""
        return f"w{i}", f"s{i}"

    def begin(self, p: int) -> int:
        """The place of part p's first feature in the walk over all of them."""
        return sum(int(part.n) for part in self.parts[:p])

    def emit(self, *lines: str, level: int = 1) -> None:
        self.lines.extend(INDENT * level + line for line in lines)

    def write(self) -> KernelSource:
        n, step, splits = self.begin(len(self.parts)), self.step, self.plan.splits
        self.emit(f"b = tl.arange(0, {self.blocks})", "j = tl.arange(0, 4)", f"r = tl.arange(0, {self.plan.block_n})")
        if splits > 1:
            self.emit(f"slot, share = tl.program_id(0) // {splits}, tl.program_id(0) % {splits}")
            self.emit(f"b += share * {self.blocks}")
        self.emit(f"first = {'slot' if splits > 1 else 'tl.program_id(0)'} * {self.plan.block_n}")
        self.pointers()
        self.ask("first", level=1)
        self.load_norm()
        for row in range(self.rows):
            self.digits_of_x(row)
        self.emit(f"for at in range(first, {n}, {step}):")
        for i in range(self.op.weights):
            self.emit(f"w{i}_now = w{i}_next", f"s{i}_now = s{i}_next.to(tl.float32)", level=2)
        self.emit(f"following = tl.minimum(at + {step}, {n - self.plan.block_n})", level=2)
        self.ask("following", level=2)
        self.products()
        if splits > 1:
            self.emit(f"tl.store(partial + share * {n} + at + r, acc0)", level=2)
            self.gather()
        else:
            self.store()
        norm = f"{self.op.norm.kind}_norm_" if self.op.norm else ""
        name = f"{norm}packed{'s' if self.several else ''}{max(len(self.parts), self.op.weights)}_gemv"
        name += "_split" if splits > 1 else ""
        head = [
            (_NATIVE if self.native else _PORTABLE) + _SHARED,
            "@triton.jit",
            f"def {name}({', '.join(self.tensors)}):",
        ]
        text = "\n".join(["import triton", "import triton.language as tl", "", *head, *self.lines]) + "\n"
        return KernelSource(text, name, self.tensors, False, self.outputs)

    # ---- weights -------------------------------------------------------------------------------
    def pointers(self) -> None:
        """Each weight's codes and scales as pointers, and where the elements of a tile lie behind them."""
        scale = self.packed.scale
        assert scale is not None
        unit = "int32" if self.packed.block == 16 else "uint16"
        kind = str(scale.dtype).replace("torch", "tl")
        for i, packed in enumerate(p for part in self.parts for p in part.packed):
            assert packed.scale is not None
            codes = f"w{i}.to(tl.pointer_type(tl.uint8)) + {packed.first}"
            self.emit(f"w{i}_from = ({codes}).to(tl.pointer_type(tl.{unit}))")
            self.emit(f"s{i}_from = s{i}.to(tl.pointer_type({kind})) + {packed.scale.first}")
        if self.packed.block == 16:
            at = f"r[:, None, None] * {self.packed.row // 4} + b[None, :, None] * 4 + j[None, None, :]"
        else:
            at = f"r[:, None] * {self.packed.row // 2} + b[None, :] * {self.packed.block // 2}"
        self.emit(f"codes_in_tile = {at}", f"scales_in_tile = r[:, None] * {scale.row} + b[None, :] * {scale.step}")

    def ask(self, place: str, level: int) -> None:
        """Loads of the tile of weights at `place`."""
        plain = "" if self.even else f", mask=b[None, :] < {int(self.op.k) // 32}, other=0"
        whole = plain.replace("[None, :]", "[None, :, None]")
        policy = ', eviction_policy="evict_first"'
        packed, scale = self.packed, self.packed.scale
        assert scale is not None
        if self.several:
            self.emit(f"w_from, s_from, row = w0_from, s0_from, {place}", level=level)
            for p in range(1, len(self.parts)):
                chosen = f"w_from, s_from, row = w{p}_from, s{p}_from, {place} - {self.begin(p)}"
                self.emit(f"if {place} >= {self.begin(p)}:", INDENT + chosen, level=level)
        for i in range(self.op.weights):
            w, s, row = ("w_from", "s_from", "row") if self.several else (f"w{i}_from", f"s{i}_from", place)
            if packed.block == 16:
                at = f"{w} + ({row} * {packed.row // 4} + codes_in_tile)"
                self.emit(f"w{i}_next = tl.load({at}{whole}{policy})", level=level)
            else:  # only half words are aligned; they stay in the thread that joins them
                at = f"{w} + ({row} * {packed.row // 2} + codes_in_tile)"
                halves = [f"tl.load({at} + {h}{plain}).to(tl.int32)" for h in range(8)]
                for q in range(4):
                    self.emit(f"word{q} = {halves[2 * q]} | ({halves[2 * q + 1]} << 16)", level=level)
                joined = "tl.join(tl.join(word0, word2), tl.join(word1, word3))"
                self.emit(f"w{i}_next = tl.reshape({joined}, ({self.plan.block_n}, {self.blocks}, 4))", level=level)
            at = f"{s} + ({row} * {scale.row} + scales_in_tile)"
            self.emit(f"s{i}_next = tl.load({at}{plain}{policy})", level=level)

    # ---- x -------------------------------------------------------------------------------------
    @property
    def inside(self) -> str:
        """The mask of what is loaded along K."""
        return "" if self.even else f", mask=b[:, None] < {int(self.op.k) // 32}, other=0"

    def load_norm(self) -> None:
        """The norm's vectors, asked for before the sums over x are waited for."""
        norm = self.op.norm
        if norm is None:
            return
        self.emit("k = b[:, None] * 32 + j[None, :] * 4")
        held = {"g": "norm_weight"} if norm.has_weight else {}
        held |= {"b": "norm_bias"} if norm.has_bias else {}
        for short, vector in held.items():
            self.emit(f"if {vector}.dtype.element_ty.primitive_bitwidth == 16:")
            for part, offset in zip(FOURS, (0, 16), strict=True):
                self.emit(
                    f"four = tl.load(({vector} + k + {offset}).to(tl.pointer_type(tl.int64)){self.inside})", level=2
                )
                self.emit(*(f"{short}_{part}{e} = element(four, {e}, {vector})" for e in range(4)), level=2)
            self.emit("else:")
            for name, offset in ELEMENTS.items():
                self.emit(f"{short}_{name} = tl.load({vector} + k + {offset}{self.inside}).to(tl.float32)", level=2)

    def digits_of_x(self, row: int) -> None:
        first = f"x + {row * self.x_stride}" if row else "x"
        self.emit(f"x_at = ({first} + b[:, None] * 32 + j[None, :] * 4).to(tl.pointer_type(tl.int64))")
        for part, offset in zip(FOURS, (0, 4), strict=True):
            self.emit(f"four = tl.load(x_at + {offset}{self.inside})")
            self.emit(*(f"{part}{e} = element(four, {e}, x)" for e in range(4)))
        self.normalise()
        self.emit("largest = tl.abs(low0)")
        self.emit(*(f"largest = tl.maximum(largest, tl.abs({name}))" for name in list(ELEMENTS)[1:]))
        self.emit(f"step = tl.max(largest, 1) / {127.0 if self.op.q8_activations else 16256.0}")
        self.emit("inverse = tl.where(step == 0, 0.0, 1 / step)[:, None]")
        self.emit(*(f"{name} = rounded({name}, inverse)" for name in ELEMENTS))
        self.emit(f"total{row} = tl.sum({' + '.join(ELEMENTS)}, 1)[None, :] * {int(self.packed.zero)}")  # type: ignore[arg-type]
        taken = {"fine": "{} & 127", "coarse": "{}" if self.op.q8_activations else "{} >> 7"}
        for digit in self.digits:
            for part in FOURS:
                elements = ", ".join(taken[digit].format(f"{part}{e}") for e in range(4))
                self.emit(f"{digit}{row}_{part} = word({elements})[None, :, :]")
        # a scale of Q8_1 is stored in float16
        self.emit(f"step{row} = step{'.to(tl.float16).to(tl.float32)' if self.op.q8_activations else ''}[None, :]")

    def normalise(self) -> None:
        """The norm in front of the elements of a row."""
        norm, k = self.op.norm, int(self.op.k)
        if norm is None:
            return
        if norm.kind == "layer":
            self.emit(f"mean = tl.sum(tl.sum({' + '.join(ELEMENTS)}, 1), 0) / {k}")
            for name in ELEMENTS:
                centred = f"{name} - mean"
                inside = f"tl.where(b[:, None] < {k // 32}, {centred}, 0.0)"
                self.emit(f"{name} = {centred if self.even else inside}")
        squares = " + ".join(f"{name} * {name}" for name in ELEMENTS)
        self.emit(f"rstd = tl.rsqrt(tl.sum(tl.sum({squares}, 1), 0) / {k} + {literal(norm.eps)})")
        for name in ELEMENTS:
            weight = f" * (g_{name} + {literal(norm.offset)})" if norm.offset else f" * g_{name}"
            bias = f" + b_{name}" if norm.has_bias else ""
            self.emit(f"{name} = {name} * rstd{weight if norm.has_weight else ''}{bias}")

    def products(self) -> None:
        for i in range(self.op.weights):
            self.emit(f"low = w{i}_now & 0x0F0F0F0F", f"high = (w{i}_now >> 4) & 0x0F0F0F0F", level=2)
            for row in range(self.rows):
                for digit in self.digits:
                    dots = f"dot8(low, high, {digit}{row}_low, {digit}{row}_high)"
                    self.emit(f"{digit} = tl.sum({dots}, 2)", level=2)
                dots = "coarse" if self.op.q8_activations else "fine + coarse * 128"
                self.emit(f"p{row} = ({dots} - total{row}).to(tl.float32) * (s{i}_now * step{row})", level=2)
            if self.rows > 1:  # the rows of a tile are summed together
                p = [f"p{row}" if row < self.rows else "tl.zeros_like(p0)" for row in range(self.padded)]
                both = f"tl.join({p[0]}, {p[1]})"
                if self.padded == 4:
                    four = f"tl.join(tl.join({p[0]}, {p[2]}), tl.join({p[1]}, {p[3]}))"
                    both = f"tl.reshape({four}, ({self.plan.block_n}, {self.blocks}, 4))"
                self.emit(f"p0 = {both}", level=2)
            self.emit(f"acc{i} = tl.sum(p0, 1)", level=2)

    @property
    def padded(self) -> int:
        """Rows of the accumulators, a power of two."""
        return 1 << (self.rows - 1).bit_length()

    # ---- the results ---------------------------------------------------------------------------
    def store(self) -> None:
        if self.rows > 1:
            self.emit(f"m = tl.arange(0, {self.padded})[None, :]", level=2)
        mask = f", mask=m < {self.rows}" if self.rows < self.padded else ""
        read = f"{mask}, other=0.0" if mask else ""
        for p, part in enumerate(self.parts[: 1 if self.alike else None]):
            level, begin, width, out = 2, str(self.begin(p)), str(part.n), self.outputs[p]
            if self.alike:
                out, begin, width = self.chosen_result()
            elif self.several:
                self.emit(f"if (at >= {begin}) & (at < {self.begin(p + 1)}):", level=2)
                level = 3
            n = f"at - {begin} + r" if begin != "0" else "at + r"
            self.emit(f"n = {n}" if self.rows == 1 else f"n = ({n})[:, None]", level=level)
            full = "n" if self.rows == 1 else f"m * {width} + n"
            row = "0" if self.rows == 1 else f"m{read}"
            places = {"full": f"{full}{read}", "col": "n", "row": row, "scalar": "0"}
            self.finish(p, out, places, f"{full}, ", mask, level)

    def finish(self, p: int, out: str, places: dict[str, str], at: str, mask: str, level: int) -> None:
        """Part p's epilogue, which reads its extras at `places`, by their kind."""
        part = self.parts[p]
        for j, extra in enumerate(part.extras):
            first = f"{extra.first} + " if extra.first else ""
            e = self.numbered(p, j)
            self.emit(f"e{e} = tl.load(extra{e} + {first}{places[extra.kind]}).to(tl.float32)", level=level)
        lines, result = print_pointwise(part.epilogue, functools.partial(self.leaf, p), "t")
        self.emit(*lines, f"tl.store({out} + {at}{result}{mask})", level=level)

    def gather(self) -> None:
        """The last program of a slot adds up what all of them have left of its tiles, and goes on with the epilogue."""
        splits, n = self.plan.splits, int(self.op.n)
        tiles = power_of_two(-(-n // self.step))
        self.emit("tl.debug_barrier()  # all of this program's sums are written before it counts as arrived")
        self.emit('arrived = tl.atomic_add(arrivals + slot, 1, sem="acq_rel")')
        self.emit(f"if arrived != {splits - 1}:", INDENT + "return", "tl.store(arrivals + slot, 0)")
        self.emit(f"n = first + tl.arange(0, {tiles})[:, None] * {self.step} + r[None, :]")
        inside = f", mask=n < {n}"
        for share in range(splits):
            place = f"partial + {share * n} + n{inside}, other=0.0"
            self.emit(f"acc0 {'+' if share else ''}= tl.load({place}, cache_modifier='.cg')")
        read = f"n{inside}, other=0.0"
        self.finish(0, "out", {"full": read, "col": read, "row": "0", "scalar": "0"}, "n, ", inside, 1)

    @property
    def step(self) -> int:
        """Features from one tile of a program to its next."""
        return self.plan.block_n * self.programs // self.plan.splits

    @property
    def alike(self) -> bool:
        """Whether several results differ in nothing but where they lie. Then one place in the text writes them all: a
        place for each takes so many registers that a quarter of the programs no longer run at once."""
        kinds = {(part.epilogue, part.extras, part.out_dtype) for part in self.parts}
        return self.several and len(kinds) == 1 and not self.parts[0].extras

    def chosen_result(self) -> tuple[str, str, str]:
        """The result of a tile, its first feature and its width."""
        names = "out, begin, width"
        self.emit(f"{names} = {self.outputs[0]}, 0, {self.parts[0].n}", level=2)
        for p in range(1, len(self.parts)):
            chosen = f"{names} = {self.outputs[p]}, {self.begin(p)}, {self.parts[p].n}"
            self.emit(f"if at >= {self.begin(p)}:", INDENT + chosen, level=2)
        return "out", "begin", "width"

    def leaf(self, p: int, leaf: Value) -> str:
        index = int(leaf.attr("index"))
        return f"acc{index}" if leaf.op == "acc" else f"e{self.numbered(p, index)}"
