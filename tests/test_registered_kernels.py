"""Kernels that users register for patterns: their arguments, their cost, and what is said of wrong ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from declared_patterns import declared, found, linear_cube, tensors
from small_graphs import traced

import fusion_compiler as fc
from fusion_compiler import backend, kernels, registry, report
from fusion_compiler.fused import Declared
from fusion_compiler.lowering.registered import RegisteredKernels
from fusion_compiler.machine import machine
from fusion_compiler.pattern import Pattern, RecognisedPattern, trace
from fusion_compiler.registry import KernelError
from fusion_compiler.variants import PatternError

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(autouse=True)
def _empty_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_disabled", set())
    monkeypatch.setattr(kernels, "_kernels", {})


def linear_softplus(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    act: Any = fc.choice(F.relu, torch.tanh),  # noqa: B008
    beta: float = 2.0,
) -> torch.Tensor:
    return act(F.linear(x, w, b)) * beta


def softplus_pattern() -> Pattern:
    return declared(linear_softplus, *tensors((3, 8), (4, 8), (4,)))


def fast(machine: Any, *arguments: Any) -> float:
    return 1e-9


def run(fn: Callable[..., Any], p: Pattern, *inputs: torch.Tensor, **options: Any) -> tuple[torch.Tensor, fc.Report]:
    given = {"patterns": [p], "strict": True, "remainder": "eager", "verify": True, **options}
    out = torch.compile(fn, backend=backend.fusion_compiler, options=given)(*inputs)
    made = report.last_report()
    assert made is not None
    return out, made


FORMS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], Any]] = {
    "2-D": (lambda x, w: torch.tanh(x @ w.T) * 3.0, ((6, 8), (4, 8)), (None, torch.tanh, 3.0)),
    "3-D, bias": (lambda x, w, b: 0.5 * F.relu(F.linear(x, w, b)), ((2, 3, 8), (4, 8), (4,)), ("b", F.relu, 0.5)),
    "stored transposed": (lambda x, w: torch.tanh(x @ w) * 3.0, ((6, 8), (8, 4)), (None, torch.tanh, 3.0)),
    "square, transposed": (lambda x, w: torch.tanh(x @ w) * 3.0, ((6, 8), (8, 8)), (None, torch.tanh, 3.0)),
    "one row": (lambda x, w, b: (x @ w.T + b).relu() * 3, ((1, 8), (4, 8), (4,)), ("b", F.relu, 3.0)),
    "4-D": (lambda x, w: 2 * F.relu(F.linear(x, w)), ((2, 1, 3, 8), (4, 8)), (None, F.relu, 2.0)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_gets_the_arguments_of_the_pattern(form: str) -> None:
    fn, shapes, (bias, act, beta) = FORMS[form]
    calls: list[tuple[Any, ...]] = []

    def kernel(x: Any, w: Any, b: Any, act: Any, beta: float) -> torch.Tensor:
        calls.append((b, act, beta))
        return act(F.linear(x, w, b)) * beta

    p = softplus_pattern()
    fc.register_kernel(p, kernel, cost=fast)
    calls.clear()
    inputs = tensors(*shapes)
    out, made = run(fn, p, *inputs)
    mine = [d for d in made.decisions if d.pattern == p.name]
    assert [(d.verdict, d.kernel) for d in mine] == [("fused", "kernel (registered)")]
    assert calls and (calls[0][0] is None) == (bias is None)
    assert calls[0][1] is act and calls[0][2] == pytest.approx(beta)
    wanted = fn(*(t.double() for t in inputs))
    assert (out - wanted).abs().max() <= 1.5 * (fn(*inputs) - wanted).abs().max() + 1e-7


def test_half_precision_and_a_cast_behind() -> None:
    p = softplus_pattern()
    fc.register_kernel(p, lambda x, w, b, act, beta: act(F.linear(x, w, b)) * beta, cost=fast, name="k")
    x, w = (t.half() for t in tensors((2, 3, 8), (4, 8)))

    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ w.T) * 3.0).float()

    out, made = run(fn, p, x, w)
    assert [d.verdict for d in made.decisions] == ["fused"] and out.dtype == torch.float32
    torch.testing.assert_close(out, fn(x, w))


def test_a_custom_operator_stays_one_node_and_a_composition_is_opened() -> None:
    @torch.library.custom_op("fusion_compiler_tests::cubed", mutates_args=())
    def cubed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w) ** 3

    cubed.register_fake(lambda x, w: x.new_empty(*x.shape[:-1], w.shape[0]))
    for kernel, expected in ((cubed, {"cubed"}), (lambda x, w: F.linear(x, w).pow_(3), {"mm", "pow"})):
        p = declared(linear_cube, *tensors((3, 8), (4, 8)))
        registered = fc.register_kernel(p, kernel, cost=fast, name="k")
        graph_module = trace(linear_cube, tensors((3, 8), (4, 8)))
        options = backend.parse_options({"patterns": [p], "strict": True})
        backend.splice_all(graph_module, backend.plan(graph_module, options, "").chosen, options)
        names = {str(n.target).split(".")[-2] for n in graph_module.graph.nodes if n.op == "call_function"}
        assert expected <= names and ("mm" in names) == ("mm" in expected)
        fc.unregister_kernel(registered)


def test_kernels_compete_on_cost() -> None:
    p = softplus_pattern()
    fc.register_kernel(p, lambda x, w, b, act, beta: act(F.linear(x, w, b)) * beta, name="slow", cost=lambda *_: 1.0)
    _, made = run(FORMS["2-D"][0], p, *tensors((6, 8), (4, 8)))
    [decision] = made.decisions
    assert decision.verdict == "kept" and "registered.slow" in [c.name for c in decision.candidates]
    fc.register_kernel(p, lambda x, w, b, act, beta: act(F.linear(x, w, b)) * beta, name="quick", cost=fast)
    torch._dynamo.reset()
    _, made = run(FORMS["2-D"][0], p, *tensors((6, 8), (4, 8)))
    assert made.decisions[0].kernel == "quick (registered)"


def test_without_a_cost_traffic_is_counted() -> None:
    p = softplus_pattern()
    fc.register_kernel(p, lambda x, w, b, act, beta: act(F.linear(x, w, b)) * beta, name="k")
    [match], _ = found(p, FORMS["2-D"][0], *tensors((6, 8), (4, 8)))
    op = next(op for op, _ in match.alternatives if isinstance(op, Declared))
    target = machine("h200")
    [candidate] = RegisteredKernels().candidates(op, target)  # type: ignore[misc]
    assert candidate.traffic.bytes_read == 4 * (6 * 8 + 4 * 8) and candidate.traffic.bytes_written == 4 * 6 * 4
    assert candidate.traffic.flops == 2 * 6 * 8 * 4 and candidate.traffic.launches == 1
    assert candidate.seconds == pytest.approx(target.launch_overhead, rel=0.01)


def test_a_kernel_for_other_machines_is_named() -> None:
    p = softplus_pattern()
    fc.register_kernel(p, lambda x, w, b, act, beta: act(F.linear(x, w, b)) * beta, name="k", machines=["h200", "rocm"])
    _, made = run(FORMS["2-D"][0], p, *tensors((6, 8), (4, 8)))
    assert "k is for h200, rocm" in made.decisions[0].reason


@pytest.mark.parametrize("form", ["3-D, bias", "stored transposed"])
def test_all_sizes_symbolic(form: str) -> None:
    fn, shapes, _ = FORMS[form]
    p = softplus_pattern()
    fc.register_kernel(p, lambda x, w, b, act, beta: act(F.linear(x, w, b)) * beta, name="k", cost=fast)
    given = {"patterns": [p], "strict": True, "remainder": "eager"}
    compiled = torch.compile(fn, backend=backend.fusion_compiler, options=given, dynamic=True)
    for rows in (6, 7):
        inputs = tensors((*shapes[0][:-2], rows, 8), *shapes[1:])
        torch.testing.assert_close(compiled(*inputs), fn(*inputs))
    [made] = fc.reports()
    assert made.decisions[0].kernel == "k (registered)"


def test_a_symbolic_batch() -> None:
    p = softplus_pattern()
    fc.register_kernel(p, lambda x, w, b, act, beta: act(F.linear(x, w, b)) * beta, name="k", machines=["h200"])
    gm = traced(FORMS["2-D"][0], (6, 2048), (2048, 2048), dtype=torch.bfloat16, dynamic=True)
    options = backend.parse_options({"patterns": [p], "strict": True, "machine": "h200"})
    [decision] = backend.plan(gm, options, "").report.decisions
    assert "registered.k" in [c.name for c in decision.candidates]


def test_a_pattern_without_a_linear() -> None:
    def softsign(x: torch.Tensor) -> torch.Tensor:
        return x / (1 + x.abs())

    p = declared(softsign, *tensors((3, 8)))
    _, made = run(lambda x: softsign(x * 3), p, *tensors((5, 8)))
    assert made.decisions[0].verdict == "kept" and "Inductor makes one kernel" in made.decisions[0].reason
    fc.register_kernel(p, F.softsign, cost=fast, name="aten")
    torch._dynamo.reset()
    x = torch.randn(5, 8)
    out, made = run(lambda x: softsign(x * 3), p, x)
    assert made.decisions[0].kernel == "aten (registered)"
    torch.testing.assert_close(out, softsign(x * 3))


def test_sizes_are_proved_before_a_kernel_runs() -> None:
    """The first half of x in the pattern is not the first four columns of a wider x."""

    def first_half(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x.chunk(2, dim=-1)[0])

    p = declared(first_half, *tensors((3, 8)))
    fc.register_kernel(p, lambda x: torch.exp(x.chunk(2, dim=-1)[0]), cost=fast, name="k")
    assert len(found(p, lambda x: torch.exp(x[:, :4]), *tensors((3, 8)))[0]) == 1
    matches, [miss] = found(p, lambda x: torch.exp(x[:, :4]), *tensors((3, 16)))
    assert not matches and "computes something else" in miss.reason


def test_gemmas_weight_is_not_mistaken_for_a_plain_one() -> None:
    def normed(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], w, eps)

    p = declared(normed, *tensors((3, 8), (8,)))
    fc.register_kernel(p, lambda x, w, eps: F.rms_norm(x, x.shape[-1:], w, eps), cost=fast, name="k")
    assert len(found(p, lambda x, w: F.rms_norm(x, (8,), w, 1e-4), *tensors((3, 8), (8,)))[0]) == 1
    matches, _ = found(p, lambda x, w: F.rms_norm(x, (8,), None, 1e-4) * (1 + w), *tensors((3, 8), (8,)))
    assert not matches


WRONG_KERNELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "too few parameters": (lambda x, w: x, {}, "must take 5 arguments, x, w, b, act, beta"),
    "shape": (
        lambda x, w, b, act, beta: x,
        {},
        r"returns float32 \[3, 8\].*where the pattern returns float32 \[3, 4\]",
    ),
    "dtype": (lambda x, w, b, act, beta: F.linear(x, w).half(), {}, "returns float16"),
    "several": (lambda x, w, b, act, beta: (x, w), {}, r"returns \(float32 .*\), where the pattern returns|returns \("),
    "does not run": (lambda x, w, b, act, beta: w @ x, {}, "does not run"),
    "no such machine": (lambda x, w, b, act, beta: F.linear(x, w), {"machines": ["h20"]}, "no machine 'h20'.*'h200'"),
}


@pytest.mark.parametrize("case", WRONG_KERNELS)
def test_wrong_kernels(case: str) -> None:
    kernel, further, message = WRONG_KERNELS[case]
    with pytest.raises(KernelError, match=message):
        fc.register_kernel(softplus_pattern(), kernel, **further)


def test_kernels_need_a_pattern_and_a_name_of_their_own() -> None:
    with pytest.raises(PatternError, match="no pattern 'gated_mpl'.*'gated_mlp'"):
        fc.register_kernel("gated_mpl", lambda x: x)
    with pytest.raises(KernelError, match="'own' is recognised by code of its own"):
        fc.register_kernel(RecognisedPattern("own", torch.relu, lambda view: ([], [])), torch.relu)
    p = softplus_pattern()
    fc.register_kernel(p, linear_softplus, name="k")
    with pytest.raises(ValueError, match="has a kernel 'k' already"):
        fc.register_kernel(p, linear_softplus, name="k")


def test_a_kernel_of_another_shape_than_its_example_showed_is_not_used() -> None:
    p = declared(linear_cube, *tensors((3, 8), (4, 8)))
    fc.register_kernel(p, lambda x, w: (F.linear(x, w) ** 3)[:3], cost=fast, name="k")
    given = {"patterns": [p], "remainder": "eager"}
    inputs = tensors((5, 8), (4, 8))
    out = torch.compile(linear_cube, backend=backend.fusion_compiler, options=given)(*inputs)
    torch.testing.assert_close(out, linear_cube(*inputs))
    made = report.last_report()
    assert made is not None and "kernel 'k' returns" in made.failures[0].error


# ---- the README -----------------------------------------------------------------------------------
def _blocks(section: str) -> Iterator[str]:
    text = README.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    yield from re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="the README's kernel is oneDNN's")
def test_the_readme_adds_a_fusion_in_15_lines() -> None:
    [block] = _blocks("Adding a fusion")
    assert sum(bool(line) for line in block.splitlines()) <= 15
    names: dict[str, Any] = {}
    exec(block, names)

    def model(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.tanh(b + x @ w.T)

    inputs = torch.randn(2, 256, 64), torch.randn(1024, 64) / 8, torch.randn(1024)
    options = {"strict": True, "remainder": "eager"}
    out = torch.compile(model, backend=backend.fusion_compiler, options=options)(*inputs)
    made = report.last_report()
    assert made is not None and [d.kernel for d in made.decisions] == ["linear_tanh (registered)"]
    wanted = model(*(t.double() for t in inputs))
    assert (out - wanted).abs().max() <= 1.5 * (model(*inputs) - wanted).abs().max()
    half = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, 4096), (4096, 4096), (4096,))]
    [decision] = fc.explain(model, *half, machine="h200").decisions
    assert decision.verdict == "fused" and decision.kernel.startswith("triton")
