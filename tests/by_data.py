"""What tests of rounding by data share: recipes, inputs, and what is looked at."""

from __future__ import annotations

from typing import Any

import torch
from models import ZOO, first
from torch import Tensor, nn

import dwindle
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme

W4 = Scheme(bits=4, granularity="group", group_size=16)
SMOOTH = {"quantize": [{"activation": {"range": "static", "smooth": 0.5}}]}


def recipe(method: str, **more: Any) -> dict[str, Any]:
    return {"quantize": [{"weight": {"bits": 4, "group_size": 16, "method": method, **more}}]}


def batches(inputs: dict[str, Tensor], count: int = 6) -> list[dict[str, Tensor]]:
    """Other inputs of the same kind."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            name: torch.randint(3, 99, (4, 16), generator=generator)
            if name == "input_ids"
            else (torch.ones if name == "attention_mask" else torch.zeros)(4, 16, dtype=torch.int64)
            for name in inputs
        }
        for _ in range(count)
    ]


def worst(small: Any, model: nn.Module, data: list[Any]) -> float:
    with torch.no_grad():
        pairs = [(first(small(**batch)).double(), first(model(**batch)).double()) for batch in data]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


def packed(small: dwindle.Compressed) -> dict[str, QTensor]:
    return {name: value for name, value in small.store.entries() if isinstance(value, QTensor)}


def mlp() -> tuple[nn.Sequential, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model, _ = ZOO["mlp"]()
    mixing = torch.randn(16, 16, generator=generator)
    return model, [torch.randn(20, 16, generator=generator) @ mixing for _ in range(3)]  # type: ignore[return-value]
