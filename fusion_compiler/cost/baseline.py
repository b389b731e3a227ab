"""What Inductor is predicted to make of a set of FX nodes: the price of leaving them alone.

Matmuls become library calls. Everything else is grouped as Inductor's scheduler does: connected pointwise nodes and
reductions of equal row length form one kernel, as long as no matmul lies between them; views are free; a clone is
work. Each kernel reads every input once and writes what others use; a reduction over rows too long for one
block reads its rows once per dependent reduction and once more to use the result. A buffer that lives only between
these kernels and fits half of L2 (a CPU's last-level cache) moves at L2 bandwidth.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..attention.sdpa_calls import bind
from ..candidates import Amount, Traffic
from ..machine import Machine
from .amounts import amount, greater, maximum, minimum, product, where
from .efficiency import efficiency
from .node_work import (
    GATHERS,
    MATMULS,
    REDUCTIONS,
    STAGES,
    base_of,
    flops_of,
    is_attention,
    is_compute,
    is_constant,
    is_fallback,
    is_library_call,
    mask_argument,
    matmul_sizes,
    name_of,
    numel_of,
    read_by,
    readers_of,
    row_length,
    space_of,
    unique_bytes,
    written_bytes,
)  # fmt: skip
from .roofline import flash_seconds, library_matmul_seconds


@dataclass(frozen=True)
class Kernel:
    """One launch: `nodes` by name, bytes by level, predicted time."""

    kind: str  # "matmul", "pointwise", "reduction", "attention"
    nodes: tuple[str, ...]
    traffic: Traffic
    l2_bytes: Amount
    seconds: Amount

    def share(self, part: float) -> Kernel:
        t = self.traffic
        traffic = Traffic(t.flops * part, t.bytes_read * part, t.bytes_written * part, t.launches if part >= 0.5 else 0)
        return replace(self, traffic=traffic, l2_bytes=self.l2_bytes * part, seconds=self.seconds * part)


@dataclass(frozen=True)
class Plan:
    """The kernels that a set of nodes becomes."""

    kernels: tuple[Kernel, ...]

    @property
    def traffic(self) -> Traffic:
        return sum((k.traffic for k in self.kernels), Traffic(0, 0, 0, 0))

    @property
    def seconds(self) -> Amount:
        return sum((k.seconds for k in self.kernels), 0.0)

    def __add__(self, other: Plan) -> Plan:
        return Plan(self.kernels + other.kernels)

    def share(self, part: float) -> Plan:
        """`part` of the plan, for work that several fusions save together; its launches count from one half on."""
        return Plan(tuple(k.share(part) for k in self.kernels)) if part > 0 else Plan(())


def inductor_plan(nodes: Iterable[Node], machine: Machine, outputs: Collection[Node] | None = None) -> Plan:
    """The kernels for `nodes` (in graph order). `outputs` are those needed outside; by default those used outside."""
    return _Planner(list(nodes), machine, outputs).plan()


class _Planner:
    def __init__(self, nodes: list[Node], machine: Machine, outputs: Collection[Node] | None) -> None:
        self.machine = machine
        self.efficiency = efficiency(machine)
        self.inside = set(nodes)
        if outputs is None:
            outputs = [n for n in nodes if any(user not in self.inside for user in n.users)]
        self.outputs = {base_of(n) for n in outputs}
        self.compute = [n for n in nodes if is_compute(n) and not is_constant(n)]
        self.members = set(self.compute)
        self.level: dict[Node, int] = {}
        self.row: dict[Node, Amount | None] = {}  # length of the rows reduced upstream at the node's level

    def plan(self) -> Plan:
        self._assign_levels()
        return Plan(tuple(self._kernel(group) for group in self._groups()))

    # ---- which nodes share a kernel ---------------------------------------------------------
    def _sources(self, node: Node) -> list[Node]:
        """The members whose results `node` reads, through views."""
        return [b for b in map(base_of, node.all_input_nodes) if b in self.members]

    def _assign_levels(self) -> None:
        """A node's level counts the kernels that must have ended before: a matmul, or a reduction over other rows.

        Nodes of one level that are connected can always share a kernel. A node that no kernel of its level
        needs sinks to its first reader, where Inductor would inline it.
        """
        for node in self.compute:
            sources = self._sources(node)
            level = max((self.level[s] + is_library_call(s) for s in sources), default=0)
            rows = [self.row[s] for s in sources if self.level[s] == level and self.row.get(s) is not None]
            own = row_length(node) if name_of(node) in REDUCTIONS else None
            if own is not None and any(row != own for row in rows):
                level += 1
            elif own is None and rows:
                own = rows[0]
            self.level[node], self.row[node] = level, own
        readers: dict[Node, list[Node]] = {}
        for node in reversed(self.compute):
            if not is_library_call(node) and node in readers and self.row[node] is None:
                self.level[node] = max(self.level[node], min(self.level[r] - is_library_call(r) for r in readers[node]))
            for source in self._sources(node):
                readers.setdefault(source, []).append(node)

    def _groups(self) -> list[list[Node]]:
        """Connected nodes of one level; every matmul alone."""
        group: dict[Node, list[Node]] = {}
        for node in self.compute:
            mine = group[node] = [node]
            if is_library_call(node):
                continue
            for source in self._sources(node):
                other = group[source]
                if other is mine or is_library_call(source) or self.level[source] != self.level[node]:
                    continue
                other.extend(mine)
                for moved in mine:
                    group[moved] = other
                mine = other
        return list({id(g): g for g in group.values()}.values())

    # ---- what a kernel costs ----------------------------------------------------------------
    def _kernel(self, group: list[Node]) -> Kernel:
        members = set(group)
        space = maximum(*(space_of(n) for n in group))
        passes, used, row = self._passes(group)
        long = greater(row, self.efficiency.reduction.persistent_row)
        cached = used and passes == 1  # as measured for norms; a softmax took the time of three readings from memory
        passes += used and not cached
        read, l2 = self._reads(group, members, space, where(long, passes, 1) if passes > 1 else 1)
        written: Amount = 0
        touched: Amount = 0
        for node in group:
            inside_use = any(r in self.members and r not in members for r in readers_of(node))
            if node not in self.outputs and not inside_use:
                continue
            count = written_bytes(node)
            written = written + count
            if node not in self.outputs:
                l2 = l2 + self._cached(count)
            touched = touched + self._first_touch(count)
        flops = sum((flops_of(n, self.efficiency.special_flops) for n in group), 0)
        traffic = Traffic(flops, read, written, 1)
        again = where(long, self._read_again(group, members, space), 0) if cached else 0
        seconds = self._seconds(group, traffic, l2, again) + touched
        return Kernel(self._kind(group), tuple(n.name for n in group), traffic, l2, seconds)

    def _kind(self, group: list[Node]) -> str:
        if is_library_call(group[0]) and not is_fallback(group[0]):
            return "attention" if is_attention(group[0]) else "matmul"
        return "reduction" if any(name_of(n) in REDUCTIONS for n in group) else "pointwise"

    def _passes(self, group: list[Node]) -> tuple[int, bool, Amount]:
        """How often a long row is read for the reductions that wait for each other, whether it is read once more to
        use the last, and its length."""
        depth: dict[Node, int] = {}
        row: Amount = 0
        for node in group:
            below = max((depth.get(s, 0) for s in self._sources(node)), default=0)
            if name_of(node) in REDUCTIONS:
                below += STAGES.get(name_of(node), 1)
                row = row_length(node)
            depth[node] = below
        last = max(depth.values())
        # a result as large as what was reduced needs the row once more
        reduced = [space_of(n) for n in group if name_of(n) in REDUCTIONS]
        used = last > 0 and any(d == last and numel_of(n) in reduced for n, d in depth.items())
        return last, used, row

    def _read_again(self, group: list[Node], members: set[Node], space: Amount) -> Amount:
        """Bytes of the rows that are used after they were reduced: of what was stored by then, else of all operands."""
        reduced: set[Node] = set()
        for node in group:
            if name_of(node) in REDUCTIONS or any(s in reduced for s in self._sources(node)):
                reduced.add(node)
        stored = [n for n in group if n not in reduced and n in self.outputs and numel_of(n) == space]
        read = {base_of(s) for n in group for s in read_by(n)} - members
        wide = [n for n in read if not is_constant(n) and numel_of(n) == space]
        totals = [sum(written_bytes(n) for n in nodes) for nodes in (stored, wide) if nodes]
        return minimum(*totals) if totals else 0

    def _reads(self, group: list[Node], members: set[Node], space: Amount, again: Amount) -> tuple[Amount, Amount]:
        """(bytes read, those of them that come from L2). Views of one buffer read no more than the buffer."""
        views: dict[Node, dict[tuple[Any, ...], Amount]] = {}
        repeats: dict[Node, Amount] = {}
        for node in group:
            for source in read_by(node):
                base = base_of(source)
                if base in members or is_constant(base):
                    continue
                value = source.meta.get("val")
                if not isinstance(value, torch.Tensor):
                    continue
                count = unique_bytes(value)
                if name_of(node) in GATHERS:
                    count = minimum(count, written_bytes(node))
                key = (tuple(map(str, value.shape)), tuple(map(str, value.stride())), str(value.storage_offset()))
                views.setdefault(base, {})[key] = count
                # only operands of the full space are read again in a second pass over the row
                repeats[base] = again if numel_of(source) == space else 1
        read: Amount = 0
        l2: Amount = 0
        for base, parts in views.items():
            total = sum(parts.values())
            value = base.meta.get("val")
            if len(parts) > 1 and isinstance(value, torch.Tensor):
                total = minimum(total, unique_bytes(value))
            total = total * repeats[base]
            read = read + total
            if base in self.members:
                l2 = l2 + where(self._fits(written_bytes(base)), total, 0)
        return read, l2

    def _fits(self, count: Amount) -> Any:
        return greater(self.machine.l2_bytes / 2, count)

    def _cached(self, count: Amount) -> Amount:
        return where(self._fits(count), count, 0)

    def _first_touch(self, count: Amount) -> Amount:
        """Page faults of a buffer that the allocator maps afresh."""
        bandwidth = self.machine.first_touch_bandwidth
        if bandwidth is None:
            return 0.0
        return where(greater(count, self.machine.first_touch_bytes), count / bandwidth, 0.0)

    def _seconds(self, group: list[Node], traffic: Traffic, l2: Amount, again: Amount) -> Amount:
        node, machine = group[0], self.machine
        if name_of(node) in MATMULS:
            batch, m, n, k, dtype = matmul_sizes(node)
            return library_matmul_seconds(m, n, k, dtype, machine, batch=batch, l2_bytes=l2, traffic=traffic)
        if is_attention(node):
            return _attention_seconds(node, traffic, machine)
        loop = self.efficiency.reduction if self._kind(group) == "reduction" else self.efficiency.pointwise
        from_memory = traffic.bytes_read + traffic.bytes_written - l2
        memory = from_memory / (machine.memory_bandwidth * loop.memory) + l2 / (machine.l2_bandwidth * loop.memory)
        memory = memory + again / (machine.memory_bandwidth * loop.again)
        return maximum(traffic.flops / machine.vector_flops, memory) + loop.latency + machine.launch_overhead


# ---- attention that the graph calls by name -----------------------------------------------------
def _attention_seconds(node: Node, traffic: Traffic, machine: Machine) -> Amount:
    """The kernel that the node names, or the machine's fastest where the graph was traced for another device."""
    arguments, known = bind(node), efficiency(machine).attention
    named = next((b for b in ("cudnn", "efficient", "flash") if b in name_of(node) and b in known), None)
    masked = isinstance(arguments.get(mask_argument(node)), Node)
    q, k = arguments["query"].meta["val"], arguments["key"].meta["val"]
    return minimum(
        *(
            flash_seconds(
                machine, backend, q.dtype, masked=masked, heads=product(q.shape[:-2]), q_len=amount(q.shape[-2]),
                kv_len=amount(k.shape[-2]), flops=traffic.flops, moved=traffic.bytes_read + traffic.bytes_written,
                whole=not masked and not arguments.get("is_causal"),
            )
            for backend in ([named] if named else [b for b in known if b not in ("masked", "flex")])
        )
    )  # fmt: skip
