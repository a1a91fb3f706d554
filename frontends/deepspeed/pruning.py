"""DeepSpeed's pruning sections in dwindle's own terms.

    row_pruning        outputs of the linears that are named, with all that the graph says goes with them
    channel_pruning    outputs of convolutions
    head_pruning       heads, of the attentions whose output projections are named
    sparse_pruning     single weights, or blocks of them: entries of `sparsify`

Of n, ceil(dense_ratio n) stay, all at once at schedule_offset; l1 goes by the weights as they are then, topk by scores
that are learned (movement). `num_heads` and `related_modules` are carried along and compared with the graph; nothing
needs them.

snip_momentum cuts T = (end - offset) // stride times in even steps after the first, where nothing goes yet:

    sparsity at offset + c stride = 1 - dense_ratio^(c/T),    c = 0..T

which is the exponential ramp of that length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from ...passes.prune.named import Side
from ...passes.prune.score import Method
from ...runtime.errors import RecipeError
from ..cuts import PruneEntry
from ..ramps import RampSettings
from .config import DeepSpeedConfig
from .sections import HeadPruning, PruningGroup, RowPruning, SparsePruning

STRUCTURES = ("row_pruning", "head_pruning", "channel_pruning")
SCOPES: dict[str, tuple[Literal["rows", "heads", "channels"], Side]] = {
    "row_pruning": ("rows", "outputs"),
    "head_pruning": ("heads", "inputs"),
    "channel_pruning": ("channels", "outputs"),
}
SCORES: dict[str, Method] = {"l1": "l1", "topk": "movement"}
_DIGITS = 15  # 1 - 0.9 is 0.1 again; of up to 10^6 indices that changes no count


def pruned(config: DeepSpeedConfig) -> Iterator[PruneEntry]:
    """An entry for each group of the sections that prune whole structures."""
    for name in STRUCTURES:
        section = config.section(name)
        if section is not None:
            assert isinstance(section, RowPruning | HeadPruning)
            yield from (_entry(name, section, group) for group in section.groups)


def _entry(name: str, section: RowPruning | HeadPruning, group: PruningGroup) -> PruneEntry:
    scope, side = SCOPES[name]
    related = (pattern for patterns in group.related or () for pattern in patterns)
    return PruneEntry(
        ratio=_gone(group.dense_ratio),
        scopes=(scope,),
        patterns=group.modules,
        side=side,
        num_heads=section.num_heads if isinstance(section, HeadPruning) else None,
        related=tuple(dict.fromkeys(related)),
        section=name,
        score=SCORES[section.method],
        schedule=RampSettings(offset=section.schedule_offset),
    )


def sparsified(section: SparsePruning) -> tuple[dict[str, Any], ...]:
    """The entries of `sparsify`, as plain data. Raises RecipeError for blocks of whole channels."""
    if section.method == "snip_momentum":
        return (_snip(section),)
    return tuple(
        {
            "ratio": _gone(group.dense_ratio),
            "pattern": "unstructured",
            "score": SCORES[section.method],
            "patterns": group.modules,
            "operators": ("linear", "conv2d"),
            "budget": "layer",
            "schedule": {"type": "cubic", "offset": section.schedule_offset, "length": 0, "every": 1},
        }
        for group in section.groups
    )


def _snip(section: SparsePruning) -> dict[str, Any]:
    stride = section.schedule_offset_stride
    return {
        "ratio": _gone(section.dense_ratio),
        "pattern": _pattern(section.block_pattern),
        "score": "snip_momentum",
        "exclude": section.excluded_modules,
        "operators": ("linear", "conv1d", "conv2d"),
        "budget": "network",
        "schedule": {
            "type": "exponential",
            "offset": section.schedule_offset,
            "length": (section.end - section.schedule_offset) // stride * stride,
            "every": stride,
        },
    }


def _pattern(block: str) -> str:
    """A block as `sparsify` writes it: its N:M keeps N of every M, DeepSpeed's prunes N."""
    if "channel" in block:
        raise RecipeError(
            "sparse_pruning in blocks of whole channels",
            required="a block_pattern such as '4x1', '1x4' or '2:4'",
            found=repr(block),
            cure="row_pruning and channel_pruning take whole rows and channels out",
        )
    found = re.fullmatch(r"(\d+):(\d+)", block)
    if found is None:
        return block
    gone, of = int(found[1]), int(found[2])
    if not 0 < gone < of:
        raise RecipeError(
            "sparse_pruning.block_pattern is not right",
            required="N:M with 0 < N < M: of every M neighbours N are pruned",
            found=repr(block),
        )
    return f"{of - gone}:{of}"


def _gone(dense_ratio: float) -> float:
    """The ratio that is pruned."""
    return round(1 - dense_ratio, _DIGITS)
