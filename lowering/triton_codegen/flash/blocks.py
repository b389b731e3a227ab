"""Lists of the blocks of keys that each block of queries sees, where no limit tells them: one kernel looks at every
block once for all batches and heads that share it, another makes lists of what it found.

A list is the number of its blocks, then twice the number of each, and one more where it is seen in part.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.fx import Node

from ....cost.amounts import amount
from ....fused import Attention
from ....splice import load_kernel
from .limits import limits
from .plan import Plan
from .scores import Scores
from .sizes import size_text
from .source import Strides

if TYPE_CHECKING:
    from ....splice import Builder

CLASSIFY = """import triton
import triton.language as tl


@triton.jit
def classify({arguments}, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    start = tl.program_id(0) * BLOCK_N
    first_row = tl.program_id(1) * BLOCK_M
    head = (tl.program_id(2) % {heads}).to(tl.int64)
    batch = (tl.program_id(2) // {heads}).to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    keys = start + tl.arange(0, BLOCK_N)[None, :]
    {setup}
    seen = tl.broadcast_to({seen}, (BLOCK_M, BLOCK_N))
    row_in = tl.broadcast_to(rows < {q_len}, (BLOCK_M, BLOCK_N))
    some = tl.max(tl.max((seen & row_in).to(tl.int32), 1), 0)
    whole = tl.min(tl.min((seen | (row_in == 0)).to(tl.int32), 1), 0)
    place = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(kinds + place, (some + whole * some).to(tl.int8))
"""
LIST = """import triton
import triton.language as tl


@triton.jit
def list_blocks(kinds, blocks, BLOCKS: tl.constexpr):
    n = tl.arange(0, BLOCKS)
    row = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    kind = tl.load(kinds + row * {count} + n, mask=n < {count}, other=0)
    seen = (kind != 0).to(tl.int32)
    blocks += row * ({count} + 1)
    tl.store(blocks, tl.sum(seen, 0))
    tl.store(blocks + tl.cumsum(seen, 0), 2 * n + (kind == 1).to(tl.int32), mask=seen != 0)
"""


def sharing(op: Attention, scores: Scores) -> tuple[Any, Any]:
    """How many batch entries and heads have lists of their own."""
    depends = scores.depends
    return op.batch if "batch" in depends else 1, op.heads if "head" in depends else 1


def sources(op: Attention, plan: Plan, strides: Strides, arguments: Sequence[str]) -> tuple[str, str]:
    """The texts of both kernels; `arguments` are the names of what the first one reads."""
    scores = Scores(op, plan, strides.reads)
    found = limits(op, plan.block_n, strides.lengths)
    seen = " & ".join([*found.conditions, *([scores.visible()] if scores.visible() else [])])
    _, heads = sharing(op, scores)
    count = -(-int(op.kv_len) // plan.block_n)
    classify = CLASSIFY.format(
        arguments=", ".join([*arguments, "kinds"]), heads=size_text(amount(heads)),
        setup="\n    ".join(found.setup) or "pass",
        seen=seen, q_len=size_text(amount(op.q_len)),
    )  # fmt: skip
    return classify, LIST.format(count=count)


def listed(op: Attention, plan: Plan, strides: Strides, builder: Builder, reads: dict[str, Node], like: Node) -> Node:
    """The lists as a tensor: [batch, heads, blocks of queries, count and numbers], int32. The layers of a model, which
    share a mask, share them."""
    classify, make = sources(op, plan, strides, list(reads))
    batch, heads = sharing(op, Scores(op, plan, strides.reads))
    rows, count = -(-int(op.q_len) // plan.block_m), -(-int(op.kv_len) // plan.block_n)
    device = like.meta["val"].device
    made = classify, plan.block_m, plan.block_n, int(batch), rows, device, *reads.items()
    for node in builder.gm.graph.find_nodes(op="call_function", target=operator.getitem):
        if node.meta.get("lists") == made and node < builder.before:
            return cast(Node, node)
    kinds = builder.empty([batch, heads, rows, count], torch.int8, device)
    blocks = builder.empty([batch, heads, rows, count + 1], torch.int32, device)
    several = int(batch) * int(heads)
    constants = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
    found = builder.triton(
        load_kernel(classify, "classify"), [count, rows, several], {**reads, "kinds": kinds, **constants}, ["kinds"],
    )["kinds"]  # fmt: skip
    arguments = {"kinds": found, "blocks": blocks, "BLOCKS": 1 << (count - 1).bit_length()}
    lists = builder.triton(load_kernel(make, "list_blocks"), [rows, several], arguments, ["blocks"])["blocks"]
    lists.meta["lists"] = made
    return lists
