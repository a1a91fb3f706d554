"""All operators, and their one registration with torch."""

from __future__ import annotations

import torch

from .dequantize import DEQUANTIZE
from .keep_top import KEEP_TOP
from .operator import NAMESPACE, Operator
from .qconv2d import QCONV2D
from .qembedding import QEMBEDDING
from .qlinear import QLINEAR, QLINEAR_WEIGHT_ONLY
from .quantize import FAKE_QUANTIZE, QUANTIZE_ASYMMETRIC, QUANTIZE_DYNAMIC, QUANTIZE_STATIC
from .require import REQUIRE
from .steps import LINEAR_OF_STEPS, STEPS_LEARNED, STEPS_LIVE, STEPS_RANGED
from .training import FAKE_QUANTIZE_LEARNED, FAKE_QUANTIZE_LIVE, FAKE_QUANTIZE_RANGED, OBSERVE_RANGE

# Operators that simulate quantisation or pruning in floating point; none may remain in a finished graph.
SIMULATED: tuple[Operator, ...] = (
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_LIVE,
    FAKE_QUANTIZE_RANGED,
    FAKE_QUANTIZE_LEARNED,
    OBSERVE_RANGE,
    STEPS_LIVE,
    STEPS_RANGED,
    STEPS_LEARNED,
    LINEAR_OF_STEPS,
    KEEP_TOP,
)

OPS: tuple[Operator, ...] = (
    *SIMULATED,
    QUANTIZE_DYNAMIC,
    QUANTIZE_ASYMMETRIC,
    QUANTIZE_STATIC,
    QLINEAR,
    QLINEAR_WEIGHT_ONLY,
    QEMBEDDING,
    QCONV2D,
    DEQUANTIZE,
    REQUIRE,
)


def _register(operators: tuple[Operator, ...]) -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for operator in operators:
        library.define(operator.name + operator.schema)  # type: ignore[no-untyped-call]  # as above
        library.impl(operator.name, operator, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]  # as above
    return library


# Kept alive: a Library unregisters its operators when it is collected.
LIBRARY = _register(OPS)

# It has no result: without this fx and torch.compile would take it for dead code.
torch.fx.node.has_side_effect(REQUIRE.overload)


def by_overload(target: object) -> Operator | None:
    """The operator a graph node calls, if it is one of ours."""
    for operator in OPS:
        if target is operator.overload:
            return operator
    return None
