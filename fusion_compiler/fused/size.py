"""The type of a size."""

from __future__ import annotations

import torch

Size = int | torch.SymInt
