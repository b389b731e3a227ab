"""Attention as models spell it, before any kernel, with whatever they do to the scores.

python -m benchmarks.attention                       the GPU table in bf16, or on a CPU the CPU table
python -m benchmarks.attention --only "S2048 D128 bfloat16 softcap" --json figures.json
python -m benchmarks.attention --plot attention.svg  draws the lines of sequence lengths too (needs matplotlib)

Beside eager, Inductor and ours: "flex", FlexAttention told by hand what is done to the scores, and "sdpa causal",
F.scaled_dot_product_attention(is_causal=True) by hand, on the full causal attention where ours sees less of it. The
unnamed spelling is transformers' eager attention, which computes its causal mask in the graph. Rows of one size and
many lengths hold 8192 tokens each (small, medium and large models: hidden 1024, 2048 and 4096); what writes scores out
is left out where they do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import harness
from .harness import Row


def masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores of later keys are filled with -inf."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def repeat_kv(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' eager_attention_forward: repeated keys and values, and a mask of the dtype's least number added."""
    times = q.shape[1] // k.shape[1]
    if times > 1:
        k, v = repeat_kv(k, times), repeat_kv(v, times)
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    rows = torch.arange(q.shape[-2], device=q.device)[None, None, :, None]
    columns = torch.arange(k.shape[-2], device=q.device)[None, None, None, :]
    least = torch.finfo(q.dtype).min
    scores = scores + torch.where(columns <= rows, q.new_zeros(()), least)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def scored(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores with repeated keys, and the positions of queries and keys."""
    k = repeat_kv(k, q.shape[1] // k.shape[1])
    scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
    return scores, torch.arange(q.shape[-2], device=q.device)[:, None], torch.arange(k.shape[-2], device=q.device)[None]


def weighted(scores: Tensor, seen: Tensor | None, v: Tensor) -> Tensor:
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    p = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(p, repeat_kv(v, scores.shape[1] // v.shape[1]))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return weighted(scored(q, k)[0], None, v)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    return weighted(torch.tanh(scores / CAP) * CAP, keys <= rows, v)


def slopes(heads: int, device: torch.device) -> Tensor:
    return torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=device))


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    bias = slopes(q.shape[1], q.device)[:, None, None] * (keys - rows)
    return weighted(scores + bias.to(scores.dtype), keys <= rows, v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    return weighted(scores, (keys <= rows) & (keys > rows - WINDOW), v)


def gemma2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A cap and a window at once."""
    scores, rows, keys = scored(q, k)
    return weighted(torch.tanh(scores / CAP) * CAP, (keys <= rows) & (keys > rows - WINDOW), v)


def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    """GPT-OSS: a window, and one more score for each head that no value belongs to."""
    scores, rows, keys = scored(q, k)
    seen = (keys <= rows) & (keys > rows - NARROW)
    scores = scores + torch.where(seen, q.new_zeros(()), torch.finfo(q.dtype).min)
    beside = sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    joined = torch.cat([scores, beside], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    p = F.softmax(joined, dim=-1, dtype=joined.dtype)[..., :-1]
    return torch.matmul(p, repeat_kv(v, q.shape[1] // v.shape[1]))


def bucket(distance: Tensor) -> Tensor:
    """T5's bucket of a relative position, of 32: half for each sign, near ones exact, far ones by logarithm."""
    far = distance.abs()
    exact, most = 8, 128
    coarse = exact + (torch.log(far.float() / exact) / math.log(most / exact) * exact).long()
    return (distance > 0).long() * 16 + torch.where(far < exact, far, coarse.clamp(max=15))


def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Scores that are not scaled, with a bias learnt for each bucket and head."""
    rows, keys = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    bias = F.embedding(bucket(keys - rows), table).permute(2, 0, 1)[None]
    return torch.matmul(F.softmax((q @ k.transpose(3, 2) + bias).float(), dim=-1).type_as(v), v)


def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    scores, rows, keys = scored(q, k)
    return weighted(scores, (ids[:, None, :, None] == ids[:, None, None, :]) & (keys <= rows), v)


CAP, WINDOW, NARROW, DOCUMENT = 50.0, 1024, 128, 1024
MOST_SCORES = 2e10  # bytes


def flex(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention with the modification of the case; its lists of blocks are made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    name, per_head = case.spelling.__name__, slopes(case.heads, device)
    ids = case.ids(device)[0] if case.spelling is documents else None
    reach = {"window": WINDOW, "gemma2": WINDOW, "sinks": NARROW}.get(name)
    seen: dict[str, Callable[..., Any]] = dict.fromkeys(
        ("window", "gemma2", "sinks"), lambda b, h, q, k: (k <= q) & (k > q - reach)
    )
    seen["documents"] = lambda b, h, q, k: (k <= q) & (ids[q] == ids[k])
    capped = lambda s, b, h, q, k: CAP * torch.tanh(s / CAP)  # noqa: E731
    scores: dict[str, Callable[..., Any]] = {
        "softcap": capped,
        "gemma2": capped,
        "alibi": lambda s, b, h, q, k: s + per_head[h] * (k - q),
    }
    n = case.length
    mask = seen.get(name, lambda b, h, q, k: k <= q)
    blocks = None if case.spelling in (plain, t5) else create_block_mask(mask, None, None, n, n, device=device)
    grouped = case.heads != case.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        modify, scale = scores.get(name), None
        if name == "t5":
            modify, scale = lambda s, b, h, q, k: s + more[0][bucket(k - q), h], 1.0
        out, total = flex_attention(
            q, k, v, score_mod=modify, block_mask=blocks, scale=scale, enable_gqa=grouped, return_lse=True
        )
        return out * torch.sigmoid(total - more[0][:, None])[..., None].to(out.dtype) if name == "sinks" else out

    compiled: Callable[..., Tensor] = torch.compile(call, dynamic=False)
    return compiled


@dataclass(frozen=True)
class Case:
    spelling: Callable[..., Tensor]
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    dtype: torch.dtype
    v_width: int = 0  # that of the values, if it is another

    @property
    def name(self) -> str:
        width = f"{self.width}/{self.v_width}" if self.v_width else f"{self.width}"
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        spelling = "" if self.spelling is additive else f" {self.spelling.__name__}"
        return f"B{self.batch} H{heads} S{self.length} D{width} {str(self.dtype).removeprefix('torch.')}{spelling}"

    def ids(self, device: torch.device) -> Tensor:
        """Documents of DOCUMENT tokens each, one after the other; the same in every batch entry."""
        return (torch.arange(self.length, device=device) // DOCUMENT).expand(self.batch, -1).contiguous()

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        shapes = ((h, self.length, d) for h, d in zip(self.of_heads, self.widths, strict=True))
        q, k, v = (torch.randn(self.batch, *shape, device=device, dtype=self.dtype) for shape in shapes)
        more: dict[Any, Callable[[], Tensor]] = {
            documents: lambda: self.ids(device),
            sinks: lambda: torch.randn(self.heads, device=device, dtype=self.dtype),
            t5: lambda: torch.randn(32, self.heads, device=device, dtype=self.dtype),
        }
        if self.spelling is t5:
            q = q * self.width**-0.5  # as T5's weights have it
        return (q, k, v, more[self.spelling]()) if self.spelling in more else (q, k, v)

    @property
    def of_heads(self) -> tuple[int, int, int]:
        return self.heads, self.kv_heads, self.kv_heads

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.width, self.width, self.v_width or self.width

    def keys(self) -> float:
        """Mean number of keys that a query sees."""
        if self.spelling in (plain, t5):
            return self.length
        reach = {window: WINDOW, gemma2: WINDOW, sinks: NARROW, documents: DOCUMENT}.get(self.spelling, self.length)
        reach = min(reach, self.length)
        return reach / 2 if self.spelling is documents else reach - reach**2 / (2 * self.length)

    @property
    def scores_bytes(self) -> int:
        return 4 * self.batch * self.heads * self.length**2

    def floor(self) -> float:
        """Every input read and the output written once; what is masked out needs no work."""
        rows = self.heads * (self.width + self.widths[2]) + self.kv_heads * (self.width + self.widths[2])
        moved = self.batch * self.length * rows * self.dtype.itemsize
        flops = 2 * self.batch * self.heads * self.length * self.keys() * (self.width + self.widths[2])
        return harness.floor_seconds(moved, flops, self.dtype)


LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SIZES = ((16, 64), (32, 64), (32, 128))  # heads and their width
BF16, FP32 = torch.bfloat16, torch.float32
GPU_CASES = (
    Case(masked_fill, 4, 32, 32, 1024, 128, BF16),
    Case(additive, 4, 32, 32, 1024, 128, BF16),
    Case(masked_fill, 4, 32, 32, 2048, 128, BF16),
    Case(additive, 4, 32, 32, 2048, 128, BF16),
    Case(additive, 1, 32, 8, 8192, 128, BF16),
    *(Case(additive, max(1, 8192 // n), h, h, n, d, BF16) for h, d in SIZES for n in LENGTHS),
    Case(plain, 16, 16, 16, 512, 64, BF16),
    Case(plain, 8, 32, 32, 1024, 64, BF16),
    Case(plain, 4, 32, 32, 1024, 128, BF16),
    *(Case(s, 4, 32, 32, 2048, 128, BF16) for s in (plain, softcap, alibi, documents, window)),
    # what models do
    Case(gemma2, 1, 16, 8, 8192, 256, BF16),
    Case(sinks, 1, 64, 8, 8192, 64, BF16),
    Case(t5, 8, 16, 16, 1024, 64, BF16),
    Case(additive, 1, 32, 32, 4096, 192, BF16, 128),
    *(Case(gemma2, 4, 16, 16, 2048, d, BF16) for d in (32, 64, 80, 96, 192, 256)),
    # what is done to the scores, over the length
    *(Case(s, 1, 32, 8, length, 128, BF16) for length in LENGTHS for s in (softcap, alibi, window, documents)),
)
CPU_CASES = tuple(Case(additive, 1, 8, 2, length, 64, dtype) for length in (512, 2048) for dtype in (FP32, BF16))
TINY_CASES = (Case(masked_fill, 1, 2, 2, 64, 16, FP32), Case(additive, 1, 4, 2, 64, 16, FP32)) + tuple(
    Case(s, 1, 4, 2 if s is not t5 else 4, 64, 16, FP32)
    for s in (plain, softcap, alibi, window, documents, gemma2, sinks, t5)
)


def reference_of(case: Case, inputs: tuple[Tensor, ...], better: torch.dtype, columns: dict[str, Any]) -> Tensor:
    """The result in better floats, one batch entry at a time; FlexAttention's where the scores do not fit."""
    if case.scores_bytes > MOST_SCORES:
        found: Tensor = columns["flex"](*inputs)
        return found
    batched = len(inputs) if case.spelling is documents else 3
    entries = ([t[i : i + 1] if n < batched else t for n, t in enumerate(inputs)] for i in range(case.batch))
    wide = ([t.to(better) if t.is_floating_point() else t for t in entry] for entry in entries)
    return torch.cat([case.spelling(*entry) for entry in wide])


def memory_table(rows: list[Row]) -> str:
    """Device memory beyond the inputs that each column needs at its peak, in MB."""
    columns = list(dict.fromkeys(c for row in rows for c in row.peak))
    lines = []
    for row in rows:
        held = [f"{row.peak[c] / 1e6:.0f}" if c in row.peak else "–" for c in columns]
        eager, ours = row.peak.get("eager"), row.peak.get("ours")
        lines.append([row.name, *held, f"{1 - ours / eager:.1%}" if eager and ours is not None else "–"])
    return harness.markdown(["peak MB", *columns, "ours saves of eager's"], lines)


def plot(path: Path, cases: dict[str, Case], rows: list[Row]) -> None:
    """Time over sequence length, one line per column, one picture for each modification and size of which there are
    several lengths."""
    from matplotlib import pyplot

    of: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        case = cases[row.name]
        title = f"{case.spelling.__name__}, {'/'.join(map(str, case.of_heads[:2]))} heads of {case.width}"
        of.setdefault(title, []).append((case.length, row))
    lines = {title: found for title, found in of.items() if len({n for n, _ in found}) > 1}
    if not lines:
        return
    _, pictures = pyplot.subplots(1, len(lines), figsize=(4.5 * len(lines), 4), squeeze=False)
    for (title, found), picture in zip(lines.items(), pictures[0], strict=True):
        for column in dict.fromkeys(c for _, row in found for c in row.seconds):
            points = sorted((n, row.seconds[column] * 1e6) for n, row in found if column in row.seconds)
            picture.loglog(*zip(*points, strict=True), marker="o", base=2, label=column)
        picture.set(title=title, xlabel="sequence length", ylabel="µs")
        picture.legend()
    pyplot.tight_layout()
    pyplot.savefig(path)


def main() -> None:
    parser = harness.arguments(__doc__, rounds=20)
    parser.add_argument("--plot", metavar="PATH", type=Path, help="draw the figures there")
    args = parser.parse_args()
    device = torch.device(args.device)
    table = TINY_CASES if args.tiny else GPU_CASES if device.type == "cuda" else CPU_CASES
    cases = {case.name: case for case in table}
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name in harness.chosen(list(cases), args.only):
            case = cases[name]
            inputs = harness.rotated(lambda case=case: case.inputs(device), device)
            columns = harness.standard_columns(case.spelling, args.max_autotune)
            if case.spelling not in (plain, t5):
                columns["sdpa causal"] = lambda q, k, v, *_: sdpa_causal(q, k, v)
            if device.type == "cuda":
                columns["flex"] = flex(case, device)
            if case.scores_bytes > MOST_SCORES:  # what writes scores out does not fit
                columns = {name: fn for name, fn in columns.items() if name not in ("eager", "inductor")}
            better = torch.float64 if case.dtype is FP32 else FP32
            reference = reference_of(case, inputs[0], better, columns)
            row = Row(name, floor=case.floor())
            rows.append(harness.measure(row, columns, inputs, reference, args.rounds))
            print(harness.row_table(rows[-1:]), flush=True)
            harness.write_json(args.json, device, [asdict(row) for row in rows])
            del inputs, reference
            harness.clean_slate(device)
    print(harness.row_table(rows))
    if device.type == "cuda":
        print(memory_table(rows))
    if args.plot:
        plot(args.plot, cases, rows)


if __name__ == "__main__":
    main()
