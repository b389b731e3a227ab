"""Fused attention operators, which FX keeps as if they drew random numbers, leave the graph once they are replaced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler import splice

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("unread", "left"),
    [
        (lambda q: aten._scaled_dot_product_flash_attention_for_cpu(q, q, q), 0),
        (lambda q: aten.rand([3]), 1),  # else the numbers drawn after it would be others
        (lambda q: aten.add_(q, 1), 1),
        (lambda q: aten.add(q, 1), 0),
    ],
)
def test_what_nobody_reads(unread: Callable[[Tensor], object], left: int) -> None:
    def function(q: Tensor) -> Tensor:
        unread(q)
        return aten.neg(q)

    gm = make_fx(function)(torch.randn(1, 2, 8, 16))
    splice.clean(gm)
    called = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert len(called) == left + 1 and called[-1] is aten.neg.default
