"""What one FX node computes, reads and writes, told from its target and its fake value."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import cast

import torch
from torch.fx import Node

from ..attention.sdpa_calls import MASK_ARGUMENT, bind
from ..candidates import Amount
from ..splice import same_strides
from .amounts import amount, is_symbolic, product

SCALED = frozenset({"_scaled_mm", "_scaled_mm_v2"})  # of 8 bits, scaled by the library
MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm"}) | SCALED
VIEWS = frozenset(
    "view reshape permute expand unsqueeze squeeze transpose t slice select alias detach as_strided getitem split "
    "split_with_sizes chunk unbind _unsafe_view view_as lift_fresh_copy diagonal view_as_complex view_as_real".split()
)
REDUCTIONS = frozenset(
    "sum mean amax amin max min prod any all argmax argmin var std var_mean logsumexp _softmax _log_softmax "
    "native_layer_norm cumsum".split()
)
# Reductions that need the result of another over the same row before they can be used.
STAGES = {"_softmax": 2, "_log_softmax": 2}
GATHERS = frozenset({"embedding", "index", "gather", "index_select"})
SCATTERS = frozenset({"index_put", "scatter", "slice_scatter", "select_scatter", "index_copy", "copy_"})
ANCESTORS = 32


def name_of(node: Node) -> str:
    """ "mm" for aten.mm.default."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return "getitem" if target is operator.getitem else str(target)


def is_library_call(node: Node) -> bool:
    return name_of(node) in MATMULS or is_attention(node) or is_fallback(node)


def is_fallback(node: Node) -> bool:
    """A pointwise operation that Inductor leaves to torch's own kernel: those on complex numbers."""
    return any(t.is_complex() for t in tensors_of(node)) and is_compute(node)


def is_attention(node: Node) -> bool:
    """A call of one of torch's fused attention operators."""
    return node.target in MASK_ARGUMENT


def mask_argument(node: Node) -> str:
    """The name of the argument by which a fused attention operator takes a mask tensor, "" where it takes none."""
    return MASK_ARGUMENT[cast(torch._ops.OpOverload, node.target)]


def is_compute(node: Node) -> bool:
    value = node.meta.get("val")
    tensors = isinstance(value, torch.Tensor) or isinstance(value, (tuple, list))
    return node.op == "call_function" and tensors and not is_view(node)


def is_view(node: Node) -> bool:
    """A node without work: a view, or a cast or copy that Inductor removes because it changes nothing."""
    name = name_of(node)
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    if name in ("convert_element_type", "_to_copy", "clone"):
        value, source = node.meta.get("val"), node.all_input_nodes[0].meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
            return False
        return value.dtype == source.dtype and same_strides(value, source)
    return name in VIEWS


def is_constant(node: Node) -> bool:
    """Computed from constants alone, such as a mask from iota: recomputed wherever it is read, never stored.

    Looked for among the nearest `ANCESTORS` nodes only.
    """
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.op != "call_function" or len(seen) > ANCESTORS:
            return False
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return True


def base_of(node: Node) -> Node:
    """The node that computed the memory which `node` is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def readers_of(node: Node) -> list[Node]:
    """The nodes that read `node`'s memory, through views."""
    found, stack = [], [node]
    while stack:
        for user in stack.pop().users:
            if is_view(user):
                stack.append(user)
            else:
                found.append(user)
    return found


def read_by(node: Node) -> list[Node]:
    """The inputs whose elements `node` reads: a scatter leaves most of its first argument alone."""
    return node.all_input_nodes[1:] if name_of(node) in SCATTERS else node.all_input_nodes


def tensors_of(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def numel_of(node: Node) -> Amount:
    values = tensors_of(node)
    return product(values[0].shape) if values else 0


def space_of(node: Node) -> Amount:
    """How many elements the node computes over: a reduction's input, else its output."""
    if name_of(node) in REDUCTIONS and node.all_input_nodes:
        return numel_of(node.all_input_nodes[0])
    return numel_of(node)


def row_length(node: Node) -> Amount:
    """How many elements a reduction combines into one."""
    if name_of(node) in STAGES:
        shape, dim = tensors_of(node)[0].shape, node.args[1]
        return amount(shape[dim]) if isinstance(dim, int) else 1
    if name_of(node) == "native_layer_norm":
        return product(node.args[1])
    before, after = numel_of(node.all_input_nodes[0]), numel_of(node)
    if is_symbolic(before) or is_symbolic(after):
        return before / after
    return before // max(1, after)


def unique_bytes(value: torch.Tensor) -> Amount:
    """Bytes of memory behind a tensor; a dimension of stride 0 repeats the same ones."""
    sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
    return product(sizes) * value.dtype.itemsize


def written_bytes(node: Node) -> Amount:
    if name_of(node) in SCATTERS:
        return sum((unique_bytes(t) for t in [t for s in read_by(node) for t in tensors_of(s)][-1:]), 0)
    return sum((unique_bytes(t) for t in tensors_of(node)), 0)


def matmul_sizes(node: Node) -> tuple[Amount, Amount, Amount, Amount, torch.dtype]:
    """(batch, M, N, K, dtype of the operands)."""
    operands = node.args[:2] if name_of(node) in SCALED else node.args[-2:]
    a, b = (x.meta["val"] for x in operands if isinstance(x, Node))
    *batch, m, k = a.shape
    return product(batch), amount(m), amount(b.shape[-1]), amount(k), a.dtype


def flops_of(node: Node, special: Mapping[str, int]) -> Amount:
    name = name_of(node)
    if name in MATMULS:
        batch, m, n, k, _ = matmul_sizes(node)
        return 2 * batch * m * n * k
    if is_attention(node):
        return _attention_flops(node)
    per_element = 1 + special["exp"] if name in STAGES else special.get(name, 1)
    return per_element * space_of(node)


def _attention_flops(node: Node) -> Amount:
    q, k, v = (x.meta["val"] for x in node.args[:3] if isinstance(x, Node))
    pairs = product(q.shape[:-1]) * amount(k.shape[-2])
    return (1 if bind(node).get("is_causal") else 2) * pairs * (amount(q.shape[-1]) + amount(v.shape[-1]))
