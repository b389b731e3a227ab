"""Patterns that users bring: literals, registries, and what is said of wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from declared_patterns import declared, found, linear_cube, tensors
from torch._guards import detect_fake_mode

import fusion_compiler as fc
from fusion_compiler import kernels, registry
from fusion_compiler.config import OptionError
from fusion_compiler.fused import MatmulFamily
from fusion_compiler.pattern import Example, Pattern, literal, pattern
from fusion_compiler.variants import PatternError


@pytest.fixture(autouse=True)
def _empty_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_disabled", set())
    monkeypatch.setattr(kernels, "_kernels", {})


# ---- literals -------------------------------------------------------------------------------------
def rms_scaled(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-6, scale: float = 2.0) -> torch.Tensor:
    return scale * F.linear(F.rms_norm(x, x.shape[-1:], None, eps), w)


def seen_by(p_function: Callable[..., Any], *example: torch.Tensor) -> tuple[Pattern, list[dict[str, Any]]]:
    """A pattern with a constraint that notes every literal it is shown."""
    seen: list[dict[str, Any]] = []

    def note(eps: float, scale: float) -> None:
        seen.append({"eps": eps, "scale": scale})

    return declared(p_function, *example, constraints=[note]), seen


@pytest.mark.parametrize(("eps", "scale"), [(1e-6, 2.0), (1e-5, 3.5), (0.25, -0.125)])
def test_a_literal_is_bound_to_what_the_graph_has(eps: float, scale: float) -> None:
    p, seen = seen_by(rms_scaled, *tensors((3, 8), (4, 8)))
    [match], _ = found(
        p,
        lambda x, w: F.linear(x * torch.rsqrt(x.square().mean(-1, True) + eps), w) * scale,
        *tensors((2, 5, 8), (4, 8)),
    )
    assert seen[0] == pytest.approx({"eps": eps, "scale": scale}, rel=1e-5)
    assert isinstance(match.op, MatmulFamily) and match.op.norm is not None
    assert match.op.norm.eps == pytest.approx(eps)


def test_a_number_that_the_function_writes_is_demanded() -> None:
    def fixed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.linear(F.rms_norm(x, x.shape[-1:], None, 1e-6), w))

    p = declared(fixed, *tensors((3, 8), (4, 8)))
    assert len(found(p, fixed, *tensors((3, 8), (4, 8)))[0]) == 1
    matches, [miss] = found(p, lambda x, w: torch.tanh(F.rms_norm(x, (8,), None, 1e-3) @ w.T), *tensors((3, 8), (4, 8)))
    assert not matches and "eps is 0.001" in miss.reason and "as a parameter" in miss.reason


def test_a_literal_may_stand_in_several_places_and_powers() -> None:
    def softcapped(x: torch.Tensor, w: torch.Tensor, cap: float = 30.0) -> torch.Tensor:
        return cap * torch.tanh(F.linear(x, w) / cap)

    p = declared(softcapped, *tensors((3, 8), (4, 8)))
    assert len(found(p, lambda x, w: torch.tanh((x @ w.T) * 0.02) * 50.0, *tensors((3, 8), (4, 8)))[0]) == 1
    matches, [miss] = found(p, lambda x, w: torch.tanh((x @ w.T) * 0.02) * 40.0, *tensors((3, 8), (4, 8)))
    assert not matches and "`cap`" in miss.reason


def test_a_literal_in_a_range() -> None:
    def clipped(x: torch.Tensor, w: torch.Tensor, high: float = literal(6.0, lo=1.0, hi=10.0)) -> torch.Tensor:  # noqa: B008
        return F.relu(F.linear(x, w)).clamp(max=high)

    p = declared(clipped, *tensors((3, 8), (4, 8)))
    assert len(found(p, lambda x, w: F.linear(x, w).relu().clamp(max=9.0), *tensors((3, 8), (4, 8)))[0]) == 1
    matches, [miss] = found(p, lambda x, w: F.linear(x, w).relu().clamp(max=20.0), *tensors((3, 8), (4, 8)))
    assert not matches and "takes at most 10" in miss.reason


def test_a_whole_number_stays_one() -> None:
    given: list[Any] = []

    def note(n: int) -> None:
        given.append(n)

    def scaled(x: torch.Tensor, w: torch.Tensor, n: int = 3) -> torch.Tensor:
        return torch.tanh(F.linear(x, w) * n)

    p = declared(scaled, *tensors((3, 8), (4, 8)), constraints=[note])
    found(p, lambda x, w: torch.tanh(F.linear(x, w) * 7), *tensors((3, 8), (4, 8)))
    assert given == [7] and isinstance(given[0], int)
    assert (
        "whole numbers"
        in found(p, lambda x, w: torch.tanh(F.linear(x, w) * 7.5), *tensors((3, 8), (4, 8)))[1][0].reason
    )


# ---- registries -----------------------------------------------------------------------------------
def cube_pattern(name: str = "linear_cube") -> Pattern:
    return pattern(name=name, examples=[Example(lambda: tensors((3, 8), (4, 8)))])(linear_cube)


def test_patterns_are_listed() -> None:
    fc.register_pattern(cube_pattern())
    listed = {p.name: p for p in fc.patterns()}
    assert {"gated_mlp", "norm_linear", "attention", "linear_cube"} <= listed.keys()
    assert listed["linear_cube"].origin == "registered" and listed["gated_mlp"].origin == "built-in"
    assert listed["linear_cube"].description == "The cube of a linear."
    assert all(p.description and p.enabled for p in listed.values())


def explained(**options: Any) -> list[str]:
    made = fc.explain(linear_cube, *tensors((3, 8), (4, 8)), machine="h200", options=options)
    return [d.pattern for d in made.decisions if d.pattern != "linear_epilogue"]  # that finds any chain


def test_registered_local_disabled() -> None:
    mine = cube_pattern()
    assert explained() == []
    assert explained(patterns=[mine]) == ["linear_cube"]
    assert fc.register_pattern(mine) is mine
    assert explained() == ["linear_cube"]
    assert explained(patterns=[mine]) == ["linear_cube"]  # the same one twice is no duplicate
    assert explained(disable=["linear_cube"]) == []
    fc.disable_patterns("linear_cube")
    assert explained() == [] and not next(p for p in fc.patterns() if p.name == "linear_cube").enabled
    fc.enable_patterns("linear_cube")
    assert explained() == ["linear_cube"]
    fc.unregister_pattern("linear_cube")
    assert explained() == []


def test_names_are_unique() -> None:
    fc.register_pattern(cube_pattern())
    with pytest.raises(PatternError, match="'linear_cube' is registered already"):
        fc.register_pattern(cube_pattern())
    with pytest.raises(PatternError, match="'gated_mlp' is built in already"):
        fc.register_pattern(cube_pattern("gated_mlp"))
    for local in ([cube_pattern("gated_mlp")], [cube_pattern("a"), cube_pattern("a")]):
        with pytest.raises(OptionError, match="already"):
            explained(patterns=local)


def test_what_is_no_pattern_is_said() -> None:
    with pytest.raises(OptionError, match="linear_cube is no pattern; declare it"):
        explained(patterns=[linear_cube])
    with pytest.raises(PatternError, match="no pattern 'gated_mpl'.*did you mean 'gated_mlp'"):
        fc.disable_patterns("gated_mpl")
    with pytest.raises(PatternError, match="no pattern 'x' is registered"):
        fc.unregister_pattern("x")


# ---- wrong declarations ---------------------------------------------------------------------------
def ignores(x: torch.Tensor, w: torch.Tensor, unused: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w)


def ignores_number(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return F.linear(x, w)


def two(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, F.linear(x, w)


def size(x: torch.Tensor, w: torch.Tensor) -> int:
    return x.shape[0]


def nothing(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1)


def unknown(x: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(x, 0)


def mixed(x: torch.Tensor, w: torch.Tensor, eps: float = 0.5) -> torch.Tensor:
    return F.linear(x, w) * (1 + eps)


def axis(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return x.mean(dim)


def flag(x: torch.Tensor, upside: bool = True) -> torch.Tensor:
    return x.exp() if upside else x.neg()


def many(*x: torch.Tensor) -> torch.Tensor:
    return x[0].exp()


WRONG = {
    "does not run": (linear_cube, ((3, 8), (4, 9)), "cannot be traced.*size mismatch|cannot be traced.*same"),
    "too few": (linear_cube, ((3, 8),), r"gives 1 arguments \(Tensor\) and must give one tensor for each of x, w"),
    "an argument": (two, ((3, 8), (4, 8)), "a result of it computes nothing"),
    "an int": (size, ((3, 8), (4, 8)), "returns a int"),
    "ignored": (ignores, ((3, 8), (4, 8), (2,)), "does not depend on `unused`"),
    "ignored literal": (ignores_number, ((3, 8), (4, 8)), "does not depend on `eps`"),
    "nothing": (nothing, ((3, 8),), "computes nothing"),
    "unknown operator": (unknown, ((3, 8),), "aten.cumsum.*not in the compiler's vocabulary"),
    "literal inside a number": (mixed, ((3, 8), (4, 8)), "no multiple of one of them"),
    "literal that is an axis": (axis, ((3, 8),), "cannot be traced with dim=.*numbers that decide shapes its own"),
    "flag": (flag, ((3, 8),), "`upside` has the default True; .*choice"),
    "star": (many, ((3, 8),), "`x` must be an ordinary parameter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_declarations(case: str) -> None:
    function, shapes, message = WRONG[case]
    with pytest.raises(PatternError, match=message) as raised:
        declared(function, *tensors(*shapes))
    assert function.__name__ in str(raised.value)


def test_a_constraint_asks_for_what_there_is() -> None:
    with pytest.raises(PatternError, match="asks for `epsilon`; it can ask for eps, op, scale, site, w, x"):
        declared(rms_scaled, *tensors((3, 8), (4, 8)), constraints=[lambda epsilon: None])


def test_declaring_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    cube_pattern()
    assert torch.equal(before, torch.get_rng_state())


def test_a_pattern_is_traced_apart_from_the_graph_that_is_compiled() -> None:
    """With its example's sizes: under those of the graph, tracing the built-in patterns took 5 s instead of 1."""
    seen: list[bool] = []

    def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        seen.append(detect_fake_mode().shape_env is not ambient[-1].shape_env)
        return torch.tanh(F.linear(x, w))

    ambient: list[Any] = []

    def during_compilation(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        ambient.append(detect_fake_mode())
        assert declared(gated, *tensors((3, 8), (4, 8))).variants
        return gm

    torch.compile(torch.sin, backend=during_compilation, dynamic=True)(torch.randn(3))
    assert seen and all(seen)


def test_a_pattern_can_still_be_called() -> None:
    p = declared(rms_scaled, *tensors((3, 8), (4, 8)))
    x, w = tensors((3, 8), (4, 8))
    torch.testing.assert_close(p(x, w, scale=3.0), rms_scaled(x, w, 1e-6, 3.0))
