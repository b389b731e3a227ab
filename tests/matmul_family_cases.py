"""Matmul families that the tests of the generated kernels share, with eager's formula for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fusion_compiler.algebra import Algebra, Value
from fusion_compiler.fused import Extra, MatmulFamily, RowNorm
from fusion_compiler.lowering.triton_codegen.aot import constexprs
from fusion_compiler.lowering.triton_codegen.footprint import sums_left
from fusion_compiler.lowering.triton_codegen.plans import Plan
from fusion_compiler.lowering.triton_codegen.source import facts, write
from fusion_compiler.splice import load_kernel

A = Algebra()
Products = list[torch.Tensor]


def acc(index: int) -> Value:
    return A.make("acc", index=index)


def extra(index: int) -> Value:
    return A.make("extra", index=index)


RMS = RowNorm("rms", 1e-5, has_weight=True)
GEMMA = RowNorm("rms", 1e-6, has_weight=True, offset=1.0)
RMS_PLAIN = RowNorm("rms", 1e-5, has_weight=False)
LAYER = RowNorm("layer", 1e-5, has_weight=True, has_bias=True)
LAYER_PLAIN = RowNorm("layer", 1e-5, has_weight=False)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """An epilogue as the compiler has it, and as eager computes it from the products and extras."""

    value: Value
    weights: int
    kinds: tuple[str, ...]
    eager: Callable[[Products, Products], torch.Tensor]


PLAIN = Epilogue(acc(0), 1, (), lambda p, e: p[0])
BIAS = Epilogue(A.add(acc(0), extra(0)), 1, ("col",), lambda p, e: p[0] + e[0])
SWIGLU = Epilogue(A.mul(A.unary("silu", acc(0)), acc(1)), 2, (), lambda p, e: F.silu(p[0]) * p[1])
GEGLU_RESIDUAL = Epilogue(
    A.add(A.mul(A.unary("gelu_tanh", A.add(acc(0), extra(0))), A.add(acc(1), extra(1))), extra(2)),
    2,
    ("col", "col", "full"),
    lambda p, e: F.gelu(p[0] + e[0], approximate="tanh") * (p[1] + e[1]) + e[2],
)
SCALED = Epilogue(
    A.mul(A.unary("gelu_erf", A.mul(acc(0), extra(0))), extra(1)),
    1,
    ("row", "scalar"),
    lambda p, e: F.gelu(p[0] * e[0][:, None]) * e[1],
)


def family(
    m: int, k: int, n: int, norm: RowNorm | None, epilogue: Epilogue, dtype: torch.dtype, **further: object
) -> MatmulFamily:
    extras = tuple(Extra(kind, dtype) for kind in epilogue.kinds)  # type: ignore[arg-type]
    return MatmulFamily(m, k, n, epilogue.weights, norm, epilogue.value, extras, dtype, dtype, **further)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Operands:
    """Random operands of a family; `mean` shifts x."""

    op: MatmulFamily
    x: torch.Tensor
    norm: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    extras: tuple[torch.Tensor, ...]

    @staticmethod
    def random(op: MatmulFamily, *, mean: float = 0.0, scale: float = 1.0) -> Operands:
        m, k, n = int(op.m), int(op.k), int(op.n)
        norm: tuple[torch.Tensor, ...] = ()
        if op.norm and op.norm.has_weight:
            norm = ((1 - op.norm.offset + 0.2 * torch.randn(k)).to(op.dtype),)
        if op.norm and op.norm.has_bias:
            norm = (*norm, (0.2 * torch.randn(k)).to(op.dtype))
        shapes = {"full": (m, n), "col": (n,), "row": (m,), "scalar": ()}
        shape = (k, n) if op.weight_is_kn else (n, k)
        weights = tuple((torch.randn(shape) / k**0.5).to(op.dtype) for _ in range(op.weights))
        extras = tuple(torch.randn(shapes[e.kind]).to(e.dtype) for e in op.extras)
        return Operands(op, (scale * (torch.randn(m, k) + mean)).to(op.dtype), norm, weights, extras)

    def flat(self) -> tuple[torch.Tensor, ...]:
        """In the order of a site's operands."""
        return (self.x, *self.norm, *self.weights, *self.extras)

    def eager(self, epilogue: Epilogue, dtype: torch.dtype) -> torch.Tensor:
        """What eager computes with everything cast to `dtype` first."""
        x, *norm = (t.to(dtype) for t in (self.x, *self.norm))
        rule = self.op.norm
        if rule and rule.kind == "layer":
            g, b = [*norm, None, None][:2]
            x = F.layer_norm(x, x.shape[-1:], g, b, rule.eps)
        elif rule:
            wide = x if dtype == torch.float64 else x.float()
            x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + rule.eps)).to(dtype)
            x = x * (norm[0] + rule.offset) if norm else x
        products = [x @ (w if self.op.weight_is_kn else w.T).to(dtype) for w in self.weights]
        return epilogue.eager(products, [e.to(dtype) for e in self.extras]).to(dtype)


def run(operands: Operands, plan: Plan, *, runtime_m: bool = False) -> torch.Tensor:
    """The generated kernel in Triton's interpreter."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    op = operands.op
    known = facts(op, plan)
    source = write(op, plan, dataclasses.replace(known, m=None) if runtime_m else known)
    out = torch.full((int(op.m), int(op.n)), float("nan"), dtype=op.out_dtype)
    workspace: tuple[torch.Tensor, ...] = ()
    if held := sums_left(op, plan):
        workspace = torch.full((held,), float("nan")), torch.zeros(int(op.n), dtype=torch.int32)
    arguments: dict[str, object] = dict(zip(source.tensors, (*operands.flat(), *workspace, out), strict=True))
    arguments |= {name: TensorDescriptor.from_tensor(arguments[name], list(block)) for name, block in source.blocks}
    if runtime_m:
        arguments["M"] = op.m
    grid = (plan.programs(int(op.m), int(op.n)),)
    load_kernel(source.text, source.name)[grid](
        **arguments, **constexprs(op, plan, w_stride=operands.weights[0].stride(0))
    )
    assert not workspace or not workspace[1].any(), "the next kernel counts in these zeros"
    return out


def assert_as_good_as_eager(out: torch.Tensor, operands: Operands, epilogue: Epilogue) -> None:
    reference = operands.eager(epilogue, torch.float64)
    eager = operands.eager(epilogue, operands.op.dtype)
    ours, own = ((t.double() - reference).norm() / reference.norm() for t in (out, eager))
    assert ours <= 1.5 * own, f"error {ours:.2e}, eager's own {own:.2e}"
