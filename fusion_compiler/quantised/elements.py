"""Single elements of tensors, many at once: each column of these tables belongs to one element.

A `Bits` is an integer read from consecutive bits of a tensor; a `Number` is a sum of products of bits, of floats read
from tensors, and of constants. Both say exactly what is computed, up to the rounding of floats, for whatever the
tensors hold: nothing is tried out, so nothing can be missed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

# Integers up to here are exact in a type.
EXACT = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}


def is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


@dataclass(frozen=True)
class Bits:
    """`width` bits of `source` from `bit` on, counted from its first byte, moved left by `left`; in two's complement
    where `signed`. `dtype` is the integer type that holds it."""

    source: Node
    bit: Tensor  # int64 [P]
    width: Tensor
    left: Tensor
    signed: bool
    dtype: torch.dtype

    def bounds(self) -> tuple[Tensor, Tensor]:
        most = torch.ones_like(self.width) << self.width
        low, high = (-(most >> 1), (most >> 1) - 1) if self.signed else (torch.zeros_like(most), most - 1)
        return low << self.left, high << self.left

    def masked(self, mask: int) -> Bits | None:
        """`self & mask` for a mask of consecutive ones."""
        mask &= 2 ** (8 * self.dtype.itemsize) - 1
        low = (mask & -mask).bit_length() - 1
        ones = mask >> max(low, 0)
        if not mask or ones & (ones + 1):
            return None
        if low > 0:
            moved = self.right(torch.full_like(self.left, low))
            kept = None if moved is None else moved.masked(ones)
            return None if kept is None else replace(kept, left=kept.left + low)
        count = ones.bit_length()
        if count == 8 * self.dtype.itemsize:
            return self
        if bool((self.left > 0).any()) or (self.signed and bool((self.width < count).any())):
            return None  # copies of the sign would stay
        return replace(self, width=self.width.clamp(max=count), signed=False)

    def right(self, by: Tensor) -> Bits | None:
        if bool(((by < 0) | (by >= 8 * self.dtype.itemsize)).any()):
            return None
        back = torch.minimum(self.left, by)
        dropped = by - back
        if bool((dropped >= self.width).any()):
            return None
        return replace(self, bit=self.bit + dropped, width=self.width - dropped, left=self.left - back)

    def moved_left(self, by: Tensor) -> Bits | None:
        size = 8 * self.dtype.itemsize
        if bool(((by < 0) | (by >= size)).any()):
            return None
        left = self.left + by
        width = torch.minimum(self.width, size - left)
        if bool((width < 1).any()):
            return None
        at_top = width + left == size
        holds_signs = self.dtype.is_signed
        if holds_signs and self.signed != bool(at_top.all()) and bool(at_top.any()):
            if not bool(at_top.all()):
                return None
            return replace(self, width=width, left=left, signed=True)
        return replace(self, width=width, left=left)

    def cast(self, dtype: torch.dtype) -> Bits | None:
        """As another integer type, which may hold fewer bits."""
        low, high = self.bounds()
        limits = torch.iinfo(dtype)
        if bool(((low >= limits.min) & (high <= limits.max)).all()):
            return replace(self, dtype=dtype)
        size = 8 * dtype.itemsize
        if bool((self.left > 0).any() | (self.width < size).any()):
            return None
        return replace(self, width=torch.full_like(self.width, size), signed=dtype.is_signed, dtype=dtype)


@dataclass(frozen=True)
class Read:
    """A float of `dtype` that lies `byte` bytes behind the first byte of `source`."""

    source: Node
    byte: Tensor  # int64 [P]
    dtype: torch.dtype


Atom = Bits | Read


def key(atom: Atom) -> tuple[str, str]:
    """What distinguishes kinds of atoms: the same for all elements of a table."""
    return type(atom).__name__, atom.source.name


@dataclass(frozen=True)
class Term:
    """factor · the product of the atoms."""

    factor: Tensor  # float64 [P]
    atoms: tuple[Atom, ...]

    @property
    def key(self) -> tuple[tuple[str, str], ...]:
        return tuple(key(a) for a in self.atoms)


@dataclass(frozen=True)
class Number:
    """The sum of its terms; `dtype` is the type that holds it."""

    terms: tuple[Term, ...]
    dtype: torch.dtype

    def __add__(self, other: Number) -> Number:
        terms = list(self.terms)
        for term in other.terms:
            same = next((i for i, t in enumerate(terms) if _same_atoms(t, term)), None)
            if same is None:
                terms.append(term)
            else:
                terms[same] = Term(terms[same].factor + term.factor, term.atoms)
        return Number(tuple(terms), self.dtype)

    def __mul__(self, other: Number) -> Number:
        product = Number((), self.dtype)
        for a in self.terms:
            for b in other.terms:
                atoms = tuple(sorted((*a.atoms, *b.atoms), key=key))
                product = product + Number((Term(a.factor * b.factor, atoms),), self.dtype)
        return product

    def scaled(self, by: float) -> Number:
        return Number(tuple(Term(t.factor * by, t.atoms) for t in self.terms), self.dtype)

    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Of a number computed from integers, and where it is one."""
        low = high = None
        for term in self.terms:
            if any(isinstance(a, Read) for a in term.atoms) or len(term.atoms) > 1:
                return None
            ends = [end.double() * term.factor for end in term.atoms[0].bounds()] if term.atoms else [term.factor] * 2  # type: ignore[union-attr]
            least, most = torch.minimum(*ends), torch.maximum(*ends)
            low, high = (least, most) if low is None or high is None else (low + least, high + most)
        return None if low is None or high is None else (low, high)

    def fits(self) -> bool:
        """Whether no integer operation can have wrapped."""
        limits, bounds = torch.iinfo(self.dtype), self.bounds()
        return bounds is not None and bool((bounds[0] >= limits.min).all() and (bounds[1] <= limits.max).all())


Element = Bits | Number


def constant(values: Tensor, dtype: torch.dtype) -> Number:
    return Number((Term(values.double(), ()),), dtype)


def is_constant(element: Element) -> bool:
    return isinstance(element, Number) and all(not t.atoms for t in element.terms)


def number(element: Element, dtype: torch.dtype | None = None) -> Number | None:
    """An element as a number of `dtype`; None where a float type would round the integer."""
    wanted = dtype or element.dtype
    if isinstance(element, Bits):
        if wanted.is_floating_point and int(max(abs(e).max() for e in element.bounds())) > EXACT[wanted]:
            return None
        factor = (torch.ones_like(element.left) << element.left).double()
        return Number((Term(factor, (replace(element, left=torch.zeros_like(element.left)),)),), wanted)
    if wanted.is_floating_point and is_integer(element.dtype):
        bounds = element.bounds()
        if bounds is None or float(max(abs(e).max() for e in bounds)) > EXACT[wanted]:
            return None
    return replace(element, dtype=wanted)


def _same_atoms(a: Term, b: Term) -> bool:
    return a.key == b.key and all(_columns_equal(p, q) for p, q in zip(a.atoms, b.atoms, strict=True))


def _columns_equal(a: Atom, b: Atom) -> bool:
    if isinstance(a, Bits) and isinstance(b, Bits):
        return a.signed == b.signed and torch.equal(a.bit, b.bit) and torch.equal(a.width, b.width)
    return isinstance(a, Read) and isinstance(b, Read) and a.dtype == b.dtype and torch.equal(a.byte, b.byte)


def joined(parts: list[tuple[Tensor, Element]], count: int) -> Element | None:
    """One table from several: each part with the places of its elements. None where they are computed differently."""
    first = parts[0][1]

    def columns(pick: Callable[[Element], Tensor]) -> Tensor:
        found = pick(first).new_empty(count)
        for places, element in parts:
            found[places] = pick(element)
        return found

    if isinstance(first, Bits):
        alike = all(
            isinstance(e, Bits) and (e.source, e.signed, e.dtype) == (first.source, first.signed, first.dtype)
            for _, e in parts
        )
        if not alike:
            return None
        picked = [columns(lambda e, name=name: getattr(e, name)) for name in ("bit", "width", "left")]  # type: ignore[misc]
        return replace(first, bit=picked[0], width=picked[1], left=picked[2])
    ordered: list[tuple[Tensor, tuple[Term, ...]]] = []
    for places, element in parts:
        if not isinstance(element, Number) or element.dtype != first.dtype:
            return None
        ordered.append((places, tuple(sorted(element.terms, key=lambda t: t.key))))
    if len({tuple(t.key for t in terms) for _, terms in ordered}) > 1:
        return None
    made = []
    for i, term in enumerate(ordered[0][1]):
        of_term = [(places, terms[i]) for places, terms in ordered]
        factor = torch.empty(count, dtype=torch.float64)
        for places, t in of_term:
            factor[places] = t.factor
        atoms = []
        for j, atom in enumerate(term.atoms):
            together = joined_atoms([(places, t.atoms[j]) for places, t in of_term], count)
            if together is None:
                return None
            atoms.append(together)
            assert key(atom) == key(together)
        made.append(Term(factor, tuple(atoms)))
    return Number(tuple(made), first.dtype)


def joined_atoms(parts: list[tuple[Tensor, Atom]], count: int) -> Atom | None:
    first = parts[0][1]
    if isinstance(first, Bits):
        together = joined([(places, atom) for places, atom in parts if isinstance(atom, Bits)], count)
        return together if isinstance(together, Bits) else None
    if any(atom.dtype != first.dtype for _, atom in parts):
        return None
    byte = torch.empty(count, dtype=torch.int64)
    for places, atom in parts:
        assert isinstance(atom, Read)
        byte[places] = atom.byte
    return replace(first, byte=byte)
