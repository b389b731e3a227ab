"""Compiles generated kernels with no device present and reads what they cost: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...fused import MatmulFamily, MatmulGroup
from .plans import Plan
from .writer import KernelSource

_TRITON_TYPE = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel uses. `spills` counts bytes of local memory (NVIDIA) or registers (AMD)."""

    registers: int
    spills: int
    shared: int


def compile_kernel(op: MatmulFamily | MatmulGroup, plan: Plan, source: KernelSource, target: Any) -> Any:
    """`source` compiled for `target` (a `GPUTarget`) as `op` would launch it, with 16-byte aligned tensors."""
    extras = [extra.dtype for part in op.parts for extra in part.extras]
    other = {f"extra{j}": dtype for j, dtype in enumerate(extras)}
    other |= {"partial": torch.float32, "arrivals": torch.int32}
    other |= {f"x{j}": given.dtype for j, given in enumerate(op.whole.inputs)}
    other |= dict(zip(source.outputs, (part.out_dtype for part in op.parts), strict=True))
    tensors = {name: other.get(name, op.dtype) for name in source.tensors}
    return compile_text(
        source.text, source.name, tensors, ["M"] if source.runtime_m else [], constexprs(op, plan), target,
        dict(source.blocks), num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


def compile_text(
    text: str, name: str, tensors: Mapping[str, torch.dtype], sizes: Iterable[str], constants: Mapping[str, int],
    target: Any, blocks: Mapping[str, Sequence[int]] = MappingProxyType({}), **options: int,
) -> Any:  # fmt: skip
    """The kernel `name` of the module `text` compiled for `target` (a `GPUTarget`): its arguments are tensors, which
    are 16-byte aligned, then `sizes` of any value, then constexprs. Tensors with `blocks` come as descriptors."""
    import triton
    from triton.compiler import ASTSource

    from ...splice import load_kernel

    signature = {tensor: f"*{_TRITON_TYPE[dtype]}" for tensor, dtype in tensors.items()}
    signature |= {name: f"tensordesc<{_TRITON_TYPE[tensors[name]]}{list(block)}>" for name, block in blocks.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i, tensor in enumerate(tensors) if tensor not in blocks}
    signature |= dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(load_kernel(text, name), signature, dict(constants), attributes)
    return triton.compile(source, target=target, options=options)


def constexprs(
    op: MatmulFamily | MatmulGroup, plan: Plan, x_stride: int | None = None, w_stride: int | None = None
) -> dict[str, int]:
    """The constexpr arguments of a kernel; the strides default to those of contiguous operands. A descriptor knows its
    own strides."""
    whole = op.whole
    strides = {
        "x_stride": int(whole.k) if x_stride is None else x_stride,
        "w_stride": int(whole.n if whole.weight_is_kn else whole.k) if w_stride is None else w_stride,
    }
    sizes = {"N": int(whole.n), "K": int(whole.k), "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k}
    return sizes if plan.tiled else strides | sizes


def resources(compiled: Any) -> Resources:
    """Registers, spills and shared memory of a kernel that `compile_kernel` made."""
    shared = int(compiled.metadata.shared)
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return Resources(_count(r"\.vgpr_count:\s+(\d+)", text), _count(r"\.vgpr_spill_count:\s+(\d+)", text), shared)
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Resources(_count(r"REG:(\d+)", text), _count(r"STACK:(\d+)", text) + _count(r"LOCAL:(\d+)", text), shared)


def _count(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}")
    return int(found.group(1))
