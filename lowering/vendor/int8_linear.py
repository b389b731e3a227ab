"""Linears with weights of 8 bits and a scale per output feature, on CPUs: ATen's own kernel, which reads the codes.

What it takes is narrow: bfloat16 activations, the codes as a tensor of int8 [N, K], one scale per feature behind the
product. In float32 it errs twice as much as eager does, and for codes of 4 bits ATen wants an order of its own, which
would be a second copy of the weight.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.fx import Node

from fusion_compiler.candidates import Candidate, Unavailable
from fusion_compiler.cost.amounts import amount, maximum
from fusion_compiler.cost.roofline import matmul_traffic
from fusion_compiler.fused import FusedOp, MatmulFamily, Site
from fusion_compiler.machine import Machine
from fusion_compiler.splice import Builder

aten = torch.ops.aten
MOST_ROWS = 64  # measured up to here: 3.4 to 6 times as fast as Inductor on 2 cores, 2048²
MEMORY, COMPUTE = 0.5, 0.25  # of the machine's rates; it was never below
CURE = "store it as floats, once (fc.ggml.dequantise(model) does so for the linears of fc.ggml)"


class Int8Linear:
    """`aten._weight_int8pack_mm`."""

    name = "vendor.int8_linear"

    def candidates(self, op: FusedOp, machine: Machine) -> list[Candidate] | Unavailable:
        if not isinstance(op, MatmulFamily) or not op.packed or machine.kind != "cpu":
            return []
        refusal = _refusal(op)
        if refusal is not None:
            return Unavailable(refusal)
        traffic = matmul_traffic(op)
        moved = (traffic.bytes_read + traffic.bytes_written) / (MEMORY * machine.memory_bandwidth)
        seconds = maximum(traffic.flops / (COMPUTE * machine.rate(op.dtype)), moved) + machine.launch_overhead
        kernel = str(aten._weight_int8pack_mm.default)
        return [Candidate(self.name, kernel, traffic, seconds, partial(_emit, op))]


def _refusal(op: MatmulFamily) -> str | None:
    packed, m = op.packed[0], amount(op.m)
    if packed.order != "bytes" or packed.float8 or packed.scale is not None or packed.zero != 0:
        return (
            f"no ATen kernel for CPUs reads these codes as they lie, so the weight is dequantised at each call; {CURE}"
        )
    if op.dtype != torch.bfloat16 or op.out_dtype != torch.bfloat16:
        return (
            f"ATen's kernel for 8-bit weights is as exact as eager in bfloat16 only, and this is {op.dtype}, so the "
            f"weight is dequantised at each call; cast to bfloat16, or {CURE}"
        )
    if not isinstance(m, int) or m > MOST_ROWS:
        return f"M = {m}: ATen's kernel for 8-bit weights is used for up to {MOST_ROWS} rows"
    leaves = sorted(v.op for v in op.epilogue.args)
    scaled = op.weights == 1 and op.epilogue.op == "mul" and leaves == ["acc", "extra"]
    if not scaled or op.extras[0].kind != "col" or op.extras[0].first or op.extras[0].dtype != op.dtype:
        return "ATen's kernel for 8-bit weights multiplies with a scale per output feature and does nothing else"
    if packed.first or packed.row != op.k:
        return "the codes of a row do not follow those of the row before; make them contiguous"
    return None


def _emit(op: MatmulFamily, builder: Builder, site: Site) -> Node:
    x, codes, scales = site.operands
    if codes.meta["val"].dtype != torch.int8:
        codes = builder.call(aten.view.dtype, codes, torch.int8)
    arguments: list[Any] = [
        builder.contiguous(builder.reshape(node, shape))
        for node, shape in ((x, (op.m, op.k)), (codes, (op.n, op.k)), (scales, (op.n,)))
    ]
    product = builder.call(aten._weight_int8pack_mm.default, *arguments)
    return builder.reshape(product, list(site.output.meta["val"].shape))
