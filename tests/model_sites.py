"""The fusion sites of a model, counted from how it runs eagerly: nothing of the compiler is asked.

Every tensor is followed from the operator that made it, through views, casts and copies, to those that read it:

    attention     a matrix product that reads the result of a softmax, or a fused attention operator
    gated_mlp     act(linear(x)) · linear(x), both of the same x
    linear_epilogue    any other activation of a linear
    norm_linear   a linear that reads the result of a norm
    norm          a row norm, by its operator or by a module that is one by name
    add_norm      a norm that reads the sum of two tensors of its size
    softmax       the operator, where its result meets no product
    rope          a call of a function that is a rotation by name, or a rotation in complex numbers

A linear is a product with a weight; the experts of a mixture, each with its own, count where they are an MLP.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusion_compiler as fc

aten = torch.ops.aten
BROKEN = "the model breaks its graph inside: a tensor is read back to the host, and no graph holds all of this"
KINDS = ("attention", "gated_mlp", "linear_epilogue", "norm_linear", "norm", "add_norm", "softmax", "rope")
COPIES = {aten._to_copy, aten.clone, aten._unsafe_view}
GATHERS = {aten.index, aten.index_select}
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
FUSED_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
}  # fmt: skip
ACTIVATIONS = {aten.silu, aten.gelu, aten.relu, aten.sigmoid}
ROTATIONS = ("rotate_half", "rotate_every_two", "_apply_rotary_emb")
ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")


@dataclass(frozen=True)
class Site:
    """One place of a model where a fusion could stand: the module and the source line that run it."""

    kind: str
    module: str
    line: str

    def __str__(self) -> str:
        return f"{self.module} ({self.line})"


@dataclass(frozen=True)
class Made:
    """What made the data of a tensor. `source` is the storage that a linear read; `site` the place of an activation or
    a softmax."""

    by: str
    source: int = 0
    site: Site | None = None


@dataclass
class Survey(TorchDispatchMode):
    """Follows the data of one call; `sites` is what was met, in the order of running."""

    model: torch.nn.Module
    sites: list[Site] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._made: dict[int, Made] = {}
        self._alive: list[Any] = []  # a storage that is freed could be given to another tensor
        self._running: list[tuple[str, torch.nn.Module]] = []
        self._norms = 0  # how deep in modules that are norms
        self._turned: list[Any] = []  # frames of rotations; kept, so that no other frame gets their place
        self._formula = 0  # how deep in activations spelled by hand, whose operators are no sites
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._made[_storage(tensor)] = Made("weight")

    # ---- modules ----------------------------------------------------------------------------
    @contextmanager
    def modules(self) -> Iterator[None]:
        """Keeps the name of the running module, and marks what norms and activations give."""
        hooks = torch.nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: torch.nn.Module, inputs: Any) -> None:
        self._running.append((self._name(module), module))
        if _is_norm(module):
            self._normed(inputs[0])
            self._norms += 1
        self._formula += _is_activation(module)

    def _name(self, module: torch.nn.Module) -> str:
        """Its path by way of what runs it: a module may be shared by several."""
        for path, parent in reversed(self._running):
            for name, part in parent.named_modules():
                if part is module:
                    return f"{path}.{name}".lstrip(".")
        return self._running[-1][0] if self._running else ""  # made for this one call, as activations are in places

    def _leave(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self._formula -= _is_activation(module)
        self._norms -= _is_norm(module)
        if isinstance(output, torch.Tensor):
            if "Norm" in type(module).__name__:
                self._mark(output, Made("norm"))
            elif _is_activation(module):
                self._activated(inputs[0], output)
        self._running.pop()

    # ---- operators --------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        reads = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        self._alive += reads
        if self._formula:
            return out
        operator, made = func.overloadpacket, [self._of(t) for t in reads]
        if operator in FUSED_ATTENTION:
            self._site("attention")
        if not isinstance(out, torch.Tensor):
            if operator is aten.native_layer_norm:
                self._normed(reads[0])
                self._mark(out[0], Made("norm"))
            return out
        self._rotated(operator)
        grouped = "grouped_mm" in str(operator)
        if operator in PRODUCTS or grouped:
            self._product(reads, made, out, grouped)
        elif operator is aten._softmax:
            self._mark(out, Made("softmax", site=self._site("softmax")))
        elif operator in ACTIVATIONS:
            self._activated(reads[0], out)
        elif operator in (aten.mul, aten.mul_) and len(reads) == 2 and {m.by for m in made} == {"act", "linear"}:
            self._gated(*sorted(made, key=lambda m: m.by))
        elif operator in COPIES:
            self._mark(out, made[0])
        elif operator in GATHERS and made[0].by == "weight":
            self._mark(out, Made("experts"))
        elif operator in (aten.mul, aten.div) and len(reads) == 1 and made[0].by == "norm":
            self._mark(out, made[0])  # times a number
        elif operator in (aten.add, aten.add_) and [m.by for m in made] == ["linear", "weight"]:
            self._mark(out, made[0])
        elif operator is aten.add and [t.shape for t in reads] == [out.shape] * 2:
            self._mark(out, Made("sum"))
        return out

    def _normed(self, x: torch.Tensor) -> None:
        if self._norms == 0:
            self._site("norm")
            if self._of(x).by == "sum":
                self._site("add_norm")

    def _rotated(self, operator: Any) -> None:
        if operator is aten.view_as_real:
            self._site("rope")
        frame: Any = sys._getframe(2)
        while frame and frame.f_code.co_name not in ROTATIONS:
            frame = frame.f_back
        if frame and all(frame is not known for known in self._turned):
            self._turned.append(frame)
            self._site("rope")

    def _product(self, reads: list[torch.Tensor], made: list[Made], out: torch.Tensor, grouped: bool) -> None:
        operands = list(zip(reads, made, strict=True))
        operands = operands[:2] if grouped else operands[-2:]  # without offsets or a bias
        softmax = next((m for _, m in operands if m.by == "softmax"), None)
        if softmax is not None:
            if softmax.site in self.sites:
                self.sites.remove(softmax.site)
            self._site("attention")
            return
        weights = ("weight", "experts")
        found = next(((t, m) for (t, _), (_, m) in (operands, operands[::-1]) if m.by in weights), None)
        if found is None:
            return
        x, weight = found
        if self._of(x).by == "norm" and weight.by == "weight" and not grouped:
            self._site("norm_linear")
        self._mark(out, Made("linear", _storage(x)))

    def _activated(self, x: torch.Tensor, out: torch.Tensor) -> None:
        made = self._of(x)
        if made.by == "linear":
            self._mark(out, Made("act", made.source, self._site("linear_epilogue")))

    def _gated(self, gate: Made, up: Made) -> None:
        if gate.source == up.source and gate.site in self.sites:
            self.sites.remove(gate.site)
            self._site("gated_mlp")

    def _site(self, kind: str) -> Site:
        self.sites.append(Site(kind, self._running[-1][0], _line()))
        return self.sites[-1]

    def _of(self, tensor: torch.Tensor) -> Made:
        return self._made.get(_storage(tensor), Made(""))

    def _mark(self, tensor: torch.Tensor, made: Made) -> None:
        self._alive.append(tensor)
        self._made[_storage(tensor)] = made


def _is_activation(module: torch.nn.Module) -> bool:
    if type(module).__name__ in ("Softmax", "Tanh", "MultiheadAttention"):
        return False
    return type(module).__module__ in ACTIVATION_MODULES or "Gelu" in type(module).__name__


def _is_norm(module: torch.nn.Module) -> bool:
    name = type(module).__name__
    return name.endswith(("RMSNorm", "LayerNorm")) and not any(True for _ in module.children())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _line() -> str:
    """The innermost line that is neither torch's nor this file's."""
    frame: Any = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}" if frame else ""


@torch.no_grad()
def present(model: torch.nn.Module, inputs: dict[str, Any]) -> list[Site]:
    """The sites of one call of a model, which runs eagerly."""
    survey = Survey(model)
    with survey.modules(), survey:
        model(**inputs)
    return survey.sites


@dataclass(frozen=True)
class Account:
    """The sites present against a report: those found, those told why not, those about which nothing is said."""

    found: list[Site]
    told: list[tuple[Site, str]]
    silent: list[Site]
    beyond: list[str]  # decisions where no site was counted

    def of(self, kind: str) -> tuple[int, int]:
        """(found, present) of one kind."""
        found = sum(s.kind == kind for s in self.found)
        missed = sum(s.kind == kind for s in (*(s for s, _ in self.told), *self.silent))
        return found, found + missed


def account(sites: list[Site], reports: list[fc.Report]) -> Account:
    """Assigns each site to one decision of its pattern in its module, else to a near miss there."""
    report = fc.Report.merged(reports)
    whole = [d for d in report.decisions if d.pattern != "activation_linear"]
    inner = {n for d in whole for n in d.nodes if n != d.node}
    decisions = [
        (d.pattern, _module(d.where), d.where)
        for d in report.decisions
        # the gate of a gated MLP and the softmax of an attention are no places of their own
        if d.pattern in KINDS and not (d.pattern in ("linear_epilogue", "softmax") and d.node in inner)
    ]
    misses = [(n.pattern, _module(n.root), n.reason) for n in report.near_misses]
    result, served = Account([], [], [], []), set()
    for site in sites:
        decision = next((d for d in decisions if d[0] == site.kind and _same(site.module, d[1])), None)
        if decision is not None:
            if decision[1] == site.module:  # else a graph between two breaks, which may serve every layer
                decisions.remove(decision)
            served.add(decision)
            result.found.append(site)
            continue
        reason = next((why for p, module, why in misses if p == site.kind and _same(site.module, module)), None)
        if reason is None and len(reports) > 1:
            reason = BROKEN
        if reason is None:
            result.silent.append(site)
        else:
            result.told.append((site, reason))
    result.beyond.extend(f"{d[0]} at {d[2]}" for d in decisions if d not in served)
    return result


def _module(where: str) -> str:
    return where.split(" (")[0]


def _same(module: str, reported: str) -> bool:
    """Behind a graph break the report knows only the end of a module's path."""
    return module == reported or module.endswith("." + reported)
