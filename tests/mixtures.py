"""Mixtures of experts: tiny models of the families that transformers has, and one by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dwindle.passes.prune.groups import Group

transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 99, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"num_experts_per_tok": 2, "use_cache": False, "initializer_range": 0.2, "max_position_embeddings": 64},
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4},
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", "num_local_experts", {}),
    "qwen2_moe": ("Qwen2Moe", "num_experts", {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", "num_experts", {"norm_topk_prob": True}),
    "olmoe": ("Olmoe", "num_experts", {}),
    "granitemoe": ("GraniteMoe", "num_local_experts", {}),
    "gpt_oss": ("GptOss", "num_local_experts", {"layer_types": ["full_attention"] * 2, "rope_parameters": None}),
    "phimoe": ("Phimoe", "num_local_experts", {}),
    "llama4": ("Llama4", "num_local_experts", {"intermediate_size_mlp": 24}),
    "deepseek_v3": ("DeepseekV3", "n_routed_experts", LATENT),
}


def tokens(batch: int = 2, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def mixture(name: str, experts: int = 8, **more: Any) -> nn.Module:
    """A tiny model of a family; what a fresh one has at 0 or 1 is random."""
    family, counted, own = FAMILIES[name]
    made = getattr(transformers, f"{family}{'Text' * (name == 'llama4')}Config")
    config = made(**SIZES | own | {counted: experts} | more)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and (tensor.ndim == 1 or len(tensor.unique()) == 1):
                tensor.add_(torch.randn_like(tensor).abs(), alpha=0.1)
    return model


def experts(group: Group) -> bool:
    return group.kind == "experts"


def logits(output: Any) -> Tensor:
    found = output.logits if hasattr(output, "logits") else output
    assert isinstance(found, Tensor)
    return found


class Dispatched(nn.Module):
    """A mixture by hand. `way` says how the choice comes to the experts."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.router = nn.Linear(6, 5)
        self.up, self.down = nn.Parameter(torch.randn(5, 6, 8)), nn.Parameter(torch.randn(5, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        weights, chosen = scores.topk(2)
        if self.way == "the best alone":
            best = scores.argmax(-1)
            hidden = torch.einsum("td,tdf->tf", x, self.up[best]).relu()
            return torch.einsum("tf,tfd->td", hidden, self.down[best]) * scores.gather(-1, best[:, None])
        match self.way:
            case "one hot":
                gates = (F.one_hot(chosen, 5) * weights[..., None]).sum(-2)
            case "one hot and spare":
                gates = (F.one_hot(chosen, 6) * weights[..., None]).sum(-2)[:, :5]
            case "scatter":
                gates = torch.zeros(x.shape[0], 5).scatter(-1, chosen, weights)
            case "shifted":
                gates = (F.one_hot((chosen + 1) % 5, 5) * weights[..., None]).sum(-2)
            case "compared":
                gates = ((chosen[..., None] == torch.arange(5)) * weights[..., None]).sum(-2)
            case _:
                gates = (F.one_hot(chosen, 5) * weights[..., None]).sum(-2) + chosen.float().mean()
        hidden = torch.einsum("td,edf->tef", x, self.up).relu()
        return torch.einsum("tef,efd,te->td", hidden, self.down, gates)
