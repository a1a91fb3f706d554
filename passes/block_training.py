"""Training one block to give what another gave (ZeroQuant's layer-by-layer distillation).

    theta* = argmin sum_i MSE( block(x_i; theta), y_i )          x_i, y_i: activations of the teacher

Yao et al. 2022, arXiv 2206.01861, section 4.2. AdamW begins anew with each block, at a constant learning rate, and
decays no biases and norms. The mean is over the positions that count, in fp32. Parameters of 16 bits are trained on
copies in fp32: at such learning rates a step is less than their last bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.errors import DistillationError

Call = Callable[..., Sequence[Tensor]]

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a block is trained. weight_decay: AdamW's, of weights alone; seed: of the order of examples"""

    steps: int = 100
    lr: float = 5e-6
    weight_decay: float = 0.01
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """One batch. given: the block's inputs; wanted: what it is to give, (B, T, ...) each; kept: bool (B, T)"""

    given: tuple[Any, ...]
    wanted: tuple[Tensor, ...]
    kept: Tensor | None = None


def missed(block: Call, example: Example) -> Tensor:
    """The mean squared error of a block on one batch, a scalar in fp32; of several outputs the sum of theirs."""
    total: Tensor | None = None
    for y, t in zip(block(*example.given), example.wanted, strict=True):
        fits = example.kept is not None and example.kept.shape == t.shape[:2]
        y, t = (y[example.kept], t[example.kept]) if fits else (y, t)
        loss = F.mse_loss(y.float(), t.float(), reduction="sum") / max(t.numel(), 1)  # a batch may be all padding
        total = loss if total is None else total + loss
    assert total is not None
    return total


def mean_missed(block: Call, examples: Sequence[Example]) -> float:
    """Over batches, each counting alike."""
    with torch.no_grad():
        return sum(float(missed(block, example)) for example in examples) / len(examples)


def learn(
    block: Call,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[Example],
    training: Training,
    plain: Sequence[str] = (),
    advance: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Train `parameters`, which `block` reads, in place: (mean error before, after). Their gradients stay as they were.

    plain: names of those without decay besides biases and norms; advance: called after each step
    Raises DistillationError where the error is no number; they are then as they were.
    """
    before = _finite(mean_missed(block, examples), "before the first step")
    with _put_back(list(parameters.values())):
        _train(block, parameters, examples, training, plain, advance)
        return before, _finite(mean_missed(block, examples), f"after {training.steps} steps")


@contextlib.contextmanager
@torch.no_grad()
def _put_back(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """What fails within leaves them as they were."""
    copies = [p.detach().clone() for p in parameters]
    try:
        yield
    except BaseException:
        for p, copy in zip(parameters, copies, strict=True):
            p.copy_(copy)
        raise


def _train(
    block: Call,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[Example],
    training: Training,
    plain: Sequence[str],
    advance: Callable[[], None],
) -> None:
    held = list(parameters.values())
    # Of those that are wide enough the very same memory.
    masters = [p.detach().float() if p.dtype in _NARROW else p.detach() for p in held]
    decayed = [p.dim() > 1 and name not in plain for name, p in parameters.items()]
    groups = [
        {"params": [m for m, d in zip(masters, decayed, strict=True) if d is wanted], "weight_decay": decay}
        for wanted, decay in ((True, training.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=training.lr)
    for example in _in_turn(examples, training):
        with torch.enable_grad():
            found = torch.autograd.grad(missed(block, example), held, allow_unused=True)
        for master, gradient in zip(masters, found, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(held, masters, strict=True):
                if p.dtype in _NARROW:
                    p.copy_(master)
        advance()


def _in_turn(examples: Sequence[Example], training: Training) -> Iterator[Example]:
    """`steps` of them, all of them once in a drawn order, then in another."""
    generator = torch.Generator().manual_seed(training.seed)
    order: list[int] = []
    for _ in range(training.steps):
        order = order or torch.randperm(len(examples), generator=generator).tolist()
        yield examples[order.pop()]


def _finite(error: float, when: str) -> float:
    if not math.isfinite(error):
        raise DistillationError(
            f"the error of a block is {error} {when}",
            required="finite activations of the teacher, and a learning rate that they bear",
            found=error,
            cure="lower lr; where it is so before the first step, check the data",
        )
    return error
