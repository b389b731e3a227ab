"""Weights that a graph computes from packed codes: what they stand for is proved from how they are computed.

| module | |
|---|---|
| `elements` | single elements of integer and float tensors: which bits of which tensor, and what is done with them |
| `walk` | the elements of a node at given places, asked back through views, shifts, casts and arithmetic |
| `packed` | from the elements of a weight to its layout: `fused.Packed`, or a sentence |
| `recognise` | the linears of a graph that read such weights |
"""

from .packed import Storage, storage_of
from .recognise import find_quantised, with_packed_weights

__all__ = ["Storage", "find_quantised", "storage_of", "with_packed_weights"]
