"""Choosing among fusions that conflict."""

from __future__ import annotations

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_compiler.select import EXACT, Item, best


def item(saving: float, *exclusive: str) -> Item:
    return Item(saving, frozenset(exclusive))


def total(items: list[Item], chosen: list[int]) -> float:
    return sum(items[i].saving for i in chosen)


def test_independent_fusions_are_all_taken_and_losses_never() -> None:
    assert best([item(1, "a"), item(2, "b"), item(0, "c"), item(-1, "d")]) == [0, 1]


def test_two_small_fusions_beat_one_larger_between_them() -> None:
    assert best([item(3, "a"), item(5, "a", "b"), item(4, "b")]) == [0, 2]
    assert best([item(3, "a"), item(8, "a", "b"), item(4, "b")]) == [1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.sets(st.sampled_from("abcdefg"), min_size=1, max_size=3)), max_size=9))
def test_small_components_are_solved_exactly(raw: list[tuple[int, set[str]]]) -> None:
    items = [item(float(s), *nodes) for s, nodes in raw]
    chosen = best(items)

    def fits(subset: tuple[int, ...]) -> bool:
        return all(not items[a].exclusive & items[b].exclusive for a, b in itertools.combinations(subset, 2))

    assert fits(tuple(chosen))
    subsets = itertools.chain.from_iterable(itertools.combinations(range(len(items)), k) for k in range(len(items) + 1))
    assert total(items, chosen) == max(total(items, list(s)) for s in subsets if fits(s))


def test_a_large_component_is_solved_in_time_and_without_conflicts() -> None:
    rng = random.Random(0)
    items = [item(rng.random() + 1, f"n{i}", f"n{i + 1}", f"n{i + 2}") for i in range(8 * EXACT)]
    chosen = best(items)
    assert all(b - a >= 3 for a, b in itertools.pairwise(chosen))
    assert total(items, chosen) > 8 * EXACT / 3 * 1.2


def test_fusions_that_would_need_each_other_are_not_both_taken() -> None:
    # a1 -> b1 -> a2 and b1 -> a2 -> b2 … : merging {a1, a2} and {b1, b2} makes each read the other
    edges = [("x", "a1"), ("a1", "b2"), ("x", "b1"), ("b1", "a2")]
    first = Item(2.0, frozenset({"a1", "a2"}), frozenset({"x", "b1"}), "a2")
    second = Item(1.0, frozenset({"b1", "b2"}), frozenset({"x", "a1"}), "b2")
    assert best([first, second]) == [0, 1]
    assert best([first, second], edges) == [0]
