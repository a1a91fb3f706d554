"""How far a student is from its teacher, by what both say and by what they hold within.

    logits    T^2 mean_i KL( softmax(t_i / T) || softmax(s_i / T) )
    states    mean_i |s_i - t_i|^2 / D, or mean_i 1 - cos(s_i, t_i)
    scores    mean over heads, queries and the keys that each may see, of (s - t)^2

over all positions i, without those that labels mark with -100 or the attention mask with 0. T^2 keeps the gradient's
size as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2). As a function of s the divergence is DeepSpeed's soft
cross-entropy less a constant; states and scores are those of TinyBERT (Jiao et al. 2020, arXiv 1909.10351, eq. 7, 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..runtime.errors import DistillationError
from .tokens import counted

MASKED = -1e3  # scores below it are masked: models add -1e4, the least number of a dtype, or -inf


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, kept: Tensor | None = None) -> Tensor:
    """Mean over positions of T^2 KL(teacher || student), a scalar, computed in fp32.

    student, teacher: logits (..., C); kept: booleans (...), all where absent. Zero where nothing is kept.
    Raises DistillationError for shapes that differ.
    """
    if student.shape != teacher.shape:
        raise DistillationError(
            "student and teacher do not say the same kind of thing",
            required=f"logits of shape {tuple(student.shape)} from the teacher",
            found=tuple(teacher.shape),
        )
    return _mean(divergences(student, teacher, temperature), kept)


def divergences(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of each position: logits (..., C) to fp32 (...). The teacher's have no gradient."""
    s, t = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher.detach()))
    return F.kl_div(s, t, reduction="none", log_target=True).sum(-1) * temperature**2


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: `output.logits`, or a floating-point tensor that is the whole output."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise DistillationError(
            "the model's output has no logits",
            required="a tensor, or an output with `logits`",
            found=type(output).__name__,
            cure="compute the loss from both outputs with dwindle.passes.distill.divergence",
        )
    return found


def kept_positions(logits: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """Which positions (...) of logits (..., C) count: those with labels, or else those that are not padding."""
    return counted(logits.shape[:-1], batch.get("labels"), batch.get("attention_mask"))


def kept_states(shape: Sequence[int], batch: Mapping[str, Any], decodes: bool = False) -> Tensor | None:
    """Which positions (B, S) of states count: those that are no padding, all where nothing says so.

    decodes: of a decoder beside an encoder, whose mask is one of its own, or labels are
    """
    if not decodes:
        return counted(shape, None, batch.get("attention_mask"))
    masked = counted(shape, None, batch.get("decoder_attention_mask"))
    return counted(shape, batch.get("labels"), None) if masked is None else masked


def states_apart(student: Tensor, teacher: Tensor, loss: str = "mse", kept: Tensor | None = None) -> Tensor:
    """Of states (..., D): the mean square of their difference, or 1 - cosine; over positions `kept` (...)."""
    s, t = student.float(), teacher.detach().float()
    each = 1 - F.cosine_similarity(s, t, dim=-1) if loss == "cosine" else (s - t).square().mean(-1)
    return _mean(each, kept)


def scores_apart(student: Tensor, teacher: Tensor, kept: Tensor | None = None) -> Tensor:
    """Of scores (B, H, queries, keys): the mean square of their difference where the teacher's query may look.

    kept: queries (B, queries) that count. What is masked holds -inf or a number below MASKED.
    """
    s, t = student.float(), teacher.detach().float()
    seen = (t > MASKED) & (s > MASKED)
    if kept is not None:
        seen = seen & kept[:, None, :, None]
    # What is masked is taken out before it is subtracted: -inf less -inf has no gradient.
    return _mean((s.masked_fill(~seen, 0) - t.masked_fill(~seen, 0)).square(), seen)


def _mean(each: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return each.mean()
    return (each * kept).sum() / kept.sum().clamp_min(1)


def task_loss(output: Any) -> Tensor | None:
    """The loss that a model computed itself, from labels."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None
