"""A report as text for people: 100 columns, with or without a terminal, equal decisions of many layers told once."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import Decision, NearMiss, Report, Work

WIDTH = 100


def render(report: Report) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(Text(_headline(report)))
    for note in report.notes:
        console.print(Padding(Text(f"Note: {note}"), (0, 0, 0, 2)))
    if report.decisions:
        console.print()
        console.print(_decisions(_outer(report)))
        console.print()
        console.print(Text(_total(report)))
    elif not report.failures:
        console.print(Text("No place in this graph matched a fusion; Inductor compiles all of it."))
    if report.near_misses:
        console.print(Text("\nNearly matched, and what stood in the way:"))
        for (first, places), count in _grouped_misses(report.near_misses):
            console.print(Padding(Text(f"{first.pattern} at {_times(places, count)}: {first.reason}"), (0, 0, 0, 2)))
    for failure in report.failures:
        place = f" at {failure.where}" if failure.where else ""
        console.print(Text(f"\nStage {failure.stage!r} failed{place}, so Inductor compiles alone: {failure.error}"))
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _headline(report: Report) -> str:
    parts = [f"fusion_compiler for {report.machine}", *(f"{k} {v}" for k, v in report.versions.items())]
    return " · ".join([*parts, report.graph] if report.graph else parts)


def _outer(report: Report) -> list[Decision]:
    """The decisions without those kept inside a larger match, whose verdict says what matters."""
    holders: dict[str, list[Decision]] = {}
    for d in report.decisions:
        for name in d.nodes:
            holders.setdefault(name, []).append(d)

    def moot(d: Decision) -> bool:
        around = [h for h in holders.get(d.node, ()) if h is not d]
        return d.verdict == "kept" and any(h.verdict == "fused" or set(h.nodes) > set(d.nodes) for h in around)

    return [d for d in report.decisions if not moot(d)]


def _decisions(decisions: Sequence[Decision]) -> Table:
    table = Table(show_edge=False, pad_edge=False, expand=True, leading=1)
    table.add_column("Fusion and place", width=31, overflow="fold")
    table.add_column("Predicted", width=20)
    table.add_column("Verdict", ratio=1, overflow="fold")
    # what was fused comes first; within that, graph order
    for (first, places), count in _grouped(sorted(decisions, key=lambda d: d.verdict != "fused")):
        table.add_row(f"{first.pattern}{_count(count)}\n{_place(places)}", _work(first), _verdict(first))
    return table


def _work(decision: Decision) -> str:
    before, after = decision.before, decision.after
    timed = "\n(time measured)" if _is_measured(decision) else ""
    if after is None:
        return f"{duration(before.seconds)}\n{size(before.bytes)}\n{_kernels(before)}{timed}"
    return (
        f"{duration(before.seconds)} → {duration(after.seconds)}\n"
        f"{size(before.bytes)} → {size(after.bytes)}\n"
        f"{before.launches} → {_kernels(after)}{timed}"
    )


def _is_measured(decision: Decision) -> bool:
    """Whether the times shown are measured: of what was chosen, or of Inductor where nothing was."""
    inductor = decision.candidates[0].details if decision.candidates else ()
    return ("measured", True) in (decision.details if decision.after else inductor)


def _kernels(work: Work) -> str:
    return f"{work.launches} kernel{'s' * (work.launches != 1)}"


def _verdict(decision: Decision) -> str:
    lines = [f"{decision.verdict}: {decision.reason}"]
    if decision.kernel:
        lines.append(f"kernel: {decision.kernel.removesuffix('.default')}")
    lines += map(str, decision.ranges)
    if decision.error is not None:
        verdict = "WRONG, rounding does not explain it" if decision.verification.wrong else "verified"
        lines.append(f"{verdict}: largest relative difference {decision.error:.1e}")
    return "\n".join(lines)


def _total(report: Report) -> str:
    fused, outer = len(report.fused), _outer(report)
    matches = f"{len(outer)} match{'es' * (len(outer) != 1)}"
    inside = [d.pattern for d in report.decisions if d not in outer]
    also = f" Inside these places also matched: {_counted(inside)}." if inside else ""
    if not fused:
        return f"Of {matches} none is fused: none was {_known(outer)} to pay.{also}"
    before = sum(d.before.seconds for d in report.fused)
    launches = sum(d.before.launches - d.after.launches for d in report.fused if d.after)
    return (
        f"Of {matches} {fused} {'is' if fused == 1 else 'are'} fused: {_known(report.fused)} {duration(before)} → "
        f"{duration(before - report.saving)}, saving {duration(report.saving)} and {launches} kernel launches.{also}"
    )


def _known(decisions: Sequence[Decision]) -> str:
    found = {_is_measured(d) for d in decisions}
    return "partly measured" if len(found) > 1 else "measured" if True in found else "predicted"


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{name}{_count(names.count(name))}" for name in dict.fromkeys(names))


# ---- equal decisions of many layers -------------------------------------------------------------
_Places = tuple[str, ...]


def _grouped(decisions: Iterable[Decision]) -> list[tuple[tuple[Decision, _Places], int]]:
    groups: dict[object, list[Decision]] = {}
    for d in decisions:
        key = (d.pattern, d.verdict, d.reason, d.kernel, d.before, d.after, d.ranges, _layerless(d.where))
        groups.setdefault(key, []).append(d)
    return [((g[0], tuple(d.where for d in g)), len(g)) for g in groups.values()]


def _grouped_misses(misses: Iterable[NearMiss]) -> list[tuple[tuple[NearMiss, _Places], int]]:
    groups: dict[object, list[NearMiss]] = {}
    for miss in misses:
        groups.setdefault((miss.pattern, _layerless(miss.reason), _layerless(miss.where)), []).append(miss)
    return [((g[0], tuple(m.where for m in g)), len(g)) for g in groups.values()]


def _layerless(text: str) -> str:
    """`text` without the numbers that count layers or nodes: `.3` in a module path, the suffix of `mm_14`."""
    return re.sub(r"(?<=[a-z])_\d+\b", "", re.sub(r"\.\d+(?=\.)|(?<=[a-z])\.\d+(?=\s|$)", ".*", text))


def _place(places: _Places) -> str:
    return _layerless(places[0]) if len(set(places)) > 1 else places[0]


def _count(count: int) -> str:
    return f" ×{count}" if count > 1 else ""


def _times(places: _Places, count: int) -> str:
    return _place(places) + _count(count)


# ---- numbers ------------------------------------------------------------------------------------
def duration(seconds: float) -> str:
    """Three significant digits with the unit that fits: "57.2 µs"."""
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def size(count: float) -> str:
    """Bytes with the decimal unit that fits: "33.6 MB"."""
    return _scaled(count, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    # 999.5 would round to 1000: the next unit begins there
    unit, scale = next(((u, s) for u, s in units if abs(value) >= 0.9995 * s), units[-1])
    number = value / scale
    digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f} {unit}" if unit != "B" else f"{number:.0f} B"
