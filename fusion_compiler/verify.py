"""Verification: a fused region runs beside the nodes it replaces, on the real inputs, and its error is recorded.

error = max|fused − original| / max|original|, over every call so far. The original computes in the model's dtype, so an
error of a few roundings of that dtype is expected; `tolerance` allows `ROUNDINGS` of them.
"""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .splice import Builder

ROUNDINGS = 4  # of half-precision intermediates that the fused kernel keeps in float32
FLOAT32_ROUNDINGS = 200  # of a float32 sum taken in another order


class Listener(Protocol):
    """Is told the error of every call, and whether rounding explains it."""

    def __call__(self, error: float, *, wrong: bool) -> None: ...


_listeners: dict[int, tuple[Listener, bool, str]] = {}


class WrongKernel(UserWarning):
    """A fused region computes something else than what it replaces; `strict` makes it an error."""


class VerificationError(RuntimeError):
    """A fused region computed something else than what it replaces."""


def tolerance(dtype: torch.dtype) -> float:
    """The largest error that the rounding of `dtype` explains."""
    return (FLOAT32_ROUNDINGS if dtype == torch.float32 else ROUNDINGS) * torch.finfo(dtype).eps


def compare(gm: GraphModule, original: Node, fused: Node, listener: Listener, *, strict: bool, name: str) -> Node:
    """A node with the value of `fused` that tells `listener` its error at every run.

    Of a large error a warning tells too, which calls the fused region by `name`; `strict` raises it.
    """
    key = len(_listeners)
    _listeners[key] = (listener, strict, name)
    builder = Builder(gm, max(original, fused).next, origin=original)
    return builder.call(torch.ops.fusion_compiler.verify.default, original, fused, key)


def error(original: Tensor, fused: Tensor) -> float:
    """max|fused − original| / max|original|; infinite where infinities or not-a-numbers stand elsewhere.

    Also where shape or dtype differ: an operator may return another tensor than its fake implementation promises.
    """
    if (original.shape, original.dtype) != (fused.shape, fused.dtype):
        return float("inf")
    if not original.numel():
        return 0.0
    a, b = original.double(), fused.double()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return float("inf")
    difference = float((b - a).nan_to_num(0.0).abs().max())
    return difference / (float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) or 1.0)


@torch.library.custom_op("fusion_compiler::verify", mutates_args=())
def _verify(original: Tensor, fused: Tensor, key: int) -> Tensor:
    listener, strict, name = _listeners[key]
    found, allowed = error(original, fused), tolerance(original.dtype)
    wrong = not found <= allowed
    listener(found, wrong=wrong)
    if wrong:
        said = f"{name}: error {found:.2e}, more than rounding to {original.dtype} explains ({allowed:.2e})"
        if strict:
            raise VerificationError(said)
        warnings.warn(said, WrongKernel, stacklevel=2)
    return fused.clone()


@_verify.register_fake
def _(original: Tensor, fused: Tensor, key: int) -> Tensor:
    return torch.empty_like(fused)
