"""Linears of one input in one kernel with a result each: numbers in Triton's interpreter, matching, verdicts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from matmul_family_cases import BIAS, LAYER, PLAIN, RMS, SCALED, Epilogue, Operands, family
from test_matmul_family import PLANS, assert_as_good_as_eager
from triton.tools.tensor_descriptor import TensorDescriptor

import fusion_compiler as fc
from fusion_compiler import layout, splice
from fusion_compiler.fused import MatmulGroup, RowNorm
from fusion_compiler.lowering.triton_codegen import TritonCodegen
from fusion_compiler.lowering.triton_codegen.aot import constexprs
from fusion_compiler.lowering.triton_codegen.matmul import programs
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.lowering.triton_codegen.source import facts, write
from fusion_compiler.machine import machine
from fusion_compiler.match import Match, find_all
from fusion_compiler.pattern import trace
from fusion_compiler.patterns import BUILTIN
from fusion_compiler.semantics import SemanticView
from fusion_compiler.splice import load_kernel

WIDTHS = ((96, PLAIN), (32, BIAS), (64, SCALED))
QKV = next(p for p in BUILTIN if p.name == "qkv_projection")


def computed(
    m: int, k: int, less: int, norm: RowNorm | None, plan: Plan, *, runtime_m: bool, dtype: torch.dtype = torch.float16
) -> None:
    """By one kernel, and as good as eager; the results are `less` columns narrower than WIDTHS."""
    first = Operands.random(family(m, k, 8, norm, PLAIN, dtype))
    parts: list[tuple[Operands, Epilogue]] = []
    for n, epilogue in WIDTHS:
        drawn = Operands.random(family(m, k, n - less, norm, epilogue, dtype))
        parts.append((dataclasses.replace(drawn, x=first.x, norm=first.norm), epilogue))
    op = MatmulGroup(m, tuple(p.op for p, _ in parts))
    known = dataclasses.replace(facts(op, plan), m=None) if runtime_m else facts(op, plan)
    source = write(op, plan, known)
    outs = [torch.full((m, int(p.op.n)), float("nan"), dtype=dtype) for p, _ in parts]
    given = [first.x, *first.norm, *(t for p, _ in parts for t in (*p.weights, *p.extras)), *outs]
    arguments = dict(zip(source.tensors, given, strict=True)) | ({"M": m} if runtime_m else {})
    arguments |= {name: TensorDescriptor.from_tensor(arguments[name], list(block)) for name, block in source.blocks}
    load_kernel(source.text, source.name)[(programs(op, plan),)](**arguments, **constexprs(op, plan))
    for out, (operands, epilogue) in zip(outs, parts, strict=True):
        assert_as_good_as_eager(out, operands, epilogue)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("norm", [None, RMS, LAYER], ids=["plain", "rms", "layer"])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
def test_numbers(norm: RowNorm | None, plan: Plan, uneven: bool) -> None:
    computed(2, 130 if uneven else 128, 3 * uneven, norm, plan, runtime_m=uneven)


@pytest.mark.parametrize("norm", [None, RMS], ids=["plain", "rms"])
def test_tiles(norm: RowNorm | None) -> None:
    for m, less in ((70, 3), (64, 0)):
        computed(m, 136, less, norm, Plan("tile", 64, 32, 32, 4, 3, group=2), runtime_m=less > 0, dtype=torch.float32)


# ---- matching -----------------------------------------------------------------------------------
def _packed(x, q, k, v, b):
    return F.linear(x, q, b).split([8, 4], dim=-1)


def _flattened(x, q, k, v, b):
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ q.T).view(*x.shape[:-1], 2, 6), rows @ k.T, torch.mm(rows, v.T)


FOUND = {
    "q, k, v": (3, lambda x, q, k, v, b: (F.linear(x, q), F.linear(x, k), F.linear(x, v))),
    "with a bias for some": (3, lambda x, q, k, v, b: (F.linear(x, q, b), F.linear(x, k), F.linear(x, v))),
    "a bias that comes late": (2, lambda x, q, k, v, b: (F.linear(x, q, b), F.linear(x, k), F.linear(x, v, b[:4]))),
    "k and v": (2, lambda x, q, k, v, b: (F.linear(x.tanh(), q), F.linear(x, k), F.linear(x, v))),
    "flattened": (3, _flattened),
    "heads": (2, lambda x, q, k, v, b: (F.linear(x, k).unflatten(-1, (2, 2)).transpose(-2, -3), F.linear(x, v))),
    "scaled": (3, lambda x, q, k, v, b: (F.linear(x, q) * 0.125, F.linear(x, k), F.linear(x, v))),
    "read by each other": (2, lambda x, q, k, v, b: F.linear(x, k) * F.linear(x, v).softmax(-1)),
    "all feed one sum": (3, lambda x, q, k, v, b: F.linear(x, q).sum() + F.linear(x, k).sum() + F.linear(x, v).sum()),
}
NOT_FOUND = {
    "inputs differ": lambda x, q, k, v, b: (F.linear(x, q), F.linear(x + 1, k), F.linear(x.tanh(), v)),
    "packed": _packed,
    "one linear twice": lambda x, q, k, v, b: (F.linear(x, q) + 1, F.linear(x, q) * 2),
}


def _inputs(leading: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    shapes = ((*leading, 8), (12, 8), (4, 8), (4, 8), (12,))
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def _replaced(function, inputs: tuple[torch.Tensor, ...]) -> tuple[Match, object, object]:
    """The match, and what the graph gives with the group's kernel in it, and without."""
    gm = trace(function, inputs)
    wanted = gm(*inputs)
    [match], _ = find_all(SemanticView(gm), [QKV])
    candidates = TritonCodegen().candidates(match.op, machine("h200"))
    assert isinstance(candidates, list), candidates
    builder = splice.Builder(gm, match.site.place)
    for part, made in splice.emitted(candidates[0], builder, match.site):
        splice.replace(part, layout.fit(builder, part, made))
    splice.clean(gm)
    return match, gm(*inputs), wanted


@pytest.mark.parametrize("leading", [(2, 3), (1,)], ids=["rows", "one row"])
@pytest.mark.parametrize("name", FOUND)
def test_found_and_replaced(name: str, leading: tuple[int, ...]) -> None:
    parts, function = FOUND[name]
    match, got, wanted = _replaced(function, _inputs(leading))
    assert isinstance(match.op, MatmulGroup) and len(match.op.parts) == parts
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NOT_FOUND)
def test_not_found(name: str) -> None:
    assert not find_all(SemanticView(trace(NOT_FOUND[name], _inputs())), [QKV])[0]


def test_many_layers_of_one_input_are_left_apart() -> None:
    """Keys and values that every layer takes of an encoder's output would all be held at once."""
    weights = torch.randn(20, 4, 8)
    gm = trace(lambda x, w: tuple(F.linear(x, one) for one in w.unbind()), (torch.randn(3, 8), weights))
    assert not find_all(SemanticView(gm), [QKV])[0]


# ---- verdicts -----------------------------------------------------------------------------------
def _explained(function, *inputs: torch.Tensor) -> dict[str, str]:
    report = fc.explain(function, *(t.bfloat16() for t in inputs), machine="h200")
    return {d.pattern: d.verdict for d in reversed(report.decisions)} | {d.pattern: "fused" for d in report.fused}


def test_projections_behind_a_norm_share_one_kernel() -> None:
    def qkv(x, g, q, k, v):
        h = F.rms_norm(x, (1024,), g, 1e-5)
        return F.linear(h, q), F.linear(h, k), F.linear(h, v)

    weights = [torch.randn(n, 1024) for n in (1024, 256, 256)]
    verdicts = _explained(qkv, torch.randn(8, 1024), torch.randn(1024), *weights)
    assert verdicts["qkv_projection"] == "fused" and verdicts["norm_linear"] == "kept"


def test_a_gated_mlp_is_no_pair_of_linears() -> None:
    def mlp(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    verdicts = _explained(mlp, torch.randn(4, 1024), torch.randn(4096, 1024), torch.randn(4096, 1024))
    assert verdicts["gated_mlp"] == "fused" and verdicts["qkv_projection"] == "kept"


def test_a_scaled_gated_mlp_of_a_projection_is_no_linear_of_its_group() -> None:
    def fn(x, q, k, v, gate, up):
        q = F.linear(x, q)
        return 0.1 * (F.silu(F.linear(q, gate)) * F.linear(q, up)), F.linear(x, k), F.linear(x, v)

    weights = (torch.randn(n, 256) for n in (256, 64, 64, 512, 512))
    verdicts = _explained(fn, torch.randn(4, 256), *weights)
    assert verdicts["qkv_projection"] == "fused" and "linear_epilogue" in verdicts


def test_a_linear_with_a_bias_behind_a_projection_is_none_of_its_siblings() -> None:
    def fn(x, q, k, v, o, b):
        return F.linear(F.linear(x, q), o, b), F.linear(x, k), F.linear(x, v)

    gm = trace(fn, (torch.randn(6, 48), *(torch.randn(n, 48) for n in (48, 32, 32, 48)), torch.randn(48)))
    (match,) = QKV.find(SemanticView(gm))[0]
    assert {node.target for node in match.site.outputs} == {torch.ops.aten.mm.default}
    assert len({match.site.operands[0], *(n.args[0] for n in match.site.outputs)}) == 1


def test_a_sum_that_a_norm_reads_saves_no_kernel() -> None:
    """Inductor adds in the norm's kernel; fused with the linear, the norm is a kernel all the same."""

    def saving(normed: bool) -> float:
        def block(x, w, r):
            h = F.linear(x, w) + r
            return (F.rms_norm(h, (2048,)), h) if normed else h

        shapes = ((16, 8192), (2048, 8192), (16, 2048))
        report = fc.explain(block, *(torch.randn(*shape).bfloat16() for shape in shapes), machine="h200")
        [found] = [d for d in report.decisions if d.pattern == "linear_epilogue"]
        return found.saving

    assert saving(normed=False) - saving(normed=True) > 1.4e-6
