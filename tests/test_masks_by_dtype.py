"""Masks whose dtypes round, cut off, wrap around or hold what is no number are what eager computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from attention_reference import attend
from reference import Recorder
from test_flash import check, heads, only, traced
from torch import Tensor

from fusion_compiler.fused import Attention

SIZE = 40
I = torch.arange  # noqa: E741


def narrow(dtype: torch.dtype) -> Callable[[int], Tensor]:
    return lambda n: I(n).to(dtype)[:, None] >= I(n).to(dtype)


# what is seen, [n, n], of as many queries as keys
SEEN: dict[str, Callable[[int], Tensor]] = {
    "halves cut off": lambda n: (I(n) * 0.5).long() <= (I(n) * 0.5).long()[:, None],
    "halves cut off towards zero": lambda n: ((I(n) - 7) * 0.5).int() <= ((I(n) - 7) * 0.5).int()[:, None],
    "a number cut off": lambda n: torch.full((n, n), 2.7, dtype=torch.long).tril() > 1,
    "differences below zero of uint8": lambda n: I(n).to(torch.uint8)[:, None] - I(n).to(torch.uint8) < 5,
    "true and true is true": lambda n: ((I(n) <= I(n)[:, None]) + (I(n) < 3)).int() == 1,
    "a slice from before the start": lambda n: torch.ones(n, n, dtype=torch.bool).tril()[-2 * n :],
    "steps that are no binary fractions": lambda n: I(n) * 0.1 <= I(n)[:, None] * 0.1,
}
# what is seen, of a tensor [n] beside
READ: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "differences of uint8": ((I(SIZE) % 7).to(torch.uint8), lambda t: t[:, None] - t < 3),
    "no number is not less, nor not more": (
        torch.where(I(SIZE) % 5 == 0, math.nan, 1.0), lambda t: ~(t > 2.0) & ~(t[:, None] > 2.0) | (I(SIZE) == 0),
    ),
    "times that are one number in float32": (I(SIZE).double() * 1e-3 + 1.7e9, lambda t: t == t[:, None]),
    "large numbers less than a fraction apart": (I(SIZE) % 7 + 2**40, lambda t: t - t[:, None] < 0.5),
}  # fmt: skip


def attention(seen: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        visible = seen(*more) if more else seen(q.shape[2])
        return (q @ k.mT * 0.25).masked_fill(~visible, -math.inf).softmax(-1) @ v

    return function


@pytest.mark.parametrize("name", SEEN)
def test_positions(name: str) -> None:
    check(attention(SEEN[name]), *heads(1, 1, 1, SIZE, SIZE, 16))


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str) -> None:
    held, seen = READ[name]
    check(attention(seen), *heads(1, 1, 1, SIZE, SIZE, 16), held)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 300), (torch.int8, 150), (torch.float16, 2100)])
def test_positions_that_a_dtype_does_not_have(dtype: torch.dtype, size: int) -> None:
    """Described as eager has it: whole numbers up to 256 are all that bfloat16 tells apart."""
    args = heads(1, 1, 1, size, size, 8)
    gm = traced(attention(narrow(dtype)), *args)
    match = only(gm)
    assert isinstance(match.op, Attention) and match.op.mask.kind == "tensor"
    values = Recorder(gm).values(*args)
    torch.testing.assert_close(
        attend(match.op, match.site, values).float(), values[match.site.output], rtol=1e-4, atol=1e-5
    )
