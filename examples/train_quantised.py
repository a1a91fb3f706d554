"""Train with the quantisation simulated (3-bit weights, 8-bit activations), then make it real.

python examples/train_quantised.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import dwindle

RECIPE = {"quantize": [{"weight": {"bits": 3, "group_size": 32}, "activation": {"bits": 8, "range": "dynamic"}}]}


def main() -> None:
    """Fit a small regression, once in floating point and on from there in 3 bits."""
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))
    example = torch.randn(16, 64)

    print(f"float          {fit(model, target):.4f}")
    untrained = dwindle.compress(model, RECIPE, inputs=example)
    print(f"3 bits, as is  {loss(untrained, target):.4f}")

    student = dwindle.prepare(model, RECIPE, inputs=example)
    print(f"3 bits, tuned  {fit(student, target):.4f}")
    small = student.eval().finish()
    print(f"packed         {loss(small, target):.4f}  ({small.certificate.bytes_after:,} bytes)")


def fit(model: nn.Module, target: nn.Module, steps: int = 300) -> float:
    """Train on random inputs; the loss on held-out ones."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        x = torch.randn(64, 64)
        optimizer.zero_grad()
        F.mse_loss(model(x), target(x)).backward()
        optimizer.step()
    return loss(model, target)


def loss(model: nn.Module, target: nn.Module) -> float:
    """Mean squared error on 1,024 inputs that training never sees."""
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(F.mse_loss(model(x), target(x)))


if __name__ == "__main__":
    main()
