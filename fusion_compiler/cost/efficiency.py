"""Which fraction of a machine's rates each kind of kernel reaches: measured, kept as data beside the package.

A fraction is of `Machine`'s reached rates, so a table measured on one GPU serves the others until they have their own:
`data/efficiency_<machine>.json`, with device, date and versions inside.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from ..machine import Machine


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Fractions:
    """A fraction by dtype, with a default."""

    table: Mapping[str, float]

    def of(self, dtype: torch.dtype) -> float:
        return self.table.get(dtype_name(dtype), self.table["default"])


@dataclass(frozen=True)
class LibraryMatmul:
    """The vendor's GEMM, which chooses from `tiles` (rows, columns, fraction of `compute`); none: any size is fine.

    `overlap`: the part of the shorter of arithmetic and memory time that hides behind the longer. `latency`: seconds
    before memory is drawn at full rate, and after; `depth` of it more for each unit of K to the power of ¾, as measured
    from K = 1024 to 14336. `split_seconds`: what splitting K among the units costs that too few
    tiles would leave idle; 0 where the library does not split. At fractions of the L2's bandwidth, `sums` of parts of K
    are written and read, and tiles read `operands`, which neighbours share (0: no limit).
    """

    memory: float
    batched_memory: float
    compute: Fractions
    batched_compute: Fractions
    overlap: float
    tiles: tuple[tuple[int, int, float], ...]
    latency: float = 0.0
    depth: float = 0.0
    split_seconds: float = 0.0
    sums: float = 1.0
    operands: float = 0.0


@dataclass(frozen=True)
class Loop:
    """A generated pointwise or reduction kernel. Rows longer than `persistent_row` are read once per reduction and once
    more to use what was reduced: after a single one from caches, at `again` times the bandwidth of memory."""

    memory: float
    latency: float
    persistent_row: int = 0
    again: float = 1.0


@dataclass(frozen=True)
class AttentionKernel:
    """rate = peak · compute / (1 + ramp / keys), without the ramp where nothing is masked; below `short_rows` queries
    `short_compute` holds.

    `key_block`: a causal kernel skips whole blocks of this many keys only (0: it follows the diagonal).
    `query_block`: queries of a head that one multiprocessor computes together, all of them even where there are fewer
    (0: the work is always spread evenly); where blocks leave multiprocessors idle, one takes `alone` of its time in a
    full device.
    `splits_keys`: of a single query, multiprocessors take a part of the keys each.
    """

    compute: Fractions
    ramp: float
    memory: float
    latency: float
    short_compute: Fractions | None = None
    short_rows: int = 0
    key_block: int = 0
    query_block: int = 0
    alone: float = 1.0
    splits_keys: bool = False


@dataclass(frozen=True)
class Efficiency:
    device: str
    date: str
    versions: Mapping[str, str]
    library_matmul: LibraryMatmul
    pointwise: Loop
    reduction: Loop
    special_flops: Mapping[str, int]
    attention: Mapping[str, AttentionKernel]


def efficiency(machine: Machine) -> Efficiency:
    """The machine's own table if there is one, else that of its kind."""
    return _find(machine.name, machine.kind)


@functools.cache
def _find(name: str, kind: str) -> Efficiency:
    own = f"efficiency_{name}.json"
    if (resources.files(__package__) / "data" / own).is_file():
        return _load(own)
    return _load("efficiency_cpu.json" if kind == "cpu" else "efficiency_h200.json")


@functools.cache
def _load(name: str) -> Efficiency:
    raw: dict[str, Any] = json.loads((resources.files(__package__) / "data" / name).read_text())
    matmul = raw["library_matmul"]
    return Efficiency(
        device=raw["device"],
        date=raw["date"],
        versions=raw["versions"],
        library_matmul=LibraryMatmul(
            matmul["memory"],
            matmul["batched_memory"],
            Fractions(matmul["compute"]),
            Fractions(matmul["batched_compute"]),
            matmul["overlap"],
            tuple((rows, columns, fraction) for rows, columns, fraction in matmul["tiles"]),
            matmul.get("latency", 0.0),
            matmul.get("depth", 0.0),
            matmul.get("split_seconds", 0.0),
            matmul.get("sums", 1.0),
            matmul.get("operands", 0.0),
        ),
        pointwise=Loop(**raw["pointwise"]),
        reduction=Loop(**raw["reduction"]),
        special_flops=raw["special_flops"],
        attention={name: _attention_kernel(entry) for name, entry in raw["attention"].items()},
    )


def _attention_kernel(entry: Mapping[str, Any]) -> AttentionKernel:
    short = entry.get("short_compute")
    fields = {k: v for k, v in entry.items() if k not in ("compute", "short_compute")}
    return AttentionKernel(
        compute=Fractions(entry["compute"]), short_compute=Fractions(short) if short else None, **fields
    )
