"""What is shown while a model trains: warnings, drops and their steps, curvature and its cost; and the report of it."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import pytest
import torch
from classifier import ADAPTIVE, MOQ, batch, classifier, items
from rich.console import Console

import dwindle
from dwindle.frontends.page import page
from dwindle.frontends.watch import ScheduleWarning, Watch
from dwindle.runtime.errors import CalibrationError, ScheduleError
from dwindle.runtime.report import Report

CURVED = MOQ | {"sensitivity": {"iterations": 3}}

# The configuration of DeepSpeed's MoQ tutorial, which trains MRPC for 344 steps. Its period counts once for each of
# six tensors of a layer, so a bit falls sooner than it says; and the recipe that takes the 400 as steps.
PLAIN_MRPC = {"quantize": [{"weight": {"groups": 8}}], "schedule": {"type": "moq", "start_bits": 16, "period": 400}}
MRPC = {
    "quantize_training": {
        "enabled": True,
        "quantize_type": "symmetric",
        "quantize_bits": {"start_bits": 16, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 400, "schedule_offset": 0},
        "quantize_groups": 8,
    }
}


def student_of(recipe: dict[str, Any]) -> Any:
    return dwindle.prepare(classifier().train(), recipe, inputs=batch(items(2)))


def train(student: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    for step in range(steps):
        student(**batch(items(4, seed=step))).loss.backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()


def watched(student: Any, steps: int, total: int | None = None, **options: Any) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=options.pop("terminal", False))
    with Watch(student.pacer, total, console=console, **options):
        train(student, steps)
    return stream.getvalue()


@pytest.mark.parametrize(("recipe", "last"), [(MRPC, 8534), (PLAIN_MRPC, 51200)], ids=["deepspeed", "plain"])
def test_the_tutorials_run_is_too_short_and_that_is_said_before_it(recipe: dict[str, Any], last: int) -> None:
    student = student_of(recipe)
    with pytest.warns(ScheduleWarning, match=f"reaches 8 bits after {last} steps and the run ends after 344"):
        student.watch(344, quiet=True).__enter__()
    assert student.course.step == 0
    with pytest.raises(ScheduleError, match=rf"(?s)does not end.*8 bits after at most 344 steps.*{last}"):
        dwindle.prepare(classifier().train(), recipe, inputs=batch(items(2)), total_steps=344)


def test_a_run_that_is_long_enough_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = watched(student_of(MOQ), 0, 8)
    assert "8 from 0, 7 from 1, 6 from 2, 5 from 4, 4 from 8" in text


def test_each_drop_is_a_line_with_its_step() -> None:
    lines = [line for line in watched(student_of(MOQ), 9).splitlines() if line]
    assert [int(step) for step in re.findall(r"(?m)^step (\d+): ", "\n".join(lines))] == [1, 2, 4, 8]
    assert len(lines) == 4
    assert re.search(r"and \d+ more: 5 bits -> 4 bits \(4 bits on average, .* kB, loss 0\.\d+\)$", lines[-1])


def test_curvature_is_shown_with_its_cost() -> None:
    text = watched(student_of(CURVED), 3)
    costs = re.findall(r"step \d: curvature: 6 Hessian-vector products of 2 blocks in \S+ s(.*)", text)
    assert len(costs) == 2  # at steps 1 and 2, where bits are about to fall
    assert re.fullmatch(r", as long as \S+ training steps", costs[1])


@pytest.mark.parametrize(
    ("recipe", "coming"),
    [(MOQ, "step 4: 5 bits"), (ADAPTIVE, "decided at step 4"), (MRPC, "not in this run"), ({}, None)],
    ids=["moq", "adaptive", "mrpc", "empty"],
)
def test_a_terminal_shows_a_table(recipe: dict[str, Any], coming: str | None) -> None:
    student = student_of(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScheduleWarning)
        text = watched(student, 3, 40, terminal=True)
    if coming is None:
        assert text == ""
        return
    last = text.rpartition("step 3 of 40")[2]
    assert "bits on average" in last
    assert "bert" in last
    assert coming in last


def test_at_the_target_there_is_no_next_drop() -> None:
    assert "at its target" in watched(student_of(MOQ), 9, terminal=True).rpartition("step 9")[2]


def test_quiet_is_quiet_and_leaves_no_watcher() -> None:
    student = student_of(MOQ)
    assert watched(student, 2, 8, quiet=True) == ""
    assert student.pacer.watchers == []


def test_sensitivity_is_a_table_and_steers_nothing() -> None:
    student = student_of(MOQ)
    loss = lambda: student(**batch(items(4))).loss  # noqa: E731
    table = student.sensitivity(loss)
    assert str(table).count("bert.encoder.layer.") == 2
    assert table.cost in " ".join(str(table).split())
    assert student.pacer.sensitivity is None
    loss()
    assert student.sensitivity().found == student.sensitivity(loss).found  # the last batch once more
    with pytest.raises(ScheduleError, match="needs the loss"):
        student_of(MOQ).sensitivity()
    with pytest.raises(CalibrationError, match="not a scalar"):
        student.sensitivity(lambda: student(**batch(items(4))).logits)


def test_the_report_has_the_run_and_an_artifact_keeps_it(tmp_path: Any) -> None:
    student = student_of(CURVED)
    state = None
    for _ in range(2):  # a run in two parts is one run
        student = student_of(CURVED)
        if state is not None:
            student.load_state_dict(state)
        train(student, 4)
        state = student.state_dict()
    small = student.finish(early=True)
    run = small.measured["training"]
    assert [step for step, *_ in run["curve"]] == list(range(1, 9))
    assert run["bits"] == [8.0, student.course.average_bits()]
    assert run["curvature"]["measurements"] == student.pacer.spent.measurements >= 3
    train(student, 1)
    assert len(run["curve"]) == 8  # what was finished stays as it was
    again = dwindle.load(small.save(tmp_path / "out"))
    assert again.measured == small.measured
    line = r"training\s+8 steps, 8 -> \S+ bits on average; loss \S+ -> \S+; curvature \d+"
    for report in (small.report(), Report(again.certificate, again.recipe, again.log, again.measured)):
        assert re.search(line, str(report))
        assert page(report).count('class="curve"') == 2
    assert "latency" in small.report().measured
    assert student_of({}).finish().measured is None
