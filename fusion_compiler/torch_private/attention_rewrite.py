"""Inductor's own rewrite of attention, made to look at numbers (`torch._inductor.fx_passes.fuse_attention`).

Its patterns were traced in advance with every number left out, and the check that was to compare them with the graph's
own numbers is given the same patterns: a softmax over the queries, heads permuted another way and a mask of queries
are all taken for the attention that they resemble, with wrong results. While a graph is compiled for us that check
traces the pattern anew for the sizes at hand, as it does for every pattern that was not traced in advance.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_PRETRACED = "search_fn_pattern"
_ours: ContextVar[bool] = ContextVar("compiling for fusion_compiler", default=False)

Check = Callable[[Any], bool]


@contextmanager
def checked() -> Iterator[None]:
    """Has what `check_attention` found checked by its numbers inside."""
    token = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(token)


def check_attention() -> None:
    """To be called when the patterns of Inductor's joint passes are registered, before the passes."""
    for entry in _unchecked():
        entry.extra_check = _Checked(entry.extra_check)


class _Checked:
    """The check of one pattern: as it was, or by numbers where a graph is compiled for us."""

    def __init__(self, original: types.FunctionType) -> None:
        cells = _captured(original) | {_PRETRACED: types.CellType(None)}
        closure = tuple(cells[name] for name in original.__code__.co_freevars)
        self.original: Check = original
        self.by_numbers: Check = types.FunctionType(
            original.__code__, original.__globals__, original.__name__, original.__defaults__, closure
        )

    def __call__(self, match: Any) -> bool:
        return self.by_numbers(match) if _ours.get() else self.original(match)


def _captured(check: types.FunctionType) -> dict[str, types.CellType]:
    return dict(zip(check.__code__.co_freevars, check.__closure__ or (), strict=True))


def _unchecked() -> Iterator[Any]:
    """Every registered pattern of attention whose check was not replaced yet."""
    from torch._inductor.fx_passes import fuse_attention, joint_graph

    for entries in joint_graph.patterns.patterns.values():
        for entry in entries:
            captured = _captured(entry.extra_check) if isinstance(entry.extra_check, types.FunctionType) else {}
            if _PRETRACED in captured and captured["search_fn"].cell_contents.__module__ == fuse_attention.__name__:
                yield entry
