"""The facts about pruning: rows, heads, channels and single weights. How they are read: `facts`."""

from __future__ import annotations

from .facts import (
    CRASH,
    DIFFERS,
    MAPS,
    NO_EFFECT,
    NOT_YET,
    OFFSET,
    Fact,
    by_blocks,
    has_pairs,
    is_snip,
)
from .pruning import SCOPES, STRUCTURES

_ROW, _HEAD, _CHANNEL = STRUCTURES
_SPARSE = "sparse_pruning"
_SNIP_ONLY = ("schedule_offset_end", "schedule_offset_stride", "block_pattern", "dense_ratio", "excluded_modules")
_TAKEN_OUT = (
    "what goes together is found in the graph and taken out; without related_modules DeepSpeed only set it to zero"
)
_MASK = "DeepSpeed's mask was that of the weights at init_compression; here it is of those at schedule_offset"
_WHOLE = "DeepSpeed ranked by the module's own weight; here by all numbers that go, biases and what reads them too"
_LEARNED = (
    "learned by the movement of weights, as there; DeepSpeed's scores start at random and learn from schedule_offset "
    "on, here they start alike and learn from the first step, and what is cut may change until the model is finished"
)
_COUNT = (
    "ceil(dense_ratio * n) of each stay, all at once; DeepSpeed's product of floats at times lies just above a whole "
    "number, and then it kept one more: 8 of 100 at 0.07"
)


STRUCTURED: tuple[Fact, ...] = (
    Fact(
        f"{_HEAD}.enabled",
        DIFFERS,
        "DeepSpeed left the attention's own head counts and sizes as they were, to be mended by hand; here the cut "
        "graph computes with the heads that are left",
        "heads that are taken out",
    ),
    Fact(
        f"{_CHANNEL}.enabled",
        DIFFERS,
        "masked before the batch norm: DeepSpeed's cleaned model computed otherwise than the trained one; here what is "
        "masked in training is what is cut, batch norms too",
        "channels that are taken out",
    ),
    *(
        Fact(f"{name}.enabled", DIFFERS, _TAKEN_OUT, f"{scope} that are taken out")
        for name, (scope, _) in SCOPES.items()
    ),
    Fact(
        f"{_HEAD}.method",
        DIFFERS,
        "DeepSpeed's parser takes l1 and its layer raised NotImplementedError; here it works",
        "score l1",
        when=lambda s: s.value == "l1",
    ),
    Fact(
        f"{_ROW}.method",
        DIFFERS,
        "the tutorial allows topk alone, the code l1 too",
        "score l1",
        when=lambda s: s.value == "l1",
        absent="told",
    ),
    Fact(
        f"{_CHANNEL}.method",
        DIFFERS,
        "l1 crashed in DeepSpeed on any recent torch (a norm over three dimensions); here it works",
        "score l1",
        when=lambda s: s.value == "l1",
        absent="told",
    ),
    *(
        Fact(f"{name}.method", DIFFERS, f"{_MASK}; {_WHOLE}", "score l1", lambda s: s.value == "l1", "told")
        for name in STRUCTURES
    ),
    *(
        Fact(f"{name}.method", DIFFERS, _LEARNED, "score movement", lambda s: s.value == "topk", "told")
        for name in STRUCTURES
    ),
    Fact(
        f"{_HEAD}.num_heads",
        MAPS,
        "one number for all layers, which nothing needs: the graph says how many heads an attention has, and another "
        "number is an error",
        "an expectation: {value} heads",
    ),
    *(
        fact
        for name in STRUCTURES
        for fact in (
            Fact(
                f"{name}.group.related_modules",
                DIFFERS,
                "DeepSpeed pruned the second pair of a group with the first pair's mask",
                "an expectation",
                when=has_pairs,
            ),
            Fact(
                f"{name}.group.related_modules",
                DIFFERS,
                "paired by order in DeepSpeed; here the graph says what goes together, and naming what does not is an "
                "error. Nothing needs them",
                "an expectation",
            ),
            Fact(
                f"{name}.group.modules",
                MAPS,
                f"a module whose {SCOPES[name][1]} are not {SCOPES[name][0]} that can be cut is an error, where "
                "DeepSpeed set numbers to zero",
            ),
        )
    ),
    Fact(f"{_HEAD}.group.modules", MAPS, "output projections, whose inputs are the heads"),
)

SPARSE: tuple[Fact, ...] = (
    Fact(f"{_SPARSE}.enabled", MAPS, "", "single weights that are zero"),
    Fact(
        f"{_SPARSE}.method",
        DIFFERS,
        f"{CRASH} at its schedule_offset (KeyError 'schedule_offset_end') with this method; here it works",
        "score l1",
        when=lambda s: s.value == "l1",
        absent="told",
    ),
    Fact(f"{_SPARSE}.method", DIFFERS, _MASK, "score l1", when=lambda s: s.value == "l1", absent="told"),
    Fact(
        f"{_SPARSE}.method",
        DIFFERS,
        f"{CRASH} at its schedule_offset (KeyError 'schedule_offset_end') with this method; here it works",
        "score movement",
        when=lambda s: s.value == "topk",
    ),
    Fact(
        f"{_SPARSE}.method",
        DIFFERS,
        "snip_momentum could not be imported: neural_compressor dropped its pruner; here it works",
        "score snip_momentum",
        when=is_snip,
    ),
    *(
        Fact(f"{_SPARSE}.{key}", NO_EFFECT, "read for snip_momentum alone", when=lambda s: not is_snip(s))
        for key in _SNIP_ONLY
    ),
    Fact(
        f"{_SPARSE}.block_pattern",
        NOT_YET,
        "blocks of whole channels are refused; row_pruning and channel_pruning take them out",
        when=by_blocks,
    ),
    Fact(
        f"{_SPARSE}.block_pattern",
        MAPS,
        "N:M prunes N of every M; it does not keep them, as a recipe's N:M does",
        "pattern: M-N of every M stay",
        when=lambda s: ":" in s.value,
    ),
    Fact(f"{_SPARSE}.block_pattern", MAPS, "", "pattern {value}"),
    Fact(f"{_SPARSE}.dense_ratio", MAPS, "of all weights that are chosen together", "ratio: all but {value}"),
    Fact(f"{_SPARSE}.excluded_modules", MAPS, "searched for anywhere in the names", "exclude"),
    Fact(
        f"{_SPARSE}.schedule_offset_end",
        MAPS,
        "the ramp is exponential; its last move is at the last whole stride, as in DeepSpeed",
        "the ramp's length, from schedule_offset",
    ),
    Fact(f"{_SPARSE}.schedule_offset_stride", MAPS, "the tutorial calls it frequency", "again every {value} steps"),
    Fact(f"{_SPARSE}.different_groups", MAPS, "all linears and convolutions but excluded_modules", when=is_snip),
    Fact(f"{_SPARSE}.group.related_modules", NO_EFFECT, "single weights have no related ones"),
)

PRUNING: tuple[Fact, ...] = (
    *STRUCTURED,
    *SPARSE,
    Fact("*_pruning.group.dense_ratio", MAPS, _COUNT, "ratio: all but {value}"),
    Fact("*_pruning.schedule_offset", MAPS, OFFSET, "start at step {value}", absent="only"),
    Fact("*_pruning.schedule_offset", MAPS, "after that many steps", "start at step {value}"),
)
