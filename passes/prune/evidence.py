"""What calibration data says about a program, as far as rules of pruning go by it."""

from __future__ import annotations

from collections.abc import Sequence

from ..stream import Batches
from .decide import PruneRule
from .gradients import Loss, gathered
from .routed import masses
from .score import NOTHING, WITH_GRADIENT, Evidence
from .walk import Walk


def evidence(
    walk: Walk,
    rules: Sequence[PruneRule],
    batches: Batches | None,
    loss: Loss | None,
) -> Evidence:
    """Read off the data only what a rule wants. Raises CalibrationError where data that it wants is missing."""
    wanted = {rule.score for rule in rules}
    if batches is None:
        return NOTHING
    gradients = gathered(walk.program, batches(), loss) if loss and wanted & set(WITH_GRADIENT) else {}
    return Evidence(gradients, masses(walk, batches()) if "routed" in wanted else None)
