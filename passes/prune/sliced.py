"""The graph and its tensors without what is cut.

Stored tensors lose rows; numbers in calls that count indices, or are places among them, are written anew by axis and
not by value. A number that depends on the input stays so: n becomes n * kept // full. A view becomes a reshape, since
memory may lie otherwise: attention, say, takes another kernel where queries and values differ in width.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...runtime import compat
from ...runtime.program import Program
from ..match import full_args
from .axes import size
from .keep import Kept, count, is_cut, select
from .walk import Size, Walk

aten = torch.ops.aten

_SPLITS = (
    *(aten.split.Tensor, aten.chunk.default, aten.split.sizes),
    *(aten.tensor_split.sections, aten.tensor_split.indices),
)
# Their parts may be written in place, which autograd forbids for those of the others.
_OWN_SPLITS = (aten.unsafe_split.Tensor, aten.unsafe_chunk.default)
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)


def sliced(program: Program, walk: Walk, of: Kept) -> Program:
    """Cut in place, the program's store included. `walk` is that of this very program."""
    for name, axes in walk.stored.items():
        tensor = program.store.get(name)
        if any(is_cut(axis, of) for axis in axes):
            assert isinstance(tensor, Tensor)
            _put(program, name, select(tensor.detach(), axes, of), tensor)
    by_node: dict[fx.Node, list[Size]] = defaultdict(list)
    for number in walk.sizes:
        by_node[number.node].append(number)
    for node, numbers in by_node.items():
        if any(is_cut(number.axis, of) for number in numbers):
            _rewrite(program, walk, node, numbers, of)
    for node in program.calls(aten.view.default):
        node.target = aten.reshape.default
    program.tidy()
    return program


def record(program: Program) -> None:
    """Write down the values of a sliced graph, in the symbols of the graph before; one without any stays without."""
    mode = compat.fake_mode_of(program.graph)
    if mode is None:
        return
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = program.store.get(str(node.target))
            assert isinstance(tensor, Tensor)
            node.meta["val"] = compat.fake_tensor(mode, tensor.detach())
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            node.meta["val"] = compat.fake_value(mode, node.target, args, kwargs)


def _put(program: Program, name: str, value: Tensor, old: Tensor) -> None:
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    program.store.put(name, new, persistent=program.store.is_persistent(name))


def _rewrite(program: Program, walk: Walk, node: fx.Node, numbers: list[Size], of: Kept) -> None:
    arguments: list[Any] = list(full_args(node))
    if node.target in (*_SPLITS, *_OWN_SPLITS):
        lengths = [count(number.axis, of) for number in numbers]
        dim = arguments[2]
        own = node.target in _OWN_SPLITS
        node.target = aten.unsafe_split_with_sizes.default if own else aten.split_with_sizes.default
        node.args, node.kwargs = (arguments[0], lengths, dim), {}
        return
    if node.target in _SQUEEZES:
        shape = walk.shape(arguments[0])
        wanted = range(len(shape)) if len(arguments) < 2 else arguments[1]
        dims = [d % len(shape) for d in ([wanted] if isinstance(wanted, int) else wanted)]
        single = [d for d in dims if shape[d] == 1]
        node.target, node.args, node.kwargs = aten.squeeze.dims, (arguments[0], single), {}
        return
    for number in numbers:
        if not is_cut(number.axis, of):
            continue
        old = arguments[number.argument]
        if number.index is not None:
            if not isinstance(old, list | tuple):
                continue
            items = list(old)
            items[number.index] = _replaced(program, walk, node, items[number.index], number, of)
            arguments[number.argument] = items
        else:
            arguments[number.argument] = _replaced(program, walk, node, old, number, of)
    _write(node, arguments)


def _replaced(program: Program, walk: Walk, node: fx.Node, old: Any, number: Size, of: Kept) -> Any:
    if node.target is aten.scaled_dot_product_attention.default:
        return size(number.axis) ** -0.5  # of the full head, as the model was trained
    if isinstance(old, fx.Node):
        kept, full = count(number.axis, of, number.upto), number.upto or size(number.axis)
        times = program.emit(operator.mul, old, kept, like=node)
        return program.emit(operator.floordiv, times, full, like=node)
    return old if old == -1 and number.upto is None else count(number.axis, of, number.upto) + number.more


def _write(node: fx.Node, arguments: list[Any]) -> None:
    """Positional arguments as far as there were some, others by name."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]  # only ATen calls have sizes
    kwargs: dict[str, Any] = dict(node.kwargs)
    args = list(node.args)
    for i, (argument, value) in enumerate(zip(schema, arguments, strict=True)):
        if i < len(args):
            args[i] = value
        elif argument.name in kwargs or value != argument.default_value:
            kwargs[argument.name] = value
    keyword = {a.name for a in schema if a.kwarg_only}
    while len(args) < len(schema) and not keyword and schema[len(args)].name in kwargs:
        args.append(kwargs.pop(schema[len(args)].name))
    node.args, node.kwargs = tuple(args), kwargs
