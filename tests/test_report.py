"""Reports as data, as text, as a process-wide list; and the command line that prints them."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
import sympy
import torch
from small_graphs import calls, gated_mlp, traced

import fusion_compiler as fc
from fusion_compiler import report as reporting
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.candidates import Traffic
from fusion_compiler.cli import main
from fusion_compiler.machine import TABLE
from fusion_compiler.report import Decision, Failure, NearMiss, Option, Range, Report, Verification, Work, where
from fusion_compiler.report_text import WIDTH, duration, size

VERSIONS = {"python": "3.12", "torch": "2.11"}


def decision(layer: int = 0, **changes: object) -> Decision:
    whole = Decision(
        pattern="gated_mlp",
        verdict="fused",
        reason="predicted 25 % less time: 4 kernels become 1",
        where=f"model.layers.{layer}.mlp (llama.py:175)",
        before=Work(4e6, 67e6, 1e6, 4, 24e-6),
        after=Work(4e6, 66e6, 1e6, 1, 18e-6, "Max(1, s0)"),
        candidates=(
            Option("inductor", "left to Inductor", Work(4e6, 67e6, 1e6, 4, 24e-6)),
            Option("gemv", "triton gemv", Work(4e6, 66e6, 1e6, 1, 18e-6), "s0 <= 4", details=(("tile", (16, 256)),)),
            Option("sdpa", reason="attention only"),
        ),
        kernel="triton gemv",
        source="@triton.jit",
        ranges=(Range("s0", 1, 64, "fused", "gemv", "fast"), Range("s0", 65, None, "kept", "inductor", "slow")),
        verification=Verification(1.5e-3),
        node=f"mul_{layer}",
        nodes=(f"mm_{layer}", f"mul_{layer}"),
        details=(("block", 16),),
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def report(*decisions: Decision, **more: object) -> Report:
    return Report(machine="h200", graph="graph 0", decisions=decisions, versions=VERSIONS, **more)  # type: ignore[arg-type]


# ---- as data ------------------------------------------------------------------------------------
def test_json_round_trips() -> None:
    whole = report(
        decision(0), decision(1, verdict="kept", after=None, ranges=(), verification=Verification()),
        near_misses=(NearMiss("attention", "the mask is shifted; use is_causal", "attn", "bmm"),),
        failures=(Failure("match", "KeyError: 'x'"),), notes=("it trains",),
    )  # fmt: skip
    assert Report.from_json(whole.to_json()) == whole
    assert hash(Report.from_json(whole.to_json())) == hash(whole)
    total = json.loads(whole.to_json())["total"]
    assert total == {"fused": 1, "kept": 1, "saving_seconds": pytest.approx(6e-6)}


def test_dtypes_and_sympy_become_strings_in_json() -> None:
    s = sympy.Symbol("s0", integer=True)
    work = Work.of(Traffic(2 * s, s, s, 1), s * 1e-6, {s: 10})
    assert work == Work(20, 10, 10, 1, pytest.approx(1e-5), "1.0e-6*s0")
    raw = json.loads(report(decision(details=(("dtype", torch.bfloat16), ("limit", sympy.Le(s, 4))))).to_json())
    assert raw["decisions"][0]["details"] == [["dtype", "torch.bfloat16"], ["limit", "s0 <= 4"]]


def test_reports_of_several_graphs_merge() -> None:
    first, second = report(decision(0)), dataclasses.replace(report(decision(0)), graph="graph 1")
    whole = Report.merged([first, second])
    assert whole.graph == "graph 0, graph 1" and len(whole.decisions) == 2 and whole.saving == pytest.approx(12e-6)
    assert len({d.node for d in whole.decisions}) == 2  # names of nodes are unique in a graph only
    assert Report.merged([first]) == first
    with pytest.raises(ValueError, match="different machines cannot be merged: a100, h200"):
        Report.merged([first, dataclasses.replace(second, machine="a100")])
    with pytest.raises(ValueError, match="nothing to merge"):
        Report.merged([])


def test_where_names_the_module_and_the_line() -> None:
    node = calls(traced(gated_mlp, (1, 8), (8, 8), (8, 8), dtype=torch.float32))[-1]
    node.meta["nn_module_stack"] = {"1": ("L['self'].model", object), "2": ("L['self'].model.layers.3.mlp", object)}
    node.meta["stack_trace"] = 'File "/a/b.py", line 3, in f\n  x\nFile "/a/llama.py", line 175, in forward\n  y'
    assert where(node) == "model.layers.3.mlp (llama.py:175)"
    del node.meta["nn_module_stack"]
    assert where(node) == "llama.py:175"
    node.meta["stack_trace"] = None
    assert where(node) == node.name


def test_the_reports_of_a_process_are_kept_in_order_from_all_threads() -> None:
    before = len(reporting.reports())
    threads = [threading.Thread(target=reporting.record, args=(report(decision(i)),)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    last = report(decision(99))
    reporting.record(last)
    found = reporting.reports()
    assert len(found) == before + 9 and found[-1] is last and reporting.last_report() is last
    found.clear()
    assert reporting.reports()  # the list given out is a copy


# ---- as text ------------------------------------------------------------------------------------
def test_text_fits_its_width_and_says_what_matters() -> None:
    miss = NearMiss(
        "attention", "the mask is shifted by 1; use is_causal or a top-left causal mask " * 2, "attn", "bmm"
    )
    text = str(
        report(
            decision(verification=Verification(2e-3)),
            near_misses=(miss,),
            failures=(Failure("match", "KeyError: 'x'"),),
        )
    )
    assert max(map(len, text.splitlines())) <= WIDTH == 100
    for part in (
        "fusion_compiler for h200", "torch 2.11", "24.0 µs → 18.0 µs", "68.0 MB → 67.0 MB", "4 → 1 kernel",
        "1 ≤ s0 ≤ 64: fused (gemv)", "65 ≤ s0: kept (inductor)", "2.0e-03", "Nearly matched", "Stage 'match' failed",
        "Of 1 match 1 is fused: predicted 24.0 µs → 18.0 µs, saving 6.00 µs and 3 kernel launches.",
    ):  # fmt: skip
        assert part in text, part
    assert "top-left causal" in " ".join(text.split())


def test_equal_decisions_of_many_layers_are_told_once() -> None:
    text = str(report(*(decision(i) for i in range(16))))
    assert text.count("gated_mlp") == 1 and "gated_mlp ×16" in text and "model.layers.*.mlp" in text
    assert "Of 16 matches 16 are fused: predicted 384 µs → 288 µs" in text
    layers = (decision(i, where=f"model.layers.{i} (llama.py:323)") for i in range(2))
    assert "gated_mlp ×2" in (text := str(report(*layers))) and "model.layers.* (llama.py:323)" in text
    different = str(report(decision(0), decision(1, reason="another reason")))
    assert "model.layers.0.mlp" in different and "model.layers.1.mlp" in different


def test_near_misses_of_many_layers_are_told_once() -> None:
    misses = tuple(NearMiss("rope", f"cat_{i + 1} swaps the halves", f"layers.{i}.attn (m.py:3)") for i in range(3))
    assert "rope at layers.*.attn (m.py:3) ×3: cat_1 swaps the halves" in str(report(near_misses=misses))


def test_matches_inside_a_larger_one_are_only_counted() -> None:
    inner = decision(0, pattern="norm_linear", verdict="kept", after=None, node="mm_0", nodes=("mm_0",))
    text = str(report(decision(0), inner))
    assert "Of 1 match 1 is fused" in text and "also matched: norm_linear." in text
    kept = decision(0, verdict="kept", after=None)
    assert "Of 1 match none is fused" in str(report(kept, inner))
    beside = dataclasses.replace(inner, node="other", nodes=("other",))
    assert "Of 2 matches 1 is fused" in str(report(decision(0), beside))


def test_an_empty_report_is_not_silent() -> None:
    assert "No place in this graph matched a fusion; Inductor compiles all of it." in str(report())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.234e-6, "1.23 µs"),
        (57.24e-6, "57.2 µs"),
        (999.7e-6, "1.00 ms"),
        (0.0346, "34.6 ms"),
        (2.0, "2.00 s"),
        (0, "0.00 µs"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (65_536, "65.5 kB"), (33.6e6, "33.6 MB"), (999.96e6, "1.00 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


# ---- the command line ---------------------------------------------------------------------------
MODEL = """
import torch

def mlp():
    layer = torch.nn.Sequential(torch.nn.RMSNorm(64), torch.nn.Linear(64, 32, bias=False)).to(torch.bfloat16)
    return layer.eval(), (torch.zeros(1, 64, dtype=torch.bfloat16),), {}

def wrong():
    return 3
"""


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_machines_lists_the_table_and_the_one_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["machines"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("h200", "mi300x", "cpu", "At hand:")) and max(map(len, out.splitlines())) <= 100


@pytest.mark.usefixtures("model_file")
def test_explain_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "some_model:mlp", "--machine", "h200"]) == 0
    assert "fusion_compiler for h200" in capsys.readouterr().out
    assert main(["explain", "some_model:mlp", "--machine", "a100", "--json"]) == 0
    assert Report.from_json(capsys.readouterr().out).machine == "a100"


@pytest.mark.usefixtures("model_file")
@pytest.mark.parametrize(
    ("target", "machine", "message"),
    [("some_model:mlp", "h300", "unknown machine 'h300'; known: h200"),
     ("some_model", "h200", "is not of the form MODULE:CALLABLE"),
     ("no_such_model:mlp", "h200", "cannot import 'no_such_model'"),
     ("some_model:mpl", "h200", "has no callable 'mpl'; its callables: mlp, wrong"),
     ("some_model:wrong", "h200", "must return (model, args, kwargs), not int")],
)  # fmt: skip
def test_mistakes_are_named(target: str, machine: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target, "--machine", machine]) == 2
    assert message in capsys.readouterr().err


def test_a_decision_holds_the_source_of_what_runs() -> None:
    def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ gate.T) * (x @ up.T)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        later = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        return torch.softmax((q @ k.mT * 0.125).masked_fill(later, float("-inf")), -1) @ v

    dear = dataclasses.replace(TABLE["h200"], launch_overhead=1e-3)
    for function, shapes, options, written in (
        (mlp, ((2, 64), (96, 64), (96, 64)), {"machine": dear}, "@triton.jit\ndef linear2_swap("),
        (attention, ((1, 8, 2048, 64),) * 3, {}, "aten._scaled_dot_product_flash_attention_for_cpu.default"),
    ):
        torch._dynamo.reset()
        run = torch.compile(function, backend=fusion_compiler, options={"remainder": "eager", **options})
        with torch.no_grad():
            run(*(torch.randn(shape, dtype=torch.float16 if options else torch.float32) for shape in shapes))
        made = fc.last_report()
        assert made is not None
        assert made.fused, str(made)
        assert written in made.fused[0].source
        assert not any(d.source for d in made.decisions if d.verdict == "kept")
