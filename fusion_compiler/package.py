"""Ahead of time: an exported program with the fused kernels inside, packaged by AOTInductor."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch

from . import backend
from .torch_private import packaging

_ONLY_WHEN_RUNNING = {
    "verify": "compares on real inputs while the model runs",
    "autotune": "measures while a model is compiled for this process",
}


def aoti_compile_and_package(
    exported_program: torch.export.ExportedProgram,
    *,
    package_path: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The path of a package (.pt2) of `exported_program`, for `torch._inductor.aoti_load_package` or its C++ loader.

    As `torch._inductor.aoti_compile_and_package`, with what pays fused first; `fusion_compiler.last_report()` says what
    was. `options` are those of the backend. A package cannot be compiled again for other sizes: what would pay for some
    values of a dynamic size only is kept.

    Raises TypeError for what is no exported program; ValueError for a path that does not end in .pt2, and for options
    that need a running model: verify, autotune, remainder="eager".
    """
    if not isinstance(exported_program, torch.export.ExportedProgram):
        raise TypeError(
            f"a package is made of what torch.export.export returns, and this is {type(exported_program).__name__}"
        )
    path = None if package_path is None else os.fspath(package_path)
    if path is not None and not path.endswith(".pt2"):
        raise ValueError(f"the path of a package ends in .pt2, and {path!r} does not")
    parsed = backend.parse_options(options)
    for name, what in _ONLY_WHEN_RUNNING.items():
        if getattr(parsed, name):
            raise ValueError(f"{name}=True {what}; nothing runs while a package is made. Try it with torch.compile")
    if parsed.remainder == "eager":
        raise ValueError('remainder="eager" leaves nodes to Python, and a package has none')
    step = functools.partial(backend.compile_step, options=parsed, label="exported program", guardable=False)
    return packaging.compile_and_package(exported_program, path, step, backend.inductor_settings(parsed))
