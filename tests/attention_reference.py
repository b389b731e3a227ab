"""What a recognised attention says it computes, in float64 from the operands that eager computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fusion_compiler.fused import Attention, Layout, Mask, Site


def arranged(x: Tensor, layout: Layout) -> Tensor:
    split, merged, shape = ([int(n) for n in sizes] for sizes in (layout.split, layout.merged, layout.shape))
    return x.reshape(split).permute(layout.order).reshape(merged).expand(shape)


def attend(op: Attention, site: Site, values: dict[Node, Any]) -> Tensor:
    """The result in the shape of the site's output. Without a tensor of the mask, what is proved of it is used."""
    held = [values[n] for n in site.operands]
    q, k, v = (arranged(held.pop(0).double(), layout) for layout in op.layouts[:3])
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    tensor = arranged(held.pop(0), op.layouts[3]) if op.mask.tensor != "none" else None
    position = held.pop(0).item() if op.mask.position else 0
    lengths = held.pop(0) if op.mask.padding is not None else None
    del held[: len(op.modification.reads) if op.modification is not None else 0]  # says the same as the tensor
    s = op.scale * (q @ k.mT)
    if op.scale_operand:
        factor = held.pop(0).double()
        factor = factor.reshape(()) if op.scale_layout is None else arranged(factor, op.scale_layout)
        s = s / factor if op.scale_divides else s * factor
    assert not held, "the site has more operands than the op documents"
    if op.softcap is not None:
        s = op.softcap * torch.tanh(s / op.softcap)
    if op.mask.kind != "tensor":
        s = s.masked_fill(~visible(op.mask, s, position, lengths), -torch.inf)
    elif tensor is not None and op.mask.tensor == "additive":
        s = s + tensor
    elif tensor is not None:
        s = s.masked_fill(tensor if op.mask.tensor == "hidden" else ~tensor, -torch.inf)
    return arranged(s.softmax(-1) @ v, op.out)


def visible(mask: Mask, scores: Tensor, position: int, lengths: Tensor | None) -> Tensor:
    """Which keys each query sees [B or 1, 1, Lq, Lk], by the definition of `Mask`."""
    queries, keys = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])[None]
    if mask.kind == "none":
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    newest = queries * (mask.kind == "causal") + int(mask.offset) + position
    seen = keys <= newest
    if mask.window is not None:
        seen = seen & (keys > newest - mask.window)
    if mask.chunk is not None:
        seen = seen & (keys // mask.chunk == newest // mask.chunk)
    if lengths is None:
        return seen[None, None]
    return seen[None, None] & (keys < lengths.reshape(-1, 1, 1, 1) + mask.padding)
