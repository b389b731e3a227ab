"""Every spelling of the gated MLP and of norm → linear is found, and what merely resembles one is not."""

from __future__ import annotations

import pytest
import torch
from matmul_spellings import MATCHED, REFUSED
from spelled_graphs import K, graph, weights

from fusion_compiler.match import find_all
from fusion_compiler.patterns import BUILTIN
from fusion_compiler.semantics import SemanticView

PATTERNS = {p.name: p for p in BUILTIN}
FOUND = [(p, name) for p, table in MATCHED.items() for name in table]
LOOKALIKES = [(p, name) for p, table in REFUSED.items() for name in table]
# (leading sizes of x, dtype, symbolic): every rank, every dtype, both kinds of sizes
FORMS = [
    ((3, 5), torch.float32, False), ((3, 5), torch.bfloat16, True), ((7,), torch.float16, False),
    ((2, 3, 4), torch.float32, True), ((), torch.float32, False), ((1, 1), torch.bfloat16, False),
]  # fmt: skip


def search(pattern, function, leading, dtype, dynamic):
    view = SemanticView(graph(function, torch.randn(*leading, K, dtype=dtype), weights(dtype), dynamic))
    result = view.value(view.graph_module.graph.output_node().args[0])
    matches, near_misses = find_all(view, [PATTERNS[pattern]])
    return [m for m in matches if view.value(m.site.output) is result], near_misses, result


@pytest.mark.parametrize(("pattern", "name"), FOUND)
def test_found(pattern, name):
    every = name.startswith("linear") or (pattern == "gated_mlp" and not name.startswith("act"))
    for form in FORMS if every else FORMS[:2]:
        matches, near_misses, result = search(pattern, MATCHED[pattern][name], *form)
        assert len(matches) == 1, (form, near_misses, result)


@pytest.mark.parametrize(("pattern", "name"), LOOKALIKES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_lookalike(pattern, name, dynamic):
    matches, _, result = search(pattern, REFUSED[pattern][name], (3, 5), torch.float32, dynamic)
    assert not matches, result


def test_a_square_matrix_is_normalised_along_its_rows():
    """With as many rows as columns a statistic without keepdim repeats along the columns: no norm."""

    def columns(x, w):
        return torch.nn.functional.linear(x * torch.rsqrt(x.pow(2).mean(-1) + 1e-6), w.gate)

    assert not search("norm_linear", columns, (K,), torch.float32, False)[0]


def test_a_weight_of_every_position_is_no_weight():
    def positions(x, w):
        scale = torch.cat([w.gate[:3], w.gate[:3]])[:5]
        return torch.nn.functional.linear(torch.nn.functional.rms_norm(x, (K,), eps=1e-6) * scale, w.up)

    assert not search("norm_linear", positions, (3, 5), torch.float32, False)[0]
