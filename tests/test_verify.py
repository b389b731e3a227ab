"""Kernels that compute something else: refused where they are put in, found where they run beside the original."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from declared_patterns import declared, linear_cube, tensors

import fusion_compiler as fc
from fusion_compiler import kernels
from fusion_compiler.backend import fusion_compiler
from fusion_compiler.report import Report
from fusion_compiler.verify import WrongKernel

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_kernels", {})


def run(kernel: Kernel, *rows: int, dynamic: bool = False, **options: Any) -> tuple[list[torch.Tensor], Report]:
    """The results for inputs of so many rows, with `kernel` wherever a linear is cubed, and the report."""
    p = declared(linear_cube, *tensors((3, 8), (4, 8)))
    fc.register_kernel(p, kernel, cost=lambda machine, *_: 1e-9, name="mine")
    given = {"patterns": [p], "remainder": "eager", **options}
    compiled = torch.compile(linear_cube, backend=fusion_compiler, options=given, dynamic=dynamic or None)
    w = torch.randn(4, 8)
    inputs = [torch.randn(m, 8) for m in rows]
    results = [compiled(x, w) - linear_cube(x, w) for x in inputs]
    report = fc.last_report()
    assert report is not None
    return results, report


def off_by_a_little(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w) ** 3 * 1.01


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_wrong_kernel_is_found_and_named(remainder: str, dynamic: bool) -> None:
    options = {"remainder": remainder, "verify": True, "dynamic": dynamic}
    named = r"mine \(registered\) for linear_cube at .*: error 1.00e-02, more than rounding"
    with pytest.warns(WrongKernel, match=named):
        _, report = run(off_by_a_little, 5, 6 if dynamic else 5, **options)
    [decision] = report.fused
    assert decision.error is not None and 0.009 < decision.error < 0.011
    assert decision.verification.wrong and "WRONG" in str(report) and report.to_dict()["decisions"][0]["wrong"]
    torch._dynamo.reset()
    kernels._kernels.clear()
    with pytest.raises(Exception, match=named):
        run(off_by_a_little, 5, strict=True, **options)


@pytest.mark.parametrize("remainder", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_right_kernel_is_verified(remainder: str, dynamic: bool, recwarn: pytest.WarningsRecorder) -> None:
    options = {"remainder": remainder, "verify": True, "dynamic": dynamic, "strict": True}
    results, report = run(lambda x, w: (x @ w.T) ** 3, 5, 7 if dynamic else 5, **options)
    assert max(r.abs().max() for r in results) < 1e-4
    assert [d.error is not None and d.error < 1e-5 for d in report.fused] == [True]
    assert "verified: largest relative difference" in str(report)
    assert not [w for w in recwarn if issubclass(w.category, WrongKernel)]


def residual_norm(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + r
    return F.rms_norm(h, h.shape[-1:], eps=1e-5), h


@pytest.mark.parametrize(("wrong", "remainder"), [(0, "eager"), (1, "eager"), (None, "eager"), (1, "inductor")])
def test_each_of_several_results_is_verified(wrong: int | None, remainder: str) -> None:
    p = declared(residual_norm, *tensors((3, 8), (3, 8)))

    def kernel(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t * (1.01 if i == wrong else 1.0) for i, t in enumerate(residual_norm(x, r)))

    def block(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        y, h = residual_norm(x.sin(), r)
        return (h * 2).cumsum(-1) + y.cumsum(-1)

    fc.register_kernel(p, kernel, cost=lambda *_: 1e-9, name="mine")
    options = {"patterns": [p], "remainder": remainder, "verify": True, "disable": ["norm", "add_norm"]}
    fn = torch.compile(block, backend=fusion_compiler, options=options, dynamic=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", WrongKernel)
        for rows in (5, 7):
            x, r = tensors((rows, 8), (rows, 8))
            assert (fn(x, r) - block(x, r)).abs().max() < (1e-4 if wrong is None else 1.0)
    told = [str(w.message) for w in said if issubclass(w.category, WrongKernel)]
    assert len(told) == (0 if wrong is None else 2) and all("mine (registered) for residual_norm" in t for t in told)
    made = fc.last_report()
    assert made is not None
    [decision] = made.fused
    assert decision.error == pytest.approx(0.0 if wrong is None else 0.01, rel=0.05, abs=1e-5)
    assert decision.verification.wrong == (wrong is not None)


def test_other_strides_are_brought_into_the_old_layout() -> None:
    p = declared(linear_cube, *tensors((3, 8), (4, 8)))
    fc.register_kernel(p, lambda x, w: (w @ x.T).T ** 3, cost=lambda machine, *_: 1e-9, name="mine")
    x, w = tensors((5, 8), (4, 8))
    compiled = torch.compile(
        linear_cube, backend=fusion_compiler, options={"patterns": [p], "remainder": "eager", "strict": True}
    )
    result = compiled(x, w)
    torch.testing.assert_close(result, linear_cube(x, w))
    assert result.stride() == (4, 1)


WRONG_AT_OTHER_SIZES: dict[str, tuple[Kernel, str]] = {  # right on the pattern's example of three rows
    "dtype": (lambda x, w: (F.linear(x, w) ** 3).to(torch.float32 if len(x) == 3 else torch.float16), "float16"),
    "shape": (lambda x, w: (F.linear(x, w) ** 3)[:3], "returns"),
}


@pytest.mark.parametrize("case", WRONG_AT_OTHER_SIZES)
def test_what_does_not_fit_is_left_to_inductor(case: str) -> None:
    kernel, words = WRONG_AT_OTHER_SIZES[case]
    [difference], report = run(kernel, 5)
    assert difference.abs().max() < 1e-5 and not report.fused
    assert [f.stage for f in report.failures] == ["splice"] and words in report.failures[0].error


def test_a_kernel_that_scribbles_on_its_argument_does_so_on_a_copy() -> None:

    def scribbling(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        cube = F.linear(x, w) ** 3
        x.zero_()
        return cube

    p = declared(linear_cube, *tensors((3, 8), (4, 8)))
    fc.register_kernel(p, scribbling, cost=lambda machine, *_: 1e-9, name="mine")
    options = {"patterns": [p], "remainder": "eager", "strict": True}
    x, w = tensors((2, 8), (4, 8))
    kept = x.clone()
    result = torch.compile(linear_cube, backend=fusion_compiler, options=options)(x, w)
    torch.testing.assert_close(result, linear_cube(kept, w))
    assert torch.equal(x, kept)


@torch.library.custom_op("fusion_compiler_tests::liar", mutates_args=())
def liar(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, w) ** 3).double()


liar.register_fake(lambda x, w: x.new_empty(len(x), len(w)))


def test_an_operator_that_returns_another_dtype_than_it_promises() -> None:
    with pytest.warns(WrongKernel, match="error inf"):
        _, report = run(liar, 5, verify=True)
    assert report.fused[0].error == float("inf")
