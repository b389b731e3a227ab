"""The backend as a whole, with a stand-in for the judge: options, modes, failures, caches, training, verification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from fusion_compiler import backend, report, splice
from fusion_compiler.candidates import Candidate, Traffic
from fusion_compiler.config import OptionError
from fusion_compiler.fused import Site
from fusion_compiler.match import Match
from fusion_compiler.report import Decision, Work

aten = torch.ops.aten
WORK = Work(1.0, 1.0, 1.0, 1, 1.0)
FASTER = Work(1.0, 1.0, 1.0, 1, 0.5)


class Tanh:
    """A pattern for tanh(x · 2), found by hand."""

    name = "doubled_tanh"
    function = staticmethod(lambda x: torch.tanh(x * 2))
    examples = ()

    @staticmethod
    def find(view: Any) -> tuple[list[Match], list[Any]]:
        found = []
        for out in view.graph_module.graph.find_nodes(op="call_function", target=aten.tanh.default):
            mul = out.args[0]
            if mul.target is aten.mul.Tensor and mul.args[1] == 2:
                escaping = (mul,) if len(mul.users) > 1 else ()
                found.append(Match("doubled_tanh", None, Site((mul.args[0],), out, (mul, out), escaping)))
        return found, []


def emit_sum(builder: splice.Builder, site: Site) -> torch.fx.Node:
    x = site.operands[0]
    return builder.call(aten.tanh.default, builder.call(aten.add.Tensor, x, x))


Verdicts = tuple[list[backend.Judged], tuple[str, ...]]


def fuse_everything(emit: Callable[..., Any]) -> Callable[..., Verdicts]:
    def judge_all(gm: GraphModule, matches: list[Match], *_: Any, **__: Any) -> Verdicts:
        candidate = Candidate("sum", "aten", Traffic(1, 1, 1, 1), 0.5, emit)
        decision = Decision("doubled_tanh", "fused", "it pays", "here", WORK, FASTER, kernel="aten")
        return [backend.Judged(decision, m.site, candidate) for m in matches], ()

    return judge_all


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "judge_all", fuse_everything(emit_sum))


def compiled(fn: Callable[..., Any], remainder: str = "eager", **options: Any) -> Callable[..., Any]:
    given = {"patterns": [Tanh], "remainder": remainder, "strict": True, **options}
    return torch.compile(fn, backend=backend.fusion_compiler, options=given)


def targets(gm: GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def doubled_tanh(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * 2) + 1


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_what_is_fused_computes_the_same_and_is_reported(remainder: str) -> None:
    x = torch.randn(4, 8)
    torch.testing.assert_close(compiled(doubled_tanh, remainder)(x), doubled_tanh(x), rtol=1e-6, atol=1e-6)
    made = report.last_report()
    assert made is not None and [d.verdict for d in made.decisions] == ["fused"]
    assert made.machine == "cpu" and not made.failures


def test_several_fusions_in_a_row_read_each_other() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(x * 2)
        return x

    x = torch.randn(4)
    torch.testing.assert_close(compiled(fn)(x), fn(x), rtol=1e-6, atol=1e-6)
    made = report.last_report()
    assert made is not None and len(made.fused) == 3


def test_input_mutations_survive() -> None:
    def fn(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache[1:].copy_(torch.tanh(x * 2))
        return cache.sum()

    x, a, b = torch.randn(3), torch.zeros(4), torch.zeros(4)
    torch.testing.assert_close(compiled(fn)(a, x), fn(b, x))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_training_has_eager_s_gradients(remainder: str) -> None:
    x = torch.randn(4, 8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(doubled_tanh, remainder)(ours).sum().backward()
    doubled_tanh(theirs).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    made = report.reports()
    assert len(made) == 2 and made[1].graph == f"{made[0].graph} (backward)"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_reach_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def look(gm: GraphModule, example_inputs: Any, **context: Any) -> Callable[..., Any]:
        config = torch._inductor.config
        seen.update(cudagraphs=config.triton.cudagraphs, max_autotune=config.max_autotune)
        return backend.inductor.run_eagerly(gm)

    monkeypatch.setattr(backend.inductor, "compile_aten", look)
    x = torch.randn(4)
    result = torch.compile(doubled_tanh, backend=backend.fusion_compiler, mode=mode)(x)
    torch.testing.assert_close(result, doubled_tanh(x))
    wanted = torch._inductor.list_mode_options(mode)
    assert seen["cudagraphs"] == wanted.get("triton.cudagraphs", False)
    assert seen["max_autotune"] == wanted.get("max_autotune", False)
    assert backend.parse_options({"mode": mode}).mode == mode


def test_settings_hold_when_the_backward_is_compiled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(gm: GraphModule, example_inputs: Any, **context: Any) -> Callable[..., Any]:
        seen.append((context.get("is_backward", False), torch._inductor.config.max_fusion_size))
        return backend.inductor.run_eagerly(gm)

    monkeypatch.setattr(backend.inductor, "compile_aten", look)
    x = torch.randn(4, requires_grad=True)
    loss = compiled(doubled_tanh, "inductor", inductor={"max_fusion_size": 7})(x).sum()
    loss.backward()
    assert seen == [(False, 7), (True, 7)]


def broken(builder: splice.Builder, site: Site) -> torch.fx.Node:
    builder.call(aten.neg.default, site.operands[0])
    raise RuntimeError("no kernel for this")


def of_another_shape(builder: splice.Builder, site: Site) -> torch.fx.Node:
    return builder.call(aten.sum.default, site.operands[0])


@pytest.mark.parametrize(("emit", "words"), [(broken, "no kernel for this"), (of_another_shape, "has shape")])
def test_a_failing_stage_leaves_the_graph_to_inductor(
    emit: Callable[..., Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "judge_all", fuse_everything(emit))
    x = torch.randn(4)
    torch.testing.assert_close(compiled(doubled_tanh, strict=False)(x), doubled_tanh(x))
    made = report.last_report()
    assert made is not None and not made.fused
    assert made.failures[0].stage == "splice" and words in made.failures[0].error
    assert "failed" in made.decisions[0].reason
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=words):
        compiled(doubled_tanh, strict=True)(x)


@pytest.mark.parametrize("stage", ["raise", "match", "judge", "select"])
def test_every_stage_may_fail(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("out of order")

    name = {"raise": "SemanticView", "match": "find_all", "judge": "judge_all", "select": "choose"}[stage]
    monkeypatch.setattr(backend, name, fail)
    x = torch.randn(4)
    torch.testing.assert_close(compiled(doubled_tanh, strict=False)(x), doubled_tanh(x))
    made = report.last_report()
    assert made is not None and made.failures == (report.Failure(stage, "ValueError: out of order"),)


def test_a_kernel_that_inductor_cannot_compile_is_taken_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend.inductor.compile_aten

    def refuse_sums(gm: GraphModule, example_inputs: Any, **context: Any) -> Callable[..., Any]:
        if any(n.target is aten.add.Tensor and n.args[0] is n.args[1] for n in gm.graph.nodes):
            raise RuntimeError("out of shared memory")
        return real(gm, example_inputs, **context)

    monkeypatch.setattr(backend.inductor, "compile_aten", refuse_sums)
    x = torch.randn(4)
    torch.testing.assert_close(compiled(doubled_tanh, "inductor", strict=False)(x), doubled_tanh(x))
    made = report.last_report()
    assert made is not None and made.failures[0].stage == "compile" and not made.fused


def test_a_warm_cache_gives_the_same_report() -> None:
    x = torch.randn(6, 8)
    texts, hits = [], []
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled(doubled_tanh, "inductor")(x)
        made = report.last_report()
        assert made is not None
        texts.append([(d.pattern, d.verdict, d.reason) for d in made.decisions])
        hits.append(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
    assert texts[0] == texts[1] and texts[0]
    assert hits[1] == 1


def test_disabled_patterns_are_left_out() -> None:
    x = torch.randn(4)
    for disable in ("doubled_tanh", ["doubled_tanh"], "all"):
        torch._dynamo.reset()
        compiled(doubled_tanh, disable=disable)(x)
        made = report.last_report()
        assert made is not None and made.decisions == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"machines": "h200"}, r"unknown option 'machines' \(did you mean 'machine'\?\); options are machine, verify"),
        ({"machine": "h20"}, r"option 'machine' cannot be 'h20' .*h200"),
        ({"remainder": "triton"}, "option 'remainder' .* inductor, eager"),
        ({"disable": ["attentoin"]}, r"'attentoin' \(did you mean 'attention'\?\)"),
        ({"verify": 1}, "option 'verify' is True or False, not 1"),
        ({"mode": "fastest"}, "option 'mode' .* reduce-overhead"),
        ({"patterns": "attention"}, "option 'patterns' is a sequence"),
        ({"inductor": ["max_autotune"]}, "mapping of Inductor's settings"),
        ({"inductor": {"triton.cudagraph": True}}, r"'triton.cudagraph' \(did you mean 'triton.cudagraphs'\?\)"),
        ({"inductor": {"max_autotune": "no"}}, "'max_autotune' is True or False, not 'no'"),
    ],
)
def test_wrong_options_say_what_exists(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        backend.parse_options(options)


def test_later_torch_passes_further_arguments() -> None:
    def call(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        return backend.fusion_compiler(gm, inputs, options={"remainder": "eager"}, name="of a later torch")

    x = torch.randn(4)
    torch.testing.assert_close(torch.compile(doubled_tanh, backend=call)(x), doubled_tanh(x))


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
def test_verification_records_the_error(remainder: str) -> None:
    x = torch.randn(64)
    fn = compiled(doubled_tanh, remainder, verify=True)
    torch.testing.assert_close(fn(x), doubled_tanh(x), rtol=1e-6, atol=1e-6)
    made = report.last_report()
    assert made is not None and made.decisions[0].error is not None and made.decisions[0].error < 1e-6


def test_verification_refuses_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(builder: splice.Builder, site: Site) -> torch.fx.Node:
        return builder.call(aten.tanh.default, site.operands[0])

    monkeypatch.setattr(backend, "judge_all", fuse_everything(wrong))
    x = torch.randn(64)
    with pytest.raises(Exception, match=r"here: error .* more than rounding"):
        compiled(doubled_tanh, verify=True)(x)
    torch._dynamo.reset()
    compiled(doubled_tanh, verify=True, strict=False)(x)
    made = report.last_report()
    assert made is not None and made.decisions[0].error is not None and made.decisions[0].error > 0.1


def test_the_losing_fusion_names_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge_all(gm: GraphModule, matches: list[Match], *_: Any, **__: Any) -> Verdicts:
        (match,) = matches
        candidate = Candidate("sum", "aten", Traffic(1, 1, 1, 1), 0.5, emit_sum)
        big = Decision("doubled_tanh", "fused", "it pays", "here", WORK, FASTER)
        small = Decision("other", "fused", "it pays too", "there", WORK, Work(1, 1, 1, 1, 0.9))
        return [backend.Judged(small, match.site, candidate), backend.Judged(big, match.site, candidate)], ()

    monkeypatch.setattr(backend, "judge_all", judge_all)
    compiled(doubled_tanh)(torch.randn(4))
    made = report.last_report()
    assert made is not None and [d.verdict for d in made.decisions] == ["kept", "fused"]
    assert "doubled_tanh at here takes some of the same nodes" in made.decisions[0].reason
