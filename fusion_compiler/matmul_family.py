"""From a value that some pattern matched to the fused op `MatmulFamily` and the site it stands at.

Whatever the pattern, the work is the same: find the linears below the root, see that they share their input, fold a
norm of that input, and write what lies between the linears and the root as the epilogue. What the epilogue reads
besides is an extra. A refusal is a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from .algebra import POINTWISE, Value
from .fused import MatmulFamily, RowNorm, Site
from .matmul_epilogue import Epilogue, Refused
from .norms import NORMS
from .raising.products import weight_value
from .row_reduction import row_stride
from .semantics import SemanticView
from .shapes import Features, Product, count, extent, shape_of
from .sites import region, site_of

DEQUANTISING = 8  # operations between a tensor as it is stored and as it is multiplied
FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
INTEGERS = (torch.int8, torch.uint8)


@dataclass(frozen=True)
class Family:
    """A fused op at its site, with the nodes of the folded norm (empty without one)."""

    op: MatmulFamily
    site: Site
    prologue: tuple[Node, ...] = ()


def build(view: SemanticView, root: Value, output: Node, border: Collection[Value] = frozenset()) -> list[Family] | str:
    """The ways to see `root`, held by `output`, as one matmul family: with the norm folded in first, then without.

    Values of `border` are operands, whatever they are computed from. Returns a sentence where it cannot be one.
    """
    below = _until_linear(root, border)
    linears = [v for v in below if v.op == "linear" and v not in border]
    if not linears:
        return "there is no linear below this node"
    inputs = {id(v.args[0]) for v in linears}
    if len(inputs) > 1:
        return "its linears read different inputs; only linears of one and the same input share a kernel"
    products = [view.products(v)[0] for v in linears]
    x_node = products[0].x
    dtype = x_node.meta["val"].dtype
    other = next((p.x.meta["val"].dtype for p in products if p.x.meta["val"].dtype != dtype), None)
    if other is not None:
        return f"one of its linears computes in {dtype} and another in {other}; cast the model as a whole"
    *leading, k = x_node.meta["val"].shape
    m = math.prod(leading)
    n = products[0].features.count
    if any(p.features.count != n for p in products):
        return "its linears have different numbers of output features, so their products cannot be combined"
    if count(shape_of(output)) != count((extent(m), n)):
        return "the result is not one value per row and output feature"

    weights, layouts = [], set()
    for product in products:
        operand = _weight_operand(view, product)
        if isinstance(operand, str):
            return operand
        weights.append(operand[0])
        layouts.add(operand[1])
    if len(layouts) > 1:
        return "one weight is stored [out, in] and the other [in, out]; store both the same way"
    if len({p.features.step for p in products}) > 1:
        return "it takes neighbouring features of one linear and every second of another; store both the same way"
    if products[0].features.step > 1 and True in layouts:
        return (
            "it takes every second feature of a weight stored [in, out], whose elements a kernel would read with gaps; "
            "store the weight [out, in], as nn.Linear does"
        )
    steps = {extent(w.meta["val"].stride()[-2]) for w in weights if shape_of(w)[-2] != 1}
    if len(steps) > 1:
        apart = " and ".join(map(str, sorted(steps, key=str)))
        return f"rows of its weights lie {apart} elements apart, and a kernel takes one step; make them contiguous"

    try:
        rewriter = Epilogue(view, below, linears, (extent(m), n))
        epilogue = rewriter.rewritten(root)
    except Refused as refusal:
        return str(refusal)
    extras = rewriter.extras

    x_value = linears[0].args[0]
    op = MatmulFamily(
        m=m, k=k, n=n, weights=len(weights), norm=None, epilogue=epilogue, extras=tuple(e for e, _ in extras),
        dtype=dtype, out_dtype=output.meta["val"].dtype, weight_is_kn=layouts.pop(),
        features=tuple(p.features.first for p in products) if any(_is_part(p) for p in products) else (),
        feature_step=products[0].features.step,
        computed_from=next(filter(None, map(stored_narrower, weights)), None),
    )  # fmt: skip
    tail = (*weights, *(n for _, n in extras))
    families = []
    folded = _folded_norm(view, x_value, x_node, extent(k))
    if folded is not None:
        norm, head, normalised = folded
        prologue = region(view, (normalised,), head)
        families.append(Family(replace(op, norm=norm), site_of(view, output, (*head, *tail)), prologue))
    rows = _in_rows(view, x_value, x_node, extent(k))
    assert rows is not None, "the product itself reads it in this dtype"
    families.append(Family(op, site_of(view, output, (rows, *tail))))
    far = next((n for f in families for n in f.site.operands if reaches_far(n)), None)
    if far is not None:
        return f"{far.name} reaches over 2³¹ elements of memory, and kernels count in 32 bits; make it contiguous"
    return families


def _until_linear(root: Value, border: Collection[Value] = frozenset()) -> list[Value]:
    """The values from `root` down to the linears and `border`, which are not entered; operands before users."""
    order: dict[Value, None] = {}

    def visit(value: Value) -> None:
        if value in order:
            return
        if value not in border and (value.op in POINTWISE or value.op == "bcast"):
            for a in value.args:
                visit(a)
        order[value] = None

    visit(root)
    return list(order)


def is_piece(view: SemanticView, root: Value) -> bool:
    """Whether `root` is computed from one piece of a packed linear alone, such as q out of a packed q|k|v."""
    linears = [v for v in _until_linear(root) if v.op == "linear"]
    return len(linears) == 1 and _is_part(view.products(linears[0])[0])


def _is_part(product: Product) -> bool:
    return product.features != Features(0, extent(product.weight.meta["val"].shape[-1]))


def reaches_far(matrix: Node) -> bool:
    """Whether the strides, not the elements themselves, bring a tensor's offsets beyond 32 bits."""
    value = matrix.meta["val"]
    sizes, strides = (tuple(map(extent, part)) for part in (value.shape, value.stride()))
    offsets = [(n - 1) * s for n, s in zip(sizes, strides, strict=True) if isinstance(n, int) and isinstance(s, int)]
    return not value.is_contiguous() and sum(offsets) >= 2**31


def _weight_operand(view: SemanticView, product: Product) -> tuple[Node, bool] | str:
    """(the node to read a weight from, whether it is stored [in, out]), from the strides of the product's operand."""
    w = product.weight
    k, n = (extent(s) for s in w.meta["val"].shape[-2:])
    along_k, along_n = (extent(s) for s in w.meta["val"].stride()[-2:])
    stored = weight_value(view, w)
    if along_k == 1 and along_n != 1:
        # a single row or column is not permuted but reshaped, which leaves the value as it is
        source = stored.args[0] if stored.op == "permute" else stored if 1 in (n, k) else None
        held, wanted, kn = view.nodes(source) if source is not None else (), (n, k), False
    elif along_n == 1:
        held, wanted, kn = view.nodes(stored), (k, n), True
    else:
        return "a weight is strided in both axes; make it contiguous"
    for node in held:
        value, shape = node.meta["val"], shape_of(node)
        fits = shape[-2:] == wanted and count(shape) == count(wanted)
        if fits and value.dtype == w.meta["val"].dtype and extent(value.stride()[-1]) == 1:
            return node, kn
    return "a weight's storage could not be found as a matrix; make it contiguous"


def stored_narrower(node: Node, *, floating: bool = True) -> torch.dtype | None:
    """The 8-bit type (floating, or integer) that a tensor is computed from, element by element; None where there is
    none nearby."""
    size = count(shape_of(node))
    for _ in range(DEQUANTISING):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype in (FLOATS if floating else INTEGERS):
            return value.dtype
        tensors = (n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
        wide = [n for n in tensors if count(shape_of(n)) == size]
        if node.op != "call_function" or not wide:
            return None
        node = wide[0]
    return None


def _in_rows(view: SemanticView, x: Value, x_node: Node, k: object) -> Node | None:
    """A node that holds `x` in the dtype of `x_node`, which a product reads: the first that a kernel can read row by
    row, else the first of all.

    Of that one's views it is the last before the product, so that whatever computes x may be replaced up to there.
    """
    held = [n for n in view.nodes(x) if n.meta["val"].dtype == x_node.meta["val"].dtype]
    even = [n for n in held if isinstance(k, int) and row_stride(n.meta["val"], k) is not None]
    found = next(iter(even), next(iter(held), None))
    for node in even:
        is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        if node.all_input_nodes == [found] and is_view and node <= x_node:
            found = node
    return found


def _folded_norm(
    view: SemanticView, x: Value, x_node: Node, k: object
) -> tuple[RowNorm, tuple[Node, ...], Node] | None:
    """The norm that produces x, the nodes of its input, weight and bias, and the node that holds its result."""
    if x.op not in NORMS or x.attr("size") != k:
        return None
    dtype = x_node.meta["val"].dtype
    operands = []
    for position, value in enumerate(x.args):
        # the rows must come in the matmul's own dtype: that is what the kernel was made for
        node = next(iter(view.nodes(value)), None) if position else _in_rows(view, value, x_node, k)
        if node is None or (position > 0 and shape_of(node)[-1:] != (k,)):
            return None
        operands.append(node)
    result = next(n for n in view.nodes(x) if n.meta["val"].dtype == dtype)
    kind = "rms" if x.op == "rms_norm" else "layer"
    norm = RowNorm(kind, x.attr("eps"), len(x.args) > 1, len(x.args) > 2, x.attr("offset"))  # type: ignore[arg-type]
    return norm, tuple(operands), result
