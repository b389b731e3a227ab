"""Command line: `python -m fusion_compiler machines` and `… explain MODULE:CALLABLE --machine h200`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .machine import TABLE, Machine, machine


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusion_compiler", description="Explains the fusions of a model.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("machines", help="list the machines that decisions can be made for")
    explain = commands.add_parser("explain", help="say what would be fused in a model, running nothing")
    explain.add_argument(
        "target", metavar="MODULE:CALLABLE", help="a function without arguments that returns (model, args, kwargs)"
    )
    explain.add_argument("--machine", help="a name that `machines` lists; the machine at hand if not given")
    explain.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)
    try:
        if given.command == "machines":
            _machines()
        else:
            _explain(given.target, given.machine, given.json)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ---- machines -----------------------------------------------------------------------------------
def _machines() -> None:
    rows = [*TABLE.values(), machine("cpu")]
    table = Table(show_edge=False, pad_edge=False)
    for title in ("Name", "Arch", "bf16 TFLOP/s", "fp32 TFLOP/s", "Memory GB/s", "Cache MB", "SMs/cores"):
        table.add_column(title, justify="left" if title in ("Name", "Arch") else "right")
    for row in rows:
        table.add_row(*_cells(row))
    console = Console(width=100)
    console.print(table)
    print("Rates are what kernels reach: data-sheet figures are derated by the fractions measured on an H200.\n")
    for row in rows:
        print(f"{row.name:8} {row.source}")
    here = machine()
    print(f"\nAt hand: {here.name} ({here.source})")


def _cells(row: Machine) -> list[str]:
    def tera(dtype: torch.dtype) -> str:
        rate = row.flops.get(dtype, 0.0) / 1e12
        return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}" if rate else "-"

    return [
        row.name, row.arch, tera(torch.bfloat16), tera(torch.float32), f"{row.memory_bandwidth / 1e9:.0f}",
        f"{row.l2_bytes / 2**20:.0f}", str(row.num_sms),
    ]  # fmt: skip


# ---- explain ------------------------------------------------------------------------------------
def _explain(target: str, machine_name: str | None, as_json: bool) -> None:
    import fusion_compiler

    try:
        chosen = machine(machine_name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    model, args, kwargs = _made(_imported(target), target)
    report = fusion_compiler.explain(model, *args, machine=chosen, **kwargs)
    print(report.to_json() if as_json else report)


def _imported(target: str) -> Callable[[], Any]:
    module_name, colon, name = target.partition(":")
    if not colon or not module_name or not name:
        raise UsageError(f"{target!r} is not of the form MODULE:CALLABLE, such as models.llama:prefill")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"cannot import {module_name!r}: {error}; run from the folder that holds it") from error
    found = getattr(module, name, None)
    if not callable(found):
        offered = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")) or "none"
        raise UsageError(f"{module_name!r} has no callable {name!r}; its callables: {offered}")
    maker: Callable[[], Any] = found
    return maker


def _made(make: Callable[[], Any], target: str) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """What `make` returned, as (model, args, kwargs); args may be one value, kwargs may be left out."""
    made = make()
    if not isinstance(made, tuple) or not 2 <= len(made) <= 3 or not callable(made[0]):
        raise UsageError(f"{target} must return (model, args, kwargs), not {type(made).__name__}")
    model, args, kwargs = made if len(made) == 3 else (*made, {})
    return model, tuple(args) if isinstance(args, (tuple, list)) else (args,), dict(kwargs)
