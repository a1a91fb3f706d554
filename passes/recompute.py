"""Activation checkpointing: parts of a graph whose values are computed again in the backward pass, not kept.

    y = f(x; theta)      kept: x and y; what lies between is recomputed when dy arrives

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.

A part is a run of neighbouring nodes, so it is convex whatever it computes. Each becomes one call of
torch.utils.checkpoint on a graph of its own. Random numbers are drawn again from the state that they were drawn from.
A second run writes no buffer: running statistics and observed ranges move once a step, where torch's own
checkpointing of an eager model moves them twice.

Not handled: a buffer that is written in a part and whose new value the part then reads is written twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from ..runtime import compat
from ..runtime.errors import CaptureError
from ..runtime.program import Program, aten, writes
from ..runtime.report import block_of

PartOf = Callable[[fx.Node], str | None]


def marked(node: fx.Node) -> str | None:
    """The part of a node by the model's own calls of torch.utils.checkpoint, as capture recorded them."""
    return compat.checkpoint_mark(node)


def by_block(node: fx.Node) -> str | None:
    """The part of a node by the repeated block that it lies in ("encoder.layer.3"), each call of a block apart."""
    for key, path, _ in compat.module_calls(node):
        if block_of(path) == path and path.rpartition(".")[2].isdigit():
            return key
    return None


def recomputing(program: Program, part_of: PartOf, every: int = 1) -> fx.GraphModule | None:
    """The program's graph with every `every`-th part recomputed, on the same store; None where there is no part.

    The program stays as it is. Raises CaptureError where two parts lie in one another.
    """
    spans = _spans(program, part_of)
    if not spans:
        return None
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    nodes = list(program.graph.nodes)
    begins = dict(sorted(spans.values())[::every])
    place = 0
    while place < len(nodes):
        node = nodes[place]
        if place in begins:
            _call(program, nodes[place : begins[place] + 1], graph, values)
            place = begins[place]
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], lambda n: values[n]))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
        place += 1
    for node in reversed(graph.nodes):  # parameters that parts alone read
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return Program.of(graph, program.store, program.contract).module


def _spans(program: Program, part_of: PartOf) -> dict[str, tuple[int, int]]:
    """First and last place of each part in the graph."""
    spans: dict[str, tuple[int, int]] = {}
    for place, node in enumerate(program.graph.nodes):
        part = part_of(node) if node.op == "call_function" else None
        if part is not None:
            spans[part] = (spans.get(part, (place, place))[0], place)
    ordered = sorted(spans.items(), key=lambda item: item[1])
    for (one, (_, end)), (other, (start, _)) in pairwise(ordered):
        if start <= end:
            raise CaptureError(
                "activation checkpointing cannot be kept",
                required="checkpointed parts that follow one another in the graph",
                found=f"{other} begins inside {one}",
                cure="checkpoint the module that holds both, or train without checkpointing",
            )
    return spans


def _call(program: Program, part: list[fx.Node], graph: fx.Graph, values: dict[fx.Node, fx.Node]) -> None:
    """Append one call that computes `part`; its values that are used later are items of the result."""
    inside = set(part)
    read = dict.fromkeys(n for node in part for n in node.all_input_nodes if n not in inside)
    stored = {n for n in read if n.op == "get_attr"}
    inputs = [n for n in read if n not in stored]
    outputs = [n for n in part if n.op != "get_attr" and any(user not in inside for user in n.users)]

    body, held = fx.Graph(), dict[fx.Node, fx.Node]()
    for n in inputs:
        held[n] = body.placeholder(n.name)
    for n in (*stored, *part):
        held[n] = body.node_copy(n, lambda n: held[n])
    body.output(tuple(held[n] for n in outputs))
    once = Program.of(body, program.store, program.contract)

    result = graph.call_function(_checkpointed(once, _without_writes(once)), tuple(values[n] for n in inputs))
    for i, n in enumerate(outputs):
        values[n] = graph.call_function(_item, (result, i))
    for n in part:  # a parameter that is first read in the part and read again after it
        if n.op == "get_attr" and any(user not in inside for user in n.users):
            values[n] = graph.node_copy(n)


def _item(values: tuple[Any, ...], place: int) -> Any:
    return values[place]


def _without_writes(program: Program) -> Program:
    """The part as it runs the second time: what only writes is left out, batch norm writes to copies."""
    again = program.copy()
    for node in reversed(again.graph.nodes):
        if writes(node) and not node.users:
            again.graph.erase_node(node)
    for node in again.calls(aten.batch_norm.default):
        with again.graph.inserting_before(node):
            for place in (3, 4):  # running mean and variance
                if isinstance(node.args[place], fx.Node):
                    node.update_arg(place, again.graph.call_function(aten.clone.default, (node.args[place],)))
    again.module.recompile()
    return again


class _Turn:
    """Of one checkpointed call; entered each time that it is recomputed, which a kept graph may ask for again."""

    again = False

    def __enter__(self) -> None:
        self.again = True

    def __exit__(self, *_: object) -> None:
        return


def _checkpointed(once: Program, again: Program) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler recomputes a functional graph, which writes nothing
            return checkpoint(once.module, *args, use_reentrant=False)
        turn = _Turn()

        def compute(*args: Any) -> Any:
            return (again if turn.again else once).module(*args)

        return checkpoint(compute, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), turn))

    run.__name__ = "checkpointed"  # the name it has in the graph's code
    return run
