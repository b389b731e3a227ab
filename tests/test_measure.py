"""Autotuning: what is measured, how the times decide, where they are kept, and that it can break nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from small_graphs import attention
from test_judge import H200, candidate, judged, mlp

import fusion_compiler as fc
from fusion_compiler import measure
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.candidates import Candidate
from fusion_compiler.cost.amounts import amount
from fusion_compiler.judge import Judgement
from fusion_compiler.machine import machine
from fusion_compiler.match import Match
from fusion_compiler.offers import Offer
from fusion_compiler.regions import cut, random_inputs
from fusion_compiler.report import Report

aten = torch.ops.aten
INDUCTOR = judged(mlp(), refusal="nothing").decision.before.seconds


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(measure, "cache_folder", lambda name: tmp_path / name)
    return tmp_path / "measurements"


class Clock:
    """Stands in for the measurement: Inductor takes `inductor` seconds, candidates what they are said to take."""

    def __init__(self, inductor: float, **others: float) -> None:
        self.inductor, self.others, self.calls = inductor, others, 0

    def __call__(self, builds: Mapping[str, Any], machine: Any) -> dict[str, float]:
        self.calls += 1
        return {name: self.others.get(name.partition(" ")[2], self.inductor) for name in builds}


def refined(clock: Any, match: Match, *found: Candidate, tuner: measure.Tuner | None = None) -> Judgement:
    tuner = tuner or measure.Tuner(H200, H200, strict=True)
    return tuner.refine(judged(match, *found), [Offer(match.op, match.site, found)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    def made(inductor: float, **others: float) -> Clock:
        found = Clock(inductor, **others)
        monkeypatch.setattr(measure, "_times", found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
        return found

    return made


# ---- which verdicts are measured, and what comes of it ------------------------------------------
def test_a_measurement_takes_the_place_of_a_close_prediction(clock: Callable[..., Clock]) -> None:
    clock(50e-6, made_up=49e-6)
    decision = refined(None, mlp(), candidate(0.95 * INDUCTOR)).decision
    assert decision.verdict == "fused" and decision.reason.startswith("measured 2 % less time")
    assert decision.before.seconds == pytest.approx(50e-6) and decision.saving == pytest.approx(1e-6)
    assert all(("measured", True) in option.details for option in decision.candidates)


def test_a_measured_loss_is_kept_and_told_as_measured(clock: Callable[..., Clock]) -> None:
    clock(50e-6, made_up=51e-6)
    decision = refined(None, mlp(), candidate(0.85 * INDUCTOR)).decision
    assert decision.verdict == "kept" and decision.reason == "made_up is measured at 51.0 µs, Inductor at 50.0 µs"


@pytest.mark.parametrize(
    ("shares", "measured"),
    [((0.5,), False), ((2.0,), False), ((0.85,), True), ((1.2,), True), ((0.5, 0.55), True), ((2.0, 2.1), False)],
)
def test_only_what_is_not_clear_is_measured(
    shares: tuple[float, ...], measured: bool, clock: Callable[..., Clock]
) -> None:
    counting = clock(INDUCTOR)
    refined(None, mlp(), *(candidate(s * INDUCTOR, f"way_{i}") for i, s in enumerate(shares)))
    assert counting.calls == measured


def test_between_candidates_the_measured_time_decides(clock: Callable[..., Clock]) -> None:
    clock(60e-6, first=30e-6, second=20e-6)
    found = candidate(0.5 * INDUCTOR, "first"), candidate(0.55 * INDUCTOR, "second"), candidate(0.9 * INDUCTOR, "far")
    decision = refined(None, mlp(), *found).decision
    assert decision.kernel == "kernel of second"
    assert ("measured", True) not in decision.candidates[3].details


def test_a_measurement_speaks_for_the_sizes_around_the_traced_one(clock: Callable[..., Clock]) -> None:
    clock(50e-6, made_up=60e-6)
    match = mlp(dynamic=True)
    assert not isinstance(match.op.m, int)
    m = amount(match.op.m)
    cost = candidate(0.8 * INDUCTOR + 1e-12 * m, valid=sympy.Le(m, 64))
    before = judged(match, cost)
    assert [(r.lo, r.hi, r.verdict) for r in before.decision.ranges] == [(2, 64, "fused"), (65, None, "kept")]
    after = refined(None, match, cost)
    assert [(r.lo, r.hi, r.verdict) for r in after.decision.ranges] == [(2, 64, "kept"), (65, None, "kept")]
    assert after.decision.verdict == "kept" and "measured" in after.decision.reason
    assert [c.candidate for c in after.choices] == [None, None]


def test_a_kernel_is_never_used_beyond_the_sizes_it_takes(clock: Callable[..., Clock]) -> None:
    clock(50e-6, made_up=40e-6)
    match = mlp(dynamic=True)
    m = amount(match.op.m)
    cost = candidate(0.97 * INDUCTOR + 1e-12 * m, valid=sympy.Le(m, 64))
    assert [(r.lo, r.hi, r.verdict) for r in judged(match, cost).decision.ranges] == [(2, None, "kept")]
    after = refined(None, match, cost)
    assert [(r.lo, r.hi, r.verdict) for r in after.decision.ranges] == [(2, 64, "fused"), (65, None, "kept")]
    assert after.choice().candidate is not None and after.choice(65).candidate is None


# ---- once per kind of place ---------------------------------------------------------------------
def test_equal_places_are_measured_once_by_all_processes(clock: Callable[..., Clock], folder: Path) -> None:
    counting = clock(50e-6, made_up=49e-6)
    for _ in range(2):  # a tuner per compilation, and another match with nodes of its own each time
        tuner = measure.Tuner(H200, H200)
        for _ in range(2):
            assert refined(None, mlp(), candidate(INDUCTOR), tuner=tuner).decision.verdict == "fused"
    assert counting.calls == 1 and len(list(folder.iterdir())) == 1


def test_what_differs_is_measured_anew(clock: Callable[..., Clock], folder: Path) -> None:
    counting = clock(50e-6)
    refined(None, mlp(16), candidate(INDUCTOR))
    for match, found, settings in (
        (mlp(15), candidate(INDUCTOR), ""),
        (mlp(16), candidate(INDUCTOR, block=64), ""),
        (mlp(16), candidate(INDUCTOR), "max-autotune"),
    ):
        before = counting.calls
        refined(None, match, found, tuner=measure.Tuner(H200, H200, settings))
        assert counting.calls == before + 1
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 1, "seconds": [1, 2]}', "short", "negative"])
def test_damaged_files_are_measured_again(damage: str, clock: Callable[..., Clock], folder: Path) -> None:
    counting = clock(50e-6, made_up=49e-6)
    refined(None, mlp(), candidate(INDUCTOR))
    (file,) = folder.iterdir()
    stored = json.loads(file.read_text())
    if damage == "short":
        damage = json.dumps({**stored, "seconds": stored["seconds"][:1]})
    elif damage == "negative":
        damage = json.dumps({**stored, "seconds": [-1.0, 1.0]})
    file.write_text(damage)
    assert refined(None, mlp(), candidate(INDUCTOR)).decision.verdict == "fused"
    assert counting.calls == 2 and json.loads(file.read_text()) == stored


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"", b"[" * 10**5, None])
def test_what_is_no_text_of_ours_is_measured_again(
    damage: bytes | None, clock: Callable[..., Clock], folder: Path
) -> None:
    counting = clock(50e-6, made_up=49e-6)
    refined(None, mlp(), candidate(INDUCTOR))
    (file,) = folder.iterdir()
    half = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(half if damage is None else damage)
    assert refined(None, mlp(), candidate(INDUCTOR)).decision.verdict == "fused" and counting.calls == 2


def test_processes_that_write_at_once_leave_whole_files(folder: Path) -> None:
    key, path = {"op": "mlp"}, folder / "shared.json"

    def write_and_read(number: int) -> None:
        for _ in range(100):
            measure._store(path, key, [float(number + 1)] * 500)
            found = measure._load(path, key, 500)
            if found is None or len(set(found)) != 1:
                os._exit(1)
        os._exit(0)

    children = [os.fork() or write_and_read(number) for number in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert os.listdir(folder) == ["shared.json"] and measure._load(path, {"op": "another"}, 500) is None


def test_a_folder_that_cannot_be_written_costs_only_time(clock: Callable[..., Clock], folder: Path) -> None:
    clock(50e-6, made_up=49e-6)
    folder.write_text("a file stands where the folder should be")
    assert refined(None, mlp(), candidate(INDUCTOR)).decision.verdict == "fused"


# ---- it can break nothing -----------------------------------------------------------------------
def test_a_failure_leaves_the_prediction(monkeypatch: pytest.MonkeyPatch, clock: Callable[..., Clock]) -> None:
    clock(1.0)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(measure, "_times", fail)
    tuner = measure.Tuner(H200, H200)
    assert refined(None, mlp(), candidate(0.85 * INDUCTOR), tuner=tuner).decision.reason.startswith("predicted 15 %")
    (note,) = tuner.notes
    assert note.startswith("autotune: measuring gated_mlp at ") and "(RuntimeError: out of memory)" in note
    with pytest.raises(RuntimeError, match="out of memory"):
        refined(None, mlp(), candidate(0.85 * INDUCTOR))


def compiled(fn: Callable[..., Any], *args: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Report]:
    result = torch.compile(fn, backend=fusion_compiler, options={"remainder": "eager", "autotune": True, **options})(
        *args
    )
    report = fc.last_report()
    assert report is not None
    return result, report


def heads(s: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, h, s, 32) for h in (4, 2, 2))


def test_another_machine_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_times", None)
    _, report = compiled(attention(), *heads(64), machine="h200", strict=True)
    assert any("decisions for h200 cannot be measured on the device at hand, cpu" in note for note in report.notes)
    explained = fc.explain(attention(), *heads(64), options={"autotune": True})
    assert "autotune: `explain` runs nothing, so all times are predicted" in explained.notes


def test_the_same_attention_in_every_layer_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            q = attention()(q, k, v)
        return q

    counting = Clock(2.0, **{"vendor.sdpa.cpu_flash": 1.0})
    monkeypatch.setattr(measure, "_times", counting)
    monkeypatch.setattr(measure, "CLOSE", 1e6)
    args = heads(64)
    result, report = compiled(layers, *args, strict=True)
    assert counting.calls == 1 and len(report.fused) == 3
    assert all(d.reason.startswith("measured 50 %") for d in report.fused)
    assert "measured" in str(report)
    exact = layers(*(a.double() for a in args))
    assert (result - exact).abs().max() <= 1.5 * (layers(*args) - exact).abs().max()


def test_the_device_at_hand_is_really_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stood in for: both graphs are compiled by Inductor and run, the length being symbolic."""
    monkeypatch.setattr(measure, "CLOSE", 1e6)
    args = heads(96)
    for tensor in args:
        torch._dynamo.mark_dynamic(tensor, 2)
    state = torch.get_rng_state()
    result, report = compiled(attention(), *args, strict=True)
    assert torch.equal(state, torch.get_rng_state())
    (decision,) = (d for d in report.decisions if d.pattern == "attention")
    inductor, sdpa = (o for o in decision.candidates if o.name in ("inductor", "vendor.sdpa.cpu_flash"))
    assert ("measured", True) in inductor.details and ("measured", True) in sdpa.details
    assert inductor.work is not None and sdpa.work is not None
    assert 1e-6 < inductor.work.seconds < 1 and 1e-6 < sdpa.work.seconds < 1
    assert decision.verdict == ("fused" if sdpa.work.seconds < inductor.work.seconds else "kept")
    assert any(r.lo <= 96 and (r.hi is None or r.hi >= 96) and r.verdict == decision.verdict for r in decision.ranges)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(a.double() for a in args), is_causal=True, enable_gqa=True
    )
    assert (result - exact).square().mean() <= 1.5**2 * (attention()(*args) - exact).square().mean()


# ---- regions and their inputs -------------------------------------------------------------------
def test_a_region_computes_what_it_did_in_the_graph(trace: Callable[..., torch.fx.GraphModule]) -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = torch.relu(x @ w + torch.arange(8.0))
        return h.sum(0) * 2, h

    gm = trace(fn, torch.randn(4, 8), torch.randn(8, 8))
    inside = [
        n for n in gm.graph.nodes if n.op == "call_function" and n.target is not aten.mul.Tensor and n.all_input_nodes
    ]
    region, _ = cut(inside)
    inputs = random_inputs(region, seed=0)
    assert [tuple(t.shape) for t in inputs] == [(4, 8), (8, 8)]
    h = torch.relu(inputs[0] @ inputs[1] + torch.arange(8.0))
    found, summed = sorted(region(*inputs), key=torch.Tensor.dim, reverse=True)
    torch.testing.assert_close(found, h)
    torch.testing.assert_close(summed, h.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_inputs_lie_in_memory_as_they_did(dtype: torch.dtype, trace: Callable[..., torch.fx.GraphModule]) -> None:
    gm = trace(lambda x: x[1:, ::3].t().clone(), torch.zeros(5, 9).to(dtype))
    sliced = next(n for n in gm.graph.nodes if n.target is aten.t.default)
    region, _ = cut([next(n for n in gm.graph.nodes if n.target is aten.clone.default)])
    (value,) = random_inputs(region, seed=0)
    wanted = sliced.meta["val"]
    assert (value.shape, value.stride(), value.storage_offset()) == ((3, 4), wanted.stride(), 9)
    assert value.dtype == dtype
    if not dtype.is_floating_point:
        assert set(value.flatten().tolist()) <= {0, 1}


def test_the_machine_at_hand_is_the_one_judged_for() -> None:
    assert not measure.Tuner(machine("cpu"), machine("cpu")).notes
    assert measure.Tuner(machine("h100"), H200).notes
