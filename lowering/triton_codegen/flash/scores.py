"""What happens to a tile of scores between the two products, in base 2: scale, cap, what is added, what is hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy

from ....attention.choices import Choice, is_truth
from ....cost.amounts import amount
from ....fused import Attention, Modification
from .expressions import EXACT, Printer, Read, reads_in
from .plan import Plan
from .sizes import size_text

LOG2_E = math.log2(math.e)
# What a finite number hides: below every score, so that beside another key it counts for nothing, and the same for all
# keys of a row that sees none.
HIDDEN = -1e38
TANH = '"tanh.approx.f32 $0, $1;", "=f,f"'
KEYS = "keys = start + columns[None, :]"


class Scores:
    """Prints how the tile `s` of products q·k is modified."""

    def __init__(self, op: Attention, plan: Plan, reads: Mapping[str, Read]) -> None:
        self.op, self.plan, self.reads = op, plan, reads
        self.q_len, self.kv_len = amount(op.q_len), amount(op.kv_len)
        self.even_rows = isinstance(self.q_len, int) and self.q_len % plan.block_m == 0
        self.even_keys = isinstance(self.kv_len, int) and self.kv_len % plan.block_n == 0

    @property
    def slopes(self) -> list[sympy.Expr]:
        """What keys are multiplied with in terms that are added, as far as these are nothing else: see `slope`."""
        return [c for c in (slope(self.op, term) for term in _added(self.op)) if c is not None]

    @property
    def bound(self) -> float | None:
        """What may stand for the maximum of every row, in base 2: scores that the chip's tanh caps are that near to
        each other in bfloat16, which has the range of float32, where nothing is added to them. Between 2⁻¹⁰⁰ and 2⁵² a
        sum of as many keys as there are neither overflows nor vanishes."""
        made, cap = self.op.modification, (self.op.softcap or 0.0) * LOG2_E
        shifted = made is not None and (made.added or made.sink is not None or made.finite)
        return max(0.0, cap - 52.0) if self.plan.native and not shifted and cap <= 76.0 else None

    def setup(self) -> list[str]:
        """Statements before the first block of keys."""
        return [f"slope{i} = {self.printer().number(c, LOG2_E)}" for i, c in enumerate(self.slopes)]

    @property
    def depends(self) -> set[str]:
        """Whether what is visible depends on batch and head."""
        made = self.op.modification
        found = {str(s) for s in made.visible.free_symbols} if made is not None else set()
        by_batch = made is not None and made.mask.padding is not None
        return {n for n in ("batch", "head") if n in found} | ({"batch"} if by_batch else set())

    def printer(self) -> Printer:
        bounds = {
            "query": "" if self.even_rows else f"rows < {size_text(self.q_len)}",
            "key": "" if self.even_keys else f"keys < {size_text(self.kv_len)}",
        }
        exact = all(isinstance(n, int) and n < EXACT for n in (self.q_len, self.kv_len))
        return Printer(self.reads, bounds, exact)

    def visible(self) -> str:
        """The condition that no limit says, or nothing."""
        made = self.op.modification
        return "" if made is None or made.visible == sympy.true else self.printer().truth(made.visible)

    def sink(self) -> str:
        """The sink of the rows in base 2, or nothing."""
        made = self.op.modification
        return "" if made is None or made.sink is None else self.printer().number(made.sink, LOG2_E)

    def modified(self) -> tuple[list[str], float]:
        """Statements for every block of keys, and what `s` is still to be multiplied with."""
        op, made, lines = self.op, self.op.modification, list[str]()
        factor = op.scale * LOG2_E
        if factor <= 0.0:  # the maximum of scores is not that of what they are scaled to
            lines.append(f"s = s * {factor!r}")
            factor = 1.0
        if op.softcap is not None and self.plan.native:
            inner = op.scale / op.softcap if op.scale > 0 else 1 / op.softcap / LOG2_E
            lines.append(f"s = tl.inline_asm_elementwise({TANH}, [s * {inner!r}], tl.float32, True, 1)")
            factor = op.softcap * LOG2_E
        elif op.softcap is not None:
            # cap · tanh(x) = cap − 2 · cap / (1 + e^(2x)), which saturates on both sides without overflowing
            inner = 2 / op.softcap * (op.scale * LOG2_E if op.scale > 0 else 1.0)
            cap = op.softcap * LOG2_E
            lines.append(f"s = {cap!r} - {2 * cap!r} / (1.0 + tl.exp2(s * {inner!r}))")
            factor = 1.0
        visible = "" if self.plan.listed else self.visible()
        if visible or (made is not None and made.added):
            lines.insert(0, KEYS)
        if made is not None and made.added:
            lines += self._added(made, "" if factor == 1.0 else f" * {factor!r}")
            factor = 1.0
        if visible and made is not None and made.finite:
            # scaled before: a multiply-add of the scale and the maximum would leave the rounding of HIDDEN · scale over
            scaled = "s" if factor == 1.0 else f"s * {factor!r}"
            lines.append(f"s = tl.where({visible}, {scaled}, {HIDDEN!r})")
            factor = 1.0
        elif visible:
            lines.append(f's = tl.where({visible}, s, float("-inf"))')
        return lines, factor

    def hidden(self, conditions: tuple[str, ...]) -> list[str]:
        """Statements for blocks of which rows see a part: the keys for which all conditions hold, and where blocks are
        listed also what no limit says."""
        listed = [self.visible()] if self.plan.listed else []
        hiding = [*conditions, *(condition for condition in listed if condition)]
        return [KEYS, f's = tl.where({" & ".join(hiding)}, s, float("-inf"))'] if hiding else []

    def _added(self, made: Modification, scaled: str) -> list[str]:
        printer = self.printer()
        along = [f"(keys - first_row).to(tl.float32) * slope{i}" for i in range(len(self.slopes))]
        others = [term for term in made.added if slope(self.op, term) is None]
        if not made.unknown or not others:
            return [f"s = s{scaled} + {' + '.join([*along, *(printer.number(a, LOG2_E) for a in others)])}"]
        # the least number of a dtype, which hides as a finite fill does, must not become −∞ in base 2
        return [
            f"added = {' + '.join(printer.number(a) for a in others)}",
            f"s = s{scaled} + {' + '.join([*along, f'tl.maximum(added, {HIDDEN / 2!r}) * {LOG2_E!r}'])}",
            's = tl.where(added > float("-inf"), s, float("-inf"))',
        ]


def _added(op: Attention) -> tuple[Any, ...]:
    return op.modification.added if op.modification is not None else ()


def slope(op: Attention, term: Any) -> sympy.Expr | None:
    """c of a term c · (key + what is the same for all keys), as in ALiBi: the softmax of a row is the same whatever key
    0 is taken to be, so that a kernel may count keys from its first row, which is a number for each key and not for
    each score. Nothing is read beside c: what may be no number has to remain."""
    made = op.modification
    if made is None or made.sink is not None or op.logarithm is not None or isinstance(term, Choice) or is_truth(term):
        return None
    key = next((s for s in term.free_symbols if str(s) == "key"), None)
    whole = sympy.expand(term)
    c = whole.coeff(key) if key is not None else sympy.S.Zero
    rest = sympy.expand(whole - c * key) if key is not None else whole
    if c == 0 or key in c.free_symbols | rest.free_symbols or reads_in(sympy.cancel(rest / c)):
        return None
    return c
