"""What a weight is computed from, told element by element: layouts, and what must not be taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler import decompositions
from fusion_compiler.fused import Packed, PerGroup
from fusion_compiler.quantised import Storage, storage_of
from fusion_compiler.quantised.walk import Walk

N, K = 6, 64
BYTES = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SCALES = torch.rand(N, K // 32, generator=torch.Generator().manual_seed(1))
ROW = PerGroup(torch.float32, 32, 0, K // 32, 1)


def stored(weight: Callable[..., Tensor], *tensors: Tensor) -> Storage | str | None:
    gm = make_fx(weight, decomposition_table=decompositions.table(), tracing_mode="fake")(*(tensors or (BYTES, SCALES)))
    return storage_of(Walk(gm), gm.graph.output_node().args[0], N, K)


def scaled(codes: Tensor, d: Tensor) -> Tensor:
    return (codes.view(N, -1, 32).float() * d[..., None]).view(N, K)


def pairs(low: Tensor, high: Tensor) -> Tensor:
    return torch.stack([low, high], -1).flatten(1)


def halves(low: Tensor, high: Tensor) -> Tensor:
    return torch.cat([low.view(N, -1, 16), high.view(N, -1, 16)], -1).flatten(1)


# what computes a weight → its order and zero point
RIGHT = {
    "sequence": (lambda q, d: scaled(pairs(q & 15, q >> 4).to(torch.int8) - 8, d), "sequence", 8.0),
    "halves": (lambda q, d: scaled(halves(q & 15, q >> 4).to(torch.int8) - 8, d), "halves", 8.0),
    "no zero point": (lambda q, d: scaled(pairs(q & 15, q >> 4), d), "sequence", 0.0),
    "masked, then moved": (lambda q, d: scaled(pairs(q & 15, (q & 0xF0) >> 4), d), "sequence", 0.0),
    "halved by the scale": (lambda q, d: scaled(pairs(q & 15, q >> 4), d / 2 * 2), "sequence", 0.0),
    "zero after the scale": (
        lambda q, d: scaled(pairs(q & 15, q >> 4), d) - 7.0 * d.repeat_interleave(32, 1).view(N, K),
        "sequence",
        7.0,
    ),
    "through int64": (lambda q, d: scaled(pairs(q.long() & 15, q.long() >> 4) - 8, d), "sequence", 8.0),
    "sliced together": (lambda q, d: scaled(pairs(q[:, :16] & 15, q[:, :16] >> 4).repeat(1, 2), d), None, None),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_a_weight_is_made_of(name):
    weight, order, zero = RIGHT[name]
    found = stored(weight)
    if order is None:
        assert isinstance(found, str)
        return
    assert isinstance(found, Storage), found
    assert (found.packed.order, found.packed.zero) == (order, zero)
    assert torch.allclose(unpacked(found.packed, BYTES, SCALES), weight(BYTES, SCALES), atol=1e-6)


def unpacked(packed: Packed, codes: Tensor, scales: Tensor) -> Tensor:
    """The weight that a layout describes, by its own definition, one element at a time."""
    data, held, out = codes.flatten(), scales.flatten(), torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            at = packed.first + n * packed.row
            if packed.order == "halves":
                at += k // 32 * packed.block + k % 16
                code = int(data[at]) >> (4 * (k % 32 // 16)) & 15
            else:
                code = int(data[at + k // 2]) >> (4 * (k % 2)) & 15
            s = packed.scale
            assert s is not None
            out[n, k] = (code - packed.zero) * held[s.first + n * s.row + k // s.group * s.step]
    return out


WRONG = {
    "bytes that wrap around": (lambda q, d: scaled(pairs((q & 15) - 8, (q >> 4) - 8), d), None),
    "codes of three bits": (lambda q, d: scaled(pairs(q & 7, q >> 4 & 7), d), "3 bits"),
    "high codes first": (lambda q, d: scaled(pairs(q >> 4, q & 15), d), "an order that kernels do not read"),
    "one row read backwards": (
        lambda q, d: scaled(pairs(q & 15, q >> 4), d).index_select(0, torch.tensor([0, 1, 3, 2, 4, 5])),
        None,
    ),
    "rows out of step": (
        lambda q, d: scaled(pairs(torch.cat([q[:3], q[4:], q[3:4]]) & 15, torch.cat([q[:3], q[4:], q[3:4]]) >> 4), d),
        "an order that kernels do not read",
    ),
    "two scales": (lambda q, d: scaled(pairs(q & 15, q >> 4), d * d.flip(1)), None),
    "scales of groups of 8": (
        lambda q, d: (pairs(q & 15, q >> 4).view(N, -1, 8).float() * d.repeat(1, 4)[..., None]).view(N, K),
        "groups of 16, 32, 64",
    ),
    "codes squared": (lambda q, d: scaled(pairs(q & 15, q >> 4).float() * pairs(q & 15, q >> 4).float(), d), "several"),
    "no codes": (lambda q, d: d.repeat(1, 32) * 2.0, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_packed_weight(name):
    weight, reason = WRONG[name]
    found = stored(weight)
    if reason is None:
        # read from a result that is computed as before, if at all
        assert not isinstance(found, Storage) or found.sources[0].op == "call_function", found
    else:
        assert isinstance(found, str) and reason in found, found
