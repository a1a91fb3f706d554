"""transplant: the eager module computes exactly what the graph does, and still generates."""

from __future__ import annotations

import pytest
import torch
from models import ZOO

import dwindle
from dwindle.frontends.transplant import TransplantError
from dwindle.runtime.modules import QuantizedEmbedding, QuantizedLinear
from dwindle.runtime.qtensor import QTensor

STATIC = {
    "quantize": [
        {"weight": {"bits": 8}, "activation": {"range": "static", "kind": "asymmetric"}},
        {"operators": ["embedding"], "weight": {"bits": 4, "group_size": 8}},
    ]
}


def _first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", ["mlp", "tied_lm", "bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", STATIC], ids=["dynamic", "static"])
def test_module_and_graph_agree_bit_for_bit(name: str, recipe) -> None:
    model, inputs = ZOO[name]()
    if recipe is STATIC and name in ("tied_lm", "gpt2", "t5"):  # tied: one weight, one scheme
        recipe = {"quantize": STATIC["quantize"][:1] + [{"operators": ["embedding"]}]}
    small = dwindle.compress(model, recipe, inputs=inputs, data=[inputs])
    eager = dwindle.transplant(small, model, inputs=inputs)
    with torch.no_grad():
        assert torch.equal(_first(eager(**inputs)), _first(small(**inputs)))
    assert type(eager) is type(model)
    assert any(isinstance(m, QuantizedLinear) for m in eager.modules())
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())


def test_a_compressed_llama_generates() -> None:
    model, inputs = ZOO["llama"]()
    small = dwindle.compress(model)
    eager = dwindle.transplant(small, model)
    prompt = inputs["input_ids"][:1]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = eager.generate(input_ids=prompt, use_cache=True, **settings)
    assert cached.shape == (1, prompt.shape[1] + 6)
    tokens = prompt
    for _ in range(6):  # the graph, fed the growing prompt, picks the same tokens
        with torch.no_grad():
            logits = small(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, tokens)


def test_tied_modules_share_one_tensor() -> None:
    model, inputs = ZOO["gpt2"]()
    eager = dwindle.transplant(dwindle.compress(model, inputs=inputs), model, inputs=inputs)
    embedding, head = eager.transformer.wte, eager.lm_head
    assert isinstance(embedding, QuantizedEmbedding)
    assert isinstance(head, QuantizedLinear)
    assert embedding.weight is head.weight
    assert isinstance(head.weight, QTensor)


def test_the_copy_is_smaller_and_shares_the_rest() -> None:
    model, inputs = ZOO["llama"]()
    small = dwindle.compress(model, inputs=inputs)
    eager = dwindle.transplant(small, model, inputs=inputs)
    assert eager.model.norm.weight.data_ptr() == model.model.norm.weight.data_ptr()
    assert not any(p.requires_grad for p in eager.parameters())
    assert all(p.requires_grad for p in model.parameters())
    packed = {b.data_ptr() for v in eager.modules() if isinstance(v, QTensor) for b in v.buffers()}
    assert packed <= {b.data_ptr() for b in small.buffers()}


def test_convolutions_are_refused_by_name() -> None:
    model, inputs = ZOO["resnet"]()
    small = dwindle.compress(model, "static-w8a8", inputs=inputs, data=[inputs])
    with pytest.raises(TransplantError, match=r"(?s)convolution\.weight.*cure"):
        dwindle.transplant(small, model, inputs=inputs)
