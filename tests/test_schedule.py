"""Schedules of bits as pure values: the steps of every drop, and what cannot be."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwindle.passes.quantize.adaptive import Budget, Candidate, Controller
from dwindle.passes.schedule import FULL, SHAPES, Constant, Gliding, MoQ, Ramp, RampShape, Schedule, Shape
from dwindle.runtime.errors import RecipeError


def steps(schedule: Schedule, target: int, total: int, factor: int = 1) -> list[tuple[int, int]]:
    return list(schedule.drops(target, total, factor))


# DeepSpeed 0.19.6: drops seen with its own Quantizer (steps counted from its first call).
@pytest.mark.parametrize(
    ("period", "start", "target", "expected"),
    [
        (10, 12, 8, [10, 20, 40, 80]),
        (1, 12, 8, [1, 2, 4, 8]),
        (0, 12, 8, [1, 2, 3, 4]),
        (400, 16, 8, [400 * 2**k for k in range(8)]),
    ],
)
def test_moq_drops_where_deepspeed_does(period: int, start: int, target: int, expected: list[int]) -> None:
    found = steps(MoQ(start_bits=start, period=period), target, expected[-1])
    assert found == [(0, start), *((step, start - 1 - i) for i, step in enumerate(expected))]
    assert MoQ(start_bits=start, period=period).last(target) == expected[-1]


def test_a_sensitive_layer_keeps_its_bits_longer() -> None:
    assert steps(MoQ(start_bits=12, period=4), 8, 4000, factor=5)[1:] == [(4, 11), (40, 10), (400, 9), (4000, 8)]


def test_an_offset_comes_first() -> None:
    assert steps(MoQ(start_bits=10, period=2, offset=5), 8, 20) == [(5, 10), (7, 9), (9, 8)]
    assert steps(Constant(offset=3), 8, 9) == [(3, 8)]
    assert steps(Constant(), 8, 9) == [(0, 8)]


@given(
    start=st.integers(2, 16),
    fall=st.integers(0, 14),
    length=st.integers(1, 200),
    offset=st.integers(0, 20),
    shape=st.sampled_from(SHAPES),
)
def test_gliding_schedules_fall_steadily_and_end_in_time(
    start: int, fall: int, length: int, offset: int, shape: Shape
) -> None:
    target = max(1, start - fall)
    schedule = Gliding(start_bits=start, length=length, offset=offset, shape=shape)
    found = steps(schedule, target, offset + length + 5)
    bits = [b for _, b in found]
    assert bits == sorted(bits, reverse=True)
    assert (bits[0], bits[-1]) == (start, target) or length == 1
    assert found[-1][0] <= schedule.last(target) == offset + length


def test_mixing_starts_again_at_each_drop() -> None:
    schedule = MoQ(start_bits=4, period=4, change=0.5)
    now, seen = schedule.begin(3), []
    for step in range(1, 9):
        now = schedule.advance(now, 3, step)
        seen.append((now.bits, now.mix))
    assert seen == [(4, 0.5), (4, 0.0), (4, 0.0), (3, 1.0), (3, 0.5), (3, 0.0), (3, 0.0), (3, 0.0)]
    assert schedule.settled(now, 3)


@given(
    st.integers(0, 60),
    st.sampled_from([MoQ(start_bits=9, period=3), Gliding(start_bits=9, length=30, change=0.1, shape="cosine")]),
)
def test_a_schedule_is_its_state(cut: int, schedule: Schedule) -> None:
    whole = resumed = schedule.begin(4)
    for step in range(1, cut + 1):
        whole = schedule.advance(whole, 4, step)
    resumed = type(whole)(**whole.__dict__)
    for step in range(cut + 1, cut + 30):
        whole, resumed = schedule.advance(whole, 4, step), schedule.advance(resumed, 4, step)
        assert whole == resumed


@pytest.mark.parametrize(
    "make",
    [
        lambda: MoQ(start_bits=6).check(8),
        lambda: MoQ(period=-1),
        lambda: MoQ(start_bits=17),
        lambda: Gliding(length=0),
        lambda: Constant(offset=-1),
        lambda: Constant(change=1.5),
        lambda: Budget(),
        lambda: Budget(average_bits=4, target_bytes=100),
        lambda: Budget(average_bits=9),
        lambda: Budget(average_bits=4, interval=1),
    ],
)
def test_what_contradicts_itself_is_refused(make: object) -> None:
    with pytest.raises(RecipeError, match="required"):
        make()  # type: ignore[operator]  # each is a function


def test_full_precision_is_no_number_of_bits() -> None:
    assert Constant(offset=1).begin(8).bits == FULL


def _candidates(**growth: float) -> list[Candidate]:
    return [Candidate(fqn=name, bits=8, elements=100, growth=g) for name, g in growth.items()]


def test_the_cheapest_falls_first_and_the_budget_ends_it() -> None:
    controller = Controller(Budget(average_bits=4, interval=2, share=0.5))
    found = _candidates(a=3.0, b=1.0, c=2.0, d=math.nan)
    assert controller.choose(found, 1000.0) == ("b", "c")
    assert controller.choose(found, 50.0) == ("b",)
    assert controller.choose(found, 0.0) == ()


def test_a_drop_that_hurts_is_taken_back_and_left_alone() -> None:
    controller = Controller(Budget(average_bits=4, interval=3, share=0.5, tolerance=0.05))
    for loss in (1.0, 1.01, 0.99):
        controller.observe(loss)
    assert controller.due()
    assert controller.judge() == ()
    assert controller.choose(_candidates(a=1.0, b=2.0), 1000.0) == ("a",)
    for loss in (2.0, 2.01, 1.99):
        controller.observe(loss)
    assert controller.judge() == ("a",)
    assert controller.choose(_candidates(a=1.0, b=2.0), 1000.0) == ("b",)
    for _ in range(2):  # two judgements later it may fall again
        for loss in (1.0, 1.01, 0.99):
            controller.observe(loss)
        controller.judge()
    assert controller.choose(_candidates(a=1.0, b=2.0), 1000.0) == ("a",)


def test_noise_is_no_growth_but_infinity_is() -> None:
    for after, expected in (((0.5, 1.6, 1.0), ()), ((1.0, math.nan, 1.0), ("a",))):
        controller = Controller(Budget(average_bits=4, interval=3))
        for loss in (0.5, 1.5, 1.0):
            controller.observe(loss)
        controller.judge()
        controller.choose(_candidates(a=1.0), 1000.0)
        for loss in after:
            controller.observe(loss)
        assert controller.judge() == expected


def test_a_controller_is_its_plain_data() -> None:
    first = Controller(Budget(average_bits=4, interval=3))
    for loss in (1.0, 1.1, 0.9):
        first.observe(loss)
    first.judge()
    first.choose(_candidates(a=1.0, b=2.0), 1000.0)
    second = Controller(first.budget)
    second.load_json(first.to_json())
    for each in (first, second):
        for loss in (3.0, 3.1, 3.0):
            each.observe(loss)
    assert first.judge() == second.judge() == ("a",)
    assert first.to_json() == second.to_json()


@given(start=st.integers(2, 16), fall=st.integers(0, 14), length=st.integers(1, 500))
def test_an_even_schedule_is_exact_in_integers(start: int, fall: int, length: int) -> None:
    target = max(1, start - fall)
    schedule, now = Gliding(start_bits=start, length=length), Gliding(start_bits=start, length=length).begin(target)
    for step in range(1, length + 1):
        now = schedule.advance(now, target, step)
        assert now.bits == start - (start - target) * step // length


@given(offset=st.integers(0, 20), length=st.integers(0, 50), every=st.integers(1, 20), shape=st.sampled_from(SHAPES))
def test_a_ramp_rises_to_the_whole_at_its_last_move(offset: int, length: int, every: int, shape: RampShape) -> None:
    ramp = Ramp(offset=offset, length=length, every=every, shape=shape)
    parts = [ramp.part(step, 0.7) for step in range(ramp.last + 5)]
    assert parts == sorted(parts)
    assert not any(parts[:offset])
    assert all(part == 1 for part in parts[ramp.last :])
    for step in range(1, len(parts)):
        assert parts[step] == parts[step - 1] or ramp.moves(step), step
        ahead = [later for later in range(step, ramp.last + 1) if ramp.moves(later)]
        assert ramp.until_move(step) == (ahead[0] - step if ahead else None)
    assert ramp.moves(ramp.last)
    assert not ramp.moves(ramp.last + 1)


def test_a_cubic_ramp_is_that_of_zhu_and_gupta() -> None:
    ramp = Ramp(offset=10, length=100, every=10)
    assert [round(ramp.part(step, 0.5), 3) for step in (9, 10, 20, 29, 60, 110)] == [0, 0, 0.271, 0.271, 0.875, 1]


def test_an_exponential_ramp_leaves_an_equal_factor_at_each_move() -> None:
    ramp = Ramp(length=4, shape="exponential")
    left = [1 - 0.9 * ramp.part(step, 0.9) for step in range(5)]
    assert [b / a for a, b in pairwise(left)] == pytest.approx([0.1**0.25] * 4)
