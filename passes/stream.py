"""Run a graph once, node by node, over many batches side by side: what comes later sees what was changed before.

    with Stream(program, batches) as stream:
        for site in sites:                      # in graph order
            xs = stream.values(site.activation) # of every batch, computed with the weights as they are now
            program.store.put(site.fqn, better(weight, xs))

One forward pass in all, whatever the number of stops. A value is let go after its last use, so what is held is what
a cut through the graph holds, once for each batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, fx

from ..runtime.errors import CalibrationError
from ..runtime.program import Program

Batch = Sequence[Tensor]
"""A graph's flat inputs."""

Batches = Callable[[], Iterable[Batch]]
"""Asked for where something needs them; raises CalibrationError where there are none."""


def require_batches(batches: Iterable[Batch]) -> list[Batch]:
    """The batches, at least one. Raises CalibrationError."""
    found = list(batches)
    if not found:
        raise CalibrationError(
            "calibration data is empty",
            required="at least one batch",
            found="none",
            cure="pass data=[batch, ...], or a recipe that needs none",
        )
    return found


class Stream:
    """Values of a program over batches of flat inputs, in graph order and without gradient."""

    def __init__(self, program: Program, batches: Iterable[Batch]) -> None:
        self._runs = [_Run(program, batch) for batch in batches]
        self._nodes: list[fx.Node] = list(program.graph.nodes)
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._last: dict[fx.Node, int] = {n: max(map(self._place.__getitem__, n.users), default=0) for n in self._nodes}
        self._kept = set[fx.Node]()
        self._next = 0
        self._open = contextlib.ExitStack()
        self._program = program

    def __len__(self) -> int:
        return len(self._runs)

    def __enter__(self) -> Self:
        self._open.enter_context(torch.no_grad())
        self._open.enter_context(self._program.unwritten())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()
        for run in self._runs:
            run.env.clear()

    def keep(self, node: fx.Node) -> None:
        """Hold the values of `node`, once they are there, until `drop`."""
        self._kept.add(node)

    def drop(self, node: fx.Node) -> None:
        """Let go of kept values that nothing ahead reads."""
        self._kept.discard(node)
        if self._last[node] < self._next:
            for run in self._runs:
                run.env.pop(node, None)

    def values(self, node: fx.Node) -> list[Any]:
        """What `node` gives, one value a batch; the graph is run up to it, and no further."""
        self.advance(node)
        missing = self._runs and node not in self._runs[0].env
        assert not missing, f"{node.name} was let go: keep it before the graph has run past its last use"
        return [run.env[node] for run in self._runs]

    def advance(self, to: fx.Node) -> None:
        """Run every node up to `to`, and `to` itself."""
        while self._next <= self._place[to]:
            node, here = self._nodes[self._next], self._next
            self._next += 1
            dead = [n for n in {node, *node.all_input_nodes} if self._last[n] <= here and n not in self._kept]
            stored = [n for n in node.all_input_nodes if n.op == "get_attr"]
            for run in self._runs:
                run.env.update((n, run.run_node(n)) for n in stored)  # as it is now, not as it was when it was passed
                run.env[node] = run.run_node(node)
                for n in dead:
                    if n is not to:
                        run.env.pop(n, None)


class _Run(fx.Interpreter):
    """One batch. Its inputs are copies: a graph may write them."""

    def __init__(self, program: Program, batch: Sequence[Tensor]) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.args_iter = iter([t.clone() for t in batch])
