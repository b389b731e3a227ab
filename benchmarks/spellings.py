"""What is found: spellings of the gated MLP, of norms, softmax and rotary embedding; and the time it takes.

python -m benchmarks.spellings                       every spelling × dtype × static and dynamic sizes
python -m benchmarks.spellings --only RMSNorm        spellings whose name contains a word
python -m benchmarks.spellings --time 32             seconds of each stage for a Llama of 32 layers, and of Inductor

Nothing here runs a kernel or needs a device. A spelling counts as found where the pattern matches in the graph that
Inductor hands to its last step. Beside it: in how many captures of the same Dynamo graph Inductor's own pattern
matcher, joint and post-grad passes included, makes a fusion of its own; its rewrites of one operation (`mm` and `add`
into `addmm`) are in the figures but are no fusion of these forms.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import fusion_compiler as fc
from fusion_compiler import backend, registry
from fusion_compiler.match import find_all
from fusion_compiler.semantics import SemanticView
from fusion_compiler.torch_private import fake_tensors, inductor

from . import harness

# the spellings are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FEW = ((torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, True))
DYNAMIC = {3, 5}  # the sizes of rows: batch and length

Table = list[dict[str, Any]]
Function = Callable[..., Any]


def groups() -> dict[str, dict[str, tuple[Function, Callable[[torch.dtype], tuple[Any, ...]]]]]:
    """By pattern and name: a spelling, and what makes its arguments."""
    import matmul_spellings as spell
    import rope_spellings as rope
    from spelled_graphs import K, weights

    def rows(dtype: torch.dtype) -> tuple[Any, ...]:
        return torch.randn(3, 5, K, dtype=dtype), weights(dtype)

    def heads(dtype: torch.dtype) -> tuple[Any, ...]:
        return torch.randn(3, 2, 5, 16, dtype=dtype), torch.randn(5, 8)

    found = {p: {name: (f, rows) for name, f in table.items()} for p, table in spell.MATCHED.items()}
    return found | {"rope": {name: (f, heads) for name, f in rope.MATCHED.items()}}


def capture(
    function: Function, inputs: tuple[Any, ...], dynamic: bool, compare: bool
) -> tuple[list[torch.fx.GraphModule], set[str]]:
    """(the graphs that our last step gets, where to `compare` Inductor's counters of what its passes matched)."""
    graphs: list[torch.fx.GraphModule] = []
    matched: set[str] = set()

    def ours(gm: torch.fx.GraphModule, _: Any, **__: Any) -> Function:
        graphs.append(gm)
        return inductor.run_eagerly(gm)

    def theirs(gm: torch.fx.GraphModule, _: Any, **__: Any) -> Function:
        from torch._inductor.fx_passes.post_grad import post_grad_passes
        from torch._inductor.virtualized import V

        with V.set_fake_mode(fake_tensors.mode_of(gm)):
            post_grad_passes(copy.deepcopy(gm), True)
        matched.update(name for name, count in counters["inductor"].items() if count)
        return inductor.run_eagerly(gm)

    def compiler(gm: torch.fx.GraphModule, example_inputs: Any) -> Function:
        from torch._inductor.compile_fx import compile_fx

        counters.clear()
        with torch._functorch.config.patch(enable_autograd_cache=False):
            _ = compile_fx(copy.deepcopy(gm), example_inputs, inner_compile=theirs) if compare else None
        return inductor.compile_graph(gm, example_inputs, ours, {})

    torch._dynamo.reset()
    for tensor in [t for t in inputs if isinstance(t, torch.Tensor)] if dynamic else ():
        for dim in [dim for dim, size in enumerate(tensor.shape) if size in DYNAMIC]:
            torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        torch.compile(function, backend=compiler, dynamic=None if dynamic else False)(*inputs)
    return graphs, matched


GENERIC = {"pattern_matcher_count", "pattern_matcher_nodes", "removed_pointless_view_pair", "decompose_bmm"}


def spellings(only: str, few: bool) -> Iterator[dict[str, Any]]:
    """One row per spelling: in how many of the forms it was found, and what was said where it was not."""
    patterns = {p.name: p for p in registry.builtin_patterns()}
    for pattern, table in groups().items():
        for name, (function, inputs) in table.items():
            if only not in f"{pattern} {name}":
                continue
            row: dict[str, Any] = {"pattern": pattern, "spelling": name, "found": 0, "of": 0}
            row |= {"inductor": 0, "compared": 0, "its_counters": [], "reasons": []}
            for i, (dtype, dynamic) in enumerate(FEW if few else itertools.product(DTYPES, (False, True))):
                compare = i == 0 or not few
                graphs, theirs = capture(function, inputs(dtype), dynamic, compare)
                looked = [find_all(SemanticView(gm), [patterns[pattern]]) for gm in graphs]
                found = any(matches for matches, _ in looked)
                row["of"] += 1
                row["found"] += found
                row["compared"] += compare
                row["inductor"] += bool(theirs - GENERIC)
                row["its_counters"] = sorted({*row["its_counters"], *theirs})
                if not found:
                    row["reasons"] += [n.reason for _, near in looked for n in near] or ["nothing was said"]
            yield row


def stages(layers: int, machine: str) -> Table:
    """Seconds of our stages on the graph of a Llama, narrow but deep, and of Inductor's compilation of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=128, attn_implementation="eager")
    model, ids = LlamaForCausalLM(config).eval(), torch.ones(1, 16).long()
    captured: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        captured.append(gm)
        return inductor.run_eagerly(gm)

    with torch.no_grad():
        torch.compile(model, backend=lambda gm, inputs: inductor.compile_graph(gm, inputs, keep, {}))(
            ids, use_cache=False
        )
    [gm] = captured
    target, seconds = fc.machine.machine(machine), {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    patterns = registry.active_patterns((), ())
    for pattern in patterns:
        getattr(pattern, "variants", None)  # traced once per process
    view = timed("raise", lambda: SemanticView(gm))
    matches, _ = timed("match", lambda: find_all(view, patterns))
    judged, _ = timed("judge", lambda: backend.judge_all(gm, matches, target))
    timed("select", lambda: backend.choose(gm, judged))
    ours = sum(seconds.values())
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        timed("Inductor", lambda: torch.compile(model, backend="inductor")(ids, use_cache=False))
    row = {"layers": layers, "nodes": len(gm.graph.nodes), "matches": len(matches)}
    return [row | {k: f"{v:.2f}" for k, v in seconds.items()} | {"share": f"{ours / seconds['Inductor']:.1%}"}]


def summary(rows: Table) -> str:
    """One line per pattern: spellings, captures, and those that we and Inductor found."""
    lines = []
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        part = [row for row in rows if row["pattern"] == pattern]
        of, ours, theirs, compared = (sum(row[k] for row in part) for k in ("of", "found", "inductor", "compared"))
        lines.append([pattern, str(len(part)), f"{ours} of {of}", f"{theirs} of {compared}"])
    return harness.markdown(["pattern", "spellings", "captures found", "fusions of Inductor's own"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=int, metavar="LAYERS")
    parser.add_argument("--only", default="", help="pattern and name contain this")
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--few", action="store_true", help="four captures of each, with Inductor's beside the first")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.time:
        rows = stages(args.time, args.machine)
        print(harness.markdown(list(rows[0]), [[str(v) for v in row.values()] for row in rows]))
        harness.write_json(args.json, torch.device("cpu"), rows)
        missed = []
    else:
        rows = []
        for row in spellings(args.only, args.few):
            rows.append(row)
            harness.write_json(args.json, torch.device("cpu"), rows)
        missed = [row for row in rows if row["found"] < row["of"]]
        shown = [[*map(str, list(row.values())[:5]), "; ".join(row["reasons"])] for row in rows]
        print(harness.markdown(["pattern", "spelling", "found", "of", "Inductor", "missed"], shown))
        print(f"\n{summary(rows)}")
        print(f"\n{len(rows) - len(missed)} of {len(rows)} spellings found in every form, torch {torch.__version__}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
