"""Which numbers of a value are real tokens, and which stand for padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..runtime.program import Program, value_of

MASK = "attention_mask"
IGNORED = -100  # of labels, as torch's cross_entropy has it


def mask_of(program: Program, value: fx.Node, *, decodes: bool) -> int | None:
    """The place of the input (B, T) that marks padding of a value (B, T, ...) with zeros; None where there is none.

    decodes: whether the value is of a decoder; an encoder-decoder has a mask for each side
    """
    sizes = value_of(value).shape
    if len(sizes) < 3:
        return None
    held = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = program.contract.inputs
    both = any(spec.name.startswith("decoder") for spec in inputs)
    for place, (node, spec) in enumerate(zip(held, inputs, strict=True)):
        fits = len(spec.shape) == 2 and [str(n) for n in value_of(node).shape] == [str(n) for n in sizes[:2]]
        if spec.name.endswith(MASK) and fits and (not both or ("decoder" in spec.name) == decodes):
            return place
    return None


def counted(shape: Sequence[int], labels: object, mask: object) -> Tensor | None:
    """Which positions of `shape` count: those with labels, or else those that are no padding; None for all of them.

    labels: integers; mask: zero at padding; either is passed over where its shape is another
    """
    if isinstance(labels, Tensor) and labels.shape == torch.Size(shape) and not labels.is_floating_point():
        return labels != IGNORED
    if isinstance(mask, Tensor) and mask.shape == torch.Size(shape):
        return mask != 0
    return None


def tokens(value: Tensor, mask: Tensor | None, channels: int = -1) -> Tensor:
    """The numbers of each token that is no padding: (tokens, D). channels: the dimension D of `value`"""
    last = value.movedim(channels, -1)  # (B, ..., D)
    return (last if mask is None else last[mask != 0]).reshape(-1, last.shape[-1])
