"""Tables that several processes prepare: what fails or dies takes nothing else with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import parts


def prepare(item: parts.Item) -> Callable[[], dict[str, Any]]:
    if item.name == "dies":
        os._exit(3)
    if item.name == "fails":
        raise ValueError("no such row")
    if item.name == "fails when measured":
        raise_later: dict[str, Any] = {}
        return lambda: raise_later["figures"]
    if item.name == "dies when measured":
        return lambda: os._exit(4)
    return lambda: {"name": item.name}


def test_the_other_rows_are_measured(capfd: pytest.CaptureFixture[str]) -> None:
    names = ["one", "dies", "fails", "dies when measured", "two", "fails when measured"]
    rows = list(parts.measured([*map(parts.Item, names)], prepare, jobs=6))
    assert [row["name"] for row in rows] == ["one", "two"]
    told = capfd.readouterr().err
    assert "dies: the process died with 3" in told and "dies when measured: the process died with 4" in told
    assert "fails: " in told and "ValueError: no such row" in told and "KeyError: 'figures'" in told


def test_a_row_that_is_late_is_given_up(capfd: pytest.CaptureFixture[str]) -> None:
    rows = list(parts.measured([parts.Item("one"), parts.Item("two")], prepare, jobs=1, seconds=parts.LAST))
    assert not rows and "two: no time to prepare it" in capfd.readouterr().err
