"""Integers that are advanced in place: all by one kernel, and what is none of them."""

from __future__ import annotations

from collections.abc import Callable

import ahead_of_time
import pytest
import torch
from test_decode_attention import compiled
from torch import Tensor


def layers(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Each counter is read before and after it is advanced; the last is read once more."""
    for counter, step in ((first, 1), (second, 3), (third, 1)):
        x = x * counter
        counter.add_(step)
    return x + third


def test_all_at_once() -> None:
    counters = torch.tensor(3), torch.tensor([2**40]), torch.tensor(7, dtype=torch.int32)
    wanted = [c.clone() for c in counters]
    x = torch.randn(5)
    for _ in range(2):
        out, report = compiled(layers, x, *counters)
        assert torch.equal(out, layers(x, *wanted)) and all(map(torch.equal, counters, wanted))
    [decision] = report.fused
    # the third is read once more, so its new value is an intermediate that Inductor holds already
    assert decision.kernel == "triton counters" and dict(decision.details)["counters"] == 2, report


def returned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a.add_(1)
    b.add_(1)
    return a + 0, b * 2


def of_floats(a: Tensor, b: Tensor) -> Tensor:
    a.add_(1.0)
    b.add_(1.0)
    return a.new_zeros(3) + 1


def of_several(a: Tensor, b: Tensor) -> Tensor:
    a.add_(1)
    b.add_(1)
    return a.new_zeros(3) + 1


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (returned, (torch.tensor(1), torch.tensor(2))),
        (of_floats, (torch.tensor(1.0), torch.tensor(2.0))),
        (of_several, (torch.arange(3), torch.tensor(2))),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_what_is_left(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> None:
    _, report = compiled(function, *(t.clone() for t in inputs))
    assert not [d for d in report.decisions if d.pattern == "counters"], report


def test_every_target_compiles_it() -> None:
    ahead_of_time.compile_all("test_counters")


def compile_all() -> None:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.fused import Counters
    from fusion_compiler.lowering.triton_codegen import counters
    from fusion_compiler.lowering.triton_codegen.aot import compile_text

    text = counters.write(Counters((1, 3), (1, 0), (torch.int64, torch.int32)))
    tensors = {"counter0": torch.int64, "counter1": torch.int32}
    for target in (("cuda", 90, 32), ("hip", "gfx942", 64)):
        compile_text(text, counters.NAME, tensors, [], {}, GPUTarget(*target), num_warps=1)
