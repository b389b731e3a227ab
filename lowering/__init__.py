"""Ways of making kernels, one folder each: candidates for a fused op on a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusion_compiler.candidates import Lowering


def lowerings() -> tuple[Lowering, ...]:
    """Every lowering, in the order in which equally fast candidates are preferred."""
    from .registered import RegisteredKernels
    from .triton_codegen import TritonCodegen
    from .vendor.flash3 import FlashAttention3
    from .vendor.int8_linear import Int8Linear
    from .vendor.sdpa import VendorSdpa

    return (VendorSdpa(), FlashAttention3(), Int8Linear(), RegisteredKernels(), TritonCodegen())


def direct_kernels() -> dict[str, Callable[..., Any]]:
    """What the functions of `attention.direct` run on a GPU, by the function's name: takes its arguments; a sentence
    where no kernel can be made."""
    from .triton_codegen.flash.varlen import varlen_attention

    return {"varlen_attention": varlen_attention}
