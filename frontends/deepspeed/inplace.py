"""A model whose modules are trained as they stand: its twins, its schedule, and the optimizer steps that move it.

    attach(model, recipe)     decide as `prepare` does, turn the chosen modules into their twins, follow optimizers
    steering_of(model)        the schedule of a model that was attached

Steps are counted by a hook on all of torch's optimizers, since a caller of the old entry points has nothing to call.
An optimizer counts if it holds a parameter of the model and really took its step; one that only wraps another does
not. Of several that step in turns, one round is one step: a new round begins when a parameter is reached again.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...passes.prune.pruning import Pruning
from ...passes.quantize.course import Course
from ...passes.quantize.decide import decided
from ...passes.quantize.twins import Simulation, Twin, become_twin, read_modules, twins_of
from ...runtime.errors import RecipeError, ScheduleError
from ...runtime.plan import Plan
from ...runtime.qtensor import QTensor
from ...runtime.store import Store
from ..assemble import require_effect, require_original
from ..pacing import Change, Pacer, really_stepped
from ..recipe import Recipe


class Places(Store):
    """A model's twins as a store: every tensor is found where it is now, in the twin that has it.

    twins: by the name of the weight without its last part; what is iterated over is the whole model
    """

    def __init__(self, model: nn.Module, twins: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.twins = dict(twins)

    def get(self, name: str) -> Tensor | QTensor | None:
        path, _, leaf = name.rpartition(".")
        twin = self.twins[path]
        found = twin._parameters.get(leaf)
        return twin._buffers.get(leaf) if found is None else found

    def put(self, name: str, value: Tensor | nn.Module, *, persistent: bool = True) -> None:
        path, _, leaf = name.rpartition(".")
        assert isinstance(value, Tensor)
        self.twins[path].register_buffer(leaf, value, persistent=persistent)


class InPlace:
    """What moves the twins of one model.

    twins: by weight; of a tied one the first has what a schedule writes, and the others are brought in line
    drops: what changed its bits so far
    """

    def __init__(self, model: nn.Module, recipe: Recipe, twins: Mapping[str, Sequence[Twin]], course: Course) -> None:
        self.recipe, self.twins, self.store = recipe, {fqn: tuple(t) for fqn, t in twins.items()}, course.store
        self.pacer = Pacer(course, Pruning(), recipe.sensitivity, recipe.adaptive())
        self.drops: list[Change] = []
        self._last: tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None = None
        self._loss: Tensor | None = None
        self._round: set[int] = set()
        self._watch = None
        if recipe.sensitivity is not None:
            self._watch = model.register_forward_hook(self._remember, with_kwargs=True)
        self._align()
        self._follow()

    @property
    def course(self) -> Course:
        """Where every weight is on its schedule."""
        return self.pacer.course

    @property
    def remembers(self) -> bool:
        """Whether a resumed run needs more than tensors."""
        return self.pacer.remembers

    def to_tensor(self) -> Tensor:
        """The schedule as uint8."""
        return self.pacer.to_tensor()

    def load_tensor(self, state: Tensor) -> None:
        """Inverse of `to_tensor`. Raises ScheduleError for a state of another model, recipe or version."""
        self.pacer.load_tensor(state)
        self._align()

    def release(self) -> None:
        """Count no more steps."""
        self._handle.remove()
        if self._watch is not None:
            self._watch.remove()

    def _follow(self) -> None:
        own = weakref.ref(self)  # the hook outlives the model, and must not keep it

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            steering = own()
            if steering is not None:
                steering._stepped(optimizer)

        self._handle = register_optimizer_step_post_hook(after_step)
        weakref.finalize(self, self._handle.remove)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        reached = self._reached_by(optimizer)
        if not reached or not really_stepped(optimizer):
            return
        if self._round and not self._round & reached:
            self._round |= reached
            return
        self._round = reached
        again = self._again if self._loss is not None else None
        self.drops += self.pacer.advance(self._loss, again)
        self._last = self._loss = None
        self._align()

    def _reached_by(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """Which of the model's parameters an optimizer steps itself, as their ids."""
        if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
            return set()
        own = {id(parameter) for parameter in self.store.parameters()}
        return own & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    @torch.no_grad()
    def _align(self) -> None:
        """Give twins of a tied weight what the first of them has."""
        for first, *others in self.twins.values():
            for twin in others:
                for name in ("weight_qmax", "weight_mix", "weight_key", "weight_input_qmax", "weight_input_mix"):
                    own, value = twin._buffers.get(name), first._buffers.get(name)
                    if own is not None and value is not None:
                        own.copy_(value)
                    elif value is not None:
                        twin.register_buffer(name, value.clone(), persistent=False)

    def _remember(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the call and its loss: curvature is measured at the batch just trained on."""
        if model.training:
            loss = getattr(output, "loss", None)
            self._last = (model, args, kwargs)
            self._loss = loss.detach() if isinstance(loss, Tensor) else None

    def _again(self) -> Tensor:
        assert self._last is not None
        model, args, kwargs = self._last
        loss: Tensor = model(*args, **kwargs).loss
        return loss

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_handle", "_round", "_last", "_loss")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model is followed too."""
        vars(self).update(state)
        self._last = self._loss = None
        self._round = set()
        self._follow()


def attach(model: nn.Module, recipe: Recipe) -> None:
    """Turn the modules that the recipe chooses into their twins; a recipe without rules changes nothing.

    Raises RecipeError or SchemeError before anything is changed.
    """
    rules = recipe.rules()
    if not rules:
        return
    if steering_of(model) is not None:
        raise RecipeError(
            "the model was initialised already",
            required="a model that init_compression has not seen",
            found=f"{sum(1 for _ in twins_of(model))} modules in training",
            cure="call init_compression once, before the optimizer is made",
        )
    require_original(model)
    reading, modules = read_modules(model)
    paces = decided(reading, rules)
    plan = Plan(tuple(paces))
    require_effect(rules, plan, reading.log)
    readers: dict[str, list[Any]] = defaultdict(list)  # twins from the next loop on
    chosen = []
    for use, module in zip(reading.uses, modules, strict=True):
        edit = plan.quantize(use.fqn, use.operator)
        if edit is not None:
            readers[use.fqn].append(module)
            chosen.append((module, edit))
    twins = {fqn.rpartition(".")[0]: found[0] for fqn, found in readers.items()}
    schedules = {edit.fqn: pace for edit, pace in paces.items()}
    course = Course(Places(model, twins), plan.quantizations, schedules, recipe.seed)
    steering = InPlace(model, recipe, readers, course)
    for i, (module, edit) in enumerate(chosen):
        simulation = Simulation.of(edit, alone=len(readers[edit.fqn]) == 1, momentum=recipe.calibration.momentum)
        become_twin(module, simulation, steering, carries=i == 0)


def steering_of(model: nn.Module) -> InPlace | None:
    """What moves a model's twins; None where it has none."""
    for twin in twins_of(model):
        assert isinstance(twin.steering, InPlace)
        return twin.steering
    return None


def require_steering(model: nn.Module) -> InPlace:
    """`steering_of`, or ScheduleError."""
    steering = steering_of(model)
    if steering is None:
        raise ScheduleError(
            "the model has no module in training",
            required="a model that init_compression initialised",
            found=type(model).__name__,
            cure="init_compression(model, config), then load its checkpoint",
        )
    return steering
