"""What only a GPU can show: generated and vendor kernels inside Inductor's graphs, CUDA graphs, models, packages.

Everything is fused that can be: the machine is the one at hand, told that starting a kernel costs a millisecond.
"""

from __future__ import annotations

import copy
import dataclasses
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_runs import call, compiled, error
from model_zoo import DECODERS, MODELS, build
from quantised_spellings import SPELLINGS
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.machine import machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

Function = Callable[..., Any]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def dear() -> dict[str, Any]:
    return {"machine": dataclasses.replace(machine(), launch_overhead=1e-3), "strict": True}


def through(fn: Function, dynamic: bool | None = None, mode: str | None = None, **options: Any) -> Function:
    given = dear() | options | ({"mode": mode} if mode else {})
    return torch.compile(fn, backend=fusion_compiler, dynamic=dynamic, options=given)


def fused() -> list[str]:
    return [d.pattern for r in fc.reports() for d in r.fused]


def agree(got: Any, eager: Any, exact: Any, case: str = "") -> None:
    """Errors against float64 are at most 1.5 times eager's own."""
    parts = [torch.utils._pytree.tree_leaves(part) for part in (got, eager, exact)]
    assert len(set(map(len, parts))) == 1
    for g, e, x in zip(*parts, strict=True):
        assert g.shape == e.shape and g.dtype == e.dtype, case
        assert g.isnan().equal(e.isnan()), case
        g, e, x = (t.double().nan_to_num() for t in (g, e, x))
        own = (e - x).norm() + 1e-7 * x.norm()
        assert (g - x).norm() <= 1.5 * own, (case, float((g - x).norm() / own))


def wide(tensors: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tensors)


def check(fn: Function, inputs: tuple[Any, ...], run: Function | None = None, **options: Any) -> None:
    """`fn` fused, against `fn` as eager computes it and in float64."""
    with torch.no_grad():
        agree((run or through(fn, **options))(*inputs), fn(*inputs), fn(*wide(inputs)))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, device="cuda")).to(dtype)


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()  # the reference stays in float64


def rms(x: Tensor, g: Tensor) -> Tensor:
    return (upcast(x) * torch.rsqrt(upcast(x).square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * g


# ---- the matmul family ---------------------------------------------------------------------------
def glu(x: Tensor, g: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    h = rms(x, g)
    return F.silu(F.linear(h, gate)) * F.linear(h, up)


def layer_norm_linear(x: Tensor, g: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], g), w, b)


def linear_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_matmul_family_at_every_number_of_rows(dtype: torch.dtype) -> None:
    k, n = 520, 200
    cases: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
        "gated_mlp": (glu, (randn(k, dtype=dtype), *(randn(n, k, dtype=dtype, scale=k**-0.5) for _ in range(2)))),
        "norm_linear": (
            layer_norm_linear,
            (randn(k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5), randn(n, dtype=dtype)),
        ),
        "linear_epilogue": (linear_gelu, (randn(n, k, dtype=dtype, scale=k**-0.5), randn(n, dtype=dtype))),
    }
    for name, (fn, operands) in cases.items():
        for m in (1, 2, 5, 16, 17, 64, 100, 300):
            torch._dynamo.reset()
            before = len(fc.reports())
            check(fn, (randn(m, k, dtype=dtype), *operands), remainder="eager")
            made = fc.reports()[before:]
            found = {d.pattern: d.verdict for r in made for d in r.decisions}
            assert found.get(name) == "fused" or m > 16 or dtype == torch.float32, (m, *map(str, made))


def test_one_compilation_serves_every_number_of_rows() -> None:
    operands = (randn(64), randn(96, 64, scale=0.1), randn(96, 64, scale=0.1))
    run = through(glu)
    for m in (16, 2, 3, 5, 17, 64, 65, 128, 1, 300):
        x = randn(m, 64)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        check(glu, (x, *operands), run)
    assert "gated_mlp" in fused() and len(fc.reports()) <= 4  # two ranges of rows, and one row by itself


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode: str) -> None:
    operands = (randn(64), randn(96, 64, scale=0.1), randn(96, 64, scale=0.1))
    run = through(glu, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        check(glu, (randn(3, 64), *operands), run)
    assert fused() == ["gated_mlp"]


def test_autotune_and_verify() -> None:
    inputs = (randn(3, 64), randn(64), randn(96, 64, scale=0.1), randn(96, 64, scale=0.1))
    check(glu, inputs, autotune=True)
    torch._dynamo.reset()
    check(glu, inputs, verify=True)
    (decision,) = fc.last_report().fused
    assert decision.error is not None and not decision.verification.wrong


def test_training() -> None:
    inputs = (randn(3, 64), randn(64), randn(96, 64, scale=0.1), randn(96, 64, scale=0.1))

    def gradients(fn: Function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        fn(*leaves).sum().backward()
        return [t.grad for t in leaves]

    agree(gradients(through(glu), inputs), gradients(glu, inputs), gradients(glu, wide(inputs)))


# ---- patterns of users ------------------------------------------------------------------------------
def test_a_declared_fusion_gets_a_generated_kernel() -> None:
    def linear_tanh(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, w, b))

    example = fc.Example(lambda: (torch.randn(4, 8), torch.randn(16, 8), torch.randn(16)))
    declared = fc.pattern(name="linear_tanh", examples=[example])(linear_tanh)
    inputs = (randn(2, 3, 64), randn(96, 64, scale=0.1), randn(96))
    for form in (linear_tanh, lambda x, w, b: (x @ w.T + b).tanh()):
        torch._dynamo.reset()
        check(form, inputs, patterns=[declared])
        assert "linear_tanh" in [d.pattern for d in fc.last_report().fused]


# ---- rows ------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_rows_on_their_own(mode: str) -> None:
    def rows(x: Tensor, r: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        h = x + r
        return rms(h, g), h, torch.softmax(x * 0.5, -1), F.layer_norm(r, r.shape[-1:], g)

    slow = dataclasses.replace(machine(), memory_bandwidth=1e9, l2_bandwidth=1e9)
    for width in (24, 1000, 4096, 16384):
        torch._dynamo.reset()
        check(rows, (randn(5, width), randn(5, width), randn(width)), mode=mode, machine=slow)
    assert {"softmax", "norm"} <= set(fused())


# ---- attention ------------------------------------------------------------------------------------
def heads(length: int, dtype: torch.dtype, batch: int = 2, kv_heads: int = 2, dim: int = 64) -> tuple[Tensor, ...]:
    shapes = [(batch, 4, length, dim), *[(batch, kv_heads, length, dim)] * 2]
    return tuple(randn(*s, dtype=dtype) for s in shapes)


def attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, fill: float = -torch.inf) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, fill)
    return torch.softmax(upcast(scores), -1).to(q.dtype) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1))


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = (torch.arange(n, device=q.device) for n in (q.shape[2], k.shape[2]))
    return attention(q, k, v, (j > i[:, None]) | (j <= i[:, None] - 17))


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.tanh(q @ k.mT * q.shape[-1] ** -0.5 / 20.0) * 20.0
    i = torch.arange(q.shape[2], device=q.device)
    return torch.softmax(scores.masked_fill(i > i[:, None], -torch.inf), -1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    i = torch.arange(q.shape[2], device=q.device)
    slopes = 2.0 ** -(torch.arange(q.shape[1], device=q.device) + 1.0)
    bias = (slopes[:, None, None] * (i - i[:, None])).to(q.dtype)
    return torch.softmax((q @ k.mT * q.shape[-1] ** -0.5 + bias).masked_fill(i > i[:, None], -torch.inf), -1) @ v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fn", [attention, causal, window, softcap, alibi])
def test_attention(fn: Function, dtype: torch.dtype) -> None:
    for length, dim in ((129, 64), (77, 80), (1, 64)):
        torch._dynamo.reset()
        check(fn, heads(length, dtype, dim=dim))
    if fn in (attention, causal):
        assert "attention" in fused() or dtype == torch.float32


@pytest.mark.parametrize("fn", [attention, causal, window])
def test_attention_of_symbolic_lengths(fn: Function) -> None:
    run = through(fn, dynamic=True)
    for length in (128, 129, 64, 17, 300, 1):
        check(fn, heads(length, torch.bfloat16), run)


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("shape", [(2, 1, 1, 96), (1, 4, 96, 96)])
def test_masks_of_unknown_values_with_rows_that_see_nothing(shape: tuple[int, ...], fill: float) -> None:
    hidden = torch.rand(shape, device="cuda") < 0.5
    hidden[:, :, -1] = True
    check(lambda q, k, v, m: attention(q, k, v, m, fill), (*heads(96, torch.bfloat16), hidden))


def test_decoding_reads_no_further_than_the_cache_is_filled() -> None:
    """One graph for all positions: the length is a number on the device."""

    def step(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return attention(q, k, v, torch.arange(k.shape[2], device=q.device) > position)

    for dtype in (torch.bfloat16, torch.float16):
        torch._dynamo.reset()
        run = through(step, mode="reduce-overhead")
        _, k, v = heads(320, dtype)
        for position in (0, 1, 15, 16, 63, 64, 200, 319):
            torch.compiler.cudagraph_mark_step_begin()
            inputs = (randn(2, 4, 1, 64, dtype=dtype), k, v, torch.tensor([position], device="cuda"))
            check(step, inputs, run)
    assert "attention" in fused()


# ---- models ---------------------------------------------------------------------------------------
def on_the_gpu(name: str, kind: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[[], dict[str, Any]]]:
    model, make = call(name, kind, dtype)

    def moved() -> dict[str, Any]:
        inputs = make()
        for layer in getattr(inputs.get("past_key_values"), "layers", ()):
            for field, value in list(vars(layer).items()):
                if isinstance(value, Tensor):
                    setattr(layer, field, value.cuda())
            layer.device = torch.device("cuda")
        return torch.utils._pytree.tree_map_only(Tensor, Tensor.cuda, inputs)

    return model.cuda(), moved


@pytest.mark.parametrize("kind", ["prompt", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, kind: str) -> None:
    if kind == "decode" and name not in DECODERS:
        pytest.skip("no static cache")
    model, make = on_the_gpu(name, kind, torch.bfloat16)
    assert error(model, compiled(model, machine=dear()["machine"]), make) <= 1.5
    assert fused()


def test_generating_with_a_static_cache() -> None:
    """Not in reduce-overhead mode: there Inductor alone dies of a segmentation fault (torch 2.11)."""
    model, make_inputs = build("llama")
    ids = make_inputs()["input_ids"].cuda()
    model.cuda()
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **settings, disable_compile=True)
    model.forward = through(model.forward)
    assert model.generate(ids, **settings, disable_compile=True).equal(expected)
    assert "gated_mlp" in fused()


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="no early start")
def test_generated_kernels_start_before_the_last_one_has_ended() -> None:
    x, g, gate, up = randn(4, 64), torch.ones(64, device="cuda", dtype=torch.bfloat16), randn(96, 64), randn(96, 64)
    torch._dynamo.reset()

    def chained(x: Tensor, g: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return glu(glu(x, g, gate, up)[:, :64], g, gate, up)

    with torch.no_grad():
        inputs = (x, g, gate, up)
        got, (code,) = run_and_get_code(through(chained), *inputs)
        agree(got, chained(*inputs), chained(*wide(inputs)))
    assert code.count("griddepcontrol.wait") == code.count("'launch_pdl': True") > 0


# ---- packages -------------------------------------------------------------------------------------
class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = torch.nn.Parameter(torch.ones(64))
        self.gate, self.up = (torch.nn.Linear(64, 96, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return glu(x, self.g, self.gate.weight, self.up.weight)


def test_a_package_names_the_generated_kernel(tmp_path: Any) -> None:
    module = Mlp().to("cuda", torch.bfloat16).eval()
    program = torch.export.export(module, (randn(4, 64),))
    path = fc.aoti_compile_and_package(program, package_path=tmp_path / "mlp.pt2", options=dear())
    (decision,) = fc.last_report().fused
    assert decision.pattern == "gated_mlp"
    with zipfile.ZipFile(path) as package:
        held = [n for n in package.namelist() if n.endswith(".cpp")]
        assert decision.source.count("def ") == 1
        name = decision.source.split("def ")[-1].split("(")[0].encode()
        assert any(name in package.read(n) for n in held), (name, held)
        assert any(n.endswith(".cubin") for n in package.namelist())


def test_copies_of_a_module_on_the_cpu_and_the_gpu() -> None:
    module = Mlp().eval()
    twin = copy.deepcopy(module).cuda()
    x = torch.randn(3, 64)
    for m, inputs in ((module, x), (twin, x.cuda())):
        torch._dynamo.reset()
        run = torch.compile(m, backend=fusion_compiler, options={"strict": True})
        with torch.no_grad():
            torch.testing.assert_close(run(inputs), m(inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", SPELLINGS)
def test_packed_weights(name: str, dtype: torch.dtype) -> None:
    model = SPELLINGS[name](1024, 512)
    weight, shift = model.weight().cuda(), torch.as_tensor(model.shift()).cuda()
    model.cuda()
    for rows in (1, 5, 12, 64):
        torch._dynamo.reset()
        x = torch.randn(rows, 1024, device="cuda", dtype=dtype)
        with torch.no_grad():
            got = through(model)(x)
            agree(got, model(x), x.double() @ weight.T + shift, f"{rows} rows")
        assert fc.last_report().fused
