"""Python source kept in content-addressed files (`torch._inductor.codecache.PyCodeCache`).

Triton reads a kernel's source from its file, and so does Inductor when it copies the kernel into the code it
generates. Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from types import FunctionType, ModuleType

_sources: dict[str, str] = {}  # by file


def module_from_source(source: str) -> ModuleType:
    """The module that `source` defines; equal sources give one file and one module per process."""
    from torch._inductor.codecache import PyCodeCache

    module = PyCodeCache.load(source)
    _sources[str(module.__file__)] = source
    return module


def source_of(function: FunctionType) -> str | None:
    """The source of the module that defines `function`, where `module_from_source` made it."""
    return _sources.get(function.__code__.co_filename)
