"""Run a program and look at values as they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.program import Program

Look = Callable[[fx.Node, tuple[Any, ...], Any], Any]


class _Watched(fx.Interpreter):
    def __init__(self, program: Program, look: Look) -> None:
        super().__init__(program.module)
        self.look = look

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self.look(n, args, super().run_node(n))


def watch(program: Program, tensors: Sequence[Tensor], look: Look) -> None:
    """Run on flat inputs without gradient; each node's value is what `look(node, arguments, value)` returns.

    A value may be written in place by a later node: keep a clone, not the value.
    """
    with torch.no_grad(), program.unwritten():
        _Watched(program, look).run(*(t.clone() for t in tensors))
