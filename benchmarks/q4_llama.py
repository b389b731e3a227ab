"""A Llama of 8 layers (hidden 4096, FFN 14336, 32/8 heads, small vocabulary), bf16, beside itself in Q4_0.

python -m benchmarks.q4_llama                              decode at a static cache of 1024, reduce-overhead
python -m benchmarks.q4_llama --columns "q4_0, ours" --json figures.json

Columns name the weights, then who compiles. q4_0: each linear quantised and held as fc.ggml.SplitLinear. Times are as
in benchmarks.llama; compile caches stay as they are. Errors of the logits are against the same weights, dequantised, in
float32. speedup: of "q4_0, ours" over each other column, pipelined.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch

from fusion_compiler import ggml

from . import harness, llama
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


@torch.no_grad()
def main() -> None:
    parser = harness.arguments(__doc__, rounds=40)
    parser.add_argument("--columns", default="", help=f"only these, separated by semicolons: {'; '.join(COLUMNS)}")
    args = parser.parse_args()
    device = torch.device(args.device)
    # CUDA graphs are of no use on a CPU
    columns = {
        name: (packed, how if device.type == "cuda" else how.removesuffix(" reduce-overhead"))
        for name, (packed, how) in COLUMNS.items()
    }
    sizes = llama.TINY if args.tiny else SIZES
    plain = build(sizes, device, torch.bfloat16)
    packed = quantised(plain)
    floats = copy.deepcopy(packed)
    ggml.dequantise(floats, torch.float32)
    phase = f"decode {160 if args.tiny else CACHE}"
    rows: list[dict[str, Any]] = []
    references: dict[bool, torch.Tensor] = {}
    for column in harness.chosen([c.strip() for c in args.columns.split(";") if c.strip()] or list(columns), args.only):
        harness.clean_slate(device)
        is_packed, how = columns[column]
        length = int(phase.split()[1])
        if is_packed not in references:
            exact = floats.float() if is_packed else in_higher_precision(plain, torch.float32)
            ideal = llama.decode(exact, exact, length)
            ideal.prepare()
            references[is_packed] = ideal.call()
            del exact, ideal
        row: dict[str, Any] = {"phase": phase, "column": column}
        rows.append(row)
        model = packed if is_packed else plain
        try:
            step = functools.partial(llama.decode, length=length)
            row |= llama.run_column(how, model, step, references[is_packed], {}, args.rounds)
        except Exception as problem:
            row["failed"] = harness.complain(column, problem)
        times = {r["column"]: r.get("pipelined", r["wall"]) for r in rows if "wall" in r}
        for other in rows:
            if "q4_0, ours" in times and other["column"] in times:
                other["speedup"] = times[other["column"]] / times["q4_0, ours"]
        harness.write_json(args.json, device, rows, sizes=sizes)
        print(llama.table([row]), flush=True)
    print(llama.table(rows))
    gains = [[r["column"], f"{r['speedup']:.2f}×"] for r in rows if "speedup" in r]
    print(harness.markdown(["q4_0, ours over", "per step"], gains))


if __name__ == "__main__":
    main()
