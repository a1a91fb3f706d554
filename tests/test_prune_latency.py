"""A target of latency: the measure is that of the sliced graph, and the choice goes by it."""

from __future__ import annotations

import time

import pytest
import torch
from pruning import Transformer, groups_of, random_cut, walked

import dwindle
from dwindle.passes.prune import latency as clock
from dwindle.runtime.errors import RecipeError
from dwindle.runtime.program import Program


def test_calls_of_both_graphs_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, 10)
    walk, batch = walked(Transformer(), x)
    sizes = []

    def timed(program: Program, inputs: object) -> float:
        weight = program.store.get("blocks.0.up.weight")
        assert isinstance(weight, torch.Tensor)
        sizes.append(weight.shape[0])
        return float(weight.shape[0])

    monkeypatch.setattr(clock, "_timed", timed)
    kept = random_cut(groups_of(walk, lambda group: group.kind == "rows"), 0.5)
    assert clock.latency(walk, batch)(kept) == 0.5
    assert sizes == [64, 128] * (clock.ROUNDS + clock.WARM_UP)
    assert walk.program.store.get("blocks.0.up.weight").shape[0] == 128  # type: ignore[union-attr]  # a float weight


def test_as_little_is_cut_as_the_target_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(program: Program, inputs: object) -> float:
        weights = (program.store.get(f"blocks.{i}.up.weight") for i in range(2))
        return float(sum(w.shape[0] for w in weights if isinstance(w, torch.Tensor)))

    monkeypatch.setattr(clock, "_timed", timed)
    rule = {"target": {"latency": 0.75}, "scopes": "rows"}
    small = dwindle.compress(Transformer(), {"prune": rule}, inputs=torch.randn(3, 5, 10))
    assert sum(len(cut.removed) for cut in small.plan.slices if cut.fqn.endswith("up.weight")) == 64


def test_a_real_clock_is_read() -> None:
    walk, batch = walked(Transformer(), torch.randn(3, 5, 10))
    started = time.perf_counter()
    took = clock._timed(walk.program, batch)
    assert 0 < took < time.perf_counter() - started


def test_training_has_no_latency_to_measure() -> None:
    rule = {"target": {"latency": 0.5}, "scopes": "rows"}
    with pytest.raises(RecipeError, match="latency is measured on a model that is cut"):
        dwindle.prepare(Transformer(), {"prune": rule}, inputs=torch.randn(3, 5, 10))
