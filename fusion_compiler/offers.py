"""What the lowerings offer for the forms of a match, and what several matches of a graph would pay for together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .candidates import Candidate, Lowering, Unavailable
from .fused import Declared, FusedOp, MatmulFamily, MatmulGroup, RopeCache, Site, StoredAttention
from .legality import Legality, is_empty
from .machine import Machine
from .match import Match
from .torch_private import symbols


@dataclass(frozen=True)
class Offer:
    """What the lowerings have for one alternative of a match. `unavailable` says, by lowering, why there is nothing;
    a legality refusal of the alternative belongs there too."""

    op: FusedOp
    site: Site
    candidates: tuple[Candidate, ...] = ()
    unavailable: tuple[tuple[str, Unavailable], ...] = ()


def offer(op: FusedOp, site: Site, machine: Machine, lowerings: Iterable[Lowering]) -> Offer:
    """Asks every lowering."""
    candidates: list[Candidate] = []
    unavailable: list[tuple[str, Unavailable]] = []
    for lowering in lowerings:
        found = lowering.candidates(op, machine)
        if isinstance(found, Unavailable):
            unavailable.append((lowering.name, found))
        else:
            candidates.extend(found)
    return Offer(op, site, tuple(candidates), tuple(unavailable))


def offers_of(match: Match, legality: Legality, target: Machine, offering: Sequence[Lowering]) -> list[Offer]:
    """What there is for each form of a match; nothing where no form can be judged."""
    if unknown_size(match.site) is not None or is_empty(match.site.output):
        return []
    offers = []
    for op, site in ((match.op, match.site), *match.alternatives):
        packed = isinstance(op, (MatmulFamily, MatmulGroup)) and any(part.packed for part in op.parts)
        codes = isinstance(op, StoredAttention) or packed or (isinstance(op, RopeCache) and op.codes is not None)
        refusal = legality.check(site, complex_numbers=isinstance(op, Declared), codes=codes)
        if refusal is None:
            offers.append(offer(op, site, target, offering))
        else:
            offers.append(Offer(op, site, unavailable=(("legality", Unavailable(refusal)),)))
    return offers


def shared(matches: Sequence[Match], offered: Sequence[list[Offer]]) -> Iterator[list[Offer]]:
    """The offers with what a graph pays once divided among the places that could share it."""
    sharing = {
        match.site.output
        for match, offers in zip(matches, offered, strict=True)
        if any(c.once for o in offers for c in o.candidates)
    }
    for offers in offered:
        yield [
            replace(
                o,
                candidates=tuple(
                    replace(c, seconds=c.seconds + c.once / len(sharing)) if c.once else c for c in o.candidates
                ),
            )
            for o in offers
        ]


def unknown_size(site: Site) -> int | torch.SymInt | None:
    """A size that had no value when the graph was traced."""
    values = (node.meta.get("val") for node in (site.output, *site.operands))
    sizes = (size for v in values if isinstance(v, torch.Tensor) for size in v.shape)
    return next((size for size in sizes if not symbols.is_known(size)), None)
