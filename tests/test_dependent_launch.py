"""Kernels that start before the last one has ended."""

from __future__ import annotations

import dataclasses
import re
import types
from typing import Any

import ahead_of_time
import pytest
import torch
from matmul_family_cases import RMS, acc
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compiler import dependent_launch, splice
from fusion_compiler.lowering.triton_codegen import predict
from fusion_compiler.lowering.triton_codegen.source import facts, write
from fusion_compiler.machine import TABLE
from fusion_compiler.torch_private.source_files import source_of

SOURCE = """import triton
import triton.language as tl


@triton.jit
def helper(x):
    return x + 1


@triton.jit
def double(
    x,
    out,
    N: tl.constexpr,
):
    n = tl.arange(0, N)
    tl.store(out + n, 2 * tl.load(x + n))
"""


def test_the_wait_stands_at_the_head_of_the_named_kernel() -> None:
    lines = dependent_launch.with_wait(SOURCE, "double", ["x", "out"]).split("\n")
    head = lines.index("):") + 1
    assert "griddepcontrol.wait" in lines[head]
    assert lines[head + 1 : head + 3] == ["    x += waited", "    out += waited"]
    assert [line for i, line in enumerate(lines) if not head <= i < head + 3] == SOURCE.split("\n")


def test_every_tensor_of_a_generated_kernel_is_behind_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(dependent_launch, "supported", lambda device: True)
    monkeypatch.setattr(
        splice.kernel_nodes, "kernel_node_arguments", lambda kernel, *rest: launched.append(kernel) or {"x": 1}
    )
    monkeypatch.setattr(splice.kernel_nodes, "KERNEL_NODE", lambda x: {"out": torch.empty(4)})

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    gm = make_fx(f, tracing_mode="fake")(torch.ones(4))
    builder = splice.Builder(gm, next(n for n in gm.graph.nodes if n.op == "output"), next(iter(gm.graph.nodes)))
    x = next(iter(gm.graph.nodes))
    out = builder.empty([4], torch.float32, torch.device("cpu"))
    builder.triton(splice.load_kernel(SOURCE, "double"), [1], {"x": x, "out": out, "N": 4}, ["out"])
    source = source_of(launched[0].fn.fn)
    assert source == dependent_launch.with_wait(SOURCE, "double", ["x", "out"])


def test_a_kernel_of_somebody_else_is_launched_as_ever() -> None:
    theirs = types.SimpleNamespace(fn=test_no_kernel_waits_where_the_device_cannot, __name__="theirs")
    assert dependent_launch.waiting(theirs, ["x"]) is theirs


def test_no_kernel_waits_where_the_device_cannot() -> None:
    assert not dependent_launch.supported(torch.device("cpu"))
    assert not dependent_launch.supported(torch.device("cuda"))  # the interpreter, in these tests


@pytest.mark.parametrize(("source", "launched"), [(SOURCE, False), ("waiting", True)])
def test_inductor_launches_early_what_waits_and_nothing_else(source: str, launched: bool) -> None:
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    from fusion_compiler.torch_private.dependent_launch import passed_on

    if launched:
        source = dependent_launch.with_wait(SOURCE, "double", ["x", "out"])
    body = f"async_compile.triton('double', '''\n    triton_meta={{'signature': 1}},\n{source}''')"
    written: list[Any] = []
    wrapper = types.SimpleNamespace(writeline=written.append)
    with passed_on():
        PythonWrapperCodegen.define_kernel(wrapper, "double_0", body)  # type: ignore[arg-type]
    assert ("'launch_pdl': True" in written[0].kernel_body) is launched
    PythonWrapperCodegen.define_kernel(wrapper, "double_0", body)  # type: ignore[arg-type]
    assert "launch_pdl" not in written[1].kernel_body


def test_inductor_writes_the_settings_of_a_kernel_where_we_look_for_them() -> None:
    import inspect

    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    assert "triton_meta={" in inspect.getsource(PythonWrapperCodegen.define_user_defined_triton_kernel)
    assert '"launch_pdl": compile_meta.get("launch_pdl"' in inspect.getsource(CachingAutotuner._create_compile_options)


def test_nothing_is_read_before_the_wait_and_loads_stay_as_wide() -> None:
    found = ahead_of_time.compile_all("test_dependent_launch")
    assert {kernel["kind"] for kernel in found} == {"gemv", "swap", "sliced", "tile"}
    for kernel in found:
        assert kernel["wait"] < kernel["first access"], kernel
        assert kernel["wide loads"][0] == kernel["wide loads"][1], kernel
        assert kernel["spills"] == 0, kernel


def compile_all() -> list[dict[str, Any]]:
    """In a process of its own: interpreted kernels cannot be compiled."""
    from triton.backends.compiler import GPUTarget

    from fusion_compiler.fused import MatmulFamily
    from fusion_compiler.lowering.triton_codegen.aot import compile_kernel, resources

    normed = MatmulFamily(1, 2048, 2048, 1, RMS, acc(0), (), torch.bfloat16, torch.bfloat16)
    plain = dataclasses.replace(normed, m=16, norm=None)
    kinds = {"gemv": normed, "swap": dataclasses.replace(normed, m=16), "sliced": plain}
    kinds["tile"] = dataclasses.replace(normed, m=64)
    found = []
    for kind, op in kinds.items():
        plan = next(p for p in predict.plans(op, TABLE["h200"], int(op.m)) if p.kind == kind)
        source = write(op, plan, facts(op, plan))
        described = dict(source.blocks)
        pointers = [name for name in source.tensors if name not in described]
        text = dependent_launch.with_wait(source.text, source.name, pointers, described)
        made = [
            compile_kernel(op, plan, dataclasses.replace(source, text=t), GPUTarget("cuda", 90, 32))
            for t in (source.text, text)
        ]
        ptx = made[1].asm["ptx"]
        access = re.search(r"\n[^\n]*(ld\.global|st\.global|cp\.async\.c|cp\.async\.bulk\.tensor)", ptx)
        assert access is not None
        found.append({
            "kind": kind, "wait": ptx.find("griddepcontrol.wait") % len(ptx), "first access": access.start(),
            "wide loads": [len(re.findall(r"\.v4\.|cp\.async\.(cg|bulk\.tensor)", m.asm["ptx"])) for m in made],
            "spills": resources(made[1]).spills,
        })  # fmt: skip
    return found
