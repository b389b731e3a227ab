"""The figures that the README tells are figures of the files that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def told() -> Iterator[tuple[str, str, float]]:
    """(what, the file last named, µs) of every figure in the table."""
    section = (ROOT / "README.md").read_text().split("## What it is worth\n")[1].split("\n## ")[0]
    file = ""
    for line in section.splitlines():
        what, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        named = re.search(r"`(\w+\.json)`", what)
        file = named[1] if named else file
        for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", " ".join(cells).replace("FlexAttention", "")):
            if file:
                yield what, file, float(number)


def times(figures: Any) -> Iterator[float]:
    """Every time, in µs; most are stored in seconds."""
    if isinstance(figures, dict):
        for key, value in figures.items():
            if key == "pipelined" or key == "seconds" and isinstance(value, float):
                yield value * 1e6
            elif key in ("us", "cudnn") and value is not None:
                yield value
            elif key == "seconds":
                yield from (v * 1e6 for v in value.values() if v is not None)
            else:
                yield from times(value)
    elif isinstance(figures, list):
        for value in figures:
            yield from times(value)


FIGURES = list(told())


def test_the_table_is_there() -> None:
    assert len(FIGURES) > 20


@pytest.mark.parametrize(("what", "file", "microseconds"), FIGURES, ids=lambda value: str(value)[:40])
def test_a_figure_is_in_its_file(what: str, file: str, microseconds: float) -> None:
    shown = 0.05 if microseconds < 100 and microseconds != int(microseconds) else 0.5
    assert any(abs(t - microseconds) <= shown * 1.01 for t in times(json.loads((RESULTS / file).read_text()))), what
