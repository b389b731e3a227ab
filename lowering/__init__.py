"""Ways of making kernels, one folder each: candidates for a fused op on a machine."""

from __future__ import annotations

from fusion_compiler.candidates import Lowering


def lowerings() -> tuple[Lowering, ...]:
    """Every lowering, in the order in which equally fast candidates are preferred."""
    from .registered import RegisteredKernels
    from .triton_codegen import TritonCodegen
    from .vendor.int8_linear import Int8Linear
    from .vendor.sdpa import VendorSdpa

    return (VendorSdpa(), Int8Linear(), RegisteredKernels(), TritonCodegen())
