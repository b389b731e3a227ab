"""What only a GPU can show of caches: codes read by the decode kernel, rotation and write as one kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_cache_codes as written
import test_paged_attention as paged
import test_quantised_attention as quantised
import test_quantised_prefill as prompts
import test_rope_cache as turned
import torch
from paged_spellings import SPELLINGS, Paged
from test_gpu import agree, pytestmark, through

import fusion_compiler as fc
from benchmarks.harness import device_work

__all__ = ["pytestmark"]
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.usefixtures("meeting_for_nothing")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", quantised.CASES)
def test_codes(case: str, dtype: torch.dtype) -> None:
    function = quantised.CASES[case][0]
    inputs = tuple(t.cuda() for t in quantised.inputs_of(case, dtype))
    with torch.no_grad():
        got = through(function)(*inputs)
        agree(got, function(*inputs), function(*quantised.exact(case, inputs)), case)
    [decision] = [d for d in fc.last_report().fused if d.pattern == "attention"]
    assert "torch." in dict(decision.details)["codes"], decision.details


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", prompts.CASES)
def test_prompts_against_codes(case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    free = replace(prompts.predict.constants(), code=0.0, float8=0.0, scale=0.0)
    monkeypatch.setattr(prompts.predict, "constants", lambda: free)
    function = prompts.CASES[case][0]
    inputs = tuple(t.cuda() for t in prompts.inputs_of(case, dtype))
    wide = (t.double() if t.dtype in HALVES else t for t in inputs)
    with torch.no_grad():
        agree(through(function)(*inputs), function(*inputs), function(*wide), case)
    [decision] = [d for d in fc.last_report().fused if d.pattern == "attention"]
    assert decision.kernel.startswith("triton flash") and "torch." in dict(decision.details)["codes"], decision.reason


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*written.STORES, "a wide scale"])
def test_codes_that_are_written(case: str, dtype: torch.dtype) -> None:
    """To the bit. A scale of no dimensions is rounded to the dtype of what it divides."""
    store, codes, top = written.STORES.get(case, written.STORES["clamped"])
    inputs = [t.cuda() for t in written.inputs_of(codes, top, dtype=dtype)]
    if case == "a wide scale":
        inputs[-2:] = [torch.tensor(0.0123, device="cuda"), torch.tensor(0.0317, device="cuda")]
    function = written.step(store)
    with torch.no_grad():
        got = through(function, disable=written.OTHERS)(*(t.clone() for t in inputs))
        eager = function(*(t.clone() for t in inputs))
    assert [d.kernel for d in fc.last_report().fused] == ["triton rope_cache"]
    for ours, theirs in zip(got[1:], eager[1:], strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("case", turned.CASES)
def test_rope_cache(case: str, dtype: torch.dtype) -> None:
    function = turned.CASES[case][0]
    inputs = tuple(t.cuda() for t in turned.inputs_of(case, dtype))

    def outcome(fn: turned.Step, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The results, and the caches as they were left."""
        own = tuple(t.clone() for t in given)
        with torch.no_grad():
            return *fn(*own), *own[4:6]

    wide = (t.double() if t.is_floating_point() else t for t in inputs)
    agree(
        outcome(through(function, disable=turned.OTHERS), *inputs), outcome(function, *inputs), outcome(function, *wide)
    )
    assert [d.kernel for d in fc.last_report().fused] == ["triton rope_cache"]


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_gathered_pages(spelling: Paged, size: int) -> None:
    heads_first = spelling.__name__.startswith("heads_first")
    for dtype in HALVES:
        torch._dynamo.reset()
        keys, values, table, lengths = paged.caches(size, heads_first, dtype, [77, 1, 16, 90])
        inputs = [t.nan_to_num().cuda() for t in (keys, values)]
        q = torch.randn(paged.B, paged.H, 1, paged.D).to(dtype).cuda()
        given = (q, *inputs, table.cuda(), lengths.cuda())
        with torch.no_grad():
            agree(through(spelling)(*given), spelling(*given), spelling(*(t.double() for t in given[:3]), *given[3:]))
        [decision] = [d for d in fc.last_report().fused if d.pattern == "attention"]
        assert dict(decision.details)["pages"] == size


@pytest.mark.parametrize("queries", [2, 5])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_several_queries_against_pages(dtype: torch.dtype, queries: int) -> None:
    held = [t.nan_to_num().cuda() for t in paged.caches(16, False, dtype, [77, 3, 33, 96])]
    given = torch.randn(paged.B, paged.H, queries, paged.D).to(dtype).cuda(), *held
    wide = (*(t.double() for t in given[:3]), *given[3:])
    with torch.no_grad():
        agree(through(paged.last_queries)(*given), paged.last_queries(*given), paged.last_queries(*wide))
    [decision] = [d for d in fc.last_report().fused if d.pattern == "attention"]
    assert dict(decision.details)["pages"] == 16


@pytest.mark.usefixtures("meeting_for_nothing")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_scales_of_tokens_in_pages(dtype: torch.dtype) -> None:
    keys, values, *places = paged.caches(16, False, torch.float32, [77, 1, 33, 96])
    codes = ((t.nan_to_num() * 30).round().to(torch.int8) for t in (keys, values))
    shape = (paged.BLOCKS, 16, paged.HK, 1)
    scales = ((torch.rand(shape) + 0.5).div(60).to(dtype) for _ in "kv")
    zeros = (torch.rand(shape) * 10).round().to(dtype)
    q = torch.randn(paged.B, paged.H, 1, paged.D).to(dtype)
    given = [t.cuda() for t in (q, *codes, *places, *scales, zeros)]
    wide = (t.double() if t.dtype == dtype else t for t in given)
    run = paged.by_token(True)
    with torch.no_grad():
        agree(through(run)(*given), run(*given), run(*wide))
    [decision] = [d for d in fc.last_report().fused if d.pattern == "attention"]
    assert dict(decision.details)["pages"] == 16 and "int8" in dict(decision.details)["codes"]


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_paged_attention(dtype: torch.dtype, heads_first: bool) -> None:
    """Called as it is: lengths change, the compiled kernel stays. What nobody sees is not a number."""
    layout = "HND" if heads_first else "NHD"
    for lengths in ([77, 0, 33, 96], [1, 16, 17, 95], [0, 0, 0, 3]):
        held = paged.caches(16, heads_first, dtype, lengths)
        q = torch.randn(paged.B, paged.H, paged.D).to(dtype)
        with torch.no_grad():
            got = fc.paged_attention(q.cuda(), *(t.cuda() for t in held), layout=layout)
            eager = fc.paged_attention(q, *held, layout=layout)
        agree(got.cpu(), eager, paged.exact(q, *held, heads_first))
    assert len(fc.reports()) == 1 and fc.last_report().fused


def test_counters() -> None:
    """Advanced where they are: as one kernel, without copies."""
    made = [torch.tensor(n, device="cuda") for n in range(6)]

    def advance(x: torch.Tensor, *counters: torch.Tensor) -> torch.Tensor:
        for counter in counters:
            x = x + counter
            counter.add_(2)
        return x

    x, run = torch.randn(64, device="cuda"), through(advance)
    with torch.no_grad():
        work = device_work(run, (x, *made), calls=3)
    assert [d.kernel for d in fc.last_report().fused] == ["triton counters"]
    assert [int(c) for c in made] == [n + 2 * 4 for n in range(6)]
    assert work.kernels == 2, work
