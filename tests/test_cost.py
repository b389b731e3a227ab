"""The cost model against what was measured: one H200 (µs) and a 2-core CPU (ms), Inductor's columns."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch
from small_graphs import TWO_CORES, attention, calls, gated_mlp, layer_norm_linear, rms_linear, traced
from torch._subclasses.fake_tensor import FakeTensorMode

from fusion_compiler.algebra import Algebra
from fusion_compiler.candidates import Traffic
from fusion_compiler.cost.amounts import compiled
from fusion_compiler.cost.baseline import inductor_plan
from fusion_compiler.cost.crossover import cheapest, crossovers
from fusion_compiler.cost.roofline import (
    attention_seconds,
    attention_traffic,
    gated_mlp_activation_bytes,
    intensity,
    library_matmul_seconds,
    matmul_traffic,
    roofline,
)  # fmt: skip
from fusion_compiler.fused import Attention, Layout, Mask, MatmulFamily
from fusion_compiler.machine import machine

H200 = machine("h200")
BF16 = torch.bfloat16


def family(m: int, n: int, k: int, weights: int = 2) -> MatmulFamily:
    value = Algebra().make("acc", index=0)
    return MatmulFamily(m, k, n, weights, None, value, (), BF16, BF16)


def flash(b: int, h: int, hk: int, lq: int, lk: int, d: int, mask: Mask, dtype: torch.dtype = BF16) -> Attention:
    same = Layout((), (), (), (), dtype)
    return Attention(b, h, hk, lq, lk, d, d, d**-0.5, mask, dtype, (same,) * 3, same)


CAUSAL = Mask("causal")
TENSOR = Mask("tensor", tensor="additive")
NO_MASK = Mask("none")


# ---- what Inductor makes of nodes ---------------------------------------------------------------
@pytest.mark.parametrize(
    ("k", "n", "m", "measured"),
    [(2048, 8192, 1, 22.8), (2048, 8192, 16, 22.7), (2048, 8192, 64, 24.8), (2048, 8192, 256, 32.5),
     (2048, 8192, 1024, 118.5), (2048, 8192, 4096, 447), (4096, 14336, 1, 67.1), (4096, 14336, 16, 62.3),
     (4096, 14336, 256, 94.2), (4096, 14336, 1024, 373), (4096, 14336, 4096, 1480)],
)  # fmt: skip
def test_gated_mlp_under_inductor(k: int, n: int, m: int, measured: float) -> None:
    plan = inductor_plan(calls(traced(gated_mlp, (m, k), (n, k), (n, k), dtype=BF16)), H200)
    assert plan.seconds * 1e6 == pytest.approx(measured, rel=0.08)
    assert [kernel.kind for kernel in plan.kernels] == ["matmul", "pointwise", "matmul"]


@pytest.mark.parametrize(("m", "measured"), [(1, 18.2), (16, 18.0), (256, 25.1), (4096, 321)])
def test_norm_and_linear_under_inductor(m: int, measured: float) -> None:
    plan = inductor_plan(calls(traced(rms_linear, (m, 4096), (4096,), (6144, 4096), dtype=BF16)), H200)
    assert plan.seconds * 1e6 == pytest.approx(measured, rel=0.15)
    assert plan.traffic.launches == 2


def test_layer_norm_and_linear_under_inductor() -> None:
    plan = inductor_plan(calls(traced(layer_norm_linear, (1, 4096), (4096,), (4096,), (4096, 4096), dtype=BF16)), H200)
    assert plan.seconds * 1e6 == pytest.approx(15.1, rel=0.10)


@pytest.mark.parametrize(
    ("b", "h", "hk", "lq", "lk", "softcap", "measured"),
    [(4, 32, 32, 1024, 1024, None, 343), (4, 32, 32, 2048, 2048, None, 2080), (4, 32, 32, 2048, 2048, 50.0, 2393),
     (1, 32, 8, 8192, 8192, None, 7458), (1, 32, 8, 1, 8192, None, 101), (16, 32, 8, 1, 4096, None, 619)],
)  # fmt: skip
def test_attention_under_inductor(
    b: int, h: int, hk: int, lq: int, lk: int, softcap: float | None, measured: float
) -> None:
    gm = traced(attention(softcap), (b, h, lq, 128), (b, hk, lk, 128), (b, hk, lk, 128), dtype=BF16)
    assert inductor_plan(calls(gm), H200).seconds * 1e6 == pytest.approx(measured, rel=0.20)


@pytest.mark.parametrize(
    ("dtype", "s", "measured"),
    [(torch.float32, 2048, 346), (BF16, 2048, 153), (torch.float32, 512, 4.75), (BF16, 512, 2.8)],
)
def test_attention_under_inductor_on_a_cpu(dtype: torch.dtype, s: int, measured: float) -> None:
    gm = traced(attention(), (1, 8, s, 64), (1, 2, s, 64), (1, 2, s, 64), dtype=dtype)
    assert inductor_plan(calls(gm), TWO_CORES).seconds * 1e3 == pytest.approx(measured, rel=0.20)


@pytest.mark.parametrize(
    ("k", "n", "m", "us"),
    [(8192, 2048, 256, 20.5), (2048, 2048, 256, 6.6), (4096, 4096, 192, 17.2), (14336, 4096, 256, 48.6)],
)
def test_a_library_that_splits_k_reads_small_tiles_and_leaves_sums(k: int, n: int, m: int, us: float) -> None:
    assert library_matmul_seconds(m, n, k, BF16, H200) * 1e6 == pytest.approx(us, rel=0.15)


def test_traffic_of_the_plan_is_counted_from_the_graph() -> None:
    m, n, k = 4, 2048, 4096
    traffic = inductor_plan(calls(traced(gated_mlp, (m, k), (n, k), (n, k), dtype=BF16)), H200).traffic
    weights, x, hidden = 2 * n * k * 2, m * k * 2, m * n * 2
    assert traffic.bytes_read == weights + 2 * x + 2 * hidden  # each matmul reads x; one kernel reads both results
    assert traffic.bytes_written == 3 * hidden
    assert traffic.flops == pytest.approx(2 * 2 * m * n * k, rel=0.01)


def test_repeated_keys_and_values_are_materialised_and_views_are_free() -> None:
    gm = traced(attention(), (1, 32, 1, 128), (1, 8, 8192, 128), (1, 8, 8192, 128), dtype=BF16)
    plan = inductor_plan(calls(gm), H200)
    copies = [k for k in plan.kernels if k.kind == "pointwise"]
    cache = 8 * 8192 * 128 * 2
    assert [(k.traffic.bytes_read, k.traffic.bytes_written) for k in copies] == [(cache, 4 * cache)] * 2
    assert plan.traffic.launches == 5  # two copies, two matmuls, one softmax


def test_a_mask_of_constants_costs_nothing() -> None:
    gm = traced(attention(), (4, 32, 1024, 128), (4, 32, 1024, 128), (4, 32, 1024, 128), dtype=BF16)
    softmax = next(k for k in inductor_plan(calls(gm), H200).kernels if k.kind == "reduction")
    scores = 4 * 32 * 1024 * 1024 * 2
    assert (softmax.traffic.bytes_read, softmax.traffic.bytes_written) == (scores, scores)


def test_long_rows_are_read_once_per_reduction_and_once_more() -> None:
    shape = (4, 32, 2048, 128)
    plan = inductor_plan(calls(traced(attention(), shape, shape, shape, dtype=BF16)), H200)
    softmax = next(k for k in plan.kernels if k.kind == "reduction")
    assert softmax.traffic.bytes_read == 3 * softmax.traffic.bytes_written


def test_a_pointwise_result_read_before_and_after_a_matmul_does_not_merge_across_it() -> None:
    def residual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = torch.relu(x)
        return torch.relu(h @ w.T + h)

    plan = inductor_plan(calls(traced(residual, (64, 256), (256, 256), dtype=BF16)), H200)
    assert [k.kind for k in plan.kernels] == ["pointwise", "matmul", "pointwise"]
    assert plan.kernels[2].traffic.bytes_read == 2 * 64 * 256 * 2


def test_a_called_attention_is_priced_as_a_flash_kernel() -> None:
    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=True)

    gm = torch.fx.symbolic_trace(sdpa)
    with FakeTensorMode():
        value = torch.empty(4, 32, 2048, 128, dtype=BF16)
    for node in gm.graph.nodes:
        node.meta["val"] = value
    (node,) = calls(gm)
    node.target = torch.ops.aten.scaled_dot_product_attention.default
    assert inductor_plan([node], H200).seconds == pytest.approx(296e-6, rel=0.1)


# ---- fused kernels ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "b", "h", "hk", "s", "measured"),
    [("cudnn", 4, 32, 32, 1024, 90), ("cudnn", 4, 32, 32, 2048, 296), ("cudnn", 1, 32, 8, 8192, 1019),
     ("flash", 4, 32, 32, 1024, 153), ("flash", 4, 32, 32, 2048, 491), ("flash", 1, 32, 8, 8192, 1754),
     ("flex", 4, 32, 32, 1024, 137), ("flex", 4, 32, 32, 2048, 419), ("flex", 1, 32, 8, 8192, 1409)],
)  # fmt: skip
def test_causal_attention_kernels(backend: str, b: int, h: int, hk: int, s: int, measured: float) -> None:
    seconds = attention_seconds(flash(b, h, hk, s, s, 128, CAUSAL), H200, backend)
    assert float(seconds) * 1e6 == pytest.approx(measured, rel=0.07)


@pytest.mark.parametrize(
    ("b", "h", "hk", "s", "measured"), [(4, 32, 32, 1024, 218), (4, 32, 32, 2048, 832), (1, 32, 8, 8192, 3408)]
)
def test_a_mask_tensor_costs_every_score(b: int, h: int, hk: int, s: int, measured: float) -> None:
    seconds = attention_seconds(flash(b, h, hk, s, s, 128, TENSOR), H200, "cudnn")
    assert float(seconds) * 1e6 == pytest.approx(measured, rel=0.07)


@pytest.mark.parametrize(("b", "lk", "measured"), [(1, 8192, 14.8), (16, 4096, 64.5)])
def test_decode_attention(b: int, lk: int, measured: float) -> None:
    seconds = attention_seconds(flash(b, 32, 8, 1, lk, 128, NO_MASK), H200, "cudnn")
    assert float(seconds) * 1e6 == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(
    ("hk", "lq", "lk", "mask", "measured"),
    [
        (8, 4, 8192, TENSOR, 166),
        (8, 16, 8192, TENSOR, 174),
        (8, 4, 8192, NO_MASK, 98.9),
        (32, 64, 262144, TENSOR, 5926),
    ],
    ids=str,
)
def test_few_queries_of_few_heads_leave_multiprocessors_idle(
    hk: int, lq: int, lk: int, mask: Mask, measured: float
) -> None:
    seconds = attention_seconds(flash(1, 32, hk, lq, lk, 128, mask), H200, "cudnn")
    assert float(seconds) * 1e6 == pytest.approx(measured, rel=0.12)


@pytest.mark.parametrize(
    ("kernel", "b", "h", "d", "lq", "lk", "kind", "measured"),
    [
        ("efficient", 1, 16, 64, 1, 1024, "tensor", 60.4),  # predicted as 4.4 once, and chosen
        ("efficient", 1, 16, 128, 1, 1024, "tensor", 45.1),
        ("efficient", 1, 32, 128, 1, 4096, "tensor", 173.3),
        ("efficient", 8, 16, 64, 8, 1024, "tensor", 65.0),
        ("efficient", 1, 16, 64, 512, 512, "causal", 25.0),
        ("efficient", 2, 32, 96, 1024, 1024, "causal", 139.3),
        ("flash", 1, 16, 64, 512, 512, "causal", 13.5),
        ("flash", 1, 16, 128, 512, 512, "none", 21.0),
        ("cudnn", 1, 16, 64, 512, 512, "causal", 10.1),
        ("cudnn", 8, 16, 64, 512, 512, "tensor", 46.9),
    ],
)
def test_attention_of_few_heads(
    kernel: str, b: int, h: int, d: int, lq: int, lk: int, kind: str, measured: float
) -> None:
    mask = {"tensor": TENSOR, "causal": CAUSAL, "none": NO_MASK}[kind]
    seconds = attention_seconds(flash(b, h, h, lq, lk, d, mask), H200, kernel)
    assert 0.5 < seconds * 1e6 / measured < 2


@pytest.mark.parametrize(
    ("dtype", "s", "measured"),
    [(torch.float32, 2048, 38), (BF16, 2048, 40), (torch.float32, 512, 4.78), (BF16, 512, 6.3)],
)
def test_attention_kernel_of_a_cpu(dtype: torch.dtype, s: int, measured: float) -> None:
    seconds = attention_seconds(flash(1, 8, 2, s, s, 64, CAUSAL, dtype), TWO_CORES, "cpu_flash")
    assert float(seconds) * 1e3 == pytest.approx(measured, rel=0.1)


def test_an_unknown_attention_backend_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'cudnn' on cpu; there is: cpu_flash, math"):
        attention_seconds(flash(1, 8, 2, 512, 512, 64, CAUSAL), TWO_CORES, "cudnn")


def test_unfused_attention_is_far_slower_than_a_flash_kernel() -> None:
    op = flash(4, 32, 32, 2048, 2048, 128, CAUSAL)
    assert float(attention_seconds(op, H200, "math")) > 4 * float(attention_seconds(op, H200, "cudnn"))


def test_causal_halves_the_arithmetic_and_an_offset_adds_to_it() -> None:
    full = attention_traffic(flash(1, 1, 1, 1024, 1024, 64, NO_MASK)).flops
    assert attention_traffic(flash(1, 1, 1, 1024, 1024, 64, CAUSAL)).flops == full / 2
    shifted = flash(1, 1, 1, 1024, 2048, 64, Mask("causal", offset=1024))
    assert attention_traffic(shifted).flops == 1.5 * full
    unknown = flash(1, 1, 1, 1024, 2048, 64, Mask("causal", position=True, tensor="additive"))
    assert attention_traffic(unknown).flops == 2 * full


# ---- the gated MLP's strategies -----------------------------------------------------------------
def test_activation_traffic_of_the_two_known_strategies() -> None:
    traffic = gated_mlp_activation_bytes(4, 2048, 2)
    assert traffic == {"vector": 65_536, "matmul": 32_768, "kernel": 0}
    assert 1 - traffic["matmul"] / traffic["vector"] == 0.5


@pytest.mark.parametrize("m", [1, 4, 16])
def test_intensity_with_weights_counted_is_about_m(m: int) -> None:
    assert float(intensity(matmul_traffic(family(m, 2048, 4096)))) == pytest.approx(m, rel=0.02)


def test_one_kernel_reads_everything_once() -> None:
    traffic = matmul_traffic(family(4, 2048, 4096))
    assert traffic == Traffic(2 * 2 * 4 * 2048 * 4096, 2 * (4 * 4096 + 2 * 2048 * 4096), 2 * 4 * 2048, 1)


# ---- roofline -----------------------------------------------------------------------------------
def test_roofline_takes_the_slower_of_arithmetic_and_memory() -> None:
    memory = roofline(Traffic(1, 4.3e12, 0, 0), H200, BF16)
    compute = roofline(Traffic(790e12, 1, 0, 0), H200, BF16)
    assert memory == pytest.approx(1.0) and compute == pytest.approx(1.0)
    assert roofline(Traffic(0, 4.3e12, 0, 3), H200, BF16) == pytest.approx(1.0 + 3 * H200.launch_overhead)


def test_bytes_in_l2_are_cheaper() -> None:
    traffic = Traffic(0, 4.3e12, 0, 0)
    assert roofline(traffic, H200, BF16, l2_bytes=4.3e12) == pytest.approx(4.3 / 7.0)


def test_a_broken_wave_costs_a_whole_one() -> None:
    traffic = Traffic(790e12, 1, 0, 0)
    whole = roofline(traffic, H200, BF16, blocks=132)
    assert roofline(traffic, H200, BF16, blocks=133) == pytest.approx(whole * 2 * 132 / 133)
    assert roofline(traffic, H200, BF16, blocks=264, blocks_per_sm=2) == pytest.approx(whole)
    assert roofline(Traffic(0, 0, 0, 0), H200, BF16, blocks=300, wave_latency=1e-6) == pytest.approx(3e-6)


def test_few_blocks_cannot_draw_the_full_bandwidth() -> None:
    traffic = Traffic(0, 4.3e12, 0, 0)
    assert roofline(traffic, H200, BF16, blocks=33) == pytest.approx(2.0)
    assert roofline(traffic, H200, BF16, blocks=66) == pytest.approx(1.0)


def test_symbolic_and_plain_sizes_give_the_same_times() -> None:
    m = sympy.Symbol("m", integer=True, positive=True)
    op = dataclasses.replace(family(1, 8192, 2048), m=1)
    for size in (1, 16, 64, 300, 4096):
        traffic = matmul_traffic(dataclasses.replace(op, m=size))
        plain = roofline(traffic, H200, BF16, efficiency=0.8, blocks=size * 3)
        symbolic = roofline(
            Traffic(2 * 2 * m * 2048 * 8192, 2 * (m * 2048 + 2 * 2048 * 8192), 2 * m * 8192, 1),
            H200, BF16, efficiency=0.8, blocks=m * 3,
        )  # fmt: skip
        assert float(symbolic.subs(m, size)) == pytest.approx(plain)
        library = library_matmul_seconds(m, 8192, 2048, BF16, H200)
        assert float(library.subs(m, size)) == pytest.approx(library_matmul_seconds(size, 8192, 2048, BF16, H200))


def test_a_plan_with_a_symbolic_size_agrees_with_the_static_ones() -> None:
    gm = traced(gated_mlp, (64, 2048), (8192, 2048), (8192, 2048), dtype=BF16, dynamic=True)
    seconds = inductor_plan(calls(gm), H200).seconds
    (symbol,) = seconds.free_symbols
    for m in (16, 256, 4096):
        static = inductor_plan(calls(traced(gated_mlp, (m, 2048), (8192, 2048), (8192, 2048), dtype=BF16)), H200)
        assert float(seconds.subs(symbol, m)) == pytest.approx(static.seconds)


# ---- crossovers ---------------------------------------------------------------------------------
S = sympy.Symbol("s", integer=True, positive=True)


def test_crossover_of_two_lines_is_exact() -> None:
    assert crossovers(10 + 3 * S, 100 + 2 * S, S, 1, 1000) == [(1, 90, "a"), (91, 1000, "b")]


def test_crossover_of_piecewise_costs() -> None:
    roof = sympy.Max(100, S * S / 10, evaluate=False)
    assert crossovers(roof, 99 + sympy.ceiling(S / 64), S, 1, 5000) == [(1, 31, "a"), (32, 5000, "b")]


def test_integer_arithmetic_of_torch_in_a_size() -> None:
    from torch.utils._sympy.functions import FloorDiv

    n = sympy.Symbol("n", integer=True, positive=True)
    assert compiled(FloorDiv(n + 3, 4) + 1, n)(10) == 4.0


def test_one_winner_is_one_range() -> None:
    assert crossovers(S, S + 1, S, 2, 77) == [(2, 77, "a")]


def test_validity_bounds_a_range() -> None:
    spans = cheapest([100 + S, S], S, 1, 1000, valid=[True, sympy.Le(S, 64)])
    assert [(s.lo, s.hi, s.winner) for s in spans] == [(1, 64, 1), (65, 1000, 0)]


def test_no_valid_way_is_an_error() -> None:
    with pytest.raises(ValueError, match="no way is valid"):
        cheapest([S], S, 1, 10, valid=[sympy.Gt(S, 5)])
