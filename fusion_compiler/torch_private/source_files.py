"""Python source kept in content-addressed files (`torch._inductor.codecache.PyCodeCache`).

Triton reads a kernel's source from its file, and so does Inductor when it copies the kernel into the code it
generates. Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from types import ModuleType


def module_from_source(source: str) -> ModuleType:
    """The module that `source` defines; equal sources give one file and one module per process."""
    from torch._inductor.codecache import PyCodeCache

    return PyCodeCache.load(source)
