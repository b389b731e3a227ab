"""Fake tensors of a traced graph (`torch._subclasses.fake_tensor`, `torch._guards.detect_fake_mode`).

Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule


def find_mode(gm: GraphModule) -> FakeTensorMode | None:
    """The fake mode under which `gm` was traced, found in its nodes' values; None where they are not fake."""
    values: list[Any] = []
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        values.extend(value if isinstance(value, (tuple, list)) else (value,))
    return detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)])


def mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake mode under which `gm` was traced, of which there must be one."""
    mode = find_mode(gm)
    if mode is None:
        raise ValueError("the graph holds no fake tensors: trace it with fake inputs before splicing into it")
    return mode


@contextmanager
def quietly() -> Iterator[None]:
    """Fake tensors log an error with its stack where an operation does not fit; here somebody tries whether it does."""
    log = logging.getLogger(torch._subclasses.fake_tensor.__name__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def new_mode() -> FakeTensorMode:
    """A fake mode of its own."""
    return FakeTensorMode()


def contents(tensor: Any) -> torch.Tensor | None:
    """What a tensor that a graph holds as a constant contains; None where it is a fake one and that is not known."""
    known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
    return known if isinstance(known, torch.Tensor) else None


def really() -> AbstractContextManager[Any]:
    """Tensors made inside hold data, whatever fake mode is active."""
    return unset_fake_temporarily()
