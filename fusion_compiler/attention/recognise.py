"""Finds attention: softmax(scores of q and k) · v, in whatever shapes, orders and repeats it is written.

Two contractions with a softmax between them are attention when every axis has its part (see roles.py). k and v are then
read without the repeats. Calls of attention operators are read alike, to find what they were not told: a causal mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import sympy
import torch
from torch.fx import GraphModule, Node

from ..fused import Attention, Layout, Mask, Site, Size
from ..match import ATTENTION, Match, NearMiss
from ..sites import staying
from . import arrangements, axes
from .axes import Atom, View
from .contraction import Contraction, Operand, contraction
from .index_functions import Indexer
from .late_division import LateDivision, divided_later
from .limits import Extents
from .masks import HIDDEN, Proof, Term, prove
from .modifications import modification, says_more
from .readers import leads_to_product, readers, zeroes_hidden_rows
from .refusals import NotAttention, UnlikeRepeats, also_read, between_scores_and, changed
from .roles import Geometry, Parts
from .scores import MaskSite, Obstacle, Scores, scaled, scaled_by, scores
from .sdpa_calls import Call, call
from .sinks import without_sink
from .softmax import Softmax, more_than_their_sum, softmax
from .statistics import logarithm, unknown_logarithm
from .storage import as_stored

aten = torch.ops.aten
SINK = "{} stands beside the scores and takes its part of every row (attention sinks)"
WHOLE_LAYERS = (aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default)


def find_attention(gm: GraphModule) -> tuple[list[Match], list[NearMiss]]:
    """Every attention of the graph, and what almost was one."""
    finder = _Finder(gm)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            continue
        finder.visit(node)
    return finder.matches, finder.near_misses


class _Finder:
    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.matches: list[Match] = []
        self.near_misses: list[NearMiss] = []
        self._indexer = Indexer()
        self._proofs: dict[Any, Proof] = {}
        self._sizes: dict[sympy.Expr, torch.SymInt] = {}
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            for size in value.shape if isinstance(value, torch.Tensor) else ():
                if isinstance(size, torch.SymInt):
                    self._sizes.setdefault(size.node.expr, size)

    def visit(self, node: Node) -> None:
        try:
            parts = self._parts(node)
            if parts is not None:
                self.matches.append(as_stored(self._match(parts), self._indexer))
        except NotAttention as why:
            self.near_misses.append(NearMiss(ATTENTION, why.node, why.reason, node))

    # ---- the pieces -------------------------------------------------------------------------
    def _parts(self, node: Node) -> Parts | None:
        operator = call(node)
        if operator is not None:
            return self._of_call(operator)
        if node.target in WHOLE_LAYERS:
            raise NotAttention(
                node,
                f"{node.name} is a whole fused layer of torch already, attention inside; "
                "torch.backends.mha.set_fastpath_enabled(False) shows its parts",
            )
        found = softmax(node)
        found, division = (found, None) if found is not None else divided_later(node) or (None, None)
        if found is None and more_than_their_sum(node) and readers(node)[0]:
            raise NotAttention(
                node,
                f"{node.name} divides exponentials by more than their sum, so this is no softmax; a key and a value of "
                "zeros (MultiheadAttention's add_zero_attn) give exp / (1 + sum) with one",
            )
        if found is None or any(zeroes_hidden_rows(u, node) for u in node.users):
            return None
        if (beside := without_sink(found)) is not None:
            found, node = beside[0], beside[0].node
        products, strangers = readers(node)
        strangers = [s for s in strangers if division is None or s is not division.total]
        altered = None if products else next((s for s in strangers if leads_to_product(s)), None)
        if not products and altered is None:
            return None
        above = scores(found.scores)
        if found.factor != 1.0 and isinstance(above, Scores):
            above = scaled(above, found.factor, node)
        if found.by is not None and isinstance(above, Scores):
            above = scaled_by(above, found.by, node)
        if isinstance(above, Obstacle):
            raise NotAttention(*between_scores_and(node, above))
        if altered is not None:
            raise NotAttention(altered, changed(altered))
        if len(products) > 1 or strangers:
            raise NotAttention(node, also_read(node, strangers, products))
        parts = self._of_softmax(found, above, products[0], division)
        return parts if beside is None else replace(parts, sink=MaskSite(beside[1], above.view))

    def _of_softmax(self, found: Softmax, above: Scores, product: Node, division: LateDivision | None) -> Parts:
        first, second = above.contraction, cast(Contraction, contraction(product))
        dim = above.view.dims[found.dim % len(above.view.dims)]
        extents = axes.shape_of(first.node)
        if len(dim) != 1 or dim[0].axis is None or not axes.same(dim[0].size, extents[dim[0].axis]):
            raise NotAttention(
                found.node,
                f"the softmax {found.node.name} does not run over one axis of {first.node.name}, the product that it "
                "is taken of; that of an attention runs over all keys of a query",
            )
        keys = dim[0].axis
        sides = (first.left, first.right)
        varying = [s for s in sides if s.dims[keys] is not None]
        if len(varying) != 1:
            raise NotAttention(found.node, f"both factors of {first.node.name} vary along the axis of the softmax")
        k = varying[0]
        q = sides[1] if k is sides[0] else sides[0]
        query_axes = [a for a in range(len(extents)) if q.dims[a] is not None and k.dims[a] is None]
        p, v = second.left, second.right
        view = _view_of(found.node, p.node)
        if view is None:
            p, v = v, p
            view = _view_of(found.node, p.node)
        if view is None:
            raise NotAttention(product, f"{product.name} reads the probabilities across a view that mixes their axes")
        over_scores = view.through(above.view)
        if second.added is not None or second.scale != 1.0 or over_scores is None:
            raise NotAttention(product, f"{product.name} does more than to multiply the probabilities with the values")
        if division is not None and not division.is_row_by_row(product, p, view):
            raise NotAttention(
                division.quotient,
                f"{division.quotient.name} divides rows of {product.name} by the sums of others; dividing the "
                "probabilities before they meet the values makes this a softmax",
            )
        border = [first.node, *(m.node for m in above.masks), *(f.node for f in above.factors)]
        total = logarithm(found)
        chain = (first.node, *_between(p.node, border), *(_between(total, border) if total is not None else ()))
        return Parts(
            found.node, product, extents, keys, query_axes[0] if query_axes else None, q, k, v, p,
            over_scores, above.scale, above.softcap, above.masks, total=found.total, chain=chain,
            factors=above.factors, quotient=division.quotient if division is not None else None,
            logarithm=MaskSite(total, above.view) if total is not None else None,
        )  # fmt: skip

    def _of_call(self, found: Call) -> Parts:
        if found.refusal:
            raise NotAttention(found.node, found.refusal)
        shape = axes.shape_of(found.q)
        extents = (*shape[:3], axes.shape_of(found.k)[2])
        q, k = Operand(found.q, (0, 1, 2, None), 3), Operand(found.k, (0, 1, None, 2), 3)
        p, v = Operand(found.node, (0, 1, 2, None), 3), Operand(found.v, (0, 1, None, 3), 2)
        scores_view = View(
            found.node, tuple(() if n == 1 else (Atom(i, axes.ONE, n),) for i, n in enumerate(extents)), torch.float32
        )
        masks: tuple[MaskSite, ...] = ()
        if found.mask is not None:
            boolean = found.mask.meta["val"].dtype == torch.bool
            masks = (MaskSite(found.mask, scores_view, additive=not boolean, fill=-math.inf),)
        known = Mask("causal", empty_rows="none", proof="the graph says is_causal") if found.is_causal else None
        return Parts(
            found.node, found.output, extents, 3, 2, q, k, v, p, scores_view, found.scale, None, masks, known,
            total=True, vendor=str(found.node.target),
        )  # fmt: skip

    # ---- the match --------------------------------------------------------------------------
    def _match(self, parts: Parts) -> Match:
        trails = [axes.trail(o.node, scaled=s) for o, s in ((parts.q, True), (parts.k, True), (parts.v, False))]
        if any(n == 0 for n in parts.extents):
            raise NotAttention(parts.root, "a dimension of the scores is 0")
        geometry, trails = _geometry(parts, trails)
        readable = [axes.unrepeated(t) for t in trails]
        dtype = parts.v.node.meta["val"].dtype
        wide = next((t[-1] for t in trails if not axes.widens(t[-1].source.meta["val"].dtype, dtype)), None)
        if wide is not None:
            raise NotAttention(
                wide.source,
                f"{wide.source.name} is {wide.source.meta['val'].dtype}, wider than the values in {dtype}; "
                "cast them alike",
            )
        chosen = [self._operand(geometry, side, views, dtype) for side, views in zip("qkv", readable, strict=True)]
        (q, q_layout, q_scale), (k, k_layout, k_scale), (v, v_layout, _) = chosen
        output, out = self._output(parts, geometry)
        proof, mask_operand = self._mask(parts, geometry, dtype)
        if parts.sink is not None:
            mask_operand, proof = None, Proof(Mask("tensor", proof=SINK.format(parts.sink.node.name)))
        operands, layouts = [q, k, v], [q_layout, k_layout, v_layout]
        if mask_operand is not None:
            operands.append(mask_operand[0])
            layouts.append(mask_operand[1])
        operands += [n for n in (proof.position, proof.lengths) if n is not None]
        known = proof.mask.kind != "tensor"
        modified, modified_by = (None, ()) if known else modification(geometry, self._indexer, parts.total)
        if parts.sink is not None and modified is None:
            raise NotAttention(parts.root, f"{proof.mask.proof}, beside a mask that no formula says")
        operands += modified_by
        if len(parts.factors) > 1:
            raise NotAttention(parts.root, "the scores are scaled by several tensors; multiply those first")
        operands += [f.node for f in parts.factors]
        shape = q_layout.shape
        if not isinstance(shape[3], int) or not isinstance(v_layout.shape[3], int):
            raise NotAttention(
                parts.root, "the head dimension is symbolic; torch._dynamo.mark_static keeps it a number"
            )
        op = Attention(
            batch=shape[0], heads=shape[1], kv_heads=k_layout.shape[1], q_len=shape[2], kv_len=k_layout.shape[2],
            head_dim=shape[3], v_dim=v_layout.shape[3], scale=parts.scale * q_scale * k_scale, mask=proof.mask,
            dtype=dtype, layouts=tuple(layouts), out=out, softcap=parts.softcap,
            scale_operand=bool(parts.factors), scale_layout=self._scale(parts, geometry),
            scale_divides=any(f.divides for f in parts.factors),
            modification=modified, vendor=parts.vendor,
        )  # fmt: skip
        if parts.vendor and proof.mask.kind == "tensor" and k is parts.k.node and not says_more(op):
            raise NotAttention(
                parts.root, f"{parts.root.name} is a fused attention already; nothing more is known: {proof.mask.proof}"
            )
        if parts.vendor and not parts.masks and k is parts.k.node:
            raise NotAttention(parts.root, f"{parts.root.name} is a fused attention already, with nothing to add")
        interior, outputs = _between(output, operands), [output]
        if parts.logarithm is not None and (both := _also(parts.logarithm.node, interior, operands)) is not None:
            op = self._with_logarithm(op, parts.logarithm, geometry, output)
            interior, outputs = both, sorted((output, parts.logarithm.node), reverse=True)
        inside = set(interior)
        held = next(
            (n for n in parts.chain if n in inside.difference(outputs) and not inside.issuperset(n.users)), None
        )
        if held is not None:
            reader = next(u for u in held.users if u not in inside)
            raise NotAttention(held, f"{held.name} is also read by {reader.name}, so the scores are written out anyway")
        escaping = staying(interior, outputs)
        return Match(ATTENTION, op, Site(tuple(operands), outputs[0], interior, escaping, tuple(outputs[1:])))

    def _scale(self, parts: Parts, geometry: Geometry) -> Layout | None:
        """The layout of what scales the rows of scores, where that is more than one number."""
        found = [(f, geometry.row_scale(f)) for f in parts.factors]
        return next((self._layout(a, f.node.meta["val"].dtype) for f, a in found if a is not None), None)

    def _with_logarithm(self, op: Attention, site: MaskSite, geometry: Geometry, output: Node) -> Attention:
        """`op` with the logarithm of the sums as a second result."""
        if refusal := unknown_logarithm(op):
            raise NotAttention(site.node, f"{site.node.name} is read too, and {refusal}")
        arranged = geometry.statistic(site)
        if arranged is None:
            raise NotAttention(site.node, f"{site.node.name} mixes the axes of batch, heads and queries")
        results = ("logarithm", "out") if output < site.node else ("out", "logarithm")
        layout = self._layout(arranged, site.node.meta["val"].dtype)
        return replace(op, results=results, logarithm=layout)

    def _size(self, expr: sympy.Expr) -> Size:
        if expr.is_Integer:
            return int(expr)
        known = self._sizes.get(expr) or next((s for e, s in self._sizes.items() if axes.same(e, expr)), None)
        if known is None:
            raise NotAttention(next(iter(self.gm.graph.nodes)), f"no tensor of the graph has the size {expr}")
        return known

    def _layout(self, found: arrangements.Arrangement, dtype: torch.dtype) -> Layout:
        split, merged, shape = (tuple(map(self._size, s)) for s in (found.split, found.merged, found.shape))
        return Layout(split, found.order, merged, shape, dtype)

    def _operand(
        self, geometry: Geometry, side: str, views: Sequence[View], dtype: torch.dtype
    ) -> tuple[Node, Layout, float]:
        """The node to read q, k or v from: the deepest one that has the documented shape, else the nearest readable."""
        found: list[tuple[View, arrangements.Arrangement]] = []
        for view in views:
            targets = geometry.targets(side, view)
            arranged = arrangements.arranged(view.source, targets) if targets is not None else None
            if arranged is not None:
                found.append((view, arranged))
        if not found:
            name = views[0].source.name
            raise NotAttention(views[0].source, f"{name} is no [batch, heads, length, dim] without a copy of it")
        fitting = [(v, a) for v, a in found if a.changes_nothing(axes.shape_of(v.source))]
        view, arranged = fitting[-1] if fitting else found[0]
        return view.source, self._layout(arranged, dtype), view.scale

    def _output(self, parts: Parts, geometry: Geometry) -> tuple[Node, Layout]:
        """The node to replace: the last copy that alone reads the product, else the product's own view."""
        chain = [View.of(parts.product)]
        while len(chain[-1].source.users) == 1:
            (user,) = chain[-1].source.users
            if not axes.is_size_preserving_view(user) and user is not parts.quotient:
                break
            chain.append(View.of(user))
        nodes = [v.source for v in chain]
        if parts.quotient is not None and parts.quotient not in nodes:
            raise NotAttention(
                parts.product, f"{parts.product.name} is also read before {parts.quotient.name} divides it"
            )
        first = nodes.index(parts.quotient) if parts.quotient is not None else 0
        copies = [i for i, n in enumerate(nodes) if n.target in axes.COPIES]
        last = max(first, copies[-1] if copies else min(1, len(nodes) - 1))
        fallback: tuple[Node, arrangements.Arrangement] | None = None
        for end in range(last, first - 1, -1):
            view = View.of(nodes[end])
            for node in reversed(nodes[1 : end + 1]):
                divided = node is parts.quotient
                below = View.of(nodes[nodes.index(node) - 1]) if divided else axes.step(node)
                further = view.through(below) if below is not None else None
                if further is None:
                    break
                view = further
            else:
                arranged = geometry.result(view)
                if arranged is None:
                    continue
                if copies or arranged.changes_nothing(geometry.result_shape):
                    return nodes[end], self._layout(arranged, nodes[end].meta["val"].dtype)
                fallback = nodes[end], arranged
        if fallback is not None:
            return fallback[0], self._layout(fallback[1], fallback[0].meta["val"].dtype)
        raise NotAttention(parts.product, f"{parts.product.name} mixes the axes of batch, heads and queries")

    def _proof(self, terms: tuple[Term, ...], extents: Extents) -> Proof:
        """`prove`, once for the layers that share a mask."""
        key = (terms, extents.query, tuple(extents.extent.items()))
        if key not in self._proofs:
            self._proofs[key] = prove(terms, extents, self._indexer)
        return self._proofs[key]

    # ---- the mask ---------------------------------------------------------------------------
    def _mask(self, parts: Parts, geometry: Geometry, dtype: torch.dtype) -> tuple[Proof, tuple[Node, Layout] | None]:
        if parts.known_mask is not None:
            return Proof(parts.known_mask), None
        if not parts.masks:
            return Proof(Mask("none", empty_rows="none", proof="nothing is masked")), None
        proof = self._proof(geometry.terms(), geometry.symbols())
        if proof.mask.empty_rows != "none" and parts.total:
            proof = replace(proof, mask=replace(proof.mask, empty_rows="zero"))
        operand = None
        # a tensor says the same where it is all that is added, or where what it hides gets no weight
        if len(parts.masks) == 1 and (
            parts.masks[0].factor == 1.0 if parts.masks[0].additive else parts.masks[0].fill <= HIDDEN
        ):
            site = parts.masks[0]
            dims = geometry.by_row(site.scores)
            arranged = geometry.mask(View.of(site.node), dims) if dims is not None else None
            if site.additive and proof.mask.kind == "tensor" and site.node.meta["val"].dtype != dtype:
                arranged = None  # its values, not known to be 0 and −∞, would be rounded
            if arranged is not None:
                operand = site.node, self._layout(arranged, dtype if site.additive else torch.bool)
                form = "additive" if site.additive else "visible" if site.keeps else "hidden"
                proof = replace(proof, mask=replace(proof.mask, tensor=cast(Any, form)))
        return proof, operand


def _geometry(parts: Parts, trails: list[list[View]]) -> tuple[Geometry, list[list[View]]]:
    """The axes, and the views of q, k and v that they are read through: the deepest, where k and v are repeated alike.

    Where they are not (keys turned by RoPE after they were repeated, values that join several heads), both are read as
    they stand, repeated.
    """
    try:
        return Geometry.of(parts, *(t[-1] for t in trails)), trails
    except UnlikeRepeats:
        above = [trails[0], *map(axes.above_repeats, trails[1:])]
        return Geometry.of(parts, *(t[-1] for t in above)), above


def _between(output: Node, border: Iterable[Node]) -> tuple[Node, ...]:
    """The tensors from which `output` is computed, back to but without `border`, in graph order."""
    outside, inside, stack = set(border), set[Node](), [output]
    while stack:
        node = stack.pop()
        held = isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
        if held and node not in outside and node not in inside and node.all_input_nodes:
            inside.add(node)
            stack.extend(node.all_input_nodes)
    return tuple(sorted(inside))


def _also(node: Node, interior: Sequence[Node], operands: Sequence[Node]) -> tuple[Node, ...] | None:
    """`interior` with all that `node` is computed from, where somebody else reads that node."""
    both = {*interior, *_between(node, operands)}
    return None if both.issuperset(node.users) else tuple(sorted(both))


def _view_of(softmax_node: Node, node: Node) -> View | None:
    """What `node` is of the softmax's result, through views and casts."""
    return next((v for v in axes.trail(node, exact=False) if v.source is softmax_node), None)
