"""Where a graph multiplies by, convolves with or looks up a stored weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from operator import getitem

import torch
from torch import Tensor, fx

from ...runtime import compat
from ...runtime.program import Entry, Program, value_of
from ...runtime.store import Store
from ..depth import PRODUCTS

aten = torch.ops.aten


# On the product of a stored weight and a mask: what reads it reads the weight.
MASKED = "dwindle_masked"


@dataclass(frozen=True)
class Site:
    """One call that reads one stored weight.

    fqn: the weight's stored name; transposed: the call reads it as `w.t()` (GPT-2's Conv1D keeps (K, N))
    weight: the node that gives the weight as the call takes it; path: module the call came from
    name: the weight's own name in that module, where it has several
    call: which of the calls that read it under that name, in graph order; variants with other numbers of calls are
        refused where it matters (`calibrate.require_calls`)
    """

    node: fx.Node
    operator: str
    fqn: str
    weight: fx.Node
    transposed: bool
    path: str
    name: str
    call: int = 0

    @property
    def activation(self) -> fx.Node | None:
        """The floating-point operand that meets the weight; an embedding has none."""
        first = self.node.args[0]
        return first if self.operator != "embedding" and isinstance(first, fx.Node) else None


@dataclass(frozen=True, kw_only=True)
class Use:
    """A read of a stored weight as deciding sees it: a call in a graph, or a module of which there is no graph.

    label: what the reader is called; groups: of a convolution; batched: its input has a batch dimension
    answers: what it gives is an output of the model, see `answers`
    """

    operator: str
    fqn: str
    label: str
    transposed: bool = False
    groups: int = 1
    batched: bool = True
    answers: bool = False


@dataclass(frozen=True)
class Reading:
    """All uses of a model's weights in order, and by a weight's name the readers that no operator stands for."""

    store: Store
    uses: tuple[Use, ...]
    others: Callable[[str], list[str]]
    log: list[Entry]


# Operator, the ATen call, and which argument is the weight.
_CALLS = (
    ("linear", aten.linear.default, 1),
    ("embedding", aten.embedding.default, 0),
    ("conv1d", aten.conv1d.default, 1),
    ("conv2d", aten.conv2d.default, 1),
)


def find_sites(program: Program) -> list[Site]:
    """All sites, in graph order."""
    sites = [site for node in program.graph.nodes if (site := _site(program, node)) is not None]
    calls: dict[str, Iterator[int]] = defaultdict(count)
    return [s if s.activation is None else replace(s, call=next(calls[s.name])) for s in sites]


def readers(program: Program, fqn: str) -> Iterator[fx.Node]:
    """Every call that reads the stored tensor `fqn`, past masks and a transposition."""
    for node in program.graph.nodes:
        if program.tensor_of(node) == fqn:
            yield from _readers(node)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if _is_transpose(user) or (MASKED in user.meta and user.args[0] is node):
            yield from _readers(user)
        else:
            yield user


def reading(program: Program) -> Reading:
    """The graph's sites as uses."""
    sites = find_sites(program)
    known = {site.node for site in sites}

    def others(fqn: str) -> list[str]:
        return [node.name for node in readers(program, fqn) if node not in known]

    return Reading(program.store, tuple(map(_use, sites)), others, program.log)


def _use(site: Site) -> Use:
    conv = site.operator.startswith("conv")
    groups = site.node.args[6] if conv and len(site.node.args) > 6 else 1
    assert isinstance(groups, int)
    spatial = 3 if site.operator == "conv1d" else 4
    return Use(
        operator=site.operator,
        fqn=site.fqn,
        label=site.node.name,
        transposed=site.transposed,
        groups=groups,
        batched=not conv or site.activation is None or value_of(site.activation).dim() == spatial,
        answers=answers(site.node),
    )


# What a result may pass on its way out and still be the model's answer: another shape or dtype, or probabilities.
_PASSES = frozenset(
    {
        *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.squeeze.dim, aten.squeeze.default),
        *(aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.split.Tensor),
        *(aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.clone.default, getitem),
        *(aten.to.dtype, aten._to_copy.default, aten.softmax.int, aten.log_softmax.int, aten.sigmoid.default),
    }
)
_SCALES = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


def answers(node: fx.Node) -> bool:
    """Whether what `node` gives is an output of the model, and goes into no further product.

    So a classifier and a language model's head, with a loss behind them or not; no pooler (tanh), no last block
    (norm), and no value that is both cached and attended to.
    """
    return _comes_out(node) and not _feeds_product(node)


def _comes_out(node: fx.Node) -> bool:
    for user in node.users:
        scaled = user.target in _SCALES and user.all_input_nodes == [node]
        if user.op == "output" or ((user.target in _PASSES or scaled) and _comes_out(user)):
            return True
    return False


def _feeds_product(node: fx.Node) -> bool:
    seen, ahead = {node}, [node]
    while ahead:
        fresh = [user for user in ahead.pop().users if user not in seen]
        if any(user.target in PRODUCTS for user in fresh):
            return True
        seen.update(fresh)
        ahead += fresh
    return False


def _site(program: Program, node: fx.Node) -> Site | None:
    for operator, target, position in _CALLS:
        if node.op == "call_function" and node.target is target:
            weight = node.args[position]
            if not isinstance(weight, fx.Node):
                return None
            transposed = _is_transpose(weight)
            source = weight.args[0] if transposed else weight
            while isinstance(source, fx.Node) and MASKED in source.meta:
                source = source.args[0]
            fqn = program.tensor_of(source)
            if fqn is None or not isinstance(program.store.get(fqn), torch.nn.Parameter):
                return None
            path = compat.module_path(node)
            own = (name for name in program.store.names_of(fqn) if name.rpartition(".")[0] == path)
            return Site(node, operator, fqn, weight, transposed, path, next(own, fqn))
    return None


def _is_transpose(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (aten.t.default, aten.numpy_T.default)


def matrix(program: Program, site: Site) -> Tensor:
    """A linear layer's weight as (N, K)."""
    weight = program.store.get(site.fqn)
    assert isinstance(weight, Tensor)
    return weight.detach().t() if site.transposed else weight.detach()
