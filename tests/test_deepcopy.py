"""Copies of graph models: tensors and schedules of their own, the same graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import ZOO
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dwindle

MOQ = {"type": "moq", "start_bits": 8, "period": 1}
RECIPE = {"quantize": [{"weight": {"bits": 4, "learned": True}}], "schedule": MOQ}


def in_training() -> tuple[dwindle.Student, Any, Any]:
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model.train(), RECIPE, inputs=inputs)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    return student, optimizer, inputs


def train(student: dwindle.Student, optimizer: torch.optim.Optimizer, inputs: Any) -> None:
    optimizer.zero_grad()
    student(**inputs)[0].square().mean().backward()
    optimizer.step()
    student.step()


def state_of(student: dwindle.Student) -> list[torch.Tensor]:
    return [t.detach().clone() for t in student.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(one, two) for one, two in zip(a, b, strict=True))


def test_a_copy_of_a_student_goes_on_by_itself() -> None:
    student, optimizer, inputs = in_training()
    train(student, optimizer, inputs)
    other = copy.deepcopy(student)
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in other.parameters()}
    before = state_of(other)
    for _ in range(3):
        torch.manual_seed(0)
        train(student, optimizer, inputs)
    assert same(before, state_of(other))
    assert (student.course.step, other.course.step) == (4, 1)
    apart = torch.optim.SGD(other.parameters(), 0.01)
    for _ in range(3):
        torch.manual_seed(0)
        train(other, apart, inputs)
    assert same(state_of(student), state_of(other))


def test_a_copy_of_a_copied_student_finishes_and_captures() -> None:
    student, _, inputs = in_training()
    other = copy.deepcopy(copy.deepcopy(student))
    del student
    apart = torch.optim.SGD(other.parameters(), 0.01)
    for _ in range(4):
        train(other, apart, inputs)
    del other.variants[next(key for key, p in other.variants.items() if p.contract.training)]
    train(other, apart, inputs)  # captured anew, on the copy's own tensors
    other.eval()
    small = other.finish(early=True)
    with torch.no_grad():
        assert torch.equal(small(**inputs)[0], other(**inputs)[0])
        assert torch.equal(copy.deepcopy(small)(**inputs)[0], small(**inputs)[0])


def test_an_exponential_moving_average_of_a_student() -> None:
    student, optimizer, inputs = in_training()
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        train(student, optimizer, inputs)
        average.update_parameters(student)
    one, two = (dict(m.named_parameters()) for m in (student, average.module))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    average.eval()
    with torch.no_grad():
        found = average(**inputs)[0]
    own: Any = average.module
    with pytest.raises(dwindle.DwindleError, match="another precision"):
        own.finish(early=True)
    own.set_extra_state(student.get_extra_state())
    small = own.finish(early=True)
    assert {edit.weight.bits for edit in small.plan} == {now.bits for now in student.course.weights.values()}
    with torch.no_grad():
        assert torch.equal(small(**inputs)[0], found)


def test_a_copy_keeps_mode_hooks_and_checkpointing_and_follows_nobody() -> None:
    student, optimizer, inputs = in_training()
    calls = list[nn.Module]()
    student.register_forward_hook(lambda module, *_: calls.append(module))
    student.activation_checkpointing_enable()
    student.follow(optimizer)
    other = copy.deepcopy(student.eval())
    assert not other.training
    assert other.is_activation_checkpointing
    assert other.train()(**inputs)[0].requires_grad
    assert calls == [other]
    other.follow(torch.optim.SGD(other.parameters(), 0.01))
    with pytest.raises(dwindle.DwindleError, match="follows an optimizer"):
        other.step()


def test_a_copy_of_a_finished_model_is_apart() -> None:
    model, inputs = ZOO["bert"]()
    small = dwindle.compress(model, inputs=inputs)
    with torch.no_grad():
        expected = small(**inputs)[0].clone()
        other = copy.deepcopy(small)
        assert torch.equal(other(**inputs)[0], expected)
        assert torch.equal(other(**inputs, output_hidden_states=True)[0], expected)  # a variant of its own
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.zero_()
        assert torch.equal(small(**inputs)[0], expected)


def test_what_is_bound_to_a_model_is_bound_to_its_copy() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    student = dwindle.prepare(nn.Linear(16, 8).train(), inputs=x.detach())
    seen = list[tuple[str, nn.Module]]()
    student.register_forward_hook(lambda m, args, kwargs, out: seen.append(("call", m)), with_kwargs=True)
    student.register_full_backward_hook(lambda m, *_: seen.append(("backward", m)))
    student.register_state_dict_post_hook(lambda m, *_: seen.append(("state", m)))
    student.notes = [1]
    student.forward = student.forward
    student.compile(backend="eager")
    other = copy.deepcopy(student.eval())
    other.notes.append(2)
    assert student.notes == [1]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any()
    other.train()(x).sum().backward()
    other.state_dict()
    assert [name for name, _ in seen] == ["call", "call", "backward", "state"]
    assert all(m is other for _, m in seen)


def test_a_copy_made_in_inference_mode_trains() -> None:
    student, _, inputs = in_training()
    with torch.inference_mode():
        other = copy.deepcopy(student)
    other.train()(**inputs)[0].sum().backward()
