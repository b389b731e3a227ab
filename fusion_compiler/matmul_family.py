"""From a value that some pattern matched to the fused op `MatmulFamily` and the site it stands at.

Whatever the pattern, the work is the same: find the linears below the root, see that they share their input, fold a
norm of that input, and write what lies between the linears and the root as the epilogue. What the epilogue reads
besides is an extra. A refusal is a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from .algebra import POINTWISE, Algebra, Value
from .fused import Extra, MatmulFamily, RowNorm, Site
from .norms import NORMS
from .raising.products import weight_value
from .semantics import SemanticView
from .shapes import Product, count, extent, shape_of
from .sites import region, site_of

_EXTRA_KINDS = {(False, True): "col", (True, False): "row", (False,): "scalar"}


@dataclass(frozen=True)
class Family:
    """A fused op at its site, with the nodes of the folded norm (empty without one)."""

    op: MatmulFamily
    site: Site
    prologue: tuple[Node, ...] = ()


def build(view: SemanticView, root: Value, output: Node) -> list[Family] | str:
    """The ways to see `root`, held by `output`, as one matmul family: with the norm folded in first, then without.

    Returns a sentence where it cannot be one.
    """
    linears = [v for v in _until_linear(root) if v.op == "linear"]
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
    first, end = products[0].features
    n = end - first
    if any(p.features[1] - p.features[0] != n for p in products):
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
    steps = {extent(w.meta["val"].stride()[-2]) for w in weights if shape_of(w)[-2] != 1}
    if len(steps) > 1:
        apart = " and ".join(map(str, sorted(steps, key=str)))
        return f"rows of its weights lie {apart} elements apart, and a kernel takes one step; make them contiguous"

    extras: list[tuple[Extra, Node]] = []
    epilogue = _epilogue(view, root, linears, extras, {}, (extent(m), n))
    if isinstance(epilogue, str):
        return epilogue

    x_value = linears[0].args[0]
    op = MatmulFamily(
        m=m, k=k, n=n, weights=len(weights), norm=None, epilogue=epilogue, extras=tuple(e for e, _ in extras),
        dtype=dtype, out_dtype=output.meta["val"].dtype, weight_is_kn=layouts.pop(),
        features=tuple(p.features[0] for p in products) if any(_is_part(p) for p in products) else (),
    )  # fmt: skip
    tail = (*weights, *(n for _, n in extras))
    families = []
    folded = _folded_norm(view, x_value, x_node, extent(k))
    if folded is not None:
        norm, head, normalised = folded
        prologue = region(view, (normalised,), head)
        families.append(Family(replace(op, norm=norm), site_of(view, output, (*head, *tail)), prologue))
    rows = next(n for n in view.nodes(x_value) if n.meta["val"].dtype == dtype)
    families.append(Family(op, site_of(view, output, (rows, *tail))))
    far = next((n for f in families for n in f.site.operands if _reaches_far(n)), None)
    if far is not None:
        return f"{far.name} reaches over 2³¹ elements of memory, and kernels count in 32 bits; make it contiguous"
    return families


def _until_linear(root: Value) -> list[Value]:
    """The values from `root` down to the linears, which are not entered; operands before users."""
    order: dict[Value, None] = {}

    def visit(value: Value) -> None:
        if value in order:
            return
        if value.op in POINTWISE or value.op == "bcast":
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
    return product.features != (0, extent(product.weight.meta["val"].shape[-1]))


def _reaches_far(matrix: Node) -> bool:
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


def _folded_norm(
    view: SemanticView, x: Value, x_node: Node, k: object
) -> tuple[RowNorm, tuple[Node, ...], Node] | None:
    """The norm that produces x, the nodes of its input, weight and bias, and the node that holds its result."""
    if x.op not in NORMS or x.attr("size") != k:
        return None
    dtype = x_node.meta["val"].dtype
    operands = []
    for position, value in enumerate(x.args):
        nodes = view.nodes(value)
        # the rows must come in the matmul's own dtype: that is what the kernel was made for
        node = next((n for n in nodes if position > 0 or n.meta["val"].dtype == dtype), None)
        if node is None or (position > 0 and shape_of(node)[-1:] != (k,)):
            return None
        operands.append(node)
    result = next(n for n in view.nodes(x) if n.meta["val"].dtype == dtype)
    kind = "rms" if x.op == "rms_norm" else "layer"
    norm = RowNorm(kind, x.attr("eps"), len(x.args) > 1, len(x.args) > 2, x.attr("offset"))  # type: ignore[arg-type]
    return norm, tuple(operands), result


def _epilogue(
    view: SemanticView,
    value: Value,
    linears: list[Value],
    extras: list[tuple[Extra, Node]],
    memo: dict[Value, Value],
    shape: tuple[Any, Any],
) -> Value | str:
    """`value`, of `shape`, rewritten over acc(i) and extra(j); extras found on the way are appended."""
    algebra = view.algebra
    if value in memo:
        return memo[value]
    if value.op == "linear":
        result = algebra.make("acc", index=linears.index(value))
    elif value.op == "const":
        return value
    elif not any(v.op == "linear" for v in _until_linear(value)):
        extra = _extra(view, value, shape)
        if isinstance(extra, str):
            # what only arose by normalising, such as −r in acc − r, is computed from tensors that do exist
            opened = _opened(algebra, value)
            return extra if opened is None else _rewritten(view, opened, linears, extras, memo, shape)
        extras.append(extra)
        result = algebra.make("extra", index=len(extras) - 1)
    elif value.op == "bcast":
        return "a product is repeated along an axis after the matmul"
    else:
        rewritten = _rewritten(view, value, linears, extras, memo, shape)
        if isinstance(rewritten, str):
            return rewritten
        result = rewritten
    memo[value] = result
    return result


def _rewritten(
    view: SemanticView,
    value: Value,
    linears: list[Value],
    extras: list[tuple[Extra, Node]],
    memo: dict[Value, Value],
    shape: tuple[Any, Any],
) -> Value | str:
    """The same operation on its rewritten arguments."""
    args = []
    for a in value.args:
        inner = _epilogue(view, a, linears, extras, memo, shape)
        if isinstance(inner, str):
            return inner
        args.append(inner)
    return view.algebra.make(value.op, *args, **dict(value.attrs))


def _opened(algebra: Algebra, value: Value) -> Value | None:
    """A pointwise operation as one on repeated tensors, where `value` is one or repeats the result of one."""
    inner = value.args[0] if value.op == "bcast" else value
    if inner.op not in POINTWISE or not inner.args:
        return None
    if inner is value:
        return value
    groups = value.attr("groups")
    return algebra.make(inner.op, *(algebra.bcast(a, groups) for a in inner.args), **dict(inner.attrs))


def _extra(view: SemanticView, value: Value, shape: tuple[Any, Any]) -> tuple[Extra, Node] | str:
    kind, inner, wanted, first = "full", value, count(shape), 0
    if value.op == "bcast":
        groups = value.attr("groups")
        kind = _EXTRA_KINDS.get(tuple(kept for _, kept in groups), "")
        wanted = {"col": shape[1], "row": shape[0], "scalar": 1}.get(kind)
        if wanted is None or count(size for size, kept in groups if kept) != wanted:
            return "a tensor is repeated otherwise than along rows or columns in the epilogue"
        inner = value.args[0]
    if inner.op == "slice" and wanted == shape[1] and len(inner.attr("shape")) == 1 and not view.nodes(inner):
        # part of a packed bias, which is a value and no node; in one row it is not repeated
        kind, first, [wanted], inner = "col", inner.attr("start"), inner.attr("shape"), inner.args[0]
    node = next((n for n in view.nodes(inner) if count(shape_of(n)) == wanted), None)
    if node is None:
        return f"an operand of the epilogue ({inner.op}) is not a tensor of its own in the graph"
    return Extra(kind, node.meta["val"].dtype, first), node  # type: ignore[arg-type]
