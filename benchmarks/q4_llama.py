"""A Llama of 8 layers (hidden 4096, FFN 14336, 32/8 heads, small vocabulary), bf16, beside itself in Q4_0.

python -m benchmarks.q4_llama                              decode at a static cache of 1024, reduce-overhead
python -m benchmarks.q4_llama --columns "q4_0, ours; bf16, ours" --json figures.json

Columns name the weights, then who compiles. q4_0: each linear quantised and held as fc.ggml.SplitLinear. Times are as
in benchmarks.llama; compile caches stay as they are. On a GPU each column is compiled by a process of its own, at the
same time; then they measure one after the other. Errors of the logits are against the same weights, dequantised, in
float32. speedup: of "q4_0, ours" over each other column, pipelined.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from fusion_compiler import ggml

from . import harness, llama, parts
from .llama_model import build, in_higher_precision

SIZES = {
    "num_hidden_layers": 8, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 2048, "max_position_embeddings": 4096,
}  # fmt: skip
# name: whether the weights are quantised, and the column of benchmarks.llama
COLUMNS = {
    "bf16, inductor": (False, "inductor reduce-overhead"),
    "bf16, ours": (False, "ours reduce-overhead"),
    "q4_0, inductor": (True, "inductor reduce-overhead"),
    "q4_0, ours": (True, "ours reduce-overhead"),
}
CACHE = 1024


def quantised(model: Any) -> Any:
    """A copy with each linear in Q4_0, codes and scales apart."""
    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, torch.nn.Linear):
            made.set_submodule(name, ggml.Linear(ggml.q4_0.quantise(module.weight.detach())))
    ggml.split(made)
    return made


def prepare(args: argparse.Namespace, item: parts.Item) -> Callable[[], dict[str, Any]]:
    device, (is_packed, how) = torch.device(args.device), COLUMNS[item.name]
    length = 160 if args.tiny else CACHE
    plain = build(llama.TINY if args.tiny else SIZES, device, torch.bfloat16)
    model = quantised(plain) if is_packed else plain
    if is_packed:
        exact = copy.deepcopy(model)
        ggml.dequantise(exact, torch.float32)
        exact = exact.float()
    else:
        exact = in_higher_precision(plain, torch.float32)
    ideal = llama.decode(exact, exact, length)
    ideal.prepare()
    reference = ideal.call()
    del exact, ideal
    # CUDA graphs are of no use on a CPU
    how = how if device.type == "cuda" else how.removesuffix(" reduce-overhead")
    step = functools.partial(llama.decode, length=length)
    turn = llama.prepared_column(how, model, step, reference, {}, args.rounds)
    named = {"phase": f"decode {length}", "column": item.name}
    return lambda: named | turn()


@torch.no_grad()
def main() -> None:
    parser = harness.arguments(__doc__, rounds=40)
    parser.add_argument("--columns", default="", help=f"only these, separated by semicolons: {'; '.join(COLUMNS)}")
    parser.add_argument("--jobs", type=int, default=4, help=parts.JOBS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=parts.SECONDS)
    args = parser.parse_args()
    device, preparing = torch.device(args.device), functools.partial(prepare, args)
    wanted = [c.strip() for c in args.columns.split(";") if c.strip()] or list(COLUMNS)
    items = [*map(parts.Item, harness.chosen(wanted, args.only))]
    if device.type == "cuda":
        measured = parts.measured(items, preparing, args.jobs, args.seconds, ["benchmarks.llama"])
    else:
        measured = (preparing(item)() for item in items)
    rows: list[dict[str, Any]] = []
    for row in measured:
        rows.append(row)
        times = {r["column"]: r.get("pipelined", r["wall"]) for r in rows}
        for other in rows:
            if "q4_0, ours" in times:
                other["speedup"] = times[other["column"]] / times["q4_0, ours"]
        harness.write_json(args.json, device, rows, sizes=llama.TINY if args.tiny else SIZES)
        print(llama.table([row]), flush=True)
        harness.clean_slate(device)
    print(llama.table(rows))
    gains = [[r["column"], f"{r['speedup']:.2f}×"] for r in rows if "speedup" in r]
    print(harness.markdown(["q4_0, ours over", "per step"], gains))


if __name__ == "__main__":
    main()
