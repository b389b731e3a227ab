"""Seconds that compiled functions take on the device at hand: medians of interleaved samples.

On a GPU a function is recorded into a CUDA graph, so that what counts is the device's time; it is recorded once per set
of inputs, and the sets together are larger than L2, so that weights come from memory as they do in a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

Run = Callable[[], object]
SAMPLE = 5e-3  # seconds: a sample repeats what is shorter
BUDGET = 0.5  # seconds spent on samples of one function
FEWEST, MOST = 3, 15  # samples


def medians(runs: Mapping[str, Run]) -> dict[str, float]:
    """Seconds of one call of each, by name. Samples are taken in turn, so that a slow moment hits all alike."""
    timers = {
        name: Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()) for name, run in runs.items()
    }
    once = {name: min(timer.timeit(1).mean for _ in range(2)) for name, timer in timers.items()}
    repeats = {name: max(1, round(SAMPLE / seconds)) for name, seconds in once.items()}
    longest = max(once[name] * repeats[name] for name in runs)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(min(MOST, max(FEWEST, round(BUDGET / longest)))):
        for name, timer in timers.items():
            samples[name].append(timer.timeit(repeats[name]).mean)
    return {name: statistics.median(found) for name, found in samples.items()}


@dataclass(frozen=True)
class Recording:
    """A CUDA graph to be run by calling it, with what it reads: that must live as long as the graph."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Sequence[Any]]

    def __call__(self) -> None:
        self.graph.replay()


def recorded(function: Callable[..., Any], input_sets: Sequence[Sequence[Any]]) -> Run:
    """A CUDA graph that calls `function` with every set of inputs."""
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries choose their kernels and allocate their workspaces before the recording
            function(*input_sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for inputs in input_sets:
            function(*inputs)
    return Recording(graph, input_sets)
