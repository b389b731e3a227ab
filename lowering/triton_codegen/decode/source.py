"""Writes the Triton source of split-KV decode attention.

A program takes the query rows of one key/value head (all heads of its group, all query positions) as the few rows of
one tile and walks along its share of the keys, with the online softmax in float32:

    s = score(k · qᵀ),  m' = max(m, max s),  p = 2^(s − m'),  l = l·2^(m − m') + Σ p,  acc = acc·2^(m − m') + vᵀ · p

Keys are the M operand of the matrix unit ("swap-AB"), because the rows are too few to fill it. Where keys are its
own, a warp finds maxima and multiplies p by its values without waiting for the others: the products are batched, a warp
for each. What is visible decides how far the keys are walked: where the mask counts from a position on the device, the
program reads it and the splits divide the keys that are really there; programs without a share return at once.

With more than one split, acc, m and l of every split go to a workspace, and the program that is last to arrive adds
them up. `arrivals` counts the programs of a head; the last one leaves it at 0 again, so the kernel changes nothing
that the graph sees and one tensor of zeros serves all layers.
"""

from __future__ import annotations

import torch

from ....fused import Attention
from ..pointwise import literal
from .operands import Axes, KernelSource, Operand, Operands, Plan, Table, power_of_two, query_rows, row_tiles
from .stored import Stored
from .writer import LOG2E, Writer

NAME = "decode_attention"
WORKSPACE = {"partial": torch.float32, "stats": torch.float32}
MOST_ENTRIES = 4  # of the table that are read one by one: eight took as long as one for each key
GATHERED_ELEMENTS = 512  # of the rows' results that the last program adds up at a time
GATHERED_SPLITS = 16  # that it reads at a time


def write(op: Attention, plan: Plan, operands: Operands, *, native: bool = False) -> KernelSource:
    """The kernel, for the grid (batch · kv_heads · row tiles, splits); `native`: with NVIDIA's instructions."""
    return _Split(op, plan, operands, native=native).write()


def by_entries(plan: Plan, page: int) -> bool:
    """Whether the keys of a step lie in so few whole pages that each entry of the table is read once."""
    return plan.block % page == 0 and plan.block // page <= MOST_ENTRIES


def gathered(op: Attention, plan: Plan) -> tuple[int, int]:
    """Rows and splits that the last program of a tile adds up at a time."""
    rows = min(max(1, GATHERED_ELEMENTS // power_of_two(max(16, op.v_dim))), power_of_two(query_rows(op)), plan.rows)
    return rows, min(GATHERED_SPLITS, power_of_two(plan.splits))


class _Split(Writer):
    """Names: n over keys, d over columns of q and k, c over columns of v."""

    def __init__(self, op: Attention, plan: Plan, operands: Operands, *, native: bool) -> None:
        super().__init__(op, plan, operands)
        # one product of TF32 would cut operands off where eager's rounds them
        self.precision = "tf32x3" if op.dtype == torch.float32 else "ieee"
        self.rows = query_rows(op)
        self.tiles = row_tiles(op, plan)
        self.k = Stored("k", "d", op.head_dim, operands.k, op.dtype, native)
        self.v = Stored("v", "c", op.v_dim, operands.v, op.dtype, native)
        self.functions = [side.function for side in (self.k, self.v) if side.word]
        # one block of the cache for all keys of a step, or one for each
        self.one_page = operands.table is not None and operands.k.page % plan.block == 0

    def write(self) -> KernelSource:
        self.indices()
        self.queries()
        self.visible()
        self.share()
        self.walk()
        self.finish()
        known = self.operands
        tensors = {"q": known.q.dtype, "k": known.k.dtype, "v": known.v.dtype}
        optional = {
            "mask": known.mask.dtype if known.mask else None,
            "position": known.position, "lengths": known.lengths, "scale": known.scale,
            "table": known.table.dtype if known.table else None,
        }  # fmt: skip
        for side in (self.k, self.v):
            for what, held in (("scale", side.operand.scale), ("zero", side.operand.zero)):
                optional[f"{side.name}_{what}"] = held.dtype if held is not None else None
        tensors |= {name: dtype for name, dtype in optional.items() if dtype is not None}
        if self.splitting:
            tensors |= {"arrivals": torch.int32, **WORKSPACE}
        tensors |= {"out": known.out.dtype}
        outputs = ("out", *WORKSPACE) if self.splitting else ("out",)
        return self.module(NAME, tensors, outputs)

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
        if op.mask.position:
            self.emit("position_here = tl.load(position)  # on its way while queries are")
        self.emit(f"d = tl.arange(0, {self.k.width})", f"c = tl.arange(0, {self.v.width})")

    def inside(self, *bounds: str) -> str:
        return f", mask={' & '.join(b for b in bounds if b)}, other=0.0" if any(bounds) else ""

    def row_bound(self, axis: str) -> str:
        return f"row_in{axis}" if self.rows % self.plan.rows else ""

    def cast(self, operand: Operand) -> str:
        return "" if operand.dtype == self.op.dtype else f".to(tl.{str(self.op.dtype).removeprefix('torch.')})"

    def queries(self) -> None:
        q = self.operands.q
        bounds = self.inside(self.row_bound("[None, :]"), self.k.bound("[:, None]"))
        for suffix, column in self.k.parts.items():
            where = self.along(
                "q", q.strides, whole=("head",), column=f"({column})[:, None]", **self.of_query("[None, :]")
            )
            self.emit(f"q_tile{suffix} = tl.load({where}{bounds}){self.cast(q)}")
        if self.k.shifts:
            total = " + ".join(f"tl.sum(q_tile{s}.to(tl.float32), 0)" for s in self.k.parts)
            self.emit(f"q_total = ({total}) * {literal(1 / self.k.unit)}")
        if self.warps:
            every = f"({self.plan.num_warps}, {self.k.width}, {self.plan.rows})"
            self.emit(*(f"q_tile{s} = tl.broadcast_to(q_tile{s}[None], {every})" for s in self.k.parts))
        factor = self.op.scale * self.k.unit
        scale = literal(factor * LOG2E if self.binary and self.op.softcap is None else factor)
        self.scale = scale
        if self.operands.scale is not None:
            divides = "/" if self.op.scale_divides else "*"
            self.emit(f"scale_factor = {scale} {divides} tl.load(scale).to(tl.float32)")
            self.scale = "scale_factor"

    def share(self) -> None:
        """The blocks from `begin` to `end` that this program walks through: with several splits, every so many'th."""
        self.emit("begin = first_block", "end = first_block + blocks")
        if self.splitting:
            self.emit("split = tl.program_id(1)", "if split >= active:", "    return", "begin = begin + split")

    def walk(self) -> None:
        plan, k, v = self.plan, self.k, self.v
        if self.warps:
            each = plan.block // plan.num_warps
            self.emit(f"step = tl.arange(0, {plan.num_warps})[:, None] * {each} + tl.arange(0, {each})[None, :]")
        else:
            self.emit(f"step = tl.arange(0, {plan.block})")
        for side in (k, v):
            batch = {} if side.operand.page else {"batch": "batch"}
            if side.word:
                self.emit(f"{side.name}_base = {side.name}.to(tl.pointer_type(tl.{side.word}))")
            base = self.along(f"{side.name}_base" if side.word else side.name, side.strides, **batch, head="kv_head")
            self.emit(f"{side.name}_base = {base}")
            self.of_head(side)
        self.emit(f'm = tl.full({self.shape()}, float("-inf"), tl.float32)')
        self.emit(f"l = tl.zeros({self.shape(plan.block // (*self.warps, 1)[0])}, tl.float32)")
        for suffix in v.parts:
            self.emit(f"acc{suffix} = tl.zeros({self.shape(v.width)}, tl.float32)")
        if v.shifts:
            self.emit(f"surplus = tl.zeros({self.shape()}, tl.float32)")
        self.look_ahead("begin")
        self.emit(f"for block in range(begin, end{', active' if self.splitting else ''}):")
        self.level += 1
        self.emit(f"n = block * {plan.block} + step")
        self.emit(*(f"{name}_here = {name}_ahead.to(tl.float32)" for name in self.by_key))
        self.look_ahead("block + active" if self.splitting else "block + 1")
        self.pages()
        self.load(k)
        product = ""
        for suffix in k.parts:
            self.emit(f"s = {self.dot(f'k_tile{suffix}', f'q_tile{suffix}', product)}")
            product = ", s"
        if k.shifts:
            self.emit(f"s = s - {k.along_keys(k.zero(), 'zero', self.of_key)} * q_total{self.of_row}")
        if k.operand.scale is not None:
            self.emit(f"s = s * {k.along_keys('k_scale_here', 'scale', self.of_key)}")
        self.score()
        self.emit(f"m_new = tl.maximum(m, tl.max(s, {self.key_axis}))")
        base = "m_new"
        if not self.sees_first_key():
            base = "base"
            self.emit('base = tl.where(m_new == float("-inf"), 0.0, m_new)')
        self.emit(f"alpha = {self.exp(f'm - {base}')}", f"p = {self.exp(f's - {base}{self.kept}')}")
        self.emit("m = m_new", f"l = l * alpha{self.kept} + p")
        self.load(v)
        weight = f"p * {v.along_keys('v_scale_here', 'scale', self.of_key)}" if v.operand.scale is not None else "p"
        self.emit(f"weight = ({weight}).to(tl.{str(self.op.dtype).removeprefix('torch.')})")
        for suffix in v.parts:
            self.emit(f"acc{suffix} = acc{suffix} * alpha{self.kept}")
            self.emit(f"acc{suffix} = {self.dot(f'v_tile{suffix}', 'weight', f', acc{suffix}')}")
        if v.shifts:
            zero = v.along_keys(v.zero(), "zero", self.of_key)
            self.emit(f"surplus = surplus * alpha + tl.sum(weight.to(tl.float32) * {zero}, {self.key_axis})")
        self.level -= 1

    def shape(self, *other: int) -> str:
        """That of a tensor of keys or columns, and rows, or of rows alone."""
        return f"({', '.join(map(str, (*self.warps, *other, self.plan.rows)))},)"

    def dot(self, stored: str, rows: str, accumulator: str) -> str:
        return f'tl.dot({stored}, {rows}{accumulator}, input_precision="{self.precision}")'

    def load(self, side: Stored) -> None:
        """A tile of keys or values."""
        operand, name = side.operand, side.name
        keys, columns = self.axes(side)
        if operand.page:
            index = {"batch": "page" if self.one_page else f"page{keys}", "row": f"(n % {operand.page}){keys}"}
        else:
            index = {"row": f"{self.key(operand)}{keys}"}
        tile = ("row", "column")
        at = self.along(f"{name}_base", side.strides, whole=tile, **index, column=f"{side.index}{columns}")
        other = ", other=0" if operand.codes is not None else ", other=0.0"
        bounds = " & ".join(b for b in (f"(n < length){keys}", side.bound(columns)) if b)
        cast = "" if operand.codes is not None else self.cast(operand)
        self.emit(f"{name}_tile = tl.load({at}, mask={bounds}{other}){cast}")
        if side.word:
            self.emit(f"{', '.join(f'{name}_tile{s}' for s in side.parts)} = {name}_numbers({name}_tile)")
        if side.moved:
            zero = side.along_keys(side.zero(), "zero", keys)
            self.emit(*(f"{name}_tile{s} = {name}_tile{s} - {zero}" for s in side.parts))

    def axes(self, side: Stored) -> tuple[str, str]:
        """Along which keys and columns of a tile lie: a product sums over the last axis of its first factor."""
        keys, columns = ("[:, :, None]", "[None, None, :]") if self.warps else ("[:, None]", "[None, :]")
        if side is self.k:
            return keys, columns
        return ("[:, None, :]", "[None, :, None]") if self.warps else ("[None, :]", "[:, None]")

    @property
    def by_key(self) -> dict[str, Operand]:
        """The scales and zeros that differ from key to key."""
        return {
            f"{side.name}_{what}": held
            for side in (self.k, self.v)
            for what, held in (("scale", side.operand.scale), ("zero", side.operand.zero))
            if held is not None and side.by_key(what)
        }

    def look_ahead(self, block: str) -> None:
        """Scales and zeros of the keys of a later `block`: no pipeline fetches so few bytes."""
        if not self.by_key:
            return
        self.emit(f"ahead = ({block}) * {self.plan.block} + step")
        table, size = self.operands.table, self.operands.k.page
        if table is not None:
            at = self.along("table", self.table_strides(table), batch="batch", column=f"ahead // {size}")
            self.emit(
                f"page_ahead = tl.load({at}, mask=ahead < length, other=0).to(tl.int64)", self.from_last("page_ahead")
            )
        for name, held in self.by_key.items():
            place = {"batch": "batch", "row": self.key(held, "ahead")}
            if table is not None:
                place = {"batch": "page_ahead", "row": f"(ahead % {size})"}
            at = self.along(name, held.strides, head="kv_head", **place)
            self.emit(f"{name}_ahead = tl.load({at}, mask=ahead < length, other=0)")

    def pages(self) -> None:
        """`page`: the block of the cache that holds the keys at hand."""
        table = self.operands.table
        if table is None:
            return
        size, block = self.operands.k.page, self.plan.block
        strides = self.table_strides(table)
        if self.one_page or not by_entries(self.plan, size):
            key, mask = (f"block * {block}", "") if self.one_page else ("n", ", mask=n < length, other=0")
            at = self.along("table", strides, batch="batch", column=f"({key}) // {size}")
            self.emit(f"page = tl.load({at}{mask}).to(tl.int64)")
        else:
            # each entry once, not once for each of its keys
            entries = range(block // size)
            for i in entries:
                key = f"block * {block} + {i * size}"
                at = self.along("table", strides, batch="batch", column=f"({key}) // {size}")
                self.emit(f"page_{i} = tl.load({at}, mask={key} < length, other=0)")
            self.emit("page = " + " + ".join(f"tl.where(step // {size} == {i}, page_{i}, 0)" for i in entries))
            self.emit("page = page.to(tl.int64)")
        self.emit(self.from_last("page"))

    def table_strides(self, table: Table) -> Axes:
        return table.strides[0], 0, 0, table.strides[1]

    def from_last(self, page: str) -> str:
        """Negative numbers of blocks count from the last."""
        assert self.operands.table is not None
        return f"{page} = tl.where({page} < 0, {page} + {self.size('blocks_held', self.operands.table.blocks)}, {page})"

    def of_head(self, side: Stored) -> None:
        """Scale and zero that all keys of a head have."""
        for what, held in (("scale", side.operand.scale), ("zero", side.operand.zero)):
            if held is not None and not side.by_key(what):
                at = self.along(f"{side.name}_{what}", held.strides, batch="batch", head="kv_head")
                self.emit(f"{side.name}_{what}_here = tl.load({at}).to(tl.float32)")

    def key(self, operand: Operand, keys: str = "n") -> str:
        """The index of `keys`, in 64 bits where offsets within a head may pass 2³¹."""
        extent, stride = self.op.kv_len, operand.strides[2]
        short = isinstance(extent, int) and isinstance(stride, int) and extent * stride < 2**31
        return keys if short else f"{keys}.to(tl.int64)"

    def score(self) -> None:
        op, cap = self.op, self.op.softcap
        self.emit(f"s = s * {self.scale}")
        if cap is not None:
            # tanh(x) = 1 − 2 / (1 + e^2x), which neither overflows nor needs a library
            self.emit(f"s = {literal(cap)} * (1.0 - 2.0 / (1.0 + tl.exp2(s * {literal(2 * LOG2E / cap)})))")
            if self.binary:
                self.emit(f"s = s * {literal(LOG2E)}")
        seen = self.seen()
        if op.mask.kind == "tensor":
            assert self.operands.mask is not None
            operand = self.operands.mask
            at = self.along("mask", operand.strides, column=f"n{self.of_key}", **self.of_query(self.of_row))
            by_row, by_key = operand.strides[1] != 0 or operand.strides[2] != 0, operand.strides[3] != 0
            bounds = self.inside(
                f"(n < length){self.of_key}" if by_key else "", self.row_bound(self.of_row) if by_row else ""
            )
            if self.additive:
                self.emit(f"s = s + tl.load({at}{bounds}).to(tl.float32)")
            else:
                test = "!=" if op.mask.tensor == "visible" else "=="
                self.emit(f"marked = tl.load({at}{bounds.replace('0.0', '0')})")
                seen.append(f"(marked {test} 0)")
        self.emit(f's = tl.where({" & ".join(seen)}, s, float("-inf"))')

    def finish(self) -> None:
        v = self.v
        if v.unit != 1.0:
            self.emit(*(f"acc{suffix} = acc{suffix} * {literal(v.unit)}" for suffix in v.parts))
        if v.shifts:
            self.emit(*(f"acc{suffix} = acc{suffix} - surplus{self.kept}" for suffix in v.parts))
        row = self.row_bound("[None, :]")
        stored = " & ".join(b for b in (row, v.bound("[:, None]")) if b)
        mask = f", mask={stored}" if stored else ""
        self.emit(f"total = tl.sum(l, {self.key_axis})")
        if self.warps:
            self.meet()
        if not self.splitting:
            for suffix, column in v.parts.items():
                index = self.of_query("[None, :]") | {"column": f"({column})[:, None]"}
                at = self.along("out", self.operands.out.strides, whole=("head",), **index)
                self.emit(f"tl.store({at}, {self.result(f'acc{suffix}', 'total[None, :]')}{mask})")
            return
        self.emit(f"slot = (pair.to(tl.int64) * {self.plan.splits} + split) * {self.rows} + row")
        for suffix, column in v.parts.items():
            at = f"partial + slot[None, :] * {self.op.v_dim} + ({column})[:, None]"
            self.emit(f"tl.store({at}, acc{suffix}{mask})")
        bound = f", mask={self.row_bound('')}" if row else ""
        self.emit(f"tl.store(stats + slot * 2, m{bound})", f"tl.store(stats + slot * 2 + 1, total{bound})")
        self.gather()

    def meet(self) -> None:
        """Adds up what the warps of a program found of their keys."""
        self.emit("most = tl.max(m, 0)", 'base = tl.where(most == float("-inf"), 0.0, most)')
        self.emit(f"share = {self.exp('m - base[None, :]')}", "m = most", "total = tl.sum(total * share, 0)")
        # one after another: side by side in one tensor they took 5 µs more
        self.emit(*(f"acc{s} = tl.sum(acc{s} * share[:, None, :], 0)" for s in self.v.parts))

    def gather(self) -> None:
        """The last program of a tile adds up what all of them have left, some rows and splits at a time."""
        plan, width = self.plan, self.op.v_dim
        held_rows = min(plan.rows, self.rows)
        rows, splits = gathered(self.op, plan)
        self.emit("tl.debug_barrier()  # all of this program's results are written before it counts as arrived")
        self.emit('arrived = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel")')
        self.emit("if arrived != active - 1:", "    return", "tl.store(arrivals + tl.program_id(0), 0)")
        self.emit(f"for start in range(0, {held_rows}, {rows}):")
        self.level += 1
        self.emit(f"row_e = {f'tile * {plan.rows} + ' if self.tiles > 1 else ''}start + tl.arange(0, {rows})")
        self.query_index("kv_head", "_e")
        self.emit(f'm_e = tl.full(({rows},), float("-inf"), tl.float32)', f"total_e = tl.zeros(({rows},), tl.float32)")
        columns = power_of_two(max(16, width))
        self.emit(f"c_e = tl.arange(0, {columns})", f"acc_e = tl.zeros(({rows}, {columns}), tl.float32)")
        self.emit(f"for first in range(0, active, {splits}):")
        self.level += 1
        self.emit(f"part = first + tl.arange(0, {splits})")
        # rows before splits: a warp takes rows of its own, and a thread adds up all splits of its columns
        self.emit(f"held = (row_e < {self.rows})[:, None] & (part < active)[None, :]")
        self.emit(f"slots = (pair.to(tl.int64) * {plan.splits} + part)[None, :] * {self.rows} + row_e[:, None]")
        tile = "held[:, :, None]" + (f" & (c_e < {width})[None, None, :]" if columns != width else "")
        for name, at, inside, other in (
            ("m_part", "stats + slots * 2", "held", 'float("-inf")'),
            ("l_part", "stats + slots * 2 + 1", "held", "0.0"),
            ("acc_part", f"partial + slots[:, :, None] * {width} + c_e[None, None, :]", tile, "0.0"),
        ):
            self.emit(f'{name} = tl.load({at}, mask={inside}, other={other}, cache_modifier=".cg")')
        self.emit("m_all = tl.maximum(m_e, tl.max(m_part, 1))")
        self.emit('base_e = tl.where(m_all == float("-inf"), 0.0, m_all)')
        self.emit(f"shrink = {self.exp('m_e - base_e')}", f"weight = {self.exp('m_part - base_e[:, None]')}")
        self.emit("m_e = m_all", "total_e = total_e * shrink + tl.sum(l_part * weight, 1)")
        self.emit("acc_e = acc_e * shrink[:, None] + tl.sum(acc_part * weight[:, :, None], 1)")
        self.level -= 1
        at = self.along(
            "out", self.operands.out.strides, whole=("head",), column="c_e[None, :]", **self.of_query("_e[:, None]")
        )
        inside = f"(row_e < {self.rows})[:, None]" + (f" & (c_e < {width})[None, :]" if columns != width else "")
        self.emit(f"tl.store({at}, {self.result('acc_e', 'total_e[:, None]')}, mask={inside})")
