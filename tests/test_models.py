"""transformers models: every site is found or has a sentence, and what is fused agrees with eager."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from model_zoo import DECODERS, MODELS, build, present, static_cache

import fusion_compiler as fc
from fusion_compiler.machine import cpu_machine

# On a machine with next to no memory bandwidth whatever saves traffic pays, so that what can be fused here is.
STARVED = dataclasses.replace(cpu_machine(2, 2**16, "avx2"), memory_bandwidth=1e5, l2_bandwidth=1e5)
PATTERNS = ("attention", "gated_mlp", "norm_linear")

# Of the sites present, what is not matched but has a near miss to say why: T5's head scales the norm's result, and
# Mixtral's experts have weights that depend on the tokens.
MISSED = {"t5": (0, 0, 1), "mixtral": (0, 2, 0)}


def counts(reports: list[fc.Report], missed: bool = False) -> tuple[int, ...]:
    if missed:
        found = Counter((n.pattern, n.where) for r in reports for n in r.near_misses)
        return tuple(sum(pattern == p for pattern, _ in found) for p in PATTERNS)
    total = Counter(d.pattern for r in reports for d in r.decisions)
    return tuple(total[p] for p in PATTERNS)


def compiled(model: torch.nn.Module) -> Any:
    def backend(gm: Any, inputs: Any, **context: Any) -> Any:
        options = {"remainder": "eager", "strict": True, "machine": STARVED}
        return fc.backend.fusion_compiler(gm, inputs, options=options, **context)

    return torch.compile(model, backend=backend)


def in_double(value: Any) -> Any:
    floats = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    return torch.utils._pytree.tree_map_only(torch.Tensor, floats, value)


def agrees(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    own = (eager.double() - exact).norm()
    assert (got.double() - exact).norm() <= 1.5 * own + 1e-7 * exact.norm()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_prompt(name):
    model, make_inputs = build(name)
    inputs = make_inputs()
    eager = model(**inputs)[0]
    agrees(compiled(model)(**inputs)[0], eager, copy.deepcopy(model).double()(**in_double(inputs))[0])

    missed = MISSED.get(name, (0, 0, 0))
    found = counts(fc.reports())
    assert tuple(f + m for f, m in zip(found, missed, strict=True)) == present(name)
    said = counts(fc.reports(), missed=True)
    assert all(s >= bool(m) for s, m in zip(said, missed, strict=True))
    for decision in (d for r in fc.reports() for d in r.decisions):
        assert decision.reason and decision.where


@pytest.mark.parametrize(("name", "marked"), [("bert", (0,)), ("phi3", (1,)), ("llama", (0, 1))])
@torch.no_grad()
def test_symbolic_sizes(name, marked):
    model, make_inputs = build(name)
    inputs = make_inputs()
    for dim in marked:
        torch._dynamo.mark_dynamic(inputs["input_ids"], dim)
    assert counts([fc.explain(model, machine="h200", **inputs)]) == present(name)


@torch.no_grad()
def test_every_size_symbolic():
    """dynamic=True makes inputs also of the floats that modules hold, such as a norm's eps."""
    model, make_inputs = build("llama")
    assert counts([fc.explain(model, machine="h200", dynamic=True, **make_inputs())]) == present("llama")


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoding_with_a_static_cache(name):
    model, make_inputs = build(name)
    cache = static_cache(model, make_inputs())
    token = torch.randint(3, 100, (2, 1))

    def step(run: Any, cache: Any) -> torch.Tensor:
        return run(input_ids=token, past_key_values=cache)[0]

    double = copy.deepcopy(model).double()
    wide = copy.deepcopy(cache)
    for layer in wide.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
        layer.dtype = torch.float64
    exact, eager = step(double, wide), step(model, copy.deepcopy(cache))
    agrees(step(compiled(model), cache), eager, exact)
    missed = MISSED.get(name, (0, 0, 0))
    found = counts(fc.reports())
    assert tuple(f + m for f, m in zip(found, missed, strict=True)) == present(name, "decode")
