"""Layer-by-layer distillation: each block of a student learns by itself what the teacher's gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import ZOO
from torch import Tensor, nn

import dwindle
from dwindle.frontends.layerwise import random_tokens
from dwindle.frontends.progress import late
from dwindle.passes.block_training import Example, Training, learn, missed
from dwindle.runtime.errors import CalibrationError, DistillationError, RecipeError, ScheduleError

W4A8: dict[str, Any] = {
    "quantize": [{"weight": {"bits": 4, "group_size": 16}, "activation": {}}, {"operators": ["embedding"]}]
}
W2A8: dict[str, Any] = {"quantize": [{"weight": {"bits": 2, "group_size": 16}, "activation": {}}]}


def prepared(name: str, recipe: dict[str, Any], **more: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    model, inputs = ZOO[name]()
    return dwindle.prepare(model, recipe, inputs=inputs, teacher=model, **more), model, inputs


def data_for(name: str, model: nn.Module, inputs: dict[str, Tensor], batches: int = 3) -> list[dict[str, Tensor]]:
    if name != "vit":
        return random_tokens(model, inputs, batches=batches)
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i))} for i in range(3)]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_every_block_learns_and_nothing_else_changes(name: str) -> None:
    student, model, inputs = prepared(name, W2A8)
    student.train()
    whole = copy.deepcopy(model.state_dict())
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    marked = next(p for n, p in student.named_parameters() if ".1." in n)
    marked.grad = torch.ones_like(marked)
    result = student.distill_layers(data_for(name, model, inputs), steps=30, lr=1e-3)
    assert all(layer.after < layer.before for layer in result.layers), str(result)
    inside = tuple(f"{layer.path}." for layer in result.layers)
    for n, p in student.named_parameters():
        trained = n.startswith(inside) and "relative_attention_bias" not in n
        assert torch.equal(p, before[n]) != trained, n
        assert p.grad is None or p is marked
    assert torch.equal(marked.grad, torch.ones_like(marked))
    assert sum(layer.parameters for layer in result.layers) == sum(
        p.numel() for n, p in student.named_parameters() if not torch.equal(p, before[n])
    )
    assert student.training
    assert not model.training
    assert all(torch.equal(value, whole[n]) for n, value in model.state_dict().items())
    assert str(result).count("error") == len(result.layers) == len(result.to_json()["layers"])


def test_the_error_is_that_of_the_eager_block_on_the_teachers_states() -> None:
    student, model, inputs = prepared("bert", {"depth": {"keep_layers": [1]}})
    (layer,) = student.distill_layers([inputs], steps=1, lr=1e-9).layers
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states
        mask = inputs["attention_mask"].bool()
        y = model.encoder.layer[1](hidden[0], mask[:, None, None, :])
        y = y[0] if isinstance(y, tuple) else y
    assert layer.path == "encoder.layer.1"  # it stands in for both
    assert layer.before == pytest.approx(float((y - hidden[2])[mask].square().mean()), rel=1e-5)


def test_padding_does_not_count() -> None:
    found = []
    for tokens in (5, 7):
        student, _, inputs = prepared("bert", W2A8)
        ids = torch.where(inputs["attention_mask"] == 0, tokens, inputs["input_ids"])
        batch = {**inputs, "input_ids": ids}
        found.append((student.distill_layers([batch], steps=5, lr=1e-3), student.state_dict()))
    (one, a), (two, b) = found
    assert [x.after for x in one.layers] == pytest.approx([x.after for x in two.layers], rel=1e-5)
    assert all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


def test_finished_it_is_nearer_to_the_teacher_than_what_was_only_rounded() -> None:
    model, inputs = ZOO["bert"]()
    data = random_tokens(model, inputs, batches=4)
    rounded = dwindle.compress(model, W2A8, inputs=inputs)
    learned = dwindle.compress(model, {**W2A8, "layerwise": {"steps": 60, "lr": 1e-3}}, inputs=inputs, data=data)
    held = random_tokens(model, inputs, batches=4, seed=1)
    for batches in (data, held):
        with torch.no_grad():
            before, after = (
                sum(float((small(**b)[0] - model(**b)[0]).square().mean()) for b in batches)
                for small in (rounded, learned)
            )
        assert after < 0.8 * before
    assert learned.plan.quantizations == rounded.plan.quantizations
    assert learned.certificate.bytes_after == rounded.certificate.bytes_after
    lines = [entry.where for entry in learned.log if entry.rule == "layerwise.distilled"]
    assert lines == ["encoder.layer.0", "encoder.layer.1"]
    assert dict(learned.recipe)["layerwise"] == {"steps": 60, "lr": 1e-3}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_processes_give_the_same_bit_for_bit(name: str) -> None:
    found = []
    for processes in (1, 2):
        student, model, inputs = prepared(name, W4A8)
        data = data_for(name, model, inputs)
        found.append((student.distill_layers(data, steps=7, lr=1e-3, processes=processes), student.state_dict()))
    (one, a), (two, b) = found
    assert one.layers == two.layers
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_what_fails_in_a_process_is_told() -> None:
    student, _, inputs = prepared("bert", W4A8)
    with torch.no_grad():
        dict(student.named_parameters())["encoder.layer.1.output.dense.bias"].fill_(float("nan"))
    with pytest.raises(DistillationError, match=r"(?s)error of a block is nan before the first step.*lower lr"):
        student.distill_layers([inputs], steps=1, processes=2)


def test_an_optimizer_is_of_one_block_and_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    alive = list[int]()
    of: list[set[int]] = []

    class Counted(torch.optim.AdamW):
        def __init__(self, groups: Any, **settings: Any) -> None:
            super().__init__(groups, **settings)
            alive.append(len(alive) - gone)
            of.append({p.data_ptr() for group in self.param_groups for p in group["params"]})
            assert {group["weight_decay"] for group in self.param_groups} == {0.01, 0.0}
            assert all(p.dim() > 1 for p in self.param_groups[0]["params"])
            assert all(p.dim() == 1 for p in self.param_groups[1]["params"])

        def __del__(self) -> None:
            nonlocal gone
            gone += 1

    gone = 0
    monkeypatch.setattr(torch.optim, "AdamW", Counted)
    student, _, inputs = prepared("bert", W4A8)
    student.distill_layers([inputs], steps=2)
    assert alive == [0, 0]  # none of an earlier block when one is made
    for i, pointers in enumerate(of):
        path = f"encoder.layer.{i}."
        assert pointers == {p.data_ptr() for n, p in student.named_parameters() if n.startswith(path)}


def test_order_and_steps_are_the_seeds() -> None:
    def result(seed: int) -> Any:
        student, model, inputs = prepared("bert", W4A8)
        return student.distill_layers(random_tokens(model, inputs, batches=3), steps=4, lr=1e-3, seed=seed)

    assert result(0).layers == result(0).layers
    assert result(0).layers != result(1).layers


def test_every_batch_has_its_turn_before_one_comes_again() -> None:
    seen = list[float]()

    def block(x: Tensor) -> tuple[Tensor]:
        seen.append(float(x))
        return (x * weight,)

    weight = nn.Parameter(torch.ones(()))
    examples = [Example((torch.tensor(float(i)),), (torch.zeros(()),)) for i in range(3)]
    learn(block, {"weight": weight}, examples, Training(steps=6))
    steps = seen[3:-3]  # without those that measure
    assert sorted(steps[:3]) == sorted(steps[3:]) == [0.0, 1.0, 2.0]


def test_the_error_is_over_positions_that_count() -> None:
    y, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kept = torch.tensor([[True, False, True], [False, False, True]])
    whole = Example((), (t,))
    assert float(missed(lambda: (y,), whole)) == pytest.approx(float((y - t).square().mean()))
    part = Example((), (t,), kept)
    assert float(missed(lambda: (y,), part)) == pytest.approx(float((y - t)[kept].square().mean()))
    assert float(missed(lambda: (y,), Example((), (t,), torch.zeros(2, 3, dtype=torch.bool)))) == 0


def test_half_precision_is_trained_on_copies_in_full() -> None:
    """A step of 1e-5 is less than half the last bit of .5 in bfloat16; a hundred of them are not."""
    weight = nn.Parameter(torch.full((), 0.5, dtype=torch.bfloat16))
    example = Example((), (torch.zeros((), dtype=torch.bfloat16),))
    learn(lambda: (weight * 1,), {"weight": weight}, [example], Training(steps=400, lr=1e-5, weight_decay=0))
    assert float(weight.detach()) == pytest.approx(0.496, abs=2e-3)
    assert float(weight.detach()) < 0.5


def test_learned_scales_and_masks() -> None:
    recipe = {
        "prune": {"ratio": 0.5, "scopes": ["rows"], "score": "l2"},
        "quantize": [{"weight": {"bits": 4, "learned": True}, "activation": {"range": "static"}}],
    }
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model, recipe, inputs=inputs, teacher=model, data=[inputs])
    masks = {n: b.clone() for n, b in student.named_buffers() if "_mask_" in n}
    assert masks
    scale = "encoder.layer.0.output.dense.weight_step"
    before = student.state_dict()[scale].clone()
    result = student.distill_layers([inputs], steps=20, lr=1e-3)
    assert all(layer.after < layer.before for layer in result.layers)
    assert not torch.equal(student.state_dict()[scale], before)
    assert all(torch.equal(dict(student.named_buffers())[n], mask) for n, mask in masks.items())
    small = student.finish()
    with torch.no_grad():
        assert torch.equal(small(**inputs)[0], student.eval()(**inputs)[0])


def test_schedules_are_over_first() -> None:
    schedule = {"type": "linear", "start_bits": 8, "length": 2}
    student, _, inputs = prepared("bert", {"quantize": [{"weight": {"bits": 4}}], "schedule": schedule})
    with pytest.raises(ScheduleError, match=r"(?s)not at the end of their schedule.*when every schedule is over"):
        student.distill_layers([inputs], steps=1)
    for _ in range(2):
        student.step()
    assert student.distill_layers([inputs], steps=1).layers


def test_bad_requests_are_refused_before_any_training() -> None:
    student, model, inputs = prepared("bert", W4A8)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    wrong: dict[str, Any] = {"steps": 0, "lr": 0.0, "weight_decay": -1.0, "processes": 0}
    for name, value in wrong.items():
        with pytest.raises(DistillationError, match=rf"{name} of layer-by-layer(?s:.*)found: {value}"):
            student.distill_layers([inputs], **{name: value})
    with pytest.raises(DistillationError, match="at least one batch"):
        student.distill_layers([])
    with pytest.raises(CalibrationError):
        student.distill_layers([inputs, {"attention_mask": inputs["attention_mask"]}], steps=1)
    with pytest.raises(DistillationError, match=r"(?s)no teacher.*teacher=model"):
        dwindle.prepare(model, W4A8, inputs=inputs).distill_layers([inputs])
    llama, _ = ZOO["llama"]()
    plain = {name: value for name, value in inputs.items() if name != "token_type_ids"}
    other = dwindle.prepare(model, W4A8, inputs=plain)
    with pytest.raises(DistillationError, match="no blocks where the teacher has some"):
        other.distill_layers([plain], teacher=llama)
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())


def test_another_teacher_in_place_of_prepares() -> None:
    model, inputs = ZOO["bert"]()
    student = dwindle.prepare(model, {}, inputs=inputs)
    assert [x.before for x in student.distill_layers([inputs], steps=1, teacher=model).layers] == [0.0, 0.0]
    teacher = dwindle.prepare(model, {}, inputs=inputs)  # a student may teach
    other = dwindle.prepare(model, W2A8, inputs=inputs)
    assert all(x.before > 0 for x in other.distill_layers([inputs], steps=1, teacher=teacher).layers)


def test_batches_of_another_call_have_a_variant_of_their_own() -> None:
    student, _, inputs = prepared("bert", W4A8)
    batch = {"input_ids": torch.randint(3, 99, (3, 5))}
    result = student.distill_layers([batch], steps=2, lr=1e-3)
    assert len(result.layers) == 2
    small = student.finish()
    with torch.no_grad():
        assert torch.equal(small(**inputs)[0], student.eval()(**inputs)[0])


def test_random_tokens_are_like_the_example() -> None:
    model, inputs = ZOO["t5"]()
    batches = random_tokens(model, inputs, batches=2, seed=3)
    again = random_tokens(model, inputs, batches=2, seed=3)
    for batch, other in zip(batches, again, strict=True):
        assert list(batch) == list(inputs)
        assert all(torch.equal(batch[n], other[n]) for n in batch)
        assert torch.equal(batch["attention_mask"], inputs["attention_mask"])
        for name in ("input_ids", "decoder_input_ids"):
            assert batch[name].shape == inputs[name].shape
            assert 0 <= int(batch[name].min()) <= int(batch[name].max()) < model.config.vocab_size
            assert not torch.equal(batch[name], inputs[name])
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert len(random_tokens(model)) == 16
    vit, pixels = ZOO["vit"]()
    with pytest.raises(DistillationError, match=r"(?s)input_ids.*pixel_values"):
        random_tokens(vit, pixels)
    with pytest.raises(DistillationError, match="vocab_size"):
        random_tokens(*ZOO["tied_lm"]())


def test_the_preset_has_four_bits_in_feed_forward_layers() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = [
        (BertModel(BertConfig(**sizes, intermediate_size=128)), ("intermediate.dense", "output.dense"), 4),
        (LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=128, use_cache=False)), ("mlp.",), 6),
        (GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=2)), ("mlp.",), 4),
    ]
    for model, names, count in models:
        student = dwindle.prepare(model.eval(), "zeroquant-w4a8-lkd", teacher=model)
        four = {edit.fqn for edit in student.plan.quantizations if edit.weight.bits == 4}
        assert len(four) == count
        assert all(any(name in fqn for name in names) and "attention" not in fqn for fqn in four)
        assert {edit.weight.bits for edit in student.plan.quantizations} == {4, 8}
    mlp, x = ZOO["mlp"]()
    with pytest.raises(RecipeError, match="matches nothing"):
        dwindle.compress(mlp, "zeroquant-w4a8-lkd", inputs=x, data=[x])


def test_data_serve_what_else_the_recipe_measures() -> None:
    model, inputs = ZOO["gpt2"]()
    recipe = {**W4A8, "depth": {"keep": 1, "by": "influence"}, "layerwise": {"steps": 1}}
    small = dwindle.compress(model, recipe, inputs=inputs, data=(batch for batch in [inputs]), quiet=True)
    ranking = dwindle.rank_layers(model, [inputs], quiet=True)
    assert [edit.path for edit in small.plan.drops] == [f"transformer.h.{ranking.order[0]}"]


def test_compressing_without_data_asks_for_them() -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(CalibrationError, match=r"(?s)trains layers.*labels are not needed.*random_tokens"):
        dwindle.compress(model, {**W4A8, "layerwise": {}}, inputs=inputs)
    compiled = torch.compile(model, backend="dwindle", options={"recipe": {**W4A8, "layerwise": {}}})
    with pytest.raises(Exception, match=r"torch\.compile cannot train layers"):
        compiled(**inputs)
    with pytest.raises(RecipeError, match="greater than or equal to 1"):
        dwindle.compress(model, {**W4A8, "layerwise": {"steps": 0}}, inputs=inputs)


def test_what_takes_long_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with late("Quick") as advance:
        advance(1, 1)
    monkeypatch.setattr("dwindle.frontends.progress.PATIENCE", 0.0)
    with late("Distilling layers") as advance:
        advance(1, 3)
        advance(2, 3)
    with late("Hidden", quiet=True) as advance:
        advance(1, 1)
    shown = capsys.readouterr().err
    assert "Distilling layers" in shown
    assert "Hidden" not in shown
    assert "Quick" not in shown
