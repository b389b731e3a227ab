"""Inductor's padding of matrix products (`torch._inductor.fx_passes.pad_mm`), one product at a time.

Where sizes do not fit the matrix units, and padded operands were faster when Inductor tried both, a product becomes
pad, product and slice. Inductor does so in its joint passes, before anybody could recognise a linear or an attention
in what is left. Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def padded(node: Node) -> Callable[..., Any] | None:
    """What computes the product `node` of its arguments with padding, or None where Inductor leaves it as it is."""
    from torch._inductor import config
    from torch._inductor.fx_passes import pad_mm

    ways: dict[Any, tuple[Any, tuple[str, ...], Callable[..., Any]]] = {
        aten.mm.default: (aten.mm, ("mat1", "mat2"), pad_mm.mm_replace),
        aten.bmm.default: (aten.bmm, ("mat1", "mat2"), pad_mm.bmm_replace),
        aten.addmm.default: (aten.addmm, ("input", "mat1", "mat2"), pad_mm.addmm_replace),
    }
    if node.target not in ways:
        return None
    op, names, replacement = ways[node.target]
    match: Any = SimpleNamespace(kwargs=dict(zip(names, node.args, strict=True)))  # all it looks at: nodes by name
    values = {name: operand.meta["val"] for name, operand in match.kwargs.items()}
    with config.patch(shape_padding=True):
        pays = pad_mm.should_pad(match, values["mat1"], values["mat2"], op, values.get("input"))
    return replacement if pays else None
