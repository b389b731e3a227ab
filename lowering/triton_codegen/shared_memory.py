"""Plans a tile under the limit of shared memory: what fits, and of what does not, by how much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Tile = TypeVar("Tile")


def within(limit: int, tiles: Iterable[tuple[str, int, Tile]]) -> tuple[list[Tile], list[str]]:
    """Of (label, bytes needed, tile) those that fit into `limit` bytes, and a sentence for each that does not."""
    fitting, rejected = [], []
    for label, needed, tile in tiles:
        if needed <= limit:
            fitting.append(tile)
        else:
            rejected.append(f"{label}: {needed:,} > {limit:,} B of shared memory")
    return fitting, rejected
