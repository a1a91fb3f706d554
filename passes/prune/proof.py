"""masked == sliced: the proof that a cut is right.

Both forms of a graph are run on the same random numbers in float64, parameters and buffers randomised as well: a
fresh model's zeros and ones hide errors. Dropout is off, and every cast to a smaller type is one to float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...runtime.model import flat_outputs
from ...runtime.ops.require import unchecked
from ...runtime.program import Program, is_float, value_of
from ...runtime.store import Store
from ..match import full_args
from .axes import Atom
from .keep import Kept
from .masked import Masks, masked
from .sliced import sliced
from .walk import Walk

aten = torch.ops.aten

# In float64 exact cuts were 1e-16 to 1e-13 on 180 architectures, and wrong rules 1e-2 to 7.
LIMIT = 1e-6
MASK = "mask_of"


def proven(walk: Walk, of: Kept, batches: Sequence[Sequence[Tensor]], seed: int = 0) -> float:
    """The largest difference between the masked and the sliced graph, relative to the output's scale."""
    program = walk.program.copy(randomised(walk.program.store, seed))
    in_double(program)
    full, cut = program.copy(program.store.fork()), program.copy(program.store.fork())
    leaf_numbers = {leaf: i for i, leaf in enumerate(of)}
    for leaf, mask in of.items():
        full.store.put(f"{MASK}_{leaf_numbers[leaf]}", mask.double(), persistent=False)

    def mask_node(leaf: Atom, before: fx.Node) -> fx.Node:
        return full.get_attr(f"{MASK}_{leaf_numbers[leaf]}", before)

    masked(walk.on(full), Masks(full, of, mask_node))
    sliced(cut, walk.on(cut), of)
    return max(_apart(full, cut, batch, seed) for batch in batches)


def _apart(full: Program, cut: Program, batch: Sequence[Tensor], seed: int) -> float:
    found = []
    inputs = [t.double() if t.is_floating_point() else t for t in batch]
    for program in (full, cut):
        with torch.no_grad(), torch.random.fork_rng(devices=[]), program.unwritten(), _new_tensors_in_double():
            torch.manual_seed(seed)
            try:
                with unchecked():
                    outputs = program.run([t.clone() for t in inputs])
            except (RuntimeError, IndexError):
                if program is full:
                    raise
                return float("inf")  # shapes that no longer fit: what was cut was not all
            found.append([t.clone() for t in flat_outputs(outputs)])
    worst = 0.0
    for a, b in zip(*found, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
        elif a.numel():
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()):
                return float("inf")
            scale = float(a[finite].abs().max()) if finite.any() else 1.0
            apart = float((a[finite] - b[finite]).abs().max()) if finite.any() else 0.0
            worst = max(worst, apart / max(scale, 1e-30))
    return worst


@contextmanager
def _new_tensors_in_double() -> Iterator[None]:
    """torch.zeros(n) and the like, which name no dtype, meet tensors in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def randomised(store: Store, seed: int) -> Store:
    """A store of its own with random float64 tensors near those there; buffers keep their sign."""
    other, generator = store.fork(), torch.Generator().manual_seed(seed)
    for name, value in list(other.entries()):
        if not isinstance(value, Tensor):
            continue
        if not (value.is_floating_point() or (value.is_complex() and isinstance(value, nn.Parameter))):
            copied = value.detach().to(torch.complex128) if value.is_complex() else value.clone()
            other.put(name, copied, persistent=other.is_persistent(name))
            continue
        wide = value.detach().to(torch.complex128 if value.is_complex() else torch.float64)
        if isinstance(value, nn.Parameter):
            fan = max(1, wide.numel() // max(1, wide.shape[0])) if wide.dim() > 1 else 10
            noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype) * (0.5 * fan**-0.5)
            other.put(name, nn.Parameter(wide + noise, requires_grad=value.requires_grad))
        else:
            factor = 0.75 + 0.5 * torch.rand(wide.shape, generator=generator, dtype=torch.float64)
            noise = 0.1 * torch.rand(wide.shape, generator=generator, dtype=torch.float64)
            other.put(name, wide * factor + noise, persistent=other.is_persistent(name))
    return other


_WIDER = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float64)
_WIDER |= dict.fromkeys((torch.complex32, torch.complex64), torch.complex128)


_DROPOUT = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)


def draws(program: Program) -> bool:
    """Whether a graph has random numbers besides dropout: there may be fewer of them once it is cut."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"} - {
        *_DROPOUT,
        aten.scaled_dot_product_attention.default,
    }
    return any(torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()) for target in targets)


def in_double(program: Program) -> None:
    """Casts and new tensors are float64, dropout is off; recorded values are taken out."""
    for node in program.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _widened)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _widened)
        if _creates(node):
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
        if node.target in _DROPOUT:
            node.args = (node.args[0], 0.0, False)
        if node.target is aten.scaled_dot_product_attention.default and len(node.args) > 4:
            node.args = (*node.args[:4], 0.0, *node.args[5:])
        if node.target is aten.rms_norm.default and full_args(node)[3] is None:  # it goes by the dtype
            node.args = (*full_args(node)[:3], torch.finfo(value_of(node).dtype).eps)
    program.module.recompile()


def _creates(node: fx.Node) -> bool:
    """A new tensor of torch's default dtype."""
    takes = {a.name for a in node.target._schema.arguments} if isinstance(node.target, torch._ops.OpOverload) else ()
    if "dtype" not in takes or "self" in takes or node.kwargs.get("dtype") is not None:
        return False
    return is_float(node)


def _widened(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
