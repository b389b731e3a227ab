"""Adds nodes to an FX graph and puts them in the place of others, checking every step.

`Builder` adds nodes before a given one. Each gets its fake value (`meta["val"]`) by running its target under the
graph's fake mode, so symbolic sizes work, and the provenance of the node it helps to replace, so that Inductor's names
and stack traces point at the user's line. `layout.fit` checks that a new node has the shape, dtype, device and strides
of what it is to replace; `replace` exchanges them.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.fx
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import dependent_launch
from .fused import Site
from .purity import is_impure
from .torch_private import fake_tensors, kernel_nodes
from .torch_private.source_files import module_from_source, source_of

if TYPE_CHECKING:
    from .candidates import Candidate

aten = torch.ops.aten

Dim = int | torch.SymInt | Node
DESCRIPTOR_STEP = 16  # bytes
PROVENANCE = (
    "stack_trace", "nn_module_stack", "source_fn_stack", "fwd_nn_module_stack", "fwd_source_fn_stack", "original_aten",
    "from_node", "seq_nr", "custom", "partitioner_tag", "autograd_backward", "torch_fn",
)  # fmt: skip


class SpliceError(ValueError):
    """A replacement that would not compute what it replaces, or cannot be expressed in the graph."""


ZEROS = """import triton
import triton.language as tl


@triton.jit
def zeros(out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.zeros((BLOCK,), out.dtype.element_ty), mask=i < SIZE)
"""


class Builder:
    """Adds nodes to `gm` before the node `before`; they take over the provenance of `origin`, usually the same node."""

    def __init__(self, gm: GraphModule, before: Node, origin: Node | None = None) -> None:
        self.gm = gm
        self.before = before
        self.origin = origin or before
        self.fake_mode = fake_tensors.mode_of(gm)
        self.kernels: list[str] = []  # the sources of the generated ones
        self.made: list[Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """`target(*args, **kwargs)` as a node; SymInt arguments become nodes of the graph."""
        args, kwargs = torch.utils._pytree.tree_map_only(torch.SymInt, self.scalar, (args, kwargs))
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.call_function(target, args, kwargs)
        self.made.append(node)
        node.meta.update({k: self.origin.meta[k] for k in PROVENANCE if k in self.origin.meta})
        value_args, value_kwargs = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = self.value(target, *value_args, **value_kwargs)
        if isinstance(node.meta["val"], torch.Tensor):
            node.meta["tensor_meta"] = torch.fx.passes.shape_prop._extract_tensor_metadata(node.meta["val"])
        return node

    @property
    def source(self) -> str:
        """What was generated; where that is nothing, the calls that were added."""
        return "\n\n".join(dict.fromkeys(self.kernels)) or "\n".join(str(node.format_node()) for node in self.made)

    def value(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """What `target` gives on fake values."""
        with self.fake_mode, torch.no_grad():
            return target(*args, **kwargs)

    def scalar(self, value: int | torch.SymInt) -> int | Node:
        """A size as an argument of a node: an int, or a node of the graph that holds the symbolic value."""
        constant = value if isinstance(value, int) else value.node.maybe_as_int()
        if constant is not None:
            return int(constant)
        assert isinstance(value, torch.SymInt)
        return self._held(value.node.expr)

    def _held(self, wanted: Any) -> int | Node:
        """What holds a symbolic size: a node that is it, a tensor that has it, or sums and products of such."""
        if wanted.is_Integer:
            return int(wanted)
        tensors: list[Node] = []
        for node in self.gm.graph.nodes:
            if node is self.before:
                break
            known = node.meta.get("val")
            if isinstance(known, torch.SymInt) and known.node.expr == wanted:
                return cast(Node, node)
            if isinstance(known, torch.Tensor):
                tensors.append(node)
        for node in tensors:
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr == wanted:
                    return self.call(aten.sym_size.int, node, dim)
        if wanted.is_Add or wanted.is_Mul:
            combine = operator.add if wanted.is_Add else operator.mul
            return functools.reduce(lambda a, b: self.call(combine, a, b), map(self._held, wanted.args))
        raise SpliceError(f"the size {wanted} is held by no tensor before {self.before.name}, so no node can read it")

    def size(self, node: Node, dim: int) -> int | Node:
        """Size of `node` along `dim`: an int, or an `aten.sym_size.int` node where symbolic."""
        size = node.meta["val"].shape[dim]
        constant = size if isinstance(size, int) else size.node.maybe_as_int()
        return self.call(aten.sym_size.int, node, dim) if constant is None else int(constant)

    def ceil_div(self, size: Dim, block: int) -> int | Node:
        """⌈size / block⌉, the usual entry of a grid."""
        if isinstance(size, torch.SymInt):
            size = self.scalar(size)
        if isinstance(size, int):
            return -(-size // block)
        return self.call(operator.floordiv, self.call(operator.add, size, block - 1), block)

    def reshape(self, node: Node, shape: Sequence[Dim]) -> Node:
        """`node` with another shape; the node itself where it has that shape already."""
        wanted = [s.meta["val"] if isinstance(s, Node) else s for s in shape]
        if same_sizes(node.meta["val"].shape, wanted):
            return node
        return self.call(aten.reshape.default, node, list(shape))

    def empty(self, shape: Sequence[Dim], dtype: torch.dtype, device: torch.device) -> Node:
        """An uninitialised contiguous tensor, to be written by a kernel."""
        return self.call(aten.empty.memory_format, list(shape), dtype=dtype, device=device, pin_memory=False)

    def zeros(self, size: Dim, dtype: torch.dtype, device: torch.device) -> Node:
        """A tensor [size] of zeros, the same node for all who ask: for kernels that leave it as they found it."""
        if not isinstance(size, int):
            return self.call(aten.full.default, [size], 0, dtype=dtype, device=device, pin_memory=False)
        asked = size, dtype, device
        for node in self.gm.graph.nodes:
            if node.meta.get("shared_zeros") == asked:
                return cast(Node, node)
        first = Builder(self.gm, next(n for n in self.gm.graph.nodes if n.op != "placeholder"), self.origin)
        if dependent_launch.supported(device):
            # a kernel of ours lets the next one in, which Inductor's does not: 0.9 µs between two others, 1.6 before
            block = min(1024, 1 << (size - 1).bit_length())
            arguments = {"out": first.empty([size], dtype, device), "SIZE": size, "BLOCK": block}
            made = first.triton(load_kernel(ZEROS, "zeros"), [-(-size // block)], arguments, ["out"], lets=True)["out"]
            self.kernels += first.kernels
        else:
            made = first.call(aten.full.default, [size], 0, dtype=dtype, device=device, pin_memory=False)
        made.meta["shared_zeros"] = asked
        return made

    def contiguous(self, node: Node) -> Node:
        """`node` in row-major order; the node itself where it is already."""
        if node.meta["val"].is_contiguous():
            return node
        return self.call(aten.clone.default, node, memory_format=torch.contiguous_format)

    def described(self, node: Node, shape: Sequence[Dim]) -> Node:
        """`node` with `shape`, as a descriptor of it demands: unit stride along its last axis, all else in steps of 16
        bytes. A view where its strides allow, else a copy."""
        node = self.reshape(node, shape)
        value = node.meta["val"]
        *strides, last = value.stride()
        steps = [s * value.element_size() for s in (*strides, value.storage_offset())]
        fits = statically_known_true(last == 1) and all(statically_known_true(s % DESCRIPTOR_STEP == 0) for s in steps)
        return node if fits else self.call(aten.clone.default, node, memory_format=torch.contiguous_format)

    def triton(
        self,
        kernel: Any,
        grid: Sequence[Dim],
        arguments: dict[str, Any],
        outputs: Sequence[str],
        *,
        num_warps: int = 4,
        num_stages: int = 3,
        blocks: Mapping[str, tuple[int, ...]] | None = None,
        waits: bool = True,
        lets: bool = False,
    ) -> dict[str, Node]:
        """Launches a `triton.jit` kernel; returns the tensors it wrote, by argument name.

        `arguments` gives every argument of the kernel by name: nodes, numbers, symbolic sizes, dtypes; those the kernel
        declares `tl.constexpr` must be constants. `outputs` names the tensors written, usually fresh `empty` nodes.
        Those in `blocks` are passed as descriptors, to be loaded from in blocks of the given shape: see `described`.
        Where the device can, it `waits` in its places for the kernel in front. `lets` is for small kernels: the next
        one's blocks take their places meanwhile.
        """
        names = list(kernel.arg_names)
        if set(names) != set(arguments):
            missing, unknown = sorted(set(names) - set(arguments)), sorted(set(arguments) - set(names))
            raise SpliceError(f"kernel {kernel.__name__}: missing arguments {missing}, unknown arguments {unknown}")
        unwritten = [name for name in outputs if not isinstance(arguments.get(name), Node)]
        if unwritten or not outputs:
            raise SpliceError(f"kernel {kernel.__name__}: outputs {unwritten or '(none)'} are no tensors of the graph")
        resolved = {k: self.scalar(v) if isinstance(v, torch.SymInt) else v for k, v in arguments.items()}
        in_graph = {k: resolved[k] for k in names if isinstance(resolved[k], Node)}
        constants = {k: resolved[k] for k in names if k not in in_graph}
        values = {k: node.meta["val"] for k, node in in_graph.items() if isinstance(node, Node)}
        devices = {name: value.device for name, value in values.items() if isinstance(value, torch.Tensor)}
        if waits and all(map(dependent_launch.supported, devices.values())):
            described = (blocks or {}).keys()
            pointers = [name for name in devices if name not in described]
            kernel = dependent_launch.waiting(kernel, pointers, described, lets)
        self.kernels += filter(None, [source_of(kernel.fn)])
        entries = tuple(self.scalar(g) if isinstance(g, torch.SymInt) else g for g in grid)
        launch = self.call(
            kernel_nodes.KERNEL_NODE,
            **kernel_nodes.kernel_node_arguments(
                kernel_nodes.configured(kernel, num_warps, num_stages),
                entries,
                in_graph,
                constants,
                list(outputs),
                blocks,
            ),
        )
        return {name: self.call(operator.getitem, launch, name) for name in outputs}


def load_kernel(source: str, name: str) -> Any:
    """The `triton.jit` function `name` that the Python module `source` defines."""
    kernel = getattr(module_from_source(source), name, None)
    if kernel is None:
        raise SpliceError(f"the generated source defines no kernel named {name!r}")
    return kernel


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes or strides are known to be equal; sizes not known to be equal count as different."""
    return len(a) == len(b) and all(x is y or statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def emitted(candidate: Candidate, builder: Builder, site: Site) -> Iterator[tuple[Site, Node]]:
    """The nodes that a candidate adds, each with the site of the one output that it replaces."""
    made = candidate.emit(builder, site)
    for output, node in zip(site.outputs, made if isinstance(made, tuple) else (made,), strict=True):
        yield dataclasses.replace(site, output=output, others=()), node


def replace(site: Site, new: Node) -> Node:
    """Puts `new`, which must fit, in the place of `site.output`. What became unused is left for `clean`."""
    kept = {new, *site.interior}  # the original still reads its own intermediates, to be verified against
    site.output.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)
    return new


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape are laid out alike; the stride of a dimension of size 1 does not matter."""
    if not same_sizes([a.storage_offset()], [b.storage_offset()]):
        return False
    return all(
        statically_known_true(x == y) or statically_known_true(size == 1)
        for x, y, size in zip(a.stride(), b.stride(), a.shape, strict=True)
    )


def clean(gm: GraphModule) -> None:
    """Drops what became unused (mutations stay), then checks and recompiles the graph."""
    gm.graph.eliminate_dead_code(is_impure_node=_is_impure)
    gm.graph.lint()
    gm.recompile()


def _is_impure(node: Node) -> bool:
    """A node to keep though nobody reads it. A functional kernel launch is none, though FX takes it for one."""
    return node.target is not kernel_nodes.KERNEL_NODE and is_impure(node)
