"""Every line of the table of transfer rules is met by a case, so a new rule comes with one."""

from __future__ import annotations

from collections import Counter

from test_prune_rules_pointwise import CASES as POINTWISE
from test_prune_rules_pointwise import NO_RULE
from test_prune_rules_products import CASES as PRODUCTS
from test_prune_rules_shapes import CASES as SHAPES
from test_prune_rules_space import CASES as SPACE
from test_prune_rules_statistics import CASES as STATISTICS
from test_prune_rules_whole import CASES as WHOLE

from dwindle.passes.prune.transfer import TRANSFER

# Rules of experts by number, which whole mixtures meet in `test_prune_experts`.
MIXTURES = {"histc", "one_hot", "argmax", "scatter.value", "scatter_.value", "scatter_.src"}

ROOMS = (PRODUCTS, STATISTICS, SHAPES, SPACE, POINTWISE, WHOLE)
NAMES = [name for _, names in TRANSFER for name in names]


def test_every_name_in_the_table_has_a_case() -> None:
    met = {op for room in ROOMS for case in room.values() for op in case.ops}
    met.add("_grouped_mm")  # in a test of its own among the products: it cannot be run in float64
    assert set(NAMES) - met == MIXTURES


def test_no_name_has_two_rules() -> None:
    assert [name for name, times in Counter(NAMES).items() if times > 1] == []


def test_what_has_no_rule_is_not_in_the_table() -> None:
    assert set(NO_RULE) & set(NAMES) == {"index.Tensor", "histc"}  # for some numbers alone
