"""Inductor's analysis of user kernels is made once for launches that are alike."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch._higher_order_ops import triton_kernel_wrap

from fusion_compiler.torch_private.kernel_analysis import ANALYSES, analysed_once

NAME = next(name for name in ANALYSES if hasattr(triton_kernel_wrap, name))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def analyse(kernel: Any, arguments: dict[str, Any], descriptors: Any) -> list[str]:
        calls.append(arguments)
        return ["out"]

    monkeypatch.setattr(triton_kernel_wrap, NAME, analyse)
    return calls


def test_launches_that_are_alike_are_analysed_once(asked: list[dict[str, Any]]) -> None:
    kernel, other = object(), object()
    half, full = (torch.empty(2, dtype=dtype) for dtype in (torch.float16, torch.float32))
    launches: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (kernel, {"x": half, "N": 16, "M": sympy.Symbol("s0")}, {}),
        (kernel, {"x": half.clone(), "N": 16, "M": sympy.Symbol("s1")}, {}),
        (kernel, {"x": full, "N": 16, "M": sympy.Symbol("s0")}, {}),
        (kernel, {"x": half, "N": 32, "M": sympy.Symbol("s0")}, {}),
        (kernel, {"x": half, "N": True, "M": sympy.Symbol("s0")}, {}),
        (kernel, {"x": half, "N": 16, "M": 4}, {}),
        (kernel, {"x": half, "N": 16, "M": sympy.Symbol("s0")}, {"x": ("stable", ([16],))}),
        (other, {"x": half, "N": 16, "M": sympy.Symbol("s0")}, {}),
    ]
    with analysed_once():
        found = [getattr(triton_kernel_wrap, NAME)(*launch) for launch in launches * 2]
    assert found == [["out"]] * 16 and found[0] is not found[1]
    assert len(asked) == 7
    getattr(triton_kernel_wrap, NAME)(*launches[0])
    assert len(asked) == 8, "outside nothing is remembered"


def test_inductor_asks_where_we_answer() -> None:
    import inspect

    from torch._inductor.ir import UserDefinedTritonKernel

    source = inspect.getsource(UserDefinedTritonKernel.__init__)
    assert "triton_kernel_wrap import" in source and NAME in source, "imported at the call, so that ours is found"
