"""Compiled code in the surroundings that real programs put it in: the result is eager's, and something is said."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.machine import machine
from fusion_compiler.report import Report

Function = Callable[..., Any]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax((q @ k.mT * 0.25).masked_fill(hidden, float("-inf")), dim=-1) @ v


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        result: Tensor = self.out(attention(q, k, v).transpose(1, 2).flatten(2))
        return result


def compiled(fn: Any, **options: Any) -> Any:
    """Compiled for a CPU where a kernel's launch is so dear that whatever can be fused is."""
    here = dataclasses.replace(machine("cpu"), launch_overhead=0.1)
    given = {"machine": here, "remainder": "eager", "strict": True, **options}
    return torch.compile(fn, backend=fusion_compiler, options=given)


def same(result: Any, eager: Any) -> None:
    torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-5)


def report() -> Report:
    made = fc.last_report()
    assert made is not None
    return made


def fused() -> list[str]:
    return [d.pattern for d in report().fused]


def heads(*batch: int) -> list[Tensor]:
    return [torch.randn(*batch, 2, 24, 16) for _ in range(3)]


# ---- weights and modules ------------------------------------------------------------------------
@torch.no_grad()
def test_weights_that_change_between_calls() -> None:
    block, x = Block(), torch.randn(2, 24, 32)
    fn = compiled(block)
    same(fn(x), block(x))
    assert fused() == ["attention"]

    def set_data() -> None:
        block.qkv.weight.data = torch.randn(96, 32)

    for change in (
        lambda: block.qkv.weight.mul_(1.1),
        set_data,
        lambda: block.load_state_dict(Block().state_dict()),
        lambda: block.load_state_dict(Block().state_dict(), assign=True),
        lambda: setattr(block.qkv, "weight", nn.Parameter(torch.randn(96, 32))),
    ):
        change()
        same(fn(x), block(x))
    assert len(fc.reports()) == 1


def test_an_optimizer_s_steps() -> None:
    mine = Block()
    theirs, x = copy.deepcopy(mine), torch.randn(2, 24, 32)
    fn = compiled(mine)
    for run, block in ((fn, mine), (theirs, theirs)):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        same(a, b)


@torch.no_grad()
def test_two_graphs_that_share_weights() -> None:
    block, x = Block(), torch.randn(2, 24, 32)
    once, twice = compiled(block), compiled(lambda x: block(block(x)))
    for _ in range(2):
        same(once(x), block(x))
        same(twice(x), block(block(x)))
        block.qkv.weight.mul_(0.5)


@torch.no_grad()
def test_copies_are_compiled_for_themselves() -> None:
    block, x = Block(), torch.randn(2, 24, 32)
    fn = compiled(block)
    same(fn(x), block(x))
    other = copy.deepcopy(fn)
    other.qkv.weight.mul_(2)
    same(other(x), other._orig_mod(x))
    same(fn(x), block(x))


@torch.no_grad()
def test_a_pickled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = Block(), torch.randn(2, 24, 32)
    block.compile(backend=fusion_compiler, options={"remainder": "eager"})
    same(block(x), block.forward(x))
    same(pickle.loads(pickle.dumps(block))(x), block.forward(x))


# ---- processes and threads ----------------------------------------------------------------------
def test_threads_that_share_a_compiled_module() -> None:
    block, wrong = Block(), list[str]()
    fn = compiled(block)

    def work(x: Tensor) -> None:
        try:
            with torch.no_grad():
                for _ in range(3):
                    same(fn(x), block(x))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(torch.randn(2, 24, 32),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child() -> None:
    given = heads(1)
    fn = compiled(attention)
    same(fn(*given), attention(*given))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            larger = [torch.randn(1, 2, 40, 16) for _ in range(3)]
            same(fn(*given), attention(*given))
            same(fn(*larger), attention(*larger))  # compiled in the child
            code = 0 if fused() == ["attention"] else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


# ---- transformations ----------------------------------------------------------------------------
def test_vmap_and_functional_call_inside() -> None:
    given = heads(3, 1)
    mapped = torch.vmap(attention)
    same(compiled(mapped)(*given), mapped(*given))
    assert fused() == ["attention"]
    block, x = Block(), torch.randn(2, 24, 32)
    other = {name: torch.randn_like(p) for name, p in block.named_parameters()}
    with torch.no_grad():
        called = compiled(lambda x: torch.func.functional_call(block, other, (x,)))(x)
        same(called, torch.func.functional_call(block, other, (x,)))


@pytest.mark.parametrize("inside", [True, False])
def test_gradients_and_tangents(inside: bool) -> None:
    q, k, v = heads(1)
    inner = (lambda fn: fn) if inside else compiled
    outer = compiled if inside else (lambda fn: fn)
    gradient = outer(lambda q: torch.func.grad(lambda q: inner(attention)(q, k, v).sum())(q))
    same(gradient(q), torch.func.grad(lambda q: attention(q, k, v).sum())(q))
    if inside:
        tangent = outer(lambda q, t: torch.func.jvp(lambda q: attention(q, k, v), (q,), (t,))[1])
        same(tangent(q, k), torch.func.jvp(lambda q: attention(q, k, v), (q,), (k,))[1])
        assert not fused() and report().near_misses


def test_compiled_functions_inside_each_other() -> None:
    given, inner = heads(1), compiled(attention)
    outer = compiled(lambda q, k, v: inner(q, k, v) + inner(k, q, v))
    same(outer(*given), attention(*given) + attention(given[1], given[0], given[2]))
    assert fused() == ["attention"] * 2


@torch.no_grad()
def test_bodies_of_control_flow_are_told_of() -> None:
    given = heads(1)

    def branch(p: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = torch.cond(p, attention, lambda q, k, v: q * 2.0, (q, k, v))
        return result

    for taken in (True, False):
        same(compiled(branch)(torch.tensor(taken), *given), branch(torch.tensor(taken), *given))
    assert any("bodies of cond are left to Inductor" in note for note in report().notes)

    region = torch.compiler.nested_compile_region(lambda x: x.sin() * 2.0)
    same(compiled(lambda x, y: region(x) + region(y))(*given[:2]), (given[0].sin() + given[1].sin()) * 2.0)
    assert any("bodies of invoke_subgraph are left to Inductor" in note for note in report().notes), report().notes


def test_checkpointed_training() -> None:
    from torch.utils.checkpoint import checkpoint

    given = [t.requires_grad_() for t in heads(1)]

    def loss(*given: Tensor) -> Tensor:
        result: Tensor = checkpoint(attention, *given, use_reentrant=False).sum()
        return result

    for mine, theirs in zip(*(torch.autograd.grad(f(*given), given) for f in (compiled(loss), loss)), strict=True):
        same(mine, theirs)
    assert any("training" in note for note in report().notes)


def test_hooks() -> None:
    block, x = Block(), torch.randn(2, 24, 32)
    block.out.register_forward_hook(lambda module, args, result: result * 2)
    with torch.no_grad():
        same(compiled(block)(x), block(x))

    def hooked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        scores.register_hook(lambda g: g * 3)
        return scores.softmax(-1) @ v

    given = [t.requires_grad_() for t in heads(1)]
    given[0].register_hook(lambda g: g * 5)
    gradients = [torch.autograd.grad(f(*given).sum(), given) for f in (compiled(hooked), hooked)]
    for mine, theirs in zip(*gradients, strict=True):
        same(mine, theirs)


# ---- global settings ----------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_and_around(dtype: torch.dtype) -> None:
    given = heads(1)
    exact = attention(*(t.double() for t in given))

    def inside(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return attention(*given)

    def around(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            result: Tensor = compiled(attention)(*given)
        return result

    eager = inside(*given)
    for fn in (compiled(inside), around):
        torch._dynamo.reset()
        result = fn(*given)
        assert result.dtype == eager.dtype and fused() == ["attention"]
        assert (result - exact).square().mean() <= 1.5**2 * (eager - exact).square().mean()


@pytest.mark.parametrize("setting", ["deterministic", "default device", "default dtype", "inference mode"])
def test_global_settings(setting: str) -> None:
    given = heads(1)
    expected = attention(*given)
    try:
        if setting == "deterministic":
            torch.use_deterministic_algorithms(True)
        elif setting == "default device":
            torch.set_default_device("meta")
        elif setting == "default dtype":
            torch.set_default_dtype(torch.float64)
        with torch.inference_mode(setting == "inference mode"):
            same(compiled(attention)(*given), expected)
            assert fused() == ["attention"]
            assert not fc.explain(attention, *given).failures
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


# ---- weights that are no plain tensors ----------------------------------------------------------
class Int8Weight(Tensor):
    """A weight [N, K] of 8-bit integers with a scale per row, which a linear makes numbers of; as torchao's are."""

    integers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype, device=scale.device)  # type: ignore

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        self.integers, self.scale = integers, scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Int8Weight:
        return Int8Weight(tensors["integers"], tensors["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].integers.to(args[1].scale.dtype) * args[1].scale)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].integers, args[0].scale)
        raise NotImplementedError(str(func))


@torch.no_grad()
def test_quantised_weights() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("gate", "up"):
                weight = Int8Weight(torch.randint(-128, 128, (48, 32), dtype=torch.int8), torch.rand(48, 1) / 500)
                setattr(self, name, nn.Parameter(weight, requires_grad=False))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)

    mlp, x = Mlp(), torch.randn(2, 32)
    h200 = dataclasses.replace(machine("h200"), launch_overhead=1e-3)
    same(compiled(mlp, machine=h200)(x), mlp(x))
    assert fused() == ["gated_mlp"]
