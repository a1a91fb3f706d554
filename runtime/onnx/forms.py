"""Spellings that ONNX Runtime's CPU provider runs fast: rewrites of an exported graph, exact but for rounding.

    gelu        com.microsoft::Gelu, which is the fastest (1024x1536: 1.01 ms; ai.onnx tanh form 1.39)
    bias        in front of a Gelu the shape (1, N), else ORT fuses both to BiasGelu (2.01 ms)
    residual    Sum + LayerNormalization, else ORT fuses Add to SkipLayerNormalization (1024x384: 1.99 ms
                against .41)
    attention   ai.onnx::Attention on (B, S, H D) operands, without four transposes
    mask        a boolean mask becomes one float mask for all layers, 0 or -1e4, with ORT's two last dimensions

Why -1e4: sharp attention has scores a hundred apart, and a hidden place that leads by that must still get e^-104 or
less, which is 0. From -87 to -104 the results are denormal numbers, the slowest there are (softmax of 12288x128 on
Zen 5: .68 ms; -50 and -1e4 .40; trained MiniLM, padded 8x128: -50 52.7 ms, -1e4 52.9). A core that is slow where exp
underflows was once seen to take 38 ms in place of 3 in six such layers: there, set `session.set_denormal_as_zero`.
A row that may look at nothing gets a mean of what is hidden, where torch gives zeros; such rows are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

HIDDEN = -1e4
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
    """Attention's mask -> a float mask over all queries and keys, made once."""
    floats: dict[ir.Value, ir.Value] = {}
    whole: dict[tuple[ir.Value, str], ir.Value] = {}
    for node in _calls(graph, "Attention"):
        value = node.inputs[3] if len(node.inputs) > 3 else None
        if value is None:
            continue
        if value.dtype == ir.DataType.BOOL:
            if value not in floats:
                floats[value] = _float_mask(graph, node, value)
            value = floats[value]
        if value.shape is not None and 1 in tuple(value.shape)[-2:]:
            lengths = value, str([_length(x) for x in node.inputs[:2]])
            if lengths not in whole:
                whole[lengths] = _expanded(graph, node, value)
            value = whole[lengths]
        node.replace_input_with(3, value)


def _float_mask(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    zero = _initializer(graph, "mask_visible", np.zeros((), np.float32))
    hidden = _initializer(graph, "mask_hidden", np.full((), HIDDEN, np.float32))
    where = ir.Node("", "Where", [value, zero, hidden], num_outputs=1)
    where.outputs[0].dtype, where.outputs[0].shape = ir.DataType.FLOAT, value.shape
    graph.insert_before(node, where)
    return where.outputs[0]


def _expanded(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """`value` as (..., queries, keys): ORT broadcasts a mask over batch and heads alone."""
    length = [ir.AttrInt64("start", -2), ir.AttrInt64("end", -1)]  # of (B, S, H D) and of (B, H, S, D)
    shapes = [ir.Node("", "Shape", [x], length, num_outputs=1) for x in node.inputs[:2]]
    shape = ir.Node("", "Concat", [s.outputs[0] for s in shapes], [ir.AttrInt64("axis", 0)], num_outputs=1)
    expand = ir.Node("", "Expand", [value, shape.outputs[0]], num_outputs=1)
    expand.outputs[0].type = value.type
    graph.insert_before(node, [*shapes, shape, expand])
    return expand.outputs[0]


def _length(value: ir.Value | None) -> object:
    """Of queries or keys."""
    return value.shape[-2] if value is not None and value.shape is not None else value


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
