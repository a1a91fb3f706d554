"""Which indices are kept: of leaves, and of the axes they make up.

    kept(product)  Kronecker product of the factors'        kept(sum)  the parts' one after another

`kept_leaves` goes the other way, from what was cut of a stored tensor to its leaves; so a cut that was decided on one
graph of a model is replayed on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .axes import Atom, Axis, leaves, norm, size

Kept = Mapping[Atom, Tensor]
"""By leaf: bool (n,), True where an index is kept. Leaves that are not named keep all."""


def kept(axis: Axis, of: Kept) -> Tensor:
    """bool (n,): the indices of an axis that are kept."""
    mask = torch.ones(1, dtype=torch.bool)
    for atom in norm(axis):
        mask = (mask[:, None] & _of_atom(atom, of)[None, :]).reshape(-1)
    return mask


def _of_atom(atom: Atom, of: Kept) -> Tensor:
    if atom.parts is not None:
        return torch.cat([kept(part, of) for part in atom.parts])
    found = of.get(atom)
    return torch.ones(atom.size, dtype=torch.bool) if found is None else found


def is_cut(axis: Axis, of: Kept) -> bool:
    """Whether an axis has a leaf of which something is cut."""
    return any(leaf in of for leaf in leaves(axis))


def count(axis: Axis, of: Kept, upto: int | None = None) -> int:
    """How many indices are kept, or how many of the first `upto`."""
    return int(kept(axis, of)[:upto].sum())


def kept_leaves(axis: Axis, mask: Tensor) -> dict[Atom, Tensor]:
    """Leaves of which `mask`, bool (n,) over the axis, cuts something. Raises ValueError if no leaves give it."""
    found: dict[Atom, Tensor] = {}
    _invert(norm(axis), mask, found)
    cut = {leaf: own for leaf, own in found.items() if not bool(own.all())}
    if not torch.equal(kept(axis, cut), mask):
        raise ValueError("the indices do not go by the atoms of the axis")
    return cut


def _invert(axis: Axis, mask: Tensor, found: dict[Atom, Tensor]) -> None:
    shape = [atom.size for atom in axis]
    grid = mask.reshape(shape)
    for i, atom in enumerate(axis):
        others = [j for j in range(len(axis)) if j != i]
        own = grid.amax(others) if others else grid  # kept if any index of the product is
        if atom.parts is None:
            found[atom] = own & found.get(atom, torch.ones_like(own))
            continue
        for part, piece in zip(atom.parts, torch.split(own, [size(p) for p in atom.parts]), strict=True):
            _invert(norm(part), piece, found)


def select(tensor: Tensor, axes: Sequence[Axis], of: Kept) -> Tensor:
    """A stored tensor without what is cut."""
    for dim, axis in enumerate(axes):
        if is_cut(axis, of):
            tensor = tensor.index_select(dim, kept(axis, of).nonzero().flatten().to(tensor.device))
    return tensor
