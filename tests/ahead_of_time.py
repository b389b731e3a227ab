"""Compiles the kernels of a test module for machines that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compile_all(module: str, *arguments: Any) -> Any:
    """What `compile_all(*arguments)` of a test module returns, in a process of its own: Triton's interpreter, which the
    other tests choose for theirs, compiles nothing."""
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    code = f"import json, {module} as t; print(json.dumps(t.compile_all(*{arguments!r})))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
