"""Masks that training changes: they lie in the store, so no step traces anything anew.

    chosen      mask (n,)                            written by the course, from scores of the weights
    learned     keep_top(score (n,), stay ())        trained with everything else; the course lowers `stay`

A gate is called by the first axis that its group cuts, and by which leaf of that axis it is; so it is found again in
every graph of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...runtime.errors import PassError
from ...runtime.ops.keep_top import KEEP_TOP
from ...runtime.program import Program, value_of
from ...runtime.store import Store
from ..quantize.sites import MASKED, find_sites
from .axes import Atom, Axis, leaves
from .groups import Group
from .keep import Kept, is_cut
from .masked import Masks, masked
from .walk import Walk

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """Where the mask of one group lies; `size` is how many indices it has.

    fqn, dim: the first axis that the group cuts; place: of its leaf among that axis' leaves
    """

    fqn: str
    dim: int
    place: int
    size: int
    learned: bool = False

    @staticmethod
    def of(walk: Walk, group: Group, *, learned: bool) -> Gate:
        """The gate of a group."""
        first = group.cuts[0]
        place = leaves(walk.stored[first.name][first.dim]).index(group.leaf)
        return Gate(first.name, first.dim, place, group.size, learned)

    def __call__(self, part: str) -> str:
        """The name of one part: mask, or score and stay; and worth, of scores that are gathered over steps."""
        return f"{self.fqn}_{part}_{self.dim}" + (f"_{self.place}" if self.place else "")

    def place_in(self, store: Store) -> None:
        """Put its tensors into the store, with everything kept."""
        beside = store.get(self.fqn)
        assert isinstance(beside, Tensor)
        device = beside.device
        if self.learned:
            # All alike: an optimizer that goes by signs then orders them at whatever learning rate.
            store.put(self("score"), nn.Parameter(torch.zeros(self.size, device=device)))
            store.put(self("stay"), torch.tensor(self.size, device=device), persistent=False)
        else:
            store.put(self("mask"), torch.ones(self.size, device=device))

    def leaf(self, walk: Walk) -> Atom | None:
        """Its leaf in another graph of the model; None where the graph does not read it.

        Raises PassError where that graph uses the axis in another way.
        """
        axes = walk.stored.get(walk.program.store.canonical(self.fqn))
        if axes is None:
            return None
        found = leaves(axes[self.dim])
        if self.place >= len(found) or found[self.place].size != self.size or found[self.place].reason is not None:
            raise PassError(
                f"a cut of {self.fqn} cannot be made in another graph of the model",
                required=f"{self.size} indices that go together and may be cut",
                found=next((leaf.reason for leaf in found if leaf.reason), None) or [leaf.size for leaf in found],
                cure="leave this module out of what is pruned",
            )
        return found[self.place]

    def node(self, program: Program, before: fx.Node) -> fx.Node:
        """The mask as the graph reads it."""
        if not self.learned:
            return program.get_attr(self("mask"), before)
        score, stay = (program.get_attr(self(part), before) for part in ("score", "stay"))
        return program.emit_alike(KEEP_TOP.overload, score, stay, like=before)

    def kept(self, store: Store) -> Tensor:
        """bool (n,): what stays now."""
        if not self.learned:
            return self._tensor(store, "mask").detach().cpu() > 0.5
        stay, score = self.learnt(store)
        kept: Tensor = KEEP_TOP(score.detach(), stay).cpu() > 0.5
        return kept

    def learnt(self, store: Store) -> tuple[Tensor, Tensor]:
        """(how many stay, scores (n,)) as they are now, of a mask that is learned."""
        return self._tensor(store, "stay"), self._tensor(store, "score")

    @torch.no_grad()
    def set(self, store: Store, mask: Tensor) -> None:
        """Write what stays: the mask itself, or how many of the scores do."""
        if self.learned:
            self._tensor(store, "stay").fill_(int(mask.sum()))
        else:
            self._tensor(store, "mask").copy_(mask)

    def _tensor(self, store: Store, part: str) -> Tensor:
        value = store.get(self(part))
        assert isinstance(value, Tensor), f"{self(part)} is not stored"
        return value


def gated(program: Program, walk: Walk, gates: list[Gate], *, weights: bool) -> Program:
    """Mask every group that has a gate, in place. `walk` is that of this very program.

    weights: also what calls read of a weight, so that a cut index widens no scale
    """
    of: dict[Atom, Gate] = {leaf: gate for gate in gates if (leaf := gate.leaf(walk)) is not None}
    kept: Kept = {leaf: torch.ones(leaf.size, dtype=torch.bool) for leaf in of}
    made: dict[Atom, fx.Node] = {}

    def leaf_mask(leaf: Atom, before: fx.Node) -> fx.Node:
        if leaf not in made:
            made[leaf] = of[leaf].node(program, before)
        return made[leaf]

    masks = Masks(program, kept, leaf_mask)
    if weights:
        for name in dict.fromkeys(site.fqn for site in find_sites(program)):
            _mask_weight(program, masks, name, walk.stored[name], kept)
    return masked(walk, masks)


def _mask_weight(program: Program, masks: Masks, name: str, axes: list[Axis], kept: Kept) -> None:
    cut = [(dim, axis) for dim, axis in enumerate(axes) if is_cut(axis, kept)]
    for node in [n for n in program.graph.nodes if program.tensor_of(n) == name] if cut else ():
        x, readers, anchor = node, list(node.users), node.next
        for dim, axis in cut:
            mask = masks.beside(axis, node, dim - value_of(node).dim())
            x = program.emit(aten.mul.Tensor, x, mask, like=anchor)
            x.meta[MASKED] = True
        for user in readers:
            user.replace_input_with(node, x)
