"""What follows a block, computed without it: the calls that some outputs need, from where its absence first shows.

Values from before that place are those of the whole graph; a graph that writes values in place, or draws random
numbers, is computed from its inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from ..runtime.program import Program, writes
from .depth import Block
from .prune.proof import draws


class Tail:
    """The rest of a graph without `block`, as far as `wanted` needs it.

    start: place in the graph of its first call; cut: what it reads that lies before
    """

    def __init__(self, program: Program, block: Block, wanted: Sequence[fx.Node]) -> None:
        self.block, self._program, self._inside = block, program, set(block.nodes)
        nodes = list(program.graph.nodes)
        place = {node: i for i, node in enumerate(nodes)}
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._roots = [block.instead.get(node, node) for node in wanted]
        ahead = list(self._roots)
        if draws(program) or any(map(writes, nodes)):
            self.start = 0
            ahead += [node for node in nodes if writes(node) and node not in self._inside]
        else:
            users = {user for out in block.instead for user in out.users} - self._inside
            self.start = min((place[user] for user in users if user.op != "output"), default=len(nodes) - 1)
        seen = set(ahead)
        while ahead:
            node = ahead.pop()
            if place[node] >= self.start:
                fresh = {self._read(node, n) for n in node.all_input_nodes} - seen
                seen |= fresh
                ahead += fresh
        calls = sorted((node for node in seen if node.op == "call_function"), key=place.__getitem__)
        self.cut = [node for node in calls if place[node] < self.start]
        self._calls = calls[len(self.cut) :]
        self._stored = [node for node in seen if node.op == "get_attr"]
        last = {self._read(node, n): node for node in self._calls for n in node.all_input_nodes}
        self._dead: dict[fx.Node, list[fx.Node]] = {}
        for value, user in last.items():
            if value not in self._roots:
                self._dead.setdefault(user, []).append(value)

    def _read(self, node: fx.Node, argument: fx.Node) -> fx.Node:
        """What a call reads for an argument, without the block."""
        return argument if node in self._inside else self.block.instead.get(argument, argument)

    def run(self, batch: Sequence[Tensor], before: Mapping[fx.Node, Any]) -> list[Any]:
        """The wanted outputs for flat inputs. before: the values of `cut`"""
        given = batch if self.start else [t.clone() for t in batch]
        env: dict[fx.Node, Any] = {**before, **dict(zip(self._inputs, given, strict=True))}
        env |= {node: operator.attrgetter(str(node.target))(self._program.module) for node in self._stored}
        with self._program.unwritten():
            for node in self._calls:
                env[node] = self._call(node, env)
                for value in self._dead.get(node, ()):
                    del env[value]
        return [env[node] for node in self._roots]

    def _call(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        def value(argument: fx.Node) -> Any:
            return env[self._read(node, argument)]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # a call_function has one
