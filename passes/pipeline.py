"""All passes in the order in which they run. A new pass is one file and one line here.

PREPARE takes a captured program to one that simulates what the Plan says; FINISH makes it real. Training runs
the first and, when it is done, the second; post-training compression runs both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..runtime.errors import CalibrationError, RecipeError
from ..runtime.plan import DropBlock, Plan, Slice, Sparsify, input_scale_name, input_zero_name
from ..runtime.program import Program
from ..runtime.qtensor import QTensor
from ..runtime.store import Store
from .canonicalize import TO_LINEAR, canonicalize
from .certify import require_real
from .choose_layers import drops_of
from .depth import DepthRule, drop_blocks
from .driver import Driver, Pass
from .fold import fold_batch_norm, fold_constants
from .lower import lower
from .progress import Show, no_steps
from .prune import sparsify as zeros
from .prune.course import PruneCourse
from .prune.decide import PruneRule, accepted, chosen, provable, require_proven
from .prune.evidence import evidence
from .prune.gates import gated
from .prune.gradients import Loss
from .prune.proof import draws
from .prune.sliced import record, sliced
from .prune.slices import leaves_of, slices_of
from .prune.sparsify import SparseCourse, SparseRule, sparsified
from .prune.transfer import rule_of
from .prune.walk import Walk
from .quantize.calibrate import calibrate, require_calls, static_sites
from .quantize.course import Course
from .quantize.cuts import slice_scales
from .quantize.decide import Pace, QuantizeRule, decide, require_zero_codes
from .quantize.equalize import STAGE as EQUALIZE
from .quantize.equalize import Fold, find_folds, refold
from .quantize.insert import insert
from .quantize.live import Live, floating, place_ranges
from .quantize.observers import MakeObserver, Observer
from .quantize.rounded import edits_by_data, replayed, round_by_data
from .quantize.steps import on_steps
from .rewrite import apply_rules
from .stream import Batch, Batches


@dataclass
class Job:
    """What passes need beyond the program, and what deciding passes decide.

    depth: rules of depth; drops: the blocks that go
    prunes: pruning rules; slices: the cuts that they come to, None until decided
    pruning: where they are in training, made before the first mask
    sparsifies: rules of zeros; masks: what they come to by weight, None until decided; sparsity: they in training
    zeros: how many there are
    inputs: flat examples, on which a cut is proved; loss: of a model's output, for scores that go by its gradients
    plan: None until decided; given when a Plan is replayed on another variant
    target: the store of the finished model, which also keeps calibrated ranges between variants
    batches: flat inputs for calibration, asked for only where something is static; training may go without
    trains: the program's store is trained, so no weight in it may be rewritten
    paces: the schedules of each edit, by parameter, where training was asked for
    course: where they are, made before the first fake-quantise node; seed: of stochastic rounding
    momentum: of ranges that training observes
    folds: scales that went from activations into weights, None until found
    show: how far a pass is that takes long
    reference: the program in floating point as it was when quantisation began, to compare layers with
    """

    rules: Sequence[QuantizeRule] = ()
    depth: Sequence[DepthRule] = ()
    drops: tuple[DropBlock, ...] = ()
    prunes: Sequence[PruneRule] = ()
    slices: tuple[Slice, ...] | None = None
    pruning: PruneCourse | None = None
    sparsifies: Sequence[SparseRule] = ()
    masks: Mapping[str, Tensor] | None = None
    sparsity: SparseCourse | None = None
    zeros: tuple[Sparsify, ...] = ()
    inputs: Sequence[Sequence[Tensor]] = ()
    loss: Loss | None = None
    plan: Plan | None = None
    target: Store = field(default_factory=Store)
    batches: Batches | None = None
    observer: MakeObserver = Observer
    trains: bool = False
    paces: dict[str, Pace] = field(default_factory=dict)
    course: Course | None = None
    seed: int = 0
    momentum: float = 0.9
    folds: tuple[Fold, ...] | None = None
    show: Show = no_steps
    reference: Program | None = None

    @property
    def cuts(self) -> tuple[Slice, ...]:
        """Cuts that are to be replayed."""
        return () if self.plan is None else self.plan.slices

    @property
    def drops_now(self) -> bool:
        """Whether blocks go."""
        return bool(self.depth) if self.plan is None else bool(self.plan.drops)

    @property
    def prunes_now(self) -> bool:
        """Whether there is anything to cut or to mask."""
        return bool(self.cuts) or self.pruning is not None or (self.plan is None and bool(self.prunes))

    @property
    def zeroes(self) -> bool:
        """Whether any weight gets zeros."""
        return bool(self.masks) or self.sparsity is not None or (self.plan is None and bool(self.sparsifies))

    @property
    def zeroed(self) -> set[str]:
        """The weights that get zeros, once it is decided which."""
        course = () if self.sparsity is None else self.sparsity.weights.values()
        return {edit.fqn for edit in self.zeros} | {weight.fqn for own in course for weight in own}

    def wants(self, operator: str) -> bool:
        """Whether anything quantises this operator, so that approximate rules for it are worth their rounding."""
        if self.plan is not None:
            wanted = any(edit.operator == operator for edit in self.plan.quantizations)
            return wanted or (operator == "linear" and self.zeroes)
        if operator == "linear" and self.zeroes:
            return True
        return any(operator in rule.operators and rule.weight is not None for rule in self.rules)


Step = Callable[[Program, Job], Program]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pass of the pipeline and the condition under which it runs."""

    name: str
    run: Step
    needed: Callable[[Program, Job], bool] = lambda program, job: True
    exact: bool = False
    limit: float | None = None


def _fold_constants(program: Program, job: Job) -> Program:
    return fold_constants(program)


def _drop(program: Program, job: Job) -> Program:
    if job.plan is None:
        with job.show("Ranking layers") as advance:
            job.drops = tuple(drops_of(program, job.depth, job.batches, advance))
    else:
        job.drops = job.plan.drops
    return drop_blocks(program, job.drops)


def _prune(program: Program, job: Job) -> Program:
    """Decided once, and replayed on further variants; in training masked, and cut when it is over."""
    program.tidy()
    walk = Walk.over(program, rule_of)
    if job.trains and not job.cuts:
        if job.pruning is None:
            # Training has gradients of its own.
            said = evidence(walk, job.prunes, job.batches, None)
            job.pruning = PruneCourse(walk, provable(walk, job.prunes, job.inputs), said)
        quantized = job.rules if job.plan is None else job.plan.quantizations
        return gated(program, walk, list(job.pruning.gates.values()), weights=bool(quantized))
    if job.plan is None:
        said = evidence(walk, job.prunes, job.batches, job.loss)
        kept = accepted(walk, chosen(walk, job.prunes, said, next(iter(job.inputs), None)), job.inputs)
        job.slices = tuple(slices_of(walk, kept))
    else:
        kept = leaves_of(walk, job.plan.slices)
        if job.inputs and not draws(program):
            require_proven(walk, kept, job.inputs)
    sliced(program, walk, kept)
    record(program)
    return program


def _sparsify(program: Program, job: Job) -> Program:
    """Decided once, and replayed on further variants; in training masked."""
    if job.sparsity is None and job.masks is None and job.trains:
        job.sparsity = SparseCourse(program, job.sparsifies)
    if job.sparsity is not None:
        return sparsified(program, job.sparsity)
    if job.masks is None:
        found = zeros.chosen(program, job.sparsifies)
        job.masks, job.zeros = {weight.fqn: mask for weight, mask in found.items()}, tuple(zeros.edits(found))
    zeros.zero(program.store, job.masks)
    return program


def _linearize(program: Program, job: Job) -> Program:
    apply_rules(program, TO_LINEAR, "linearize")
    return program


def _decide(program: Program, job: Job) -> Program:
    if job.plan is None:
        decided = decide(program, job.rules)
        job.paces = {edit.fqn: pace for edit, pace in decided.items()}
        # Without training nothing is learned.
        edits = decided if job.trains else [replace(edit, learned=False, learned_input=False) for edit in decided]
        require_zero_codes(edits, job.zeroed)
        job.plan = Plan((*job.drops, *(job.slices or ()), *job.zeros, *edits))
    return program


def _batches(job: Job, fqn: str) -> Iterable[Batch]:
    if job.batches is None:
        raise CalibrationError(
            f"{fqn} is not called where it would have been rounded by data",
            required="calibration data that reaches it",
            found="a call of the model with other arguments than those of data=",
            cure="compress with inputs= and data= of this kind, or choose method 'nearest'",
        )
    return job.batches()


def _equalize(program: Program, job: Job) -> Program:
    """Scales are found once, and folded into every variant alike."""
    edits = (job.plan or Plan()).quantizations
    if job.folds is None:
        first = next(edit for edit in edits if edit.moves_scale)
        with job.show("Moving scales") as advance:
            job.folds = find_folds(program, edits, _batches(job, first.fqn), advance)
        if not job.folds and any(edit.smooth is not None for edit in edits):
            reasons = {e.reason for e in program.log if e.stage == EQUALIZE and not e.applied}
            raise RecipeError(
                "smooth finds no activation that it could make smaller for free",
                required="a layer whose input comes from a norm or a linear layer alone, and is read by nothing else",
                found="; ".join(sorted(reasons)[:3]),
                cure="leave out smooth, or choose range 'dynamic', which needs it less",
            )
    return refold(program, job.folds)


def _round(program: Program, job: Job) -> Program:
    """Codes are found once; later variants read them from the finished store."""
    plan = job.plan or Plan()
    edits = edits_by_data(plan)
    job.reference = program.copy(program.store.fork())
    missing = [fqn for fqn in edits if not isinstance(job.target.get(fqn), QTensor)]
    if not missing:
        return replayed(program, plan, job.target)
    with job.show("Rounding by data") as advance:
        return round_by_data(program, plan, _batches(job, missing[0]), advance)


def _calibrate(program: Program, job: Job) -> Program:
    """Ranges are calibrated once; later variants read them from the finished store."""
    sites = static_sites(program, (job.plan or Plan()).quantizations)
    if job.trains:
        assert job.batches is not None
        place_ranges(program, sites, job.batches(), job.observer)
        return program
    require_calls(sites, job.target.calls)
    missing = [(s, edit) for s, edit in sites if job.target.get(input_scale_name(s.name, s.call)) is None]
    if missing and job.batches is None:
        site = missing[0][0]
        raise CalibrationError(
            f"{site.name} is not called where its static range would have been taken",
            required="calibration data that reaches it",
            found="a call of the model with other arguments than those of data=",
            cure="compress with inputs= and data= of this kind, or choose range 'dynamic'",
        )
    if missing:
        assert job.batches is not None
        calibrate(program, missing, job.batches(), job.observer)
    for site, _ in sites:
        for name in (input_scale_name(site.name, site.call), input_zero_name(site.name, site.call)):
            known, found = job.target.get(name), program.store.get(name)
            if known is None and isinstance(found, Tensor):
                job.target.put(name, found)
            elif isinstance(known, Tensor):
                program.store.put(name, known)
    return program


def _insert(program: Program, job: Job) -> Program:
    plan = job.plan or Plan()
    job.reference = job.reference or program.copy()
    if not job.trains:
        return insert(program, plan)
    sites = static_sites(program, plan.quantizations)
    if job.cuts:
        slice_scales(program, job.plan or Plan())
    if job.course is None:
        job.course = Course(program.store, plan.quantizations, job.paces, job.seed)
    require_calls(sites, program.store.calls)
    live = Live(job.momentum, {fqn: pace.activation for fqn, pace in job.course.paces.items()})
    return on_steps(insert(program, plan, live))


def _settle(program: Program, job: Job) -> Program:
    plan = job.plan or Plan()
    plain = floating(program, plan)
    job.reference = plain.copy()
    return insert(plain, plan)


def _lower(program: Program, job: Job) -> Program:
    lowered = lower(program, (job.plan or Plan()).quantizations, job.target)
    require_real(lowered)
    return lowered


PREPARE: tuple[Stage, ...] = (
    Stage(name="canonicalize", run=lambda program, job: canonicalize(program), exact=True),
    Stage(name="drop", run=_drop, needed=lambda program, job: job.drops_now),
    Stage(name="linearize", run=_linearize, needed=lambda program, job: job.wants("linear"), limit=1e-3),
    Stage(name="prune", run=_prune, needed=lambda program, job: job.prunes_now),
    Stage(name="sparsify", run=_sparsify, needed=lambda program, job: job.zeroes),
    # A student's buffers change as it trains.
    Stage(name="fold_constants", run=_fold_constants, needed=lambda program, job: not job.trains, exact=True),
    Stage(
        name="fold_batch_norm",
        run=lambda program, job: fold_batch_norm(program),
        needed=lambda program, job: job.wants("conv2d") and not job.trains,
        limit=1e-3,
    ),
    Stage(name="decide", run=_decide, exact=True),
    # The two below are for finished models: training moves weights, and they would have to be found anew.
    Stage(
        name="equalize",
        run=_equalize,
        needed=lambda program, job: any(edit.moves_scale for edit in (job.plan or Plan()).quantizations),
        limit=1e-3,
    ),
    Stage(name="round", run=_round, needed=lambda program, job: bool(edits_by_data(job.plan or Plan()))),
    Stage(
        name="calibrate",
        run=_calibrate,
        needed=lambda program, job: not job.trains or job.batches is not None,
        exact=True,
    ),
    Stage(name="insert", run=_insert, needed=lambda program, job: bool(job.plan and job.plan.quantizations)),
)

# After training: the plan as it is now in place of what schedules moved.
SETTLE: tuple[Stage, ...] = (
    Stage(name="settle", run=_settle, needed=lambda program, job: job.trains),
    Stage(name="fold_trained_constants", run=_fold_constants, needed=lambda program, job: job.trains, exact=True),
)

FINISH: tuple[Stage, ...] = (Stage(name="lower", run=_lower),)

PIPELINE: tuple[Stage, ...] = (*PREPARE, *SETTLE, *FINISH)


def run_stages(driver: Driver, stages: Sequence[Stage], job: Job) -> Program:
    """Apply the stages that are needed, each verified by the driver."""
    for stage in stages:
        if stage.needed(driver.program, job):
            driver.apply(_bound(stage, job))
    return driver.program


def _bound(stage: Stage, job: Job) -> Pass:
    return Pass(name=stage.name, run=lambda program: stage.run(program, job), exact=stage.exact, limit=stage.limit)
