"""A fusion compiler for PyTorch: `torch.compile(model, backend="fusion_compiler")`.

`explain` says what would be fused and why without running anything; `reports` and `last_report` say what was.
"""

from __future__ import annotations

from pathlib import Path

from .capture import explain
from .pattern import Example, Pattern, choice, pattern
from .report import Decision, NearMiss, Report, last_report, reports

__all__ = [
    "Decision", "Example", "NearMiss", "Pattern", "Report", "choice", "explain", "last_report", "pattern", "reports",
]  # fmt: skip

# In a checkout `patterns/` and `lowering/` stand beside this package, in an installation inside it.
_root = Path(__file__).resolve().parent
if not (_root / "patterns").is_dir():
    __path__.append(str(_root.parent))
