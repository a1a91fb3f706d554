"""What tests of transfer rules share: a small model around a call, what is found in it, and the rule made wrong.

A rule is right where the groups are those that were asked for and masked equals sliced. That this says something is
shown by its mutants, one for each thing that a rule does. Whatever a mutant changes in the analysis, the proof has to
find:

    untied      nothing is known of the result: its axes are new ones
    loose       no axis is tied to another
    unfrozen    nothing is frozen
    endless     the call sums over nothing
    sizeless    no number in the call goes by an axis
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pruning import groups_of, random_cut, walked
from torch import Tensor, fx, nn

from dwindle.passes.prune.axes import Atom
from dwindle.passes.prune.groups import Group, find_groups
from dwindle.passes.prune.keep import is_cut
from dwindle.passes.prune.masked import operand
from dwindle.passes.prune.proof import LIMIT, proven
from dwindle.passes.prune.transfer import rule_of
from dwindle.passes.prune.walk import Rule, Walk

ROWS, SEQUENCE, IMAGE = (4, 6), (4, 5, 6), (2, 3, 8, 8)
THROUGH = "rows 12: a.weight[0] a.bias[0] b.weight[1]"
CHANNELS = "channels 12: a.weight[0] a.bias[0] b.weight[1]"

Parts = Mapping[str, Callable[[], Any]]


class Around(nn.Module):
    """A model of a function and the modules or parameters that it uses."""

    def __init__(self, function: Callable[..., Tensor], parts: Parts) -> None:
        super().__init__()
        self.function = function
        for name, make in parts.items():
            setattr(self, name, make())

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


@dataclass(frozen=True)
class Case:
    """A model with the calls `ops`, and what is found in it.

    groups: what may be pruned, as "kind size: cuts"; stays: for a stored axis, why it may not be
    ratio: of each group that is cut; harmless: mutants that change nothing that is computed
    """

    ops: tuple[str, ...]
    function: Callable[..., Tensor]
    parts: Parts
    shape: tuple[int, ...]
    groups: tuple[str, ...] = ()
    stays: Mapping[str, str] = field(default_factory=dict)
    ratio: float = 0.4
    harmless: str = ""

    def walk(self) -> tuple[Walk, list[Tensor]]:
        torch.manual_seed(0)
        model = Around(self.function, self.parts).eval()
        return walked(model, torch.randn(self.shape))


def rows(
    ops: str,
    op: Callable[[Any, Tensor], Tensor],
    width: int = 12,
    shape: tuple[int, ...] = ROWS,
    groups: Sequence[str] = (THROUGH,),
    stays: Mapping[str, str] | None = None,
    ratio: float = 0.4,
    harmless: str = "",
    **parts: Callable[[], Any],
) -> Case:
    """A call between two linear layers; the second one reads `width` numbers."""
    both = {"a": lambda: nn.Linear(6, 12), "b": lambda: nn.Linear(width, 3)} | parts

    def function(m: Any, x: Tensor) -> Tensor:
        return m.b(op(m, m.a(x)))

    return Case(tuple(ops.split()), function, both, shape, tuple(groups), stays or {}, ratio, harmless)


def image(
    ops: str,
    op: Callable[[Any, Tensor], Tensor],
    width: int = 12,
    groups: Sequence[str] = (CHANNELS,),
    stays: Mapping[str, str] | None = None,
    ratio: float = 0.4,
    harmless: str = "",
    **parts: Callable[[], Any],
) -> Case:
    """A call between two convolutions, and a mean over space."""
    both = {"a": lambda: nn.Conv2d(3, 12, 3, padding=1), "b": lambda: nn.Conv2d(width, 4, 1)} | parts

    def function(m: Any, x: Tensor) -> Tensor:
        return m.b(op(m, m.a(x))).mean((2, 3))

    return Case(tuple(ops.split()), function, both, IMAGE, tuple(groups), stays or {}, ratio, harmless)


def w(*shape: int) -> Callable[[], nn.Parameter]:
    """A parameter, made when the model is."""
    return lambda: nn.Parameter(torch.randn(shape))


def name_of(node: fx.Node) -> str:
    """As `TRANSFER` has it: "sum.dim_IntList", "linear", "getitem"."""
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).partition(".")[2].removesuffix(".default")


def called(walk: Walk) -> set[str]:
    """The names of all calls of a program."""
    return {name_of(node) for node in walk.program.graph.nodes if node.op == "call_function"}


def told(group: Group) -> str:
    """A group as cases write it."""
    cuts = (f"{c.name}[{c.dim}]" + (f"/{c.times}" if c.times > 1 else "") for c in group.cuts)
    return f"{group.kind} {group.size}: " + " ".join(sorted(cuts))


def sorted_cuts(text: str) -> str:
    """The same group with its cuts in order."""
    kind, _, cuts = text.partition(": ")
    return f"{kind}: " + " ".join(sorted(cuts.split()))


def check(case: Case) -> None:
    """The groups, the reasons, masked equals sliced, and every mutant found."""
    walk, batch = case.walk()
    assert set(case.ops) <= called(walk), sorted(called(walk))
    found = groups_of(walk)
    texts = sorted(map(told, found))
    assert texts == sorted(map(sorted_cuts, case.groups)), texts
    reasons = {f"{cut.name}[{cut.dim}]": group.reason for group in find_groups(walk) for cut in group.cuts}
    for axis, reason in case.stays.items():
        assert reason in reasons[axis], (axis, reasons[axis])
    cut = random_cut(found, case.ratio)
    if cut:
        assert proven(walk, cut, [batch]) < 1e-12
    mutants = {name: wrong for name in MUTANTS if (wrong := mutated(case, walk, cut, name)) is not None}
    assert mutants, "nothing in the rule can be made wrong"
    for name, wrong in mutants.items():
        errors = (proven(wrong, uneven_cut(groups_of(wrong), seed), [batch], seed) for seed in range(SEEDS))
        assert any(error > 100 * LIMIT for error in errors) != (name in case.harmless), name


def uneven_cut(groups: Sequence[Group], seed: int) -> dict[Atom, Tensor]:
    """Of each group one index stays, or half of them, or all but one."""
    draw = random.Random(seed)
    cuts = [random_cut([group], draw.choice((0.99, 0.5, 1 / group.size)), seed + i) for i, group in enumerate(groups)]
    return {leaf: mask for cut in cuts for leaf, mask in cut.items()}


def mutated(case: Case, walk: Walk, cut: dict[Atom, Tensor], name: str) -> Walk | None:
    """The analysis with the rules of `case.ops` made wrong; None where it is the same one."""
    if name in ("endless", "sizeless"):
        ended = [e for e in walk.endings if name_of(e.node) in case.ops and is_cut(walk[operand(e)][e.dim], cut)]
        numbers = [n for n in walk.sizes if name_of(n.node) in case.ops and is_cut(n.axis, cut)]
        if name == "endless":
            return replace(walk, endings=[e for e in walk.endings if e not in ended]) if ended else None
        return replace(walk, sizes=[n for n in walk.sizes if n not in numbers]) if numbers else None
    wrong = Walk.over(walk.program, lambda node: wronged(node, name) if name_of(node) in case.ops else rule_of(node))
    found = groups_of(wrong)
    return None if sorted(map(told, found)) == sorted(map(told, groups_of(walk))) else wrong


SEEDS = 8  # some errors show at few indices alone
MUTANTS = ("untied", "loose", "unfrozen", "endless", "sizeless")


def wronged(node: fx.Node, name: str) -> Rule | None:
    """The rule of a call without what `name` says."""
    own = rule_of(node)
    if own is None:
        return None

    def rule(walk: Walk, node: fx.Node, args: Sequence[Any]) -> Any:
        with without(walk, name):
            made = own(walk, node, args)
        return walk.fresh(walk.values[node], None) if name == "untied" else made

    return rule


@contextmanager
def without(walk: Walk, name: str) -> Iterator[None]:
    """A space that does not tie, or does not freeze."""
    space, axis = walk.space, walk.space.axis
    if name == "loose":
        space.tie = lambda a, b: None  # type: ignore[method-assign]  # of this one object
    if name == "unfrozen":
        space.freeze = lambda axis, reason: None  # type: ignore[method-assign]  # as above
        space.axis = lambda size, reason=None: axis(size)  # type: ignore[method-assign]  # as above
    try:
        yield
    finally:
        for method in ("tie", "freeze", "axis"):
            vars(space).pop(method, None)
