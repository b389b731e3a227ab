"""Finds linears with the pointwise operations behind them, whatever these are.

The largest chain that can be an epilogue is the match: what is read elsewhere, such as the residual stream, ends it and
is its result. A linear with its bias alone is none: no kernel is saved.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import matmul_family
from .algebra import UNARY
from .cost.node_work import SCALED, name_of, readers_of
from .linear_chains import Chain, chains
from .match import Match, NearMiss
from .matmul_family import Family
from .row_reduction import is_pointwise
from .semantics import SemanticView

PATTERN = "linear_epilogue"
FUNCTIONS = frozenset(UNARY) - {"logical_not"}
READ_ELSEWHERE = (
    "what the linear gives is also read by {}, so it must be written all the same, and nothing is saved where the "
    "operations behind it share its kernel"
)
SCALED_PRODUCT = (
    "{} multiplies {} activations with {} weights in the library, whose kernel scales the product and adds a bias but "
    "nothing else, and the generated kernels multiply 16 and 32 bits: it stays as it is, and what is done with its "
    "result is one kernel of Inductor's. With few rows the weights are the cost: a linear of 16-bit activations and "
    "weights that the graph dequantises reads as many bytes, and its epilogue is fused"
)


def find_linear_epilogue(view: SemanticView) -> tuple[list[Match], list[NearMiss]]:
    """Every linear with an epilogue, and those whose epilogue is none because others read the product too."""
    matches, near_misses = [], []
    for linear in view.linears():
        behind = chains(view, linear)
        if not behind:
            continue
        found = _match(view, behind)
        if isinstance(found, Match):
            matches.append(found)
        elif isinstance(found, NearMiss):
            near_misses.append(found)
        else:
            near_misses += _read_elsewhere(view, behind[0])
    return matches, near_misses + list(_scaled_products(view))


def _match(view: SemanticView, behind: list[Chain]) -> Match | NearMiss | None:
    """The longest chain with an epilogue that a kernel can have; else why the longest cannot be one."""
    refused: NearMiss | None = None
    for chain in behind:
        root, output = view.value(chain.root), chain.output(view)
        if output is None or root is chain.linear:
            continue
        families = matmul_family.build(view, root, output, chain.border)
        if isinstance(families, str):
            refused = refused or NearMiss(PATTERN, output, families, output)
        elif not _is_bare(families[0]):
            first, *others = families
            return Match(PATTERN, first.op, first.site, tuple((f.op, f.site) for f in others), first.prologue)
    return refused


def _is_bare(family: Family) -> bool:
    """Whether the epilogue is a bias alone, or nothing."""
    op, site = family.op, family.site
    value = op.epilogue
    if value.op == "acc":
        return True
    if value.op != "add" or {a.op for a in value.args} != {"acc", "extra"} or len(value.args) != 2:
        return False
    # in a single row a bias is not repeated, and tells itself from a residual by having no rows
    one_row = isinstance(op.m, int) and op.m == 1
    return op.extras[0].kind == "col" or (one_row and site.operands[-1].meta["val"].dim() == 1)


def _read_elsewhere(view: SemanticView, alone: Chain) -> Iterator[NearMiss]:
    """Where a function of one argument is taken of a linear that is also read by something else."""
    value = view.value(alone.root)
    readers = [user for node in view.nodes(value) for user in node.users]
    readers = [r for r in readers if r.op != "call_function" or view.value(r) is not value]
    for node in readers:
        others = [r for r in readers if r is not node]
        if others and view.value(node).op in FUNCTIONS:
            yield NearMiss(PATTERN, node, READ_ELSEWHERE.format(others[0].name), node)


def _scaled_products(view: SemanticView) -> Iterator[NearMiss]:
    """Products of 8-bit operands with something pointwise behind them."""
    for node in view.graph_module.graph.nodes:
        if node.op == "call_function" and name_of(node) in SCALED and any(map(is_pointwise, readers_of(node))):
            x, w = (str(n.meta["val"].dtype).removeprefix("torch.") for n in node.all_input_nodes[:2])
            yield NearMiss(PATTERN, node, SCALED_PRODUCT.format(f"aten.{name_of(node)}", x, w), node)
