"""Where figures come from: device, versions, commit and the command that makes them again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def _git(*args: str) -> str:
    try:
        done = subprocess.run(("git", *args), capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything needed to make the figures again."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        name = {"name": found.name, "memory_bytes": found.total_memory, "sms": found.multi_processor_count}
    else:
        name = {"name": _cpu_name(), "threads": torch.get_num_threads()}
    return {
        # where a file lay on that machine is nobody else's business: its name says enough
        "command": shlex.join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}"]
            + [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        # a copy of the tree without its history can be told where it comes from
        "commit": os.environ.get("GIT_COMMIT") or _git("rev-parse", "--verify", "--quiet", "HEAD") or None,
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": {"type": device.type, **name},
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {p: _version(p) for p in ("triton", "transformers", "fusion_compiler")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
