"""Options of the backend, checked before anything is compiled."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .machine import Machine

REMAINDERS = ("inductor", "eager")
ACTIVATIONS = ("float", "q8_1")


class OptionError(ValueError):
    """An option that does not exist, or a value it cannot take; the message lists what exists."""


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` may set.

    machine:   name of a known machine, or a `Machine`; None is the one at hand.
    verify:    run every fused region beside its original and record the error in the report.
    autotune:  measure candidates whose predicted times are close.
    disable:   names of patterns to leave out; "all" leaves everything to the remainder.
    remainder: who compiles what is not fused: "inductor", or "eager" for none.
    strict:    raise where a stage of the compiler fails, instead of compiling as Inductor alone would.
    activations: what kernels may make of the input of a Q4_0 linear: "float", as good as eager, or "q8_1", where it
               may also be rounded to 8 bits in blocks of 32, as ggml does (a relative error of 0.5 %).
    patterns:  further patterns, tried before the built-in ones.
    mode:      a mode of torch.compile, since torch.compile refuses `mode=` and `options=` together.
    inductor:  configuration of Inductor, as torch.compile's own `options` take it.
    """

    machine: Machine | str | None = None
    verify: bool = False
    autotune: bool = False
    disable: frozenset[str] = frozenset()
    remainder: Literal["inductor", "eager"] = "inductor"
    strict: bool = False
    activations: Literal["float", "q8_1"] = "float"
    patterns: tuple[Any, ...] = ()
    mode: str | None = None
    inductor: Mapping[str, Any] | None = None

    @staticmethod
    def parse(
        given: Mapping[str, Any] | Options | None,
        *,
        mode: str | None = None,
        patterns: Collection[str],
        machines: Collection[str],
        modes: Collection[str],
        settings: Mapping[str, Any],
    ) -> Options:
        """Options from a mapping; `patterns`, `machines`, `modes` are the names that exist, `settings` Inductor's."""
        if isinstance(given, Options):
            return given
        given = dict(given or {})
        names = [f.name for f in fields(Options)]
        for name in given:
            if name not in names:
                raise OptionError(f"unknown option {name!r}{hint(name, names)}; options are {', '.join(names)}")
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise OptionError(f"mode={mode!r} and options['mode']={given['mode']!r} contradict each other")
        for name in ("verify", "autotune", "strict"):
            if not isinstance(given.get(name, False), bool):
                raise OptionError(f"option {name!r} is True or False, not {given[name]!r}")
        extra = _sequence(given.get("patterns", ()), "patterns")
        given["patterns"] = extra
        known = [*patterns, *(getattr(p, "name", "") for p in extra)]
        disable = given.get("disable", ())
        given["disable"] = frozenset([disable] if isinstance(disable, str) else _sequence(disable, "disable"))
        for name in sorted(given["disable"]):
            _one_of("disable", name, [*known, "all"])
        _one_of("remainder", given.get("remainder", "inductor"), REMAINDERS)
        _one_of("activations", given.get("activations", "float"), ACTIVATIONS)
        if given.get("mode") is not None:
            _one_of("mode", given["mode"], modes)
        if not isinstance(given.get("machine"), (Machine, type(None))):
            _one_of("machine", given["machine"], machines)
        if not isinstance(given.get("inductor", {}), Mapping | None):
            raise OptionError(f"option 'inductor' is a mapping of Inductor's settings, not {given['inductor']!r}")
        for name, value in (given.get("inductor") or {}).items():
            if name not in settings:
                raise OptionError(f"unknown setting of Inductor {name!r}{hint(name, settings)}")
            if isinstance(settings[name], bool) and not isinstance(value, bool | None):
                raise OptionError(f"Inductor's setting {name!r} is True or False, not {value!r}")
        return Options(**given)


def _one_of(option: str, value: Any, choices: Collection[str]) -> None:
    if value not in choices:
        existing = ", ".join(choices)
        raise OptionError(f"option {option!r} cannot be {value!r}{hint(value, choices)}; it is one of {existing}")


def _sequence(value: Any, option: str) -> tuple[Any, ...]:
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        raise OptionError(f"option {option!r} is a sequence, not {value!r}")
    return tuple(value)


def hint(value: Any, choices: Collection[str]) -> str:
    """ " (did you mean 'x'?)" where one of `choices` is close to `value`."""
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
