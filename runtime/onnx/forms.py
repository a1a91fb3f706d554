"""Spellings that ONNX Runtime's CPU provider runs fast: rewrites of an exported graph, exact but for rounding.

    gelu        com.microsoft::Gelu, which is the fastest (1024x1536: 1.01 ms; ai.onnx tanh form 1.39)
    bias        in front of a Gelu the shape (1, N), else ORT fuses both to BiasGelu (2.01 ms)
    residual    Sum + LayerNormalization, else ORT fuses Add to SkipLayerNormalization (1024x384: 1.99 ms
                against .41)
    attention   ai.onnx::Attention on (B, S, H D) operands, without four transposes
    mask        a boolean mask becomes one float mask for all layers, 0 or -50

Why -50 and not -inf or the least float: exp of those gives denormal numbers, which cost 38 ms in place of 3 in
six layers of padded input; e^-50 is 2e-22, below fp32 rounding unless a hidden place leads by more than 30. A
row that may look at nothing gets a mean of what is hidden, where torch gives zeros; such rows are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

HIDDEN = -50.0
CONTRIB = "com.microsoft"


def rewrite(model: ir.Model) -> None:
    """Apply every form, then remove what is no longer read."""
    for form in FORMS:
        form(model.graph)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.DeduplicateInitializersPass()(model)
    common.TopologicalSortPass()(model)
    model.graph.opset_imports[CONTRIB] = 1


def gelu(graph: ir.Graph) -> None:
    """Gelu -> com.microsoft::Gelu."""
    for node in _calls(graph, "Gelu"):
        approximate = node.attributes.get("approximate")
        if approximate is None or approximate.as_string() == "none":
            _replace(graph, node, "Gelu", [node.inputs[0]], domain=CONTRIB)


def bias(graph: ir.Graph) -> None:
    """Gelu(x + b) with b (N,) -> (1, N)."""
    for node in _calls(graph, "Gelu", CONTRIB):
        add = _producer(node.inputs[0], "Add")
        for place, value in enumerate(add.inputs if add else ()):
            constant = value.const_value if value is not None else None
            if add is None or value is None or constant is None or len(constant.shape) != 1:
                continue
            row = _initializer(graph, f"{value.name}_row", constant.numpy().reshape(1, -1))
            add.replace_input_with(place, row)


def residual(graph: ir.Graph) -> None:
    """LayerNormalization(x + y) with x and y of one rank: Add -> Sum."""
    for node in _calls(graph, "LayerNormalization"):
        add = _producer(node.inputs[0], "Add")
        if add is not None and not any(v is None or v.const_value is not None for v in add.inputs):
            _replace(graph, add, "Sum", add.inputs)


def attention(graph: ir.Graph) -> None:
    """Attention on (B, H, S, D) made by Reshape and Transpose, and unmade after -> on (B, S, H D)."""
    for node in _calls(graph, "Attention"):
        operands = [_heads_source(value) for value in node.inputs[:3]]
        users = [usage.node for usage in node.outputs[0].uses()]
        if None in operands or len(users) != 1 or not _is_transpose(users[0]):
            continue
        merged = [usage.node for usage in users[0].outputs[0].uses()]
        if len(merged) != 1 or merged[0].op_type != "Reshape" or _rank(merged[0].outputs[0]) != 3:
            continue
        sources, heads = zip(*(o for o in operands if o is not None), strict=True)
        attributes = {name: a for name, a in node.attributes.items() if name not in ("q_num_heads", "kv_num_heads")}
        attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads[0])
        attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads[1])
        new = ir.Node("", "Attention", [*sources, *node.inputs[3:]], list(attributes.values()), num_outputs=1)
        graph.insert_before(node, new)
        _take_over(merged[0].outputs[0], new.outputs[0], graph)


def mask(graph: ir.Graph) -> None:
    """Attention's boolean mask -> a float mask, made once."""
    known: dict[ir.Value, ir.Value] = {}
    for node in _calls(graph, "Attention"):
        value = node.inputs[3] if len(node.inputs) > 3 else None
        if value is None or value.dtype != ir.DataType.BOOL:
            continue
        if value not in known:
            zero = _initializer(graph, "mask_visible", np.zeros((), np.float32))
            hidden = _initializer(graph, "mask_hidden", np.full((), HIDDEN, np.float32))
            where = ir.Node("", "Where", [value, zero, hidden], num_outputs=1)
            where.outputs[0].dtype, where.outputs[0].shape = ir.DataType.FLOAT, value.shape
            graph.insert_before(node, where)
            known[value] = where.outputs[0]
        node.replace_input_with(3, known[value])


FORMS: tuple[Callable[[ir.Graph], None], ...] = (gelu, bias, residual, attention, mask)


def _calls(graph: ir.Graph, op_type: str, domain: str = "") -> Iterator[ir.Node]:
    yield from [node for node in graph if node.op_type == op_type and node.domain == domain]


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _replace(graph: ir.Graph, node: ir.Node, op_type: str, inputs: object, domain: str = "") -> None:
    new = ir.Node(domain, op_type, list(inputs), num_outputs=1)  # type: ignore[call-overload]  # values
    graph.insert_before(node, new)
    _take_over(node.outputs[0], new.outputs[0], graph)


def _take_over(old: ir.Value, new: ir.Value, graph: ir.Graph) -> None:
    """`new` is read wherever `old` was, under its name where that is an output's."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, None
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    shape = ir.Shape(list(array.shape))
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _is_transpose(node: ir.Node) -> bool:
    perm = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return perm is not None and tuple(perm.as_ints()) == (0, 2, 1, 3)


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else -1


def _heads_source(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """For Transpose(Reshape(x)) of x (B, S, H D) to (B, H, S, D): x and H."""
    node = value.producer() if value is not None else None
    if node is None or not _is_transpose(node):
        return None
    split = _producer(node.inputs[0], "Reshape")
    source = split.inputs[0] if split is not None else None
    if split is None or source is None or _rank(source) != 3 or _rank(split.outputs[0]) != 4:
        return None
    _, sequence, heads, width = split.outputs[0].shape  # type: ignore[misc]  # of rank 4
    _, length, columns = source.shape  # type: ignore[misc]  # of rank 3
    if not isinstance(heads, int) or not isinstance(width, int):
        return None
    # Equal lengths: the reshape splits the last dimension alone.
    return (source, heads) if columns == heads * width and length == sequence else None
