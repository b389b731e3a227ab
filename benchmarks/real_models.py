"""Two layers of well-known models at their real sizes, bf16, random weights: ours beside Inductor, prompt and decoding.

python -m benchmarks.real_models                        attention as transformers calls it by default (SDPA)
python -m benchmarks.real_models --attention eager --only gemma2 --json figures.json
python -m benchmarks.real_models --merge one.json other.json --json figures.json

On a GPU several processes compile the rows at the same time; then they measure one after the other.
Times are of one call inside a CUDA graph. Decoding adds one token to a static cache of 1024 positions, all but a few
of them filled, for one sequence and for eight.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import harness, parts
from .llama_model import rewind

CACHE = 1024
PRELOAD = ("transformers.models.auto.modeling_auto",)
# configuration class, model class, what differs from the class's defaults
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama 1B": ("LlamaConfig", "LlamaForCausalLM", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256}),
    "llama 8B": ("LlamaConfig", "LlamaForCausalLM", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256}),
    "qwen3 0.6B": ("Qwen3Config", "Qwen3ForCausalLM", {
        "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936}),
    "qwen2 1.5B": ("Qwen2Config", "Qwen2ForCausalLM", {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936}),
    "gemma2 2B": ("Gemma2Config", "Gemma2ForCausalLM", {
        "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "vocab_size": 256000}),
    "phi3 mini": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": 0}),
    "gpt2 medium": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 1024, "n_head": 16}),
    "pythia 1.4B": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "vocab_size": 50304}),
    "opt 1.3B": ("OPTConfig", "OPTForCausalLM", {
        "hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32, "word_embed_proj_dim": 2048}),
    "bert large": ("BertConfig", "BertModel", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}),
}  # fmt: skip
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 96}  # fmt: skip
# batch, tokens; None decodes one token
CALLS: dict[str, tuple[int, int | None]] = {
    "prompt 1x512": (1, 512),
    "decode 1": (1, None),
    "decode 8": (8, None),
}


def build(name: str, attention: str, device: torch.device, tiny: bool) -> Any:
    import transformers

    config_class, model_class, sizes = MODELS[name]
    layers = "n_layer" if config_class == "GPT2Config" else "num_hidden_layers"
    sizes = {**sizes, **(TINY if tiny else {}), layers: 2, "attn_implementation": attention, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes)).bfloat16().eval()


Step = Callable[[Tensor], Tensor]


def workload(plain: Any, batch: int, tokens: int | None) -> tuple[Callable[[Any], Step], Tensor]:
    """From a model, compiled or not, to one call of it on token ids; and the ids."""
    from transformers import StaticCache

    source = torch.Generator(plain.device).manual_seed(1)
    filled = CACHE - 8
    ids = torch.randint(90, (batch, tokens or filled), generator=source, device=plain.device)
    if tokens is not None:
        options = {"use_cache": False} if hasattr(plain, "lm_head") or hasattr(plain, "embed_out") else {}
        return lambda model: lambda ids: model(input_ids=ids, **options)[0], ids
    cache = StaticCache(config=plain.config, max_cache_len=CACHE)
    plain(input_ids=ids, past_key_values=cache, use_cache=True)

    def step(model: Any, ids: Tensor) -> Tensor:
        rewind(cache, filled)
        logits: Tensor = model(input_ids=ids, past_key_values=cache)[0]
        return logits

    return lambda model: lambda ids: step(model, ids), ids[:, :1]


def prepare(args: argparse.Namespace, item: parts.Item) -> Callable[[], dict[str, Any]]:
    model, call = item.name.split(", ")
    plain = build(model, args.attention, torch.device(args.device), args.tiny)
    exact = copy.deepcopy(plain).float()
    around, ids = workload(exact, *CALLS[call])
    reference = around(exact)(ids)
    del exact
    around, ids = workload(plain, *CALLS[call])
    columns = {k: around(m) for k, m in harness.standard_columns(plain, args.max_autotune).items()}
    turn = harness.prepared(harness.Row(item.name), columns, [(ids,)], reference, args.rounds)
    return lambda: asdict(turn())


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--jobs", type=int, default=5, help=parts.JOBS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=parts.SECONDS)
    parser.add_argument("--merge", nargs="+", type=Path, help=parts.MERGE)
    args = parser.parse_args()
    names = [f"{m}, {c}" for m in MODELS for c in CALLS if not (m.startswith("bert") and c.startswith("decode"))]
    if args.merge:
        found = parts.merged(args.merge, lambda row: names.index(row["name"]), args.json)
        rows = harness.rows_of(found)
    else:
        rows, items = [], [*map(parts.Item, harness.chosen(names, args.only))]
        for figures in parts.measured(items, functools.partial(prepare, args), args.jobs, args.seconds, PRELOAD):
            rows.append(harness.Row(**figures))
            print(harness.row_table(rows[-1:]).splitlines()[-1], flush=True)
            device = torch.device(args.device)
            harness.write_json(args.json, device, [asdict(row) for row in rows], attention=args.attention)
    print(harness.row_table(rows))


if __name__ == "__main__":
    main()
