"""Times plans of the generated flash kernel against vendor kernels and FlexAttention: one process, CUDA-graph replays.

python -m benchmarks.flash_kernels                         every case and plan
python -m benchmarks.flash_kernels --only "causal S2048" --json plans.json

What the constants of `lowering/triton_codegen/flash` are fitted to. Each plan is checked against float32 first.
"""

from __future__ import annotations

import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusion_compiler.fused import Attention, Layout, Mask
from fusion_compiler.lowering.triton_codegen.flash.plan import Plan
from fusion_compiler.lowering.triton_codegen.flash.source import NAME, contiguous, write
from fusion_compiler.splice import load_kernel

from . import harness

COMPILERS = 12  # processes that compile kernels before anything is timed
PLANS = (
    Plan(128, 64, 8, 3), Plan(128, 128, 8, 2), Plan(128, 64, 4, 2), Plan(64, 64, 4, 2), Plan(64, 64, 4, 3),
    Plan(128, 128, 8, 2, True), Plan(128, 64, 8, 3, True), Plan(128, 64, 4, 2, True), Plan(64, 64, 4, 3, True),
    Plan(64, 128, 4, 2, True),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    mask: Mask = Mask("causal", empty_rows="none")
    softcap: float | None = None
    dtype: torch.dtype = torch.bfloat16
    plans: tuple[Plan, ...] = field(default=PLANS)

    def op(self) -> Attention:
        same = Layout((), (), (), (), self.dtype)
        return Attention(
            self.batch, self.heads, self.kv_heads, self.length, self.length, self.width, self.width,
            self.width**-0.5, self.mask, self.dtype, (same, same, same), same, softcap=self.softcap,
        )  # fmt: skip

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        of = (self.batch, self.kv_heads, self.length, self.width)
        q = torch.randn(self.batch, self.heads, *of[2:], device="cuda", dtype=self.dtype)
        return q, *(torch.randn(of, device="cuda", dtype=self.dtype) for _ in range(2))

    def visible(self, q: Any, k: Any) -> Any:
        if self.mask.kind == "none":
            return q >= 0
        seen = k <= q
        return seen & (k > q - self.mask.window) if self.mask.window else seen

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The first head of the first batch entry, float32."""
        q, k, v = q[0, 0].float(), k[0, 0].float(), v[0, 0].float()
        s = q @ k.mT * self.width**-0.5
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        i = torch.arange(self.length, device="cuda")
        s = s.masked_fill(~self.visible(i[:, None], i[None, :]), float("-inf"))
        return torch.softmax(s, -1) @ v


WINDOW = Mask("causal", window=1024, empty_rows="none")
CASES = (
    Case("causal S2048 D128", 4, 32, 32, 2048, 128),
    Case("softcap S2048 D128", 4, 32, 32, 2048, 128, softcap=50.0),
    Case("window S8192 D128", 1, 32, 8, 8192, 128, WINDOW),
    Case("plain S2048 D128", 4, 32, 32, 2048, 128, Mask("none", empty_rows="none")),
    Case("causal S8192 D128", 1, 32, 8, 8192, 128),
    Case("causal S1024 D128", 4, 32, 32, 1024, 128),
    Case("causal S4096 D64", 2, 32, 8, 4096, 64),
    Case("window S8192 D64", 1, 32, 8, 8192, 64, WINDOW),
)


def launcher(case: Case, plan: Plan) -> tuple[Any, Any, Callable[..., Any]]:
    """(kernel, grid, arguments of q, k, v, out)."""
    kernel = load_kernel(write(case.op(), plan, contiguous(case.op(), {})).text, NAME)
    grid = (case.heads, -(-case.length // plan.block_m), case.batch)

    def arguments(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Any, ...]:
        if plan.descriptors:
            from triton.tools.tensor_descriptor import TensorDescriptor

            block = [1, 1, plan.block_n, case.width]
            return q, TensorDescriptor.from_tensor(k, block), TensorDescriptor.from_tensor(v, block), out
        return q, k, v, out

    return kernel, grid, arguments


def launch(case: Case, plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    kernel, grid, arguments = launcher(case, plan)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
        kernel[grid](*arguments(q, k, v, out), BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, **options)
        return out

    return call


def compile_ahead(pairs: list[tuple[Case, Plan]]) -> None:
    """Fills Triton's cache on disk from several processes."""
    children = []
    for n in range(COMPILERS):
        child = os.fork()
        if child == 0:
            try:
                for case, plan in pairs[n::COMPILERS]:
                    try:
                        small = case.inputs()
                        launch(case, plan)(*small)
                    except Exception as error:
                        print("failed", case.name, plan.label, str(error)[:200], flush=True)
                torch.cuda.synchronize()
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def competitors(case: Case) -> Iterator[tuple[str, Callable[..., Any]]]:
    grouped = case.heads != case.kv_heads
    causal = case.mask.kind == "causal"
    if case.softcap is None:
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

            def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

            yield name if case.mask.window is None else f"{name} full causal", sdpa
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = None
    if causal:
        seen = lambda b, h, q, k: case.visible(q, k)  # noqa: E731
        blocks = create_block_mask(seen, None, None, case.length, case.length, device="cuda")
    cap = case.softcap
    modify = (lambda s, b, h, q, k: cap * torch.tanh(s / cap)) if cap else None
    compiled = torch.compile(flex_attention, dynamic=False)
    yield "flex", lambda q, k, v: compiled(q, k, v, score_mod=modify, block_mask=blocks, enable_gqa=grouped)


def main() -> None:
    args = harness.arguments(__doc__ or "", rounds=10).parse_args()
    chosen = set(harness.chosen([c.name for c in CASES], args.only))
    cases = [c for c in CASES if c.name in chosen]
    compile_ahead([(case, plan) for case in cases for plan in case.plans])
    print("compiled", flush=True)
    device, rows = torch.device("cuda"), []
    torch.manual_seed(0)
    for case in cases:
        inputs = [
            case.inputs() for _ in range(max(2, int(2e8 // (case.batch * case.heads * case.length * case.width * 6))))
        ]
        wanted = case.reference(*inputs[0])
        row: dict[str, Any] = {"case": case.name}
        ways: list[tuple[str, Callable[..., Any]]] = [(p.label, launch(case, p)) for p in case.plans]
        try:
            ways = [*competitors(case), *ways]
        except Exception:
            traceback.print_exc()
        for name, call in ways:
            try:
                out = call(*inputs[0])
                error = harness.relative_error(out[0, 0], wanted)
                timer = harness.graph_timer(call, inputs)
                row[name] = statistics.median(timer() for _ in range(args.rounds)) * 1e6
                print(f"{case.name:24} {name:20} {row[name]:9.1f} us  error {error:.1e}", flush=True)
            except Exception as problem:
                print(f"{case.name:24} {name:20} failed: {str(problem)[:300]}", flush=True)
        rows.append(row)
        harness.write_json(args.json, device, rows)
        del inputs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
