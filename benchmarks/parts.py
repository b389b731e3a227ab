"""Tables made in parts: rows that several processes prepare at the same time and measure one after the other, each
alone on the device (compiling takes far longer than measuring), and figures of several runs put together.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config

from . import harness

COMPILERS = ("torch._inductor.compile_fx", "torch._inductor.codegen.triton", "triton.compiler", "patterns")

JOBS = "processes that prepare rows (default %(default)s)"
SECONDS = "give up rows that are not prepared by then"
LAST = 10.0  # seconds that preparing a row may take
MERGE = "read figures measured before, in as many files as there were parts, instead of measuring"


@dataclass(frozen=True)
class Item:
    """What has nothing but the name of its row."""

    name: str


# What prepares an item, which has a name, and returns the function that measures it; it travels to other processes.
Prepare = Callable[[Any], Callable[[], dict[str, Any]]]


def measured(
    items: Sequence[Any], prepare: Prepare, jobs: int, seconds: float = math.inf, preload: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The figures of all items, of which `jobs` processes prepare a part each. In the last LAST of `seconds` none is
    begun, and a process that is not ready by then is given up. `preload` names modules that are imported once for all.
    """
    # several processes compile already; a pool in each of them would only get in the way
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    for name in (*preload, *COMPILERS):
        importlib.import_module(name)
    importlib.import_module("triton.runtime.cache").triton_key()  # a hash of its sources, made once for all
    # what goes on from here has all imports behind it
    forkable = _forkable()
    if not forkable:
        print("the device was touched before: every process imports everything again", file=sys.stderr, flush=True)
    processes: Any = multiprocessing.get_context("fork" if forkable else "forkserver")
    jobs, began, running = min(jobs, len(items)), time.time(), []
    for first in range(jobs):
        ours, theirs = processes.Pipe()
        given = items[first::jobs], prepare, theirs, began + seconds - LAST
        process = processes.Process(target=_work, args=given, daemon=True)
        process.name = ", ".join(item.name for item in items[first::jobs])
        process.start()
        theirs.close()  # else a process that dies would be waited for
        running.append((ours, process))
    prepared = [(pipe, process) for pipe, process in running if _ready(pipe, process, began + seconds)]
    print(f"prepared in {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    for pipe, process in prepared:
        _tell(pipe, "your turn")
        for figures in iter(functools.partial(_told, pipe, process), None):
            if isinstance(figures, dict):
                yield figures
            else:
                print(figures, file=sys.stderr, flush=True)
    # a process that ends has the driver busy, so none does while another measures
    for pipe, process in prepared:
        _tell(pipe, "done")
        process.join()


def _forkable() -> bool:
    """Whether forked processes can use the device: not where this one has touched it."""
    child = os.fork()
    if child == 0:
        try:
            if torch.cuda.is_available():
                torch.cuda.init()
        except Exception:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def _work(items: Sequence[Any], prepare: Prepare, pipe: Connection, until: float) -> None:
    """Prepares items as long as there is time to begin one, waits for its turn, measures one after the other and sends
    the figures (or what failed)."""
    turns: dict[Any, Callable[[], dict[str, Any]]] = {}
    torch.set_num_threads(1)  # the cores are taken by the other processes: threads of each would wait for each other
    # every item adds a specialisation of the same function, none of which may fall back to eager
    torch._dynamo.config.recompile_limit = 8 * len(items)
    with torch.no_grad():
        for item in items:
            if time.time() > until:
                pipe.send(f"{item.name}: no time to prepare it")
                continue
            try:
                turns[item] = prepare(item)
            except Exception:
                pipe.send(f"{item.name}: {traceback.format_exc()[-1500:]}")
            torch.cuda.empty_cache()  # the device is shared with the other processes
        pipe.send(None)
        pipe.recv()
        for item, turn in turns.items():
            try:
                pipe.send(turn())
            except Exception:
                pipe.send(f"{item.name}: {traceback.format_exc()[-1500:]}")
    pipe.send(None)
    pipe.recv()


def _ready(pipe: Connection, process: BaseProcess, until: float) -> bool:
    """Whether a process has prepared its items by then; if not, it is ended, since it would disturb the others."""
    while pipe.poll(None if until == math.inf else max(0.0, until - time.time())):
        problem = _told(pipe, process)
        if problem is None:
            return process.is_alive()
        print(problem, file=sys.stderr, flush=True)
    print(f"{process.name}: not prepared in time", file=sys.stderr, flush=True)
    process.terminate()
    return False


def _tell(pipe: Connection, word: str) -> None:
    """To a process; one that has died needs no telling, and what it leaves is seen by `_told`."""
    with contextlib.suppress(BrokenPipeError):
        pipe.send(word)


def _told(pipe: Connection, process: BaseProcess) -> Any:
    """What a process sends next, None at the end of it, which a process that died has reached as well."""
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        print(f"{process.name}: the process died with {process.exitcode}", file=sys.stderr, flush=True)
        return None


def merged(parts: Sequence[Path], order: Callable[[dict[str, Any]], Any], into: Path | None) -> list[dict[str, Any]]:
    """The rows of several files, each of its last file; written with the provenance of every part, which rows tell by
    its number. Files may have been put together before."""
    known: dict[str, dict[str, Any]] = {}
    measured: list[dict[str, Any]] = []
    for read in (json.loads(path.read_text()) for path in parts):
        rows = read.pop("rows")
        known |= {row["name"]: {**row, "part": len(measured) + row.get("part", 0)} for row in rows}
        measured += read.get("parts", [read])
    rows = sorted(known.values(), key=order)
    if into is not None:
        into.write_text(json.dumps({"parts": measured, "rows": rows}, indent=1) + "\n")
    return rows


def tuned(fn: types.FunctionType, inputs: tuple[Any, ...]) -> harness.Call:
    """`fn` under max-autotune, with the choices made now, from times taken now: none comes from a compilation before,
    by which the kernels are only on disk. Whoever compares its times has the device for himself meanwhile."""
    # Dynamo would find what it compiled before of the same code
    fresh = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    run = harness.compiled(fresh, "inductor", mode="max-autotune-no-cudagraphs")
    with torch._inductor.config.patch(fx_graph_cache=False, autotune_local_cache=False):
        run(*inputs)
    return run
