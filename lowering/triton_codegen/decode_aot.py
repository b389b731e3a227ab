"""Compiles kernels of decode attention with no device present."""

from __future__ import annotations

from typing import Any

from .aot import _TRITON_TYPE
from .decode_source import KernelSource


def compile_source(source: KernelSource, target: Any, num_warps: int, num_stages: int) -> Any:
    """`source` compiled for `target` (a `GPUTarget`), with 16-byte aligned tensors and sizes of any value."""
    import triton
    from triton.compiler import ASTSource

    from ...splice import load_kernel

    kernel = load_kernel(source.text, source.name)
    signature = {name: f"*{_TRITON_TYPE[dtype]}" for name, dtype in source.tensors.items()}
    signature |= dict.fromkeys(source.sizes, "i32")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(source.tensors))}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(ASTSource(kernel, signature, {}, attributes), target=target, options=options)
