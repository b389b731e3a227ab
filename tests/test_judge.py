"""Verdicts: the measured cases through the whole line, and the rules one by one with made-up candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from small_graphs import TWO_CORES, attention, calls, gated_mlp, rms_linear, traced
from torch.fx import Node

import fusion_compiler as fc
from fusion_compiler.algebra import Algebra
from fusion_compiler.candidates import MARGIN, Amount, Candidate, Traffic, Unavailable
from fusion_compiler.cost.amounts import amount
from fusion_compiler.cost.roofline import matmul_traffic
from fusion_compiler.fused import MatmulFamily, RowNorm, Site
from fusion_compiler.judge import Judgement, judge
from fusion_compiler.machine import Machine, machine
from fusion_compiler.match import Match
from fusion_compiler.offers import Offer, offer
from fusion_compiler.report import Decision, Work

H200 = machine("h200")
BF16 = torch.bfloat16


# ---- through the whole line ---------------------------------------------------------------------
def decided(pattern: str, fn: Callable[..., Any], *args: torch.Tensor, on: Machine) -> Decision:
    with torch.no_grad():
        report = fc.explain(fn, *args, machine=on)
    (found,) = [d for d in report.decisions if d.pattern == pattern]
    return found


def heads(s: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(1, h, s, 64, dtype=dtype, device="meta") for h in (8, 2, 2))


@pytest.mark.parametrize(
    ("dtype", "s", "verdict"),
    [(BF16, 512, "kept"), (BF16, 2048, "fused"), (torch.float32, 2048, "fused"), (torch.float32, 512, "kept")],
)
def test_attention_on_two_cores(dtype: torch.dtype, s: int, verdict: str) -> None:
    decision = decided("attention", attention(), *heads(s, dtype), on=TWO_CORES)
    assert decision.verdict == verdict
    if verdict == "kept":
        assert "fit the 32 MB cache" in decision.reason and "Inductor at" in decision.reason


def test_a_vendor_kernel_with_repeated_heads_has_no_scores_to_save() -> None:
    def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t.unsqueeze(2).tile(1, 1, 4, 1, 1).flatten(1, 2) for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    decision = decided("attention", repeated, *heads(256, torch.float32), on=H200)
    assert decision.verdict == "kept" and decision.before.bytes < 2 * 8 * 256 * 256 * 4
    assert "scores (" not in decision.reason


@pytest.mark.parametrize(
    ("k", "n", "m", "verdict"),
    [(2048, 8192, 1, "fused"), (2048, 8192, 16, "fused"), (2048, 8192, 64, "fused"), (2048, 8192, 4096, "fused"),
     (8192, 3584, 512, "kept")],
)  # fmt: skip
def test_gated_mlp_on_an_h200(k: int, n: int, m: int, verdict: str) -> None:
    """Many rows pay where K is short, for then the products are a large part of what moves."""

    def with_norm(x: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gated_mlp(torch.nn.functional.rms_norm(x, (k,), scale, 1e-6), gate, up)

    shapes = ((m, k), (k,), (n, k), (n, k))
    decision = decided("gated_mlp", with_norm, *(torch.empty(s, dtype=BF16, device="meta") for s in shapes), on=H200)
    assert decision.verdict == verdict
    if verdict == "kept":
        assert "triton_tile is predicted at" in decision.reason and "Inductor at" in decision.reason


@pytest.mark.parametrize(
    ("rows", "machine", "sentence"),
    [(16, "h200", ""), (4096, "h200", "torch.float8_e4m3fn in the graph"), (16, "a100", "widen torch.float8_e4m3fn")],
)
def test_weights_stored_in_eight_bits_are_read_so_where_they_can_be(rows: int, machine: str, sentence: str) -> None:
    def dequantised(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return gated_mlp(x, gate.to(x.dtype) * scale[:, None], up.to(x.dtype))

    codes = torch.randn(8192, 2048).to(torch.float8_e4m3fn)
    operands = torch.randn(rows, 2048).to(BF16), codes, codes, torch.rand(8192).to(BF16)
    with torch.no_grad():
        report = fc.explain(dequantised, *operands, machine=machine)
    if not sentence:
        [decision] = report.fused
        assert decision.pattern == "gated_mlp" and decision.kernel.startswith("triton packed")
        return
    assert not report.fused
    [decision] = [d for d in report.decisions if d.pattern == "gated_mlp"]
    assert sentence in decision.reason


# ---- the rules ----------------------------------------------------------------------------------
class Fixed:
    """A lowering that offers what it was told, whatever the op."""

    name = "fixed"

    def __init__(self, *found: Candidate, refusal: str = "") -> None:
        self.found, self.refusal = list(found), refusal

    def candidates(self, op: Any, machine: Machine) -> list[Candidate] | Unavailable:
        return Unavailable(self.refusal) if self.refusal else self.found


def candidate(seconds: Amount, name: str = "made_up", valid: Any = True, **details: Any) -> Candidate:
    def emit(builder: Any, site: Site) -> Node:
        raise AssertionError("judging emits nothing")

    return Candidate(name, f"kernel of {name}", Traffic(1, 1, 1, 1), seconds, emit, valid, tuple(details.items()))


def mlp(m: int = 16, dynamic: bool = False) -> Match:
    gm = traced(gated_mlp, (m, 2048), (8192, 2048), (8192, 2048), dtype=BF16, dynamic=dynamic)
    nodes = calls(gm)
    inputs = tuple(n for n in gm.graph.nodes if n.op == "placeholder")
    rows = inputs[0].meta["val"].shape[0]
    op = MatmulFamily(rows, 2048, 8192, 2, None, Algebra().make("acc", index=0), (), BF16, BF16)
    return Match("gated_mlp", op, Site(inputs, nodes[-1], tuple(nodes)))


def judged(match: Match, *found: Candidate, refusal: str = "", on: Machine = H200) -> Judgement:
    return judge(match, [offer(match.op, match.site, on, [Fixed(*found, refusal=refusal)])], on)


INDUCTOR = judged(mlp(), refusal="nothing").decision.before.seconds


def test_the_cheapest_candidate_wins() -> None:
    result = judged(mlp(), candidate(0.8 * INDUCTOR, "slow"), candidate(0.5 * INDUCTOR, "fast"))
    assert result.decision.verdict == "fused" and result.decision.kernel == "kernel of fast"
    found = result.choice().candidate
    assert found is not None and found.name == "fast"
    assert result.saving == pytest.approx(0.5 * INDUCTOR)
    assert result.decision.reason.startswith("predicted 50 % less time: 3 kernels become 1")
    assert [o.name for o in result.decision.candidates] == ["inductor", "slow", "fast"]


@pytest.mark.parametrize(("share", "verdict"), [(1 - MARGIN - 0.005, "fused"), (1 - MARGIN + 0.005, "kept")])
def test_a_prediction_is_trusted_only_beyond_the_margin(share: float, verdict: str) -> None:
    decision = judged(mlp(), candidate(share * INDUCTOR)).decision
    assert decision.verdict == verdict
    assert ("within the error of prediction" in decision.reason) == (verdict == "kept")


def test_the_margin_is_the_error_of_the_candidates_own_prediction() -> None:
    well_known = dataclasses.replace(candidate(0.95 * INDUCTOR), error=0.04)
    assert judged(mlp(), well_known).decision.verdict == "fused"
    assert judged(mlp(), dataclasses.replace(well_known, error=0.06)).decision.verdict == "kept"


def test_a_measurement_needs_no_margin() -> None:
    assert judged(mlp(), candidate(0.97 * INDUCTOR, measured=True)).decision.reason.startswith("measured 3 % less time")
    assert judged(mlp(), candidate(1.01 * INDUCTOR, measured=True)).decision.verdict == "kept"


def test_no_kernel_is_a_reason() -> None:
    decision = judged(mlp(), refusal="float8 weights are not handled; use bfloat16").decision
    assert decision.verdict == "kept" and decision.after is None
    assert decision.reason == "no kernel for h200: float8 weights are not handled; use bfloat16"
    assert [(o.name, o.reason) for o in decision.candidates[1:]] == [
        ("fixed", "float8 weights are not handled; use bfloat16")
    ]


def test_an_invalid_candidate_is_not_chosen() -> None:
    decision = judged(mlp(), candidate(0.1 * INDUCTOR, valid=sympy.false)).decision
    assert decision.verdict == "kept" and "made_up needs False" in decision.reason


def normed(share: float = 1.0) -> Match:
    """RMSNorm and a linear as one op, and as an alternative the linear alone, which leaves the norm to Inductor."""
    gm = traced(rms_linear, (16, 4096), (4096,), (6144, 4096), dtype=BF16)
    nodes = calls(gm)
    x, scale, weight = (n for n in gm.graph.nodes if n.op == "placeholder")
    matmul, turned = nodes[-1], nodes[-2]
    norm = tuple(nodes[:-2])
    whole = MatmulFamily(16, 4096, 6144, 1, RowNorm("rms", 1e-6, True), Algebra().make("acc", index=0), (), BF16, BF16)
    alone = dataclasses.replace(whole, norm=None)
    both = Site((x, scale, weight), matmul, tuple(nodes))
    linear = Site((norm[-1], weight), matmul, (turned, matmul))
    return Match("norm_linear", whole, both, ((alone, linear),), norm, share)


def offers(match: Match, whole: Candidate, alone: Candidate) -> list[Offer]:
    ((op, site),) = match.alternatives
    return [Offer(match.op, match.site, (whole,)), Offer(op, site, (alone,))]


def test_an_alternative_pays_for_the_norm_it_leaves() -> None:
    match = normed()
    result = judge(match, offers(match, candidate(10e-6, "whole"), candidate(9e-6, "alone")), H200)
    assert result.decision.kernel == "kernel of whole"  # the norm alone takes 2.5 µs and more
    result = judge(match, offers(match, candidate(12e-6, "whole"), candidate(9e-6, "alone")), H200)
    assert result.decision.kernel == "kernel of alone"
    assert result.decision.after is not None and result.decision.after.launches == 2
    assert result.choice().site is match.alternatives[0][1]


def test_a_norm_that_others_read_is_no_gain() -> None:
    shared, own = normed(share=0.0), normed(share=1.0)
    cost = candidate(11e-6, "whole")
    before = judge(shared, [Offer(shared.op, shared.site, (cost,))], H200).decision.before
    assert before.launches == 1
    assert judge(own, [Offer(own.op, own.site, (cost,))], H200).decision.before.seconds > before.seconds + 2e-6


def test_nodes_read_elsewhere_are_not_counted_as_saved() -> None:
    match = mlp()
    product = next(n for n in match.site.interior if n.target is torch.ops.aten.mm.default)
    graph = product.graph
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = ((*output.all_input_nodes, product),)
    decision = judged(match, refusal="nothing").decision
    assert decision.before.launches == 2 and product.name not in decision.nodes


def test_a_gated_mlp_reports_the_activation_traffic_of_each_strategy() -> None:
    match = mlp()
    op = dataclasses.replace(match.op, m=4, n=2048, k=4096)
    facts = dict(judged(dataclasses.replace(match, op=op), refusal="nothing").decision.details)
    assert facts["activation_bytes_vector_level"] == 65_536
    assert facts["activation_bytes_matmul_level"] == 32_768
    assert facts["flops_per_byte"] == pytest.approx(4, rel=0.02)  # about M once the weights are counted


def test_nothing_to_compute_is_judged_without_a_fault() -> None:
    assert judged(mlp(0), refusal="empty").decision.verdict == "kept"


# ---- symbolic sizes -----------------------------------------------------------------------------
def test_a_symbolic_size_gives_ranges_with_exact_boundaries() -> None:
    match = mlp(dynamic=True)
    assert isinstance(match.op, MatmulFamily)
    m = amount(match.op.m)
    seconds = 15e-6 + 0.05e-6 * m
    result = judged(match, candidate(seconds, "few_rows", valid=sympy.Le(m, 64)), candidate(19e-6 + 1e-12 * m, "many"))
    ranges = result.decision.ranges
    assert [(r.verdict, r.candidate) for r in ranges] == [("fused", "few_rows"), ("fused", "many")]
    assert (ranges[0].lo, ranges[0].hi, ranges[1].lo, ranges[1].hi) == (2, 64, 65, None)
    assert str(ranges[1]).endswith("fused (many)") and "65 ≤" in str(ranges[1])
    for size, name in ((2, "few_rows"), (64, "few_rows"), (65, "many"), (10**6, "many")):
        found = result.choice(size).candidate
        assert found is not None and found.name == name
    assert result.choice() is result.choice(16)  # the size seen when tracing


def test_a_range_stays_with_inductor_where_the_kernel_loses() -> None:
    match = mlp(dynamic=True)
    assert isinstance(match.op, MatmulFamily)
    m = amount(match.op.m)
    result = judged(match, candidate(10e-6 + 0.2e-6 * m))
    (first, last) = result.decision.ranges
    assert (first.verdict, last.verdict, last.candidate, last.hi) == ("fused", "kept", "inductor", None)
    before = result.decision.before
    assert first.hi is not None and str(result.symbol) in before.formula

    def pays(size: int) -> bool:
        static = judged(mlp(size), candidate(10e-6 + 0.2e-6 * size)).decision
        return static.verdict == "fused"

    assert pays(first.hi) and not pays(last.lo)


def test_work_is_plain_numbers_at_the_traced_size() -> None:
    match = mlp(dynamic=True)
    assert isinstance(match.op, MatmulFamily)
    before, static = (judged(m, refusal="nothing").decision.before for m in (match, mlp(16)))
    assert before.seconds == pytest.approx(static.seconds) and before.formula and not static.formula
    assert dataclasses.replace(before, seconds=0, formula="") == dataclasses.replace(static, seconds=0)
    traffic = matmul_traffic(match.op)
    assert Work.of(traffic, 1.0, dict.fromkeys(amount(match.op.m).free_symbols, 16)).flops == 4 * 16 * 2048 * 8192


def test_sizes_that_were_equal_when_tracing_vary_together() -> None:
    x = [torch.empty(1, h, 700, 64, dtype=BF16, device="meta") for h in (8, 2, 2)]
    for tensor in x:
        torch._dynamo.mark_dynamic(tensor, 2)

    def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(4, dim=1) for t in (k, v))
        hidden = torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.125 + hidden
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), v)

    decision = decided("attention", unscaled, *x, on=TWO_CORES)
    # 8 heads of S² bf16 scores exceed 32 MiB from S = 1449 on: their pages are then mapped afresh at every call
    assert [(r.lo, r.hi, r.verdict) for r in decision.ranges] == [(2, 1448, "kept"), (1449, None, "fused")]


def test_float32_on_matrix_units_is_refused_unless_tf32_is_allowed() -> None:
    """Its rounding errors are more than eager's; one row is added up on the ordinary units."""
    torch.backends.cuda.matmul.allow_tf32 = False
    few, one = (decided("gated_mlp", gated_mlp, *_mlp(m), on=H200) for m in (16, 1))
    assert "one chain" in few.reason and few.verdict == "kept" and "one chain" not in one.reason
    q, k, v = (torch.empty(1, h, 256, 64, device="meta") for h in (8, 2, 2))
    options = {c.name: c.reason for c in decided("attention", attention(), q, k, v, on=H200).candidates}
    assert "one chain" in options["triton"]


def _mlp(m: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(s, device="meta") for s in ((m, 512), (1024, 512), (1024, 512)))
