"""What is found: spellings of the gated MLP and of norm → linear, and the time it takes.

python -m benchmarks.spellings                       every spelling × dtype × static and dynamic sizes
python -m benchmarks.spellings --only RMSNorm        spellings whose name contains a word
python -m benchmarks.spellings --time 32             seconds of each stage for a Llama of 32 layers, and of Inductor

Nothing here runs a kernel or needs a device: graphs are captured with `explain`, for the machine given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusion_compiler as fc
from fusion_compiler import backend, registry
from fusion_compiler.match import find_all
from fusion_compiler.semantics import SemanticView
from fusion_compiler.torch_private import inductor

from . import harness

# the spellings are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Table = list[dict[str, Any]]


def spellings(machine: str, only: str, tiny: bool) -> Table:
    """One row per spelling: in how many of the forms it was found, and what was said where it was not."""
    import matmul_spellings as spell

    rows: Table = []
    dtypes = DTYPES[:1] if tiny else DTYPES
    for pattern, table in spell.MATCHED.items():
        for name, function in table.items():
            if only not in name:
                continue
            row: dict[str, Any] = {"pattern": pattern, "spelling": name, "found": 0, "of": 0, "reasons": []}
            for dtype in dtypes:
                for dynamic in (False, True):
                    torch._dynamo.reset()
                    x, w = torch.randn(3, 5, spell.K, dtype=dtype), spell.weights(dtype)
                    if dynamic:
                        for dim in (0, 1):
                            torch._dynamo.mark_dynamic(x, dim)
                    with torch.no_grad():
                        report = fc.explain(function, x, w, machine=machine)
                    found = any(d.pattern == pattern for d in report.decisions)
                    row["of"] += 1
                    row["found"] += found
                    if not found:
                        row["reasons"] += [n.reason for n in report.near_misses] or [str(report.failures)]
            rows.append(row)
    return rows


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
    judged = timed("judge", lambda: backend.judge_all(gm, matches, target))
    timed("select", lambda: backend.choose(gm, judged))
    ours = sum(seconds.values())
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.utils.fresh_cache():
        timed("Inductor", lambda: torch.compile(model, backend="inductor")(ids, use_cache=False))
    row = {"layers": layers, "nodes": len(gm.graph.nodes), "matches": len(matches)}
    return [row | {k: f"{v:.2f}" for k, v in seconds.items()} | {"share": f"{ours / seconds['Inductor']:.1%}"}]


def markdown(rows: Table) -> str:
    columns = list(rows[0])
    cells = [[("; ".join(v) if isinstance(v, list) else str(v)) for v in row.values()] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", type=int, metavar="LAYERS")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--machine", default="h200")
    parser.add_argument("--tiny", action="store_true", help="float32 only")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.time:
        rows = stages(args.time, args.machine)
    else:
        rows = spellings(args.machine, args.only, args.tiny)
    print(markdown(rows))
    if args.json:
        found = {**harness.provenance(torch.device("cpu")), "rows": rows}
        Path(args.json).write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    missed = [row for row in rows if "of" in row and row["found"] < row["of"]]
    if rows and "of" in rows[0]:
        print(f"\n{len(rows) - len(missed)} of {len(rows)} spellings found in every form, torch {torch.__version__}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
