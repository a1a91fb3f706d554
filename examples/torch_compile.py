"""The same passes behind torch.compile: INT8 in inference, exact in training.

python examples/torch_compile.py
"""

from __future__ import annotations

import torch
from torch import nn


def main() -> None:
    """Compile once; what runs depends on whether gradients are on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    fast = torch.compile(model, backend="dwindle")
    x = torch.randn(64, 256)

    with torch.no_grad():
        expected, found = model(x), fast(x)
    print(f"inference in int8: relative error {((found - expected).norm() / expected.norm()):.4f}")

    fast(x).square().mean().backward()
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).square().mean().backward()
    print(f"training: largest gradient difference {(gradient - model[0].weight.grad).abs().max():.1e}")


if __name__ == "__main__":
    main()
