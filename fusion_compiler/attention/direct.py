"""Attention that is called by name and not found in a graph: sequences of any lengths, packed one behind the other.

`varlen_attention` runs a generated kernel on a GPU, under torch.compile as a node of the graph, and plain PyTorch
elsewhere. It is for inference: nothing flows back through it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import registry


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention within each of several sequences that lie one behind the other: [total_q, heads, v_dim], dtype of q.

    q:            [total_q, heads, dim]
    k, v:         [total_k, kv_heads, dim] and [total_k, kv_heads, v_dim]; query head h reads key head
                  h // (heads / kv_heads)
    cu_seqlens_q: [sequences + 1], int32 or int64: sequence s has the queries from cu_seqlens_q[s] up to
                  cu_seqlens_q[s + 1]; the first is 0
    cu_seqlens_k: the same of keys; where a sequence has fewer queries than keys, as while decoding, its queries are
                  the last ones
    causal:       a query sees the keys up to its own place, counted from the end of its sequence
    window:       of these it sees the last so many
    softcap:      scores become softcap · tanh(score / softcap)
    scale:        of q · k; None: dim ** -0.5

    A query that sees no key gives 0. Raises ValueError where shapes, dtypes or devices do not fit together.
    """
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale)
    return out


@torch.library.triton_op("fusion_compiler::varlen_attention", mutates_args=())
def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    if q.is_cuda:
        kernel = registry.direct_kernel("varlen_attention")
        done = kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale)
        if isinstance(done, Tensor):
            return done
        warnings.warn(f"varlen_attention has no kernel here and writes all scores out: {done}", stacklevel=2)
    return reference(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap, scale)


def reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, window: int | None,
    softcap: float | None, scale: float,
) -> Tensor:  # fmt: skip
    """What `varlen_attention` computes, in plain PyTorch with scores of [heads, total_q, total_k]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=0) if group > 1 else t for t in (k, v))
    rows, keys = (torch.arange(t.shape[1], device=q.device) for t in (q, k))
    of_row = torch.searchsorted(cu_seqlens_q.long(), rows, right=True)
    of_key = torch.searchsorted(cu_seqlens_k.long(), keys, right=True)
    # the numbers count sequences from 1: these are the ends of each row's
    own = rows + (cu_seqlens_k - cu_seqlens_q)[of_row]
    seen = of_row[:, None] == of_key[None, :]
    if causal:
        seen = seen & (keys <= own[:, None])
    if window is not None:
        seen = seen & (keys > own[:, None] - window)
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~seen, float("-inf"))
    weights = torch.ops.aten._safe_softmax(scores, -1)  # zeros where nothing is seen
    out: Tensor = weights.to(v.dtype) @ v
    return out.transpose(0, 1).contiguous()


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, window: int | None,
    softcap: float | None,
) -> None:  # fmt: skip
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError(f"q, k and v are [total, heads, dim]; here they have {q.dim()}, {k.dim()} and {v.dim()} sizes")
    if k.shape[:2] != v.shape[:2] or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "k must have the width of q, v the tokens and heads of k, and q a multiple of these heads; q, k and v are "
            f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must be of one floating-point dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} must be int32 or int64 [sequences + 1], not {lengths.dtype} {list(lengths.shape)}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        told = cu_seqlens_q.shape[0] - 1, cu_seqlens_k.shape[0] - 1
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k tell of {told[0]} and {told[1]} sequences")
    devices = {str(t.device) for t in (q, k, v, cu_seqlens_q, cu_seqlens_k)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not {', '.join(sorted(devices))}")
    if window is not None and (not causal or window < 1):
        raise ValueError(
            f"a window counts keys up to the query's own place: it needs causal=True and 1 or more, not {window}"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
