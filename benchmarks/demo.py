"""The main job: a small Llama with transformers' eager attention, compiled for a prompt and for decoding.

Prints what was fused and why, the errors of the uncompiled and the compiled model against the same weights in float64,
and the times of eager, Inductor and ours, measured in turn in one run. On the GPU if there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch
from torch import Tensor

import fusion_compiler

from . import harness
from .llama_model import DecodeStep, build, in_higher_precision, static_cache

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}
TINY = SMALL | {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}
COLUMNS = {"eager": None, "inductor": "inductor", "ours": "fusion_compiler"}


def say(text: str) -> None:
    print(text, flush=True)


def compare(title: str, calls: dict[str, Any], reference: Tensor, rounds: int) -> None:
    """Compile, check and time `calls`, which all compute the same thing."""
    device = reference.device
    say(f"\n== {title}")
    outputs, timers = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        outputs[name] = call().clone()
        harness.synchronize(device)
        if name != "eager":
            say(f"   {name}: compiled in {time.perf_counter() - start:.1f} s")
        timers[name] = harness.wall_timer(call, [()], device)
    report = fusion_compiler.last_report()
    if report is not None:
        say(f"\n{report}\n")
    samples = harness.interleaved(timers, rounds)
    lines = []
    for name in calls:
        difference = float((outputs[name] - outputs["eager"]).abs().max())
        seconds = statistics.median(samples[name])
        faster = "–" if name == "ours" else f"{harness.ratio(samples, name, 'ours'):.2f}×"
        error = harness.relative_error(outputs[name], reference)
        lines.append([name, f"{seconds * 1e3:.2f}", faster, f"{error:.2e}", f"{difference:.2e}"])
    say(harness.markdown(["", "ms", "ours is faster by", "error vs float64", "max. difference from eager"], lines))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="samples per column (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="very small sizes, to try the command itself")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prompt = 64 if args.tiny else 2048
    plain = build(TINY if args.tiny else SMALL, device, dtype)
    exact = in_higher_precision(plain, torch.float64)
    begun = time.perf_counter()
    say(f"Llama of {plain.num_parameters() / 1e6:.1f} M parameters, {dtype}, eager attention, on {device.type}")

    models = {name: plain if b is None else harness.compiled(plain, b) for name, b in COLUMNS.items()}
    ids = torch.randint(plain.config.vocab_size, (1, prompt), device=device)
    prefills = {name: lambda m=m: m(ids, use_cache=False).logits for name, m in models.items()}
    reference = exact(ids, use_cache=False).logits
    compare(f"prefill, {prompt} tokens", prefills, reference, args.rounds)

    position = prompt - 8
    token = ids[:, :1]
    steps = {name: DecodeStep(m, static_cache(plain, prompt, position), position, token) for name, m in models.items()}
    reference = DecodeStep(exact, static_cache(exact, prompt, position), position, token)()
    compare(f"decode, one token at position {position} of a static cache of {prompt}", steps, reference, args.rounds)
    say(f"\n{len(fusion_compiler.reports())} reports, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
