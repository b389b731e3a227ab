"""From the elements of a weight to how it is stored.

The weight must be Σ over codes and scales of one form: scale · code − scale · zero. Where the codes, scales and zeros
of single elements lie is then compared with the layouts of `fused.Packed`, at every k for some rows, every n for some
columns, and many places besides. Places depend on (n, k) through views alone, so what fits all of these fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..fused import Packed, PerGroup
from .elements import Atom, Bits, Number, Read, Term, number
from .walk import Walk

ROWS, COLUMNS, ELSEWHERE = 4, 6, 1 << 14
WHOLE = 1 << 18  # weights up to this size are looked at whole
BLOCK = 32
WIDEST_CODE = 16  # bits; wider integers are positions and the like
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Storage:
    """A weight's layout, and the nodes that hold it: codes, [scales], [zeros]."""

    packed: Packed
    sources: tuple[Node, ...]


def storage_of(walk: Walk, weight: Node, n: int, k: int, *, kn: bool = False) -> Storage | str | None:
    """How `weight`, a node with the elements of [N, K] (or [K, N] where `kn`), is stored packed.

    A sentence where it is computed from codes in a way that no layout describes; None where it is no packed weight.
    """
    rows, columns = _places(n, k)
    element = walk.at(weight, columns * n + rows if kn else rows * k + columns)
    found = number(element) if isinstance(element, Bits) else element
    if not isinstance(found, Number):
        return None
    codes = [a for t in found.terms for a in t.atoms if _is_code(a)]
    if not codes or any(isinstance(c, Bits) and int(c.width.max()) > WIDEST_CODE for c in codes):
        return None
    return _stored(found, rows, columns, k)


def reads_codes(walk: Walk, node: Any) -> bool:
    """Whether the elements of a node are computed from codes of 4 bits."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not all(isinstance(s, int) for s in value.shape):
        return False
    element = walk.at(node, torch.arange(min(value.numel(), BLOCK)))
    atoms = [a for t in element.terms for a in t.atoms] if isinstance(element, Number) else [element]
    return any(isinstance(a, Bits) and bool((a.width == 4).all()) for a in atoms)


def _places(n: int, k: int) -> tuple[Tensor, Tensor]:
    if n * k <= WHOLE:
        flat = torch.arange(n * k)
        return flat // k, flat % k
    draw = torch.Generator().manual_seed(0)
    some_n = torch.cat([torch.tensor([0, 1, n - 1]), torch.randint(n, (ROWS - 3,), generator=draw)])
    some_k = torch.cat([torch.tensor([0, 1, k // 2, k - 1]), torch.randint(k, (COLUMNS - 4,), generator=draw)])
    rows = [
        some_n.repeat_interleave(k),
        torch.arange(n).repeat(COLUMNS),
        torch.randint(n, (ELSEWHERE,), generator=draw),
    ]
    columns = [
        torch.arange(k).repeat(ROWS),
        some_k.repeat_interleave(n),
        torch.randint(k, (ELSEWHERE,), generator=draw),
    ]
    return torch.cat(rows), torch.cat(columns)


def _stored(weight: Number, n: Tensor, k: Tensor, width: int) -> Storage | str:
    code: Atom | None = None
    main: Term | None = None
    for term in weight.terms:
        bits = [a for a in term.atoms if _is_code(a)]
        if len(bits) > 1 or (bits and code is not None and bits[0] is not code):
            return "it multiplies or adds several codes for one weight; kernels take one code each"
        if bits:
            code, main = bits[0], term
    assert code is not None and main is not None
    if not bool((main.factor == 1).all()):
        return "its codes are multiplied by numbers that the graph holds; multiply the scales instead"
    scales = [a for a in main.atoms if isinstance(a, Read) and a is not code]
    if len(scales) > 1:
        return "its codes have several scales each; multiply them into one beforehand"
    order = _order(code, n, k)
    if isinstance(order, str):
        return order
    scale = _per_group(scales[0], n, k, width) if scales else None
    if isinstance(scale, str):
        return scale
    zero: float | PerGroup = 0.0
    sources = [code.source, *(s.source for s in scales)]
    for term in weight.terms:
        if term is main:
            continue
        rest = [a for a in term.atoms if isinstance(a, Read)]
        for s in scales:
            match = next((a for a in rest if a.source is s.source and torch.equal(a.byte, s.byte)), None)
            if match is None:
                return "what is subtracted from its codes is not scaled as they are; subtract before scaling"
            rest.remove(match)
        if len(rest) > 1 or zero != 0.0 or not bool((term.factor == term.factor[0]).all()):
            return "its zero points are computed in a way that kernels do not read; store them as one tensor"
        if rest:
            if float(term.factor[0]) != -1:
                return "its zero points are added or multiplied; store what is to be subtracted from the codes"
            found = _per_group(rest[0], n, k, width)
            if isinstance(found, str):
                return found
            zero = found
            sources.append(rest[0].source)
        else:
            zero = -float(term.factor[0])
    name, first, row, block = order
    float8 = code.dtype if isinstance(code, Read) else None
    return Storage(Packed(name, first, row, block, scale, zero, float8), tuple(sources))  # type: ignore[arg-type]


def _is_code(atom: Atom) -> bool:
    return isinstance(atom, Bits) or atom.dtype in FLOAT8


def _order(code: Atom, n: Tensor, k: Tensor) -> tuple[str, int, int, int] | str:
    """(order, first, row, block) of the codes."""
    if isinstance(code, Read):
        whole = torch.full_like(code.byte, 8)
        code = Bits(code.source, 8 * code.byte, whole, torch.zeros_like(whole), True, torch.int8)
    width = int(code.width[0])
    if not bool((code.width == width).all()) or width not in (4, 8):
        return f"its codes have {width} bits; kernels read 4 or 8"
    if code.signed != (width == 8):
        sign = "signed" if code.signed else "unsigned"
        return f"its codes are {sign} with {width} bits; kernels read unsigned ones of 4 and signed ones of 8"
    at = _asker(code.bit, n, k)
    first = at(0, 0) // 8
    row = (at(1, 0) - at(0, 0)) // 8 if at(1, 0) >= 0 else 0
    if width == 8:
        if torch.equal(code.bit, 8 * (first + n * row + k)):
            return "bytes", first, row, 0
    else:
        if torch.equal(code.bit, 8 * (first + n * row) + 4 * k):
            return "sequence", first, row, 0
        block = (at(0, BLOCK) - at(0, 0)) // 8 if at(0, BLOCK) >= 0 else BLOCK // 2
        inside = k % BLOCK
        halves = 8 * (first + n * row + k // BLOCK * block + inside % 16) + 4 * (inside // 16)
        if torch.equal(code.bit, halves):
            return "halves", first, row, block
    return (
        "its codes lie in an order that kernels do not read; they take neighbours along K in one word, or Q4_0's blocks"
    )


def _per_group(read: Read, n: Tensor, k: Tensor, width: int) -> PerGroup | str:
    item = read.dtype.itemsize
    at = _asker(read.byte, n, k)
    group, step = width, 0
    size = 16
    while size < width:
        if at(0, size) != at(0, 0):
            group, step = size, (at(0, size) - at(0, 0)) // item
            break
        size *= 2
    first = at(0, 0) // item
    row = (at(1, 0) - at(0, 0)) // item if at(1, 0) >= 0 else 0
    if not torch.equal(read.byte, item * (first + n * row + k // group * step)):
        return "its scales do not stand for groups of 16, 32, 64 … neighbours along K"
    return PerGroup(read.dtype, group, first, row, step)


def _asker(values: Tensor, n: Tensor, k: Tensor) -> Callable[[int, int], int]:
    """The value at (n, k), −1 where there is no such place."""
    known: dict[tuple[int, int], int] = {}

    def at(row: int, column: int) -> int:
        if (row, column) not in known:
            found = ((n == row) & (k == column)).nonzero()
            known[row, column] = int(values[found[0, 0]]) if len(found) else -1
        return known[row, column]

    return at
