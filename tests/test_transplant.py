"""transplant: the eager module computes exactly what the graph does, and still generates."""

from __future__ import annotations

import pytest
import torch
from models import ZOO, first
from torch import nn

import dwindle
from dwindle.frontends.transplant import TransplantError
from dwindle.runtime.modules import QuantizedConv2d, QuantizedEmbedding, QuantizedLinear
from dwindle.runtime.qtensor import QTensor

STATIC = {
    "quantize": [
        {"weight": {"bits": 8}, "activation": {"range": "static", "kind": "asymmetric"}},
        {"operators": ["embedding"], "weight": {"bits": 4, "group_size": 8}},
    ]
}


@pytest.mark.parametrize("name", ["mlp", "tied_lm", "bert", "gpt2", "llama", "t5", "vit"])
@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", STATIC], ids=["dynamic", "static"])
def test_module_and_graph_agree_bit_for_bit(name: str, recipe) -> None:
    model, inputs = ZOO[name]()
    if recipe is STATIC and name in ("tied_lm", "gpt2", "t5"):  # tied: one weight, one scheme
        recipe = {"quantize": STATIC["quantize"][:1] + [{"operators": ["embedding"]}]}
    small = dwindle.compress(model, recipe, inputs=inputs, data=[inputs])
    eager = dwindle.transplant(small, model, inputs=inputs)
    with torch.no_grad():
        assert torch.equal(first(eager(**inputs)), first(small(**inputs)))
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


@pytest.mark.parametrize("static", [False, True])
def test_convolutions_agree_where_no_norm_is_folded_into_them(static: bool) -> None:
    model, inputs = ZOO["convnext"]()
    weight = {"operators": ["linear", "conv2d"]}
    recipe = "static-w8a8" if static else {"quantize": [weight]}
    small = dwindle.compress(model, recipe, inputs=inputs, data=[inputs])
    eager = dwindle.transplant(small, model, inputs=inputs)
    assert any(isinstance(m, QuantizedConv2d) for m in eager.modules())
    with torch.no_grad():
        assert torch.allclose(first(eager(**inputs)), first(small(**inputs)), atol=1e-6)


def test_convolutions_of_a_student_agree() -> None:
    model, inputs = ZOO["cnn"]()
    entry = {"operators": ["linear", "conv2d"], "activation": {"range": "static", "kind": "asymmetric"}}
    student = dwindle.prepare(model.train(), {"quantize": [entry]}, inputs=inputs, data=[inputs])
    small = student.eval().finish()
    eager = dwindle.transplant(small, model, inputs=inputs)
    assert any(isinstance(m, QuantizedConv2d) and m.activation for m in eager.modules())
    with torch.no_grad():
        assert torch.allclose(eager(**inputs), small(**inputs), atol=1e-6)


def test_convolutions_with_a_folded_norm_are_refused_by_name() -> None:
    model, inputs = ZOO["resnet"]()
    small = dwindle.compress(model, "static-w8a8", inputs=inputs, data=[inputs])
    with pytest.raises(TransplantError, match=r"(?s)convolution\.weight.*cure"):
        dwindle.transplant(small, model, inputs=inputs)


@pytest.mark.parametrize("recipe", ["zeroquant-w8a8", STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("loaded", [False, True], ids=["finished", "loaded"])
def test_a_trained_result_brings_its_own_tensors(recipe, loaded: bool, tmp_path) -> None:
    layers = [nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 4)]
    model, x = nn.Sequential(*layers), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    if recipe is STATIC:
        recipe = {"quantize": STATIC["quantize"][:1]}
    student = dwindle.prepare(model.train(), recipe, inputs=x, data=[x])
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        student(x).square().sum().backward()
        optimizer.step()
    small = student.finish()
    if loaded:
        small = dwindle.load(small.save(tmp_path / "small"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    eager = dwindle.transplant(small, model, inputs=x)
    with torch.no_grad():
        assert torch.equal(eager(x), small(x))
    assert not torch.equal(eager[1].running_mean, model[1].running_mean)
    assert not torch.equal(eager[3].bias, model[3].bias)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_folded_weights_are_not_folded_twice() -> None:
    model, inputs = ZOO["cnn"]()
    recipe = {"quantize": [{"operators": ["linear", "conv2d"], "modules": ["head"]}]}
    small = dwindle.compress(model, recipe, inputs=inputs)
    eager = dwindle.transplant(small, model, inputs=inputs)
    with torch.no_grad():
        assert torch.allclose(eager(**inputs), small(**inputs), atol=1e-4)


class _Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def test_buffers_that_are_written_are_the_copys_own() -> None:
    model, x = _Counts().eval(), torch.randn(4, 16)
    small = dwindle.compress(model, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    assert model.calls.item() == 0
    with torch.no_grad():
        assert torch.equal(eager(x), small(x))


def test_what_is_not_finished_and_another_model_are_refused() -> None:
    model, inputs = ZOO["mlp"]()
    with pytest.raises(TransplantError, match=r"finish\(\)"):
        dwindle.transplant(dwindle.prepare(model, inputs=inputs), model, inputs=inputs)
    wider = nn.Sequential(nn.Linear(16, 48), *list(model)[1:]).eval()
    with pytest.raises(TransplantError, match=r"0\.bias is not of the model"):
        dwindle.transplant(dwindle.compress(model, inputs=inputs), wider, inputs=inputs)
