"""What Dynamo keeps of a backend's graphs: entries beside the code of each function (`torch._C._dynamo.eval_frame`,
`torch._guards.CompileContext`).

They count towards `recompile_limit`, beyond which Dynamo runs a function eagerly for good, whoever compiles it.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any


def apart(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `fn` and whose code is its own, so that entries for it lie beside no code of the user's."""

    def explained(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    code = explained.__code__.replace()
    return types.FunctionType(code, explained.__globals__, None, None, explained.__closure__)


def forget(backend: Callable[..., Any]) -> None:
    """Drops the entries of `backend`, save beside code that others compiled too."""
    from torch._C._dynamo.eval_frame import reset_code
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    for code in filter(None, [reference() for reference in input_codes.seen]):
        # torch.compile wraps a backend
        backends = [getattr(e.backend, "compiler_fn", e.backend) for e in _debug_get_cache_entry_list(code)]
        if backends and all(b is backend for b in backends):
            reset_code(code)


def is_last_graph() -> bool:
    """Whether the graph being compiled is the last of its function: sizes that it does not serve run eagerly."""
    from torch._dynamo import config
    from torch._guards import CompileContext

    found = CompileContext.current_compile_id()
    return found is not None and (found.frame_compile_id or 0) + 1 >= config.recompile_limit
