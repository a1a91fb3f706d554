"""From the indices of leaves to edits of the Plan, and back on any graph of the same model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...runtime.errors import PassError
from ...runtime.plan import Slice
from .axes import Atom, norm
from .keep import Kept, is_cut, kept, kept_leaves
from .walk import Walk


def slices_of(walk: Walk, of: Kept) -> list[Slice]:
    """One edit for every dimension of a stored tensor that loses something."""
    found = []
    for name, axes in walk.stored.items():
        for dim, axis in enumerate(axes):
            if is_cut(axis, of):
                mask = kept(axis, of)
                removed = tuple((~mask).nonzero().flatten().tolist())
                found.append(Slice(fqn=name, dim=dim, size=len(mask), removed=removed))
    return found


def leaves_of(walk: Walk, slices: Sequence[Slice]) -> dict[Atom, Tensor]:
    """What the edits keep of this graph's leaves. Raises PassError where they do not go by its atoms."""
    found: dict[Atom, Tensor] = {}
    for edit in slices:
        axes = walk.stored.get(edit.fqn)
        if axes is None:
            continue  # a tensor that this graph does not read
        mask = torch.ones(edit.size, dtype=torch.bool)
        mask[list(edit.removed)] = False
        try:
            found |= kept_leaves(norm(axes[edit.dim]), mask)
        except ValueError as error:
            raise PassError(
                f"a cut of {edit.fqn} cannot be made in another graph of the model",
                required="indices that its axes can express",
                found=str(error),
            ) from error
    fixed = next((leaf for leaf in found if leaf.reason is not None), None)
    if fixed is not None:
        raise PassError(
            "what was cut cannot be cut in another graph of the model",
            required="widths that no input or output has",
            found=fixed.reason or "indices that are used one by one",
            cure="give inputs= that ask for every output that will be used, or leave out the modules that it concerns",
        )
    return found
