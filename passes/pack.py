"""Moves a program onto a new store with its planned weights as packed integers.

    fake(W)  ->  dequantize(packed W)      everything else is copied as it is
    W        ->  dequantize(packed W)      where an earlier variant packed it

The caller's floating-point tensors are read once and never written; a weight at a time is in memory twice. Variants
may differ in what they make of one tensor: packed as it lies or transposed, with a batch norm folded in or without.
The first keeps the tensor's name, another form gets a number after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime import compat
from ..runtime.numerics import Params
from ..runtime.ops.dequantize import DEQUANTIZE
from ..runtime.ops.quantize import FAKE_QUANTIZE
from ..runtime.plan import Quantize
from ..runtime.program import Entry, Program, value_of
from ..runtime.qtensor import QTensor
from ..runtime.store import Store

aten = torch.ops.aten

# Orders of a parameter's dimensions, see QTensor.dims: of GPT-2's (K, N), and of filters (O, C, kh, kw).
TRANSPOSED, FILTERS = (1, 0), (0, 2, 3, 1)

# In `Store.forms`: a tensor is the model's of that name.
PLAIN = "plain"


def pack(program: Program, edits: Mapping[str, Quantize], target: Store) -> Program:
    """Copy the graph onto `target`: fake(W) becomes dequantize(packed W), other tensors move as they are."""
    graph = fx.Graph()
    packed = Program.of(graph, target, program.contract, program.log)
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        fqn, transposed = _fake_weight(program, node)
        if fqn is not None and fqn in edits:
            name = _packed(program, node, fqn, edits[fqn], packed, transposed)
            values[node] = _read_packed(graph, node, target, name, as_stored=transposed)
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


def _packed(program: Program, node: fx.Node, fqn: str, edit: Quantize, packed: Program, transposed: bool) -> str:
    """Name of the QTensor in the target, made unless an earlier variant left it there."""
    weight, form = program.store.get(fqn), program.store.forms.get(fqn, PLAIN)
    assert isinstance(weight, Tensor)
    # Filters lie as (O, kh, kw, C), see runtime.ops.qconv2d; groups run along (C, kh, kw), so those stay as they are.
    for_conv = edit.weight.granularity != "group" and any(u.target is aten.conv2d.default for u in node.users)
    dims = TRANSPOSED if transposed else FILTERS if for_conv else tuple(range(weight.dim()))
    target = packed.store
    name = _free_name(target, fqn, form, dims)
    if target.get(name) is None:
        scale, zero = (_stored(program, argument) for argument in node.args[1:3])
        params = None if scale is None else Params(scale, zero)
        qtensor = QTensor.quantize(weight.detach(), edit.weight.nearest, params, dims=dims)
        target.put(name, qtensor)
        target.forms[name] = form
        before, after = weight.numel() * weight.element_size(), qtensor.nbytes
        packed.log.append(Entry(stage="lower", rule="pack.weight", where=name, bytes_before=before, bytes_after=after))
    return name


def _stored(program: Program, node: object) -> Tensor | None:
    name = program.tensor_of(node)
    value = None if name is None else program.store.get(name)
    return value if isinstance(value, Tensor) else None


def _free_name(target: Store, name: str, form: str, dims: tuple[int, ...] | None) -> str:
    """`name`, or one with a number where the target has something else there; dims: None for a float tensor."""
    for candidate in itertools.chain((name,), (f"{name}_{i}" for i in itertools.count(1))):
        known = target.get(candidate)
        lies = known.dims if isinstance(known, QTensor) else None
        if known is None or (target.forms.get(candidate, PLAIN) == form and lies == dims):
            return candidate
    raise AssertionError("names do not end")


def _read_packed(graph: fx.Graph, like: fx.Node, target: Store, name: str, *, as_stored: bool = False) -> fx.Node:
    """dequantize(packed W) in the parameter's own order, or in that in which it is packed."""
    qtensor = target.get(name)
    assert isinstance(qtensor, QTensor)
    mode = compat.fake_mode_of(like.graph)
    reads = [
        _get_attr(graph, f"{name}.{part}", {"val": compat.fake_tensor(mode, tensor)} if mode is not None else {})
        if tensor is not None
        else None
        for part, tensor in (("codes", qtensor.codes), ("scale", qtensor.scale), ("zero_point", qtensor.zero_point))
    ]
    args = (*reads, list(qtensor.shape), qtensor.scheme.stored.spell(), value_of(like).dtype)
    read = graph.call_function(DEQUANTIZE.overload, args)
    read.meta = dict(like.meta)
    if not as_stored and qtensor.dims != tuple(sorted(qtensor.dims)):
        back = [qtensor.dims.index(i) for i in range(len(qtensor.dims))]
        read = graph.call_function(aten.permute.default, (read, back))
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
    if isinstance(target.get(name), QTensor) and target.forms.get(name, PLAIN) == form:
        return _read_packed(graph, node, target, name)
    free = _free_name(target, name, form, None)
    if target.get(free) is None:
        target.adopt(free, tensor, persistent=program.store.is_persistent(name))
        target.forms[free] = form
    return _get_attr(graph, free, node.meta)
