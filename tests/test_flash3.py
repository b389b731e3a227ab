"""FlashAttention 3 is offered where its package is installed, for what it computes, with its place of the diagonal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from test_attention import only, trace
from torch import Tensor
from torch.fx import GraphModule

from fusion_compiler.candidates import Candidate, Unavailable
from fusion_compiler.fused import Attention
from fusion_compiler.layout import fit
from fusion_compiler.lowering.vendor.flash3 import FlashAttention3
from fusion_compiler.lowering.vendor.sdpa import VendorSdpa
from fusion_compiler.machine import machine
from fusion_compiler.match import Match
from fusion_compiler.splice import Builder, clean, replace


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the package computes of [B, L, H, D]: the last query stands at the last key."""
    assert causal is False or window_size == (-1, -1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = softmax_scale * (q @ k.mT)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    before, after = (-1, 0) if causal else window_size
    far = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    hidden = (far > after if after >= 0 else far > k.shape[2]) | (far < -before if before >= 0 else far < -k.shape[2])
    scores = scores.masked_fill(hidden, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).contiguous(), scores.logsumexp(-1)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    module.__spec__ = ModuleSpec("flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)


def eager(mask: str, cap: float = 0.0) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = cap * torch.tanh(scores / cap) if cap else scores
        rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        if mask == "bottom-right":
            rows = rows + (k.shape[2] - q.shape[2])
        if mask:
            scores = scores.masked_fill(keys > rows, float("-inf"))
        if mask == "window":
            scores = scores.masked_fill(keys <= rows - 9, float("-inf"))
        return torch.softmax(scores.float(), -1).to(q.dtype) @ v

    return attention


def inputs(queries: int = 40, keys: int = 40, dtype: torch.dtype = torch.float16) -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(0)
    sizes = (4, queries), (2, keys), (2, keys)
    return tuple(torch.randn(1, h, s, 32, generator=source).to(dtype) for h, s in sizes)


def found(gm: GraphModule) -> tuple[Match, Attention]:
    match = only(gm)
    assert isinstance(match.op, Attention)
    return match, match.op


@pytest.mark.parametrize(
    ("mask", "cap", "lengths"),
    [("", 0.0, (40, 40)), ("causal", 0.0, (40, 40)), ("window", 30.0, (40, 40)), ("bottom-right", 0.0, (24, 40))],
)
def test_it_computes_what_eager_does(mask: str, cap: float, lengths: tuple[int, int], installed: None) -> None:
    args = inputs(*lengths)
    function = eager(mask, cap)
    gm = trace(function, *args)
    match, op = found(gm)
    offered = FlashAttention3().candidates(op, machine("h200"))
    assert isinstance(offered, list), offered
    builder = Builder(gm, match.site.output)
    replace(match.site, fit(builder, match.site, offered[0].emit(builder, match.site)))
    clean(gm)
    calls = [n for n in gm.graph.nodes if n.target is torch.ops.fusion_compiler.flash_attention_3.default]
    # keys and values are read without their repeats
    assert len(calls) == 1 and calls[0].args[1].meta["val"].shape[1] == 2
    exact = function(*(a.double() for a in args))
    assert (gm(*args) - exact).abs().max() <= 1.5 * (function(*args) - exact).abs().max()


def test_its_strides_are_those_that_the_graph_was_told(installed: None) -> None:
    q, k, v = inputs()
    torch.library.opcheck(
        torch.ops.fusion_compiler.flash_attention_3.default, (q, k, v, 0.2, -1, 0, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("function", "args", "sentence"),
    [
        (eager("causal"), inputs(24, 40), "it counts a causal mask from the last key"),
        (eager("bottom-right"), inputs(40, 24), "it counts a causal mask from the last key"),
        (eager("causal"), inputs(dtype=torch.float32), "it is not used for torch.float32"),
        (eager(""), inputs(1, 40), "one query is served faster by a kernel that splits the keys"),
    ],
)
def test_what_it_does_not_take_is_told(function: Any, args: tuple[Tensor, ...], sentence: str, installed: None) -> None:
    refused = FlashAttention3().candidates(found(trace(function, *args))[1], machine("h200"))
    assert isinstance(refused, Unavailable) and sentence in refused.reason


def test_only_where_it_is_installed_and_never_before_a_kernel_that_was_measured(request: pytest.FixtureRequest) -> None:
    _, op = found(trace(eager("causal"), *inputs()))
    assert FlashAttention3().candidates(op, machine("h200")) == []
    request.getfixturevalue("installed")
    assert FlashAttention3().candidates(op, machine("a100")) == FlashAttention3().candidates(op, machine("cpu")) == []
    (own,) = cast(FlashAttention3().candidates(op, machine("h200")))
    cudnn = next(c for c in cast(VendorSdpa().candidates(op, machine("h200"))) if c.name == "vendor.sdpa.cudnn")
    assert own.seconds > cudnn.seconds


def cast(offered: list[Candidate] | Unavailable) -> list[Candidate]:
    assert isinstance(offered, list), offered
    return offered
