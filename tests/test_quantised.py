"""Linears with packed weights: found in every spelling, right in Triton's interpreter, and judged for an H200."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from quantised_spellings import SPELLINGS, BlockByBlock, Grouped, K, OfGgml, Split, relative
from torch._dynamo.exc import BackendCompilerFailed

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.lowering.triton_codegen import packed_predict
from fusion_compiler.lowering.triton_codegen.shared_memory import within
from fusion_compiler.machine import TABLE
from fusion_compiler.quantised import recognise, storage_of

HALF = torch.float16
# bytes are dear and there is one multiprocessor, so that tiny products are worth a kernel
SLOW = dataclasses.replace(TABLE["h200"], memory_bandwidth=4e8, l2_bytes=1, num_sms=1)
FEW = dataclasses.replace(SLOW, num_sms=16)  # few enough for tiles over a tiny product to leave most of them idle
BLOCKS = ("raw bytes", "ggml.Linear", "ggml.split", "split", "rounded activations")


def compiled(model: torch.nn.Module, x: torch.Tensor, **options: object) -> tuple[torch.Tensor, fc.Report]:
    """The result on a CPU of the kernels made for an H200, and the report."""
    torch._dynamo.reset()
    settings = {"machine": SLOW, "remainder": "eager", "strict": True, "disable": ["linear_epilogue"], **options}
    with torch.no_grad():
        out = torch.compile(model, backend=fusion_compiler, options=settings)(x)
    return out, fc.last_report()


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_every_spelling_is_replaced_and_as_right_as_eager(name, rows):
    model = SPELLINGS[name]()
    x = torch.randn(rows, K, dtype=HALF)
    one_row = rows == 1 and name in BLOCKS
    out, report = compiled(model, x, machine=FEW if one_row else SLOW)
    [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
    assert decision.verdict == "fused", decision.reason
    assert ("gemv" in decision.kernel) == one_row
    reference = x.double() @ model.weight().T + model.shift()
    if name == "rounded activations":
        reference = model(x.double())
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


def test_a_row_that_is_no_power_of_two_of_blocks_is_read_to_its_end():
    model, x = Split(k=320, n=8), torch.randn(1, 320, dtype=HALF)
    out, report = compiled(model, x, machine=FEW)
    assert "gemv" in report.fused[0].kernel
    reference = x.double() @ model.weight().T
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


class GatedMlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = Split(), Split(seed=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_gated_pair_is_one_kernel(rows):
    model, x = GatedMlp(), torch.randn(rows, K, dtype=HALF)
    out, report = compiled(model, x, machine=FEW if rows == 1 else SLOW)
    [decision] = report.fused
    assert ("gemv" in decision.kernel) == (rows == 1)
    assert decision.pattern == "gated_mlp" and decision.kernel.startswith("triton packed")
    reference = F.silu(x.double() @ model.gate.weight().T) * (x.double() @ model.up.weight().T)
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


@pytest.fixture
def free_norms(monkeypatch):
    """Folding a norm is priced as measured, which is too dear for products as small as these."""
    constants = packed_predict.constants()["gemv"]
    monkeypatch.setitem(constants, "norm", 0.0)
    monkeypatch.setitem(constants, "row", {"float": 0.0, "q8_1": 0.0})


class Projections(torch.nn.Module):
    def __init__(self, k: int = K, layer: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = Split(k, 16), Split(k, 8), Split(k, 8, seed=1)
        self.norm = torch.nn.LayerNorm(k) if layer else torch.nn.RMSNorm(k, eps=1e-5)
        self.bias = torch.nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(2)))
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter += torch.randn(k, generator=torch.Generator().manual_seed(3)) / 4

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.norm(x)
        return self.q(h) + self.bias, self.k(h), self.v(h)

    def exact(self, x: torch.Tensor) -> list[torch.Tensor]:
        norm, bias = copy.deepcopy(self.norm).double(), self.bias.double()
        h = norm(x.double())
        return [h @ self.q.weight().T + bias, h @ self.k.weight().T, h @ self.v.weight().T]


@pytest.mark.parametrize(
    ("rows", "k", "layer", "activations"),
    [
        (1, K, False, "float"),
        (1, 320, True, "float"),
        (3, K, True, "float"),
        (2, K, False, "float"),
        (4, K, False, "q8_1"),
    ],
)
def test_a_norm_and_linears_of_one_input_are_one_kernel_for_few_rows(rows, k, layer, activations, free_norms):
    model, x = Projections(k, layer).to(HALF), torch.randn(rows, k, dtype=HALF)
    out, report = compiled(model, x, machine=FEW, activations=activations)
    [decision] = report.fused
    assert decision.pattern == "qkv_projection" and decision.kernel.startswith("triton packed_gemv")
    told = dict(decision.details)
    assert (told["folded norm"], told["results"]) == ("layer" if layer else "rms", 3)
    for ours, eager, exact in zip(out, model(x), model.exact(x), strict=True):
        allowed = 1.5 * relative(eager, exact) if activations == "float" else 1e-2
        assert relative(ours, exact) <= allowed


def test_a_norm_keeps_its_weight_in_float32(free_norms):
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.g = Split(), torch.nn.Parameter(torch.rand(K) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(F.rms_norm(x.float(), (K,), self.g, 1e-5).to(x.dtype))

    model, x = Normed(), torch.randn(1, K, dtype=HALF)
    out, report = compiled(model, x, machine=FEW)
    assert [dict(d.details)["folded norm"] for d in report.fused] == ["rms"]
    exact = F.rms_norm(x.double(), (K,), model.g.double(), 1e-5) @ model.linear.weight().T
    assert relative(out, exact) <= 1.5 * relative(model(x), exact)


def test_linears_of_one_input_are_separate_kernels_for_more_rows():
    model, x = Projections().to(HALF), torch.randn(5, K, dtype=HALF)
    out, report = compiled(model, x)
    assert {d.pattern for d in report.fused} == {"quantised_linear"} and len(report.fused) == 3
    [together] = [d for d in report.decisions if d.pattern == "qkv_projection"]
    assert "up to 4 rows" in str([option.reason for option in together.candidates])
    for ours, eager, exact in zip(out, model(x), model.exact(x), strict=True):
        assert relative(ours, exact) <= 1.5 * relative(eager, exact)


class Block(torch.nn.Module):
    def __init__(self, k: int = 64) -> None:
        super().__init__()
        self.linear, self.norm = Split(k, k), torch.nn.RMSNorm(k, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.gelu(self.linear(self.norm(x)))


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_a_residual_and_an_activation_are_written_with_the_product(rows, free_norms):
    model, x = Block().to(HALF), torch.randn(rows, 64, dtype=HALF)
    out, report = compiled(model, x, machine=FEW if rows < 5 else SLOW, disable=[])
    [decision] = report.fused
    assert decision.pattern == "linear_epilogue" and decision.kernel.startswith("triton packed")
    assert dict(decision.details).get("folded norm") == ("rms" if rows < 5 else None)
    h = copy.deepcopy(model.norm).double()(x.double())
    exact = x.double() + F.gelu(h @ model.linear.weight().T)
    assert relative(out, exact) <= 1.5 * relative(model(x), exact)


@pytest.mark.parametrize(("first", "stride"), [(8, K + 24), (3, K + 24), (8, K + 9)])
def test_rows_that_lie_apart_and_begin_anywhere(first, stride, free_norms):
    """Only the first of these can be read 8 bytes at a time as it is."""
    model, x = Split(n=8), torch.randn(2, stride, dtype=HALF)[:, first : first + K]
    out, report = compiled(model, x, machine=FEW)
    assert "gemv" in report.fused[0].kernel
    reference = x.double() @ model.weight().T
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


def test_blocks_of_18_bytes_are_told_how_to_be_read_faster():
    _, report = compiled(SPELLINGS["ggml.Linear"](), torch.randn(1, K, dtype=HALF), machine=FEW)
    assert "fc.ggml.split(model)" in dict(report.fused[0].details)["layout"]


def test_products_of_single_blocks_are_told_about():
    _, report = compiled(BlockByBlock(), torch.randn(3, K, dtype=HALF))
    [missed] = [n for n in report.near_misses if n.pattern == "quantised_linear"]
    assert "block by block" in missed.reason and "F.linear" in missed.reason


def test_eight_bit_weights_on_a_cpu_go_to_atens_kernel():
    model, x = SPELLINGS["integer weights"](k=512, n=512), torch.randn(4, 512, dtype=torch.bfloat16)
    model.scales = model.scales.bfloat16()
    out, report = compiled(model, x, machine="cpu")
    [decision] = report.fused
    assert "_weight_int8pack_mm" in decision.kernel
    reference = x.double() @ model.weight().T
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


def test_four_bit_weights_on_a_cpu_are_kept_and_it_is_said_what_to_do():
    model = SPELLINGS["ggml.split"]()
    x = torch.randn(4, K)
    out, report = compiled(model, x, machine="cpu")
    [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
    assert decision.verdict == "kept" and "fc.ggml.dequantise" in decision.reason
    assert fc.ggml.dequantise(model, torch.float32) == ["linear"]
    assert torch.allclose(model(x), out, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_ggmls_numerics_are_used_where_allowed(rows):
    model, x = SPELLINGS["split"](n=16), torch.randn(rows, K, dtype=HALF)
    out, report = compiled(model, x, activations="q8_1", machine=FEW)
    [decision] = report.fused
    assert dict(decision.details)["numerics"] == "Q8_1 activations"
    blocks = torch.cat([model.d.unsqueeze(-1).view(torch.uint8), model.qs], -1)
    exact = fc.ggml.exact(x, blocks.flatten(1))
    assert relative(out, exact) ** 2 <= 1e-6
    with pytest.raises(BackendCompilerFailed, match="one of float, q8_1"):
        compiled(model, x, activations="q4")


def test_activations_that_are_rounded_already_keep_their_two_kernels():
    model, x = SPELLINGS["rounded activations"](), torch.randn(1, K, dtype=HALF)
    _, report = compiled(model, x, activations="q8_1", machine=FEW)
    [decision] = report.fused
    assert "15-bit" in dict(decision.details)["numerics"]
    [told] = [n for n in report.near_misses if n.pattern == "quantised_linear"]
    assert "codes of 8 bits already" in told.reason


FIVE = ("raw bytes", "split", "rounded activations", "integer weights", "grouped")


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_each_spelling_has_a_kernel_as_right_as_eager_or_a_cure(name, dtype):
    model, x = SPELLINGS[name](k=256, n=256).to(dtype), torch.randn(2, 256, dtype=dtype)
    out, report = compiled(model, x, machine="cpu")
    [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
    if name == "integer weights" and dtype == torch.bfloat16:
        assert decision.verdict == "fused"
        reference = x.double() @ model.weight().T
        assert relative(out, reference) <= 1.5 * relative(model(x), reference)
    else:
        assert decision.verdict == "kept" and "fc.ggml.dequantise" in decision.reason
        assert torch.allclose(out, model(x))


def test_codes_take_some_hundred_rows_and_inductor_the_rest():
    said, model = {}, Split(4096, 14336)
    for m in (1, 16, 64, 128, 256, 1024):
        report = fc.explain(model, torch.randn(m, 4096, dtype=HALF), machine="h200")
        [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
        said[m] = (decision.verdict, decision.kernel, decision.reason)
    assert [said[m][0] for m in said] == ["fused"] * 5 + ["kept"]
    assert "gemv" in said[1][1] and "split16" in said[16][1] and "swap64" in said[64][1] and "tile128" in said[256][1]
    assert "compute-bound" in said[1024][2]
    report = fc.explain(Grouped(4096, 4096), torch.randn(128, 4096, dtype=HALF), machine="h200")
    [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
    assert decision.verdict == "kept" and "beyond 64 rows" in decision.reason


def test_few_features_share_k():
    for k, n in ((14336, 4096), (4096, 4096)):
        model = Split(k, n)
        for rows in (16, 64):
            report = fc.explain(model, torch.randn(rows, k, dtype=HALF), machine="h200")
            assert f"split{rows}" in report.fused[0].kernel


@pytest.mark.parametrize("rows", [65, 256])
def test_tiles_along_m_are_as_right_as_eager(rows):
    model, x = Split(n=64, k=K), torch.randn(rows, K, dtype=HALF)
    out, report = compiled(model, x, machine=dataclasses.replace(SLOW, num_sms=132))
    assert "tile128" in report.fused[0].kernel
    reference = x.double() @ model.weight().T
    assert relative(out, reference) <= 1.5 * relative(model(x), reference)


def test_rows_may_be_symbolic():
    model = Split()
    settings = {"machine": SLOW, "remainder": "eager", "strict": True, "disable": ["linear_epilogue"]}
    rows_of_any_number = torch.compile(model, backend=fusion_compiler, dynamic=True, options=settings)
    for rows in (12, 7):
        x = torch.randn(rows, K, dtype=HALF)
        with torch.no_grad():
            out = rows_of_any_number(x)
        reference = x.double() @ model.weight().T
        assert relative(out, reference) <= 1.5 * relative(model(x), reference)
    report = fc.explain(model, torch.randn(12, K, dtype=HALF), machine=SLOW, dynamic=True)
    [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
    assert (
        decision.ranges[0].verdict == "fused"
        and decision.ranges[-1].hi is None
        and decision.ranges[-1].verdict == "kept"
    )


def test_a_tile_that_does_not_fit_is_named_with_its_bytes():
    # float16 and Q8_1 copies of 32 activations, for a tile of rows by blocks; `reused`: one takes the other's place
    def bytes_of(rows: int, blocks: int, *, reused: bool = False) -> int:
        return rows * blocks * (64 if reused else 64 + 36)

    tiles = [(4, 128, False), (4, 96, False), (3, 128, False), (4, 128, True)]
    wanted = [(f"{n}×{k}", bytes_of(n, k, reused=r), (n, k, r)) for n, k, r in tiles]
    fitting, rejected = within(49152, wanted)
    assert rejected == ["4×128: 51,200 > 49,152 B of shared memory"]
    assert fitting == tiles[1:] and [b for _, b, t in wanted if t in fitting] == [38400, 38400, 32768]
    small = dataclasses.replace(TABLE["h200"], shared_memory=60_000)
    report = fc.explain(Split(4096, 4096), torch.randn(64, 4096, dtype=HALF), machine=small)
    [decision] = [d for d in report.decisions if d.pattern == "quantised_linear"]
    option = next(o for o in decision.candidates if o.name == "triton_packed")
    assert "> 60,000 B" in dict(option.details)["rejected tiles"]


def test_weights_computed_alike_are_looked_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(recognise, "storage_of", lambda *a, **k: asked.append(a) or storage_of(*a, **k))
    model, x = GatedMlp(), torch.randn(3, K, dtype=HALF)
    _, report = compiled(model, x)
    assert report.fused and len(asked) == 1
    asked.clear()
    model.up = OfGgml()
    compiled(model, x)
    assert len(asked) == 2


def test_positions_that_meet_frequencies_are_no_codes():
    def angles(frequencies, positions):
        return frequencies[:, None] @ positions[None].float()

    report = fc.explain(angles, torch.rand(8), torch.arange(16), machine="h200")
    assert not [d for d in (*report.decisions, *report.near_misses) if d.pattern == "quantised_linear"]
