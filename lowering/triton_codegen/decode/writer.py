"""What writing a kernel of decode attention needs throughout: text, sizes, and which keys are visible.

Strides and sizes known when compiling stand in the text as numbers; the others are arguments of the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import sympy
import torch

from ....cost.amounts import amount
from ....fused import Attention, Size
from .operands import Axes, KernelSource, Operands, Plan, group

INDENT = "    "
LOG2E = 1.4426950408889634


class Writer:
    """Names: batch, kv_head, head, row over the query rows of a key/value head, query; split."""

    def __init__(self, op: Attention, plan: Plan, operands: Operands) -> None:
        self.op, self.plan, self.operands = op, plan, operands
        self.functions: list[str] = []  # that the kernel calls
        self.lines: list[str] = []
        self.level = 1
        self.sizes: dict[str, Size] = {}
        self.splitting = plan.splits > 1
        self.additive = op.mask.kind == "tensor" and op.mask.tensor == "additive"
        # Scores are kept in units of log 2, so that exponentials need no factor. Not where float32 has to be exact, nor
        # where a mask that is added may be near the least number, which leaves no room for the factor.
        self.binary = not self.additive and op.dtype != torch.float32
        # Axes of scores: keys, rows; in front of them warps that have keys of their own. What is kept of every row is
        # kept by each of these.
        own = plan.own_keys
        self.warps = (plan.num_warps,) if own else ()
        self.of_key, self.of_row = ("[:, :, None]", "[None, None, :]") if own else ("[:, None]", "[None, :]")
        self.kept = "[:, None, :]" if own else "[None, :]"
        self.key_axis = len(self.warps)

    def emit(self, *lines: str) -> None:
        self.lines.extend(INDENT * self.level + line for line in lines)

    def size(self, name: str, value: Size) -> str:
        """The size as text: a number, or the name of an argument."""
        if isinstance(value, int):
            return str(value)
        self.sizes[name] = value
        return name

    def along(self, tensor: str, strides: Axes, *, whole: Sequence[str] = (), **index: str) -> str:
        """Offset into `tensor` from the indices given by axis name, those of `whole` also where they are broadcast, so
        that the offset has the shape of a tile."""
        terms = []
        for axis, stride in zip(("batch", "head", "row", "column"), strides, strict=True):
            if axis in index and (stride != 0 or axis in whole):
                text = self.size(f"{tensor}_{axis}_stride", stride)
                terms.append(index[axis] if text == "1" else f"{index[axis]} * {text}")
        return " + ".join([tensor, *terms])

    def module(self, name: str, tensors: dict[str, torch.dtype], outputs: tuple[str, ...]) -> KernelSource:
        head = ["import triton", "import triton.language as tl", "", "", *self.functions, "@triton.jit", f"def {name}("]
        head += [f"{INDENT}{argument}," for argument in (*tensors, *self.sizes)] + ["):"]
        # Triton deals its stages out evenly to a load and to the one that its address comes from, a table's
        stages = self.plan.num_stages if self.operands.table is None else 2 * self.plan.num_stages - 1
        return KernelSource("\n".join([*head, *self.lines]) + "\n", name, tensors, self.sizes, outputs, stages)

    # ---- what is visible ------------------------------------------------------------------------
    def visible(self) -> None:
        """`length`: keys from there on are hidden from every row; `blocks` to walk through from `first_block` on, of
        which `active` splits take their shares. `newest` is the last key that the first query sees."""
        mask, block = self.op.mask, self.plan.block
        counted = mask.kind in ("causal", "length")
        further = int(self.op.q_len) if mask.kind == "causal" else 1  # the last query sees that many more
        if counted:
            self.emit(f"newest = {self.newest()}")
        static = isinstance(self.op.kv_len, int) and not mask.position and mask.padding is None
        if static and isinstance(mask.offset, (int, sympy.Integer)):
            length = min(int(mask.offset) + further, int(self.op.kv_len)) if counted else int(self.op.kv_len)
            first = self.first_key(int(mask.offset)) // block
            blocks = max(0, -(-length // block) - first)
            self.emit(f"length = {length}", f"first_block = {first}", f"blocks = {blocks}")
            self.emit(f"active = {max(1, min(blocks, self.plan.splits))}")
            return
        keys = self.size("kv_len", self.op.kv_len)
        self.emit(f"length = tl.minimum(newest + {further}, {keys})" if counted else f"length = {keys}")
        if mask.padding is not None:
            at = "lengths" if self.operands.one_length else "lengths + batch"
            self.emit(f"own_length = tl.load({at}).to(tl.int32) + {mask.padding}")
            self.emit("length = tl.minimum(length, own_length)")
        begins = [f"newest - {mask.window - 1}"] if mask.window is not None else []
        begins += [f"newest // {mask.chunk} * {mask.chunk}"] if mask.chunk is not None else []
        nearest = functools.reduce(lambda a, b: f"tl.maximum({a}, {b})", begins, "0")
        self.emit(f"first_block = {nearest} // {block}")
        self.emit(f"blocks = tl.maximum((length + {block - 1}) // {block} - first_block, 0)")
        self.emit(f"active = tl.maximum(tl.minimum(blocks, {self.plan.splits}), 1)")

    def newest(self) -> str:
        """The last key that the first query sees, as text."""
        offset, mask = self.op.mask.offset, self.op.mask
        if isinstance(offset, torch.SymInt):
            offset = amount(offset)
        if mask.position:
            return "position_here.to(tl.int32)" + (f" + {int(offset)}" if offset != 0 else "")
        if isinstance(offset, (int, sympy.Integer)):
            return str(int(offset))
        return f"{self.size('kv_len', self.op.kv_len)} + {int(sympy.expand(offset - amount(self.op.kv_len)))}"

    def first_key(self, newest: int) -> int:
        """The first key that any query sees."""
        mask = self.op.mask
        first = max(newest - mask.window + 1, 0) if mask.window is not None else 0
        return max(first, newest // mask.chunk * mask.chunk) if mask.chunk is not None else first

    def seen(self) -> list[str]:
        """Which keys n a row sees, but for a mask that is read."""
        mask, seen = self.op.mask, [f"(n < length){self.of_key}"]
        n = f"n{self.of_key}"
        if mask.staggered:
            seen.append(f"({n} < own_length - {int(self.op.q_len) - 1} + query{self.of_row})")
        if mask.kind != "causal":
            return seen
        newest = f"newest + query{self.of_row}" if int(self.op.q_len) > 1 else "newest"
        if int(self.op.q_len) > 1:
            seen.append(f"({n} <= {newest})")
        if mask.window is not None:
            seen.append(f"({n} > {newest} - {mask.window})")
        if mask.chunk is not None:
            seen.append(f"({n} // {mask.chunk} == ({newest}) // {mask.chunk})")
        return seen

    def sees_first_key(self) -> bool:
        """Whether every row of a program sees a key in the program's first block, so that m is finite from then on."""
        mask = self.op.mask
        if mask.padding is not None or self.plan.own_keys:  # a length may be 0, and the last block not full
            return False
        alone = mask.kind == "causal" and int(self.op.q_len) == 1 and mask.window is None and mask.chunk is None
        counts = mask.kind in ("none", "length") or alone
        return counts and (mask.position or isinstance(mask.offset, int)) and mask.empty_rows == "none"

    # ---- rows -----------------------------------------------------------------------------------
    def query_index(self, kv_head: str, suffix: str = "") -> None:
        """`head` and, where there are several, `query` of a row: the queries of a head lie together."""
        queries, row = int(self.op.q_len), f"row{suffix}"
        self.emit(f"head{suffix} = {kv_head} * {group(self.op)} + {row}" + (f" // {queries}" if queries > 1 else ""))
        if queries > 1:
            self.emit(f"query{suffix} = {row} % {queries}")

    def of_query(self, axis: str = "") -> dict[str, str]:
        """Indices along batch, heads and queries, for `along`; `axis` is the names' suffix, or makes them vectors
        beside another one."""
        index = {"batch": "batch", "head": f"head{axis}"}
        return index | ({"row": f"query{axis}"} if int(self.op.q_len) > 1 else {})

    def exp(self, score: str) -> str:
        return f"tl.exp2({score})" if self.binary else f"tl.exp({score})"

    def result(self, acc: str, total: str) -> str:
        """acc / l, where a row that sees no key gives 0/0 or 0, as the graph would."""
        if self.op.mask.empty_rows == "zero":
            return f"tl.where({total} == 0.0, 0.0, {acc} / {total})"
        return f"{acc} / {total}"
