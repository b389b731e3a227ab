"""What a user kernel writes, found once (`torch._higher_order_ops.triton_kernel_wrap`).

Inductor translates a kernel into Triton's IR at each of its launches to learn which arguments it writes. A model
launches the same few kernels in every layer. torch 2.11.0 asks `identify_mutated_tensors`, 2.13.0
`identify_accessed_tensors`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")


@contextmanager
def analysed_once() -> Iterator[None]:
    """While Inductor lowers a graph: launches of one kernel with like arguments are analysed together."""
    from torch._higher_order_ops import triton_kernel_wrap

    name = next(n for n in ANALYSES if hasattr(triton_kernel_wrap, n))
    analyse, known = getattr(triton_kernel_wrap, name), {}

    def analysed(kernel: Any, arguments: dict[str, Any], descriptors: Mapping[str, Any]) -> Any:
        key = kernel, tuple((k, like(v)) for k, v in arguments.items()), repr(sorted(descriptors.items()))
        if key not in known:
            known[key] = analyse(kernel, arguments, descriptors)
        return copy.copy(known[key])

    with mock.patch.object(triton_kernel_wrap, name, analysed):
        yield


def like(value: Any) -> tuple[Any, ...]:
    """All that the analysis sees of an argument: of tensors and symbolic sizes not which, of constants the value."""
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    return type(value), str(getattr(value, "dtype", ""))
