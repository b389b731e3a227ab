"""transformers models with tiny random configurations, eager attention: what is found, and whether results agree.

python -m benchmarks.models                  the 17 listed models, prompt and static-cache decode
python -m benchmarks.models --all            some eighty others as well
python -m benchmarks.models --forms           the listed models with symbolic sizes, other batches, padding and bfloat16
python -m benchmarks.models --only gemma     models whose name contains a word
python -m benchmarks.models --json rows.json the rows also go into a file, in place of those of the same calls in it

A site is counted from how the model runs eagerly (tests/model_sites.py), and is found where the report has a decision
for that pattern in that module; where it is not, the sentence of its near miss is printed. Every model runs twice: in
float32, attention replaced by the CPU's kernels, and in float16, the generated kernels replacing whatever they can, in
Triton's interpreter. An error is against float64, in units of eager's own error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch

import fusion_compiler as fc

from .provenance import provenance

# the models are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests"))
TOLERANCE = 1.5

Row = dict[str, Any]


def examine(name: str, kind: str) -> Row:
    """One row: sites found out of those present, what was said of the others, and errors."""
    import model_runs
    import model_sites

    row: Row = {"model": name, "call": kind}
    begin = time.perf_counter()
    # generated kernels run in Triton's interpreter, which multiplies bfloat16 wrongly: they are tried in float16
    model, make = model_runs.call(name, kind, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    sites = model_sites.present(model, make())
    dynamic = True if kind == "dynamic" else None
    row["error float32"], reports = _run(model, make, dynamic=dynamic, **model_runs.STARVED)
    account = model_sites.account(sites, reports)
    row |= {pattern: "{}/{}".format(*account.of(pattern)) for pattern in model_sites.KINDS}
    row["not found"] = [{"pattern": s.kind, "site": str(s), "reason": why} for s, why in account.told]
    row["nothing said"] = [{"pattern": s.kind, "site": str(s)} for s in account.silent]
    row["beyond the count"] = account.beyond
    halved = model_runs.call(name, kind, torch.float16)
    row["error float16"], reports = _run(*halved, dynamic=dynamic, **model_runs.DEAR_LAUNCHES)
    row["fused float16"] = dict(Counter(d.pattern for r in reports for d in r.fused))
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def _run(model: Any, make: Any, **options: Any) -> tuple[float | str, list[fc.Report]]:
    """(error or what was raised, reports) of a call through the compiler."""
    import model_runs

    torch._dynamo.reset()
    before = len(fc.reports())
    try:
        error: float | str = round(model_runs.error(model, model_runs.compiled(model, **options), make), 3)
    except Exception as failed:
        error = f"{type(failed).__name__}: {str(failed).strip().splitlines()[0]}"
    return error, fc.reports()[before:]


def write(file: Path, rows: list[Row]) -> None:
    """Puts rows into a file, in place of those of the same calls, in the order of the models."""
    import model_zoo

    known = json.loads(file.read_text())["rows"] if file.exists() else []
    merged = {(row["model"], row["call"]): row for row in (*known, *rows)}
    order = list(model_zoo.EVERY)
    ordered = sorted(merged.values(), key=lambda row: order.index(row["model"]))
    found = {**provenance(torch.device("cpu")), "rows": ordered}
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def possible(name: str, kind: str) -> bool:
    """Whether a model can be called so."""
    import model_zoo

    if kind == "decode":
        return name in model_zoo.DECODERS
    return kind != "left padding" or model_zoo.EVERY[name].inputs.startswith("ids")


def wrong(row: Row) -> bool:
    errors = [row["error float32"], row["error float16"]]
    return bool(row["nothing said"]) or any(isinstance(e, str) or e > TOLERANCE for e in errors)


def markdown(rows: list[Row], patterns: tuple[str, ...]) -> str:
    columns = ["model", "call", *patterns, "error float32", "error float16"]
    lines = [columns, ["---"] * len(columns), *([str(row[c]) for c in columns] for row in rows)]
    told = Counter((m["pattern"], m["reason"]) for row in rows for m in row["not found"])
    sentences = [f"* {pattern} ×{count}: {reason}" for (pattern, reason), count in told.most_common()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *sentences])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the models that are not listed, too")
    parser.add_argument("--forms", action="store_true", help="the listed models' prompts in further forms instead")
    parser.add_argument("--only", default="", help="names that contain this, listed or not")
    parser.add_argument("--json", type=Path, help="also write the rows to this file, beside rows of other calls in it")
    args = parser.parse_args()
    import model_runs
    import model_sites
    import model_zoo

    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in model_zoo.EVERY if args.all or args.only else model_zoo.MODELS:
        for kind in model_runs.FORMS if args.forms else ("prompt", "decode"):
            if args.only in name and possible(name, kind):
                rows.append(examine(name, kind))
                if args.json:
                    write(args.json, rows)
                print(f"{name} {kind}: {rows[-1]['seconds']} s", file=sys.stderr, flush=True)
    print(markdown(rows, model_sites.KINDS))
    for row in filter(wrong, rows):
        print(f"\nWRONG {row}")
    print(f"\n{sum(not wrong(row) for row in rows)} of {len(rows)} calls agree and leave no site unexplained")
    return int(any(map(wrong, rows)))


if __name__ == "__main__":
    sys.exit(main())
