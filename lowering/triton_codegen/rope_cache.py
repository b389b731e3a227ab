"""Rotation of queries and keys, their norms and the write into a static cache, as one generated Triton kernel.

A program takes some tokens of one head: of the queries, the keys or the values. Everything is float32 between loading
and storing, but for rows that become codes: they go through the operations of the graph one by one, each rounded as
there (`steps`). What lies beyond the cache is not written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...candidates import Candidate, Traffic, Unavailable
from ...cost.efficiency import efficiency
from ...fused import CacheStep, RopeCache, RowNorm, Site
from ...machine import Machine
from ...reasons import ON_CPU
from ...splice import load_kernel
from .cache_codes import NOTHING, code_statements, rounded
from .pointwise import literal

if TYPE_CHECKING:
    from torch.fx import Node

    from ...splice import Builder

NAME = "rope_cache"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LATENCY = 0.5e-6  # beyond a pointwise kernel's: the position is read before anything can be written
TILE = 512  # elements that a program takes at least, in several tokens where there are some
SWAPPED = (0, 2, 1, 3)
Strides = tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """Strides along batch, heads, tokens and columns; 0 along what is broadcast."""

    q: Strides
    k: Strides
    v: Strides
    cos: Strides
    sin: Strides
    keys: Strides
    values: Strides
    out: Strides
    halves: bool  # cos and sin are given for half of the columns
    index: Strides = ()  # of indices, along batch and tokens
    key_scale: Strides = ()
    value_scale: Strides = ()
    rounded_scales: frozenset[str] = frozenset()  # those of no dimensions, which half precision rounds before use


def candidates(op: RopeCache, machine: Machine) -> list[Candidate] | Unavailable:
    refusal = _refusal(op, machine)
    if refusal is not None:
        return Unavailable(refusal)
    moved = traffic(op)
    return [
        Candidate(
            name="triton_rope_cache",
            kernel="triton rope_cache",
            traffic=moved,
            seconds=seconds(moved, machine),
            emit=functools.partial(emit, op),
            details=(
                ("tokens", tokens(op)),
                ("index", op.index),
                ("rotary", op.rotary or op.head_dim),
                ("norms", sum(norm is not None for norm in (op.q_norm, op.k_norm))),
                ("codes", "none" if op.codes is None else str(op.codes.dtype)),
            ),
        )
    ]


def _refusal(op: RopeCache, machine: Machine) -> str | None:
    if machine.kind == "cpu":
        return ON_CPU
    if op.dtype not in DTYPES:
        return f"the generator makes kernels for bfloat16, float16 and float32, not {op.dtype}"
    if op.dtype == torch.bfloat16 and torch.bfloat16 not in machine.flops:
        return f"{machine.name} ({machine.arch}) has no bfloat16 units; use float16 there"
    narrow = op.codes is not None and op.codes.dtype.is_floating_point
    if narrow and not (machine.kind == "cuda" and machine.capability >= 89):
        return f"{machine.name} ({machine.arch}) has no instructions that make float8"
    return None


def tokens(op: RopeCache) -> int:
    """Tokens that a program takes."""
    wanted = max(1, TILE // max(op.head_dim, op.v_dim))
    return min(_power_of_two(op.batch * op.length), 1 << (wanted.bit_length() - 1))


def traffic(op: RopeCache) -> Traffic:
    rows = op.batch * op.length
    turned = rows * (op.heads + op.kv_heads) * op.head_dim
    copied = rows * op.kv_heads * op.v_dim
    moved = op.dtype.itemsize * (turned + copied)
    written = moved
    if op.codes is not None:
        held = rows * op.kv_heads * (op.head_dim + op.v_dim)
        written = moved - (op.dtype.itemsize - op.codes.dtype.itemsize) * held
    return Traffic(6 * turned, moved + 2 * op.dtype.itemsize * op.length * op.head_dim, written, 1)


def seconds(moved: Traffic, machine: Machine) -> Any:
    bandwidth = machine.memory_bandwidth * efficiency(machine).pointwise.memory
    return (moved.bytes_read + moved.bytes_written) / bandwidth + LATENCY + machine.launch_overhead


# ---- source -----------------------------------------------------------------------------------------
def write(op: RopeCache, reading: Reading) -> str:
    """The text of a module with the kernel `NAME`, for a grid of (token blocks · (heads + 2 · kv_heads))."""
    return _Writer(op, reading).write()


def argument_names(op: RopeCache) -> list[str]:
    weights = [
        f"{n}_weight" for n, norm in (("q", op.q_norm), ("k", op.k_norm)) if norm is not None and norm.has_weight
    ]
    index = ["index"] if op.index != "none" else []
    scales = op.codes.scales if op.codes is not None else ()
    return ["q", "k", "v", "cos", "sin", "keys", "values", *index, *weights, *scales, "out"]


class _Writer:
    def __init__(self, op: RopeCache, reading: Reading) -> None:
        self.op, self.reading = op, reading
        self.lines: list[str] = []
        self.level = 1
        self.half = (op.rotary or op.head_dim) // 2
        self.pairs = _power_of_two(self.half)
        self.inside = "" if self.pairs == self.half else f" & (i < {self.half})"

    def emit(self, *lines: str) -> None:
        self.lines += ["    " * self.level + line for line in lines]

    def write(self) -> str:
        op, r = self.op, self.reading
        several = tokens(op)
        self.emit(*(NOTHING if op.codes is not None else []))
        self.emit(f"head = tl.program_id(0) % {op.heads + 2 * op.kv_heads}")
        self.emit(f"block = tl.program_id(0) // {op.heads + 2 * op.kv_heads}")
        self.emit(f"row = block.to(tl.int64) * {several} + tl.arange(0, {several})[:, None]")
        self.emit(f"row_in = row < {op.batch * op.length}", f"batch = row // {op.length}", f"token = row % {op.length}")
        first = {"scalar": "tl.load(index).to(tl.int64) + ", "size": "index + ", "none": ""}.get(op.index)
        if first is not None:
            self.emit(f"at = {first}token + {op.offset}")
        else:
            by_sequence, by_token = r.index
            place = f"index + batch * {by_sequence} + token * {by_token}"
            self.emit(f"at = tl.load({place}, mask=row_in, other=0).to(tl.int64)")
        if op.index != "none":
            self.emit(f"at = tl.where(at < 0, at + {op.cache_length}, at)  # from the end, as in torch")
        self.emit(f"held = row_in & (at >= 0) & (at < {op.cache_length})")
        self.emit(f"if head < {op.heads + op.kv_heads}:")
        self.level += 1
        self.emit(f"i = tl.arange(0, {self.pairs})[None, :]")
        first, second = ("2 * i", "2 * i + 1") if op.interleaved else ("i", f"i + {self.half}")
        self.emit(f"first = {first}", f"second = {second}")
        if op.rotary:
            self.emit(f"j = tl.arange(0, {_power_of_two(op.head_dim - op.rotary)})[None, :]")
            self.emit(f"rest = {op.rotary} + j")
        for name, strides in (("cos", r.cos), ("sin", r.sin)):
            for side in ("first", "second"):
                column = "i" if r.halves else side
                at = self.place(name, strides, head="0", row="token", column=column)
                self.emit(f"{name}_{side} = tl.load({at}, mask=row_in{self.inside}, other=0.0).to(tl.float32)")
        self.emit(f"if head < {op.heads}:")
        self.turn("q", r.q, "head", op.q_norm, "out", r.out, "token", "row_in")
        self.emit("else:")
        self.turn("k", r.k, f"(head - {op.heads})", op.k_norm, "keys", r.keys, "at", "held")
        self.level -= 1
        self.emit("else:")
        self.level += 1
        width = _power_of_two(op.v_dim)
        inside = "" if width == op.v_dim else f" & (column < {op.v_dim})"
        self.emit(f"column = tl.arange(0, {width})[None, :]")
        head = f"(head - {op.heads + op.kv_heads})"
        source = self.place("v", r.v, head=head, row="token", column="column")
        target = self.place("values", r.values, head=head, row="at", column="column")
        if op.codes is None:
            self.emit(f"tl.store({target}, tl.load({source}, mask=row_in{inside}), mask=held{inside})")
        else:
            self.scale("value_scale", r.value_scale, head)
            self.emit(f"c = tl.load({source}, mask=row_in{inside}, other=0.0).to(tl.float32)")
            self.emit(f"tl.store({target}, {self.coded('c', op.codes.values, 'value_scale')}, mask=held{inside})")
        head_lines = ["import triton", "import triton.language as tl", "", "", "@triton.jit", f"def {NAME}("]
        return "\n".join([*head_lines, *(f"    {a}," for a in argument_names(op)), "):", *self.lines]) + "\n"

    def place(self, tensor: str, strides: Strides, **index: str) -> str:
        names = ("batch", index["head"], index["row"], index["column"])
        terms = [f"{n} * {s}" for n, s in zip(names, strides, strict=True) if s != 0 and n != "0"]
        return " + ".join([tensor, *terms])

    def turn(
        self, name: str, strides: Strides, head: str, norm: RowNorm | None, out: str, to: Strides, row: str, mask: str
    ) -> None:
        self.level += 1
        rest = self.op.head_dim - self.op.rotary if self.op.rotary else 0
        beyond = f" & (j < {rest})" if rest != _power_of_two(rest) else ""
        columns = {"a": ("first", self.inside), "b": ("second", self.inside)} | (
            {"c": ("rest", beyond)} if rest else {}
        )
        for part, (column, inside) in columns.items():
            at = self.place(name, strides, head=head, row="token", column=column)
            self.emit(f"{part} = tl.load({at}, mask=row_in{inside}, other=0.0).to(tl.float32)")
        if norm is not None:
            squares = " + ".join(f"tl.sum({part} * {part}, 1, keep_dims=True)" for part in columns)
            self.emit(f"scale = tl.rsqrt(({squares}) / {self.op.head_dim} + {literal(norm.eps)})")
            for part, (column, inside) in columns.items():
                weight = ""
                if norm.has_weight:
                    bound = inside.removeprefix(" & ")
                    load = f"tl.load({name}_weight + {column}{f', mask={bound}, other=0.0' if bound else ''})"
                    weight = f" * ({load}.to(tl.float32) + {literal(norm.offset)})"
                self.emit(f"{part} = {part} * scale{weight}")
        codes = self.op.codes if name == "k" else None
        product = codes.product if codes is not None else None
        if codes is not None:
            self.scale("key_scale", self.reading.key_scale, head)
        if rest:
            at = self.place(out, to, head=head, row=row, column="rest")
            value = "c" if codes is None else self.coded("c", codes.keys, "key_scale")
            self.emit(f"tl.store({at}, {value}, mask={mask}{beyond})")
        for part, value in (
            ("first", self.turned("a", "first", "-", "b", product)),
            ("second", self.turned("b", "second", "+", "a", product)),
        ):
            at = self.place(out, to, head=head, row=row, column=part)
            if codes is not None:
                self.emit(f"{part}_turned = {rounded(value, codes.turned)}")
                value = self.coded(f"{part}_turned", codes.keys, "key_scale")
            self.emit(f"tl.store({at}, {value}, mask={mask}{self.inside})")
        self.level -= 1

    def turned(self, x: str, side: str, sign: str, y: str, product: torch.dtype | None = None) -> str:
        """A turned half; with `product`, of products that are rounded to it."""
        if product is None:
            return f"{x} * cos_{side} {sign} {y} * sin_{side}"
        left, right = (rounded(f"{a} * {b}", product) for a, b in ((x, f"cos_{side}"), (y, f"sin_{side}")))
        return rounded(f"{left} {sign} {right}", product)

    def scale(self, name: str, strides: Strides, head: str) -> None:
        """The scale of a head, where there is one."""
        if not strides:
            return
        at = self.place(name, strides, head=head, row="0", column="0")
        batched = strides[0] != 0
        self.emit(f"{name}_here = tl.load({at}{', mask=row_in, other=1.0' if batched else ''}).to(tl.float32)")

    def coded(self, value: str, steps: tuple[CacheStep, ...], scale: str) -> str:
        """Emits what makes codes of `value`; returns their name."""
        self.emit(*code_statements(value, steps, f"{scale}_here", scale in self.reading.rounded_scales))
        return "code"


def _power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


# ---- emission ---------------------------------------------------------------------------------------
def emit(op: RopeCache, builder: Builder, site: Site) -> tuple[Node, ...]:
    """Adds the kernel; returns the nodes that take the places of the site's outputs."""
    query = next(n for n, name in zip(site.outputs, op.results, strict=True) if name == "out").meta["val"]
    out = builder.empty(list(query.shape), op.dtype, query.device)
    nodes = dict(zip(argument_names(op), [*site.operands, out], strict=True))
    values = {name: node.meta["val"] for name, node in nodes.items()}
    width, tokens_first = values["cos"].shape[-1], "angles" in op.tokens_first
    beside = (op.batch, op.length, 1) if tokens_first else (op.batch, 1, op.length)
    with builder.fake_mode, torch.no_grad():
        for name in ("cos", "sin"):
            values[name] = values[name].expand(*beside, width)

    def strides(name: str) -> Strides:
        found = [0 if n == 1 else int(s) for n, s in zip(values[name].shape, values[name].stride(), strict=True)]
        swapped = ("angles" if name in ("cos", "sin") else name) in op.tokens_first
        return tuple(found[d] for d in (SWAPPED if swapped else range(4)))

    def strides_of_scale(name: str) -> Strides:
        shape = (1,) * (4 - values[name].dim()) + tuple(values[name].shape)
        steps = (0,) * (4 - values[name].dim()) + values[name].stride()
        found = [0 if n == 1 else int(s) for n, s in zip(shape, steps, strict=True)]
        return tuple(found[d] for d in (SWAPPED if name in op.tokens_first else range(4)))

    places = {name: strides(name) for name in ("q", "k", "v", "cos", "sin", "keys", "values", "out")}
    index = ()
    if op.index in ("indices", "sequences"):
        index = (*(() if op.index == "sequences" else (0,)), *map(int, values["index"].stride()), 0)[:2]
    scales = {name: strides_of_scale(name) for name in (op.codes.scales if op.codes is not None else ())}
    narrowed = frozenset(name for name in scales if values[name].dim() == 0)
    reading = Reading(
        **places, **scales, rounded_scales=narrowed, halves=width * 2 == (op.rotary or op.head_dim), index=index
    )
    blocks = -(-op.batch * op.length // tokens(op))
    done = builder.triton(
        load_kernel(write(op, reading), NAME), (blocks * (op.heads + 2 * op.kv_heads),), nodes,
        ["out", "keys", "values"], num_warps=1 if tokens(op) == 1 else 4, num_stages=1,
    )  # fmt: skip
    return tuple(done[name] for name in op.results)
