"""The algebra of axes by itself: ties, cuts and views."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwindle.passes.prune.axes import Space, is_frozen, leaves, norm, size, why_frozen
from dwindle.passes.prune.keep import kept, kept_leaves


def sizes(axis: object) -> list[int]:
    return [atom.size for atom in norm(axis)]  # type: ignore[arg-type]  # an axis


def test_a_tie_splits_what_is_coarser() -> None:
    space = Space()
    whole, parts = space.axis(12), (*space.axis(3), *space.axis(4))
    space.tie(whole, parts)
    assert sizes(whole) == [3, 4]
    assert leaves(whole) == leaves(parts)


def test_factors_that_overlap_are_split_by_what_they_share() -> None:
    space = Space()
    a, b = (*space.axis(6), *space.axis(2)), (*space.axis(2), *space.axis(6))
    space.tie(a, b)
    assert sizes(a) == sizes(b) == [2, 3, 2]


def test_factors_that_share_nothing_are_frozen_with_the_reason() -> None:
    space = Space(op="view_3")
    a, b = (*space.axis(2), *space.axis(3)), (*space.axis(3), *space.axis(2))
    space.tie(a, b)
    assert is_frozen(a)
    assert is_frozen(b)
    assert "view_3: 2 and 3 have no common factor" in why_frozen(a)


def test_a_refinement_is_seen_by_every_axis_that_mentions_the_atom() -> None:
    space = Space()
    first = space.axis(24)
    later = space.axis(24)
    space.tie(first, later)
    assert [sizes(a) for a in space.regroup([later], [4, 6])] == [[4], [6]]
    assert sizes(first) == [4, 6]


def test_a_sum_met_with_a_product_ties_its_terms() -> None:
    """A fused QKV: three outputs one after another, seen as [3, n]."""
    space = Space()
    q, k, v = (space.axis(8) for _ in range(3))
    fused = space.sum([q, k, v])
    three, n = space.regroup([fused], [3, 8])
    assert leaves(three) == []
    assert leaves(q) == leaves(k) == leaves(v) == leaves(n)


def test_a_sum_whose_terms_are_not_whole_rows_is_frozen() -> None:
    space = Space(op="view")
    fused = space.sum([space.axis(3), space.axis(5)])
    space.regroup([fused], [2, 4])
    assert "not whole rows of 4" in why_frozen(fused)


def test_rotary_halves_are_one() -> None:
    space = Space()
    head = space.axis(8)
    left, right = space.cut(head, 4)
    space.tie(space.sum([right, left]), head)
    assert leaves(left) == leaves(right) == leaves(head)
    assert [leaf.size for leaf in leaves(head)] == [4]


def test_a_cut_goes_by_whole_rows_or_freezes() -> None:
    space = Space(op="slice")
    axis = (*space.axis(3), *space.axis(4))
    left, right = space.cut(axis, 8)
    assert (size(left), size(right)) == (8, 4)
    assert leaves(left)[1:] == leaves(right)
    space.cut(axis, 6)
    assert is_frozen(axis)


def test_a_part_of_one_index_cannot_be_pruned() -> None:
    space = Space()
    tokens = space.axis(5)
    space.cut(tokens, 1)
    assert [leaf.size for leaf in leaves(tokens)] == [4]


def test_only_the_segment_that_fails_is_frozen() -> None:
    space = Space()
    channels, height, width = space.axis(64), space.axis(6, "space"), space.axis(35)
    made = space.regroup([channels, height, width], [64, 21, 10])
    assert made[0] == channels
    assert not is_frozen(channels)
    assert is_frozen(width)


def test_frozen_neighbours_are_one_block() -> None:
    """Windows of a feature map: 8x7 seen as 7x8."""
    space = Space()
    a, b = space.axis(8, "space"), space.axis(7, "space")
    made = space.regroup([a, b], [7, 8])
    assert [sizes(axis) for axis in made] == [[7], [8]]
    assert all(is_frozen(axis) for axis in made)


def test_a_frozen_sum_is_one_block_too() -> None:
    space = Space()
    both = space.sum([space.axis(5, "an input"), space.axis(7, "an input")])
    assert [sizes(axis) for axis in space.regroup([both], [3, 4])] == [[3], [4]]
    assert why_frozen(both) == "an input"


def test_what_is_used_one_by_one_is_a_block_too() -> None:
    space = Space()
    six = space.axis(6)
    for at in range(1, 6):
        space.cut(six, at)
    two, three = space.regroup([six], [2, 3])
    other = space.axis(2)
    space.tie((*two, *space.axis(4)), (*other, *space.axis(4)))
    assert is_frozen(two)
    assert is_frozen(three)
    assert why_frozen(other)


def test_frozen_is_passed_on_by_a_tie() -> None:
    space = Space()
    a, b = space.axis(6, "it is an output"), space.axis(6)
    space.tie(a, b)
    assert why_frozen(b) == "it is an output"


factors = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(factors, st.data())
def test_a_view_keeps_the_number_of_indices(dims: list[int], data: st.DataObject) -> None:
    space = Space()
    total = math.prod(dims)
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    outer = data.draw(st.sampled_from(divisors))
    made = space.regroup([space.axis(n) for n in dims], [outer, total // outer])
    assert [size(axis) for axis in made] == [outer, total // outer]


@given(st.integers(2, 4), st.integers(2, 4), st.lists(st.integers(1, 3), min_size=1, max_size=3), st.randoms())
def test_leaves_are_found_from_what_is_kept_of_an_axis(h: int, d: int, terms: list[int], random: object) -> None:
    space = Space()
    head, inner = space.axis(h), space.axis(d)
    axis = space.sum([(*head, *inner), *(space.axis(n) for n in terms)])
    masks = {}
    for leaf in leaves(axis):
        mask = [random.random() < 0.6 for _ in range(leaf.size)]  # type: ignore[attr-defined]  # a Random
        mask[0] = True
        masks[leaf] = torch.tensor(mask)
    found = kept_leaves(axis, kept(axis, masks))
    assert set(found) == {leaf for leaf, mask in masks.items() if not mask.all()}
    assert all(bool((found[leaf] == masks[leaf]).all()) for leaf in found)


def test_indices_that_no_leaves_give_are_refused() -> None:
    space = Space()
    axis = (*space.axis(2), *space.axis(2))
    with pytest.raises(ValueError, match="do not go by the atoms"):
        kept_leaves(axis, torch.tensor([True, False, False, True]))
