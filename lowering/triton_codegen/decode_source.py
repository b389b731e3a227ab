"""Writes the Triton source of split-KV decode attention.

A program takes the query rows of one key/value head (all heads of its group, all query positions) as the few rows of
one tile and walks along its share of the keys, with the online softmax in float32:

    s = score(k · qᵀ),  m' = max(m, max s),  p = 2^(s − m'),  l = l·2^(m − m') + Σ p,  acc = acc·2^(m − m') + vᵀ · p

Keys are the M operand of the matrix unit ("swap-AB"), because the rows are too few to fill it. What is visible decides
how far the keys are walked: where the mask counts from a position on the device, the program reads it and the splits
divide the keys that are really there; programs without a share return at once. With more than one split, acc, m and l
of every split go to a workspace, and a second small kernel adds them up.

Strides and sizes known when compiling stand in the text as numbers; the others are arguments of the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ...fused import Attention, Size
from .pointwise import literal

INDENT = "    "
LOG2E = 1.4426950408889634
WORKSPACE = {"partial": torch.float32, "stats": torch.float32}
Axes = tuple[Size, Size, Size, Size]


@dataclass(frozen=True)
class DecodePlan:
    """How the work is divided: `rows` of queries in a tile, `block` keys per step, `splits` of the keys per head."""

    rows: int
    block: int
    splits: int
    num_warps: int
    num_stages: int
    combine_columns: int = 32  # of v that one program of the second kernel adds up

    @property
    def label(self) -> str:
        return f"decode{self.rows}_n{self.block}s{self.splits}w{self.num_warps}s{self.num_stages}"


@dataclass(frozen=True)
class Operand:
    """A tensor as a kernel reads it: dtype, and strides along batch, heads, positions and columns."""

    dtype: torch.dtype
    strides: Axes


@dataclass(frozen=True)
class Operands:
    """`mask` only where it is read as a tensor: strides along batch, heads, queries, keys, 0 where it is broadcast."""

    q: Operand
    k: Operand
    v: Operand
    out: Operand
    mask: Operand | None = None
    position: torch.dtype | None = None
    scale: torch.dtype | None = None


@dataclass(frozen=True)
class KernelSource:
    """One kernel: its arguments are `tensors` with their dtypes, then the symbolic `sizes`; `outputs` are written."""

    text: str
    name: str
    tensors: dict[str, torch.dtype]
    sizes: dict[str, Size]
    outputs: tuple[str, ...]


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def group(op: Attention) -> int:
    return int(op.heads) // int(op.kv_heads)


def query_rows(op: Attention) -> int:
    """Rows of q that read one key/value head."""
    return group(op) * int(op.q_len)


def row_tiles(op: Attention, plan: DecodePlan) -> int:
    return -(-query_rows(op) // plan.rows)


def write_split(op: Attention, plan: DecodePlan, operands: Operands, precision: str = "ieee") -> KernelSource:
    """The kernel that walks along the keys. Its grid is (batch · kv_heads · row tiles, splits)."""
    return _Split(op, plan, operands, precision).write()


def write_combine(op: Attention, plan: DecodePlan, operands: Operands) -> KernelSource:
    """The kernel that adds up the splits. Its grid is (batch · heads · q_len, ⌈v_dim / combine_columns⌉)."""
    return _Combine(op, plan, operands).write()


class _Writer:
    """What the two kernels share: indices, and how many splits have something to do."""

    kind: Literal["split", "combine"]

    def __init__(self, op: Attention, plan: DecodePlan, operands: Operands) -> None:
        self.op, self.plan, self.operands = op, plan, operands
        self.lines: list[str] = []
        self.level = 1
        self.sizes: dict[str, Size] = {}
        self.splitting = plan.splits > 1
        self.additive = op.mask.kind == "tensor" and op.mask.tensor == "additive"
        # Scores are kept in units of log 2, so that exponentials need no factor. Not where float32 has to be exact, nor
        # where a mask that is added may be near the least number, which leaves no room for the factor.
        self.binary = not self.additive and op.dtype != torch.float32

    def emit(self, *lines: str) -> None:
        self.lines.extend(INDENT * self.level + line for line in lines)

    def position_dtype(self) -> dict[str, torch.dtype]:
        return {"position": self.operands.position} if self.operands.position is not None else {}

    def size(self, name: str, value: Size) -> str:
        """The size as text: a number, or the name of an argument."""
        if isinstance(value, int):
            return str(value)
        self.sizes[name] = value
        return name

    def along(self, tensor: str, strides: Axes, **index: str) -> str:
        """Offset into `tensor` from the indices given by axis name."""
        axes = ("batch", "head", "row", "column")
        terms = []
        for axis, stride in zip(axes, strides, strict=True):
            if axis in index and stride != 0:
                text = self.size(f"{tensor}_{axis}_stride", stride)
                terms.append(index[axis] if text == "1" else f"{index[axis]} * {text}")
        return " + ".join([tensor, *terms])

    def module(self, tensors: dict[str, torch.dtype], outputs: tuple[str, ...]) -> KernelSource:
        name = f"decode_attention_{self.kind}"
        head = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {name}("]
        head += [f"{INDENT}{argument}," for argument in (*tensors, *self.sizes)] + ["):"]
        return KernelSource("\n".join([*head, *self.lines]) + "\n", name, tensors, self.sizes, outputs)

    def visible(self) -> None:
        """`length`: keys from there on are hidden from every row; `blocks` to walk through from `first_block` on, of
        which `active` splits take their shares."""
        mask, block = self.op.mask, self.plan.block
        counted = mask.kind in ("causal", "length")
        further = int(self.op.q_len) if mask.kind == "causal" else 1  # the last row sees that many more
        if mask.position:
            self.emit("newest = tl.load(position).to(tl.int32)" + (f" + {mask.offset}" if mask.offset != 0 else ""))
        elif counted:
            self.emit(f"newest = {mask.offset}")
        if isinstance(self.op.kv_len, int) and not mask.position:
            length = min(int(mask.offset) + further, self.op.kv_len) if counted else self.op.kv_len
            first = max(int(mask.offset) - mask.window + 1, 0) // block if mask.window is not None else 0
            blocks = -(-length // block) - first
            self.emit(f"length = {length}", f"first_block = {first}", f"blocks = {blocks}")
            if self.splitting:
                self.emit(f"active = {min(blocks, self.plan.splits)}")
            return
        keys = self.size("kv_len", self.op.kv_len)
        self.emit(f"length = tl.minimum(newest + {further}, {keys})" if counted else f"length = {keys}")
        windowed = f"tl.maximum(newest - {mask.window - 1}, 0) // {block}" if mask.window is not None else "0"
        self.emit(f"first_block = {windowed}", f"blocks = (length + {block - 1}) // {block} - first_block")
        if self.splitting:
            self.emit(f"active = tl.minimum(blocks, {self.plan.splits})")

    def query_index(self, kv_head: str) -> None:
        """`head` and, where there are several, `query` of a row: the queries of a head lie together."""
        queries = int(self.op.q_len)
        self.emit(f"head = {kv_head} * {group(self.op)} + row" + (f" // {queries}" if queries > 1 else ""))
        if queries > 1:
            self.emit(f"query = row % {queries}")

    def of_query(self, axis: str = "") -> dict[str, str]:
        """Indices along batch, heads and queries, for `along`; `axis` makes them vectors beside another one."""
        index = {"batch": "batch", "head": f"head{axis}"}
        return index | ({"row": f"query{axis}"} if int(self.op.q_len) > 1 else {})

    def exp(self, score: str) -> str:
        return f"tl.exp2({score})" if self.binary else f"tl.exp({score})"

    def result(self, acc: str, total: str) -> str:
        """acc / l, where a row that sees no key gives 0/0 or 0, as the graph would."""
        if self.op.mask.empty_rows == "zero":
            return f"tl.where({total} == 0.0, 0.0, {acc} / {total})"
        return f"{acc} / {total}"


class _Split(_Writer):
    """Names: row over rows of the tile, n over keys, d over columns of q and k, c over columns of v."""

    kind = "split"

    def __init__(self, op: Attention, plan: DecodePlan, operands: Operands, precision: str) -> None:
        super().__init__(op, plan, operands)
        self.precision = precision
        self.rows = query_rows(op)
        self.tiles = row_tiles(op, plan)
        self.width, self.v_width = power_of_two(max(16, op.head_dim)), power_of_two(max(16, op.v_dim))

    def write(self) -> KernelSource:
        self.indices()
        self.queries()
        self.visible()
        self.share()
        self.walk()
        self.finish()
        operands = self.operands
        tensors = {"q": operands.q.dtype, "k": operands.k.dtype, "v": operands.v.dtype}
        if operands.mask is not None:
            tensors["mask"] = operands.mask.dtype
        tensors |= self.position_dtype()
        if operands.scale is not None:
            tensors["scale"] = operands.scale
        written = WORKSPACE if self.splitting else {"out": operands.out.dtype}
        return self.module(tensors | written, tuple(written))

    def indices(self) -> None:
        op, plan = self.op, self.plan
        self.emit("pair = tl.program_id(0)")
        if self.tiles > 1:
            self.emit(f"tile = pair % {self.tiles}", f"pair = pair // {self.tiles}")
        self.emit(f"batch = (pair // {int(op.kv_heads)}).to(tl.int64)")
        self.emit(f"kv_head = (pair % {int(op.kv_heads)}).to(tl.int64)")
        first = f"tile * {plan.rows} + " if self.tiles > 1 else ""
        self.emit(f"row = {first}tl.arange(0, {plan.rows})")
        if self.rows % plan.rows:
            self.emit(f"row_in = row < {self.rows}")
        self.query_index("kv_head")
        self.emit(f"d = tl.arange(0, {self.width})")
        self.emit(f"c = tl.arange(0, {self.v_width})")

    def inside(self, *bounds: str) -> str:
        return f", mask={' & '.join(b for b in bounds if b)}, other=0.0" if any(bounds) else ""

    def row_bound(self, axis: str) -> str:
        return f"row_in{axis}" if self.rows % self.plan.rows else ""

    def column_bound(self, name: str, size: int, axis: str) -> str:
        return f"({name} < {size}){axis}" if size != power_of_two(max(16, size)) else ""

    def cast(self, operand: Operand) -> str:
        return "" if operand.dtype == self.op.dtype else f".to(tl.{str(self.op.dtype).removeprefix('torch.')})"

    def queries(self) -> None:
        q = self.operands.q
        where = self.along("q", q.strides, column="d[:, None]", **self.of_query("[None, :]"))
        bounds = self.inside(self.row_bound("[None, :]"), self.column_bound("d", self.op.head_dim, "[:, None]"))
        self.emit(f"q_tile = tl.load({where}{bounds}){self.cast(q)}")
        scale = self.op.scale * LOG2E if self.binary and self.op.softcap is None else self.op.scale
        if self.operands.scale is not None:
            self.emit(f"scale_factor = tl.load(scale).to(tl.float32) * {literal(scale)}")
        self.scale = "scale_factor" if self.operands.scale is not None else literal(scale)

    def share(self) -> None:
        """begin and end of this program's blocks."""
        if not self.splitting:
            self.emit("begin = first_block", "end = first_block + blocks")
            return
        self.emit("split = tl.program_id(1)", "if split >= active:", f"{INDENT}return")
        self.emit("begin = first_block + split * blocks // active")
        self.emit("end = first_block + (split + 1) * blocks // active")

    def walk(self) -> None:
        plan, k, v = self.plan, self.operands.k, self.operands.v
        self.emit(f"step = tl.arange(0, {plan.block})")
        self.emit(f"k_base = {self.along('k', k.strides, batch='batch', head='kv_head')}")
        self.emit(f"v_base = {self.along('v', v.strides, batch='batch', head='kv_head')}")
        rows = plan.rows
        self.emit(f'm = tl.full(({rows},), float("-inf"), tl.float32)')
        self.emit(f"l = tl.zeros(({plan.block}, {rows}), tl.float32)")
        self.emit(f"acc = tl.zeros(({self.v_width}, {rows}), tl.float32)")
        self.emit("for block in range(begin, end):")
        self.level += 1
        self.emit(f"n = block * {plan.block} + step")
        k_at = self.along("k_base", k.strides, row=f"{self.key(k)}[:, None]", column="d[None, :]")
        bounds = self.inside("(n < length)[:, None]", self.column_bound("d", self.op.head_dim, "[None, :]"))
        self.emit(f"k_tile = tl.load({k_at}{bounds}){self.cast(k)}")
        self.emit(f's = tl.dot(k_tile, q_tile, input_precision="{self.precision}")')
        self.score()
        self.emit("m_new = tl.maximum(m, tl.max(s, 0))")
        if not self.sees_first_key():
            self.emit('base = tl.where(m_new == float("-inf"), 0.0, m_new)')
        base = "m_new" if self.sees_first_key() else "base"
        self.emit(f"alpha = {self.exp(f'm - {base}')}", f"p = {self.exp(f's - {base}[None, :]')}")
        self.emit("m = m_new", "l = l * alpha[None, :] + p", "acc = acc * alpha[None, :]")
        v_at = self.along("v_base", v.strides, row=f"{self.key(v)}[None, :]", column="c[:, None]")
        bounds = self.inside("(n < length)[None, :]", self.column_bound("c", self.op.v_dim, "[:, None]"))
        self.emit(f"v_tile = tl.load({v_at}{bounds}){self.cast(v)}")
        self.emit(f'acc = tl.dot(v_tile, p.to(v_tile.dtype), acc, input_precision="{self.precision}")')
        self.level -= 1

    def key(self, operand: Operand) -> str:
        """The index of the keys, in 64 bits where offsets within a head may pass 2³¹."""
        extent, stride = self.op.kv_len, operand.strides[2]
        return (
            "n"
            if isinstance(extent, int) and isinstance(stride, int) and extent * stride < 2**31
            else ("n.to(tl.int64)")
        )

    def sees_first_key(self) -> bool:
        """Whether every row of a program sees a key in the program's first block, so that m is finite from then on."""
        one_row = self.op.mask.kind == "causal" and int(self.op.q_len) == 1
        return self.op.mask.kind in ("none", "length") or (one_row and self.op.mask.window is None)

    def score(self) -> None:
        op = self.op
        self.emit(f"s = s * {self.scale}")
        if op.softcap is not None:
            # tanh(x) = 1 − 2 / (1 + e^2x), which neither overflows nor needs a library
            self.emit(
                f"s = {literal(op.softcap)} * (1.0 - 2.0 / (1.0 + tl.exp2(s * {literal(2 * LOG2E / op.softcap)})))"
            )
            if self.binary:
                self.emit(f"s = s * {literal(LOG2E)}")
        seen = ["(n < length)[:, None]"]
        if op.mask.kind == "causal":
            seen = ["(n[:, None] <= newest + query[None, :])", "(n < length)[:, None]"] if int(op.q_len) > 1 else seen
            if op.mask.window is not None:
                seen.append(f"(n[:, None] > newest + query[None, :] - {op.mask.window})")
        if op.mask.kind == "tensor":
            assert self.operands.mask is not None
            operand = self.operands.mask
            at = self.along("mask", operand.strides, column="n[:, None]", **self.of_query("[None, :]"))
            by_row, by_key = operand.strides[1] != 0 or operand.strides[2] != 0, operand.strides[3] != 0
            bounds = self.inside(
                "(n < length)[:, None]" if by_key else "", self.row_bound("[None, :]") if by_row else ""
            )
            if self.additive:
                self.emit(f"s = s + tl.load({at}{bounds}).to(tl.float32)")
            else:
                test = "!=" if op.mask.tensor == "visible" else "=="
                self.emit(f"marked = tl.load({at}{bounds.replace('0.0', '0')})")
                seen.append(f"(marked {test} 0)")
        self.emit(f's = tl.where({" & ".join(seen)}, s, float("-inf"))')

    def finish(self) -> None:
        row = self.row_bound("[None, :]")
        column = self.column_bound("c", self.op.v_dim, "[:, None]")
        stored = " & ".join(b for b in (row, column) if b)
        mask = f", mask={stored}" if stored else ""
        self.emit("total = tl.sum(l, 0)")
        if not self.splitting:
            out = self.operands.out
            at = self.along("out", out.strides, column="c[:, None]", **self.of_query("[None, :]"))
            self.emit(f"tl.store({at}, {self.result('acc', 'total[None, :]')}{mask})")
            return
        self.emit(f"slot = (pair.to(tl.int64) * {self.plan.splits} + split) * {self.rows} + row")
        self.emit(f"tl.store(partial + slot[None, :] * {self.op.v_dim} + c[:, None], acc{mask})")
        bound = f", mask={self.row_bound('')}" if row else ""
        self.emit(f"tl.store(stats + slot * 2, m{bound})", f"tl.store(stats + slot * 2 + 1, total{bound})")


class _Combine(_Writer):
    kind = "combine"

    def write(self) -> KernelSource:
        op, plan, rows = self.op, self.plan, query_rows(self.op)
        several = power_of_two(plan.splits)
        self.emit(f"pair = tl.program_id(0) // {rows}", f"row = tl.program_id(0) % {rows}")
        self.emit(f"batch = (pair // {int(op.kv_heads)}).to(tl.int64)")
        self.query_index(f"pair % {int(op.kv_heads)}")
        self.emit(f"split = tl.arange(0, {several})")
        self.emit(f"c = tl.program_id(1) * {plan.combine_columns} + tl.arange(0, {plan.combine_columns})")
        self.emit(f"slot = (pair.to(tl.int64) * {plan.splits} + split) * {rows} + row")
        # everything is asked for before the position is known: what inactive splits hold is dropped afterwards
        inside = [] if several == plan.splits else [f"(split < {plan.splits})"]
        bound = f", mask={inside[0]}" if inside else ""
        self.emit(f"m = tl.load(stats + slot * 2{bound})", f"l = tl.load(stats + slot * 2 + 1{bound})")
        columns = [] if op.v_dim % plan.combine_columns == 0 else [f"(c < {op.v_dim})[None, :]"]
        tile = " & ".join([*(f"{i}[:, None]" for i in inside), *columns])
        self.emit(f"acc = tl.load(partial + slot[:, None] * {op.v_dim} + c[None, :]{f', mask={tile}' if tile else ''})")
        self.visible()
        self.emit('m = tl.where(split < active, m, float("-inf"))')
        self.emit("best = tl.max(m, 0)")
        self.emit('best = tl.where(best == float("-inf"), 0.0, best)')
        self.emit(f"weight = {self.exp('m - best')}")
        self.emit("total = tl.sum(tl.where(split < active, l * weight, 0.0), 0)")
        self.emit("acc = tl.sum(tl.where((split < active)[:, None], acc * weight[:, None], 0.0), 0)")
        at = self.along("out", self.operands.out.strides, column="c", **self.of_query())
        store = "" if op.v_dim % plan.combine_columns == 0 else f", mask=c < {op.v_dim}"
        self.emit(f"tl.store({at}, {self.result('acc', 'total')}{store})")
        return self.module(WORKSPACE | self.position_dtype() | {"out": self.operands.out.dtype}, ("out",))
