"""The record of training: bounded, exact about what it keeps, and the same after a resumed run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dwindle.frontends.history import MOST, WAITING, History
from dwindle.passes.quantize.course import Drop


def recorded(steps: int) -> History:
    history = History(8.0)
    for step in range(1, steps + 1):
        drops = [Drop(step, f"w{i}", 8, 7) for i in range(3)] if step == 5 else []
        history.record(step, torch.tensor(float(step)), 8.0 if step < 5 else 7.0, drops)
    return history


def test_few_steps_are_all_kept() -> None:
    history = recorded(10)
    assert history.curve == [(step, float(step), 8.0 if step < 5 else 7.0) for step in range(1, 11)]
    assert history.changes == [(5, 8, 7, 3, "weight")]


@pytest.mark.parametrize("steps", [MOST - 1, MOST, 3 * MOST + 1, 10 * MOST + 7])
def test_many_steps_are_thinned_and_the_whole_run_is_there(steps: int) -> None:
    history = recorded(steps)
    curve = history.curve
    assert len(curve) < MOST
    assert [point[0] for point in curve] == list(range(history.every, steps + 1, history.every))
    assert curve[-1][1] == pytest.approx(curve[-1][0] - (history.every - 1) / 2, rel=1e-4)  # the mean of its window
    assert len(json.dumps(history.to_json())) < 40 * MOST


@given(st.integers(0, 3 * WAITING), st.integers(1, 3 * WAITING), st.sampled_from([1, 2, 4]))
def test_a_resumed_record_is_the_whole_one(cut: int, more: int, every: int) -> None:
    whole, first = History(8.0), History(8.0)
    whole.every = first.every = every
    for step in range(1, cut + 1):
        whole.record(step, 1 / step, 8.0, [])
        first.record(step, 1 / step, 8.0, [])
    second = History(3.0)
    second.load_json(json.loads(json.dumps(first.to_json())))
    for step in range(cut + 1, cut + more + 1):
        whole.record(step, 1 / step, 8.0, [])
        second.record(step, 1 / step, 8.0, [])
    assert second.to_json() == whole.to_json()


def test_a_loss_that_is_not_there_or_not_finite_is_no_number() -> None:
    history = History(8.0)
    for step, loss in enumerate((None, math.inf, torch.tensor(math.nan), 2.0), 1):
        history.record(step, loss, 8.0, [])
    assert [loss for _, loss, _ in history.curve] == [None, None, None, 2.0]
    assert history.loss() == 2.0
