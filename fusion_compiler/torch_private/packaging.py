"""Inductor's ahead-of-time compilation with its last step replaced (`torch._inductor.aoti_compile_and_package`).

It takes no `inner_compile` of ours and no decompositions, but hands its own on to `compile_fx`, by that name in its
module. Weights are not inputs of the graph, as they are in torch.compile, but attributes of it.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch._functorch.config

from .attention_rewrite import checked
from .inductor import with_whole_products

_alone = threading.Lock()


def compile_and_package(
    program: torch.export.ExportedProgram, path: str | None, step: Callable[..., Any], patches: Mapping[str, Any]
) -> str:
    """The path of the package of `program`, in whose compilation `step` compiles the ATen graph."""
    import torch._inductor.compile_fx as module
    from torch._inductor import aoti_compile_and_package

    original, owner = module.compile_fx, threading.get_ident()

    def with_ours(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner:  # somebody else compiles meanwhile
            return original(*args, **kwargs)
        module.compile_fx = original  # which calls itself by this name, with what it is given here
        # theirs is a partial of Inductor's own step, with what that needs to know
        own = functools.partial(step, **kwargs["inner_compile"].keywords)
        return original(*args, **{**kwargs, **with_whole_products(own, {**patches, **kwargs["config_patches"]})})

    with _alone, mock.patch.object(module, "compile_fx", with_ours), checked():
        return str(aoti_compile_and_package(program, package_path=path, inductor_configs=dict(patches)))
