"""The `torch.compile` backend: raise → match → judge → select → splice, then Inductor for the rest.

Entry point "fusion_compiler" in `torch_dynamo_backends`. Inductor traces and decomposes the graph; its last step is
ours: `rewrite` replaces in place what pays, and Inductor compiles what then stands there. This module alone wires
lowerings in, and patterns through `registry`; `capture.explain` goes through it too.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from . import layout, measure, registry, select, splice, verify
from . import report as reporting
from .candidates import Candidate
from .config import Options
from .fused import MatmulFamily, MatmulGroup, Site
from .judge import judge
from .legality import Legality, is_empty
from .machine import TABLE, Machine, machine
from .match import Match, find_all
from .notes import notes
from .offers import offers_of, shared, unknown_size
from .purity import is_impure
from .quantised import with_packed_weights
from .ranges import ranges_of
from .reasons import EMPTY, UNGUARDED, UNKNOWN
from .report import Decision, Failure, NearMiss, Report, Work, where
from .semantics import SemanticView
from .severed import severed_seconds
from .torch_private import dynamo_cache, fake_tensors, inductor, size_guards

_labels = itertools.count()


class StageError(RuntimeError):
    """A stage of the compiler failed; `strict=True` raises it, otherwise it goes into the report."""

    def __init__(self, stage: str, cause: Exception) -> None:
        super().__init__(f"stage {stage!r} of fusion_compiler failed: {type(cause).__name__}: {cause}")
        self.stage, self.cause = stage, cause
        self.failure = Failure(stage, f"{type(cause).__name__}: {cause}")


def fusion_compiler(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Options | None = None,
    **_: Any,
) -> Any:
    """Compiles a Dynamo graph. See `config.Options` for `options`; further arguments of newer torch are accepted."""
    parsed = parse_options(options, mode)
    label, guardable = f"graph {next(_labels)}", not dynamo_cache.is_last_graph()
    step = functools.partial(compile_step, options=parsed, label=label, guardable=guardable)
    return inductor.compile_graph(gm, example_inputs, step, inductor_settings(parsed))


def parse_options(options: Mapping[str, Any] | Options | None, mode: str | None = None) -> Options:
    known, modes = registry.names(), list(inductor.modes())
    parsed = Options.parse(
        options, mode=mode, patterns=known, machines=[*TABLE, "cpu"], modes=modes, settings=inductor.settings()
    )
    registry.check_local(parsed.patterns)
    return parsed


def inductor_settings(options: Options) -> dict[str, Any]:
    patches = {**inductor.modes()[options.mode or "default"], **(options.inductor or {})}
    # verification reads its error back to the host, which no CUDA graph can hold
    return {**patches, "triton.cudagraphs": False} if options.verify else patches


def compile_step(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Options,
    label: str,
    guardable: bool = True,
    **context: Any,
) -> Any:
    """The last step of Inductor's pipeline: what pays is replaced in `gm`, the rest is Inductor's (or runs eagerly).

    Where a stage fails, `gm` is put back as it was and compiled as without us, and the report says so. A graph that is
    not `guardable` cannot be compiled again for other sizes.
    """
    backward = bool(context.get("is_backward"))

    def finish() -> Any:
        if options.remainder == "eager":
            return inductor.run_eagerly(gm)
        return inductor.compile_aten(gm, example_inputs, **context)

    label, guardable = label + " (backward)" * backward, guardable and not backward
    planned = plan(gm, options, label, trains=not context.get("is_inference"), guardable=guardable)
    report, original = planned.report, copy.deepcopy(gm.graph)
    try:
        with _stage("splice"):
            if planned.chosen and options.remainder == "inductor":
                check_device(gm, machine(options.machine) if options.machine else None)
            hold_ranges(gm, planned.judged)
            report = _with_sources(report, splice_all(gm, planned.chosen, options))
        with _stage("compile"):
            compiled = finish()
    except StageError as error:
        if not planned.chosen and error.stage == "compile":
            raise error.cause from None  # none of our doing
        if options.strict:
            raise
        gm.graph = original
        report = _abandoned(report, error.failure)
        compiled = finish()
    reporting.record(report)
    return compiled


@dataclass(frozen=True)
class Judged:
    """One match with its verdict, where it stands, and what carries it out if it is fused.

    `span` is (symbol, lo, hi) where the verdict holds for some sizes only.
    """

    decision: Decision
    site: Site
    candidate: Candidate | None = None
    span: tuple[sympy.Symbol, int, int | None] | None = None

    @property
    def limit(self) -> sympy.Basic | None:
        """The sizes that the chosen kernel takes, where it does not take all."""
        valid = self.candidate.valid if self.candidate else True
        return valid if isinstance(valid, sympy.Basic) and valid.free_symbols else None

    def kept(self, reason: str) -> Judged:
        return dataclasses.replace(self, decision=_kept(self.decision, reason), candidate=None)

    def serving(self, whole: Collection[sympy.Symbol]) -> Judged:
        """This where all sizes of the symbols in `whole` have to be served."""
        bounding = {self.span[0]} if self.span is not None else set()
        limiting = set() if self.limit is None else self.limit.free_symbols
        found = self.kept(UNGUARDED) if self.candidate and (bounding | limiting) & set(whole) else self
        return dataclasses.replace(found, span=None) if bounding & set(whole) else found


def _kept(decision: Decision, reason: str) -> Decision:
    return dataclasses.replace(decision, verdict="kept", reason=reason, after=None, kernel="", source="")


@dataclass(frozen=True)
class Planned:
    """What is to be done with a graph: the report, and the fusions to carry out."""

    report: Report
    judged: tuple[Judged, ...] = ()

    @property
    def chosen(self) -> tuple[Judged, ...]:
        return tuple(j for j in self.judged if j.decision.verdict == "fused")


def plan(gm: GraphModule, options: Options, label: str, *, trains: bool = False, guardable: bool = True) -> Planned:
    """The line up to where the graph would change: raise → match → judge → select.

    Where the graph is not `guardable`, a verdict that holds for some sizes only does not count.
    """
    target = machine(options.machine or ("cpu" if device_of(gm) == "cpu" else None))
    report = Report(machine=target.name, graph=label, notes=notes(gm, trains=trains))
    tuner = tuner_for(gm, options, target) if options.autotune else None
    try:
        with _stage("raise"):
            view = SemanticView(gm)
        with _stage("match"):
            matches, near_misses = find_all(view, registry.active_patterns(options.patterns, options.disable))
            matches, rounded = with_packed_weights(view, matches, q8_activations=options.activations == "q8_1")
            near_misses += rounded
        with _stage("judge"):
            judged, ranged = judge_all(gm, matches, target, tuner, whole=unguarded(gm, guardable=guardable))
        with _stage("select"):
            judged = choose(gm, judged)
    except StageError as error:
        if options.strict:
            raise
        return Planned(dataclasses.replace(report, failures=(error.failure,)))
    report = dataclasses.replace(
        report,
        decisions=tuple(j.decision for j in judged),
        near_misses=tuple(
            NearMiss(n.pattern, n.reason, where(n.node), n.node.name, where(n.root)) for n in near_misses
        ),
        notes=(*report.notes, *ranged, *(tuner.notes if tuner else ())),
    )
    return Planned(report, tuple(judged))


def tuner_for(gm: GraphModule, options: Options, target: Machine) -> measure.Tuner:
    """What measures for `gm`, compiled by Inductor as the options ask."""
    here = machine("cpu" if device_of(gm) == "cpu" else None)
    settings = f"{options.mode} {sorted((options.inductor or {}).items())}"
    return measure.Tuner(target, here, settings, strict=options.strict)


def unguarded(gm: GraphModule, *, guardable: bool) -> set[sympy.Symbol]:
    """The symbols of which a graph has to serve all sizes."""
    mode = fake_tensors.find_mode(gm)
    if mode is None:
        return set()
    return size_guards.promised(mode) if guardable else size_guards.symbols(mode)


def device_of(gm: GraphModule) -> str:
    """The type of device that a graph runs on: an accelerator if any of its tensors lies there, else "cpu"."""
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return next((v.device.type for v in values if isinstance(v, torch.Tensor) and v.device.type != "cpu"), "cpu")


def judge_all(
    gm: GraphModule,
    matches: Sequence[Match],
    target: Machine,
    tuner: measure.Tuner | None = None,
    *,
    whole: Collection[sympy.Symbol] = (),
) -> tuple[list[Judged], tuple[str, ...]]:
    """The verdict on every match, and notes on the ranges of sizes for which they hold; these are all the sizes of the
    symbols in `whole`.

    A form of a match that is not legal is offered with the sentence that says why.
    """
    from .lowering import lowerings

    legality, offering = Legality(gm.graph), lowerings()
    judged = []
    taken: list[set[Node]] = []
    offered = list(shared(matches, [offers_of(match, legality, target, offering) for match in matches]))
    ranges = ranges_of(matches, offered, target, whole)
    for match, offers in zip(matches, offered, strict=True):
        unknown = unknown_size(match.site)
        if unknown is not None or is_empty(match.site.output):
            nothing, reason = Work(0, 0, 0, 0, 0.0), EMPTY if unknown is None else UNKNOWN.format(unknown)
            decision = Decision(match.pattern, "kept", reason, where(match.site.output), nothing)
            judged.append(Judged(decision, match.site))
            continue
        if isinstance(match.op, (MatmulFamily, MatmulGroup)):
            activated = match.op.whole.activation is not None
            match = dataclasses.replace(match, severed=severed_seconds(match.site, taken, target, activation=activated))
        judgement = judge(match, offers, target, ranges=ranges.of, whole=whole)
        judgement = tuner.refine(judgement, offers) if tuner else judgement
        choice = judgement.choice()
        if choice.candidate is not None:
            taken.append(set(choice.site.interior) - set(choice.site.escaping))
        ranged = judgement.symbol is not None and len(judgement.choices) > 1
        span = (judgement.symbol, choice.lo, choice.hi) if ranged and judgement.symbol is not None else None
        found = Judged(judgement.decision, choice.site, choice.candidate, span)
        if found.candidate and found.limit is not None and size_guards.implied(fake_tensors.mode_of(gm), found.limit):
            found = dataclasses.replace(found, candidate=dataclasses.replace(found.candidate, valid=True))
        judged.append(found.serving(whole))
    return judged, ranges.notes


def choose(gm: GraphModule, judged: Sequence[Judged]) -> list[Judged]:
    """The fusions that can stand together; the others are kept, and say which fusion took their place."""
    fused = [j for j in judged if j.decision.verdict == "fused"]
    items = [
        select.Item(
            saving=j.decision.saving,
            exclusive=frozenset(j.site.interior) - frozenset(j.site.escaping),
            reads=frozenset(j.site.operands),
            output=j.site.output,
        )
        for j in fused
    ]
    edges = [(source, node) for node in gm.graph.nodes for source in node.all_input_nodes]
    winners = select.best(items, edges)
    lost = {id(fused[i]): items[i] for i in set(range(len(fused))) - set(winners)}
    unread = {id(fused[i]) for i in winners} - _read(gm, [fused[i] for i in winners])
    carried_out = [fused[i] for i in winners if id(fused[i]) not in unread]
    claimed = {node: id(j) for j in carried_out for node in (*j.site.interior, *j.site.outputs)}
    result = []
    for j in judged:
        item, idle = lost.get(id(j)), id(j) in unread
        if claimed.get(j.site.output, id(j)) != id(j):
            j = dataclasses.replace(j, span=None)  # whatever its verdict, others take its nodes
        if idle:
            j = j.kept("the fusions that read its result compute it themselves, so nothing is left to do here")
        elif item is not None:
            rival = next((fused[i].decision for i in winners if items[i].exclusive & item.exclusive), None)
            j = j.kept(
                f"{rival.pattern} at {rival.where} takes some of the same nodes; together the chosen fusions save more"
                if rival
                else "together with the chosen fusions it would make the graph cyclic, or it saves nothing"
            )
        result.append(j)
    return result


def _read(gm: GraphModule, chosen: Sequence[Judged]) -> set[int]:
    """Identities of the fusions whose result somebody still needs once all of them are carried out."""
    at = {output: j for j in chosen for output in j.site.outputs}
    found: set[int] = set()
    seen: set[Node] = set()
    stack = [n for n in gm.graph.nodes if n.op == "output" or is_impure(n)]
    while stack:
        node = stack.pop()
        j = at.get(node)
        if j is not None:
            found.add(id(j))
        fresh = [n for n in (j.site.operands if j else node.all_input_nodes) if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return found


def check_device(gm: GraphModule, target: Machine | None) -> None:
    """Refuses to put kernels for one kind of machine into a graph that runs on another."""
    device = device_of(gm)
    if target is not None and (target.kind == "cpu") != (device == "cpu"):
        raise ValueError(
            f"the decisions are for {target.name}, but the graph runs on {device}; leave out the option `machine`, "
            "or use `explain` to see the decisions alone"
        )


def hold_ranges(gm: GraphModule, judged: Sequence[Judged]) -> None:
    """Installs guards so that sizes for which a verdict would be another are compiled anew.

    A verdict is solved in one symbol, the others as they were when tracing; a kernel may be limited in all of them.
    """
    for span in {j.span for j in judged if j.span is not None}:
        size_guards.hold(fake_tensors.mode_of(gm), *span)
    for limit in {j.limit for j in judged if j.limit is not None}:
        size_guards.require(fake_tensors.mode_of(gm), limit)


def splice_all(gm: GraphModule, chosen: Sequence[Judged], options: Options) -> list[tuple[Decision, str]]:
    """Carries out the chosen fusions in graph order, so that each reads what the ones before it left.

    Returns the source of each: what was generated, or the calls.
    """
    moved: dict[Node, Node] = {}
    sources: list[tuple[Decision, str]] = []
    for j in sorted(chosen, key=lambda j: j.site.output):
        assert j.candidate is not None, "only a kept verdict has no candidate"
        site = dataclasses.replace(j.site, operands=tuple(moved.get(n, n) for n in j.site.operands))
        builder = splice.Builder(gm, site.place, origin=site.output)
        d = j.decision
        for part, made in splice.emitted(j.candidate, builder, site):
            new = layout.fit(builder, part, made)
            if options.verify:
                name = f"{d.kernel} for {d.pattern} at {d.where}"
                new = verify.compare(gm, part.output, new, d.verification.note, strict=options.strict, name=name)
            moved[part.output] = splice.replace(part, new)
        sources.append((d, builder.source))
    splice.clean(gm)
    return sources


def _with_sources(report: Report, sources: Sequence[tuple[Decision, str]]) -> Report:
    of = {id(decision): source for decision, source in sources}
    decisions = (dataclasses.replace(d, source=of.get(id(d), "")) for d in report.decisions)
    return dataclasses.replace(report, decisions=tuple(decisions))


@contextmanager
def _stage(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise StageError(name, error) from error


def _abandoned(report: Report, failure: Failure) -> Report:
    """`report` after a failure: nothing is fused."""
    reason = f"stage {failure.stage!r} failed, so Inductor compiles this graph alone"
    decisions = tuple(_kept(d, reason) if d.verdict == "fused" else d for d in report.decisions)
    return dataclasses.replace(report, decisions=decisions, failures=(*report.failures, failure))
