"""A student in loops that are not Trainer's: accelerate, Lightning, autocast, half precision, any optimizer."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from classifier import MOQ, items
from numerics import error
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import dwindle
from dwindle.frontends.callbacks import LightningCallback
from dwindle.frontends.watch import ScheduleWarning
from dwindle.runtime.errors import MissingDependencyError, ScheduleError
from dwindle.runtime.qtensor import QTensor

STATIC = {
    "quantize": [{"weight": {"bits": 4, "learned": True}, "activation": {"range": "static"}}],
    "schedule": {"type": "moq", "start_bits": 8, "period": 1},
}
RECIPES = {"moq": MOQ, "learned": STATIC}


class Tiny(nn.Module):
    """A loss in the output, dropout, and two linears that read one activation."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(99, 32)
            self.one, self.two, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        x = nn.functional.dropout(self.table(input_ids), 0.1, self.training)  # (B, T, 32)
        logits = self.head((torch.tanh(self.one(x)) * torch.sigmoid(self.two(x))).mean(1))
        return SequenceClassifierOutput(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


def batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("input_ids", "labels")}


def student_of(recipe: dict[str, Any] = MOQ, dtype: torch.dtype = torch.float32) -> Any:
    return dwindle.prepare(Tiny().to(dtype).train(), recipe, inputs=batch(items(2)))


def bits(student: Any) -> set[int]:
    return {now.bits for now in student.course.weights.values()}


def finished_error(student: Any) -> float:
    """Of the finished model's logits against the student's."""
    small = student.finish()
    assert sum(isinstance(value, QTensor) for _, value in small.store.entries()) == len(student.course.weights)
    call = {key: value for key, value in batch(items(4, seed=9)).items() if key != "labels"}
    with torch.no_grad():
        return error(small(**call).logits.float(), student.eval()(**call).logits.float())


# accelerate


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Accelerator]]:
    """Accelerators of one test: accelerate keeps their settings in a state of the process."""

    def make(**options: Any) -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()  # a Trainer before has set how often to accumulate
        return Accelerator(cpu=True, gradient_accumulation_steps=2, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(made: Accelerator, recipe: dict[str, Any]) -> tuple[Any, Any, Any]:
    student = student_of(recipe)
    model, optimizer = made.prepare(student, torch.optim.AdamW(student.parameters(), 1e-3))
    student.follow(optimizer)
    return student, model, optimizer


def loop(made: Accelerator, model: Any, optimizer: Any, batches: range) -> list[float]:
    losses = []
    for index in batches:
        with made.accumulate(model):
            loss = model(**batch(items(4, seed=index))).loss
            made.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_accelerate_counts_steps_and_resumes_bit_for_bit(recipe: str, accelerator: Any, tmp_path: Path) -> None:
    made = accelerator()
    whole, model, optimizer = accelerated(made, RECIPES[recipe])
    loop(made, model, optimizer, range(6))
    assert whole.course.step == 3  # two micro-batches a step
    made.save_state(str(tmp_path / "state"))
    expected = loop(made, model, optimizer, range(6, 16))
    assert (whole.course.step, bits(whole)) == (8, {4})

    made = accelerator()
    resumed, model, optimizer = accelerated(made, RECIPES[recipe])
    made.load_state(str(tmp_path / "state"))
    assert resumed.course.step == 3
    assert loop(made, model, optimizer, range(6, 16)) == expected
    assert resumed.pacer.to_json() == whole.pacer.to_json()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert finished_error(made.unwrap_model(model)) < 1e-4


def test_accelerate_trains_in_mixed_precision(accelerator: Any) -> None:
    made = accelerator(mixed_precision="bf16")
    student, model, optimizer = accelerated(made, MOQ)
    loop(made, model, optimizer, range(16))
    assert (student.course.step, bits(student)) == (8, {4})
    assert finished_error(made.unwrap_model(model, keep_fp32_wrapper=False)) < 1e-4


# Lightning


def lightning(test: Any) -> Any:
    """A test that needs Lightning, and bears what torch 2.13 makes it warn of."""
    absent = pytest.mark.skipif(
        importlib.util.find_spec("lightning") is None,
        reason="NOT TESTED: Lightning is not installed; pip install -c constraints.txt '.[lightning]'",
    )
    for name in ("LeafSpec", "num_workers", "litlogger", "Checkpoint directory", "You are using the plugin"):
        test = pytest.mark.filterwarnings(f"ignore:.*{name}")(test)
    return absent(test)


def lightning_module(package: Any, student: Any, *, optimized: Any = None, overflows: int | None = None) -> Any:
    class Module(package.LightningModule):  # type: ignore[misc, name-defined]  # known only now
        def __init__(self) -> None:
            super().__init__()
            self.student = student

        def training_step(self, rows: dict[str, Tensor], index: int) -> Tensor:
            torch.manual_seed(self.global_step)  # dropout does not tell a resumed run from a whole one
            loss: Tensor = self.student(**rows).loss
            return loss * (torch.inf if index == overflows else 1)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW((optimized or student).parameters(), 1e-3)

    return Module()


def lightning_trainer(package: Any, student: Any, folder: Path, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, "enable_checkpointing": False}
    return package.Trainer(callbacks=[LightningCallback(student)], **(quiet | settings | options))


def loader() -> Any:
    return torch.utils.data.DataLoader(items(64), batch_size=4, collate_fn=batch)  # 16 batches, in order


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> Any:
    """Lightning under each of its names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return importlib.import_module(request.param)


@lightning
def test_lightning_accumulates_trains_and_finishes(package: Any, tmp_path: Path) -> None:
    student = student_of()
    trainer = lightning_trainer(package, student, tmp_path, accumulate_grad_batches=2)
    trainer.fit(lightning_module(package, student), loader())
    assert (student.course.step, bits(student)) == (8, {4})
    assert trainer.callback_metrics["average_bits"] == 4
    assert finished_error(student) < 1e-4
    student.step()  # no longer followed


@lightning
def test_lightning_resumes_from_its_own_checkpoint(package: Any, tmp_path: Path) -> None:
    found = []
    for epochs in ([2], [1, 2]):
        for last in epochs:
            student = student_of(STATIC)
            trainer = lightning_trainer(package, student, tmp_path, accumulate_grad_batches=4, max_epochs=last)
            begun = tmp_path / "begun.ckpt" if len(epochs) > 1 and last == 2 else None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ScheduleWarning)  # of the first epoch alone
                trainer.fit(lightning_module(package, student), loader(), ckpt_path=begun)
            if last == 1:
                trainer.save_checkpoint(tmp_path / "begun.ckpt")
        found.append(student)
    whole, resumed = found
    assert resumed.course.step == 8
    assert resumed.pacer.to_json() == whole.pacer.to_json()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@lightning
def test_lightning_steps_that_a_scaler_skips_do_not_count(package: Any, tmp_path: Path) -> None:
    plugin = importlib.import_module(f"{package.__name__}.plugins.precision").MixedPrecision
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    student = student_of()
    trainer = lightning_trainer(package, student, tmp_path, plugins=[plugin("16-mixed", "cpu", scaler=scaler)])
    trainer.fit(lightning_module(package, student, overflows=3), loader())
    assert scaler.get_scale() == 1.0  # halved once
    assert student.course.step == 15


@lightning
def test_lightning_warns_of_a_long_schedule_and_refuses_another_optimizer(package: Any, tmp_path: Path) -> None:
    student = student_of(MOQ | {"schedule": {"type": "moq", "start_bits": 8, "period": 100}})
    with pytest.warns(ScheduleWarning, match="4 bits after 800 steps and the run ends after 16"):
        lightning_trainer(package, student, tmp_path).fit(lightning_module(package, student), loader())
    other = lightning_module(package, student_of(), optimized=nn.Linear(2, 2))
    with pytest.raises(ScheduleError, match="no optimizer trains the student"):
        lightning_trainer(package, other.student, tmp_path).fit(other, loader())


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"dwindle\[lightning\]"):
        LightningCallback(student_of())


# Precision


def train(student: Any, make: Callable[..., torch.optim.Optimizer], steps: int, autocast: Any = None) -> list[float]:
    optimizer, losses = make(student.parameters()), []
    student.follow(optimizer)
    for step in range(steps):
        call = batch(items(4, seed=step))
        torch.manual_seed(step)

        def closure(call: dict[str, Tensor] = call) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                loss: Tensor = student(**call).loss
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


# fp16 holds no 1e-8, which AdamW adds to a root that may be zero; torch's own models are NaN with it too.
def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 1e-3, eps=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_trains(dtype: torch.dtype, recipe: str) -> None:
    student = student_of(RECIPES[recipe], dtype)
    losses = train(student, adamw, 9)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert bits(student) == {4}
    assert {p.dtype for p in student.parameters()} <= {dtype, torch.float32}  # a learned scale stays in fp32
    # The simulation rounds codes times scale to 16 bits, integers do not: measured .0063 in bf16 and .0006 in fp16
    assert finished_error(student) < (0.02 if dtype is torch.bfloat16 else 0.003)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_student_is_that_of_the_call(dtype: torch.dtype, recipe: str) -> None:
    inside, before = student_of(RECIPES[recipe]), student_of(RECIPES[recipe])
    state = copy.deepcopy(before.state_dict())
    before(**batch(items(4)))  # captured in full precision, the other one under autocast
    before.load_state_dict(state)  # an observed range has moved
    losses = [train(student, adamw, 9, autocast=dtype) for student in (inside, before)]
    assert losses[0] == losses[1]
    assert bits(inside) == {4}
    with torch.no_grad():
        assert inside.eval()(**batch(items(4))).logits.dtype is torch.float32  # nothing of it stays behind
    assert finished_error(inside) < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 1e-3, fused=True),
        lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p, 1e-3),
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),  # calls the model several times a step
    ],
    ids=["sgd", "fused adam", "foreach adamw", "adafactor", "rmsprop", "lbfgs"],
)
def test_any_optimizer(make: Callable[..., torch.optim.Optimizer]) -> None:
    student = student_of(STATIC)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    train(student, make, 8)
    assert (student.course.step, bits(student)) == (8, {4})
    still = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    assert finished_error(student) < 1e-4


@pytest.mark.parametrize("fused", [False, True])  # a fused optimizer is called, and skips by itself
def test_a_scaler_that_skips_a_step_of_two_micro_batches(fused: bool) -> None:
    student = student_of()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    student.follow(optimizer)
    steps = []
    for index in range(12):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = student(**batch(items(4, seed=index))).loss
        scaler.scale(loss * (torch.inf if index == 4 else 1)).backward()
        if index % 2:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            steps.append(student.course.step)
    assert steps == [1, 2, 2, 3, 4, 5]  # the third had an infinite gradient
    assert [now.bits for now in student.course.weights.values()] == [5] * len(student.course.weights)
