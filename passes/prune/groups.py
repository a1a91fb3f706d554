"""Groups: what has to be pruned together, found in an analysis and told to people.

A group is one leaf atom. Pruning an index of it cuts every stored axis that contains it: 12 heads of 64 are a leaf of
12, and an index of it is 64 rows of three weights and 64 columns of a fourth. The coupling graph says why two
parameters are in one group: the calls along the shortest path between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import networkx as nx
from torch import Tensor

from ...runtime.report import block_of
from .axes import ONE_BY_ONE, Atom, Axis, leaves, norm, size
from .experts import floors
from .walk import Walk

Kind = Literal["heads", "rows", "channels", "hidden", "experts"]
KINDS: tuple[Kind, ...] = ("heads", "rows", "channels", "hidden", "experts")


@dataclass(frozen=True)
class Cut:
    """A dimension of a stored tensor. times: how many of its indices one index of the leaf is."""

    name: str
    dim: int
    times: int


@dataclass(frozen=True)
class Group:
    """One leaf and all that pruning it cuts.

    elements: stored numbers that one index holds; outermost: no other prunable leaf is outside it on any axis, which
        makes it the one that is pruned unless others are asked for
    floor: how many indices have to stay: as many as are chosen at once, of experts
    reason: why nothing of it may be pruned; empty where it may
    """

    leaf: Atom
    kind: Kind
    cuts: tuple[Cut, ...]
    elements: int
    outermost: bool
    reason: str
    floor: int = 1

    @property
    def size(self) -> int:
        """How many indices it has."""
        return self.leaf.size

    @property
    def name(self) -> str:
        """The first tensor that it cuts, and where."""
        first = self.cuts[0]
        return f"{first.name}[{first.dim}]" + (f"/{first.times}" if first.times > 1 else "")


def find_groups(walk: Walk, least: int = 2) -> list[Group]:
    """All groups in the order of the first tensor that they cut, frozen ones too.

    least: a leaf with fewer indices is not prunable
    """
    cuts: dict[Atom, list[Cut]] = {}
    inner: set[Atom] = set()
    for name, axes in walk.stored.items():
        for dim, axis in enumerate(axes):
            for leaf, times in multiplicities(axis).items():
                cuts.setdefault(leaf, []).append(Cut(name, dim, times))
            _note_inner(axis, inner, least)
    stored = {name: tensor for name in walk.stored if isinstance(tensor := walk.program.store.get(name), Tensor)}
    roles = {role: walk.leaves_with(role) for role in ("experts", "channels", "heads")}
    stay = floors(walk)
    return [
        Group(
            leaf,
            _kind(leaf, own, roles, stored),
            tuple(own),
            sum(_elements(stored[cut.name], cut) for cut in own),
            leaf not in inner,
            _reason(leaf, least, stay.get(leaf, 1)),
            stay.get(leaf, 1),
        )
        for leaf, own in cuts.items()
    ]


def _reason(leaf: Atom, least: int, floor: int) -> str:
    if leaf.reason is not None:
        return leaf.reason or ONE_BY_ONE
    if 1 < leaf.size <= floor:
        return f"{floor} are chosen at once, and there are {leaf.size}"
    return f"only {leaf.size} of it" if leaf.size < least else ""


def _elements(tensor: Tensor, cut: Cut) -> int:
    return tensor.numel() // tensor.shape[cut.dim] * cut.times


def multiplicities(axis: Axis) -> dict[Atom, int]:
    """For each leaf of an axis: how many indices of the axis one index of the leaf is."""
    found: dict[Atom, int] = {}
    axis = norm(axis)
    total = size(axis)
    for atom in axis if total else ():
        others = total // atom.size
        for part in atom.parts or ((atom,),):
            inner = {atom: 1} if atom.parts is None else multiplicities(part)
            for leaf, times in inner.items():
                found[leaf] = found.get(leaf, 0) + times * others
    return found


def _note_inner(axis: Axis, inner: set[Atom], least: int) -> None:
    """Add the leaves that lie inside a prunable one."""
    outside = False
    for atom in norm(axis):
        own = leaves((atom,))
        if outside:
            inner.update(own)
        elif atom.parts is not None:
            for part in atom.parts:
                _note_inner(part, inner, least)
        outside = outside or any(leaf.reason is None and leaf.size >= least for leaf in own)


def _kind(leaf: Atom, cuts: Sequence[Cut], roles: Mapping[str, set[Atom]], stored: Mapping[str, Tensor]) -> Kind:
    if leaf in roles["experts"]:
        return "experts"
    filters = sum(stored[cut.name].dim() > 2 for cut in cuts)
    if leaf in roles["channels"] and filters >= sum(stored[cut.name].dim() == 2 for cut in cuts):
        return "channels"
    if leaf in roles["heads"]:
        return "heads"
    # The residual stream is what several blocks read and write; between two layers of a plain stack lie rows.
    matrices = [cut.name for cut in cuts if stored[cut.name].dim() > 1]
    blocks = {block_of(name) for name in matrices}
    several = sum(block.rpartition(".")[2].isdigit() for block in blocks) > 1
    return "hidden" if several and len(matrices) > 2 else "rows"


def coupling(walk: Walk) -> nx.Graph:
    """Stored axes ("fc1.weight[0]") and atoms as nodes; an edge for each call that showed two of them to be one."""
    graph = nx.Graph()
    for name, axes in walk.stored.items():
        for dim, axis in enumerate(axes):
            for atom in axis:
                graph.add_edge(f"{name}[{dim}]", atom, op="")
    for link in walk.space.links:
        if not graph.has_edge(link.a, link.b):
            graph.add_edge(link.a, link.b, op=link.op)
    return graph


def ties(graph: nx.Graph, group: Group) -> dict[Cut, list[str]]:
    """For each cut of a group but the first: the calls on the shortest path to it from the first."""
    own = graph.subgraph(n for n in graph if isinstance(n, str) or group.leaf in leaves((n,)))
    first, *others = group.cuts
    paths = nx.single_source_shortest_path(own, f"{first.name}[{first.dim}]")
    found = {}
    for cut in others:
        path = paths.get(f"{cut.name}[{cut.dim}]", [])
        found[cut] = list(dict.fromkeys(op for edge in pairwise(path) if (op := own.edges[edge]["op"])))
    return found


def kept_count(n: int, ratio: float, multiple: int = 1) -> int:
    """How many of n indices stay when `ratio` of them go: never fewer than were asked for, nor than one.

    multiple: what stays is a multiple of it where n is large enough, rounded up
    """
    stay = max(1, n - math.floor(n * ratio + 1e-9))
    rounded = -(-stay // multiple) * multiple
    return min(n, rounded)
