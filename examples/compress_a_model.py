"""Compress a model after training, look at the report, save it, load it, run it.

python examples/compress_a_model.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import dwindle


def main() -> None:
    """A three-layer classifier to INT8 and back from disk."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)).eval()
    batch = torch.randn(32, 256)

    small = dwindle.compress(model, "zeroquant-w8a8", inputs=batch)
    print(small.report())

    with tempfile.TemporaryDirectory() as folder:
        path = small.save(Path(folder) / "small")
        size = sum(f.stat().st_size for f in path.iterdir())
        print(f"{size:,} bytes on disk, of {sum(p.numel() * 4 for p in model.parameters()):,} in float32")
        loaded = dwindle.load(path)
    with torch.no_grad():
        print("the same after loading:", torch.equal(loaded(batch), small(batch)))
        print(
            "same class as the original for", (loaded(batch).argmax(1) == model(batch).argmax(1)).sum().item(), "of 32"
        )


if __name__ == "__main__":
    main()
