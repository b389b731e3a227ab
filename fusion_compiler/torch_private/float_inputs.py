"""Python floats that Dynamo made inputs of a graph (`torch._dynamo.symbolic_convert.TensorifyState`).

With dynamic=True Dynamo passes every float that it finds in an attribute as a 0-d float64 tensor, a norm's eps and an
attention's scale among them. Those of modules are constants of the model: they are wanted as numbers, guarded by value.
Raising `TensorifyScalarRestartAnalysis` from a backend is how torch's own passes ask for that: Dynamo traces again.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.fx import GraphModule


def specialize_module_floats(gm: GraphModule) -> None:
    """Has a Dynamo graph traced again with the floats of its modules as constants; returns if there are none."""
    found = False
    for node in gm.graph.find_nodes(op="placeholder"):
        argument, example = node.meta.get("grapharg"), node.meta.get("example_value")
        if argument is None or not getattr(argument, "pass_arg_as_tensor", False):
            continue
        symbol = getattr(getattr(example, "item_memo", None), "node", None)
        if symbol is None or not _is_of_a_module(argument.source):
            continue
        name = str(symbol._expr)
        if not TensorifyState.should_specialize(name):  # asked for before, and in vain
            TensorifyState.specialize(name)
            found = True
    if found:
        raise TensorifyScalarRestartAnalysis


def _is_of_a_module(source: object) -> bool:
    """Whether a value was read from an attribute of a module, whatever torch makes of that module."""
    return "NN_MODULE" in str(getattr(getattr(source, "guard_source", None), "name", ""))
