"""Moves a program onto a new store with its planned weights as packed integers.

    fake(W)  ->  dequantize(packed W)      everything else is copied as it is
    W        ->  dequantize(packed W)      where an earlier variant packed it

The caller's floating-point tensors are read once and never written; a weight at a time is in memory twice. Variants
may differ in what they make of one tensor: packed as it lies or transposed, with a batch norm folded in or without.
The first keeps the tensor's name, another form gets a name of its own (`Store.forms`).
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

# How a packed tensor lies, against the model's: the ends of what `Store.forms` says.
PLAIN, TRANSPOSED, FILTERS = "plain", "transposed", "filters"


def pack(program: Program, edits: Mapping[str, Quantize], target: Store) -> Program:
    """Copy the graph onto `target`: fake(W) becomes dequantize(packed W), other tensors move as they are."""
    graph = fx.Graph()
    packed = Program.of(graph, target, program.contract, program.log)
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        fqn, transposed = _fake_weight(program, node)
        if fqn is not None and fqn in edits:
            name, form = _packed(program, node, fqn, edits[fqn], packed, transposed)
            values[node] = _read_packed(graph, node, target, name, form)
        elif node.op == "get_attr" and all(_fake_weight(program, u)[0] for u in _past_transpose(node)):
            continue  # only packed reads are left
        elif node.op == "get_attr":
            values[node] = _moved(program, node, graph, target)
        elif all(n in values for n in node.all_input_nodes):  # else a transposition of a packed weight
            values[node] = graph.node_copy(node, values.__getitem__)
    return Program.of(graph, target, program.contract, packed.log)


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


def _packed(
    program: Program, node: fx.Node, fqn: str, edit: Quantize, packed: Program, transposed: bool
) -> tuple[str, str]:
    """Name and lie of the QTensor in the target, made unless an earlier variant left it there."""
    # Filters lie as (O, kh, kw, C), see runtime.ops.qconv2d; groups run along (C, kh, kw), so those stay as they are.
    for_conv = edit.weight.group_size is None and any(u.target is aten.conv2d.default for u in node.users)
    lie = TRANSPOSED if transposed else FILTERS if for_conv else PLAIN
    target, form = packed.store, _packed_form(program, fqn, lie)
    name = _free_name(target, fqn, form)
    if target.get(name) is None:
        weight = program.store.get(fqn)
        assert isinstance(weight, Tensor)
        qtensor = QTensor.quantize(_laid(weight.detach(), lie), edit.weight)
        target.put(name, qtensor)
        target.forms[name] = form
        before, after = weight.numel() * weight.element_size(), qtensor.nbytes
        packed.log.append(Entry(stage="lower", rule="pack.weight", where=name, bytes_before=before, bytes_after=after))
    return name, lie


def _packed_form(program: Program, fqn: str, lie: str) -> str:
    return f"{program.store.forms.get(fqn, PLAIN)}_packed_{lie}"


def _laid(weight: Tensor, lie: str) -> Tensor:
    return weight.t() if lie == TRANSPOSED else weight.permute(0, 2, 3, 1) if lie == FILTERS else weight


def _free_name(target: Store, name: str, form: str) -> str:
    """`name` where the target has nothing or this form there, else one made of both."""
    known = target.forms.get(name, PLAIN)
    return name if target.get(name) is None or known == form else f"{name}_{form}"


def _read_packed(graph: fx.Graph, like: fx.Node, target: Store, name: str, lie: str) -> fx.Node:
    """dequantize(packed W) as `like` gives it: filters back in their order, a transposed weight as it was packed."""
    qtensor = target.get(name)
    assert isinstance(qtensor, QTensor)
    mode = compat.fake_mode_of(like.graph)
    reads = [
        _get_attr(graph, f"{name}.{part}", {"val": compat.fake_tensor(mode, tensor)} if mode is not None else {})
        if tensor is not None
        else None
        for part, tensor in (("codes", qtensor.codes), ("scale", qtensor.scale), ("zero_point", qtensor.zero_point))
    ]
    args = (*reads, list(qtensor.shape), qtensor.scheme.spell(), value_of(like).dtype)
    read = graph.call_function(DEQUANTIZE.overload, args)
    read.meta = dict(like.meta)
    if lie == FILTERS:
        read = graph.call_function(aten.permute.default, (read, [0, 3, 1, 2]))
        read.meta = dict(like.meta)
    return read


def _get_attr(graph: fx.Graph, name: str, meta: Mapping[str, Any]) -> fx.Node:
    node = graph.get_attr(name)
    node.meta = dict(meta)
    return node


def _moved(program: Program, node: fx.Node, graph: fx.Graph, target: Store) -> fx.Node:
    """A read of the program's tensor in the target: put there, left by an earlier variant, or packed by one."""
    name = str(node.target)
    tensor, form = program.store.get(name), program.store.forms.get(name, PLAIN)
    assert isinstance(tensor, Tensor)
    if name.startswith("constants."):
        return _get_attr(graph, target.constant(tensor), node.meta)
    known = target.forms.get(name, PLAIN)
    if isinstance(target.get(name), QTensor):
        lie = next(lie for lie in (TRANSPOSED, FILTERS, PLAIN) if known.endswith(lie))
        if known == _packed_form(program, name, lie):
            read = _read_packed(graph, node, target, name, lie)
            if lie == TRANSPOSED:
                read = graph.call_function(aten.t.default, (read,))
                read.meta = dict(node.meta)
            return read
        form = f"{form}_float"
    name = _free_name(target, name, form)
    if target.get(name) is None:
        target.adopt(name, tensor, persistent=program.store.is_persistent(str(node.target)))
        target.forms[name] = form
    return _get_attr(graph, name, node.meta)
