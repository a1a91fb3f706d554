"""Whether a graph captured at larger sizes serves a size of 1 as well.

Export assumes that a free dimension is at least 2 and may take the branch that a model has for 1 (or for more)
as settled. So each is tried: the model and its graph, both cut to 1, must agree; else the limit stays at 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.verify import difference
from ..runtime.contract import Contract
from ..runtime.errors import CaptureError
from ..runtime.model import flat_outputs
from ..runtime.own_state import own_state
from ..runtime.program import Program, is_random
from ..runtime.store import Store
from ..runtime.structure import flatten, rebuild

ASSUMED = 2

# Another kernel may serve one row (a matrix times a vector): measured at most 2e-6 on the tiny models of the tests.
LIMIT = 1e-3


def proved(model: nn.Module, program: Program, tensors: Sequence[Tensor]) -> Contract:
    """The program's contract with each dimension's least size: as export found it where 1 agrees, else 2.

    tensors: flat inputs of the program. A training variant is taken at its word: running it would draw random
    numbers and write statistics.
    """
    contract = program.contract
    if contract.training:
        return contract
    _require_alike(model, program, tensors)
    limits = dict(contract.limits)
    for name, (low, high) in contract.limits.items():
        if low < ASSUMED and not _agree(model, program, _cut(contract, tensors, name)):
            limits[name] = (ASSUMED, high)
    return replace(contract, limits=limits)


def _require_alike(model: nn.Module, program: Program, tensors: Sequence[Tensor]) -> None:
    """Raise CaptureError where the graph, on the example itself, is not the model: then nothing built on it is."""
    if any(is_random(node) for node in program.graph.nodes) or _agree(model, program, tensors):
        return
    raise CaptureError(
        f"the graph captured from {type(model).__name__} does not compute what the model does",
        required=f"outputs within {LIMIT} of the model's on the example inputs",
        found="other ones",
        cure="capture a submodule without side effects, or report this with the model's config",
    )


def _cut(contract: Contract, tensors: Sequence[Tensor], name: str) -> list[Tensor]:
    """The inputs with dimension `name` cut to 1."""
    cut = list(tensors)
    for i, spec in enumerate(contract.inputs):
        for dim, label in enumerate(spec.shape):
            if label == name:
                cut[i] = cut[i].narrow(dim, 0, 1)
    return cut


def _agree(model: nn.Module, program: Program, tensors: Sequence[Tensor]) -> bool:
    arguments = rebuild(program.contract.arguments, [t.clone() for t in tensors])
    try:
        with torch.no_grad(), own_state():
            torch.manual_seed(0)  # a model may draw noise in eval mode too
            expected = flat_outputs(flatten(eager(model, arguments, program.store, program.written()))[1])
            torch.manual_seed(0)
            with program.unwritten():
                found = flat_outputs(program.run([t.clone() for t in tensors]))
    except Exception:  # the model has no such size, or the graph has not; then there is nothing to serve
        return False
    same = len(expected) == len(found) and all(a.shape == b.shape for a, b in zip(expected, found, strict=True))
    return same and difference(expected, found).relative <= LIMIT


def eager(model: nn.Module, arguments: Mapping[str, Any], store: Store, written: Sequence[str] = ()) -> Any:
    """Call the model with the tensors of `store` (a student's are not the model's); those it writes are clones."""
    named = [*model.named_parameters(), *model.named_buffers()]
    held = {name: value for name, _ in named if isinstance(value := store.get(name), Tensor)}
    kept = {name for name, value in held.items() if isinstance(value, nn.Parameter) and name not in written}
    state = {name: value if name in kept else value.detach().clone() for name, value in held.items()}
    return torch.func.functional_call(model, state, (), dict(arguments))
