"""Moves a program onto a new store with its planned weights as packed integers.

    fake(W)  ->  dequantize(packed W)      everything else is copied as it is

The caller's floating-point tensors are read once and never written; a weight at a time is in memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime import compat
from ..runtime.ops.dequantize import DEQUANTIZE
from ..runtime.ops.quantize import FAKE_QUANTIZE
from ..runtime.plan import Quantize
from ..runtime.program import Entry, Program, value_of
from ..runtime.qtensor import QTensor
from ..runtime.store import Store

aten = torch.ops.aten

# Orders of a parameter's dimensions, see QTensor.dims: of GPT-2's (K, N), and of filters (O, C, kh, kw).
TRANSPOSED, FILTERS = (1, 0), (0, 2, 3, 1)


def pack(program: Program, edits: Mapping[str, Quantize], target: Store) -> Program:
    """Copy the graph onto `target`: fake(W) becomes dequantize(packed W), other tensors move as they are."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        fqn, transposed = _fake_weight(program, node)
        if fqn is not None and fqn in edits:
            values[node] = _read_packed(program, graph, node, fqn, edits[fqn], target, transposed)
        elif node.op == "get_attr" and all(_fake_weight(program, u)[0] for u in _past_transpose(node)):
            continue  # only packed reads are left
        elif node.op == "get_attr":
            values[node] = _get_attr(graph, _moved(program, str(node.target), target), node.meta)
        elif all(n in values for n in node.all_input_nodes):  # else a transposition of a packed weight
            values[node] = graph.node_copy(node, values.__getitem__)
    return Program.of(graph, target, program.contract, program.log)


def _past_transpose(node: fx.Node) -> list[fx.Node]:
    return [u for user in node.users for u in (user.users if user.target is aten.t.default else (user,))]


def _fake_weight(program: Program, node: fx.Node) -> tuple[str | None, bool]:
    """Name of the stored tensor that `node` fake-quantises, and whether through a transposition."""
    if node.op != "call_function" or node.target is not FAKE_QUANTIZE.overload:
        return None, False
    source = node.args[0]
    if isinstance(source, fx.Node) and source.target is aten.t.default:
        return program.tensor_of(source.args[0]), True
    return program.tensor_of(source), False


def _read_packed(
    program: Program, graph: fx.Graph, node: fx.Node, fqn: str, edit: Quantize, target: Store, transposed: bool
) -> fx.Node:
    # Filters lie as (O, kh, kw, C), see runtime.ops.qconv2d; groups run along (C, kh, kw), so those stay as they are.
    for_conv = edit.weight.group_size is None and any(u.target is aten.conv2d.default for u in node.users)
    qtensor = target.get(fqn)
    if not isinstance(qtensor, QTensor):
        weight = program.store.get(fqn)
        assert isinstance(weight, Tensor)
        dims = TRANSPOSED if transposed else FILTERS if for_conv else None
        qtensor = QTensor.quantize(weight.detach(), edit.weight, dims=dims)
        target.put(fqn, qtensor)
        before, after = weight.numel() * weight.element_size(), qtensor.nbytes
        program.log.append(Entry(stage="lower", rule="pack.weight", where=fqn, bytes_before=before, bytes_after=after))
    mode = compat.fake_mode_of(program.graph)
    reads = [
        _get_attr(graph, f"{fqn}.{part}", {"val": compat.fake_tensor(mode, tensor)} if mode is not None else {})
        if tensor is not None
        else None
        for part, tensor in (("codes", qtensor.codes), ("scale", qtensor.scale), ("zero_point", qtensor.zero_point))
    ]
    args = (*reads, list(qtensor.shape), qtensor.scheme.spell(), value_of(node).dtype)
    read = graph.call_function(DEQUANTIZE.overload, args)
    read.meta = dict(node.meta)
    if for_conv:
        read = graph.call_function(aten.permute.default, (read, [0, 3, 1, 2]))
        read.meta = dict(node.meta)
    return read


def _get_attr(graph: fx.Graph, name: str, meta: Mapping[str, Any]) -> fx.Node:
    node = graph.get_attr(name)
    node.meta = dict(meta)
    return node


def _moved(program: Program, name: str, target: Store) -> str:
    """Name in `target` of a tensor of the program's store, put there unless an earlier variant did."""
    tensor = program.store.get(name)
    assert isinstance(tensor, Tensor)
    if name.startswith("constants."):
        return target.constant(tensor)
    if target.get(name) is None:
        target.put(name, tensor, persistent=program.store.is_persistent(name))
    return name
