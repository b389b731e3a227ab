"""Patterns that users may think of around linears: declared, found, generated and run in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fusion_compiler import layout, splice
from fusion_compiler.fused import MatmulFamily
from fusion_compiler.lowering.triton_codegen import TritonCodegen
from fusion_compiler.machine import machine
from fusion_compiler.match import find_all
from fusion_compiler.pattern import Example, pattern, trace
from fusion_compiler.semantics import SemanticView

K, N = 64, 48
W = (N, K)


@dataclass(frozen=True)
class Case:
    """A pattern's function, and the shapes of its arguments: "x", "w" and "out" stand for those of the linear."""

    function: Callable[..., torch.Tensor]
    shapes: tuple[Any, ...]


CASES = {
    "residual": Case(lambda x, w, r: r + F.linear(x, w), ("x", W, "out")),
    "bias, gelu, residual": Case(lambda x, w, b, r: F.gelu(F.linear(x, w, b)) + r, ("x", W, (N,), "out")),
    "row": Case(lambda x, w, s: torch.tanh(F.linear(x, w)) * s, ("x", W, "row")),
    "column": Case(lambda x, w, s: F.silu(F.linear(x, w)) * s, ("x", W, (N,))),
    "scalar": Case(lambda x, w, s: F.relu(F.linear(x, w)) * s, ("x", W, ())),
    "all kinds": Case(
        lambda x, w, c, r, f, s: (F.linear(x, w) * c + r) * torch.sigmoid(f) - s, ("x", W, (N,), "row", "out", ())
    ),
    "where": Case(lambda x, w: torch.where((y := F.linear(x, w)) > 0.1, y, 0.2 * y), ("x", W)),
    "where on an extra": Case(lambda x, w, f: torch.where(f > 0, F.linear(x, w), f), ("x", W, "out")),
    "clamp": Case(lambda x, w, b: F.linear(x, w, b).clamp(-0.5, 0.75), ("x", W, (N,))),
    "maximum of two linears": Case(lambda x, w, v: torch.maximum(F.linear(x, w), F.linear(x, v)), ("x", W, W)),
    "three linears": Case(
        lambda x, w, v, u: F.silu(F.linear(x, w)) * F.linear(x, v) + torch.tanh(F.linear(x, u)), ("x", W, W, W)
    ),
    "one linear twice": Case(lambda x, w: (y := F.linear(x, w)) * torch.sigmoid(1.702 * y), ("x", W)),
    "softcap": Case(lambda x, w: 30 * torch.tanh(F.linear(x, w) / 30), ("x", W)),
    "mish": Case(lambda x, w: (y := F.linear(x, w)) * torch.tanh(torch.log(1 + torch.exp(y))), ("x", W)),
    "hardswish": Case(lambda x, w: F.hardswish(F.linear(x, w)), ("x", W)),
    "elu": Case(lambda x, w: F.elu(F.linear(x, w)), ("x", W)),
    "leaky_relu": Case(lambda x, w: F.leaky_relu(F.linear(x, w), 0.1), ("x", W)),
    "softplus": Case(lambda x, w: F.softplus(F.linear(x, w)), ("x", W)),
    "rational": Case(lambda x, w, b: 1 / (1 + F.linear(x, w, b).square()) ** 1.5, ("x", W, (N,))),
    "norm in front": Case(
        lambda x, g, w, r: r - F.silu(F.linear(F.rms_norm(x, (K,), g, 1e-5), w)), ("x", (K,), W, "out")
    ),
    "cast to float": Case(lambda x, w: torch.tanh(F.linear(x, w)).float(), ("x", W)),
    "cast to half": Case(lambda x, w: torch.tanh(F.linear(x, w).float()).half(), ("x", W)),
}
LEADING = {"1-D": (), "one row": (1,), "2-D": (5,), "3-D": (2, 3), "4-D": (2, 1, 2)}


def inputs_of(case: Case, leading: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    known = {"x": (*leading, K), "out": (*leading, N), "row": (*leading, 1)}
    shapes = [known[s] if isinstance(s, str) else s for s in case.shapes]
    return tuple((torch.randn(s) / (s[-1] ** 0.5 if s == W else 1)).to(dtype) for s in shapes)


def generated(case: Case, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The function with everything it does in one generated kernel."""
    declared = pattern(name="users", examples=[Example(lambda: inputs_of(case, (3,), torch.float32))])(case.function)
    graph_module = trace(case.function, inputs)
    matches, near_misses = find_all(SemanticView(graph_module), [declared])
    assert len(matches) == 1, near_misses
    [match] = matches
    assert isinstance(match.op, MatmulFamily) and not match.site.escaping
    candidates = TritonCodegen().candidates(match.op, machine("h200"))
    assert isinstance(candidates, list), candidates
    builder = splice.Builder(graph_module, match.site.output)
    splice.replace(match.site, layout.fit(builder, match.site, candidates[0].emit(builder, match.site)))
    splice.clean(graph_module)
    left = [n.target for n in graph_module.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.mm.default not in left and torch.ops.aten.addmm.default not in left
    return graph_module(*inputs)  # type: ignore[no-any-return]


def assert_as_good_as_eager(out: torch.Tensor, case: Case, inputs: tuple[torch.Tensor, ...]) -> None:
    eager = case.function(*inputs)
    assert out.shape == eager.shape and out.dtype == eager.dtype
    wanted = case.function(*(t.double() for t in inputs)).double()
    error, own = ((o.double() - wanted).norm() for o in (out, eager))
    assert error <= 1.5 * own + 1e-6 * wanted.norm(), (float(error), float(own))


@pytest.mark.parametrize("case", CASES)
def test_epilogues(case: str) -> None:
    inputs = inputs_of(CASES[case], (2, 3), torch.float16)
    assert_as_good_as_eager(generated(CASES[case], inputs), CASES[case], inputs)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("case", ["bias, gelu, residual", "all kinds", "norm in front"])
def test_ranks(case: str, leading: str) -> None:
    if case == "all kinds" and leading == "1-D":
        pytest.skip("a row of one element is a scalar")
    inputs = inputs_of(CASES[case], LEADING[leading], torch.float32)
    assert_as_good_as_eager(generated(CASES[case], inputs), CASES[case], inputs)
