"""`explain`: what would be decided, with no effect on anything."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fusion_compiler as fc
from fusion_compiler.report import Report


class Mlp(torch.nn.Module):
    def __init__(self, width: int = 2048, inner: int = 8192, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(width, inner, bias=False, dtype=dtype)
        self.up = torch.nn.Linear(width, inner, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.gate(x)) * self.up(x)


def verdicts(report: Report, pattern: str = "gated_mlp") -> list[str]:
    assert not report.failures
    return [d.verdict for d in report.decisions if d.pattern == pattern]


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    with torch.device("meta"):
        return Mlp()


@pytest.fixture(scope="module")
def wide() -> Mlp:
    """Wide enough that with many rows the matrix units are all that counts."""
    with torch.device("meta"):
        return Mlp(4096, 14336)


def row(rows: int = 1, width: int = 2048) -> torch.Tensor:
    return torch.zeros(rows, width, dtype=torch.bfloat16)


def test_a_model_on_the_meta_device_for_a_machine_that_is_not_here(wide: Mlp) -> None:
    with torch.no_grad():
        assert verdicts(fc.explain(wide, row(1, 4096), machine="h200")) == ["fused"]
        report = fc.explain(wide, row(4096, 4096), machine="h200")
    assert verdicts(report) == ["kept"]
    assert report.machine == "h200" and fc.reports() == [], "only compilations are recorded"


def test_functions_methods_partials_and_closures(mlp: Mlp) -> None:
    def closed_over(x: torch.Tensor) -> torch.Tensor:
        return mlp(x)

    def plain(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ gate.t()) * (x @ up.t())

    weights = [torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    with torch.no_grad():
        assert verdicts(fc.explain(closed_over, row(), machine="h200")) == ["fused"]
        assert verdicts(fc.explain(mlp.forward, row(), machine="h200")) == ["fused"]
        assert verdicts(fc.explain(plain, row(), *weights, machine="h200")) == ["fused"]
        assert verdicts(fc.explain(functools.partial(plain, gate=weights[0], up=weights[1]), row(), machine="h200"))


GLOBAL = torch.nn.Linear(16, 16)


def uses_global(x: torch.Tensor) -> torch.Tensor:
    return GLOBAL(x)


def test_global_modules_are_left_alone() -> None:
    GLOBAL.calls = []  # type: ignore[assignment]
    before = GLOBAL.weight
    fc.explain(uses_global, torch.randn(2, 16))
    assert GLOBAL.weight is before and not isinstance(GLOBAL.weight.data, torch._subclasses.FakeTensor)


def test_earlier_calls_do_not_make_later_ones_dynamic(mlp: Mlp) -> None:
    with torch.no_grad():
        for rows in (1, 16, 64):
            report = fc.explain(mlp, row(rows), machine="h200")
            assert all(not d.ranges for d in report.decisions)
        shapes = []

        def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            shapes.extend(type(s) for i in inputs if isinstance(i, torch.Tensor) for s in i.shape)
            return gm.forward

        small = Mlp(16, 32, torch.float32)
        fc.explain(small, torch.zeros(2, 16))
        fc.explain(small, torch.zeros(3, 16))
        torch.compile(small, backend=look)(torch.zeros(5, 16))
    assert set(shapes) == {int}


def test_a_dynamic_size_is_solved_in_ranges(wide: Mlp) -> None:
    plain, marked = row(16, 4096), row(16, 4096)
    torch._dynamo.mark_dynamic(marked, 0)
    with torch.no_grad():
        for report in (fc.explain(wide, plain, machine="h200", dynamic=True), fc.explain(wide, marked, machine="h200")):
            decision = next(d for d in report.decisions if d.pattern == "gated_mlp")
            assert decision.ranges[0].verdict == "fused" and decision.ranges[-1].verdict == "kept"
            assert decision.ranges[-1].hi is None


def llama(**changes: Any) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 256, "attn_implementation": "eager",
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**sizes, **changes})
    return config, transformers


@pytest.mark.parametrize("kind", ["StaticCache", "DynamicCache"])
def test_caches_stay_as_they_were(kind: str) -> None:
    config, transformers = llama()
    model = transformers.LlamaForCausalLM(config).eval()
    cache = getattr(transformers, kind)(config=config, **({"max_cache_len": 32} if kind == "StaticCache" else {}))
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long), past_key_values=cache)
        keys = cache.layers[0].keys
        saved, length = keys.clone(), cache.get_seq_length()
        token, position = torch.zeros(1, 1, dtype=torch.long), torch.tensor([8])
        in_arguments = fc.explain(model, token, past_key_values=cache, cache_position=position)
        closed_over = fc.explain(lambda t: model(t, past_key_values=cache, cache_position=position).logits, token)
    assert not in_arguments.failures and not closed_over.failures
    assert cache.layers[0].keys is keys and torch.equal(keys, saved) and int(cache.get_seq_length()) == int(length)


def test_a_model_of_8b_parameters_needs_no_memory() -> None:
    import resource

    config, transformers = llama(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval().bfloat16()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        report = fc.explain(model, torch.zeros(1, 1, dtype=torch.long), use_cache=False, machine="h200")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert not report.failures and verdicts(report) == ["fused"] * 4
    assert grown < 600 * 2**20, "one embedding alone would be 1 GB"


def test_what_follows_a_graph_break_is_explained_too(mlp: Mlp) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = mlp(x)
        torch._dynamo.graph_break()
        return mlp(y[:, :2048])

    with torch.no_grad():
        assert verdicts(fc.explain(broken, row(), machine="h200")) == ["fused", "fused"]


def test_control_flow_on_data_ends_the_explanation_with_a_sentence(mlp: Mlp) -> None:
    def on_data(x: torch.Tensor) -> torch.Tensor:
        y = mlp(x)
        if y.sum().item() > 0:
            return mlp(y[:, :2048])
        return y

    with torch.no_grad():
        report = fc.explain(on_data, row(), machine="h200")
    assert [d.verdict for d in report.decisions if d.pattern == "gated_mlp"] == ["fused"]
    assert [f.stage for f in report.failures] == ["capture"] and "data-dependent" in report.failures[0].error
    with pytest.raises(Exception, match="data-dependent"), torch.no_grad():
        fc.explain(on_data, row(), machine="h200", options={"strict": True})


def test_unknown_machines_are_refused(mlp: Mlp) -> None:
    with pytest.raises(ValueError, match="h200"):
        fc.explain(mlp, row(), machine="h2000")


def test_tied_weights_stay_tied() -> None:
    from fusion_compiler.torch_private.fake_copies import FakeCopies

    embedding, head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    copy = FakeCopies().of(model)
    assert copy[0].weight is copy[1].weight
    assert isinstance(copy[0].weight, torch._subclasses.FakeTensor) and copy[0].weight.requires_grad
    base = torch.randn(8)
    first, second = FakeCopies().of([base, base[2:4]])
    assert first.untyped_storage()._cdata == second.untyped_storage()._cdata and second.storage_offset() == 2


class Broken(torch.nn.Module):
    """Two graphs: the second one is that of a function that Dynamo makes of what follows the break."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(64, 64, torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mlp(x)
        torch._dynamo.graph_break()
        return self.mlp(x)


@pytest.mark.parametrize("model", [Mlp(64, 64, torch.float32), Broken()], ids=["whole", "broken"])
def test_many_explanations_leave_no_trace(model: torch.nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo gives a function up, for good and for every backend, after as many compilations as its limit allows."""
    graphs = 2 if isinstance(model, Broken) else 1
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in range(1, 5):
            assert len(verdicts(fc.explain(model, torch.randn(rows, 64)))) == graphs
        compiled: list[torch.fx.GraphModule] = []
        torch.compile(model, backend=lambda gm, inputs: compiled.append(gm) or gm.forward)(torch.randn(3, 64))
    assert len(compiled) == graphs and "recompile_limit" not in caplog.text


def test_a_softmax_found_does_not_hide_why_there_is_no_attention() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.softmax(q @ k.mT * 0.25, -1)
        return weights @ v, weights

    report = fc.explain(torch.no_grad()(attend), *torch.randn(3, 2, 4, 48, 16), machine="h200")
    assert [d.pattern for d in report.decisions] == ["softmax"]
    assert ["need_weights=False" in n.reason for n in report.near_misses if n.pattern == "attention"] == [True]
