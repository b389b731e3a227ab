"""`explain`: the decisions for a model, without running it, its weights in memory or the machine at hand.

The model and its arguments are copied with fake tensors, which have shapes and no data, and compiled through Dynamo
and AOTAutograd as they would be in earnest; each graph is matched and judged and then runs on fake tensors too, so
that what follows a graph break is reached as well. The copies take all changes, so caches stay as they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import backend
from .machine import Machine
from .machine import machine as find_machine
from .report import Failure, Report
from .torch_private import dynamo_cache, inductor
from .torch_private.fake_copies import FakeCopies

UNMEASURED = "autotune: `explain` runs nothing, so all times are predicted"


def explain(
    fn: Callable[..., Any],
    *args: Any,
    machine: str | Machine | None = None,
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What the backend would decide for `fn(*args, **kwargs)` on `machine` (None: the one at hand).

    `options` are those of the backend, `dynamic` is that of torch.compile. The model may live on the meta device or in
    fake tensors. Everything else is passed to `fn`.
    """
    given = dict(options or {})
    if machine is not None:
        given["machine"] = machine
    asked = backend.parse_options(given)
    parsed = dataclasses.replace(asked, autotune=False)
    reports: list[Report] = []

    def examine(gm: torch.fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        reports.append(backend.plan(gm, parsed, f"graph {len(reports)}").report)
        return inductor.run_eagerly(gm)

    def capture(gm: torch.fx.GraphModule, example_inputs: Any, **_: Any) -> Any:
        return inductor.compile_graph(gm, example_inputs, examine, {})

    copies = FakeCopies()
    function, args, kwargs = copies.of_callable(fn), copies.of(args), copies.of(kwargs)
    stopped: tuple[Failure, ...] = ()
    # what other calls were compiled for must not make this one dynamic, nor this one later calls
    with copies.mode, torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        try:
            compiled: Callable[..., Any] = torch.compile(dynamo_cache.apart(function), backend=capture, dynamic=dynamic)
            compiled(*args, **kwargs)
        except Exception as error:  # what depends on data cannot be followed without data
            if parsed.strict:
                raise
            stopped = (Failure("capture", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"),)
        finally:
            dynamo_cache.forget(capture)
    whole = Report.merged(reports) if reports else Report(machine=find_machine(parsed.machine).name)
    notes = (*whole.notes, *((UNMEASURED,) if asked.autotune else ()))
    return dataclasses.replace(whole, failures=(*whole.failures, *stopped), notes=notes)
