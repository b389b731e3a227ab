"""Attention as real code writes it is recognised for what it is, or a sentence says why not and what would cure it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_in_the_wild import DYNAMIC, WILD
from attention_reference import attend
from reference import Recorder
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler.attention import find_attention
from fusion_compiler.fused import Attention
from fusion_compiler.report import where
from fusion_compiler.torch_private import inductor

MATCHED = [name for name, written in WILD.items() if written.expected is not None]
LAYERS = ["encoder_layer"]  # torch's own layers take their fast path only where they are compiled as they stand
REFUSED = [name for name, written in WILD.items() if written.expected is None and name not in LAYERS]
# Dynamic sizes, and layers as a whole
CAPTURED = ["window_of_two_masks", "chunks", "padding_by_length_and_causal", "one_key_head_with_heads_in_the_rows"]


def trace(name: str, *args: Any) -> GraphModule:
    with torch.no_grad():
        table = select_decomp_table()
        function = torch.func.functionalize(WILD[name].function)
        gm = make_fx(function, table, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    gm.graph.eliminate_dead_code()
    return gm


def captured(name: str, dtype: torch.dtype, dynamic: bool) -> GraphModule:
    """The graph as Inductor hands it over, after its own attention rewrite."""
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _: Any, **__: Any) -> Any:
        graphs.append(gm)
        return inductor.run_eagerly(gm)

    torch._dynamo.reset()
    args = WILD[name].inputs(dtype)
    for tensor in args if dynamic else ():
        for dim, size in enumerate(tensor.shape):
            if size in DYNAMIC:
                torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        torch.compile(
            WILD[name].function,
            backend=lambda gm, inputs: inductor.compile_graph(gm, inputs, keep, {}),
            dynamic=None if dynamic else False,
        )(*args)
    (gm,) = graphs
    return gm


def differing(op: Attention, expected: dict[str, Any]) -> dict[str, Any]:
    """The fields of the op or its mask that are not as expected."""
    have = {name: getattr(op, name) if hasattr(op, name) else getattr(op.mask, name) for name in expected}
    same = {name: value == expected[name] or _close(value, expected[name]) for name, value in have.items()}
    return {name: value for name, value in have.items() if not same[name]}


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-3)


@pytest.mark.parametrize("name", MATCHED)
def test_recognised(name: str) -> None:
    written = WILD[name]
    args = written.inputs(torch.float32)
    gm = trace(name, *args)
    matches, near_misses = find_attention(gm)
    assert len(matches) == 1, [n.reason for n in near_misses]
    op, site = matches[0].op, matches[0].site
    assert isinstance(op, Attention) and written.expected is not None
    assert not differing(op, written.expected), (differing(op, written.expected), op.mask.proof)
    values = Recorder(gm).values(*args)
    if op.mask.kind == "tensor" and op.mask.tensor == "none":
        return  # several terms of the scores, which no one tensor holds
    torch.testing.assert_close(attend(op, site, values).float(), values[site.output], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name: str) -> None:
    matches, near_misses = find_attention(trace(name, *WILD[name].inputs(torch.float32)))
    assert not matches
    assert WILD[name].sentence in " ".join(n.reason for n in near_misses)


@pytest.mark.parametrize("name", CAPTURED)
def test_recognised_with_dynamic_sizes(name: str) -> None:
    (match,), _ = find_attention(captured(name, torch.bfloat16, dynamic=True))
    expected = WILD[name].expected
    assert isinstance(match.op, Attention) and expected is not None
    assert isinstance(match.op.q_len, torch.SymInt) and not differing(match.op, expected), match.op.mask.proof


@pytest.mark.parametrize("name", LAYERS)
def test_layers_say_what_they_are(name: str) -> None:
    matches, near_misses = find_attention(captured(name, torch.float32, dynamic=False))
    assert not matches and WILD[name].sentence in near_misses[0].reason


@pytest.mark.parametrize("name", ["dropout_active", "scale_by_key", "softmax_over_queries", "probabilities_returned"])
def test_near_misses_name_the_line(name: str) -> None:
    _, near_misses = find_attention(captured(name, torch.float32, dynamic=False))
    found = next(n for n in near_misses if WILD[name].sentence in n.reason)
    assert where(found.node).startswith("attention_in_the_wild.py:")
