"""Python floats that Dynamo made inputs of a graph (`torch._dynamo.symbolic_convert.TensorifyState`).

With dynamic=True Dynamo passes every float that it finds in an attribute as a 0-d float64 tensor, a norm's eps and an
attention's scale among them, and so is what it finds in globals, `math.pi` for one. Both are constants of the model:
they are wanted as numbers, guarded by value; an argument of the model stays an input.
Raising `TensorifyScalarRestartAnalysis` from a backend is how torch's own passes ask for that: Dynamo traces again.
Tried on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.fx import GraphModule


def specialize_constant_floats(gm: GraphModule) -> None:
    """Has a Dynamo graph traced again with the floats of modules and globals as numbers; returns if there are none."""
    found = False
    for node in gm.graph.find_nodes(op="placeholder"):
        argument, example = node.meta.get("grapharg"), node.meta.get("example_value")
        if argument is None or not getattr(argument, "pass_arg_as_tensor", False):
            continue
        symbol = getattr(getattr(example, "item_memo", None), "node", None)
        if symbol is None or not _is_of_the_model(argument.source):
            continue
        name = str(symbol._expr)
        if not TensorifyState.should_specialize(name):  # asked for before, and in vain
            TensorifyState.specialize(name)
            found = True
    if found:
        raise TensorifyScalarRestartAnalysis


def _is_of_the_model(source: object) -> bool:
    """Whether a value was read from an attribute of a module, whatever torch makes of that module, or from a global."""
    name = str(getattr(getattr(source, "guard_source", None), "name", ""))
    return "NN_MODULE" in name or name == "GLOBAL"
