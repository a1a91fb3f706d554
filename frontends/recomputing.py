"""Activation checkpointing of a model in training: what the model asked for goes on, and it can be asked for here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..passes.recompute import by_block, marked, recomputing
from ..runtime.contract import Key
from ..runtime.errors import CaptureError
from ..runtime.model import GraphModel
from ..runtime.program import Program


class Recomputing(GraphModel):
    """Where gradients are wanted, what the model itself checkpoints is recomputed in the backward pass.

    That is torch.utils.checkpoint in its forward, or `activation_checkpointing_enable()` before it was prepared.
    """

    _every = 0  # of repeated blocks the n-th is recomputed; 0 for none
    _own = True  # whether the model's own checkpoints are kept
    _recomputed: Mapping[Key, fx.GraphModule] = {}

    NOT_COPIED = (*GraphModel.NOT_COPIED, "_recomputed")  # made with the variants

    def add(self, program: Program) -> None:
        """As for any model; the variant's checkpointed form is made with it."""
        module = self._checkpointed(program)
        super().add(program)
        if module is not None:
            self._recomputed = {**self._recomputed, program.contract.key: module}

    def _checkpointed(self, program: Program) -> fx.GraphModule | None:
        own = recomputing(program, marked) if self._own else None
        return own if own is not None or not self._every else recomputing(program, by_block, self._every)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether anything is recomputed; a model's own checkpoints show from the first call in training on."""
        return bool(self._every or self._recomputed)

    def activation_checkpointing_enable(
        self,
        every_n_layers: int = 1,
        offload: bool = False,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Recompute repeated blocks, where the model does not checkpoint itself; arguments as in transformers.

        activation_checkpointing_kwargs: use_reentrant is taken and not needed, checkpoints are never reentrant.
        Raises CaptureError for a model without numbered blocks, and for what is not served.
        """
        odd = sorted(set(activation_checkpointing_kwargs or {}) - {"use_reentrant"}) + ["offload"] * offload
        if odd or every_n_layers < 1:
            raise CaptureError(
                "a way to checkpoint that a student has not",
                required="every_n_layers of at least 1, no offload, no arguments of torch.utils.checkpoint",
                found=", ".join(odd) or every_n_layers,
            )
        before = self._own, self._every
        self._own, self._every = True, every_n_layers
        found = {key: self._checkpointed(program) for key, program in self.variants.items()}
        if not any(found.values()):
            self._own, self._every = before
            raise CaptureError(
                "nothing to checkpoint",
                required='repeated blocks, with names such as "encoder.layer.3"',
                found="none",
                cure="call torch.utils.checkpoint.checkpoint in the model's forward, and prepare it again",
            )
        self._recomputed = {key: module for key, module in found.items() if module is not None}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """The name that older versions of transformers call."""
        self.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations, whatever the model asked for."""
        self._own, self._every, self._recomputed = False, 0, {}

    def _run(self, program: Program, tensors: Sequence[Tensor]) -> Any:
        module = self._recomputed.get(program.contract.key) if torch.is_grad_enabled() else None
        return (module or program.module)(*tensors)
