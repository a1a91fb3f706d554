"""Models that branch on a value: the way that the example takes is captured, and a check that others take it too.

    if mask.any(): ...      any(mask) -> require(., False): a call where it is True raises CaptureError, with this line

What is settled so is the truth of a tensor, and of a comparison with a number read from one. A size or a count that
goes by values is not: export knows it as a symbol or refuses it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, fx

from ..runtime import tracing
from ..runtime.errors import CaptureError
from ..runtime.program import checks

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
        """Raise CaptureError unless the graph has a check for each decision; then drop the example from it."""
        kept = sum(checks(node) for node in graph.nodes)
        if kept != len(self.lines):
            raise CaptureError(
                "a branch on a value was settled, and the captured graph does not check it",
                required="\n    ".join(["a check for each of", *self.lines]),
                found=f"{kept} checks",
                cure="make these lines independent of tensor values",
            )
        if self.lines:
            tracing.forget_values(graph)
