"""Measuring where predictions are too close to trust: `options={"autotune": True}`.

For each match whose verdict is not clear (another way is predicted within `CLOSE` of the best) the nodes are cut out
of the graph and compiled by Inductor alone, once as they are and once with each contender in their place; the times
that these take on the device at hand then decide instead of the predicted ones. With a symbolic size that holds around
the size seen when tracing. Measurements are kept on disk, so equal places are measured once. Nothing here can break
a compilation: where a measurement fails, a note says so and the predictions stand.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from . import splice, timing
from .algebra import Value
from .candidates import Candidate
from .cost.amounts import at
from .cost.baseline import Plan, inductor_plan
from .fused import Declared, Site
from .judge import Judgement, judge
from .machine import Machine
from .offers import Offer
from .regions import cut, random_inputs, traced_size
from .report import versions
from .rivals import CLOSE, rivals
from .torch_private import nested
from .torch_private.cache_folder import cache_folder

MOST_INPUT_SETS = 32
Build = Callable[[], GraphModule]


class Tuner:
    """Measures for the decisions of one graph. `settings` are Inductor's: what it makes depends on them.

    Decisions for another machine than the one `here` cannot be measured; a note says so.
    """

    def __init__(self, machine: Machine, here: Machine, settings: str = "", *, strict: bool = False) -> None:
        self._machine, self._settings, self._strict = machine, settings, strict
        self._known: dict[str, list[float]] = {}
        self._here = machine == here
        self.notes: list[str] = []
        if not self._here:
            self.notes.append(
                f"autotune: decisions for {machine.name} cannot be measured on the device at hand, "
                f"{here.name} ({here.source}); they are predicted"
            )

    def refine(self, predicted: Judgement, offers: Sequence[Offer]) -> Judgement:
        """The verdict by measurement where the predicted one is not clear, else the predicted one."""
        contenders = _contenders(predicted, offers) if self._here else []
        if not contenders:
            return predicted
        try:
            return predicted.where_traced(self._measured(predicted, offers, contenders))
        except Exception as error:
            if self._strict:
                raise
            cause = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            self.notes.append(
                f"autotune: measuring {predicted.decision.pattern} at {predicted.decision.where} failed "
                f"({cause}); its verdict is predicted"
            )
            return predicted

    def _measured(
        self, predicted: Judgement, offers: Sequence[Offer], contenders: Sequence[tuple[Site, Candidate]]
    ) -> Judgement:
        sizes, match = predicted.sizes, predicted.match
        places: dict[str, tuple[Node, ...]] = {}

        def ask(nodes: Sequence[Node]) -> Plan:
            plan = inductor_plan(nodes, self._machine)
            if plan.kernels:
                places.setdefault(_name(nodes), tuple(nodes))
            return plan

        rivals(match, offers, self._machine, ask)
        builds: dict[str, Build] = {name: functools.partial(_region, nodes) for name, nodes in places.items()}
        names: dict[int, str] = {}
        for number, (site, c) in enumerate(contenders):
            names[id(c)] = f"{number} {c.name}"
            builds[names[id(c)]] = functools.partial(_spliced, site, c)
        seconds = self._seconds(self._key(offers, contenders, list(places.values())), builds, offers)

        def price(nodes: Sequence[Node]) -> Plan:
            plan = inductor_plan(nodes, self._machine)
            guess = at(plan.seconds, sizes)
            kernels = (dataclasses.replace(k, seconds=at(k.seconds, sizes)) for k in plan.kernels)
            factor = seconds[_name(nodes)] / guess if plan.kernels else 1.0
            return Plan(tuple(dataclasses.replace(k, seconds=float(k.seconds) * factor) for k in kernels))

        def timed(c: Candidate) -> Candidate:
            if id(c) not in names:
                return dataclasses.replace(c, seconds=at(c.seconds, sizes))
            return dataclasses.replace(c, seconds=seconds[names[id(c)]], details=(*c.details, ("measured", True)))

        told = [dataclasses.replace(o, candidates=tuple(map(timed, o.candidates))) for o in offers]
        return judge(match, told, self._machine, price=price)

    # ---- once per kind of place -----------------------------------------------------------------
    def _key(
        self, offers: Sequence[Offer], contenders: Sequence[tuple[Site, Candidate]], places: Sequence[Sequence[Node]]
    ) -> dict[str, Any]:
        """Everything that the times depend on, in JSON's types and without the names of nodes."""
        gpu = torch.cuda.get_device_name() if self._machine.kind != "cpu" else ""
        return {
            "machine": [gpu, repr(self._machine)],
            "threads": torch.get_num_threads(),
            "versions": {**versions(), "fusion_compiler": _source_hash()},
            "inductor": self._settings,
            "ops": [_described(o.op) for o in offers],
            "candidates": [[c.name, c.kernel, _described(c.details)] for _, c in contenders],
            "nodes": [_written(nodes) for nodes in places],
        }

    def _seconds(
        self, key: Mapping[str, Any], builds: Mapping[str, Build], offers: Sequence[Offer]
    ) -> dict[str, float]:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        # a kernel that the user registered may change without its name
        folder = None if any(isinstance(o.op, Declared) for o in offers) else cache_folder("measurements")
        path = folder / f"{digest}.json" if folder else None
        found = self._known.get(digest) or _load(path, key, len(builds))
        if found is None:
            found = list(_times(builds, self._machine).values())
            _store(path, key, found)
        self._known[digest] = found
        return dict(zip(builds, found, strict=True))


def _contenders(predicted: Judgement, offers: Sequence[Offer]) -> list[tuple[Site, Candidate]]:
    """The candidates predicted within CLOSE of the fastest way, if there is more than one such way."""
    ways = [(o.site, c) for o in offers for c in o.candidates if c.valid in (True, sympy.true) or _holds(c, predicted)]
    if not ways:
        return []
    work = {id(c): option.work for (_, c), option in zip(_all(offers), predicted.decision.candidates[1:], strict=False)}
    seconds = {key: w.seconds for key, w in work.items() if w is not None}
    inductor = predicted.decision.before.seconds
    most = (1 + CLOSE) * min(inductor, *(seconds[id(c)] for _, c in ways))
    close = [(site, c) for site, c in ways if seconds[id(c)] <= most]
    return close if len(close) + (inductor <= most) > 1 else []


def _all(offers: Sequence[Offer]) -> list[tuple[Site, Candidate]]:
    """Every candidate, in the order in which a decision lists them behind Inductor."""
    return [(o.site, c) for o in offers for c in o.candidates]


def _holds(candidate: Candidate, predicted: Judgement) -> bool:
    valid = candidate.valid
    return isinstance(valid, sympy.Basic) and valid.subs(predicted.sizes) == sympy.true


# ---- what is compiled and timed -----------------------------------------------------------------
def _region(nodes: Sequence[Node]) -> GraphModule:
    return cut(nodes)[0]


def _spliced(site: Site, candidate: Candidate) -> GraphModule:
    """The candidate alone, as it stands in the graph of its site: from the operands to the output."""
    gm, copies = cut(site.interior, site.outputs)
    parts = (site.operands, site.interior, site.escaping, site.others)
    operands, interior, escaping, others = (tuple(copies[n] for n in part) for part in parts)
    moved = Site(operands, copies[site.output], interior, escaping, others)
    builder = splice.Builder(gm, moved.place)
    for part, new in splice.emitted(candidate, builder, moved):
        splice.replace(part, new)
    splice.clean(gm)
    return gm


def _times(builds: Mapping[str, Build], machine: Machine) -> dict[str, float]:
    with nested.apart():
        runs: dict[str, timing.Run] = {}
        calls: dict[str, int] = {}
        for name, build in builds.items():
            gm = build()
            inputs = random_inputs(gm, seed=0)
            compiled = nested.compile_alone(gm, inputs)
            if machine.kind == "cpu":
                runs[name], calls[name] = functools.partial(compiled, *inputs), 1
            else:
                calls[name] = _sets(inputs, machine)
                sets = [inputs, *(random_inputs(gm, seed=1000 * i) for i in range(1, calls[name]))]
                runs[name] = timing.recorded(compiled, sets)
        return {name: seconds / calls[name] for name, seconds in timing.medians(runs).items()}


def _sets(inputs: Sequence[Any], machine: Machine) -> int:
    """How many sets of inputs do not fit L2 together."""
    held = sum(t.untyped_storage().nbytes() for t in inputs if isinstance(t, torch.Tensor))
    return max(1, min(MOST_INPUT_SETS, math.ceil(2 * machine.l2_bytes / max(held, 1))))


# ---- keys ---------------------------------------------------------------------------------------
def _name(nodes: Sequence[Node]) -> str:
    return " ".join(n.name for n in nodes)


def _described(value: Any) -> Any:
    """`value` in JSON's types, alike in every process."""
    if isinstance(value, torch.SymInt):
        return traced_size(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Value):
        return repr(value)  # its serial number only tells when it was made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(_described(getattr(value, f.name)) for f in dataclasses.fields(value))]
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    return getattr(value, "__qualname__", None) or str(value)


def _written(nodes: Sequence[Node]) -> list[str]:
    """The nodes as text: what each computes of which, by number, and of what shapes."""
    numbers: dict[Node, int] = {}
    lines: list[str] = []

    def write(node: Node, formula: str) -> None:
        numbers[node] = len(numbers)
        lines.append(f"{formula} -> {_shape(node.meta.get('val'))}")

    for node in nodes:
        for source in node.all_input_nodes:
            if source not in numbers:
                write(
                    source,
                    "input" if source.all_input_nodes or source.op != "call_function" else _call(source, numbers),
                )
        write(node, _call(node, numbers))
    return lines


def _call(node: Node, numbers: Mapping[Node, int]) -> str:
    args = torch.fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
    return f"{node.target}{args}"


def _shape(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_shape(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return _described(value)
    layout = [[traced_size(s) for s in part] for part in (value.shape, value.stride(), [value.storage_offset()])]
    return [str(value.dtype), str(value.device), *layout]


@functools.cache
def _source_hash() -> str:
    """Of the compiler's own source: kernels change with it, and a checkout changes without its version."""
    from . import __path__ as roots

    digest = hashlib.sha256()
    for root in roots:
        for folder in (root,) if Path(root).name == "fusion_compiler" else (f"{root}/lowering", f"{root}/patterns"):
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.read_bytes())
    return digest.hexdigest()


# ---- the folder of measurements -----------------------------------------------------------------
def _load(path: Path | None, key: Mapping[str, Any], count: int) -> list[float] | None:
    """The seconds stored for `key`; None where there are none, or the file is none of ours."""
    try:
        stored = json.loads(path.read_text()) if path else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(stored, dict) or stored.get("key") != key:
        return None
    seconds = stored.get("seconds")
    if not isinstance(seconds, list) or len(seconds) != count:
        return None
    usable = all(isinstance(s, float) and 0 < s < math.inf for s in seconds)
    return seconds if usable else None


def _store(path: Path | None, key: Mapping[str, Any], seconds: Sequence[float]) -> None:
    """Other processes see the whole file or none. A folder that cannot be written costs the next process its time."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump({"key": key, "seconds": list(seconds)}, file)
        os.replace(file.name, path)
    except OSError:
        return
