"""Which spellings of attention are recognised, by this compiler and by Inductor's own attention rewrite.

python -m benchmarks.attention_spellings                 every spelling, form, dtype, static and dynamic shapes
python -m benchmarks.attention_spellings --only einsum --json table.json

A cell counts the captures (dtypes × static, dynamic) in which the attention was found for what it is: its mask proved,
its heads not repeated. The graphs are those that Inductor hands to its last step, after its own rewrite; where that has
put a call of a fused attention and nothing is left to prove, it is found too. In brackets: in how many captures of
the same Dynamo graph, by Inductor alone with its own decompositions, its rewrite matched. What is called by name
(`sdpa…`) needs no rewrite.

What torch itself cannot trace is left out of the counts and listed at the end.

The second table has attention as real code writes it: found for what it is, or refused with the sentence expected.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from fusion_compiler.attention import find_attention
from fusion_compiler.fused import Attention
from fusion_compiler.torch_private import inductor

from . import harness

# the spellings are those of the tests
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import attention_in_the_wild as wild  # noqa: E402
import attention_spellings as spellings  # noqa: E402
import cached_attention_spellings as cached  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS, KEYS = 24, 40  # lengths, of the cache too; with the batch of 3 the sizes that are dynamic
DYNAMIC = {3, ROWS, *wild.DYNAMIC}

Function = Callable[..., Any]


@dataclass(frozen=True)
class Form:
    """What stands around a spelling, inputs for a dtype, and the heads that are to be seen."""

    around: Function
    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    heads: tuple[int, int]


def heads(dtype: torch.dtype, kv_heads: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, h, ROWS, 16, dtype=dtype) for h in (4, kv_heads, kv_heads))


def cache_step(dtype: torch.dtype) -> tuple[Tensor, ...]:
    caches = [torch.randn(3, 2, KEYS, 16, dtype=dtype) for _ in range(2)]
    new = [torch.randn(3, 2, 5, 16, dtype=dtype) for _ in range(2)]
    return (torch.randn(3, 4, 5, 16, dtype=dtype), *caches, *new, torch.tensor(5))


ALONE, GROUPED = (functools.partial(heads, kv_heads=n) for n in (4, 2))
FORMS = {
    "plain": Form(spellings.plain, ALONE, (4, 4)),
    "GQA": Form(spellings.repeated_by_expand, GROUPED, (4, 2)),
    "RoPE": Form(spellings.rotated, ALONE, (4, 4)),
    "GQA+RoPE": Form(spellings.rotated, GROUPED, (4, 2)),
    "static cache": Form(cached.step, cache_step, (4, 2)),
}


def expected(form: Form, core: Function) -> dict[str, Any]:
    found: dict[str, Any] = dict(zip(("heads", "kv_heads"), form.heads, strict=True))
    if core in cached.CACHED:
        return found | {"kind": "causal", "offset": 0, "position": True}
    return found | {"kind": "causal" if core in spellings.CAUSAL else "none", "offset": 0, "position": False}


def capture(function: Function, inputs: tuple[Any, ...], dynamic: bool) -> tuple[list[torch.fx.GraphModule], bool]:
    """(the graphs that our last step gets, whether Inductor alone rewrites an attention of the same Dynamo graph)."""
    graphs: list[torch.fx.GraphModule] = []
    rewritten: list[bool] = []

    def ours(gm: torch.fx.GraphModule, _: Any, **__: Any) -> Function:
        graphs.append(gm)
        return inductor.run_eagerly(gm)

    def theirs(gm: torch.fx.GraphModule, _: Any, **__: Any) -> Function:
        rewritten.append(counters["inductor"]["fuse_attention"] > 0)
        return inductor.run_eagerly(gm)

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Function:
        from torch._inductor.compile_fx import compile_fx

        counters.clear()
        with torch._functorch.config.patch(enable_autograd_cache=False):
            compile_fx(copy.deepcopy(gm), example_inputs, inner_compile=theirs)
        return inductor.compile_graph(gm, example_inputs, ours, {})

    torch._dynamo.reset()
    for tensor in inputs if dynamic else ():
        for axis, size in enumerate(tensor.shape):
            if size in DYNAMIC and axis != 1:  # batch and length, not the heads
                torch._dynamo.maybe_mark_dynamic(tensor, axis)  # a table of one length may insist on it
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=None if dynamic else False)(*inputs)
    return graphs, any(rewritten)


def verdict(graphs: list[torch.fx.GraphModule], wanted: Mapping[str, Any]) -> str:
    """Empty where the one attention is found with these fields of the op and its mask, else what was found."""
    found = [find_attention(gm) for gm in graphs]
    ops = [m.op for matches, _ in found for m in matches]
    reasons = "; ".join(n.reason for _, near_misses in found for n in near_misses)
    bare = wanted["kind"] == "none" and wanted["heads"] == wanted["kv_heads"]
    if not ops:
        return "" if bare and "already, with nothing to add" in reasons else reasons or "no softmax of scores"
    (op,) = ops
    assert isinstance(op, Attention)
    have = {name: getattr(op, name) if hasattr(op, name) else getattr(op.mask, name) for name in wanted}
    # a symbolic size is what it was when traced
    have = {n: v.node.hint if isinstance(v, torch.SymInt) else v for n, v in have.items()}
    wrong = {n: have[n] for n in wanted if str(have[n]) != str(wanted[n]) and not _close(have[n], wanted[n])}
    return f"{wrong} ({op.mask.proof})" if wrong else ""


def _close(a: Any, b: Any) -> bool:
    return isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-3 * abs(b)


def table(form: str, name: str, function: Function, inputs: Any, judge: Callable[[Any], str], few: bool) -> dict:
    """One row: a function captured in every dtype, static and dynamic (`few`: float32, static)."""
    row: dict[str, Any] = {"form": form, "spelling": name, "captures": 0, "ours": 0, "inductor": 0, "missed": []}
    row["untraced"] = []
    print(f"… {form} {name}", file=sys.stderr, flush=True)
    for dtype in DTYPES[:1] if few else DTYPES:
        for dynamic in (False,) if few else (False, True):
            try:
                graphs, theirs = capture(function, inputs(dtype), dynamic)
            except torch._dynamo.exc.TorchRuntimeError as error:  # Dynamo cannot trace it, whatever the backend
                first = str(error).strip().splitlines()[0]
                row["untraced"].append(f"{dtype}, {'dynamic' if dynamic else 'static'}: {first}")
                continue
            why = judge(graphs)
            row["captures"] += 1
            row["ours"] += not why
            row["inductor"] += theirs
            if why:
                row["missed"].append(f"{dtype}, {'dynamic' if dynamic else 'static'}: {why}")
    return row


def sentence(graphs: list[torch.fx.GraphModule], wanted: str) -> str:
    """Empty where nothing is found and a near miss says what is wanted, else what was found instead."""
    found = [find_attention(gm) for gm in graphs]
    reasons = "; ".join(n.reason for _, near_misses in found for n in near_misses)
    matched = any(matches for matches, _ in found)
    return "it was matched" if matched else "" if wanted in reasons else reasons or "nothing was said"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="spellings whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json has in full")
    args = parser.parse_args()
    known = json.loads(args.json.read_text())["rows"] if args.resume and args.json and args.json.exists() else []
    done = {(row["form"], row["spelling"]): row for row in known if not row["missed"]}
    rows: list[dict[str, Any]] = []
    for name, form in FORMS.items():
        cores = cached.CACHED if name == "static cache" else spellings.CAUSAL + spellings.UNMASKED
        for core in (c for c in cores if args.only in c.__name__):
            judge = functools.partial(verdict, wanted=expected(form, core))
            function = functools.partial(form.around, core)
            row = done.get((name, core.__name__))
            rows.append(row or table(name, core.__name__, function, form.inputs, judge, few=False))
            harness.write_json(args.json, torch.device("cpu"), rows)
    real: list[dict[str, Any]] = []
    for name, code in wild.WILD.items():
        if args.only in name:
            fields = code.expected
            judge = (
                functools.partial(sentence, wanted=code.sentence)
                if fields is None
                else functools.partial(verdict, wanted=fields)
            )
            kind = "refused" if fields is None else "found"
            row = done.get((kind, name))
            real.append(row or table(kind, name, code.function, code.inputs, judge, few=fields is None))
            harness.write_json(args.json, torch.device("cpu"), [*rows, *real])

    names = list(dict.fromkeys(r["spelling"] for r in rows))
    cells = {(r["form"], r["spelling"]): f"{r['ours']}/{r['captures']} ({r['inductor']})" for r in rows}
    columns = [f for f in FORMS if any(r["form"] == f for r in rows)]
    print(harness.markdown(["spelling", *columns], [[n, *(cells.get((f, n), "") for f in columns)] for n in names]))
    lines = [[r["spelling"], r["form"], f"{r['ours']}/{r['captures']} ({r['inductor']})"] for r in real]
    print("\n" + harness.markdown(["as real code writes it", "is", "captures"], lines))
    for title, part in (("spellings", rows), ("real code", real)):
        total, ours, theirs = (sum(r[key] for r in part) for key in ("captures", "ours", "inductor"))
        print(f"\n{title}: {ours} of {total} captures as they should be; Inductor's own rewrite matched {theirs}")
    for row, why in [(r, m) for r in (*rows, *real) for m in r["untraced"]]:
        print(f"  not captured by torch: {row['form']} {row['spelling']} {why}")
    missed = [(r, m) for r in (*rows, *real) for m in r["missed"]]
    for row, why in missed:
        print(f"  {row['form']} {row['spelling']} {why}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
