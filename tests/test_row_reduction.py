"""Declared reductions of rows: found, generated, run in Triton's interpreter, compiled for every target, judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ahead_of_time
import pytest
import torch
import torch.nn.functional as F
from small_graphs import traced

import fusion_compiler as fc
from fusion_compiler import backend, layout, splice
from fusion_compiler.fused import Declared, RowReduction
from fusion_compiler.legality import Legality
from fusion_compiler.lowering.triton_codegen import TritonCodegen, row_reduction
from fusion_compiler.machine import TABLE
from fusion_compiler.match import Match, find_all
from fusion_compiler.pattern import Example, Pattern, pattern, trace
from fusion_compiler.semantics import SemanticView

N = 24
Function = Callable[..., Any]


def add_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + r
    return F.rms_norm(h, h.shape[-1:], w, 1e-5), h


def softmax_and_log(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shifted = x - x.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True)
    return shifted.exp() / total, shifted - torch.log(total)


# function, and the shapes of its arguments behind x: "x" like x, "row" one number per row, otherwise as given
CASES: dict[str, tuple[Function, tuple[Any, ...]]] = {
    "rms_norm": (lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6), ((N,),)),
    "Gemma's": (lambda x, w: F.rms_norm(x, x.shape[-1:], None, 1e-6) * (1.0 + w), ((N,),)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b), ((N,), (N,))),
    "softmax": (lambda x: torch.softmax(x * 0.5, -1), ()),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), ()),
    "maximum": (lambda x: x.abs().amax(-1), ()),
    "maximum, kept axis": (lambda x: x.abs().amax(-1, keepdim=True), ()),
    "mean and pointwise": (lambda x: torch.tanh(x.mean(-1)) * 2.0 + 1.0, ()),
    "variance": (lambda x: x.var(-1, correction=0), ()),
    "weighted sum": (lambda x, g: (x * torch.sigmoid(g)).sum(-1), ("x",)),
    "scaled to its maximum": (lambda x, r: x / x.abs().amax(-1, keepdim=True) + r, ("row",)),
    "norm, activation, residual": (
        lambda x, r, w: r + F.silu(F.rms_norm(x, x.shape[-1:], w, 1e-5)), ("x", (N,))
    ),
    "scalar": (lambda x, s: (x * s).mean(-1, keepdim=True) - x, ((),)),
    "residual and norm": (add_norm, ("x", (N,))),
    "two results": (softmax_and_log, ()),
    "row and full": (lambda x: ((x - x.mean(-1, keepdim=True)).relu(), x.amax(-1)), ()),
}  # fmt: skip


def inputs_of(case: str, leading: tuple[int, ...], dtype: torch.dtype, n: int = N) -> tuple[torch.Tensor, ...]:
    known: dict[Any, tuple[int, ...]] = {"x": (*leading, n), "row": (*leading, 1), (N,): (n,)}
    torch.manual_seed(len(case))
    return tuple(torch.randn(known.get(s, s)).to(dtype) for s in ("x", *CASES[case][1]))


def declared(case: str) -> Pattern:
    return pattern(name="users", examples=[Example(lambda: inputs_of(case, (3,), torch.float32))])(CASES[case][0])


def matched(case: str, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.fx.GraphModule, Match, RowReduction]:
    graph_module = trace(CASES[case][0], inputs)
    graph_module.graph.eliminate_dead_code()
    matches, near_misses = find_all(SemanticView(graph_module), [declared(case)])
    assert len(matches) == 1, near_misses
    [match] = matches
    assert isinstance(match.op, RowReduction), match.op
    assert not match.site.escaping and Legality(graph_module.graph).check(match.site) is None
    return graph_module, match, match.op


def generated(case: str, inputs: tuple[torch.Tensor, ...]) -> Any:
    """The function with everything it does in one generated kernel."""
    graph_module, match, op = matched(case, inputs)
    candidates = TritonCodegen().candidates(op, TABLE["h200"])
    assert isinstance(candidates, list), candidates
    builder = splice.Builder(graph_module, match.site.place)
    for part, new in splice.emitted(candidates[0], builder, match.site):
        splice.replace(part, layout.fit(builder, part, new))
    splice.clean(graph_module)
    left = {str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"}
    assert not any(name in " ".join(left) for name in ("mean", "sum", "amax", "mul", "var"))
    return graph_module(*inputs)


def assert_as_good_as_eager(out: Any, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    eager, wanted = function(*inputs), function(*(t.double() for t in inputs))
    several = isinstance(eager, tuple)
    for o, e, w in zip(out, eager, wanted, strict=True) if several else [(out, eager, wanted)]:
        assert o.shape == e.shape and o.dtype == e.dtype
        error, own = ((t.double() - w).norm() for t in (o, e))
        assert error <= 1.5 * own + 2e-7 * w.norm(), (float(error), float(own))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, (2, 3), dtype)
    assert_as_good_as_eager(generated(case, inputs), CASES[case][0], inputs)


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("case", ["layer_norm", "maximum", "residual and norm", "scaled to its maximum"])
def test_ranks(case: str, leading: tuple[int, ...]) -> None:
    inputs = inputs_of(case, leading, torch.float32)
    assert_as_good_as_eager(generated(case, inputs), CASES[case][0], inputs)


@pytest.mark.parametrize("case", ["layer_norm", "two results", "variance", "row and full", "residual and norm"])
def test_long_rows_are_walked(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_reduction, "WHOLE_ROW", 16)
    monkeypatch.setattr(row_reduction, "BLOCK", 32)
    for n in (96, 100):
        inputs = tuple(t + 5.0 for t in inputs_of(case, (3,), torch.float32, n))
        assert_as_good_as_eager(generated(case, inputs), CASES[case][0], inputs)


def test_not_a_number_stays_one() -> None:
    x = torch.randn(4, N)
    x[1, 3] = float("nan")
    assert generated("maximum", (x,)).isnan().tolist() == [False, True, False, False]


def test_rows_apart_are_read_in_place() -> None:
    wide = torch.randn(5, 2 * N)
    x, w = wide[:, :N], torch.randn(N)
    _, match, op = matched("rms_norm", (x, w))
    assert op.strides == (2 * N, 0)
    torch.testing.assert_close(generated("rms_norm", (x, w)), CASES["rms_norm"][0](x, w), rtol=1e-5, atol=1e-6)


def test_rows_spaced_unevenly_are_refused() -> None:
    x = torch.randn(N, 5).t()
    matches, _ = find_all(SemanticView(trace(CASES["softmax"][0], (x,))), [declared("softmax")])
    [match] = matches
    assert isinstance(match.op, Declared) and "not evenly spaced" in match.op.ungenerated


# ---- several results ------------------------------------------------------------------------------
def test_a_result_that_nobody_reads_is_not_written() -> None:
    x, r, w = inputs_of("residual and norm", (3,), torch.float32)
    graph_module = trace(lambda *t: add_norm(*t)[0], (x, r, w))
    [match], _ = find_all(SemanticView(graph_module), [declared("residual and norm")])
    assert match.site.others == () and len(match.op.results) == 1  # type: ignore[union-attr]


def test_the_residual_is_produced_by_the_kernel() -> None:
    """h is used again far behind the norm: it is no obstacle but a second result."""

    def block(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y, h = add_norm(x, r, w)
        return h + torch.cumsum(y, -1)

    inputs = inputs_of("residual and norm", (2, 3), torch.float32)
    graph_module = trace(block, inputs)
    [match], _ = find_all(SemanticView(graph_module), [declared("residual and norm")])
    assert len(match.site.others) == 1 and not match.site.escaping
    assert Legality(graph_module.graph).check(match.site) is None


@pytest.mark.parametrize("verify", [False, True])
def test_a_registered_kernel_with_two_results(verify: bool) -> None:
    p = declared("residual and norm")
    kernel = fc.register_kernel(p, lambda x, r, w: add_norm(x, r, w), cost=lambda *_: 1e-9, name="k")
    try:

        def block(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            y, h = add_norm(x.sin(), r, w)
            return (h * 2).cumsum(-1) + y.cumsum(-1)

        inputs = inputs_of("residual and norm", (2, 3), torch.float32)
        options = {"patterns": [p], "strict": True, "remainder": "eager", "verify": verify}
        options["disable"] = [q.name for q in fc.patterns()]
        out = torch.compile(block, backend=backend.fusion_compiler, options=options)(*inputs)
        torch.testing.assert_close(out, block(*inputs))
        made = fc.last_report()
        assert made is not None and [d.kernel for d in made.decisions] == ["k (registered)"]
    finally:
        fc.unregister_kernel(kernel)


def test_a_second_result_that_an_operand_waits_for_is_refused() -> None:
    def circular(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + r
        w = w + torch.cumsum(h, 0)[0]
        return F.rms_norm(h, h.shape[-1:], w, 1e-5), h

    inputs = inputs_of("residual and norm", (3,), torch.float32)
    graph_module = trace(circular, inputs)
    [match], _ = find_all(SemanticView(graph_module), [declared("residual and norm")])
    assert "only computed after" in (Legality(graph_module.graph).check(match.site) or "")


# ---- verdicts -------------------------------------------------------------------------------------
def decision(function: Function, *shapes: tuple[int, ...], case: str, dynamic: bool = False) -> fc.Decision:
    disabled = [q.name for q in fc.patterns()]
    options = {"patterns": [declared(case)], "machine": "h200", "strict": True, "disable": disabled}
    graph_module = traced(function, *shapes, dtype=torch.bfloat16, dynamic=dynamic)
    [made] = backend.plan(graph_module, backend.parse_options(options), "").report.decisions
    return made


def test_a_tie_is_kept_and_says_so() -> None:
    made = decision(CASES["softmax"][0], (4096, 512), case="softmax")
    assert made.verdict == "kept" and "Inductor makes one kernel of these nodes too" in made.reason
    assert "triton_rows" in [c.name for c in made.candidates]


def test_neighbours_count_for_inductor() -> None:
    """What would stand in Inductor's one kernel with its neighbours is not worth taking out of it."""

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w

    shapes = ((4096, 4096), (4096,))
    alone = decision(norm, *shapes, case="rms_norm")
    between = decision(lambda x, w: norm(x.exp(), w).sin(), *shapes, case="rms_norm")
    seconds = [next(c.work.seconds for c in d.candidates if c.name == "triton_rows") for d in (alone, between)]
    assert seconds[1] > 1.5 * seconds[0] and between.verdict == "kept"


def test_a_pointwise_prologue_is_read_through() -> None:
    made = decision(lambda x, s: torch.softmax(torch.tanh(x + s) * 0.5, -1), (4096, 4096), (4096,), case="softmax")
    after = next(c.work for c in made.candidates if c.name == "triton_rows")
    assert after is not None and after.bytes == 2 * (2 * 4096 * 4096 + 4096) and made.verdict == "fused"


def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w


def add_rms(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rms(x + r, w), x + r


@pytest.mark.parametrize(
    ("function", "rows", "n", "operands", "inductor", "ours", "verdict"),
    [
        (CASES["softmax"][0], 4096, 4096, 0, 35.3, 19.6, "fused"),
        (CASES["layer_norm"][0], 4096, 4096, 2, 26.9, 20.2, "fused"),
        (rms, 4096, 2048, 1, 12.5, 10.4, "fused"),
        (add_rms, 4096, 4096, 1, 36.6, 35.0, "kept"),
        (rms, 4096, 1024, 1, None, None, "kept"),
        (rms, 1024, 32768, 1, None, None, "kept"),
        (CASES["softmax"][0], 1024, 32768, 0, None, None, "kept"),
    ],
)
def test_verdicts_agree_with_what_was_measured(
    function: Function, rows: int, n: int, operands: int, inductor: float | None, ours: float | None, verdict: str
) -> None:
    """Microseconds on an H200, bfloat16; None where they tied or ours lost."""
    shapes = [(rows, n)] * (2 if function is add_rms else 1) + [(n,)] * operands
    graph_module = traced(function, *shapes, dtype=torch.bfloat16)
    made = backend.plan(graph_module, backend.parse_options({"machine": "h200", "strict": True}), "").report.decisions
    decided = made[-1]
    assert decided.verdict == verdict, decided.reason
    if inductor is not None:
        assert decided.before.seconds * 1e6 == pytest.approx(inductor, rel=0.25)
        [candidate] = [c for c in decided.candidates if c.name == "triton_rows"]
        assert candidate.work.seconds * 1e6 == pytest.approx(ours, rel=0.20)


def test_symbolic_rows() -> None:
    made = decision(CASES["layer_norm"][0], (64, 512), (512,), (512,), case="layer_norm", dynamic=True)
    assert "triton_rows" in [c.name for c in made.candidates]


# ---- ahead of time --------------------------------------------------------------------------------
TARGETS = {"sm_80": "a100", "sm_90": "h200", "gfx90a": "mi300x", "gfx942": "mi300x"}


def compile_all(target: str) -> list[dict[str, Any]]:
    """Runs in a process of its own, without the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fusion_compiler.lowering.triton_codegen.aot import resources

    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    found = []
    for case, n, dtype in (
        ("layer_norm", 4096, torch.bfloat16), ("residual and norm", 100, torch.float16),
        ("softmax", 16384, torch.float32), ("two results", 40000, torch.bfloat16), ("maximum", 64, torch.bfloat16),
    ):  # fmt: skip
        _, _, op = matched(case, inputs_of(case, (5,), dtype, n))
        plan = row_reduction.plan_of(op)
        tensors, numbers, constants = row_reduction.argument_names(op)
        dtypes = [*(e.dtype for e in op.extras), *op.out_dtypes]
        signature = {t: f"*{names[d]}" for t, d in zip(tensors, dtypes, strict=True)} | dict.fromkeys(numbers, "i32")
        signature |= dict.fromkeys(constants, "constexpr")
        kernel = splice.load_kernel(row_reduction.write(op, plan), row_reduction.NAME)
        source = ASTSource(kernel, signature, row_reduction.constexprs(op, plan))
        options = {"num_warps": plan.num_warps, "num_stages": 1}
        used = resources(triton.compile(source, target=gpu, options=options))
        found.append({"case": case, "spills": used.spills, "shared": used.shared})
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    found = ahead_of_time.compile_all("test_row_reduction", target)
    assert len(found) == 5
    for kernel in found:
        assert kernel["shared"] <= TABLE[TARGETS[target]].shared_memory and kernel["spills"] == 0, kernel
