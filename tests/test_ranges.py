"""The ranges of sizes that a graph is compiled for: common to all its fusions, few, and right at every boundary."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compiler as fc
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.candidates import Amount
from fusion_compiler.cost.crossover import Curves, common, curves, sizes
from fusion_compiler.machine import TABLE

S = sympy.Symbol("s", integer=True, positive=True)


def place(*costs: Amount, valid: tuple[Any, ...] = ()) -> Curves:
    return curves(costs, costs, valid or (True,) * len(costs), S)


def ranges(places: Mapping[Curves, int], lo: int, hi: int, at_most: int = 3) -> list[tuple[int, int]]:
    return common({c: [n] * len(sizes(lo, hi)) for c, n in places.items()}, lo, hi, at_most)[0]


def test_boundaries_are_exact() -> None:
    assert ranges({place(10 + 3 * S, 100 + 2 * S): 1}, 1, 1000) == [(1, 90), (91, 1000)]


def test_one_range_where_one_way_is_best_everywhere() -> None:
    assert ranges({place(S + 1, S): 2, place(S, S + 1): 1}, 1, 1000) == [(1, 1000)]


def test_few_ranges_are_kept_where_the_loss_is_least() -> None:
    own = place(100 + S, S, sympy.Max(S - 1, 50), 80 + S / 100)
    ((lo, first), (begin, hi)) = ranges({own: 1}, 1, 1000, 2)
    assert (lo, begin, hi) == (1, first + 1, 1000) and own.over(begin, hi) == 3


def test_a_second_best_way_may_serve_two_ranges() -> None:
    """What is best for 33 to 64 only is given up for what is nearly as good there and best up to 444."""
    ways, valid = (20 + S, 10, 12, 13 + S / 100, 17 + S / 1000), (True, sympy.Le(S, 32), sympy.Le(S, 64), True, True)
    own = place(*ways, valid=valid)
    assert ranges({own: 1}, 1, 10**6) == [(1, 32), (33, 444), (445, 10**6)]
    assert [own.over(*r) for r in ranges({own: 1}, 1, 10**6)] == [1, 3, 4]


def test_places_change_their_ways_together() -> None:
    """Each would change at a size of its own, 20 to 200; two cuts serve them all, nearer to those that count more."""
    own = [place(at + S, 2 * S) for at in (20, 30, 100, 200)]
    found = ranges(dict.fromkeys(own, 1), 1, 1000)
    assert len(found) == 3 and 20 <= found[0][1] <= 30 and 100 <= found[1][1] <= 200
    weighty = ranges({**dict.fromkeys(own, 1), own[0]: 1000}, 1, 1000, 2)
    assert weighty == [(1, 20), (21, 1000)] or weighty[0][1] == 19


def test_no_way_serves_a_range_in_which_it_loses_to_inductor() -> None:
    worse = place(100, sympy.Piecewise((50, S < 500), (150, S < 600), (50, True)))
    assert worse.over(1, 499) == 1 and worse.over(1, 1000) == 0 and worse.over(600, 1000) == 1


# ---- a whole layer ------------------------------------------------------------------------------
class Layer(nn.Module):
    """One of Llama's, all of its sizes multiples of `hidden`. x: [batch, sequence, hidden]."""

    def __init__(self, hidden: int, dtype: torch.dtype, heads: int = 4) -> None:
        super().__init__()
        self.d = hidden // heads

        def weight(n: int, k: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(n, k) / k**0.5).to(dtype))

        self.q, self.k, self.v = weight(hidden, hidden), weight(hidden // 2, hidden), weight(hidden // 2, hidden)
        self.o, self.down = weight(hidden, hidden), weight(hidden, 4 * hidden)
        self.gate, self.up = weight(4 * hidden, hidden), weight(4 * hidden, hidden)
        self.before, self.behind = (nn.RMSNorm(hidden, dtype=dtype, eps=1e-5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.before(x)
        q, k, v = (F.linear(h, w).view(b, s, -1, self.d).transpose(1, 2) for w in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + F.linear(a.transpose(1, 2).reshape(b, s, -1), self.o)
        h = self.behind(x)
        return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)


def test_the_ranges_of_a_layer_do_not_depend_on_the_size_that_was_seen() -> None:
    model, told = Layer(2048, torch.bfloat16, heads=32).eval(), set()
    for rows in (3, 3000):
        x = torch.zeros(1, rows, 2048, dtype=torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            report = fc.explain(model, x, machine="h200")
        (note,) = (n for n in report.notes if "graphs" in n)
        told.add(note)
        edges = {r.hi for d in report.decisions for r in d.ranges if r.hi is not None}
        assert len(edges) == 2 and all(f"≤ {edge}" in note for edge in edges)
        assert bool(report.fused) == (rows == 3)
    assert len(told) == 1


# starting a kernel is so dear there that nearly everything is fused, and bytes so cheap that arithmetic soon tells
DEAR = dataclasses.replace(TABLE["h200"], launch_overhead=2e-7, num_sms=4)


@pytest.fixture
def layer() -> tuple[Layer, Layer]:
    torch.manual_seed(0)
    model = Layer(64, torch.float16).eval()
    return model, copy.deepcopy(model).double()


def right(run: Any, layer: tuple[Layer, Layer], rows: int, mark: Callable[[Tensor], None] | None = None) -> bool:
    x = torch.randn(rows, 2, 64, dtype=torch.float16)
    if mark:
        mark(x)
    with torch.no_grad():
        out, eager, exact = run(x), layer[0](x), layer[1](x.double())
    ours, own = ((t.double() - exact).norm() for t in (out, eager))
    return bool(ours <= 1.5 * own)


@pytest.mark.parametrize("how", ["dynamic", "marked", "bounded", "automatic"])
def test_a_layer_is_right_at_every_boundary_and_compiled_once_for_each_range(
    how: str, layer: tuple[Layer, Layer]
) -> None:
    options = {"machine": DEAR, "remainder": "eager", "strict": True}
    run = torch.compile(layer[0], backend=fusion_compiler, options=options, dynamic=True if how == "dynamic" else None)
    mark = {
        "marked": lambda x: torch._dynamo.mark_dynamic(x, 0),
        "bounded": lambda x: torch._dynamo.mark_dynamic(x, 0, min=2, max=2500),
    }.get(how)
    if how == "automatic":
        assert right(run, layer, 9)  # static: nobody knows yet that this size varies
    seen = len(fc.reports())
    assert right(run, layer, 40, mark)
    report = fc.last_report()
    assert report is not None
    edges = sorted({r.hi for d in report.decisions for r in d.ranges if r.hi is not None and r.hi < 2500})
    assert not edges if how == "bounded" else 1 <= len(edges) <= 2
    for rows in (2, *(e + more for e in edges for more in (0, 1)), 2500):
        assert right(run, layer, rows, mark), rows
    assert len(fc.reports()) - seen <= len(edges) + 1


def test_a_kernel_of_few_rows_serves_all_sizes_that_a_mark_allows() -> None:
    def glu(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(x @ gate.T) * (x @ up.T)

    x, gate, up = (torch.zeros(rows, 2048, dtype=torch.bfloat16) for rows in (8, 8192, 8192))
    torch._dynamo.mark_dynamic(x, 0, min=2, max=32)
    with torch.no_grad():
        report = fc.explain(glu, x, gate, up, machine="h200")
    (decision,) = report.fused
    assert "swap32" in decision.kernel and [(r.lo, r.hi) for r in decision.ranges] == [(2, 32)]
