"""Modules that rules name, and what the graph says of them.

A rule may name the modules of which one side is meant, as DeepSpeed's sections do:

    outputs     the dimension of a linear's or convolution's weight that its bias has: rows, filters
    inputs      the one that meets what comes in: heads, of an attention's output projection

Then every module that it names must have a group there that the rule may take: what was asked for by name is never
left out in silence. What people say of the structure itself, heads and related modules, is compared with the graph
and used for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

from ...runtime.errors import RecipeError, nearest
from ..quantize.decide import names_of, require_free
from ..selection import selected_by
from .groups import Group
from .walk import Walk

if TYPE_CHECKING:
    from .decide import PruneRule

aten = torch.ops.aten

Side = Literal["any", "outputs", "inputs"]
LISTING = "`dwindle inspect MODEL --groups` lists all groups, and why some stay"

# Which argument the weight is, and its dimensions of outputs and of inputs.
_PRODUCTS = {
    aten.linear.default: (1, 0, 1),
    aten.addmm.default: (2, 1, 0),  # GPT-2's Conv1D keeps (K, N)
    aten.mm.default: (1, 1, 0),
    aten.matmul.default: (1, 1, 0),
    aten.conv1d.default: (1, 0, 1),
    aten.conv2d.default: (1, 0, 1),
    aten.conv3d.default: (1, 0, 1),
}


@dataclass(frozen=True)
class Names:
    """The modules of an analysis.

    owners: paths of the modules that have a stored tensor, by its name
    sides: by name of a weight that linears or convolutions read: the dimensions that are outputs, and inputs
    """

    owners: Mapping[str, tuple[str, ...]]
    sides: Mapping[str, Mapping[Side, frozenset[int]]]

    @staticmethod
    def over(walk: Walk) -> Names:
        """Of all stored tensors that a graph reads."""
        owners = {name: tuple(names_of(walk.program.store, name)) for name in walk.stored}
        sides: dict[str, dict[Side, frozenset[int]]] = {}
        for name, outputs, inputs in _weights(walk):
            before = sides.get(name, {})
            of: dict[Side, int] = {"outputs": outputs, "inputs": inputs}
            sides[name] = {side: before.get(side, frozenset()) | {dim} for side, dim in of.items()}
        return Names(owners, sides)

    def of(self, group: Group, side: Side = "any") -> set[str]:
        """The modules that a group cuts on that side."""
        return {
            path
            for cut in group.cuts
            if side == "any" or cut.dim in self.sides.get(cut.name, {}).get(side, ())
            for path in self.owners[cut.name]
        }

    def modules(self, side: Side = "any") -> list[str]:
        """All that a rule for that side may name."""
        stored = self.owners if side == "any" else self.sides
        return sorted({path for name in stored for path in self.owners[name]})

    def relatable(self) -> list[str]:
        """What DeepSpeed's related_modules reach: linears, convolutions and batch norms."""
        norms = {path for name, own in self.owners.items() if name.endswith("running_mean") for path in own}
        return sorted({*self.modules("outputs"), *norms})


def _weights(walk: Walk) -> Iterator[tuple[str, int, int]]:
    """The stored weight of every linear and convolution: its name, dimension of outputs, dimension of inputs."""
    for node in walk.program.graph.nodes:
        if node.op == "call_function" and node.target in _PRODUCTS:
            position, outputs, inputs = _PRODUCTS[node.target]
            weight = node.args[position]
            if isinstance(weight, fx.Node) and weight.target in (aten.t.default, aten.numpy_T.default):
                weight, outputs, inputs = weight.args[0], inputs, outputs
            name = walk.program.tensor_of(weight) if isinstance(weight, fx.Node) else None
            if name is not None and len(walk.stored.get(name, ())) > 1:
                yield name, outputs, inputs


def require_names(names: Names, rules: Sequence[PruneRule], groups: Sequence[Group]) -> None:
    """Raise RecipeError for a rule that names what is not there, what another one of its section names, or what has
    no group that the rule may take on the side it means.
    """
    chosen: dict[tuple[str, str], str] = {}  # by section and module: the pattern that chose it
    for rule in rules:
        known = names.modules(rule.side)
        for pattern in rule.patterns:
            for path in _searched(pattern, known):
                if rule.section:
                    require_free(chosen, rule.section, path, pattern)
                    chosen[rule.section, path] = pattern
        for path in known if rule.side != "any" else ():
            if selected_by([path], rule.modules, rule.patterns):
                _require_group(names, rule, path, groups)


def _require_group(names: Names, rule: PruneRule, path: str, groups: Sequence[Group]) -> None:
    there = [group for group in groups if path in names.of(group, rule.side)]
    if any(not group.reason and rule.takes(group) for group in there):
        return
    found = [
        f"{group.kind} of {group.size}" + (f", which stay: {group.reason}" if group.reason else "") for group in there
    ]
    raise RecipeError(
        f"{rule.section or 'a pruning rule'} names {path}, whose {rule.side} cannot be pruned so",
        required=f"{rule.side} that are {' or '.join(rule.kinds)} in the graph",
        found="; ".join(dict.fromkeys(found)) or "nothing that can be pruned",
        cure=f"narrow the pattern: it is searched for anywhere in a name; {LISTING}",
    )


def require_one(rules: Sequence[PruneRule], group: Group) -> None:
    """Raise RecipeError where two rules of one section choose one group: they may differ in how much goes."""
    sections = [rule.section for rule in rules if rule.section]
    twice = next((section for section in sections if sections.count(section) > 1), None)
    if twice is not None:
        raise RecipeError(
            f"two entries of {twice} choose what is one group in the graph",
            required="one entry for modules that are pruned together",
            found=f"{group.name}, a group of {len(group.cuts)} tensors",
            cure="name these modules in one entry; in DeepSpeed's terms, in one of different_groups",
        )


def require_expected(names: Names, rule: PruneRule, groups: Sequence[Group]) -> None:
    """Raise RecipeError where the groups that a rule selects are not as it says: num_heads, related."""
    for group in groups if rule.num_heads is not None else ():
        if group.size != rule.num_heads:
            raise RecipeError(
                "num_heads is not what the model has",
                required=f"the graph says {group.size} in {group.name}; those that share keys and values count as one",
                found=f"num_heads {rule.num_heads}",
                cure=f"set num_heads to {group.size}; a recipe may leave it out",
            )
    cut = {path for group in groups for path in names.of(group)}
    for pattern in rule.related:
        for path in _searched(pattern, names.relatable()):
            if path not in cut:
                raise RecipeError(
                    f"related_modules names {path}, which is not pruned together with the modules",
                    required=f"the graph says {', '.join(sorted(cut)[:8])}{', ...' if len(cut) > 8 else ''}",
                    found=f"{path}, by {pattern!r}",
                    cure="correct the pattern, or leave related_modules out: the graph is followed either way",
                )


def _searched(pattern: str, known: Collection[str]) -> list[str]:
    """The modules that a regular expression is found in. Raises RecipeError where there is none."""
    found = [path for path in known if re.search(pattern, path)]
    if not found:
        near = nearest(pattern.strip("*."), known)
        raise RecipeError(
            f"the pruning rule for modules {pattern!r} matches nothing",
            required=f"a pattern over the {len(known)} modules that may be meant",
            found=pattern,
            cure=f"nearest names: {', '.join(near) or 'none, the model has no such module'}",
        )
    return found
