"""Models that branch on a value: the way that the example takes is captured, and a check that others take it too.

    if mask.any(): ...      any(mask) -> require(., False): a call where it is True raises CaptureError, with this line

What is settled so is the truth of a tensor, and of a comparison with a number read from one. A size or a count that
goes by values is not: export knows it as a symbol or refuses it. Nor is what chance decides, as in layers that are
skipped at random: a graph of one draw would refuse the next call.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime import tracing
from ..runtime.errors import CaptureError
from ..runtime.program import checks, is_random

# A side that one draw in ten takes is missed by all of them once in 5e11 times.
DRAWS = 256

_OURS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def user_frame(frames: Iterable[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The innermost frame outside torch and dwindle, if any: a line of the model."""
    # "<string>" and the like is code that torch made up, or a prompt, which has no lines to show.
    return next((f for f in reversed([*frames]) if not f.filename.startswith(("<", *_OURS))), None)


class Branches:
    """The decisions of one attempt to capture a model, each a call of require in its graph."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, one attempt in which branches go as they go for the example."""
        self.lines.clear()
        with tracing.values_followed(self._decide):
            yield

    def _decide(self, value: Tensor, truth: bool) -> None:
        frame = user_frame(traceback.extract_stack())
        line = "a branch on a value" if frame is None else f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
        self.lines.append(line)
        torch.ops.dwindle.require(value, truth, line)

    def require_kept(self, graph: fx.Graph) -> None:
        """Raise CaptureError unless the graph checks each decision and none goes by chance; then drop the example."""
        kept = sum(checks(node) for node in graph.nodes)
        if kept != len(self.lines):
            raise CaptureError(
                "a branch on a value was settled, and the captured graph does not check it",
                required="\n    ".join(["a check for each of", *self.lines]),
                found=f"{kept} checks",
                cure="make these lines independent of tensor values",
            )
        for node in filter(checks, graph.nodes):
            if _varies(node):
                raise CaptureError(
                    f"the model goes by chance, at {node.args[2]}",
                    required="the same way in every call of one kind",
                    found="a branch on random numbers",
                    cure="switch it off for dwindle, such as with layerdrop=0",
                )
        if self.lines:
            tracing.forget_values(graph)


def _varies(check: fx.Node) -> bool:
    """Whether what is checked depends on random numbers alone, and some draws give another value."""
    inside, ahead = {check}, [check]
    while ahead:
        fresh = [n for n in ahead.pop().all_input_nodes if n not in inside]
        inside.update(fresh)
        ahead += fresh
    if not any(map(is_random, inside)) or any(n.op != "call_function" for n in inside):
        return False
    steps = [n for n in check.graph.nodes if n in inside and n is not check]
    with torch.random.fork_rng(devices=[]):
        return any(_drawn(steps, check) != check.args[1] for _ in range(DRAWS))


def _drawn(steps: Iterable[fx.Node], check: fx.Node) -> bool:
    made: dict[fx.Node, Any] = {}
    for n in steps:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda x: made[x])
        made[n] = n.target(*args, **kwargs)  # type: ignore[operator]  # a call
    return bool(made[check.args[0]])  # type: ignore[index]  # a node by construction
