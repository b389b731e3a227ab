"""A fusion compiler for PyTorch: `torch.compile(model, backend="fusion_compiler")`.

`explain` says what would be fused and why without running anything; `reports` and `last_report` say what was.
`pattern` declares a fusion, `register_pattern` has every compilation look for it, `register_kernel` brings it a kernel.
`varlen_attention` and `paged_attention` are attention of packed sequences and over paged caches, called by name.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .attention.direct import varlen_attention
from .attention.paged import paged_attention
from .capture import explain
from .package import aoti_compile_and_package
from .pattern import Example, Pattern, choice, literal, pattern
from .registry import (
    disable_patterns,
    enable_patterns,
    register_kernel,
    register_pattern,
    unregister_kernel,
    unregister_pattern,
)
from .report import Decision, NearMiss, Report, last_report, reports

__all__ = [
    "Decision", "Example", "NearMiss", "Pattern", "Report", "aoti_compile_and_package", "choice",
    "disable_patterns", "enable_patterns", "explain", "ggml", "gguf", "last_report", "literal", "paged_attention",
    "pattern", "patterns", "register_kernel", "register_pattern", "reports", "unregister_kernel", "unregister_pattern",
    "varlen_attention",
]  # fmt: skip

# In a checkout `patterns/` and `lowering/` stand beside this package, in an installation inside it.
_root = Path(__file__).resolve().parent
if not (_root / "patterns").is_dir():
    __path__.append(str(_root.parent))


def __getattr__(name: str) -> Any:
    """`patterns` (which lists its patterns when called), `ggml` and `gguf` are loaded when they are first asked for."""
    if name in ("patterns", "ggml", "gguf"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
