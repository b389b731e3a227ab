"""Exported programs, compiled ahead of time with the fused kernels inside."""

import copy

import pytest
import torch
from model_runs import STARVED

import fusion_compiler as fc


class Block(torch.nn.Module):
    """Causal attention between two linears, the mask computed in the graph."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 2, 16).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(s, s, dtype=torch.bool).triu(1)
        p = (q @ k.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1)
        return self.out((p @ v).transpose(1, 2).reshape(b, s, 32))


def exported(x):
    block = Block().eval()
    with torch.no_grad():
        return block, torch.export.export(block, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}})


def test_a_package_holds_the_fused_kernels_and_serves_all_sizes(tmp_path):
    block, program = exported(torch.randn(3, 64, 32))
    path = fc.aoti_compile_and_package(
        program, package_path=tmp_path / "block.pt2", options={"strict": True, **STARVED}
    )
    (decision,) = fc.last_report().fused
    assert decision.pattern == "attention" and "flash_attention_for_cpu" in decision.kernel
    assert path == str(tmp_path / "block.pt2")
    loaded = torch._inductor.aoti_load_package(path)
    for batch in (1, 3, 7):
        x = torch.randn(batch, 64, 32)
        with torch.no_grad():
            eager, exact = block(x), copy.deepcopy(block).double()(x.double())
        assert (loaded(x) - exact).norm() <= 1.5 * (eager - exact).norm()


def test_what_cannot_be_packaged_is_refused(tmp_path):
    _, program = exported(torch.randn(3, 8, 32))
    with pytest.raises(TypeError, match=r"torch.export.export returns, and this is Block"):
        fc.aoti_compile_and_package(Block())
    with pytest.raises(ValueError, match=r"ends in \.pt2, and .*block\.so' does not"):
        fc.aoti_compile_and_package(program, package_path=tmp_path / "block.so")
    for option in ("verify", "autotune"):
        with pytest.raises(ValueError, match=f"{option}=True .*nothing runs while a package is made"):
            fc.aoti_compile_and_package(program, options={option: True})
    with pytest.raises(ValueError, match="a package has none"):
        fc.aoti_compile_and_package(program, options={"remainder": "eager"})
    with pytest.raises(ValueError, match="machin"):
        fc.aoti_compile_and_package(program, options={"machin": "h200"})


def test_torch_compiles_as_ever_after_a_failure(monkeypatch):
    from torch._inductor import compile_fx

    def failing(*args, **context):
        raise RuntimeError("on purpose")

    original = compile_fx.compile_fx
    monkeypatch.setattr(fc.backend, "compile_step", failing)
    _, program = exported(torch.randn(3, 8, 32))
    with pytest.raises(RuntimeError, match="on purpose"):
        fc.aoti_compile_and_package(program)
    assert compile_fx.compile_fx is original
