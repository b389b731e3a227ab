"""Inductor's compilation with its last step replaced (`torch._inductor.compile_fx`).

`inner_compile` receives functional, decomposed ATen graphs after Inductor's joint passes and before its post-grad
passes: the forward (or inference) graph, and in training the backward graph, later and outside of any `with` block of
the caller. The AOTAutograd cache is off because a hit would skip `inner_compile`, whose effect its key does not cover;
Inductor's own cache stays on, keyed on the graph that `inner_compile` hands to it, kernel sources included.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch._functorch.config
from torch.fx import GraphModule

from .. import decompositions
from . import joint_passes
from .attention_rewrite import checked
from .dependent_launch import passed_on
from .float_inputs import specialize_constant_floats
from .kernel_analysis import analysed_once

InnerCompile = Callable[..., Any]


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], inner_compile: InnerCompile, patches: Mapping[str, Any]
) -> Any:
    """Compiles a Dynamo graph as Inductor does, with `inner_compile` as the step that compiles ATen graphs."""
    from torch._inductor.compile_fx import compile_fx

    specialize_constant_floats(gm)
    with torch._functorch.config.patch(enable_autograd_cache=False), checked():
        # compile_fx puts the patches around inner_compile too, so they hold when the backward is compiled
        return compile_fx(gm, example_inputs, **with_whole_products(inner_compile, patches))


def with_whole_products(inner_compile: InnerCompile, patches: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `compile_fx` that leave matrix products as they are until `compile_aten`."""
    from torch._inductor import config

    with config.patch(dict(patches)):
        passes = joint_passes.around(config.joint_custom_pre_pass, config.joint_custom_post_pass)
        decomposed = decompositions.table()
        pads = config.shape_padding
    return {
        "inner_compile": functools.partial(inner_compile, pads=pads),
        "config_patches": {**patches, **passes, "shape_padding": False},
        "decompositions": decomposed,
    }


def compile_aten(gm: GraphModule, example_inputs: Sequence[Any], *, pads: bool = False, **context: Any) -> Any:
    """Inductor's own last step, on a graph whose matrix products are still whole; it `pads` those that this helps."""
    from torch._inductor.compile_fx import compile_fx_inner

    decompositions.finish(gm, pads=pads)
    # newer torch hands our table on as a local function, which would keep the graph out of Inductor's cache
    context.pop("get_decomp_fn", None)
    with passed_on(), analysed_once():
        return compile_fx_inner(gm, example_inputs, **context)


def run_eagerly(gm: GraphModule) -> Any:
    """`gm` as the result of an `inner_compile`: called with one list of arguments."""
    from torch._functorch._aot_autograd.utils import make_boxed_func

    return make_boxed_func(gm.forward)


def modes() -> dict[str, dict[str, Any]]:
    """Inductor's settings by mode of torch.compile."""
    import torch._inductor

    return torch._inductor.list_mode_options()


def settings() -> dict[str, Any]:
    """Inductor's settings and their values, nested ones as "triton.cudagraphs"."""
    from torch._inductor import config

    return dict(config.get_config_copy())
