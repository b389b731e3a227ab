"""Where torch keeps what it compiled (`torch._inductor.runtime.cache_dir_utils`, `config.force_disable_caches`).

Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from pathlib import Path


def cache_folder(name: str) -> Path | None:
    """A folder of ours inside Inductor's cache, which may not exist yet; None where torch's caches are switched off."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return None if config.force_disable_caches else Path(cache_dir()) / "fusion_compiler" / name
