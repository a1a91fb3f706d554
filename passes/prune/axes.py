"""The algebra of axes: which index of one tensor is which index of another.

    axis    a flat product of atoms, outer first: [h, d] is 12 heads of 64; () is a dimension of size 1
    atom    a leaf; or a product of atoms, which a leaf turns out to be; or a sum of axes, which a cut makes of it

`tie` says that two axes are one, `cut` that an axis is used in parts. Both refine atoms in place, so a view in layer
40 is seen by every axis of layer 1 that mentions the atom. Nothing else is needed: **a group is one leaf**, and what
pruning an index of it cuts is every axis that contains it.

    tie      from the outside in: same atom; same size: one becomes the other; else both give up their common divisor
    sum      met with a product, cuts its outermost factor: sum(p, q) = [2, n] means p = n and q = n, since the parts
             of the 2 have size 1 and vanish
    frozen   an atom that may not be pruned, and why. What cannot be expressed freezes both sides; it never guesses

Sizes are plain numbers: symbolic dimensions are taken at one size each, and are frozen as all inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

ONE_BY_ONE = "its indices are used one by one"


@dataclass(eq=False)
class Atom:
    """A factor of an axis; compared by identity.

    becomes: the product that it has turned out to be; parts: the axes that it is the sum of; reason: why it is frozen
    """

    size: int
    number: int
    reason: str | None = None
    becomes: Axis | None = None
    parts: tuple[Axis, ...] | None = None

    def __repr__(self) -> str:
        kind = "+" if self.parts else "!" if self.reason else ""
        return f"{self.size}{kind}#{self.number}"


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class Link:
    """Two atoms that were found to be one, or a part and its whole, and the call that showed it."""

    a: Atom
    b: Atom
    op: str


class Mismatch(Exception):
    """Two axes that cannot be refined into one another; those who tie freeze them."""


@dataclass
class Space:
    """All atoms of one analysis. op: the call that is being looked at, which links are put down to."""

    op: str = ""
    links: list[Link] = field(default_factory=list)
    count: int = 0

    def atom(self, size: int, reason: str | None = None) -> Atom:
        """A fresh leaf."""
        self.count += 1
        return Atom(size, self.count, reason)

    def axis(self, size: int, reason: str | None = None) -> Axis:
        """A fresh axis of one leaf; frozen where there is a reason."""
        return () if size == 1 else (self.atom(size, reason if size else f"{self.op}: nothing in it"),)

    def sum(self, axes: Iterable[Axis]) -> Axis:
        """The axes one after another; empty ones add nothing."""
        parts = [part for axis in axes for part in _parts(norm(axis)) if size(part)]
        if len(parts) < 2:
            return parts[0] if parts else self.axis(0)
        whole = self.atom(sum(map(size, parts)))
        whole.parts = tuple(parts)
        return (whole,)

    def freeze(self, axis: Axis, reason: str) -> None:
        """No index of `axis` may be pruned from now on."""
        for leaf in leaves(axis):
            leaf.reason = leaf.reason or reason

    def tie(self, a: Axis, b: Axis) -> None:
        """Index i of `a` is index i of `b`. What cannot be expressed is frozen."""
        try:
            self._tie(a, b)
        except Mismatch as mismatch:
            for axis in (a, b):
                self.freeze(axis, str(mismatch))

    def _tie(self, a: Axis, b: Axis) -> None:
        x, y = norm(a), norm(b)
        if size(x) != size(y):
            raise Mismatch(f"{self.op}: an axis of {size(x)} meets one of {size(y)}")
        if is_frozen(x) or is_frozen(y):
            reason = why_frozen(x) or why_frozen(y) or ONE_BY_ONE
            self._note(x, y)
            for axis in (x, y):
                self.freeze(axis, reason)
            return
        while x and y:
            if x[0] is y[0]:
                x, y = x[1:], y[1:]
            elif x[0].size == y[0].size:
                self._unite(x[0], y[0])
                x, y = x[1:], y[1:]
            else:
                self._refine(x, y)
                x, y = norm(x), norm(y)

    def _note(self, x: Axis, y: Axis) -> None:
        for a, b in zip(x, y, strict=False):
            self.links.append(Link(a, b, self.op))

    def _unite(self, x: Atom, y: Atom) -> None:
        """Two atoms of one size are one."""
        self.links.append(Link(x, y, self.op))
        if x.parts is not None and y.parts is not None:
            self._unite_sums(x, y)
        elif x.parts is None:
            x.becomes = (y,)
            if x.reason is not None:
                self.freeze((y,), x.reason)
        else:
            y.becomes = (x,)
            if y.reason is not None:
                self.freeze((x,), y.reason)

    def _unite_sums(self, x: Atom, y: Atom) -> None:
        assert x.parts is not None
        rest: Axis = (y,)
        for i, part in enumerate(x.parts):
            last = i == len(x.parts) - 1
            first, rest = (rest, ()) if last else self._cut(rest, size(part))
            self._tie(part, first)
        y.becomes = (x,)

    def _refine(self, x: Axis, y: Axis) -> None:
        """Outermost atoms of different sizes: split so that they have one size, or raise Mismatch."""
        if x[0].parts is not None:
            self._distribute(x[0], y)
        elif y[0].parts is not None:
            self._distribute(y[0], x)
        else:
            common = math.gcd(x[0].size, y[0].size)
            if common == 1:
                raise Mismatch(f"{self.op}: {x[0].size} and {y[0].size} have no common factor")
            for atom in (x[0], y[0]):
                self.split(atom, common)

    def split(self, atom: Atom, outer: int) -> None:
        """A leaf turns out to be [outer, size / outer]."""
        if atom.size == outer:
            return
        made = tuple(self.atom(n, atom.reason) for n in (outer, atom.size // outer))
        self.links += [Link(atom, part, self.op) for part in made]
        atom.becomes = made

    def _distribute(self, total: Atom, product: Axis) -> None:
        """A sum met with a product: the product's outermost factor is cut as the sum is."""
        product = self._prefix(product, total.size)
        outer, inner = product[0], product[1:]
        assert total.parts is not None
        step = size(inner)
        rest: Axis = (outer,)
        if any(size(part) % step for part in total.parts):
            raise Mismatch(f"{self.op}: parts {[size(p) for p in total.parts]} are not whole rows of {step}")
        for i, part in enumerate(total.parts):
            last = i == len(total.parts) - 1
            first, rest = (rest, ()) if last else self._cut(rest, size(part) // step)
            self._tie(part, (*first, *inner))
        total.becomes, total.parts = (outer, *inner), None

    def _prefix(self, axis: Axis, wanted: int) -> Axis:
        """The outer atoms of `axis` that have `wanted` indices; the last of them is split where need be."""
        taken: list[Atom] = []
        for atom in axis:
            if wanted == 1:
                break
            if wanted % atom.size:
                if atom.size % wanted or atom.parts is not None:
                    raise Mismatch(f"{self.op}: {wanted} is not made of whole factors of {list(map(_size, axis))}")
                self.split(atom, wanted)
                atom = norm((atom,))[0]
            taken.append(atom)
            wanted //= atom.size
        return tuple(taken)

    def cut(self, axis: Axis, at: int) -> tuple[Axis, Axis]:
        """The first `at` indices and the others. Off an atom's boundary the axis is frozen."""
        total = size(axis)
        try:
            return self._cut(axis, at)
        except Mismatch as mismatch:
            self.freeze(axis, str(mismatch))
            return self.axis(at, str(mismatch)), self.axis(total - at, str(mismatch))

    def _cut(self, axis: Axis, at: int) -> tuple[Axis, Axis]:
        axis = norm(axis)
        total, inner = size(axis), size(axis[1:])
        assert 0 < at < total
        if at % inner:
            raise Mismatch(f"{self.op}: cut at {at} inside a factor of {[atom.size for atom in axis]}")
        outer, at = axis[0], at // inner
        if outer.parts is None:
            made = tuple(self.axis(n, outer.reason) for n in (at, outer.size - at))
            self.links += [Link(outer, atom, self.op) for part in made for atom in part]
            outer.parts = made
        left, right = self._divide(outer, at)
        return (*left, *axis[1:]), (*right, *axis[1:])

    def _divide(self, total: Atom, at: int) -> tuple[Axis, Axis]:
        """A sum in two; a part that lies across the boundary is cut itself."""
        assert total.parts is not None
        left: list[Axis] = []
        parts = list(total.parts)
        while parts and at:
            part = parts.pop(0)
            if size(part) > at:
                first, rest = self._cut(part, at)
                parts.insert(0, rest)
                part = first
            left.append(part)
            at -= size(part)
        total.parts = (*left, *parts)
        return self.sum(left), self.sum(parts)

    def regroup(self, axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
        """A view: the same indices in the same order, in dimensions of other sizes.

        Dimensions are taken in segments in which the numbers of indices agree; one that cannot be expressed is
        frozen, and no other.
        """
        if 0 in sizes or any(size(axis) == 0 for axis in axes):
            for axis in axes:
                self.freeze(axis, f"{self.op}: nothing in it")
            return [self.axis(n, f"{self.op}: nothing in it") for n in sizes]
        made: list[Axis] = []
        for old, new in _segments([size(axis) for axis in axes], sizes):
            atoms = self._merged(tuple(atom for i in old for atom in norm(axes[i])))
            try:
                made += self._dealt(atoms, [sizes[j] for j in new])
            except Mismatch as mismatch:
                for i in old:
                    self.freeze(axes[i], str(mismatch))
                made += [self.axis(sizes[j], str(mismatch)) for j in new]
        return made

    def _merged(self, atoms: Axis) -> Axis:
        """Neighbouring frozen atoms as one: space has no structure that is worth keeping."""
        made: list[Atom] = []
        for atom in atoms:
            if made and is_frozen((made[-1],)) and is_frozen((atom,)):
                made[-1] = self.atom(made[-1].size * atom.size, why_frozen((atom,)) or ONE_BY_ONE)
            else:
                made.append(atom)
        return tuple(made)

    def _dealt(self, atoms: Axis, sizes: Sequence[int]) -> list[Axis]:
        made = []
        for wanted in sizes:
            axis, atoms = self._taken(atoms, wanted)
            made.append(axis)
        return made

    def _taken(self, atoms: Axis, wanted: int) -> tuple[Axis, Axis]:
        """(the outer atoms with `wanted` indices, the others)."""
        taken: list[Atom] = []
        while wanted > 1:
            first = atoms[0]
            if wanted % first.size == 0:
                taken.append(first)
                atoms, wanted = atoms[1:], wanted // first.size
                continue
            common = math.gcd(wanted, first.size)
            if common == 1:
                raise Mismatch(f"{self.op}: {wanted} is not made of whole factors of {[a.size for a in atoms]}")
            if first.parts is not None and is_frozen((first,)):  # a block, whatever it is the sum of
                first = self.atom(first.size, why_frozen((first,)) or ONE_BY_ONE)
                atoms = (first, *atoms[1:])
            if first.parts is None:
                self.split(first, common)
            else:
                self._tie((first,), (self.atom(common), self.atom(first.size // common)))
            atoms = norm(atoms)
        return tuple(taken), atoms


def norm(axis: Axis) -> Axis:
    """The axis as it is known by now: atoms in place of what they have become, without those of size 1."""
    if not any(atom.becomes is not None or atom.size == 1 or _single(atom) for atom in axis):
        return axis
    made: list[Atom] = []
    for atom in axis:
        if _single(atom):
            assert atom.parts is not None
            atom.becomes, atom.parts = atom.parts[0], None
        if atom.becomes is not None:
            atom.becomes = norm(atom.becomes)
            made += atom.becomes
        elif atom.size != 1:
            made.append(atom)
    return tuple(made)


def size(axis: Axis) -> int:
    """How many indices it has."""
    return math.prod(atom.size for atom in axis)


def leaves(axis: Axis) -> list[Atom]:
    """All leaves that an axis is made of, outer and earlier ones first, each once."""
    found: dict[Atom, None] = {}
    for atom in norm(axis):
        inner = [atom] if atom.parts is None else [leaf for part in atom.parts for leaf in leaves(part)]
        found.update(dict.fromkeys(inner))
    return list(found)


def is_frozen(axis: Axis) -> bool:
    """Whether nothing of it can be pruned."""
    return bool(axis) and all(leaf.reason is not None for leaf in leaves(axis))


def why_frozen(axis: Axis) -> str:
    """The first reason among its leaves; empty where none is frozen."""
    return next((leaf.reason for leaf in leaves(axis) if leaf.reason), "")


def _single(atom: Atom) -> bool:
    return atom.parts is not None and len(atom.parts) == 1


def _parts(axis: Axis) -> tuple[Axis, ...]:
    """The terms of an axis that is a sum and nothing else."""
    alone = axis[0].parts if len(axis) == 1 else None
    return alone if alone is not None else (axis,)


def _size(atom: Atom) -> int:
    return atom.size


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Ranges of dimensions with equal products, as short as can be."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        start = i, j
        left, right = 1, 1
        while True:
            if left == right and (i, j) != start:
                break
            if (left <= right and i < len(old)) or j >= len(new):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        found.append((range(start[0], i), range(start[1], j)))
    return found
