"""Pruning while a model trains: masks that a schedule moves, and cuts that are exactly what was masked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mixtures import mixture, tokens
from pruning import Transformer
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.frontends.student import Student
from dwindle.passes.prune.masks import Thinning
from dwindle.runtime.errors import DwindleError, RecipeError, ScheduleError

RAMP = {"length": 6, "every": 2, "offset": 1}
STEPS = 7
W8A8 = [{"weight": {"bits": 8}, "activation": {"bits": 8}}]


class Convolutions(nn.Module):
    """Two residual blocks with batch norm, (N, 3, 8, 8) to (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.one, self.inner = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.two, self.outer = nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer(self.two(F.relu(self.inner(self.one(x))))))
        return self.head(x.mean((2, 3)))


def example(seed: int = 0, batch: int = 6) -> Tensor:
    return torch.randn(batch, 5, 10, generator=torch.Generator().manual_seed(seed))


def prepared(rule: dict[str, Any], model: nn.Module | None = None, x: Tensor | None = None, **more: Any) -> Student:
    torch.manual_seed(0)
    recipe = {"prune": {"ratio": 0.5, "schedule": RAMP, **rule}, **more}
    return dwindle.prepare(model or Transformer(), recipe, inputs=example() if x is None else x)


def train(student: Student, first: int = 0, last: int = STEPS, x: Tensor | None = None) -> list[Any]:
    """Some steps of a fixed sequence of batches; what changed."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    student.train()
    found = []
    for step in range(first, last):
        batch = example(step) if x is None else x
        loss = student(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found += student.step(loss)
    student.eval()
    return found


def widths(student: Student) -> list[int]:
    pruning = student.pacer.pruning.structured
    assert pruning is not None
    return [int(gate.kept(student.store).sum()) for gate in pruning.gates.values()]


@pytest.mark.parametrize("score", ["l1", "l2", "taylor", "fisher", "scale", "random", "movement"])
@pytest.mark.parametrize("quantize", [[], W8A8], ids=["float", "w8a8"])
def test_what_was_masked_is_what_is_cut(score: str, quantize: list[Any]) -> None:
    student = prepared({"score": score, "scopes": ["heads", "rows", "hidden"]}, quantize=quantize)
    before = student.eval()(example())
    changes = train(student)
    small = student.finish()
    expected, found = student(example()), small(example())
    gone = {cut.fqn: len(cut.removed) for cut in small.plan.slices if cut.dim == 0}
    assert [gone[name] for name in ("first.weight", "blocks.0.q.weight", "blocks.1.up.weight")] == [16, 16, 64]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(found, before, atol=1e-2)
    assert [change.step for change in changes if isinstance(change, Thinning)] == [3, 5, 7]


def test_convolutions_are_exact_with_their_batch_norms() -> None:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    student = prepared({"scopes": "channels"}, Convolutions(), x)
    train(student, x=x)
    small = student.finish()
    torch.testing.assert_close(small(x), student(x), rtol=1e-5, atol=1e-5)
    shape = small.store.get("one.weight").shape  # type: ignore[union-attr]  # a float weight
    assert tuple(shape) == (12, 8, 3, 3)
    assert tuple(small.store.get("norm.running_mean").shape) == (8,)  # type: ignore[union-attr]  # as above


def test_a_training_variant_is_masked_as_the_other_is() -> None:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    student = prepared({"scopes": "channels", "schedule": {}}, Convolutions(), x)  # all at once
    small = student.finish()
    student.train()
    small.train()
    torch.testing.assert_close(small(x), student(x), rtol=1e-5, atol=1e-5)


def test_masked_channels_do_not_widen_scales() -> None:
    model = Transformer()
    with torch.no_grad():
        for block in model.blocks:
            block.down.weight[:, 5] = 1e-6  # so it goes by its l2 score, whatever comes in there
            block.up.weight[5] = 1e-6
            block.up.bias[5] = 1e4  # and what comes in there would take all of a token's range
    rule = {"scopes": "rows", "ratio": 0.1, "schedule": {}, "score": "random"}
    student = prepared(rule, model, quantize=W8A8)
    pruning = student.pacer.pruning.structured
    assert pruning is not None
    for gate in pruning.gates.values():
        mask = torch.ones(gate.size)
        mask[5] = 0
        gate.set(student.store, mask)
    small = student.eval().finish()
    torch.testing.assert_close(small(example()), student(example()), rtol=1e-4, atol=2e-5)
    assert small.certificate is not None
    assert small.certificate.code_mismatch == 0.0
    plain = dwindle.compress(model, {"quantize": W8A8}, inputs=example())(example())
    float_ = model(example())
    cut = copy.deepcopy(model)
    with torch.no_grad():
        for block in cut.blocks:
            block.up.bias[5] = 0
    assert (small(example()) - cut(example())).abs().max() < 0.1 * (plain - float_).abs().max()


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    for score in ("taylor", "movement", "l2"):
        whole, first = prepared({"score": score}), prepared({"score": score})
        train(whole)
        train(first, last=4)
        second = prepared({"score": score})
        second.load_state_dict(first.state_dict())
        assert widths(second) == widths(first)
        train(second, first=4)
        for (name, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
            assert "extra_state" in name or torch.equal(a, b), name


def test_a_copy_goes_on_by_itself() -> None:
    student = prepared({})
    train(student, last=4)
    other = copy.deepcopy(student)
    at = widths(student)
    train(other, first=4)
    assert widths(student) == at
    train(student, first=4)
    assert widths(student) == widths(other)
    torch.testing.assert_close(student(example()), other(example()), rtol=0, atol=0)
    torch.testing.assert_close(other.finish()(example()), other(example()), rtol=1e-4, atol=1e-5)


def test_a_schedule_that_is_not_over_is_refused_unless_it_may_be() -> None:
    student = prepared({})
    train(student, last=4)
    with pytest.raises(ScheduleError, match="pruning is not at the end"):
        student.finish()
    torch.testing.assert_close(student.finish(early=True)(example()), student(example()), rtol=1e-4, atol=1e-5)


def test_a_run_that_is_too_short_is_refused_beforehand() -> None:
    with pytest.raises(ScheduleError, match="does not end within the run"):
        dwindle.prepare(Transformer(), {"prune": {"ratio": 0.5, "schedule": RAMP}}, inputs=example(), total_steps=6)


def test_a_state_of_the_model_alone_is_chosen_from_anew() -> None:
    student, model = prepared({"scopes": "rows", "schedule": {}}), Transformer()
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight[:64] *= 3  # which were not the largest
    student.load_state_dict(model.state_dict())
    pruning = student.pacer.pruning.structured
    assert pruning is not None
    assert all(bool(mask[:64].all()) for mask in pruning.kept().values())


def test_a_plain_state_begins_anew() -> None:
    student, model = prepared({}), Transformer()
    train(student)
    student = prepared({})
    student.load_state_dict(model.state_dict())
    torch.testing.assert_close(student.eval()(example()), model.eval()(example()), rtol=1e-5, atol=1e-6)


def test_nothing_to_cut_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Transformer().eval()
    student = dwindle.prepare(model, {"prune": {"ratio": 0.0}}, inputs=example())
    small = student.finish()
    assert torch.equal(small(example()), model(example()))
    assert not small.plan


def test_a_target_is_met_at_the_end_of_its_ramp() -> None:
    torch.manual_seed(0)
    model = Transformer()
    student = dwindle.prepare(model, {"prune": {"target": {"params": 0.5}, "schedule": RAMP}}, inputs=example())
    train(student)
    whole = sum(p.numel() for p in model.parameters())
    left = sum(t.numel() for _, t in student.finish().store.entries() if isinstance(t, nn.Parameter))
    assert 0.4 < left / whole <= 0.5


@pytest.mark.parametrize("weight", [{"bits": 4, "group_size": 8}, {"bits": 2, "kind": "ternary"}], ids=str)
def test_scales_that_pruning_would_change_are_refused(weight: dict[str, Any]) -> None:
    quantize = [{"modules": "blocks.*", "weight": weight}]
    with pytest.raises(RecipeError, match="its scales are of what would move"):
        prepared({"scopes": "rows"}, quantize=quantize)


def test_under_autocast_variants_are_captured_as_they_are() -> None:
    student = prepared({"scopes": "rows"}).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = student(example()).float().square().mean()
    loss.backward()
    assert type(loss.detach()) is Tensor
    assert all(type(p.grad) is Tensor for p in student.parameters())


def test_frozen_parameters_are_worth_nothing_to_the_loss() -> None:
    model = Transformer()
    model.blocks[0].up.weight.requires_grad_(False)
    student = prepared({"scopes": "rows", "score": "taylor"}, model)
    train(student)
    assert widths(student) == [64, 64]


def test_experts_are_learned_through_what_counts_them() -> None:
    model, inputs = mixture("mixtral"), tokens()
    rule = {"scopes": "experts", "ratio": 0.5, "score": "movement", "schedule": {"offset": 1}}
    student = dwindle.prepare(model.train(), {"prune": rule}, inputs=inputs)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        student(**inputs)[0].square().mean().backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    small = student.eval().finish()
    torch.testing.assert_close(small(**inputs)[0], student(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_a_choice_without_weights_cannot_be_learned() -> None:
    rule = {"scopes": "experts", "ratio": 0.5, "score": "movement"}
    with pytest.raises(RecipeError, match=r"(?s)no gradient.*router"):
        dwindle.prepare(mixture("granitemoe"), {"prune": rule}, inputs=tokens())


def test_a_step_without_the_gradients_it_wants_is_not_counted() -> None:
    student = prepared({"score": "taylor", "schedule": {"offset": 1}})
    whole = widths(student)
    with pytest.raises(ScheduleError, match="goes by gradients"):
        student.step()
    with pytest.raises(ScheduleError, match="not at the end of its schedule"):
        student.finish()
    train(student, last=1)
    assert widths(student) == [n // 2 for n in whole]


def test_scores_that_learned_nothing_choose_nothing() -> None:
    student = prepared({"score": "movement", "schedule": {"offset": 1}})
    student.step()
    with pytest.raises(ScheduleError, match="learned nothing"):
        student.finish()
    student = dwindle.prepare(Transformer(), {"sparsify": {"ratio": 0.5, "score": "movement"}}, inputs=example())
    with pytest.raises(ScheduleError, match="learned nothing"):
        student.finish()


def test_a_student_keeps_its_dtype() -> None:
    student = prepared({})
    with pytest.raises(DwindleError, match="keeps the dtype"):
        student.to(torch.bfloat16)
    assert {p.dtype for p in student.to("cpu").float().parameters()} == {torch.float32}


def test_a_watch_and_a_report_tell_what_was_cut(capsys: pytest.CaptureFixture[str]) -> None:
    student = prepared({"scopes": ["heads", "rows"]})
    with student.watch(STEPS):
        train(student)
    told = capsys.readouterr().err
    assert "Pruning over 7 steps" in told
    assert "step 7: heads, rows in 4 groups:" in told
    assert "bits on average" not in told
    small = student.finish()
    text = str(small.report())
    assert "heads, rows in" in text
    assert "stay" in text
