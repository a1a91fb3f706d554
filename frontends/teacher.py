"""A teacher: a model that is asked, and not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..passes.canonicalize import canonicalize
from ..passes.taps import Tap
from ..runtime.contract import Signature
from ..runtime.errors import DistillationError
from ..runtime.model import GraphModel
from ..runtime.plan import Plan
from ..runtime.program import Program
from ..runtime.store import Store
from ..runtime.structure import flatten
from .capture import DynamicShapes, capture
from .modes import evaluating
from .tapping import Tapping


class Teacher:
    """A model that is only asked: in eval mode, without gradients, once for a batch. It is not copied or changed.

    It may be a student or a compressed model: then its graphs are the ones that are looked into.
    """

    def __init__(self, model: nn.Module, dynamic_shapes: DynamicShapes | None = None) -> None:
        self.model = model
        self._shapes = dynamic_shapes
        self._graphs: Tapping | None = None
        self._device: torch.device | None = None

    def ask(self, batch: Mapping[str, Any], taps: Sequence[Tap] = ()) -> tuple[Any, list[Tensor]]:
        """Its output, and what its taps give. Raises DistillationError where it cannot take the batch."""
        with evaluating(self.model):
            try:
                if not taps:
                    return self.model(**batch), []
                graphs = self._as_graphs()
                with graphs.tapping(taps) as seen:
                    return graphs(**batch), seen
            except torch.OutOfMemoryError:
                raise
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                raise DistillationError(
                    "the teacher cannot be asked what the student is asked",
                    required="a model of the same arguments, the same vocabulary and the same labels",
                    found=f"{type(self.model).__name__}: {error}",
                ) from error

    def program(self, batch: Mapping[str, Any]) -> Program:
        """Its graph for such a batch, which is not run."""
        structure, _ = flatten(dict(batch))
        with evaluating(self.model):
            return self._as_graphs().program(False, structure, lambda: batch)

    def _as_graphs(self) -> Tapping:
        """On the tensors of the model as they are now."""
        model, shapes = self.model, self._shapes
        device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
        if self._graphs is None or device != self._device:
            store, plan = (model.store, model.plan) if isinstance(model, GraphModel) else (Store.of(model), Plan())

            def grow(_: GraphModel, training: bool, call: Mapping[str, Any]) -> Program:
                if isinstance(model, GraphModel):
                    return model.program(training, flatten(dict(call))[0], lambda: call)
                captured = canonicalize(capture(model, call, store, training=training, dynamic_shapes=shapes))
                captured.tidy()
                return captured

            self._graphs = Tapping(store, plan, Signature.of(model), grow=grow).eval()
            self._device = device
        return self._graphs


def require_vocabulary(student: object, teacher: object) -> None:
    """Raise DistillationError where both say how large their vocabulary is, and it is not the same."""
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (student, teacher)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise DistillationError(
            "student and teacher read different vocabularies",
            required=f"a teacher of {sizes[0]} tokens",
            found=sizes[1],
            cure="one tokenizer for both; resize_token_embeddings where one is only padded",
        )
