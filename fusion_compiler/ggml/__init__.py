"""The block formats of ggml in torch: 32 neighbours of a row share a scale, and lie together as bytes.

| module | bytes of a block | what they are |
|---|---|---|
| `q4_0` | 18 | fp16 d; 16 bytes of two codes, element j low and element j + 16 high; x = (code − 8) · d |
| `q8_0` | 34 | fp16 d; 32 codes of int8; x = code · d |
| `q8_1` | 36 | fp16 d; fp16 s = d · Σ codes; 32 codes of int8; x = code · d. For activations |

Each has `quantise(x)`, `dequantise(raw, dtype)` and `parts(raw)`: plain operations of torch, on any device, which can
be captured in a graph. `Linear` holds a weight in such blocks, `SplitLinear` its codes and scales apart; `exact` is a
product as ggml defines it.
"""

from . import q4_0, q8_0, q8_1
from .linear import Linear
from .reference import exact
from .split import SplitLinear, dequantise, split

__all__ = ["Linear", "SplitLinear", "dequantise", "exact", "q4_0", "q8_0", "q8_1", "split"]
