"""Calls that no pass knows are written out as the calls that they are made of.

torch runs a composite call (hstack, tensordot, an LSTM's cell) as others: the same kernels on the same numbers, so
every output stays bit-identical. Only what nothing downstream has a rule for is written out, since the whole says more
than its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from ..runtime import compat, tracing
from ..runtime.program import Program


def write_out(program: Program, known: Callable[[fx.Node], Any]) -> None:
    """Replace composite calls that are not `known`, in place, until there are none that can be."""
    mode = compat.fake_mode_of(program.graph)
    if mode is None:
        return
    waiting = [node for node in program.graph.nodes if node.op == "call_function"][::-1]
    while waiting:
        node = waiting.pop()
        if not known(node) and _is_whole(node):
            waiting += _written_out(program, node, mode)[::-1]


def _is_whole(node: fx.Node) -> bool:
    """Whether it is composite, changes nothing in place, and gives tensors."""
    value = node.meta.get("val")
    if not all(isinstance(v, Tensor) for v in (value if isinstance(value, list | tuple) else [value])):
        return False
    target = node.target
    return compat.is_composite(target) and not target._schema.is_mutable  # type: ignore[union-attr]  # an overload


def _written_out(program: Program, node: fx.Node, mode: Any) -> list[fx.Node]:
    """The calls in its place; none where it cannot be traced, or only at the sizes of the example."""
    inputs = node.all_input_nodes
    parts = tracing.parts_of(mode, node, inputs)
    if parts is None:
        return []
    made: dict[fx.Node, Any] = dict(zip(parts.graph.find_nodes(op="placeholder"), inputs, strict=True))
    calls = []
    with program.graph.inserting_before(node):
        for part in parts.graph.nodes:
            if part.op != "call_function":
                continue
            call = program.graph.node_copy(part, lambda n: made[n])
            call.meta = {k: v for k, v in node.meta.items() if k != "val"} | {"val": part.meta.get("val")}
            made[part] = call
            calls.append(call)
    (result,) = parts.graph.output_node().args
    _replace(program, node, fx.node.map_arg(result, lambda n: made[n]))
    return calls


def _replace(program: Program, node: fx.Node, result: Any) -> None:
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            program.graph.erase_node(user)
    program.graph.erase_node(node)
