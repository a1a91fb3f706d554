"""Layer-by-layer distillation: each block of a student learns, by itself, to give what the teacher's block gives.

    for each block:  inputs = the teacher's activations into it;  loss = MSE(student's block(inputs), teacher's output)

The teacher is run once over all batches, block after block, and no further than the last; of its activations one cut
is held at a time: for each batch what goes into a block and what comes out. The student is never run as a whole. Its
weights stay in floating point with the quantisation simulated in the block, without dropout; embeddings, heads and what
blocks share stay as they are. Positions that an attention_mask (B, T) marks as padding do not count.

Yao et al. 2022, "ZeroQuant", arXiv 2206.01861, section 4.2.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..passes.block_training import Example, Training, learn
from ..passes.blocks import BlockPair, may_be_overwritten, pair_blocks
from ..passes.quantize.live import gauges, require_seen
from ..passes.stream import Stream
from ..runtime.contract import Signature
from ..runtime.errors import DistillationError
from ..runtime.program import Entry, Program
from ..runtime.structure import flatten
from .inputs import as_arguments, example_inputs, flat_batches, refuse_one_batch
from .progress import late
from .teacher import Teacher
from .workers import Workers, task_of

if TYPE_CHECKING:
    from .student import Student

Batches = list[Any]


@dataclass(frozen=True)
class LayerLearned:
    """One block. before, after: mean squared error of what it gives on the teacher's activations, over all batches"""

    path: str
    parameters: int
    before: float
    after: float


@dataclass(frozen=True)
class LayerwiseResult:
    """What each block has learned, in the teacher's order. left: by path, why a block was left as it is"""

    layers: tuple[LayerLearned, ...]
    training: Training
    batches: int
    seconds: float
    left: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        width = max(map(len, [*self.left, *(layer.path for layer in self.layers)]))
        lines = [f"{len(self.layers)} blocks, {self.training.steps} steps each, {self.seconds:.0f} s"]
        lines += [
            f"{layer.path:<{width}}  error {layer.before:.3g} -> {layer.after:.3g} ({layer.after / layer.before:.2f})"
            if layer.before
            else f"{layer.path:<{width}}  error {layer.before:.3g} -> {layer.after:.3g}"
            for layer in self.layers
        ]
        return "\n".join([*lines, *(f"{path:<{width}}  left as it is: {why}" for path, why in self.left.items())])


def distill_layers(
    student: Student,
    data: Iterable[Any],
    teacher: Teacher | None,
    training: Training,
    processes: int,
    quiet: bool,
) -> LayerwiseResult:
    """See `Student.distill_layers`."""
    _require(processes >= 1, "processes", "at least 1", processes)
    if teacher is None:
        raise DistillationError(
            "layers have no teacher to learn from",
            required="a teacher",
            found="none",
            cure="prepare(model, ..., teacher=model), or distill_layers(..., teacher=model)",
        )
    student.course.require_settled("distil layers when every schedule is over, or give a recipe without one")
    refuse_one_batch(data)
    batches = list(data)
    _require(bool(batches), "data", "at least one batch", "none")
    started = time.perf_counter()
    program = _graph_for(student, batches[0])
    require_seen(program, student.plan)
    for _ in flat_batches(program, student.signature, batches):
        pass  # refused here by name, not in some block
    model, flat = _asked(teacher, student, program, batches)
    found, left = pair_blocks(program, model, student.plan.drops)
    results = _Results(student, training)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(Stream(model, flat))
        workers = stack.enter_context(Workers(processes)) if processes > 1 else None
        total = len(found) * (1 if workers else training.steps)
        show, turns = stack.enter_context(late("Distilling layers", quiet=quiet)), itertools.count(1)

        def advance() -> None:
            show(next(turns), total)

        for pair in found:
            examples = _examples(stream, pair, flat)
            if workers is None:
                results.learn(pair, examples, advance)
                continue
            task = task_of(pair.part, *results.own(pair), examples, training)
            del examples
            for done in workers.give(task):
                results.take(*done)
                advance()
        for done in workers.rest() if workers else ():
            results.take(*done)
            advance()
    layers = tuple(results.found[pair.part.path] for pair in found)
    return LayerwiseResult(layers, training, len(batches), time.perf_counter() - started, left)


class _Results:
    """Puts what blocks have learned into the student, and keeps count of it."""

    def __init__(self, student: Student, training: Training) -> None:
        self.student, self.training = student, training
        self.found: dict[str, LayerLearned] = {}
        self._kept = student.pacer.pruning.names()  # masks that are learned go by the whole model's loss
        self._gauges = gauges(student.plan, student.store)
        self._log = student.eval_variant().log

    def own(self, pair: BlockPair) -> tuple[list[str], list[str]]:
        """Names of (what is trained, those of them that do not decay)."""
        own = [name for name in pair.part.own if name not in self._kept]
        return own, [name for name in own if name in self._gauges]

    def learn(self, pair: BlockPair, examples: Sequence[Example], advance: Callable[[], None]) -> None:
        """Here, in the student's own memory."""
        own, plain = self.own(pair)
        held = {name: self._parameter(name) for name in own}
        before, after = learn(pair.part.module(own), held, examples, self.training, plain, advance)
        self._note(pair.part.path, held.values(), before, after)

    @torch.no_grad()
    def take(self, path: str, before: float, after: float, tensors: Mapping[str, Tensor]) -> None:
        """What another process has found."""
        for name, tensor in tensors.items():
            self._parameter(name).copy_(tensor)
        self._note(path, tensors.values(), before, after)

    def _note(self, path: str, tensors: Iterable[Tensor], before: float, after: float) -> None:
        self.found[path] = LayerLearned(path, sum(t.numel() for t in tensors), before, after)
        reason = f"{self.training.steps} steps, mean squared error {before:.3g} -> {after:.3g}"
        self._log.append(Entry(stage="layerwise", rule="layerwise.distilled", where=path, reason=reason))

    def _parameter(self, name: str) -> nn.Parameter:
        held = self.student.store.get(name)
        assert isinstance(held, nn.Parameter)
        return held


def _graph_for(student: Student, batch: Any) -> Program:
    """The student's graph without dropout: one that a batch has all inputs for, or one captured for it."""
    arguments = as_arguments(student, batch)
    for program in student.variants.values():
        given = {spec.name.partition(".")[0] for spec in program.contract.inputs}
        if not program.contract.training and given <= set(arguments):
            return program
    structure, _ = flatten(arguments)
    return student.program(False, structure, lambda: arguments)


def _asked(teacher: Teacher, student: Student, program: Program, data: Batches) -> tuple[Program, list[Any]]:
    """(the teacher's graph, its flat inputs)."""
    wanted = program.contract.arguments["items"]
    batches = [{n: v for n, v in as_arguments(student, batch).items() if n in wanted} for batch in data]
    graph = teacher.program(as_arguments(teacher.model, batches[0]))
    return graph, list(flat_batches(graph, Signature.of(teacher.model), batches))


def _examples(stream: Stream, pair: BlockPair, flat: Sequence[Sequence[Tensor]]) -> list[Example]:
    """What a block is given and what it is to give, for each batch."""
    given = _values(stream, pair.given)
    wanted = _values(stream, pair.wanted)
    masks = [None if pair.mask is None else _kept(tensors[pair.mask]) for tensors in flat]
    return [Example(*values) for values in zip(given, wanted, masks, strict=True)]


def _values(stream: Stream, nodes: Sequence[fx.Node]) -> list[tuple[Any, ...]]:
    """Of nodes in graph order, a tuple for each batch; copies of what the teacher writes later on."""
    for node in nodes:
        stream.keep(node)
    columns = [
        [v.clone() if may_be_overwritten(node) and isinstance(v, Tensor) else v for v in stream.values(node)]
        for node in nodes
    ]
    for node in nodes:
        stream.drop(node)
    return list(zip(*columns, strict=True))


def _kept(mask: Tensor) -> Tensor | None:
    kept = mask != 0
    return None if bool(kept.all()) else kept


def _require(holds: bool, what: str, required: str, found: object) -> None:
    if not holds:
        raise DistillationError(f"{what} of layer-by-layer distillation", required=required, found=found)


def training_of(base: Training, **given: Any) -> Training:
    """`base` with what is given and not None. Raises DistillationError for steps, lr or weight_decay that cannot be."""
    found = replace(base, **{name: value for name, value in given.items() if value is not None})
    _require(isinstance(found.steps, int) and found.steps >= 1, "steps", "a whole number, at least 1", found.steps)
    _require(found.lr > 0, "lr", "a learning rate above 0", found.lr)
    _require(found.weight_decay >= 0, "weight_decay", "0 or more", found.weight_decay)
    return found


def random_tokens(
    model: nn.Module, example: Any = None, *, batches: int = 16, vocab_size: int | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """Batches like `example` with tokens drawn evenly from the vocabulary, where there are no data to learn from.

    model: whose config has the vocab_size, unless it is given; example: one batch, made up for transformers models
    Arguments other than input_ids and decoder_input_ids are the example's. Raises DistillationError without tokens.
    """
    arguments = as_arguments(model, example_inputs(model) if example is None else example)
    size = vocab_size or getattr(getattr(model, "config", None), "vocab_size", None)
    tokens = [n for n, v in arguments.items() if n.endswith("input_ids") and isinstance(v, Tensor)]
    _require(batches >= 1, "batches of random tokens", "at least 1", batches)
    _require(bool(tokens), "random tokens", "an example with input_ids", ", ".join(arguments))
    _require(isinstance(size, int) and size > 0, "random tokens", "vocab_size=..., or a model with a config", size)
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor) -> Tensor:
        return torch.randint(0, int(size or 0), like.shape, generator=generator).to(like)

    return [{**arguments, **{name: drawn(arguments[name]) for name in tokens}} for _ in range(batches)]
