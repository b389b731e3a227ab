"""Patterns that users declare of attention with a modification of its scores, as plain PyTorch.

The function is read by the recogniser that reads models, so it stands for every spelling. What must agree is what
happens to the scores: whether they are capped, and what kind of mask they get. Scale, cap, sizes, grouping of heads and
the values of a mask may be any; a constraint can look at them in `op`, a `fused.Attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import GraphModule

from ..fused import Attention, FusedOp, Site
from ..match import Match, NearMiss
from .recognise import find_attention

Refusal = Callable[[FusedOp, Site], "str | None"]


def declared_attention(gm: GraphModule) -> Attention | None:
    """The attention that a traced function is, from its arguments to its one result."""
    matches, _ = find_attention(gm)
    results = gm.graph.output_node().all_input_nodes
    if len(matches) != 1 or len(results) != 1:
        return None
    [match], [result] = matches, results
    while result is not match.site.output and len(result.all_input_nodes) == 1:
        [result] = result.all_input_nodes  # views behind it
    return match.op if result is match.site.output and isinstance(match.op, Attention) else None


def find_like(name: str, like: Attention, refusal: Refusal, gm: GraphModule) -> tuple[list[Match], list[NearMiss]]:
    """The attentions of a graph whose scores are modified as in the declared one."""
    found, missed = [], []
    for match in find_attention(gm)[0]:
        assert isinstance(match.op, Attention)
        why = unlike(like, match.op) or refusal(match.op, match.site)
        if why is None:
            found.append(replace(match, pattern=name))
        else:
            missed.append(NearMiss(name, match.site.operands[0], why, match.site.output))
    return found, missed


def unlike(like: Attention, op: Attention) -> str | None:
    """Where the scores of `op` are modified otherwise than those of the declared pattern, in a sentence."""
    if op.logarithm is not None:
        return "the logarithm of the sums is read here too, which the pattern does not give"
    if (like.softcap is None) != (op.softcap is None):
        capped = f"capped at {op.softcap:g}" if op.softcap is not None else "not capped"
        return f"the scores are {capped} here, otherwise than in the pattern; declare another one for these"
    wanted, mask = like.mask, op.mask
    if (wanted.kind, wanted.tensor if wanted.kind == "tensor" else "") != (
        mask.kind, mask.tensor if mask.kind == "tensor" else ""
    ):  # fmt: skip
        return f"the scores have {_kind(op)} here, and {_kind(like)} in the pattern; declare another one for these"
    return None


def _kind(op: Attention) -> str:
    added = {"additive": "a tensor added to them", "visible": "a boolean mask", "hidden": "a boolean mask"}
    return {"none": "no mask", "tensor": added.get(op.mask.tensor, "a mask")}.get(
        op.mask.kind, f"a {op.mask.kind} mask"
    )
