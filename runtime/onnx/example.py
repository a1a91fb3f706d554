"""Inputs that fit a contract, for tracing and for checking where the caller gives none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Contract, Input
from ..program import Program

# Two sizes of every free dimension; unequal primes, so that no two dimensions agree by accident.
SIZES = ((2, 7, 5, 11), (3, 13, 4, 17))


def batches(program: Program) -> list[list[Tensor]]:
    """Two flat batches of different shapes: random numbers, indices within their tables, masks with padding."""
    contract = program.contract
    bounds = _bounds(program)
    generator = torch.Generator().manual_seed(0)
    made = []
    for choice in SIZES:
        sizes = _sizes(contract, choice)
        made.append([_tensor(i, sizes, bounds.get(i.name), generator) for i in contract.inputs])
    return made


def smaller(contract: Contract, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The first part of a batch: every free dimension halved, as far as its limit allows."""
    cut = []
    for spec, tensor in zip(contract.inputs, tensors, strict=True):
        for dim, name in enumerate(spec.shape):
            if isinstance(name, str):
                low = max(1, contract.limits.get(name, (1, None))[0])
                tensor = tensor.narrow(dim, 0, max(low, (tensor.shape[dim] + 1) // 2))
        cut.append(tensor)
    return cut


def _sizes(contract: Contract, choice: tuple[int, ...]) -> dict[str, int]:
    names = list(dict.fromkeys(s for i in contract.inputs for s in i.shape if isinstance(s, str)))
    sizes = {}
    for place, name in enumerate(names):
        low, high = contract.limits.get(name, (1, None))
        size = max(low, choice[place % len(choice)])
        sizes[name] = size if high is None else min(size, high)
    return sizes


def _tensor(spec: Input, sizes: dict[str, int], bound: int | None, generator: torch.Generator) -> Tensor:
    shape = [sizes[s] if isinstance(s, str) else s for s in spec.shape]
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    if bound is None:
        return _mask(shape).to(dtype)
    return torch.randint(0, bound, shape, generator=generator).to(dtype)


def _mask(shape: list[int]) -> Tensor:
    """Ones, but for the second half of every other row: what hides a place is run, and no row is without one."""
    made = torch.ones(shape)
    if len(shape) > 1:
        first = 0 if shape[0] == 1 else 1
        made[first::2, ..., (shape[-1] + 1) // 2 :] = 0
    return made


def _bounds(program: Program) -> dict[str, int]:
    """Rows of the table that an input indexes, for inputs that go straight to a lookup."""
    bounds: dict[str, int] = {}
    tables = {torch.ops.aten.embedding.default: (1, 0), torch.ops.dwindle.qembedding.default: (0, 1)}
    for spec, node in zip(program.contract.inputs, program.graph.nodes, strict=False):
        for user in node.users:
            if user.target in tables:
                index, table = tables[user.target]
                if user.args[index] is node:
                    bounds[spec.name] = user.args[table].meta["val"].shape[0]
    return bounds
