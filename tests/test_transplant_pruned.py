"""transplant of what was pruned: tensors and attributes of the eager module, which runs, generates and trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ZOO, _built, _random, _tokens
from pruning import apart
from torch import nn
from torch.nn import functional as F

import dwindle
from dwindle.frontends.transplant import EXACT, LIMIT, TransplantError
from dwindle.runtime.model import flat_outputs
from dwindle.runtime.modules import QuantizedLinear
from dwindle.runtime.structure import flatten

THIRD = {"prune": {"ratio": 0.3}}
PARTS = {"prune": {"ratio": 0.3, "scopes": ["heads", "rows"]}}
UNEQUAL = {"prune": {"target": {"params": 0.6}, "scopes": ["heads", "rows"]}}


def gpt2(layers: int = 5) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None}
    config = GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=layers, n_head=4, **ends)
    return _built(lambda: GPT2LMHeadModel(config))


def llama(heads: int, shared: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    return _built(lambda: LlamaForCausalLM(config))


@pytest.mark.parametrize("name", list(ZOO))
def test_module_and_graph_agree(name: str) -> None:
    model, inputs = ZOO[name]()
    before, numbers = copy.deepcopy(model.state_dict()), str(list(model.modules()))
    small = dwindle.compress(model, THIRD, inputs=inputs)
    eager = dwindle.transplant(small, model, inputs=inputs)
    assert type(eager) is type(model)
    assert apart(small, eager, inputs) <= EXACT
    cut = {edit.fqn for edit in small.plan.slices}
    assert cut
    for fqn in cut:
        stored = small.store.get(fqn)
        own = eager.get_parameter(fqn) if isinstance(stored, nn.Parameter) else eager.get_buffer(fqn)
        assert torch.equal(own, stored)
    assert str(list(model.modules())) == numbers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["cnn", "resnet", "convnext", "bert"])
def test_layers_say_what_they_hold(name: str) -> None:
    model, inputs = ZOO[name]()
    eager = dwindle.transplant(dwindle.compress(model, THIRD, inputs=inputs), model, inputs=inputs)
    changed = 0
    for own, old in zip(eager.modules(), model.modules(), strict=True):
        weight = getattr(own, "weight", None)
        if weight is None:
            continue
        changed += weight.shape != old.weight.shape
        if isinstance(own, nn.Linear):
            assert weight.shape == (own.out_features, own.in_features)
        elif isinstance(own, nn.Conv2d):
            assert weight.shape[:2] == (own.out_channels, own.in_channels // own.groups)
            assert own.in_channels % own.groups == 0
            assert (own.groups > 1) == (old.groups > 1)
        elif isinstance(own, nn.Embedding):
            assert weight.shape == (own.num_embeddings, own.embedding_dim)
        elif isinstance(own, nn.LayerNorm):
            assert weight.shape == own.normalized_shape
        elif isinstance(own, nn.BatchNorm2d):
            assert weight.shape == (own.num_features,) == own.running_mean.shape
    assert changed


@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        (gpt2, PARTS),
        (gpt2, UNEQUAL),
        (gpt2, {"prune": {"ratio": 0.3, "inner": True}}),
        (lambda: llama(8, 4), UNEQUAL),
        (lambda: llama(4, 1), PARTS),
        (lambda: llama(4, 2), THIRD | {"quantize": [{"activation": {}}]}),
        (gpt2, PARTS | {"quantize": [{"activation": {}}]}),
    ],
    ids=["gpt2", "gpt2-unequal", "gpt2-inner", "gqa-unequal", "mqa", "gqa-w8a8", "gpt2-w8a8"],
)
def test_it_generates_what_the_graph_would(make: Any, recipe: dict[str, Any]) -> None:
    model, inputs = make(), _tokens(masked=False)
    small = dwindle.compress(model, recipe, inputs=inputs)
    eager = dwindle.transplant(small, model, inputs=inputs)
    assert small.plan.slices
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    found = eager.generate(**inputs, **call)
    tokens = inputs["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            logits = small(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)
    # Padding brings a mask into the forward, which repeats keys and values for itself.
    padded = {name: F.pad(value, (2, 0)) for name, value in inputs.items()}
    if not small.plan.quantizations:
        assert torch.equal(eager.generate(**padded, **call)[:, 2:], tokens)


def test_every_layer_of_gpt2_has_its_own_heads() -> None:
    model, inputs = gpt2(), _tokens()
    small = dwindle.compress(model, UNEQUAL, inputs=inputs)
    eager = dwindle.transplant(small, model, inputs=inputs)
    heads = [block.attn.num_heads for block in eager.transformer.h]
    assert len(set(heads)) > 1
    for i, block in enumerate(eager.transformer.h):
        stored = small.store.get(f"transformer.h.{i}.attn.c_proj.weight")
        assert block.attn.num_heads * block.attn.head_dim == block.attn.split_size == stored.shape[0]
        assert block.attn.layer_idx == i  # also that of the layer whose index is the number of heads
        assert block.attn.embed_dim == 32
        assert (block.attn.c_attn.nx, block.attn.c_attn.nf) == block.attn.c_attn.weight.shape
    assert eager.config.n_head == model.config.n_head == 4


@pytest.mark.parametrize(("heads", "shared", "groups", "left"), [(4, 1, 3, 3), (4, 2, 2, 2), (4, 4, 1, 2)])
def test_heads_that_share_keys_and_values_are_counted(heads: int, shared: int, groups: int, left: int) -> None:
    model, inputs = llama(heads, shared), _tokens(masked=False)
    recipe = {"prune": {"ratio": 0.3 if shared == 1 else 0.5, "scopes": "heads"}}
    small = dwindle.compress(model, recipe, inputs=inputs)
    eager = dwindle.transplant(small, model, inputs=inputs)
    for layer in eager.model.layers:
        own = layer.self_attn
        assert own.num_key_value_groups == groups
        assert own.q_proj.out_features == left * 8 == own.k_proj.out_features * groups


def test_encoders_say_how_many_heads_they_have() -> None:
    model, inputs = ZOO["bert"]()
    eager = dwindle.transplant(dwindle.compress(model, THIRD, inputs=inputs), model, inputs=inputs)
    own = eager.encoder.layer[1].attention.self
    assert (own.num_attention_heads, own.attention_head_size, own.all_head_size) == (3, 8, 24)


def test_tied_weights_stay_one_tensor() -> None:
    model, inputs = ZOO["gpt2"]()
    eager = dwindle.transplant(dwindle.compress(model, THIRD, inputs=inputs), model, inputs=inputs)
    assert eager.lm_head.weight is eager.transformer.wte.weight
    assert eager.lm_head.in_features == eager.transformer.wte.embedding_dim == 23


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "resnet"])
def test_it_trains_on_and_leaves_the_others_alone(name: str) -> None:
    model, inputs = ZOO[name]()
    small = dwindle.compress(model, THIRD, inputs=inputs)
    eager = dwindle.transplant(small, model, inputs=inputs)
    other = dwindle.transplant(small, model, inputs=inputs)
    before = {name: value.clone() for name, value in (model.state_dict() | small.state_dict()).items()}
    optimizer = torch.optim.SGD(eager.train().parameters(), lr=0.1)
    sum(t.square().mean() for t in flat_outputs(flatten(eager(**inputs))[1])).backward()
    assert all(p.grad is not None for p in eager.parameters())
    optimizer.step()
    after = model.state_dict() | small.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert apart(eager.eval(), other, inputs) > 1e-3
    other.load_state_dict(eager.state_dict())
    assert apart(eager, other, inputs) == 0
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize("name", ["mlp", "bert", "llama", "vit", "tied_lm"])
def test_what_is_cut_and_packed_agrees(name: str, tmp_path: Path) -> None:
    model, inputs = ZOO[name]()
    small = dwindle.compress(model, THIRD | {"quantize": [{"activation": {}}]}, inputs=inputs)
    assert small.plan.slices
    for source in (small, dwindle.load(small.save(tmp_path / "small"))):
        eager = dwindle.transplant(source, model, inputs=inputs)
        assert any(isinstance(module, QuantizedLinear) for module in eager.modules())
        assert apart(small, eager, inputs) <= LIMIT
        assert not any(p.requires_grad for p in eager.parameters())


def test_another_model_is_refused_by_name() -> None:
    model, inputs = ZOO["mlp"]()
    small = dwindle.compress(model, THIRD, inputs=inputs)
    wider = nn.Sequential(nn.Linear(16, 48), *list(model)[1:]).eval()
    with pytest.raises(TransplantError, match=r"0\.weight is not of the model that was compressed"):
        dwindle.transplant(small, wider, inputs=inputs)


def test_one_image_and_one_token_are_enough() -> None:
    model, _ = ZOO["vit"]()
    inputs = {"pixel_values": _random(1, 3, 16, 16)}
    small = dwindle.compress(model, THIRD, inputs=inputs)
    assert apart(small, dwindle.transplant(small, model, inputs=inputs), inputs) <= EXACT
    model, inputs = ZOO["gpt2"]()
    small = dwindle.compress(model, THIRD, inputs=inputs)
    one = {name: value[:1, :1] for name, value in inputs.items()}
    assert apart(small, dwindle.transplant(small, model, inputs=one), inputs) <= EXACT
