"""Keys and values that are stored quantised.

Where an operand of a found attention is (code − zero) · scale, with one scale and zero for a row, the kernel can read
the codes: the scale of a key multiplies its score, that of a value its probability.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..fused import Codes
from ..shapes import shape_of

aten = torch.ops.aten
prims = torch.ops.prims
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
INTEGERS = (torch.int8, torch.uint8)
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
HIGH = (
    aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar, aten.bitwise_right_shift.Tensor,
)  # fmt: skip

Found = tuple[Codes, Node, tuple[Node, ...]]  # the stored tensor, its scale and zero


def stored(node: Node) -> Found | None:
    """What `node` is the dequantised form of."""
    node = _uncast(node)
    if node.target is not aten.mul.Tensor or not all(isinstance(a, Node) for a in node.args):
        return None
    for codes, scale in (node.args, node.args[::-1]):
        if isinstance(codes, Node) and isinstance(scale, Node) and _per_row(scale, node):
            found = _codes(codes, node)
            if found is not None:
                known, held, zeros = found
                return known, held, (scale, *zeros)
    return None


def _per_row(scale: Node, whole: Node) -> bool:
    """Whether `scale` is the same for all elements of a row of `whole`, or one number for all."""
    value, shape = scale.meta.get("val"), shape_of(whole)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return False
    own = shape_of(scale)
    return len(own) <= len(shape) and (not own or own[-1] == 1)


def _codes(node: Node, whole: Node) -> Found | None:
    """`node` as codes less a constant and less a zero point."""
    shift, zeros, dtype = 0.0, list[Node](), node.meta["val"].dtype
    for _ in range(8):
        node = _uncast(node)
        if node.target not in (aten.sub.Tensor, aten.add.Tensor) or node.kwargs.get("alpha", 1) != 1:
            break
        sign = 1.0 if node.target is aten.sub.Tensor else -1.0
        left, right = node.args
        if node.meta["val"].dtype in INTEGERS and not _stays_in_range(node):
            return None  # a difference of eight bits wraps around
        if isinstance(right, (int, float)) and isinstance(left, Node):
            shift, node = shift + sign * right, left
        elif isinstance(right, Node) and isinstance(left, Node) and sign > 0 and not zeros and _zero(right, whole):
            zeros, node = [right], left
        else:
            return None
    unpacked = _unpacked(node)
    if unpacked is not None:
        held, packed = unpacked
        return Codes(torch.uint8, packed, shift, bool(zeros)), held, tuple(zeros)
    stored_as = node.meta["val"].dtype
    if stored_as not in (*INTEGERS, *FLOATS) or shape_of(node) != shape_of(whole) or not dtype.is_floating_point:
        return None
    return Codes(stored_as, "", shift, bool(zeros)), node, tuple(zeros)


def _stays_in_range(node: Node) -> bool:
    """Whether a number added to or taken from four bits, as int8, leaves no more than eight."""
    left, right = node.args
    small = isinstance(right, int) and abs(right) <= 112 and node.meta["val"].dtype == torch.int8
    return small and isinstance(left, Node) and _unpacked(_uncast(left)) is not None


def _zero(node: Node, whole: Node) -> bool:
    own, shape = shape_of(node), shape_of(whole)
    exact = node.meta["val"].dtype != torch.float64
    return exact and len(own) <= len(shape) and (not own or own[-1] == 1)


def _unpacked(node: Node) -> tuple[Node, Any] | None:
    """(bytes, how) where `node` holds the low and the high four bits of each."""
    packed = "halves"
    if node.target in VIEWS:
        source, shape = node.all_input_nodes[0], shape_of(node)
        if shape_of(source)[:-2] == shape[:-1] and shape_of(source)[-1] == 2:
            node, packed = source, "pairs"
    if node.target is not aten.cat.default:
        return None
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if len(parts) != 2 or dim % len(shape_of(node)) != len(shape_of(node)) - 1:
        return None
    nibbles = []
    for part in parts:
        if packed == "pairs":
            if part.target is not aten.unsqueeze.default or shape_of(part)[-1] != 1:
                return None
            part = part.all_input_nodes[0]
        nibbles.append(_uncast(part))
    low, high = (_nibble(n) for n in nibbles)
    if low is None or high is None or low[0] is not high[0] or (low[1], high[1]) != (False, True):
        return None
    return low[0], packed


def _nibble(node: Node) -> tuple[Node, bool] | None:
    """(bytes, whether it is the high four bits of them)."""
    high = False
    if node.target in (aten.bitwise_and.Scalar, aten.bitwise_and.Tensor) and node.args[1] == 15:
        node = _uncast(node.all_input_nodes[0])
        if node.target in HIGH and node.args[1] == 4:
            node, high = _uncast(node.all_input_nodes[0]), True
    elif node.target in HIGH and node.args[1] == 4:
        node, high = node.all_input_nodes[0], True
    else:
        return None
    return (node, high) if node.meta["val"].dtype == torch.uint8 else None


def _uncast(node: Node) -> Node:
    """Below casts that keep what numbers of eight bits hold. Four bits keep their value as int8 too."""
    while node.target in CASTS:
        source = node.all_input_nodes[0]
        have, want = source.meta["val"].dtype, node.meta["val"].dtype
        narrow = want in (torch.int8, torch.uint8, torch.bool, *FLOATS) and have != want
        if narrow and not (want == torch.int8 and _unpacked(source) is not None):
            break
        if have.is_floating_point and not want.is_floating_point:
            break
        node = source
    return node
