"""Scores that go by gradients of data: the mean gradient for taylor, its square for fisher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.runtime.errors import DwindleError


class Regression(nn.Module):
    """{"loss", "logits"} of (N, 6) and labels (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.down(F.relu(self.up(x)))
        return {"logits": y} if labels is None else {"loss": F.mse_loss(y, labels), "logits": y}


def batches() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(5, 6, generator=g), "labels": torch.randn(5, 3, generator=g)} for _ in range(3)]


@pytest.mark.parametrize("score", ["taylor", "fisher"])
def test_the_least_by_gradients_go(score: str) -> None:
    torch.manual_seed(0)
    model, data = Regression(), batches()
    small = dwindle.compress(model, {"prune": {"ratio": 0.5, "score": score}}, inputs=data[0], data=iter(data))
    parameters = dict(model.named_parameters())
    assert all(p.grad is None for p in parameters.values())
    each = [
        dict(zip(parameters, torch.autograd.grad(model(**b)["loss"], parameters.values()), strict=True)) for b in data
    ]
    worth = torch.zeros(16, dtype=torch.float64)
    for name, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
        w = parameters[name].detach().double()
        g = torch.stack([gradients[name].double() for gradients in each])
        product = w * g.mean(0) if score == "taylor" else w.square() * g.square().mean(0)
        worth += product.movedim(dim, 0).reshape(16, -1).sum(1)
    expected = sorted(worth.abs().argsort()[:8].tolist())
    (cut,) = [s for s in small.plan.slices if s.fqn == "up.weight"]
    assert sorted(cut.removed) == expected
    torch.testing.assert_close(small(**data[0])["loss"], _without(model, expected, data[0]), rtol=1e-5, atol=1e-6)


def _without(model: nn.Module, cut: list[int], batch: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        model.down.weight[:, cut] = 0
        return model(**batch)["loss"]


def test_without_data_or_a_loss_they_are_refused() -> None:
    recipe, data = {"prune": {"ratio": 0.5, "score": "taylor"}}, batches()
    with pytest.raises(DwindleError, match="prunes by score taylor"):
        dwindle.compress(Regression(), recipe, inputs=data[0])
    bare = [{"x": batch["x"]} for batch in data]
    with pytest.raises(DwindleError, match="goes by a loss"):
        dwindle.compress(Regression(), recipe, inputs=bare[0], data=bare)
    with pytest.raises(DwindleError, match="is learned"):
        dwindle.compress(Regression(), {"prune": {"ratio": 0.5, "score": "movement"}}, inputs=data[0])
