"""transformers models: every site is found or has a sentence, and what is fused agrees with eager."""

from __future__ import annotations

import pytest
import torch
from model_runs import DEAR_LAUNCHES, STARVED, call, compiled, error
from model_sites import KINDS, Account, account, present
from model_zoo import DECODERS, MODELS, build

import fusion_compiler as fc

# Sites of two layers that are not matched, and words of the sentence that says why.
NOT_FOUND = {
    ("mixtral", "gated_mlp"): (2, "a weight for each batch"),
    ("deepseek_v2", "gated_mlp"): (1, "a weight for each batch"),
    ("t5", "norm_linear"): (1, "this is a product"),  # the head scales the norm's result
    ("bert", "norm_linear"): (1, "part of a LayerNorm"),  # the pooler reads the first token
    ("vit", "norm_linear"): (1, "part of a LayerNorm"),
    ("whisper", "norm_linear"): (4, "breaks its graph"),  # on torch 2.11
    ("opt", "norm_linear"): (1, "breaks its graph"),  # when it decodes
    ("opt", "add_norm"): (2, "breaks its graph"),  # likewise
}
# Not listed anywhere: two norms before one attention, latent keys, one norm before two branches
OTHERS = ("cohere", "deepseek_v2", "gptj")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everything(name: str, found: Account) -> None:
    """Every site is found, or is one of those known not to be and has its sentence."""
    assert not found.silent
    for site, reason in found.told:
        count, words = NOT_FOUND[name, site.kind]
        assert words in reason
        assert sum(s.kind == site.kind for s, _ in found.told) <= count
    assert sum(found.of(kind)[0] for kind in KINDS) > 0


@pytest.mark.parametrize("name", (*MODELS, *OTHERS))
def test_prompt(name):
    model, make = call(name, "prompt")
    sites = present(model, make())
    assert error(model, compiled(model, **STARVED), make) <= 1.5
    everything(name, account(sites, fc.reports()))
    for decision in (d for r in fc.reports() for d in r.decisions):
        assert decision.reason and decision.where


@pytest.mark.parametrize("name", [n for n in DECODERS if n in MODELS])
def test_decoding_with_a_static_cache(name):
    model, make = call(name, "decode")
    sites = present(model, make())
    assert error(model, compiled(model, **STARVED), make) <= 1.5
    everything(name, account(sites, fc.reports()))


@pytest.mark.parametrize(("name", "kind"), [("llama", "decode"), ("phi3", "prompt"), ("gpt2", "prompt")])
def test_generated_kernels(name, kind):
    model, make = call(name, kind, torch.float16)
    assert error(model, compiled(model, **DEAR_LAUNCHES), make) <= 1.5
    assert {d.pattern for r in fc.reports() for d in r.fused} >= {"norm_linear"}


@pytest.mark.parametrize(("name", "marked"), [("bert", (0,)), ("phi3", (1,)), ("llama", (0, 1))])
@torch.no_grad()
def test_symbolic_sizes(name, marked):
    model, make_inputs = build(name)
    inputs = make_inputs()
    sites = present(model, inputs)
    for dim in marked:
        torch._dynamo.mark_dynamic(inputs["input_ids"], dim)
    everything(name, account(sites, [fc.explain(model, machine="h200", **inputs)]))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@torch.no_grad()
def test_every_size_symbolic(name):
    """dynamic=True makes inputs also of the numbers that modules and globals hold: a norm's eps, a head's width, π."""
    model, make_inputs = build(name)
    inputs = make_inputs()
    sites = present(model, inputs)
    everything(name, account(sites, [fc.explain(model, machine="h200", dynamic=True, **inputs)]))


def test_generating_with_a_static_cache():
    """Greedy tokens are eager's, with a graph for the prompt and one for the steps."""
    model, make_inputs = build("llama")
    ids = make_inputs()["input_ids"]
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static", "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    model.forward = compiled(model.forward, **STARVED)
    assert model.generate(ids, **settings).equal(expected)
    assert any(d.pattern == "attention" for r in fc.reports() for d in r.fused)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing):
    model, make_inputs = build("llama")
    ids = make_inputs()["input_ids"]
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()

    def gradients(run):
        model.zero_grad()
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for got, want in zip(gradients(compiled(model, **STARVED)), gradients(model), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
