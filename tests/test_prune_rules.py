"""The transfer rules on the cases of `rules_*.py`: what each says is right, and needed. Every line of their table has a
case, so a new rule comes with one.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pruning import groups_of, random_cut, walked
from rules import ROWS, Around, called, check, mutated, sorted_cuts, told, w
from rules_pointwise import CASES as POINTWISE
from rules_pointwise import NO_RULE
from rules_products import CASES as PRODUCTS
from rules_shapes import CASES as SHAPES
from rules_space import CASES as SPACE
from rules_statistics import CASES as STATISTICS
from rules_whole import CASES as WHOLE
from rules_whole import RECURRENT
from torch import Tensor, nn

from dwindle.passes.prune.groups import find_groups
from dwindle.passes.prune.proof import LIMIT, proven
from dwindle.passes.prune.transfer import TRANSFER

ROOMS = {
    "products": PRODUCTS,
    "statistics": STATISTICS,
    "shapes": SHAPES,
    "space": SPACE,
    "pointwise": POINTWISE,
    "whole": WHOLE,
}


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, cases in ROOMS.items() for name in cases])
def test_a_rule(room: str, name: str) -> None:
    check(ROOMS[room][name])


# torch runs a recurrent layer on tensors that do not fit without a look at them, so only one mutant can be run.
@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name: str) -> None:
    case = RECURRENT[name]
    walk, batch = case.walk()
    assert set(case.ops) <= called(walk)
    found = groups_of(walk)
    assert sorted(map(told, found)) == sorted(map(sorted_cuts, case.groups))
    reasons = {f"{cut.name}[{cut.dim}]": group.reason for group in find_groups(walk) for cut in group.cuts}
    for axis, reason in case.stays.items():
        assert reason in reasons[axis], (axis, reasons[axis])
    cut = random_cut(found, case.ratio)
    assert proven(walk, cut, [batch]) < 1e-12
    endless = mutated(case, walk, cut, "endless")
    assert endless is not None
    assert proven(endless, cut, [batch]) > 100 * LIMIT


def test_weight_norm_of_a_linear() -> None:
    """Over the inputs; its kernel does not check sizes, so that its mutants would write where they may not."""
    model = nn.Sequential(nn.Linear(6, 12), nn.utils.parametrizations.weight_norm(nn.Linear(12, 8)), nn.Linear(8, 3))
    walk, batch = walked(model.eval(), torch.randn(ROWS))
    v, g = (f"1.parametrizations.weight.original{i}" for i in (1, 0))
    found = {sorted_cuts(told(group)).partition(" ")[2] for group in groups_of(walk)}
    assert found == {f"12: 0.bias[0] 0.weight[0] {v}[1]", f"8: 1.bias[0] {g}[0] {v}[0] 2.weight[1]"}
    assert proven(walk, random_cut(groups_of(walk), 0.4), [batch]) < 1e-12


def test_experts_in_bfloat16() -> None:
    """The call that exists in bfloat16 alone, which the proof's float64 cannot run: its groups."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.w = nn.Linear(8, 16), nn.Linear(24, 8), nn.Parameter(torch.randn(2, 16, 24))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.ops.aten._grouped_mm(self.a(x), self.w, torch.tensor([2, 4], dtype=torch.int32)))

    walk, _ = walked(Experts().bfloat16().eval(), torch.randn(4, 8, dtype=torch.bfloat16))
    assert "_grouped_mm" in called(walk)
    found = {sorted_cuts(told(group)) for group in groups_of(walk)}
    assert found == {"rows 16: a.bias[0] a.weight[0] w[1]", "rows 24: b.weight[1] w[2]"}


@pytest.mark.parametrize("name", NO_RULE)
def test_a_call_without_a_rule_freezes_what_it_reads(name: str) -> None:
    parts = {"a": lambda: nn.Linear(6, 12), "w": w(12)}
    walk, _ = walked(Around(lambda m, x: NO_RULE[name](m, m.a(x)) * 2, parts).eval(), torch.randn(ROWS))
    assert name in called(walk)
    assert not groups_of(walk)
    (group,) = [g for g in find_groups(walk) if g.cuts[0].name == "a.weight" and g.cuts[0].dim == 0]
    assert group.reason == f"no rule for aten.{name}"


# The table

# Rules of experts by number, which whole mixtures meet in `test_prune_experts`.
MIXTURES = {"histc", "one_hot", "argmax", "scatter.value", "scatter_.value", "scatter_.src"}

NAMES = [name for _, names in TRANSFER for name in names]


def test_every_name_in_the_table_has_a_case() -> None:
    met = {op for room in (*ROOMS.values(), RECURRENT) for case in room.values() for op in case.ops}
    met.add("_grouped_mm")  # in a test of its own: it cannot be run in float64
    assert set(NAMES) - met == MIXTURES


def test_no_name_has_two_rules() -> None:
    assert [name for name, times in Counter(NAMES).items() if times > 1] == []


def test_what_has_no_rule_is_not_in_the_table() -> None:
    assert set(NO_RULE) & set(NAMES) == {"index.Tensor", "histc"}  # for some numbers alone
