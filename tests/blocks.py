"""Models of several layers, models without some of them, and what their layers do to what goes through."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import first
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = {
    "bert": "encoder.layer",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "vit": "vit.layers",
    "t5": "decoder.block",
}
WRITES = {  # what adds to the residual stream
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "t5": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"),
}


def gpt2(layers: int = 4, seed: int = 0) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A decoder, and two batches of other lengths, one padded."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 99, "n_positions": 32, "n_embd": 32, "n_head": 4, "n_layer": layers, "use_cache": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=1, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)  # layers that differ
    batches = [
        {"input_ids": torch.randint(3, 99, (n, t)), "attention_mask": torch.ones(n, t).long()}
        for n, t in ((2, 8), (3, 6))
    ]
    batches[1]["attention_mask"][2, 4:] = 0
    return model, [batch | {"labels": batch["input_ids"]} for batch in batches]


def unlabelled(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]


def without(model: nn.Module, row: str, *gone: int) -> nn.Module:
    other = copy.deepcopy(model)
    blocks = other.get_submodule(row)
    assert isinstance(blocks, nn.ModuleList)
    for number in sorted(gone, reverse=True):
        del blocks[number]
    return other


def identity(model: nn.Module, name: str, number: int) -> None:
    """Let a block add nothing."""
    for path in WRITES[name]:
        part = model.get_submodule(f"{ROWS[name]}.{number}.{path}")
        for parameter in part.parameters():
            nn.init.zeros_(parameter)


def by_hooks(
    model: nn.Module, row: str, inputs: dict[str, Tensor], mask: Tensor | None, channels: int = -1
) -> list[float]:
    """1 - cos of what goes into each block and what comes out, with hooks on the model itself."""
    seen: list[float] = []

    def look(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, y = args[0], first(output)
        apart = 1 - F.cosine_similarity(x.double(), y.double(), dim=channels)  # (B, T)
        kept = torch.ones_like(apart) if mask is None else mask
        seen.append(float((apart * kept).sum() / kept.sum()))

    handles = [block.register_forward_hook(look) for block in model.get_submodule(row)]  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen
