"""What a graph gives, by place: names, lists inside the output, and entries of lists that go."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, fx

from ..runtime.program import Program
from ..runtime.structure import Structure

# Set on the output node by `leave_out`: places, among the tensors that were given, of those that no longer are.
LEFT_OUT = "left_out"


def output_of(program: Program) -> fx.Node:
    """The node that gives the flat outputs."""
    node: fx.Node = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    return node


def given(program: Program) -> list[fx.Node]:
    """The flat outputs, in order."""
    values: Sequence[fx.Node] = output_of(program).args[0]  # type: ignore[assignment]  # it holds a flat tuple
    return list(values)


def names(structure: Structure) -> list[str]:
    """By flat place: the name of the part of the output in which it lies, "" where it has none."""
    named = structure["kind"] in ("output", "dict", "namedtuple")
    parts = structure["items"].items() if named else [("", structure)]
    return [name for name, part in parts for _ in _leaves(part)]


def lists(structure: Structure) -> list[list[int]]:
    """The flat places of each tuple or list of tensors that lies in the output, and is not all of it."""
    found: list[list[int]] = []
    count = itertools.count()

    def visit(part: Structure, inside: bool) -> int | None:
        if part["kind"] == "tensor":
            return next(count)
        items = part.get("items", ())
        places = [visit(item, True) for item in (items.values() if isinstance(items, dict) else items)]
        if inside and part["kind"] in ("tuple", "list") and places and None not in places:
            found.append([place for place in places if place is not None])
        return None

    visit(structure, False)
    return found


def leave_out(program: Program, places: Collection[int]) -> None:
    """Take entries out of the lists of the output, in place."""
    node, values = output_of(program), given(program)
    tensors = [i for i, value in enumerate(values) if isinstance(value.meta.get("val"), Tensor)]
    node.meta[LEFT_OUT] = frozenset(n for n, i in enumerate(tensors) if i in places)
    node.args = (tuple(value for i, value in enumerate(values) if i not in places),)
    shorter = _without(program.contract.output, places, itertools.count())
    assert shorter is not None, "only entries of lists go"
    program.contract = replace(program.contract, output=shorter)


def left_out(program: Program) -> frozenset[int]:
    """What `leave_out` has taken since this was last asked."""
    taken: frozenset[int] = output_of(program).meta.pop(LEFT_OUT, frozenset())
    return taken


def _leaves(part: Structure) -> Iterator[Structure]:
    if part["kind"] == "tensor":
        yield part
    items = part.get("items", ())
    for item in items.values() if isinstance(items, dict) else items:
        yield from _leaves(item)


def _without(part: Structure, places: Collection[int], count: Iterator[int]) -> Structure | None:
    if part["kind"] == "tensor":
        return None if next(count) in places else part
    items = part.get("items")
    if isinstance(items, dict):
        return {**part, "items": {name: _without(item, places, count) for name, item in items.items()}}
    if isinstance(items, list):
        return {**part, "items": [kept for item in items if (kept := _without(item, places, count)) is not None]}
    return part
