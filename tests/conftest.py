"""Shared by all tests: small functions as graphs, and reports that start empty."""

from __future__ import annotations

import dataclasses
import os

# Kernels run in Triton's interpreter here; it has to be chosen before triton is imported.
if not os.environ.get("FUSION_COMPILER_TEST_GPU"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler import report
from fusion_compiler.lowering.triton_codegen.decode import predict


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    monkeypatch.setattr(report, "_reports", [])
    # float32 kernels are made where TF32 is allowed; the interpreter computes them in float32 all the same
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = os.environ.get("TRITON_INTERPRET") == "1"
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def meeting_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches as small as those of tests are read faster once they are dequantised: have codes read even so."""
    known = dataclasses.replace(predict.constants(), meet=0.0)
    monkeypatch.setattr(predict, "constants", lambda: known)


@pytest.fixture
def trace() -> Callable[..., GraphModule]:
    """`trace(fn, *args, dynamic=False)`: fn as a graph of ATen operations with fake values."""

    def trace(fn: Callable[..., Any], *args: torch.Tensor, dynamic: bool = False) -> GraphModule:
        with torch.no_grad():
            return make_fx(fn, tracing_mode="symbolic" if dynamic else "fake")(*args)

    return trace
