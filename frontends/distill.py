"""The loss of a student with a teacher: its task's own, and the divergence of its logits from the teacher's.

    loss = task + weight T^2 mean_i KL( softmax(t_i / T) || softmax(s_i / T) )

over all positions i of logits s, t (..., C), without those that labels mark with -100 or the attention mask with 0.
T^2 keeps the gradient's size as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2). As a function of s the
divergence is DeepSpeed's soft cross-entropy less a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..runtime.errors import DistillationError
from .modes import evaluating

IGNORED = -100  # of labels, as torch's cross_entropy has it


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
    s, t = (F.log_softmax(x.float() / temperature, -1) for x in (student, teacher.detach()))
    each = F.kl_div(s, t, reduction="none", log_target=True).sum(-1) * temperature**2  # (...)
    if kept is None:
        return each.mean()
    return (each * kept).sum() / kept.sum().clamp_min(1)


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
            cure="compute the loss from both outputs with dwindle.frontends.distill.divergence",
        )
    return found


def kept_positions(logits: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """Which positions (...) of logits (..., C) count: those with labels, or else those that are not padding."""
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1] and not labels.is_floating_point():
        return labels != IGNORED
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        return mask != 0
    return None


def taught(teacher: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The teacher's logits, in eval mode and without gradients; it is left in the mode it was in."""
    with evaluating(teacher):
        return logits_of(teacher(**batch))


def task_loss(output: Any) -> Tensor | None:
    """The loss that a model computed itself, from labels."""
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else None


def total_loss(
    output: Any, batch: Mapping[str, Any], teacher: nn.Module | None, *, weight: float, temperature: float
) -> Tensor:
    """The student's loss for its `output` on `batch`. Raises DistillationError where there is none."""
    own = task_loss(output)
    if teacher is None or weight == 0:
        if own is None:
            raise DistillationError(
                "the batch gives no loss",
                required="labels in the batch of a model that computes its loss, or a teacher",
                found=", ".join(batch) or "an empty batch",
            )
        return own
    logits = logits_of(output)
    apart = divergence(logits, taught(teacher, batch), temperature, kept_positions(logits, batch))
    return weight * apart if own is None else own + weight * apart
