"""Deep copies whose tensors are fake (`copy._deepcopy_dispatch`, `torch._subclasses.fake_tensor`).

Copying through `copy.deepcopy` keeps every relation between objects, tied weights and caches included, and copying a
tensor is what turns it into a fake one, so no data is duplicated. Tensors of unknown or absent devices (meta) become
fake CPU tensors, because meta tensors cannot be traced through every model.
Tried on torch 2.11.0 and 2.13.0, Python 3.11 and 3.12.
"""

from __future__ import annotations

import copy
import dis
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv


class FakeCopies:
    """Makes fake copies of modules, functions and arguments that share one memo and one fake mode."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self._memo: dict[int, Any] = {}

    def of(self, value: Any) -> Any:
        """A copy of any object, fake where it holds tensors."""
        with _copying(torch.Tensor, self._tensor), _copying(torch.nn.Parameter, self._tensor):
            with _copying(FakeTensor, self._tensor):
                return copy.deepcopy(value, self._memo)

    def of_callable(self, function: Callable[..., Any]) -> Any:
        """A copy of a module, method, partial or function, with what it closes over and the globals it reads."""
        if isinstance(function, functools.partial):
            args, keywords = self.of(function.args), self.of(function.keywords)
            return functools.partial(self.of_callable(function.func), *args, **keywords)
        if not isinstance(function, types.FunctionType):
            return self.of(function)
        loaded = {i.argval for i in dis.get_instructions(function) if i.opname == "LOAD_GLOBAL"}
        namespace = function.__globals__
        mine = {n: self.of(namespace[n]) for n in loaded if n in namespace and _holds_state(namespace[n])}
        cells = tuple(types.CellType(self._captured(cell.cell_contents)) for cell in function.__closure__ or ())
        reads = {**namespace, **mine} if mine else namespace
        twin = types.FunctionType(function.__code__, reads, function.__name__, function.__defaults__, cells)
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin

    def _captured(self, value: Any) -> Any:
        return self.of_callable(value) if isinstance(value, types.FunctionType) else self.of(value)

    def _tensor(self, tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        here = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
        if here and not isinstance(tensor, FakeTensor):
            fake: torch.Tensor = self.mode.from_tensor(tensor.detach(), static_shapes=True)
        else:
            size, stride = [int(s) for s in tensor.shape], [int(s) for s in tensor.stride()]
            with self.mode:
                fake = torch.empty_strided(size, stride, dtype=tensor.dtype, device=device if here else "cpu")
        with self.mode:
            if isinstance(tensor, torch.nn.Parameter):
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad:
                fake.requires_grad_(True)
        for name, value in vars(tensor).items():
            if name.startswith("_dynamo_"):  # marks of torch._dynamo.mark_dynamic and mark_static
                setattr(fake, name, value)
        memo[id(tensor)] = fake
        return fake


def _holds_state(value: Any) -> bool:
    """Whether a global may be changed by running the function: modules, tensors, caches; no imports or functions."""
    return isinstance(value, torch.nn.Module) or not (callable(value) or isinstance(value, types.ModuleType))


@contextmanager
def _copying(kind: type, copier: Callable[[Any, dict[int, Any]], Any]) -> Iterator[None]:
    dispatch: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]
    dispatch[kind] = copier
    try:
        yield
    finally:
        del dispatch[kind]
