"""Which patterns exist and are in use: the built-in ones, those that the user registered, those of one compilation.

Registering and disabling hold for compilations that begin afterwards; a function compiled already stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, cast

import torch

from . import kernels
from .config import OptionError, hint
from .kernels import RegisteredKernel
from .machine import TABLE, Machine
from .pattern import AnyPattern, Pattern, RecognisedPattern
from .torch_private import fake_tensors
from .variants import PatternError, example_arguments

KINDS = ("cuda", "rocm", "cpu")

_registered: dict[str, AnyPattern] = {}
_disabled: set[str] = set()


class KernelError(ValueError):
    """A kernel that cannot stand for its pattern; the message says what is wrong with it."""


@dataclass(frozen=True)
class PatternInfo:
    """A pattern as `patterns` lists it. `kernels` are the names of those registered for it."""

    name: str
    description: str
    origin: Literal["built-in", "registered"]
    enabled: bool
    kernels: tuple[str, ...] = ()


def builtin_patterns() -> tuple[AnyPattern, ...]:
    """The patterns of `patterns/`."""
    from .patterns import BUILTIN

    return BUILTIN


def patterns() -> list[PatternInfo]:
    """The patterns that every compilation looks for, and whether they are enabled."""
    return [
        PatternInfo(
            p.name,
            _description(p),
            "registered" if name in _registered else "built-in",
            name not in _disabled,
            tuple(k.name for k in kernels.kernels_of(_computed_by(p))),
        )
        for name, p in _known().items()
    ]


def direct_kernel(name: str) -> Callable[..., Any]:
    """What a function of `attention.direct` runs on a GPU: see `lowering.direct_kernels`."""
    from .lowering import direct_kernels

    return direct_kernels()[name]


class PatternPackage(ModuleType):
    """The package `fusion_compiler.patterns`, which has the name of the function `patterns`: calling it lists them."""

    def __call__(self) -> list[PatternInfo]:
        return patterns()


def register_pattern(pattern: AnyPattern) -> AnyPattern:
    """Looks for `pattern` in every compilation from now on, before the built-in ones. Returns it, so it can decorate.

    Raises PatternError where another pattern has its name.
    """
    _check(pattern, "register_pattern")
    _refuse_duplicate(pattern, _known())
    _registered[pattern.name] = pattern
    return pattern


def unregister_pattern(name: str) -> None:
    """Forgets a pattern that was registered; built-in ones can be disabled."""
    if name not in _registered:
        raise PatternError(f"no pattern {name!r} is registered; registered are: {', '.join(_registered) or 'none'}")
    del _registered[name]
    _disabled.discard(name)


def disable_patterns(*names: str) -> None:
    """Leaves these patterns out of every compilation from now on; options={"disable": ...} does so for one."""
    _disabled.update(_existing(names))


def enable_patterns(*names: str) -> None:
    """Takes `disable_patterns` back."""
    _disabled.difference_update(_existing(names))


def active_patterns(local: Sequence[AnyPattern], disabled: Collection[str]) -> tuple[AnyPattern, ...]:
    """What one compilation looks for: its own patterns, then registered and built-in ones, less the disabled."""
    everything = {p.name: p for p in local}
    everything |= {name: p for name, p in _known().items() if name not in everything and name not in _disabled}
    return tuple(p for name, p in everything.items() if name not in disabled and "all" not in disabled)


def names() -> list[str]:
    """The names of all patterns that are registered or built in."""
    return [*_known()]


def check_local(local: Iterable[Any]) -> None:
    """Raises OptionError where the patterns of an option are none, or share a name with other ones."""
    seen: dict[str, AnyPattern] = dict(_known())
    for pattern in local:
        try:
            _check(pattern, "option 'patterns'")
            _refuse_duplicate(pattern, seen)
        except PatternError as error:
            raise OptionError(str(error)) from None
        seen[pattern.name] = pattern


def register_kernel(
    pattern: AnyPattern | str,
    function: Callable[..., Any],
    *,
    machines: Iterable[str | Machine] | None = None,
    cost: Callable[..., Any] | None = None,
    name: str | None = None,
) -> RegisteredKernel:
    """Offers `function` wherever `pattern` matches; it runs where it is predicted to be fastest.

    function: takes the pattern's arguments in order and returns what the pattern returns; for "attention" and "rope"
              these are the arguments of `attention.reference.attention` and `rope.rope` here. Plain PyTorch: ATen
              operators, a `torch.library.custom_op`, a Triton kernel in a `torch.library.triton_op`. Absent optional
              arguments are None, literals numbers, choices the chosen alternative.
    machines: where it may run: names ("h200"), kinds ("cuda", "rocm", "cpu") or `Machine`s; None: everywhere.
    cost:     cost(machine, *arguments) gives its seconds, infinity where it cannot serve; the arguments are those of
              `function`, tensors without data. For "attention" it is cost(machine, op), with a `fused.Attention`.
              None: every input read once and the output written once, and the arithmetic done, at the machine's rates.
    name:     what the report calls it; by default the function's name.

    Raises KernelError where the function cannot stand for the pattern.
    """
    found = _find(pattern)
    called = name or str(getattr(function, "__name__", None) or getattr(function, "_name", type(function).__name__))
    _check_kernel(found, function, called)
    kernel = RegisteredKernel(called, found.name, _computed_by(found), function, _machines(machines), cost)
    kernels.add(kernel)
    return kernel


def unregister_kernel(kernel: RegisteredKernel) -> None:
    """Withdraws what `register_kernel` returned."""
    kernels.remove(kernel)


# ---- what is wrong with a pattern -----------------------------------------------------------------
def _known() -> dict[str, AnyPattern]:
    return {**_registered, **{p.name: p for p in builtin_patterns()}}


def _existing(given: Sequence[str]) -> Sequence[str]:
    for name in given:
        if name not in _known():
            raise PatternError(f"no pattern {name!r}{hint(name, _known())}; there is {', '.join(_known())}")
    return given


def _check(pattern: Any, where: str) -> None:
    if not all(hasattr(pattern, attribute) for attribute in ("name", "function", "examples", "find")):
        shown = getattr(pattern, "__name__", repr(pattern))
        raise PatternError(
            f"{where}: {shown} is no pattern; declare it with @fusion_compiler.pattern(name=..., examples=...)"
        )


def _refuse_duplicate(pattern: AnyPattern, known: dict[str, AnyPattern]) -> None:
    other = known.get(pattern.name)
    if other is not None and other is not pattern:
        origin = "built in" if pattern.name not in _registered else "registered"
        cure = (
            "give yours another name" if origin == "built in" else "give yours another name, or unregister_pattern it"
        )
        raise PatternError(f"a pattern named {pattern.name!r} is {origin} already; {cure}")


def _description(pattern: AnyPattern) -> str:
    """The first sentence of the function's docstring, or of the file that declares nothing but the pattern."""
    module = inspect.getmodule(pattern.function)
    of_file = inspect.getdoc(module) if module and module.__name__.startswith(f"{__package__}.patterns.") else None
    text = of_file or inspect.getdoc(pattern.function) or ""
    return text.split("\n\n")[0].replace("\n", " ")


# ---- what is wrong with a kernel ------------------------------------------------------------------
def _find(pattern: AnyPattern | str) -> Pattern | RecognisedPattern:
    found = _known()[_existing([pattern])[0]] if isinstance(pattern, str) else pattern
    _check(found, "register_kernel")
    if not isinstance(found, Pattern) and getattr(found, "computes", None) is None:
        raise KernelError(
            f"pattern {found.name!r} is recognised by code of its own, which binds no arguments to give to a kernel; "
            "declare a pattern with @fusion_compiler.pattern for it"
        )
    return cast(Pattern | RecognisedPattern, found)


def _computed_by(pattern: AnyPattern) -> Callable[..., Any]:
    """What a kernel for the pattern has to compute."""
    return getattr(pattern, "computes", None) or pattern.function


def _machines(machines: Iterable[str | Machine] | None) -> frozenset[str] | None:
    if machines is None:
        return None
    given = [machines] if isinstance(machines, (str, Machine)) else list(machines)
    found = frozenset(m.name if isinstance(m, Machine) else m for m in given)
    known = {*TABLE, *KINDS, *(m.name for m in given if isinstance(m, Machine))}
    for name in sorted(found - known):
        raise KernelError(f"no machine {name!r}{hint(name, known)}; there is {', '.join(sorted(known))}")
    return found


def _check_kernel(pattern: Pattern | RecognisedPattern, function: Callable[..., Any], name: str) -> None:
    """Binds and runs the kernel without data on the pattern's first example."""
    example = _example(pattern)
    try:
        inspect.signature(function).bind(*example)
    except TypeError as error:
        raise KernelError(
            f"kernel {name!r} for pattern {pattern.name!r} must take {len(example)} arguments, "
            f"{', '.join(example)}, in this order: {error}"
        ) from None
    mode = fake_tensors.new_mode()
    arguments = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in example.values()]
    with mode, torch.no_grad():
        wanted = _computed_by(pattern)(*arguments)
        try:
            result = function(*arguments)
        except Exception as error:
            raise KernelError(
                f"kernel {name!r} for pattern {pattern.name!r} does not run without data on the pattern's example: "
                f"{type(error).__name__}: {error}; a custom operator needs a fake implementation (register_fake)"
            ) from error
    if _kind(result) != _kind(wanted):
        raise KernelError(
            f"kernel {name!r} for pattern {pattern.name!r} returns {_kind(result)} on the pattern's first example, "
            f"where the pattern returns {_kind(wanted)}"
        )


def _example(pattern: Pattern | RecognisedPattern) -> dict[str, Any]:
    """An example of what kernels are called with, by parameter."""
    if isinstance(pattern, RecognisedPattern):
        return dict(pattern.arguments())
    parameters = pattern.parameters
    given: dict[str, Any] = example_arguments(pattern.name, parameters, pattern.examples[0].inputs)
    given |= {n: literal.default for n, literal in parameters.literals.items()}
    given |= {n: choice.alternatives[0] for n, choice in parameters.choices.items()}
    return {n: given[n] for n in parameters.names}


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_kind, value))})"
    return f"a {type(value).__name__}"
