"""Raising: a read-only semantic view over an FX graph of functional, decomposed ATen.

Every node gets a `Value` of the closed vocabulary (see `algebra`); what the vocabulary cannot express is a
`leaf`. The graph itself is not touched. Values leave out shapes and float casts, so a view of a node and the
node share one value; `SemanticView.nodes(value)` lists the nodes that hold it.

Vocabulary beyond `algebra`:
    leaf(node)                    an FX node seen from outside
    linear(x, w; kn)              x [M, K] times w [N, K] transposed (kn: w is [K, N], not transposed)
    mean/sum/amax/var(x; size)    reduction of the innermost axis of `size` elements (population variance)
    permute(x; order, shape)      axes reordered, size-1 axes left out
    slice(x; …)                   part of one axis
    rms_norm(x, [w]; eps, size, offset), layer_norm(x, [w], [b]; eps, size, offset)   see `fused.RowNorm`
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .algebra import Algebra, Value
from .norms import normalise_product, normalise_sum

aten = torch.ops.aten
prims = torch.ops.prims

# Casting among these is looked through: the fused kernel computes in float32, which holds the others.
TRANSPARENT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})

Groups = tuple[tuple[Any, bool], ...]


def extent(size: Any) -> Any:
    """A size as something hashable that compares without installing guards: int or sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def shape_of(node: Node) -> tuple[Any, ...]:
    return tuple(extent(s) for s in node.meta["val"].shape)


def broadcast_groups(shape: Sequence[Any], out: Sequence[Any]) -> Groups | None:
    """How a tensor of `shape` repeats to fill `out`: (size, kept) per group of axes, outermost first.

    None where it does not follow broadcasting rules. Axes of size 1 are left out, neighbours are merged.
    """
    padded = (1,) * (len(out) - len(shape)) + tuple(shape)
    groups: list[tuple[Any, bool]] = []
    for size, whole in zip(padded, out, strict=True):
        if whole == 1:
            continue
        if size not in (whole, 1):
            return None
        kept = size == whole
        if groups and groups[-1][1] == kept:
            groups[-1] = (groups[-1][0] * whole, kept)
        else:
            groups.append((whole, kept))
    return tuple(groups)


@dataclass(frozen=True)
class Product:
    """A node (mm, addmm, or bmm over one batch) that multiplies `x` with `weight` [K, N]; a linear made of part of its
    outputs has fewer `features` (first, end) than the weight has columns."""

    node: Node
    x: Node
    weight: Node
    features: tuple[int, int]


class SemanticView:
    """The values of one graph's nodes."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self.algebra = Algebra()
        self._value: dict[Node, Value] = {}
        self._nodes: dict[int, list[Node]] = {}
        self._products: dict[int, list[Product]] = {}
        for node in graph_module.graph.nodes:
            value = self._raise(node)
            self._value[node] = value
            self._nodes.setdefault(id(value), []).append(node)

    def value(self, node: Node) -> Value:
        return self._value[node]

    def nodes(self, value: Value) -> Sequence[Node]:
        """The nodes that hold `value`, in graph order; none for values that only arose by normalising."""
        return self._nodes.get(id(value), ())

    def products(self, linear: Value) -> Sequence[Product]:
        """Where a `linear` value is computed."""
        return self._products.get(id(linear), ())

    def values(self) -> Iterator[Value]:
        """Each value that some node holds, once, in graph order."""
        seen: set[int] = set()
        for value in self._value.values():
            if id(value) not in seen:
                seen.add(id(value))
                yield value

    # ---- raising ---------------------------------------------------------------------------
    def _raise(self, node: Node) -> Value:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            rule = _RULES.get(node.target)
            if rule is not None:
                value = rule(self, node)
                if value is not None:
                    return value
        return self.leaf(node)

    def leaf(self, node: Node) -> Value:
        return self.algebra.make("leaf", node=node)

    def operand(self, argument: Any, out: Node) -> Value | None:
        """The value of an argument of a pointwise node, repeated to the node's shape."""
        if isinstance(argument, (bool, int, float)):
            return self.algebra.const(argument)
        if not isinstance(argument, Node):
            return None
        value = self._value[argument]
        if value.op == "const":
            return value
        if not isinstance(argument.meta.get("val"), torch.Tensor):
            return None  # a symbolic scalar
        groups = broadcast_groups(shape_of(argument), shape_of(out))
        return None if groups is None else self.algebra.bcast(value, groups)

    def flat(self, op: str, argument: Value | None, node: Any) -> list[Value]:
        """The terms (factors) that `argument` brings into a sum (product) `op`.

        A nested sum joins only where nothing else reads it: residual streams would grow without bound.
        """
        assert argument is not None
        single = isinstance(node, Node) and len(node.users) == 1
        if argument.op == op and single:
            return list(argument.args)
        if op == "mul" and argument.op == "bcast" and argument.args[0].op == "mul" and single:
            groups = argument.attr("groups")
            return [self.algebra.bcast(f, groups) for f in argument.args[0].args]
        return [argument]


Rule = Callable[[SemanticView, Node], "Value | None"]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


# ---- views, casts, constants ----------------------------------------------------------------
@_rule(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.clone.default, aten.alias.default,
    aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default,
)  # fmt: skip
def _same_elements(view: SemanticView, node: Node) -> Value | None:
    return view.value(node.args[0])  # type: ignore[arg-type]


@_rule(prims.convert_element_type.default, aten._to_copy.default)
def _cast(view: SemanticView, node: Node) -> Value | None:
    source: Any = node.args[0]
    before, after = source.meta["val"], node.meta["val"]
    value = view.value(source)
    if before.dtype == after.dtype or {before.dtype, after.dtype} <= TRANSPARENT_DTYPES:
        return value if before.device == after.device else None
    if value.op == "const" and after.dtype in TRANSPARENT_DTYPES:
        return value
    return view.algebra.make("cast", value, source=before.dtype, dtype=after.dtype)


@_rule(aten.expand.default)
def _expand(view: SemanticView, node: Node) -> Value | None:
    return view.operand(node.args[0], node)


@_rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(view: SemanticView, node: Node) -> Value | None:
    source: Any = node.args[0]
    shape = shape_of(source)
    order = list(range(len(shape)))
    if node.target is aten.permute.default:
        order = [d % len(shape) for d in node.args[1]]  # type: ignore[union-attr]
    elif len(shape) > 1:
        a, b = (d % len(shape) for d in (node.args[1:3] or (0, 1)))  # type: ignore[operator]
        order[a], order[b] = order[b], order[a]
    kept = [d for d in range(len(shape)) if shape[d] != 1]
    order = [kept.index(d) for d in order if d in kept]
    value = view.value(source)
    sizes = tuple(shape[d] for d in kept)
    if value.op == "permute" and tuple(value.attr("shape")[d] for d in value.attr("order")) == sizes:
        order = [value.attr("order")[d] for d in order]
        sizes, value = value.attr("shape"), value.args[0]
    if order == sorted(order):
        return value
    return view.algebra.make("permute", value, order=tuple(order), shape=sizes)


@_rule(aten.slice.Tensor)
def _slice(view: SemanticView, node: Node) -> Value | None:
    source: Any = node.args[0]
    dim, start, end, step = (*node.args[1:], *(0, 0, 2**63 - 1, 1)[len(node.args) - 1 :])
    shape = shape_of(source)
    if shape_of(node) == shape:
        return view.value(source)
    if not all(isinstance(v, int) for v in (dim, start, end, step, shape[dim])) or step != 1:  # type: ignore[index]
        return None
    size = shape[dim]  # type: ignore[index]
    start = start % size if start < 0 else start  # type: ignore[operator]
    end = end % size if end < 0 else min(end, size)  # type: ignore[operator, type-var]
    return _part(view, source, dim % len(shape), start, end)  # type: ignore[operator, arg-type]


def _part(view: SemanticView, source: Node, dim: int, start: int, end: int) -> Value:
    """Elements start … end−1 of one axis. Part of a linear's outputs is a linear with part of its weight."""
    shape = shape_of(source)
    value = view.value(source)
    if dim == len(shape) - 1:
        linear, bias = (value, None) if value.op == "linear" else _linear_and_bias(value)
        if linear is not None:
            part = _output_features(view, linear, start, end)
            if bias is None:
                return part
            groups = tuple((end - start if kept else size, kept) for size, kept in bias.attr("groups"))
            held = view.algebra.make("slice", bias.args[0], dim=0, shape=(shape[-1],), start=start, end=end)
            return view.algebra.add(part, view.algebra.bcast(held, groups))
    return view.algebra.make("slice", value, dim=dim, shape=shape, start=start, end=end)


def _linear_and_bias(value: Value) -> tuple[Value | None, Value | None]:
    """(linear, bias) of `linear + bias` with the bias repeated along the rows, else (None, None)."""
    if value.op == "add" and len(value.args) == 2:
        for linear, bias in (value.args, value.args[::-1]):
            if linear.op == "linear" and bias.op == "bcast" and [k for _, k in bias.attr("groups")] == [False, True]:
                return linear, bias
    return None, None


def _output_features(view: SemanticView, linear: Value, start: int, end: int) -> Value:
    """The linear that gives features start … end−1 of `linear`."""
    x, weight = linear.args
    stored = view.products(linear)[0].weight.meta["val"]
    k, n = (extent(s) for s in stored.shape[-2:])
    kn = linear.attr("kn")
    shape, dim = ((k, n), 1) if kn else ((n, k), 0)
    part = view.algebra.make("slice", weight, dim=dim, shape=shape, start=start, end=end)
    value = view.algebra.make("linear", x, part, kn=kn)
    known = view._products.setdefault(id(value), [])
    known += [Product(p.node, p.x, p.weight, (p.features[0] + start, p.features[0] + end)) for p in view.products(linear)]
    return value


@_rule(aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
def _full(view: SemanticView, node: Node) -> Value | None:
    fill = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
    return view.algebra.const(fill) if isinstance(fill, (bool, int, float)) else None


# ---- arithmetic -----------------------------------------------------------------------------
def _is_float(node: Node) -> bool:
    return node.meta["val"].dtype in TRANSPARENT_DTYPES


@_rule(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
def _add(view: SemanticView, node: Node) -> Value | None:
    if not _is_float(node):
        return None
    algebra = view.algebra
    a, b = node.args[0], node.args[1]
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    if not isinstance(alpha, (int, float)):
        return None
    if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        a, b = b, a
    sign = 1.0 if node.target in (aten.add.Tensor, aten.add.Scalar) else -1.0
    left, right = view.operand(a, node), view.operand(b, node)
    if left is None or right is None:
        return None
    scaled = algebra.mul(algebra.const(sign * alpha), *view.flat("mul", right, b)) if sign * alpha != 1 else right
    terms = view.flat("add", left, a) + (view.flat("add", right, b) if scaled is right else [scaled])
    return normalise_sum(algebra, terms)


@_rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(view: SemanticView, node: Node) -> Value | None:
    if not _is_float(node):
        return None
    a, b = node.args[0], node.args[1]
    left, right = view.operand(a, node), view.operand(b, node)
    if left is None or right is None:
        return None
    return normalise_product(view.algebra, view.flat("mul", left, a) + view.flat("mul", right, b))


@_rule(aten.div.Tensor, aten.div.Scalar)
def _div(view: SemanticView, node: Node) -> Value | None:
    if not _is_float(node):
        return None
    left, right = view.operand(node.args[0], node), view.operand(node.args[1], node)
    if left is None or right is None:
        return None
    inverse = view.algebra.pow(right, -1.0)
    return normalise_product(view.algebra, [*view.flat("mul", left, node.args[0]), inverse])


@_rule(aten.neg.default)
def _neg(view: SemanticView, node: Node) -> Value | None:
    value = view.value(node.args[0])  # type: ignore[arg-type]
    factors = view.flat("mul", value, node.args[0])
    return normalise_product(view.algebra, [view.algebra.const(-1.0), *factors]) if _is_float(node) else None


@_rule(aten.pow.Tensor_Scalar)
def _pow(view: SemanticView, node: Node) -> Value | None:
    exponent = node.args[1]
    if not _is_float(node) or not isinstance(exponent, (int, float)):
        return None
    return view.algebra.pow(view.value(node.args[0]), float(exponent))  # type: ignore[arg-type]


def _fixed_power(exponent: float) -> Rule:
    def rule(view: SemanticView, node: Node) -> Value | None:
        if not _is_float(node):
            return None
        return view.algebra.pow(view.value(node.args[0]), exponent)  # type: ignore[arg-type]

    return rule


_rule(aten.rsqrt.default)(_fixed_power(-0.5))
_rule(aten.sqrt.default)(_fixed_power(0.5))
_rule(aten.reciprocal.default)(_fixed_power(-1.0))
if hasattr(aten, "square"):
    _rule(aten.square.default)(_fixed_power(2.0))


def _unary(name: str) -> Rule:
    def rule(view: SemanticView, node: Node) -> Value | None:
        if not _is_float(node):
            return None
        return view.algebra.unary(name, view.value(node.args[0]))  # type: ignore[arg-type]

    return rule


for _name in ("exp", "exp2", "log", "log2", "sin", "cos", "tanh", "erf", "abs", "sigmoid", "silu", "relu"):
    _rule(getattr(aten, _name).default)(_unary(_name))


@_rule(aten.gelu.default)
def _gelu(view: SemanticView, node: Node) -> Value | None:
    name = "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu_erf"
    return _unary(name)(view, node)


@_rule(aten.maximum.default, aten.minimum.default)
def _extremum(view: SemanticView, node: Node) -> Value | None:
    left, right = view.operand(node.args[0], node), view.operand(node.args[1], node)
    if not _is_float(node) or left is None or right is None:
        return None
    return view.algebra.binary("maximum" if node.target is aten.maximum.default else "minimum", left, right)


@_rule(aten.clamp_min.default, aten.clamp.default)
def _clamp(view: SemanticView, node: Node) -> Value | None:
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    value = view.value(node.args[0])  # type: ignore[arg-type]
    if not _is_float(node) or not all(b is None or isinstance(b, (int, float)) for b in (low, high)):
        return None
    if low is not None:
        value = view.algebra.binary("maximum", view.algebra.const(low), value)  # type: ignore[arg-type]
    if high is not None:
        value = view.algebra.binary("minimum", view.algebra.const(high), value)  # type: ignore[arg-type]
    return value


# ---- reductions of the innermost axis ---------------------------------------------------------
def _innermost(node: Node) -> Any | None:
    """The size of the axis that a reduction node folds, if that is the innermost axis alone."""
    source: Any = node.args[0]
    shape = shape_of(source)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    if not shape or dims is None or [d % len(shape) for d in dims] != [len(shape) - 1]:
        return None
    return shape[-1]


def _reduction(name: str) -> Rule:
    def rule(view: SemanticView, node: Node) -> Value | None:
        size = _innermost(node)
        if size is None or not _is_float(node):
            return None
        return view.algebra.make(name, view.value(node.args[0]), size=size)  # type: ignore[arg-type]

    return rule


_rule(aten.mean.dim)(_reduction("mean"))
_rule(aten.sum.dim_IntList)(_reduction("sum"))
_rule(aten.amax.default)(_reduction("amax"))


@_rule(aten.var.correction)
def _var(view: SemanticView, node: Node) -> Value | None:
    return _reduction("var")(view, node) if node.kwargs.get("correction", 1) == 0 else None


@_rule(operator.getitem)
def _getitem(view: SemanticView, node: Node) -> Value | None:
    source, index = node.args
    assert isinstance(source, Node)
    if source.target in (aten.split_with_sizes.default, aten.split.Tensor):
        return _split_part(view, source, index)  # type: ignore[arg-type]
    if source.target is aten.var_mean.correction:
        if index == 0 and source.kwargs.get("correction", 1) != 0:
            return None
        size = _innermost(source)
        if size is not None:
            return view.algebra.make("mean" if index else "var", view.value(source.args[0]), size=size)  # type: ignore[arg-type]
    return None




def _split_part(view: SemanticView, split: Node, index: int) -> Value | None:
    source: Any = split.args[0]
    shape = shape_of(source)
    dim: int = (split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)) % len(shape)  # type: ignore[operator, assignment]
    sizes: Any = split.args[1]
    if not isinstance(shape[dim], int):
        return None
    if isinstance(sizes, int):
        sizes = [min(sizes, shape[dim] - at) for at in range(0, shape[dim], sizes)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[:index])
    return _part(view, source, dim, start, start + sizes[index])


# ---- matrix products ---------------------------------------------------------------------------
@_rule(aten.mm.default)
def _mm(view: SemanticView, node: Node) -> Value | None:
    return _linear(view, node, node.args[0], node.args[1])


@_rule(aten.bmm.default)
def _bmm(view: SemanticView, node: Node) -> Value | None:
    return _linear(view, node, node.args[0], node.args[1]) if shape_of(node)[0] == 1 else None


@_rule(aten.addmm.default)
def _addmm(view: SemanticView, node: Node) -> Value | None:
    bias, x, w = node.args
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    shift = view.operand(bias, node)
    if shift is None or not isinstance(alpha, (int, float)) or not isinstance(beta, (int, float)):
        return None
    product = _linear(view, node, x, w)
    if product is None:
        return None
    algebra = view.algebra
    return algebra.add(algebra.mul(algebra.const(alpha), product), algebra.mul(algebra.const(beta), shift))


def _linear(view: SemanticView, node: Node, x: Any, w: Any) -> Value | None:
    if w.meta["val"].dtype not in TRANSPARENT_DTYPES or x.meta["val"].dtype != w.meta["val"].dtype:
        return None
    weight, kn = view.value(w), True
    if weight.op == "permute" and weight.attr("order") == (1, 0):
        weight, kn = weight.args[0], False
    value = view.algebra.make("linear", view.value(x), weight, kn=kn)
    view._products.setdefault(id(value), []).append(Product(node, x, w, (0, shape_of(w)[-1])))
    return value
