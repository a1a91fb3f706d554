"""What moves the schedules of a student: optimizer steps, curvature, and the loss itself.

    step          every schedule advances
    curvature     measured when a weight is about to lose a bit, at most every `every` steps; its factor by block
                  stretches MoQ's period
    loss          an adaptive schedule lowers what is predicted to cost least, and takes back what hurt

Under torch.distributed losses and curvatures are averaged, so that all ranks decide alike.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.prune.masks import Thinning
from ..passes.prune.pruning import Pruning
from ..passes.quantize.adaptive import Budget, Candidate, Controller
from ..passes.quantize.course import Course, Drop
from ..passes.quantize.growth import growth
from ..passes.quantize.sensitivity import Sensitivity, eigenvalues, traces
from ..passes.schedule import AT_ONCE
from ..runtime.errors import RecipeError, ScheduleError
from ..runtime.qtensor import packed_nbytes
from ..runtime.report import block_of
from ..runtime.scheme import Scheme
from ..runtime.store import Store
from .curvature import in_steps
from .distributed import averaged, mean_over_ranks
from .history import History
from .settings import AdaptiveSettings, SensitivitySettings

Closure = Callable[[], Tensor]
Change = Drop | Thinning
STATE = 3  # version of what a state_dict holds besides tensors


@dataclass
class Spent:
    """What all measurements of curvature took together."""

    measurements: int = 0
    products: int = 0
    seconds: float = 0.0

    def add(self, found: Sensitivity) -> None:
        """One more."""
        self.measurements += 1
        self.products += found.products
        self.seconds += found.seconds


class Pacer:
    """A course, and what it is steered by.

    sensitivity: as last measured; spent: on all measurements; watchers: told of each step's drops
    """

    def __init__(
        self,
        course: Course,
        pruning: Pruning,
        settings: SensitivitySettings | None,
        adaptive: AdaptiveSettings | None,
    ) -> None:
        self.course, self.pruning, self.settings = course, pruning, settings
        self.controller = None if adaptive is None else Controller(adaptive.budget())
        self.blocks = blocks(course, settings.blocks if settings else None)
        self._recipe = fingerprint(course, pruning, settings, adaptive)
        if self.controller is not None:
            self._require_reachable(self.controller.budget)
        self.sensitivity: Sensitivity | None = None
        self.measured_at, self.spent = -1, Spent()
        self.history = History(course.average_bits())
        self.watchers: list[Callable[[Sequence[Change]], None]] = []
        self._ended, self._times = 0.0, deque[float](maxlen=64)  # when the last step was over; seconds of steps

    def on(self, store: Store) -> Pacer:
        """The same state, to go on by itself on a copy of the course's store; nobody watches it yet."""
        known: dict[int, Any] = {id(self.course): self.course.on(store), id(self.watchers): []}
        known |= {id(course): course.on(store) for course in self.pruning.courses}
        return copy.deepcopy(self, known)

    @property
    def remembers(self) -> bool:
        """Whether a resumed run needs more than tensors: a schedule, or random numbers that go by the step."""
        paces = self.course.paces.values()
        if self.pruning.courses:
            return True
        moves = any(pace.weight != AT_ONCE or pace.activation != AT_ONCE for pace in paces)
        return moves or any(scheme.rounding == "stochastic" for scheme in self.course.targets.values())

    def advance(self, loss: Tensor | float | None, closure: Closure | None) -> list[Change]:
        """One optimizer step is done."""
        if self._ended:
            self._times.append(time.perf_counter() - self._ended)
        if self.settings is not None and self._wants_curvature():
            self.measure(closure)
        drops = self.course.advance(self.factors())
        if self.controller is not None:
            drops += self._steer(self.controller, loss)
        changes: list[Change] = [*drops, *self.pruning.advance()]
        self.history.record(self.course.step, loss, self.course.average_bits(), changes)
        for watcher in self.watchers:
            watcher(changes)
        self._ended = time.perf_counter()
        return changes

    def factors(self) -> dict[str, int]:
        """By how much curvature stretches MoQ's period, by weight."""
        found = self.sensitivity.factors() if self.sensitivity is not None else {}
        return {fqn: found[name] for name, fqns in self.blocks.items() if name in found for fqn in fqns}

    @property
    def step_seconds(self) -> float | None:
        """What a training step takes, without the measurements of curvature; None before the second."""
        return median(self._times) if self._times else None

    def _wants_curvature(self) -> bool:
        assert self.settings is not None
        if self.measured_at >= 0 and self.course.step - self.measured_at < self.settings.every:
            return False
        if self.controller is not None:
            return len(self.controller.losses) + 1 >= self.controller.budget.interval
        return self.course.falls_next()

    def measure(self, closure: Closure | None) -> Sensitivity:
        """`curvature`, for the schedules to go by from here on."""
        self.sensitivity, self.measured_at = self.curvature(closure), self.course.step
        self.spent.add(self.sensitivity)
        return self.sensitivity

    def curvature(self, closure: Closure | None) -> Sensitivity:
        """Of every block, at the loss that `closure` gives, averaged over ranks."""
        s = self.settings or SensitivitySettings()
        if closure is None:
            raise ScheduleError(
                "curvature needs the loss of a batch",
                required="step(closure=lambda: loss), or a model whose output has a loss",
                found="neither",
                cure="pass a closure that computes the loss of the batch just trained on",
            )
        parameters = {name: self._parameters(fqns) for name, fqns in self.blocks.items()}
        seed = s.seed + self.course.step
        if s.method == "eigenvalue":
            options = {"iterations": s.iterations, "tolerance": s.tolerance, "stability": s.stability}
            found = eigenvalues(closure, parameters, seed=seed, **options)  # type: ignore[arg-type]  # by name
        else:
            found = traces(closure, parameters, samples=s.samples, seed=seed)
        return averaged(found)

    def _parameters(self, fqns: list[str]) -> list[nn.Parameter]:
        held = [self.course.store.get(fqn) for fqn in fqns]
        return [p for p in held if isinstance(p, nn.Parameter)]

    def _steer(self, controller: Controller, loss: Tensor | float | None) -> list[Drop]:
        held = self.course.held()
        if not held:
            return []
        if loss is None:
            raise ScheduleError(
                "an adaptive schedule watches the loss",
                required="step(loss), or a model whose output has a loss",
                found="neither",
                cure="pass the loss of the batch just trained on to step()",
            )
        controller.observe(mean_over_ranks(float(loss)))
        if not controller.due():
            return []
        back = controller.judge()
        drops = [drop for fqn in back for drop in self.course.change(fqn, +1)]
        if not back:
            candidates = [c for fqn in held if (c := self._candidate(fqn)) is not None]
            chosen = controller.choose(candidates, self._excess(controller.budget))
            drops += [drop for fqn in chosen for drop in self.course.change(fqn, -1)]
        return drops

    def _candidate(self, fqn: str) -> Candidate | None:
        now, target = self.course.weights[fqn], self.course.targets[fqn]
        if now.bits <= target.bits:
            return None
        weight = self.course.store.get(fqn)
        assert isinstance(weight, Tensor)
        curvature = None
        if self.sensitivity is not None:
            block = next((name for name, fqns in self.blocks.items() if fqn in fqns), "")
            found = self.sensitivity.blocks.get(block)
            curvature = None if found is None else abs(found.value)
        if curvature is None and not weight.requires_grad:  # frozen: what it would cost is not known, so it comes last
            return Candidate(fqn=fqn, bits=now.bits, elements=weight.numel(), growth=math.inf)
        if curvature is None and weight.grad is None:
            raise ScheduleError(
                "an adaptive schedule predicts from gradients",
                required="step() before optimizer.zero_grad(), or a recipe with sensitivity",
                found=f"no gradient of {fqn}",
            )
        predicted = growth(weight, target.at(now.bits), target.at(now.bits - 1), curvature)
        return Candidate(fqn=fqn, bits=now.bits, elements=weight.numel(), growth=predicted)

    def _excess(self, budget: Budget) -> float:
        """Element-bits above the budget."""
        if budget.average_bits is not None:
            total = sum(self.course.elements(fqn) for fqn in self.course.weights)
            return (self.course.average_bits() - budget.average_bits) * total
        assert budget.target_bytes is not None
        return 8.0 * (self.nbytes() - budget.target_bytes)

    def nbytes(self) -> int:
        """Bytes of all tensors of the model, were it finished now."""
        return self._nbytes({fqn: self.course.scheme(fqn) for fqn in self.course.weights})

    def _nbytes(self, schemes: Mapping[str, Scheme | None]) -> int:
        count, persistent, pruning = 0, self.course.store.state_dict(keep_vars=True), self.pruning.structured
        kept, own = {} if pruning is None else pruning.kept(), self.pruning.names()
        for name, tensor in persistent.items():
            if name in own:
                continue
            shape = (pruning.shape(name, kept) if kept and pruning is not None else None) or tensor.shape
            scheme = schemes.get(name)
            whole = math.prod(shape) * tensor.element_size()
            count += whole if scheme is None else packed_nbytes(torch.Size(shape), scheme)
        return count

    def _require_reachable(self, budget: Budget) -> None:
        """Raise RecipeError for a budget below what the recipe's least bits take."""
        sizes = {fqn: self.course.elements(fqn) for fqn in self.course.weights}
        if budget.target_bytes is not None:
            least, asked = float(self._nbytes(self.course.targets)), float(budget.target_bytes)
        else:
            least = sum(self.course.targets[fqn].bits * n for fqn, n in sizes.items()) / max(sum(sizes.values()), 1)
            asked = budget.average_bits or 0.0
        if asked < least:
            raise RecipeError(
                "an adaptive schedule cannot meet its budget",
                required=f"at least {least:.10g}, which every weight takes at the least bits it may have",
                found=f"{asked:.10g}",
                cure="give the weights fewer bits: the recipe's own are the least they fall to",
            )

    def require_end(self) -> None:
        """Raise ScheduleError where a schedule is not over."""
        self.course.require_settled("train on, shorten the schedule, or finish(early=True) with the bits as they are")
        self.pruning.require_settled()
        self.require_budget()

    def require_budget(self) -> None:
        """Raise ScheduleError where an adaptive schedule has not met its budget yet."""
        if self.controller is None or self._excess(self.controller.budget) <= 0:
            return
        budget = self.controller.budget
        asked = f"{budget.average_bits} bits" if budget.average_bits is not None else f"{budget.target_bytes} bytes"
        raise ScheduleError(
            "the adaptive schedule has not met its budget",
            required=asked,
            found=f"{self.course.average_bits():.2f} bits on average, {self.nbytes()} bytes after "
            f"{self.course.step} steps",
            cure="train on, lower interval, raise share or tolerance, or finish(early=True) with the bits as they are",
        )

    def summary(self) -> dict[str, Any]:
        """The run so far, as plain data for a report."""
        curvature = None
        if self.sensitivity is not None:
            took = f"{self.spent.products} Hessian-vector products in {self.spent.seconds:.3g} s"
            factors = self.sensitivity.factors()
            curvature = {
                **asdict(self.spent),
                "cost": took + in_steps(self.spent.seconds, self.step_seconds),
                "blocks": {name: [c.value, factors[name]] for name, c in self.sensitivity.blocks.items()},
            }
        return {
            "steps": self.course.step,
            "bits": [self.history.start, self.course.average_bits()],
            "kept": [list(row) for row in self.pruning.staying()],
            "curve": [list(point) for point in self.history.curve],
            "changes": [list(change) for change in self.history.changes],
            "curvature": curvature,
        }

    def to_tensor(self) -> Tensor:
        """`to_json` as uint8, which every format of checkpoints takes."""
        state = {"version": STATE, **self.to_json()}
        return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8).clone()

    def load_tensor(self, state: Tensor) -> None:
        """Inverse of `to_tensor`. Raises ScheduleError for a state of another model, recipe or version."""
        try:
            data = json.loads(bytes(state.cpu().tolist()).decode())
            version = data["version"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ScheduleError("the saved schedule cannot be read", found=error) from error
        if version != STATE:
            raise ScheduleError(
                "the saved schedule is of another version of dwindle",
                required=f"version {STATE}",
                found=version,
                cure="finish the run with the version that began it",
            )
        try:
            self.load_json(data)
        except (KeyError, TypeError, ValueError) as error:
            raise ScheduleError("the saved schedule cannot be read", found=repr(error)) from error

    def to_json(self) -> dict[str, Any]:
        """Plain data. All seconds are below "sensitivity"; two runs that are alike differ in nothing else."""
        found = None if self.sensitivity is None else self.sensitivity.to_json()
        return {
            "recipe": self._recipe,
            "course": self.course.to_json(),
            "pruning": self.pruning.to_json(),
            "controller": None if self.controller is None else self.controller.to_json(),
            "sensitivity": None if found is None else {"found": found, "spent": asdict(self.spent)},
            "measured_at": self.measured_at,
            "history": self.history.to_json(),
        }

    def load_json(self, data: Mapping[str, Any]) -> None:
        """Inverse of `to_json`. Raises ScheduleError where it is another model's or recipe's."""
        parts = ("recipe", "course", "pruning", "controller", "sensitivity", "measured_at", "history")
        recipe, course, pruning, controller, measured, measured_at, history = (data[part] for part in parts)
        self.course.require_same(course)
        if recipe != self._recipe:
            raise ScheduleError(
                "the saved schedule is of another recipe",
                required="the schemes, schedules, seed and budget of the run that is resumed",
                found="some that differ",
                cure="prepare the model with the recipe of that run",
            )
        self.course.load_json(course)
        self.pruning.load_json(pruning)
        if self.controller is not None:
            self.controller.load_json(controller)
        self.sensitivity = None if measured is None else Sensitivity.from_json(measured["found"])
        self.spent = Spent() if measured is None else Spent(**measured["spent"])
        self.measured_at = measured_at
        self.history.load_json(history)


def fingerprint(course: Course, pruning: Pruning, *settings: SensitivitySettings | AdaptiveSettings | None) -> str:
    """Of everything in a recipe that steers: two runs with one fingerprint may take up each other's state."""
    rules = [course.rules for course in pruning.courses]
    paces = sorted(course.paces.items(), key=lambda pace: pace[0])
    steering = repr((course.edits, paces, course.seed, rules, settings))
    return hashlib.sha256(steering.encode()).hexdigest()[:16]


def blocks(course: Course, prefix: str | None) -> dict[str, list[str]]:
    """The quantised weights by repeated block ("encoder.layer.3"), below `prefix` where one is given.

    Raises RecipeError where no weight lies below it.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for fqn in course.weights:
        block = block_of(fqn)
        if block.rpartition(".")[2].isdigit() and (prefix is None or block.startswith(f"{prefix}.")):
            found[block].append(fqn)
    if prefix is None and not found:  # no repeated blocks: every module is one
        for fqn in course.weights:
            found[fqn.rpartition(".")[0] or fqn].append(fqn)
    if not found and course.weights:
        known = sorted({block_of(fqn).rpartition(".")[0] for fqn in course.weights} - {""})
        raise RecipeError(f"no blocks below {prefix!r}", required=f"one of {', '.join(known) or 'none'}", found=prefix)
    return dict(found)


def really_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """False where a fused optimizer left out its step itself, since a GradScaler told it of infinite gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is None or not bool(found)
