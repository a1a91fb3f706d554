"""Training with simulated quantisation: schedules, resuming, finishing; the student is what the finished model is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import ZOO
from numerics import error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers.modeling_outputs import SequenceClassifierOutput

import dwindle
from dwindle.passes.schedule import FULL
from dwindle.runtime.errors import CalibrationError, RecipeError, ScheduleError, SchemeError
from dwindle.runtime.qtensor import QTensor

MOQ = {"type": "moq", "start_bits": 8, "period": 1}


def _x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _Classifier(nn.Module):
    """A loss in the output, as transformers' models give it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])
            self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        for layer in self.layer:
            x = x + torch.tanh(nn.functional.dropout(layer(x), 0.1, self.training))
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _batch(seed: int = 1) -> dict[str, Tensor]:
    x = _x(16, 32, seed=seed)
    return {"x": x, "labels": x[:, :4].argmax(1)}


def _student(recipe: Any, **options: Any) -> Any:
    return dwindle.prepare(_Classifier().train(), recipe, inputs=_batch(), **options)


def _train(student: Any, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = student(**_batch(step)).loss
        loss.backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _recipe(schedule: Any = None, activation: Any = None, **weight: Any) -> dict[str, Any]:
    entry = {"operators": ["linear", "embedding"], "weight": {"bits": 4, **weight}, "activation": activation}
    return {"quantize": [entry]} | ({} if schedule is None else {"schedule": schedule})


RECIPES: dict[str, dict[str, Any]] = {
    "moq": _recipe(MOQ, {}),
    "mixing": _recipe({**MOQ, "change": 0.25}, {"offset": 3}),
    "stochastic": _recipe(MOQ, {}, rounding="stochastic", groups=4),
    "asymmetric": _recipe({"type": "linear", "start_bits": 8, "length": 8}, None, kind="asymmetric", group_size=16),
    "learned": _recipe({"type": "cosine", "start_bits": 8, "length": 8}, {"range": "static"}, learned=True),
    "ternary": _recipe({**MOQ, "period": 0}, {}, bits=2, kind="ternary"),
    "binary": _recipe({**MOQ, "period": 0}, {}, bits=1, kind="binary", groups=2),
    "static": _recipe(None, {"range": "static", "kind": "asymmetric"}, bits=8),
    "curvature": _recipe(MOQ, {}) | {"sensitivity": {"iterations": 5}},
    "traces": _recipe(MOQ, {}) | {"sensitivity": {"method": "trace", "samples": 2}},
    "adaptive": _recipe(
        {"type": "adaptive", "start_bits": 8, "average_bits": 5, "interval": 2, "share": 0.5, "tolerance": 10}, {}
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_is_what_the_finished_model_is(name: str) -> None:
    student = _student(RECIPES[name])
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
    _train(student, range(20), optimizer)
    small = student.finish(early=name in ("curvature", "traces"))
    batch = _batch(99)
    with torch.no_grad():
        expected, found = student.eval()(**batch).logits, small(**batch).logits
    # A static zero point goes into the bias when it is finished, and a rounding with it: measured at most 4e-7.
    assert error(found, expected) <= (1e-5 if name == "static" else 0)
    packed = [v for _, v in small.store.entries() if isinstance(v, QTensor)]
    assert len(packed) == 4
    assert small.certificate.simulated == 0


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_goes_on_bit_for_bit(name: str) -> None:
    whole = _student(RECIPES[name])
    optimizer = torch.optim.AdamW(whole.parameters(), 1e-3)
    _train(whole, range(7), optimizer)
    states = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    expected = _train(whole, range(7, 16), optimizer)

    resumed = _student(RECIPES[name])
    resumed.load_state_dict(states[0])
    again = torch.optim.AdamW(resumed.parameters(), 1e-3)
    again.load_state_dict(states[1])
    assert _train(resumed, range(7, 16), again) == expected
    if whole.pacer.remembers:
        assert whole.pacer.to_json() | {"sensitivity": 0} == resumed.pacer.to_json() | {"sensitivity": 0}
    for key, value in whole.state_dict().items():
        if key != "_extra_state":  # holds the seconds that a measurement took
            assert torch.equal(value, resumed.state_dict()[key]), key


def test_bits_fall_on_schedule_and_nothing_is_traced_anew() -> None:
    student = _student(_recipe(MOQ))
    student(**_batch())
    graphs = {key: program.module.code for key, program in student.variants.items()}
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    changes = {}
    for step in range(1, 10):
        student(**_batch(step)).loss.backward()
        optimizer.step()
        drops = student.step()
        optimizer.zero_grad()
        if drops:
            changes[step] = {drop.after for drop in drops}
    assert changes == {1: {7}, 2: {6}, 4: {5}, 8: {4}}
    assert {key: program.module.code for key, program in student.variants.items()} == graphs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moq", "binary"])
def test_a_compiled_student_is_compiled_once(name: str) -> None:
    torch._dynamo.reset()
    student = _student(RECIPES[name])
    student(**_batch())  # captures the variant for training
    before = counters["stats"]["unique_graphs"]
    compiled, optimizer = torch.compile(student, fullgraph=True), torch.optim.SGD(student.parameters(), 1e-2)
    for step in range(10):
        compiled(**_batch(step)).loss.backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    assert student.course.average_bits() == (4 if name == "moq" else 1)
    assert counters["stats"]["unique_graphs"] - before == 1
    torch._dynamo.reset()


def test_weights_are_in_full_precision_before_the_offset() -> None:
    model = _Classifier().train()
    schedule = {"type": "constant", "offset": 2}
    student = dwindle.prepare(model, _recipe(schedule, {"offset": 2}, bits=2), inputs=_batch())
    outputs = []
    for _ in range(3):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(student(**_batch()).logits)
        student.step()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(**_batch()).logits
    assert torch.equal(outputs[0], expected)
    assert torch.equal(outputs[1], expected)
    assert not torch.equal(outputs[2], expected)


def test_activations_on_two_schedules_are_simulated_apart() -> None:
    model, inputs = ZOO["bert"]()
    entries = [
        {"activation": {}},
        {"modules": "*.query", "weight": "keep", "activation": {"offset": 2}},
    ]
    student = dwindle.prepare(model.train(), {"quantize": entries}, inputs=inputs)
    mixes = []
    for _ in range(3):
        stored = {name: value for name, value in student.store.entries() if name.endswith("_input_mix")}
        query, key = (
            float(stored[f"encoder.layer.0.attention.self.{part}.weight_input_mix"]) for part in ("query", "key")
        )
        mixes.append((query, key))
        student.step()
    assert mixes == [(1.0, 0.0), (1.0, 0.0), (0.0, 0.0)]
    code = student.eval().variants
    reads = {str(n.target) for program in code.values() for n in program.graph.nodes if n.op == "get_attr"}
    assert {name for name in reads if "layer.0.attention.self" in name and name.endswith("_input_mix")} == {
        "encoder.layer.0.attention.self.query.weight_input_mix",
        "encoder.layer.0.attention.self.key.weight_input_mix",
    }


def test_steps_that_an_optimizer_does_not_take_do_not_count() -> None:
    student = _student(_recipe(MOQ))
    optimizer = torch.optim.SGD(student.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    stop = student.follow(optimizer)
    for step in range(3):
        scaler.scale(student(**_batch(step)).loss).backward()
        if step == 1:
            student.head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert student.course.step == 2
    with pytest.raises(ScheduleError, match="follows an optimizer"):
        student.step()
    stop()
    student.step()
    assert student.course.step == 3


def test_learned_scales_train_and_go_by_the_root_of_the_codes_at_a_drop() -> None:
    student = _student(_recipe({**MOQ, "offset": 1}, None, learned=True))
    steps = dict(student.named_parameters())["head.weight_step"]
    before = steps.detach().clone()
    student(**_batch()).loss.backward()
    assert steps.grad is None or not steps.grad.any()  # in full precision still
    student.step()
    student(**_batch()).loss.backward()
    assert steps.grad.abs().sum() > 0
    student.step()  # 8 -> 7 bits: 127 codes to one side, then 63
    assert torch.allclose(steps, before * (7 / 63) ** 0.5)  # 4 bits have 7 codes to a side


def test_an_adaptive_schedule_meets_its_budget() -> None:
    for budget in ({"average_bits": 5}, {"target_bytes": 3300}):
        schedule = {"type": "adaptive", "start_bits": 8, "interval": 2, "share": 0.3, "tolerance": 100, **budget}
        student = _student(_recipe(schedule, {}, bits=2))
        _train(student, range(60), torch.optim.SGD(student.parameters(), 1e-3))
        assert student.course.average_bits() < 7
        if "average_bits" in budget:
            assert 4.5 <= student.course.average_bits() <= 5
        else:
            assert student.pacer.nbytes() <= 3300
            assert student.finish().certificate.bytes_after <= 3300


def test_the_planned_run_must_be_long_enough() -> None:
    with pytest.raises(ScheduleError, match=r"(?s)does not end within the run.*found: 4 bits after 8 steps"):
        _student(_recipe(MOQ), total_steps=7)
    assert _student(_recipe(MOQ), total_steps=8).forecast(8).late == ()


def test_an_unfinished_schedule_is_told() -> None:
    student = _student(_recipe({"type": "moq", "start_bits": 12, "period": 5}))
    with pytest.raises(ScheduleError, match=r"(?s)not at the end.*12\.00 bits on average after 0 steps"):
        student.finish()
    assert not any(isinstance(v, QTensor) for _, v in student.finish(early=True).store.entries())


def test_a_range_that_nothing_was_seen_of_is_told() -> None:
    with pytest.raises(CalibrationError, match="nothing was seen of"):
        _student(_recipe(None, {"range": "static"})).finish()


def test_a_state_of_another_recipe_or_version_is_refused() -> None:
    student, other = _student(_recipe(MOQ)), _student({"quantize": [{"modules": "head"}], "schedule": MOQ})
    with pytest.raises(ScheduleError, match="another model or recipe"):
        student.set_extra_state(other.get_extra_state())
    with pytest.raises(ScheduleError, match="another model or recipe"):
        student.set_extra_state(_student(RECIPES["adaptive"]).get_extra_state())
    with pytest.raises(ScheduleError, match="cannot be read"):
        student.set_extra_state(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("recipe", "kind", "match"),
    [
        (_recipe({**MOQ, "start_bits": 3}), RecipeError, "rises"),
        (_recipe(MOQ, None, bits=1, kind="asymmetric"), RecipeError, "1 bits"),
        (_recipe(MOQ, None, bits=17), RecipeError, "at most 8 bits"),
        (_recipe({**MOQ, "period": -1}), RecipeError, "period"),
        (_recipe(MOQ, None, groups=3), SchemeError, "do not divide"),
        (_recipe(MOQ, None, learned=True, kind="ternary", bits=2), RecipeError, "learned"),
        (_recipe({"type": "moq", "perod": 3}), RecipeError, "perod"),
    ],
)
def test_bad_recipes_are_refused_before_the_first_step(recipe: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        _student(recipe)


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet", "tied_lm"])
def test_models_of_many_kinds_train_and_finish(name: str) -> None:
    model, inputs = ZOO[name]()
    entry = {"operators": ["linear", "embedding", "conv2d"], "weight": {"bits": 4}, "activation": None}
    student = dwindle.prepare(model.train(), {"quantize": [entry], "schedule": {**MOQ, "period": 0}}, inputs=inputs)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)
    student.follow(optimizer)
    for _ in range(5):
        output = student(**inputs)
        output[0].float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    small = student.finish()
    assert all(now.bits == 4 for now in student.course.weights.values())
    assert FULL not in {now.bits for now in student.course.inputs.values()}
    with torch.no_grad():
        assert error(small(**inputs)[0], student.eval()(**inputs)[0]) < 1e-4
