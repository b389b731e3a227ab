"""Which keys a block of queries visits, from what its mask was proved to be.

Four numbers of a block of rows [first_row, first_row + BLOCK_M) cut the keys into three parts:

    begin … open_begin     some rows see some of these keys
    open_begin … open_end  every row sees all of them
    open_end … end         some rows see some of these keys
"""

from __future__ import annotations

from dataclasses import dataclass

from ....candidates import Amount
from ....cost.amounts import amount
from ....fused import Attention, Mask
from .sizes import size_text


@dataclass(frozen=True)
class Limits:
    """Statements and expressions of a kernel. `begin` and the others are lists of which the tightest holds;
    `conditions` tell for `rows` [BLOCK_M, 1] and `keys` [1, BLOCK_N] what a row sees."""

    setup: tuple[str, ...]
    begin: tuple[str, ...]
    open_begin: tuple[str, ...]
    open_end: tuple[str, ...]
    end: tuple[str, ...]
    conditions: tuple[str, ...]


def proved(op: Attention) -> Mask:
    """What is proved of the mask; beside it holds what the modification of the scores says."""
    return op.modification.mask if op.modification is not None else op.mask


def limits(op: Attention, block_n: int, lengths_stride: Amount, positions: str = "BLOCK_M") -> Limits:
    """The limits that are proved of an attention's mask, with those of its tensors. A block of rows stands at as many
    `positions`."""
    mask, kv_len = proved(op), amount(op.kv_len)
    setup, begin, open_begin, conditions = list[str](), list[str](), list[str](), list[str]()
    end, open_end = [size_text(kv_len)], [size_text(kv_len)]
    if not isinstance(kv_len, int) or kv_len % block_n:
        conditions.append(f"(keys < {size_text(kv_len)})")
    if mask.kind in ("causal", "length"):
        shift = size_text(amount(mask.offset))
        if mask.position:
            shift = f"tl.load(position).to(tl.int32) + {shift}"
        setup.append(f"shift = {shift}")
    if mask.kind == "causal":
        end.append(f"first_row + {positions} + shift")
        open_end.append("first_row + 1 + shift")
        conditions.append("(keys <= rows + shift)")
        if mask.window is not None:
            begin.append(f"first_row + shift + {1 - mask.window}")
            open_begin.append(f"first_row + {positions} + shift + {-mask.window}")
            conditions.append(f"(keys > rows + shift - {mask.window})")
        if mask.chunk is not None:
            begin.append(f"(first_row + shift) // {mask.chunk} * {mask.chunk}")
            open_begin.append(f"(first_row + {positions} - 1 + shift) // {mask.chunk} * {mask.chunk}")
            conditions.append(f"(keys >= (rows + shift) // {mask.chunk} * {mask.chunk})")
    elif mask.kind == "length":
        end.append("shift + 1")
        open_end.append("shift + 1")
        conditions.append("(keys <= shift)")
    if mask.padding is not None:
        setup.append(f"length = tl.load(lengths + batch * {size_text(lengths_stride)}).to(tl.int32) + {mask.padding}")
        # of the rows' first query
        first = f"length - {size_text(amount(op.q_len) - 1)} + first_row" if mask.staggered else "length"
        end.append(f"{first} + {positions} - 1" if mask.staggered else "length")
        open_end.append(first)
        conditions.append(f"(keys < {first.replace('first_row', 'rows')})")
    return Limits(*map(tuple, (setup, begin, open_begin, open_end, end, conditions)))
