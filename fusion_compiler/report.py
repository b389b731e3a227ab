"""What the compiler decided and why. Public and stable.

Everything in a `Report` is plain data: numbers, strings and tuples. Amounts that depend on a symbolic size are given at
the size that was seen when tracing, with the formula beside them; so a report can be stored, read back and compared.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

from .candidates import Amount, Traffic
from .cost.amounts import at, formula

Verdict = Literal["fused", "kept"]


@dataclass(frozen=True)
class Work:
    """Traffic of device memory and predicted time of one way of computing something."""

    flops: float
    bytes_read: float
    bytes_written: float
    launches: int
    seconds: float
    formula: str = ""  # of `seconds`, where a size is symbolic

    @staticmethod
    def of(traffic: Traffic, seconds: Amount, sizes: Mapping[Any, int] | None = None) -> Work:
        """`sizes` gives the symbols the values they had when tracing."""
        known = dict(sizes or {})
        return Work(
            at(traffic.flops, known), at(traffic.bytes_read, known), at(traffic.bytes_written, known),
            traffic.launches, at(seconds, known), formula(seconds),
        )  # fmt: skip

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Option:
    """One way that was considered: a candidate with its predicted work, or a lowering that has none, and why."""

    name: str
    kernel: str = ""
    work: Work | None = None
    valid: str = "always"
    reason: str = ""
    details: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Range:
    """What is done for sizes lo ≤ symbol ≤ hi (`hi` None: without end)."""

    symbol: str
    lo: int
    hi: int | None
    verdict: Verdict
    candidate: str
    reason: str

    def __str__(self) -> str:
        upper = "" if self.hi is None else f" ≤ {self.hi}"
        return f"{self.lo} ≤ {self.symbol}{upper}: {self.verdict} ({self.candidate})"


@dataclass
class Verification:
    """What a fused region and its original, run side by side, have shown so far. It grows while a report is read.

    error: the largest absolute difference divided by the largest absolute value, the worst of all calls.
    wrong: whether rounding explains it no more.
    """

    error: float | None = None
    wrong: bool = False

    def note(self, error: float, *, wrong: bool) -> None:
        """Takes the error of one more call."""
        self.error, self.wrong = max(error, self.error or 0.0), self.wrong or wrong


@dataclass(frozen=True)
class Decision:
    """One match and what became of it.

    `before` is what Inductor is predicted to make of these nodes, `after` the same with the chosen kernel (None where
    kept).
    """

    pattern: str
    verdict: Verdict
    reason: str
    where: str
    before: Work
    after: Work | None = None
    candidates: tuple[Option, ...] = ()
    kernel: str = ""
    source: str = ""  # generated source, or the vendor call
    ranges: tuple[Range, ...] = ()
    verification: Verification = field(default_factory=Verification, hash=False)
    node: str = ""  # the node whose value is computed
    nodes: tuple[str, ...] = ()  # all that would be replaced, this one included
    details: tuple[tuple[str, Any], ...] = ()

    @property
    def saving(self) -> float:
        """Predicted seconds saved."""
        return self.before.seconds - self.after.seconds if self.after is not None else 0.0

    @property
    def error(self) -> float | None:
        """What verification has found so far; None where nothing was verified."""
        return self.verification.error


@dataclass(frozen=True)
class NearMiss:
    """A pattern's root stood at `root`, but not the rest: `reason` says what broke it at `where`, with the cure."""

    pattern: str
    reason: str
    where: str
    node: str = ""
    root: str = ""


@dataclass(frozen=True)
class Failure:
    """A stage of the compiler that raised; the graph was compiled as Inductor alone would."""

    stage: str
    error: str
    where: str = ""


def versions() -> dict[str, str]:
    """Versions that decisions depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}


@dataclass(frozen=True)
class Report:
    """Every decision for one graph, or for the graphs of one program (`Report.merged`)."""

    machine: str
    graph: str = ""
    decisions: tuple[Decision, ...] = ()
    near_misses: tuple[NearMiss, ...] = ()
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()  # what the user should know of the whole graph, such as that it trains
    versions: dict[str, str] = field(default_factory=versions, hash=False)

    @property
    def fused(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.verdict == "fused")

    @property
    def kept(self) -> tuple[Decision, ...]:
        return tuple(d for d in self.decisions if d.verdict == "kept")

    @property
    def saving(self) -> float:
        """Predicted seconds saved by all fusions together."""
        return sum(d.saving for d in self.decisions)

    @staticmethod
    def merged(reports: Iterable[Report]) -> Report:
        """One report of several graphs of one program, such as those between graph breaks."""
        parts = list(reports)
        if not parts:
            raise ValueError("nothing to merge: no graph was reported")
        machines = sorted({r.machine for r in parts})
        if len(machines) > 1:
            raise ValueError(f"reports for different machines cannot be merged: {', '.join(machines)}")
        return Report(
            machine=machines[0],
            graph=", ".join(r.graph for r in parts if r.graph),
            decisions=tuple(_labelled(d, r.graph) if len(parts) > 1 else d for r in parts for d in r.decisions),
            near_misses=tuple(n for r in parts for n in r.near_misses),
            failures=tuple(f for r in parts for f in r.failures),
            notes=tuple(dict.fromkeys(n for r in parts for n in r.notes)),
            versions=parts[0].versions,
        )

    # ---- as data --------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Nested dicts and lists of JSON types; totals are added for readers."""
        plain: dict[str, Any] = _plain(dataclasses.asdict(self))
        for decision in plain["decisions"]:
            decision |= decision.pop("verification")
        return plain | {"total": {"fused": len(self.fused), "kept": len(self.kept), "saving_seconds": self.saving}}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> Report:
        """The report that `to_dict` came from."""
        return Report(
            machine=raw["machine"],
            graph=raw["graph"],
            decisions=tuple(_decision(d) for d in raw["decisions"]),
            near_misses=tuple(NearMiss(**n) for n in raw["near_misses"]),
            failures=tuple(Failure(**f) for f in raw["failures"]),
            notes=tuple(raw["notes"]),
            versions=dict(raw["versions"]),
        )

    @staticmethod
    def from_json(text: str) -> Report:
        return Report.from_dict(json.loads(text))

    def __str__(self) -> str:
        from .report_text import render

        return render(self)


def _plain(value: Any) -> Any:
    """`value` in JSON's types: dtypes and sympy by their names, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _labelled(decision: Decision, graph: str) -> Decision:
    """`decision` with its nodes' names made unique among several graphs."""
    nodes = tuple(f"{graph}: {n}" for n in decision.nodes)
    return dataclasses.replace(decision, node=f"{graph}: {decision.node}", nodes=nodes)


def _pairs(raw: Iterable[Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in raw)


def _decision(raw: Mapping[str, Any]) -> Decision:
    known = {name: value for name, value in raw.items() if name not in ("error", "wrong")}
    return Decision(
        **{
            **known,
            "verification": Verification(raw["error"], raw["wrong"]),
            "before": Work(**raw["before"]),
            "after": Work(**raw["after"]) if raw["after"] else None,
            "candidates": tuple(
                Option(**{**o, "work": Work(**o["work"]) if o["work"] else None, "details": _pairs(o["details"])})
                for o in raw["candidates"]
            ),
            "ranges": tuple(Range(**r) for r in raw["ranges"]),
            "nodes": tuple(raw["nodes"]),
            "details": _pairs(raw["details"]),
        }
    )


# ---- where a node comes from --------------------------------------------------------------------
def where(node: Node) -> str:
    """The module and the source line that a node comes from: "model.layers.0.mlp (llama.py:175)".

    Nodes that a pass put into the graph say neither; then it is those of the nearest node that does.
    """
    reached, seen = [node], {node}
    for near in reached:  # grows: breadth first, what reads a node before what it reads
        module, line = _module(near), _source_line(near)
        if module and line:
            return f"{module} ({line})"
        if module or line:
            return module or line
        further = [n for n in dict.fromkeys((*near.users, *near.all_input_nodes)) if n not in seen]
        reached += further
        seen.update(further)
    return node.name


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values()))), "")
    # Dynamo writes L['self'].model.layers.0.mlp, or L['self']._modules['layers']…
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    return re.sub(r"^L\['[^']*'\]\.?", "", path)


def _source_line(node: Node) -> str:
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


# ---- every report of this process ---------------------------------------------------------------
_lock = threading.Lock()
_reports: list[Report] = []


def record(report: Report) -> None:
    """Adds a report to those of this process."""
    with _lock:
        _reports.append(report)


def reports() -> list[Report]:
    """Reports of every compilation of this process, newest last."""
    with _lock:
        return list(_reports)


def last_report() -> Report | None:
    """The newest report, or None where nothing has been compiled."""
    with _lock:
        return _reports[-1] if _reports else None
