"""Nodes added by the Builder, kernels spliced as Inductor's own kernel nodes, and the checks of `fit`."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch.fx import GraphModule, Node

from fusion_compiler.fused import Site
from fusion_compiler.layout import fit
from fusion_compiler.splice import Builder, SpliceError, clean, load_kernel, replace
from fusion_compiler.torch_private import kernel_nodes

aten = torch.ops.aten
Trace = Callable[..., GraphModule]

AXPY = """
import triton
import triton.language as tl

@triton.jit
def axpy(x_ptr, y_ptr, out_ptr, n, alpha, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside).to(DTYPE)
    y = tl.load(y_ptr + offsets, mask=inside).to(DTYPE)
    tl.store(out_ptr + offsets, alpha * x + y, mask=inside)
"""


def node(gm: GraphModule, target: object) -> Node:
    return next(n for n in gm.graph.nodes if n.target is target)


def site(output: Node, *operands: Node) -> Site:
    return Site(operands=operands, output=output, interior=(output,))


def splice_axpy(gm: GraphModule, num_warps: int = 4) -> None:
    """Replaces 2·x + y by the kernel above."""
    out = node(gm, aten.add.Tensor)
    x, y = [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], torch.Tensor)]
    builder = Builder(gm, out)
    flat = builder.reshape(x, [-1])
    n = builder.size(flat, 0)
    buffer = builder.empty(x.meta["val"].shape, torch.float32, torch.device("cpu"))
    arguments = {"x_ptr": x, "y_ptr": y, "out_ptr": buffer, "n": n, "alpha": 2.0, "BLOCK": 64, "DTYPE": torch.float32}
    result = builder.triton(
        load_kernel(AXPY, "axpy"), [builder.ceil_div(n, 64)], arguments, ["out_ptr"],
        num_warps=num_warps,
    )  # fmt: skip
    replace(site(out, x, y), fit(builder, site(out, x, y), result["out_ptr"]))
    clean(gm)


@pytest.mark.parametrize("dynamic", [False, True])
def test_spliced_kernel_computes_what_it_replaces(trace: Trace, dynamic: bool) -> None:
    x, y = torch.randn(5, 40), torch.randn(5, 40)
    gm = trace(lambda x, y: x * 2 + y, x, y, dynamic=dynamic)
    splice_axpy(gm)
    assert node(gm, kernel_nodes.KERNEL_NODE)
    assert not [n for n in gm.graph.nodes if n.target in (aten.mul.Tensor, aten.add.Tensor)]
    torch.testing.assert_close(gm(x, y), x * 2 + y, rtol=0, atol=0)
    if dynamic:
        x, y = torch.randn(7, 33), torch.randn(7, 33)
        torch.testing.assert_close(gm(x, y), x * 2 + y, rtol=0, atol=0)


def test_inductor_drops_the_clone_of_a_fresh_output(trace: Trace) -> None:
    from torch._inductor.fx_passes.post_grad import decompose_triton_kernel_wrapper_functional
    from torch._inductor.fx_passes.reinplace import reinplace_inplaceable_ops
    from torch._inductor.fx_utils import FakeTensorUpdater
    from torch._inductor.virtualized import V

    gm = trace(lambda x, y: x * 2 + y, torch.randn(5, 40), torch.randn(5, 40))
    splice_axpy(gm)
    with V.set_fake_mode(Builder(gm, node(gm, kernel_nodes.KERNEL_NODE)).fake_mode):
        owner = gm.graph if torch.__version__ < "2.12" else gm
        reinplace_inplaceable_ops(FakeTensorUpdater(owner), gm.graph)
        decompose_triton_kernel_wrapper_functional(gm.graph)
    targets = [n.target for n in gm.graph.nodes]
    assert torch.ops.higher_order.triton_kernel_wrapper_mutation in targets
    assert aten.clone.default not in targets and aten.as_strided.default not in targets


def test_launch_parameters_reach_inductor(trace: Trace) -> None:
    kernel = load_kernel(AXPY, "axpy")
    two, eight = kernel_nodes.configured(kernel, 2, 3), kernel_nodes.configured(kernel, 8, 1)
    assert (two.configs[0].num_warps, eight.configs[0].num_warps, eight.configs[0].num_stages) == (2, 8, 1)
    assert two is kernel_nodes.configured(kernel, 2, 3)
    assert two.fn.fn is not eight.fn.fn, "Inductor would take them for one kernel"


def cache_key(gm: GraphModule) -> str:
    from torch._inductor.codecache import FxGraphCachePickler, FxGraphHashDetails

    details = FxGraphHashDetails(gm, [], {}, [])
    return FxGraphCachePickler(gm, True).get_hash(details)


def test_cache_key_depends_on_source_constants_and_launch_parameters(trace: Trace) -> None:
    import triton

    keys = []
    for source, warps in [(AXPY, 4), (AXPY, 4), (AXPY, 8), (AXPY.replace("alpha * x", "x * alpha"), 4)]:
        gm = trace(lambda x, y: x * 2 + y, torch.randn(5, 40), torch.randn(5, 40))
        autotuner = kernel_nodes.configured.__wrapped__(load_kernel(source, "axpy"), warps, 3)
        # the interpreter's stand-in has no source to hash: take the function the compiler would see
        autotuner.fn = triton.runtime.jit.JITFunction(autotuner.fn.fn)
        out = node(gm, aten.add.Tensor)
        builder = Builder(gm, out)
        empty = builder.empty([5, 40], torch.float32, torch.device("cpu"))
        arguments = kernel_nodes.kernel_node_arguments(autotuner, (4,), {"out_ptr": empty}, {"BLOCK": 64}, ["out_ptr"])
        builder.call(kernel_nodes.KERNEL_NODE, **arguments)
        gm.recompile()
        keys.append(cache_key(gm))
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_reshape_is_free_where_the_shape_is_the_same(trace: Trace) -> None:
    gm = trace(lambda x: x + 1, torch.randn(4, 6), dynamic=True)
    x = node(gm, aten.add.Tensor).args[0]
    assert isinstance(x, Node)
    builder = Builder(gm, node(gm, aten.add.Tensor))
    rows, columns = builder.size(x, 0), builder.size(x, 1)
    assert builder.reshape(x, x.meta["val"].shape) is x
    assert builder.reshape(x, [rows, columns]) is x
    assert builder.reshape(x, [-1]) is not x
    flat = builder.reshape(x, [builder.call(operator.mul, rows, columns)])
    assert flat.meta["val"].dim() == 1


def test_provenance_is_that_of_the_replaced_node(trace: Trace) -> None:
    gm = trace(lambda x: (x + 1) * 2, torch.randn(4))
    out = node(gm, aten.mul.Tensor)
    out.meta["stack_trace"] = "the user's line"
    assert Builder(gm, out).call(aten.neg.default, out.args[0]).meta["stack_trace"] == "the user's line"


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        (lambda b, x: b.call(aten.sum.dim_IntList, x, [0]), "shape"),
        (lambda b, x: b.call(aten.gt.Scalar, x, 0.0), "dtype"),
        (lambda b, x: b.call(aten.expand.default, b.call(aten.select.int, x, 0, 0), [4, 6]), None),
    ],
)
def test_a_replacement_of_another_shape_or_dtype_is_refused(
    trace: Trace, replacement: Callable[..., Node], message: str | None
) -> None:
    gm = trace(lambda x: x + 1, torch.randn(4, 6))
    out = node(gm, aten.add.Tensor)
    (x,) = [n for n in gm.graph.nodes if n.op == "placeholder"]
    builder = Builder(gm, out)
    new = replacement(builder, x)
    if message is None:  # other strides only: copied into the old layout
        assert fit(builder, site(out, x), new).meta["val"].stride() == out.meta["val"].stride()
    else:
        with pytest.raises(SpliceError, match=message):
            fit(builder, site(out, x), new)


def test_replacement_takes_the_layout_of_the_original(trace: Trace) -> None:
    x = torch.randn(3, 5, 4).permute(1, 2, 0)
    gm = trace(lambda x: x + 1, x)
    out = node(gm, aten.add.Tensor)
    builder = Builder(gm, out)
    contiguous = builder.contiguous(builder.call(aten.add.Tensor, out.args[0], 1))
    assert contiguous.meta["val"].stride() != out.meta["val"].stride()
    replace(site(out, out.args[0]), fit(builder, site(out, out.args[0]), contiguous))
    clean(gm)
    assert gm(x).stride() == (x + 1).stride()
    torch.testing.assert_close(gm(x), x + 1, rtol=0, atol=0)


def test_mutations_survive_cleaning(trace: Trace) -> None:
    def fn(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        dead = x * 3  # noqa: F841
        aten.copy_.default(cache, x * 2)
        return x + 1

    gm = trace(fn, torch.zeros(4), torch.randn(4))
    clean(gm)
    cache, x = torch.zeros(4), torch.randn(4)
    gm(cache, x)
    assert torch.equal(cache, x * 2)
    assert len([n for n in gm.graph.nodes if n.target is aten.mul.Tensor]) == 1


def test_unknown_and_missing_kernel_arguments_are_named(trace: Trace) -> None:
    gm = trace(lambda x: x + 1, torch.randn(4))
    builder = Builder(gm, node(gm, aten.add.Tensor))
    with pytest.raises(SpliceError, match=r"missing arguments \['BLOCK'.*unknown arguments \['size'\]"):
        builder.triton(load_kernel(AXPY, "axpy"), [1], {"size": 3, "x_ptr": 1}, ["out_ptr"])
    with pytest.raises(SpliceError, match="no kernel named 'gemm'"):
        load_kernel(AXPY, "gemm")


def transposed_sum(x: torch.Tensor) -> torch.Tensor:
    """Replaced below by a kernel that writes its rows where the columns were."""
    y = x + 1
    return y.transpose(1, 2).contiguous().view(y.shape[0], -1) * 2


def test_a_copy_that_the_new_layout_makes_needless_is_none(trace: Trace) -> None:
    x = torch.randn(2, 3, 4)
    gm = trace(transposed_sum, x)
    out = node(gm, aten.add.Tensor)
    builder = Builder(gm, out)
    swapped = builder.contiguous(builder.call(aten.transpose.int, out.args[0], 1, 2))
    new = builder.call(aten.transpose.int, builder.call(aten.add.Tensor, swapped, 1), 1, 2)
    assert new.meta["val"].stride() != out.meta["val"].stride()
    assert fit(builder, site(out), new) is new
    replace(site(out), new)
    clean(gm)
    assert torch.equal(gm(x), transposed_sum(x))
    clone = [n for n in gm.graph.nodes if n.target is aten.clone.default][-1]
    source = clone.args[0]
    assert isinstance(source, Node) and source.meta["val"].stride() == clone.meta["val"].stride(), "Inductor drops it"


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y,
        lambda y: y.transpose(1, 2),
        lambda y: torch.as_strided(y, (3, 2), (1, 3)) * 2,
    ],
    ids=["returned", "returned as a view", "read by strides"],
)
def test_strides_that_matter_are_restored(trace: Trace, after: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 3, 4)
    gm = trace(lambda x: after(x + 1), x)
    out = node(gm, aten.add.Tensor)
    builder = Builder(gm, out)
    swapped = builder.contiguous(builder.call(aten.transpose.int, out.args[0], 1, 2))
    new = builder.call(aten.transpose.int, builder.call(aten.add.Tensor, swapped, 1), 1, 2)
    fitted = fit(builder, site(out), new)
    assert fitted is not new and fitted.meta["val"].stride() == out.meta["val"].stride()
    replace(site(out), fitted)
    clean(gm)
    assert torch.equal(gm(x), after(x + 1)) and gm(x).stride() == after(x + 1).stride()


def test_a_view_that_the_new_layout_does_not_allow_becomes_a_reshape(trace: Trace) -> None:
    x = torch.randn(2, 3, 4)
    gm = trace(lambda x: (x + 1).view(6, 4).sum(0), x)
    out = node(gm, aten.add.Tensor)
    builder = Builder(gm, out)
    swapped = builder.contiguous(builder.call(aten.permute.default, out.args[0], [1, 2, 0]))
    new = builder.call(aten.permute.default, builder.call(aten.add.Tensor, swapped, 1), [2, 0, 1])
    assert fit(builder, site(out), new) is new
    replace(site(out), new)
    clean(gm)
    torch.testing.assert_close(gm(x), (x + 1).view(6, 4).sum(0), rtol=1e-6, atol=1e-6)
