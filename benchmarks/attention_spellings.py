"""Which spellings of attention are recognised, by this compiler and by Inductor's own attention rewrite.

python -m benchmarks.attention_spellings                 every spelling, form, dtype, static and dynamic shapes
python -m benchmarks.attention_spellings --only einsum --json table.json

A cell counts the captures (dtypes × static, dynamic) in which the attention was found, of those tried. The graphs are
those that Inductor hands to its last step, so its rewrite has had its turn on the very same capture: the second figure
is how often it matched. Where Inductor has put its own attention call and nothing is left to prove, that is found too.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fusion_compiler.attention import find_attention
from fusion_compiler.torch_private import inductor
from tests import attention_spellings as spellings
from tests import cached_attention_spellings as cached

from . import harness

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def rope_alone(core: spellings.Core, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return spellings.rotated(core, q, k[:, :1].expand(q.shape), v[:, :1].expand(q.shape))


def heads(dtype: torch.dtype, kv_heads: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, h, 24, 16, dtype=dtype) for h in (4, kv_heads, kv_heads))


def cache_step(dtype: torch.dtype) -> tuple[Tensor, ...]:
    caches = [torch.randn(3, 2, 40, 16, dtype=dtype) for _ in range(2)]
    new = [torch.randn(3, 2, 5, 16, dtype=dtype) for _ in range(2)]
    return (torch.randn(3, 4, 5, 16, dtype=dtype), *caches, *new, torch.tensor(5))


def forms() -> dict[
    str, tuple[tuple[Callable[..., Tensor], ...], Callable[..., Tensor], Callable[[torch.dtype], tuple[Any, ...]]]
]:
    """name: (spellings, what stands around them, inputs)."""
    cores = spellings.CAUSAL + spellings.UNMASKED
    return {
        "plain": (cores, spellings.plain, lambda dtype: heads(dtype, 4)),
        "GQA": (cores, spellings.repeated_by_expand, lambda dtype: heads(dtype, 2)),
        "RoPE": (cores, spellings.rotated, lambda dtype: heads(dtype, 4)),
        "GQA+RoPE": (cores, spellings.rotated, lambda dtype: heads(dtype, 2)),
        "static cache": (cached.CACHED, cached.step, cache_step),
    }  # fmt: skip


def capture(function: Callable[..., Tensor], inputs: tuple[Any, ...], dynamic: bool) -> tuple[bool, bool, str]:
    """(found by us, rewritten by Inductor, why not)."""
    found: list[bool] = []
    reasons: list[str] = []

    def examine(gm: torch.fx.GraphModule, _: Any, **__: Any) -> Callable[..., Any]:
        matches, near_misses = find_attention(gm)
        reasons.extend(n.reason for n in near_misses)
        done = any("already" in n.reason for n in near_misses)
        found.append(bool(matches) or done)
        return inductor.run_eagerly(gm)

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return inductor.compile_graph(gm, example_inputs, examine, {})

    torch._dynamo.reset()
    counters.clear()
    if dynamic:
        for tensor in inputs:
            for axis in (0, 2) if tensor.dim() == 4 else ():
                torch._dynamo.mark_dynamic(tensor, axis)  # batch and length
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=None if dynamic else False)(*inputs)
    return any(found), counters["inductor"]["fuse_attention"] > 0, "; ".join(reasons)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="spellings whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for form, (cores, around, inputs) in forms().items():
        for core in cores:
            name = core.__name__
            if args.only not in name:
                continue
            row: dict[str, Any] = {
                "form": form,
                "spelling": name,
                "captures": 0,
                "ours": 0,
                "inductor": 0,
                "missed": [],
            }
            for dtype in DTYPES:
                for dynamic in (False, True):
                    ours, theirs, why = capture(functools.partial(around, core), inputs(dtype), dynamic)
                    row["captures"] += 1
                    row["ours"] += ours
                    row["inductor"] += theirs
                    if not ours:
                        row["missed"].append(f"{dtype}, {'dynamic' if dynamic else 'static'}: {why or 'no root'}")
            rows.append(row)
    harness.write_json(args.json, torch.device("cpu"), rows)
    names = list(dict.fromkeys(r["spelling"] for r in rows))
    cells = {(r["form"], r["spelling"]): f"{r['ours']}/{r['captures']} ({r['inductor']})" for r in rows}
    columns = [f for f in forms() if any(r["form"] == f for r in rows)]
    print(harness.markdown(["spelling", *columns], [[n, *(cells.get((f, n), "") for f in columns)] for n in names]))
    total, found, theirs = (sum(r[key] for r in rows) for key in ("captures", "ours", "inductor"))
    print(f"\nfound {found} of {total} captures; Inductor's own rewrite matched {theirs} (in brackets)")
    for row in rows:
        for missed in row["missed"]:
            print(f"  {row['form']} {row['spelling']} {missed}")


if __name__ == "__main__":
    main()
