"""Modified scores in the generated flash kernel: biases, ALiBi, documents, prefixes, unknown masks; lists of blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import sympy
import torch
from test_flash import SMALL, check, generated, heads, only, traced
from torch import Tensor

from fusion_compiler.attention.modifications import says_more
from fusion_compiler.attention.recognise import find_attention
from fusion_compiler.candidates import Unavailable
from fusion_compiler.fused import Attention, Mask, Modification
from fusion_compiler.layout import fit
from fusion_compiler.lowering.triton_codegen import flash
from fusion_compiler.lowering.triton_codegen.flash.emit import emit
from fusion_compiler.lowering.triton_codegen.flash.scores import slope
from fusion_compiler.machine import machine
from fusion_compiler.splice import Builder, clean, replace

LISTED = dataclasses.replace(SMALL, listed=True)
LENGTH = 52
LEAST = torch.finfo(torch.float32).min


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]


def attend(q: Tensor, k: Tensor, v: Tensor, added: Tensor | float = 0.0, seen: Tensor | None = None) -> Tensor:
    scores = q @ k.mT * 0.25 + added
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    return torch.softmax(scores, -1).to(v.dtype) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    rows, keys = positions(q, k)
    return attend(q, k, v, slopes[:, None, None] * (keys - rows))


def causal_alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    rows, keys = positions(q, k)
    return attend(q, k, v, slopes[:, None, None] * (keys - rows), keys <= rows)


def alibi_of_keys(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(
        q, k, v, slopes[:, None, None] * (torch.arange(k.shape[2]) - 11) - 0.5, positions(q, k)[0] >= positions(q, k)[1]
    )


def slopes_of_rows(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, bias: Tensor) -> Tensor:
    """A slope for each query, beside a bias that is read."""
    rows, keys = positions(q, k)
    return attend(q, k, v, slopes[: q.shape[2], None] * (keys - 2 * rows) + bias)


def distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, keys = positions(q, k)
    return attend(q, k, v, -0.1 * (keys - rows).abs())


def squares(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    rows, keys = positions(q, k)
    near = (keys - rows) * (keys - rows) < 300
    return attend(q, k, v, -0.01 * slopes[:, None, None] * (keys - rows) ** 2, near & (keys * rows % 3 < 2))


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return attend(q, k, v, bias)


def biased_and_causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    rows, keys = positions(q, k)
    return attend(q, k, v, bias + torch.where(keys <= rows, 0.0, torch.finfo(torch.float32).min))


def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    rows, keys = positions(q, k)
    return attend(q, k, v, seen=(ids[:, None, :, None] == ids[:, None, None, :]) & (keys <= rows))


def prefix(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    rows, keys = positions(q, k)
    return attend(q, k, v, seen=(keys <= rows) | (keys < lengths[:, None, None, None]))


def prefix_of_numbers(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Later keys are hidden where an unknown number is 0, and seen where it is 1."""
    rows, keys = positions(q, k)
    return attend(q, k, v, torch.where(keys <= rows, 0.0, (kept[:, None, None] - 1.0) * 1e9))


def padding_of_numbers(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, pairs: Tensor) -> Tensor:
    return attend(q, k, v, torch.finfo(torch.float32).min * (1.0 - kept[:, None, None]) + pairs)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return attend(q, k, v, seen=seen)


def averaged(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT * 0.25).masked_fill(~seen, -1e9), -1) @ v


def kept() -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor([[5], [30]])).float()


def ids() -> Tensor:
    return torch.randint(0, 5, (2, LENGTH)).sort()[0]


def bias(*shape: int) -> Tensor:
    return torch.randn(*shape, LENGTH, LENGTH)


def unknown(*shape: int) -> Tensor:
    """A mask with whole blocks of either kind, and a row that sees nothing."""
    seen = torch.rand(*shape, LENGTH, LENGTH) < 0.5
    seen[..., :32, 16:32], seen[..., 32:, :16], seen[..., 4, :] = True, False, False
    return seen


# function, its further operands, what is proved beside the modification, and whether lists of blocks are of use
CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]], str, bool]] = {
    "alibi": (alibi, lambda: (torch.rand(4),), "none", False),
    "causal alibi": (causal_alibi, lambda: (torch.rand(4),), "causal", False),
    "alibi of keys": (alibi_of_keys, lambda: (torch.rand(4),), "causal", False),
    "slopes of rows": (slopes_of_rows, lambda: (torch.rand(LENGTH), bias(4)), "none", False),
    "distance": (distance, lambda: (), "none", False),
    "squares": (squares, lambda: (torch.rand(4),), "none", True),
    "bias per head": (biased, lambda: (bias(4),), "none", False),
    "bias per batch": (biased, lambda: (bias(2, 1),), "none", False),
    "bias and mask in one": (biased_and_causal, lambda: (bias(1, 4),), "causal", False),
    "documents": (documents, lambda: (ids(),), "causal", True),
    "prefix": (prefix, lambda: (torch.tensor([3, 20]),), "none", True),
    "prefix of numbers": (prefix_of_numbers, lambda: (kept(),), "none", False),
    "padding of numbers": (padding_of_numbers, lambda: (kept(), bias(4)), "none", False),
    "unknown": (masked, lambda: (unknown(),), "none", True),
    "unknown per batch and head": (masked, lambda: (unknown(2, 4),), "none", True),
    "unknown per head": (masked, lambda: (unknown(4),), "none", True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_numbers(name: str, dtype: torch.dtype) -> None:
    function, more, kind, listed = CASES[name]
    args = (*heads(2, 4, 4, LENGTH, LENGTH, 16, dtype=dtype), *more())
    op = check(function, *args, plan=LISTED if listed else SMALL)
    assert op.modification is not None and op.modification.mask.kind == kind


@pytest.mark.parametrize("name", ["documents", "unknown per head"])
def test_without_lists(name: str) -> None:
    function, more, _, _ = CASES[name]
    check(function, *heads(2, 4, 4, LENGTH, LENGTH, 16), *more())


def test_a_slope_is_a_number_for_each_key() -> None:
    gm, op = generated(causal_alibi, *heads(1, 4, 4, LENGTH, LENGTH, 16), torch.rand(4))
    (term,) = op.modification.added if op.modification is not None else ()
    assert str(slope(op, term)).startswith("load_")
    # whoever reads the sums, or adds a score that is not shifted with the others, needs all of it
    assert slope(dataclasses.replace(op, logarithm=op.out), term) is None
    with_sink = dataclasses.replace(op.modification, sink=sympy.Float(0.5))
    assert slope(dataclasses.replace(op, modification=with_sink), term) is None


def test_slopes_that_are_no_numbers() -> None:
    slopes = torch.tensor([math.inf, -math.inf, math.nan, 0.5])
    check(causal_alibi, *heads(1, 4, 4, LENGTH, LENGTH, 16), slopes)


def test_layers_share_lists() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return documents(q, k, v, ids) + documents(q.sin(), k, v, ids)

    args = (*heads(2, 4, 4, LENGTH, LENGTH, 16), ids())
    gm = traced(fn, *args)
    for match in find_attention(gm)[0]:
        assert isinstance(match.op, Attention)
        builder = Builder(gm, match.site.output)
        replace(match.site, fit(builder, match.site, emit(match.op, LISTED, builder, match.site)))
    clean(gm)
    launches = [n for n in gm.graph.nodes if "triton_kernel" in str(n.target)]
    assert len(launches) == 4  # two lists, two attentions
    torch.testing.assert_close(gm(*args), fn(*args))


def test_a_finite_fill_averages_rows_that_see_nothing() -> None:
    args = heads(2, 4, 4, LENGTH, LENGTH, 16)
    op = check(averaged, *args, unknown(2, 1))
    assert op.modification is not None and op.modification.finite
    # as what is added, from a tensor that nothing is known of
    seen = unknown(2, 1)
    check(biased, *args, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min))
    check(biased, *args, torch.zeros(seen.shape).masked_fill(~seen, -math.inf))


def test_grouped_heads_are_numbered_as_the_bias_numbers_them() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return alibi(q, k, v, slopes)

    check(fn, *heads(2, 4, 2, 40, 40, 16), torch.rand(4))


def test_nothing_of_queries_times_keys_is_left() -> None:
    gm, _ = generated(causal_alibi, *heads(1, 4, 4, LENGTH, LENGTH, 16), torch.rand(4))
    shapes = [n.meta["val"].shape for n in gm.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not any(shape[-2:] == (LENGTH, LENGTH) for shape in shapes)


def test_a_fused_call_is_replaced_where_more_is_known_than_its_mask() -> None:
    def known(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        seen = (ids[:, None, :, None] == ids[:, None, None, :]) & (keys <= rows)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)

    gm = traced(known, *heads(2, 4, 4, LENGTH, LENGTH, 16), ids())
    op = only(gm).op
    assert isinstance(op, Attention) and op.vendor and says_more(op)


def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, seen: Tensor | None = None, *, first: bool = False) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * 0.25
    if seen is not None:
        scores = scores + torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    column = sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    joined = torch.cat([column, scores] if first else [scores, column], -1)
    joined = joined - joined.max(-1, keepdim=True).values
    probabilities = torch.softmax(joined, -1, dtype=joined.dtype)
    return (probabilities[..., 1:] if first else probabilities[..., :-1]) @ v


@pytest.mark.parametrize(("width", "first"), [(None, False), (20, False), (20, True)])
def test_sinks(width: int | None, first: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        return sinks(q, k, v, sink, None if width is None else (keys <= rows) & (keys > rows - width), first=first)

    op = check(fn, *heads(2, 4, 2, LENGTH, LENGTH, 16), torch.randn(4))
    assert op.modification is not None and op.modification.mask.window == width


def test_a_column_beside_the_scores_that_is_not_the_one_left_out() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([torch.zeros(1, 4, LENGTH, 1), q @ k.mT], -1).softmax(-1)[..., :-1] @ v

    _, (missed, *_) = find_attention(traced(fn, *heads(1, 4, 4, LENGTH, LENGTH, 16)))
    assert "whose probability nobody reads" in missed.reason


def test_a_sink_takes_all_of_a_row_that_sees_nothing() -> None:
    args = heads(2, 4, 4, LENGTH, LENGTH, 16)
    check(lambda q, k, v, sink, seen: sinks(q, k, v, sink, seen), *args, torch.randn(4), unknown(2, 1))


def test_what_no_kernel_prints_is_told_beforehand() -> None:
    made = Modification(Mask("none"), (sympy.gamma(sympy.Symbol("key")),), sympy.true, False, False, "none", ())
    match = only(traced(biased, *heads(1, 4, 4, LENGTH, LENGTH, 16), bias(4)))
    assert isinstance(match.op, Attention)
    found = flash.candidates(dataclasses.replace(match.op, modification=made), machine("h200"))
    assert isinstance(found, Unavailable) and "gamma" in found.reason


def test_lists_of_a_mask_that_reads_nothing() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        return attend(q, k, v, seen=(keys <= rows) | (keys < 5))

    check(fn, *heads(1, 2, 2, LENGTH, LENGTH, 16), plan=LISTED)


@pytest.mark.parametrize("fills_last", [False, True])
def test_what_is_added_may_be_infinite_where_a_finite_number_hides(fills_last: bool) -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        scores = q @ k.mT * 0.25 + bias
        return (
            torch.softmax(
                scores.masked_fill(~seen, LEAST) if fills_last else scores + torch.where(seen, 0.0, LEAST), -1
            )
            @ v
        )

    seen = unknown(2, 1)
    check(fn, *heads(2, 4, 4, LENGTH, LENGTH, 16), bias(4).masked_fill(~unknown(4), -math.inf), seen)


@pytest.mark.parametrize(("dtype", "fill"), [(torch.float32, LEAST), (torch.float32, -1e9), (torch.float16, -65504.0)])
@pytest.mark.parametrize("at_once", [False, True])
def test_several_finite_fills_where_rows_see_nothing(at_once: bool, dtype: torch.dtype, fill: float) -> None:
    """Keys that two masks hide are no part of the average of those that one hides: with the least number they are −∞,
    and where every key of a row is, the row is no number."""

    def fn(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        first, second = (
            torch.zeros(s.shape, dtype=q.dtype).masked_fill(~s, fill) for s in (seen, keys < rows + 1 - 2 * (rows == 0))
        )
        scores = q @ k.mT * 0.25
        return torch.softmax(scores + (first + second) if at_once else scores + first + second, -1) @ v

    seen = unknown()
    seen[0], seen[3, 2:] = False, False
    op = check(fn, *heads(1, 2, 2, LENGTH, LENGTH, 16, dtype=dtype), seen)
    assert op.modification is not None and op.modification.unknown


def test_keys_that_only_a_finite_number_hides_count_where_padding_hides_the_others() -> None:
    def causal_over_padding(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        return torch.softmax((q @ k.mT * 0.25 + padding).masked_fill(keys > rows, LEAST), -1) @ v

    def padding_over_causal(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        return torch.softmax((q @ k.mT * 0.25).masked_fill(keys > rows, LEAST) + padding, -1) @ v

    def length_over_chunks(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        rows, keys = positions(q, k)
        scores = q @ k.mT * 0.25 + torch.where((keys <= rows) & (keys // 5 == rows // 5), 0.0, LEAST)
        return torch.softmax(scores.masked_fill(keys >= lengths[:, None, None, None], -math.inf), -1) @ v

    args = heads(2, 4, 4, LENGTH, LENGTH, 16)
    padding = torch.zeros(2, 1, 1, LENGTH).masked_fill(kept()[:, None, None] == 1, -math.inf)
    op = check(causal_over_padding, *args, padding)
    assert op.modification is not None and op.modification.finite
    for fn, more in ((padding_over_causal, padding), (length_over_chunks, torch.tensor([3, 20]))):
        op = only(traced(fn, *args, more)).op
        assert isinstance(op, Attention) and op.modification is None and op.mask.kind == "tensor"
