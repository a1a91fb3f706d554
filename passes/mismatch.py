"""How many codes of activations fall otherwise in the finished model than they did in training."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..runtime.ops.operator import Operator
from ..runtime.ops.quantize import QUANTIZE_ASYMMETRIC, QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from ..runtime.ops.steps import STEPS_LIVE, STEPS_RANGED
from ..runtime.ops.training import FAKE_QUANTIZE_LIVE, FAKE_QUANTIZE_RANGED
from ..runtime.program import Program
from .quantize.insert import SITE
from .watch import watch

REAL = (QUANTIZE_DYNAMIC, QUANTIZE_ASYMMETRIC, QUANTIZE_STATIC)
TRAINED = (STEPS_LIVE, STEPS_RANGED, FAKE_QUANTIZE_LIVE, FAKE_QUANTIZE_RANGED)

Call = tuple[str, str]


def code_mismatch(finished: Program, trained: Program, inputs: Sequence[Tensor]) -> float | None:
    """The share of codes that differ where both programs run from the same `inputs`, each on its own values.

    trained: as it simulates in eval mode. None where no activation is quantised.
    """
    real, simulated = dict(_quantising(finished, REAL)), dict(_quantising(trained, TRAINED))
    ours, theirs = _arguments(finished, real, inputs), _arguments(trained, simulated, inputs)
    differ = count = 0
    for call in real.keys() & simulated.keys():
        target: Any = real[call].target
        x, *rest = ours[real[call]]
        one, two = (target(value, *rest) for value in (x, theirs[simulated[call]][0]))
        one, two = (codes if isinstance(codes, Tensor) else codes[0] for codes in (one, two))
        differ, count = differ + int((one != two).sum()), count + one.numel()
    return differ / count if count else None


def _quantising(program: Program, operators: Sequence[Operator]) -> Iterator[tuple[Call, fx.Node]]:
    """The node that quantises the activation of each site."""
    for node in program.graph.nodes:
        if SITE in node.meta:
            source = _product(node).args[0]
            if isinstance(source, fx.Node) and source.target is operator.getitem:
                source = source.args[0]
            if isinstance(source, fx.Node) and any(source.target is op.overload for op in operators):
                yield node.meta[SITE], source


def _product(site: fx.Node) -> fx.Node:
    """What multiplies: the zero point of an asymmetric activation is taken off afterwards."""
    while site.target in (torch.ops.aten.sub.Tensor, torch.ops.aten.to.dtype):
        (site, *_) = site.all_input_nodes
    return site


def _arguments(
    program: Program, nodes: Mapping[Call, fx.Node], inputs: Sequence[Tensor]
) -> dict[fx.Node, tuple[Any, ...]]:
    """What each node was called with."""
    wanted, found = set(nodes.values()), dict[fx.Node, tuple[Any, ...]]()

    def look(node: fx.Node, args: tuple[Any, ...], value: Any) -> Any:
        if node in wanted:
            found[node] = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        return value

    watch(program, inputs, look)
    return found
