"""How much each block turns what goes through it, on calibration data.

influence_i = 1 - E_t cos(x_it, y_it)    x_i goes into block i, y_i comes out of it; t: tokens that are no padding
                                         (Men et al. 2024, arXiv 2403.03853, equation 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from ..runtime.errors import CalibrationError
from ..runtime.program import Program, value_of
from .depth import CONVOLUTIONS, Block
from .stream import Batch, Stream
from .tokens import mask_of, tokens


def influences(
    program: Program, blocks: Sequence[Block], batches: Sequence[Batch], step: Callable[[], None]
) -> dict[int, float]:
    """The influence of each block, by number, from one forward a batch."""
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    pairs = [(block, x, out) for block in blocks for out, x in block.instead.items()]
    last = {value: max(place[out] for _, x, out in pairs if value in (x, out)) for _, *both in pairs for value in both}
    masks = {out: mask_of(program, out, decodes="decoder" in block.path) for block, _, out in pairs}
    total, count = ({block.number: 0.0 for block in blocks} for _ in range(2))
    for batch in batches:
        held: dict[fx.Node, Tensor] = {}
        with Stream(program, [batch]) as stream:
            for value in sorted(last, key=place.__getitem__):
                held[value] = stream.values(value)[0].clone()  # it may be written later
                for block, x, out in pairs:
                    if out is value:
                        mask, channels = masks[out], _channels(block, out)
                        real = None if mask is None else batch[mask]
                        lost = 1 - cosines(tokens(held[x], real, channels), tokens(held[out], real, channels))
                        total[block.number] += float(lost.sum(dtype=torch.float64))
                        count[block.number] += len(lost)
                held = {other: tensor for other, tensor in held.items() if last[other] > place[value]}
        step()
    for block in blocks:
        if not count[block.number] or not math.isfinite(total[block.number]):
            raise CalibrationError(
                f"the influence of {block.path} cannot be measured on the calibration data",
                required="finite values, and tokens that are no padding",
                found="a value that is not finite" if count[block.number] else "none",
            )
    return {number: total[number] / count[number] for number in total}


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """cos(x_t, y_t), fp64 (tokens,), at most 1; of two zeros 1, of one 0."""
    x, y = x.double(), y.double()
    sizes = x.norm(dim=-1) * y.norm(dim=-1)
    same = (x == y).all(-1)
    return torch.where(same, 1.0, ((x * y).sum(-1) / torch.where(sizes == 0, 1.0, sizes)).clamp(max=1.0))


def _channels(block: Block, value: fx.Node) -> int:
    """The dimension of a token's own numbers: the last, or 1 where the block's convolutions have it there."""
    shape = value_of(value).shape
    for node in block.nodes:
        if node.target in CONVOLUTIONS:
            given = value_of(node.all_input_nodes[0]).shape
            if len(given) == len(shape) and str(given[1]) == str(shape[1]):
                return 1
    return -1
