"""Programmatic dependent launch of user kernels (`torch._inductor.codegen.wrapper.PythonWrapperCodegen`).

Inductor launches kernels of its own so where told to, and reads that from the kernel's `triton_meta`, which it writes
for user kernels too, but without this entry. Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

META = "triton_meta={"
WAIT = "griddepcontrol.wait"  # of `fusion_compiler.dependent_launch`


@contextmanager
def passed_on() -> Iterator[None]:
    """While Inductor generates code: kernels that wait for the last one are launched before it has ended."""
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    define = PythonWrapperCodegen.define_kernel

    def with_launch(self: Any, kernel_name: str, kernel_body: str, *args: Any, **kwargs: Any) -> None:
        if WAIT in kernel_body:
            kernel_body = kernel_body.replace(META, META + "'launch_pdl': True, ", 1)
        define(self, kernel_name, kernel_body, *args, **kwargs)

    with mock.patch.object(PythonWrapperCodegen, "define_kernel", with_launch):
        yield
