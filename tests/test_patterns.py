"""Every built-in pattern's examples: those that must match do, the others are refused with a reason."""

from __future__ import annotations

import time

import pytest
import torch

from fusion_compiler import backend
from fusion_compiler.match import find_all
from fusion_compiler.pattern import Example, pattern, trace
from fusion_compiler.patterns import BUILTIN
from fusion_compiler.semantics import SemanticView

CASES = [(p, i) for p in BUILTIN for i in range(len(p.examples))]


def found(pattern, function, inputs):
    return find_all(SemanticView(trace(function, inputs)), [pattern])


@pytest.mark.parametrize(("pattern", "index"), CASES, ids=lambda v: getattr(v, "name", v))
def test_example(pattern, index):
    example = pattern.examples[index]
    inputs = example.inputs()
    function = example.function or _callable(pattern)
    matches, near_misses = found(pattern, function, inputs)
    if example.refused is None:
        assert [m.pattern for m in matches] == [pattern.name], near_misses
    else:
        assert not matches
        assert any(example.refused in n.reason for n in near_misses), near_misses


def _callable(pattern):
    """The pattern's own function; a declared pattern knows what choices and literals default to."""
    return pattern if callable(pattern) else pattern.function


def test_every_constraint_is_exercised():
    """A constraint that no example is refused by is a constraint nobody has seen at work."""
    for p in BUILTIN:
        refused = [e for e in p.examples if e.refused is not None]
        assert refused, f"{p.name} has no example that must be refused"
        for constraint in getattr(p, "constraints", ()):
            hit = False
            for example in refused:
                seen = []

                def spy(op, site, constraint=constraint, seen=seen):
                    seen.append(constraint(op, site))
                    return seen[-1]

                watched = pattern(name=p.name, constraints=[spy], examples=p.examples)(p.function)
                found(watched, example.function, example.inputs())
                hit = hit or any(s is not None for s in seen)
            assert hit, f"no example of {p.name} is refused by {constraint.__name__}"


def test_operands_and_interior_of_a_gated_mlp():
    from fusion_compiler.patterns.gated_mlp import gated_mlp

    def mlp(x, w_norm, w_gate, w_up):
        h = torch.nn.functional.rms_norm(x, (8,), w_norm, eps=1e-5)
        return torch.nn.functional.silu(h @ w_gate.T) * (h @ w_up.T)

    inputs = torch.randn(2, 3, 8), torch.randn(8), torch.randn(12, 8), torch.randn(12, 8)
    graph_module = trace(mlp, inputs)
    view = SemanticView(graph_module)
    [match], _ = find_all(view, [gated_mlp])
    x, w_norm, w_gate, w_up = graph_module.graph.find_nodes(op="placeholder")
    assert match.site.operands == (x, w_norm, w_gate, w_up)
    assert match.site.escaping == ()
    assert match.op.norm is not None and match.op.norm.kind == "rms"
    assert (int(match.op.m), int(match.op.k), int(match.op.n)) == (6, 8, 12)
    calls = {n for n in graph_module.graph.nodes if n.op == "call_function"}
    assert set(match.site.interior) == calls
    [(plain, site)] = match.alternatives
    assert plain.norm is None and site.operands[0] is not x


def test_an_intermediate_read_elsewhere_escapes():
    from fusion_compiler.patterns.gated_mlp import gated_mlp

    def mlp(x, w_gate, w_up):
        gate = x @ w_gate.T
        return torch.nn.functional.silu(gate) * (x @ w_up.T), gate

    graph_module = trace(mlp, (torch.randn(3, 8), torch.randn(12, 8), torch.randn(12, 8)))
    [match], _ = find_all(SemanticView(graph_module), [gated_mlp])
    assert torch.ops.aten.mm.default in [n.target for n in match.site.escaping]


def test_a_norm_shared_by_three_linears_is_saved_once():
    from fusion_compiler.patterns.norm_linear import norm_linear

    def qkv(x, w, q, k, v):
        h = torch.nn.functional.rms_norm(x, (8,), w, eps=1e-5)
        return h @ q.T, h @ k.T, h @ v.T

    inputs = torch.randn(3, 8), torch.randn(8), torch.randn(8, 8), torch.randn(4, 8), torch.randn(4, 8)
    matches, _ = found(norm_linear, qkv, inputs)
    assert [m.prologue_share for m in matches] == pytest.approx([1 / 3] * 3)


def test_a_norm_read_elsewhere_saves_nothing():
    from fusion_compiler.patterns.norm_linear import norm_linear

    def block(x, w, q):
        h = torch.nn.functional.rms_norm(x, (8,), w, eps=1e-5)
        return h @ q.T, h

    [match], _ = found(norm_linear, block, (torch.randn(3, 8), torch.randn(8), torch.randn(8, 8)))
    assert match.prologue_share == 0.0


def test_a_pattern_needs_an_example():
    with pytest.raises(ValueError, match="no example"):
        pattern(name="nameless", examples=[])(lambda x: x)


def test_a_users_pattern_in_a_few_lines():
    @pattern(
        name="linear_tanh",
        examples=[Example(lambda: (torch.randn(3, 8), torch.randn(12, 8), torch.randn(12)))],
    )
    def linear_tanh(x, w, b=None):
        return torch.tanh(torch.nn.functional.linear(x, w, b))

    for inputs in ((torch.randn(5, 16), torch.randn(4, 16)), (torch.randn(2, 5, 16).half(), torch.randn(4, 16).half())):
        [match], _ = found(linear_tanh, lambda x, w: torch.tanh(x @ w.T), inputs)
        assert repr(match.op.epilogue) == "tanh(acc(index=0))"


@pytest.mark.parametrize("split", ["chunk", "split", "slices"])
def test_a_packed_gate_and_up_is_read_in_place(split):
    from fusion_compiler.patterns.gated_mlp import gated_mlp

    def mlp(x, packed):
        both = x @ packed.T
        if split == "slices":
            gate, up = both[..., :12], both[..., 12:]
        else:
            gate, up = both.chunk(2, dim=-1) if split == "chunk" else both.split(12, dim=-1)
        return up * torch.nn.functional.silu(gate)

    graph_module = trace(mlp, (torch.randn(2, 3, 8), torch.randn(24, 8)))
    [match], _ = find_all(SemanticView(graph_module), [gated_mlp])
    _, packed = graph_module.graph.find_nodes(op="placeholder")
    assert match.site.operands[1:] == (packed, packed)
    assert sorted(match.op.features) == [0, 12] and int(match.op.n) == 12
    gate = next(v for v in match.op.epilogue.walk() if v.op == "silu").args[0].attr("index")
    assert match.op.features[gate] == 0


# ---- the patterns as a whole ----------------------------------------------------------------------
# (a, b): b finds what a does, and more, which is why both exist.
MORE_GENERAL: dict[tuple[str, str], str] = {}


@pytest.mark.parametrize("pattern", BUILTIN, ids=lambda p: p.name)
def test_no_pattern_is_subsumed_by_another(pattern):
    """What one pattern's examples show is not found as the same fused op by another one."""
    for example in pattern.examples:
        if example.refused is not None:
            continue
        inputs = example.inputs()
        view = SemanticView(trace(example.function or _callable(pattern), inputs))
        mine = {(m.site.output, m.op) for m in find_all(view, [pattern])[0]}
        for other in BUILTIN:
            if other is not pattern and (pattern.name, other.name) not in MORE_GENERAL:
                theirs = {(m.site.output, m.op) for m in find_all(view, [other])[0]}
                assert not mine & theirs, f"{other.name} also finds an example of {pattern.name}"


def _layers(count):
    def stack(x, w_norm, q, o, gate, up, down):
        for _ in range(count):
            h = torch.nn.functional.rms_norm(x, (64,), w_norm, 1e-5)
            heads = (h @ q.T).view(1, -1, 4, 16).transpose(1, 2)
            scores = torch.softmax(heads @ heads.transpose(-1, -2) * 0.25, dim=-1)
            x = x + (scores @ heads).transpose(1, 2).reshape(1, -1, 64) @ o.T
            h = torch.nn.functional.rms_norm(x, (64,), w_norm, 1e-5)
            x = x + (torch.nn.functional.silu(h @ gate.T) * (h @ up.T)) @ down.T
        return x

    shapes = (1, 6, 64), (64,), (64, 64), (64, 64), (96, 64), (96, 64), (64, 96)
    return trace(stack, [torch.randn(s) for s in shapes])


def test_matching_takes_time_in_proportion_to_the_graph():
    seconds = {}
    for count in (4, 16):
        view = SemanticView(_layers(count))
        assert len(find_all(view, BUILTIN)[0]) >= 3 * count  # also loads what is loaded once
        runs = []
        for _ in range(3):
            begin = time.process_time()
            view = SemanticView(view.graph_module)
            find_all(view, BUILTIN)
            runs.append(time.process_time() - begin)
        seconds[count] = min(runs)
    assert seconds[16] < 2 * 4 * seconds[4], seconds


def test_a_second_run_finds_nothing_new():
    options = backend.parse_options({"strict": True, "machine": "h200"})
    graph_module = _layers(2)
    first = backend.plan(graph_module, options, "first")
    backend.splice_all(graph_module, first.chosen, options)
    assert "gated_mlp" in {j.decision.pattern for j in first.chosen}
    again = backend.plan(graph_module, options, "second").report
    assert [d.pattern for d in again.decisions if d.verdict == "fused"] == []
    known = {d.where for d in first.report.decisions}
    assert {d.where for d in again.decisions} <= known
