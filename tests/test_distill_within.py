"""What a student learns from inside its teacher: states, scores, taps; stages; widths; and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import bert_classifier
from torch import Tensor, nn

import dwindle
from dwindle.frontends.distillation import PROJECTIONS
from dwindle.frontends.tapping import Tapping
from dwindle.frontends.teacher import Teacher
from dwindle.passes.distill import kept_states, scores_apart, states_apart
from dwindle.passes.taps import Tap
from dwindle.runtime.errors import DistillationError, RecipeError

pytest.importorskip("transformers")

W8 = {"quantize": [{"weight": {"bits": 8}}]}
WITHIN = {"hidden": 1.0, "scores": 1.0}


def bert(layers: int = 4, *, heads: int = 2, vocab: int = 50, **more: Any) -> Any:
    return bert_classifier(layers, heads=heads, vocab=vocab, num_labels=3, **more)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}


def by_hand(model: Any, given: dict[str, Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Hidden states and scores before the softmax, of a BERT with written-out attention."""
    scores: list[Tensor] = []

    def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        q, k = (
            layer(args[0]).view(*args[0].shape[:-1], -1, module.attention_head_size).transpose(1, 2)  # type: ignore[operator,arg-type]
            for layer in (module.query, module.key)
        )
        scores.append(q @ k.transpose(-1, -2) / module.attention_head_size**0.5)  # type: ignore[operator]

    hooks = [layer.attention.self.register_forward_hook(look, with_kwargs=True) for layer in model.bert.encoder.layer]
    states = model(**given, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return states, scores


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_and_scores_are_those_of_the_model(attention: str) -> None:
    model, given = bert(), batch()
    model.set_attn_implementation(attention)
    other = bert(seed=1)
    student = dwindle.prepare(model, {"distill": WITHIN}, inputs=given, teacher=other)
    states, scores = by_hand(model, given)
    theirs, their_scores = by_hand(other, given)
    within = student.compare(given).within
    hidden = [(s, t) for pair, s, t in within if pair.part == "hidden"]
    assert len(hidden) == 5
    for (s, t), own, its in zip(hidden, states, theirs, strict=True):
        assert torch.allclose(s, own, atol=1e-5)
        assert torch.allclose(t, its, atol=1e-5)
        assert s.requires_grad
        assert not t.requires_grad
    mask = given["attention_mask"][:, None, None, :].bool()
    seen = [(s, t) for pair, s, t in within if pair.part == "scores"]
    for (s, t), own, its in zip(seen, scores, their_scores, strict=True):
        assert torch.allclose(s.masked_fill(~mask, 0), own.masked_fill(~mask, 0), atol=1e-5)
        assert torch.allclose(t.masked_fill(~mask, 0), its.masked_fill(~mask, 0), atol=1e-5)
    kept = given["attention_mask"].bool()
    expected = sum((own - its)[kept].square().mean() for own, its in zip(states, theirs, strict=True))
    visible = (kept[:, None, :, None] & kept[:, None, None, :]).expand(-1, 2, -1, -1)
    expected += sum((own - its)[visible].square().mean() for own, its in zip(scores, their_scores, strict=True))
    settings = {"distill": {**WITHIN, "logits": 0, "task": 0}}
    alone = dwindle.prepare(model, settings, inputs=given, teacher=other)
    assert torch.allclose(alone.loss(given), expected, rtol=1e-4)


def test_losses_of_parts() -> None:
    s, t = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    kept = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.allclose(states_apart(s, t, kept=kept), (s - t)[kept].square().mean())
    cosine = 1 - torch.cosine_similarity(s, t, dim=-1)
    assert torch.allclose(states_apart(s, t, "cosine", kept), cosine[kept].mean())
    a, b = torch.randn(1, 2, 3, 3, requires_grad=True), torch.randn(1, 2, 3, 3)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    loss = scores_apart(a.masked_fill(causal, -torch.inf), b.masked_fill(causal, -torch.inf))
    assert torch.allclose(loss, (a - b)[..., ~causal].square().mean())
    loss.backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert float(scores_apart(a, torch.full_like(b, -1e4)).detach()) == 0


def test_a_decoder_beside_an_encoder_has_a_mask_of_its_own() -> None:
    mask, labels = torch.tensor([[1, 1, 0]]), torch.tensor([[5, -100, 3]])
    given = {"attention_mask": mask, "labels": labels}
    assert torch.equal(kept_states((1, 3), given), mask.bool())  # type: ignore[arg-type]  # not None
    assert torch.equal(kept_states((1, 3), given, True), labels != -100)  # type: ignore[arg-type]  # as above
    assert kept_states((1, 4), given) is None


def test_layers_that_stayed_learn_from_what_they_were() -> None:
    model, given = bert(), batch()
    recipe = {"depth": {"keep_layers": [1, 3]}, "distill": WITHIN}
    student = dwindle.prepare(model, recipe, inputs=given, teacher=model)
    assert student.distillation is not None
    mine = [(str(pair.student), str(pair.teacher)) for pair in student.distillation.pairs]
    row = "bert.encoder.layer"
    assert mine == [
        (f"start of {row}", f"start of {row}"),
        *((f"end of {row}.{n}", f"end of {row}.{n}") for n in (1, 3)),
        *((f"scores of {row}.{n}", f"scores of {row}.{n}") for n in (1, 3)),
    ]
    (start, s, t), *_ = student.compare(given).within
    assert start.student == Tap("start", row)
    assert torch.equal(s, t)  # the embeddings are the same: DeepSpeed compares them with layer 0's output


@pytest.mark.parametrize(("layers", "expected"), [(None, [1, 3]), ((0, 3), [0, 3])])
def test_a_teacher_of_another_depth(layers: Any, expected: list[int]) -> None:
    given = batch()
    wanted = {"layers": layers, "embeddings": False}
    student = dwindle.prepare(bert(2), {"distill": {"hidden": wanted}}, inputs=given, teacher=bert(4))
    assert student.distillation is not None
    assert [int(pair.teacher.path[-1]) for pair in student.distillation.pairs] == expected


def test_one_block_is_a_row_too() -> None:
    student = dwindle.prepare(bert(1), {"distill": WITHIN}, inputs=batch(), teacher=bert(1))
    assert student.distillation is not None
    assert [pair.student.kind for pair in student.distillation.pairs] == ["start", "end", "scores"]


def test_a_wider_teacher_has_a_learned_projection_that_does_not_stay() -> None:
    given, teacher = batch(), bert(hidden=48, seed=1)
    student = dwindle.prepare(bert(2), {**W8, "distill": {"hidden": 1.0}}, inputs=given, teacher=teacher)
    (name,) = (n for n, _ in student.named_parameters() if n.startswith(PROJECTIONS))
    weight = student.get_parameter(name)
    assert weight.shape == (48, 32)
    before = weight.detach().clone()
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = student.loss(given)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        student.step()
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(weight, before)
    again = dwindle.prepare(bert(2), {**W8, "distill": {"hidden": 1.0}}, inputs=given, teacher=teacher)
    again.load_state_dict(student.state_dict())
    assert torch.equal(again.get_parameter(name), weight)
    again.load_state_dict(bert(2).state_dict())  # of the model alone
    small = student.finish()
    assert not [n for n in small.state_dict() if n.startswith(PROJECTIONS)]


def test_stages_and_an_early_end() -> None:
    given, model = batch(), bert(2)
    settings = {**WITHIN, "stages": 2, "kd_until": 8}
    student = dwindle.prepare(model, {"distill": settings}, inputs=given, teacher=bert(2, seed=1), total_steps=10)
    lessons = student.distillation
    assert lessons is not None
    parts = []
    for step in range(10):
        weights = lessons.settings.weights(step, lessons.stages)
        parts.append("".join(part[0] for part, weight in weights.items() if weight))
    assert parts == ["hs"] * 5 + ["tl"] * 3 + ["t"] * 2
    assert [stage.until for stage in lessons.settings.model_copy(update={"stages": 3}).staged(9)] == [3, 6, None]
    for _ in range(8):
        student.step(0.0)
    asked: list[Any] = []
    lessons.teacher.ask = lambda *a: asked.append(a)  # type: ignore[method-assign,assignment,return-value]
    assert torch.equal(student.loss(given), student(**given).loss)
    assert not asked


def test_the_teacher_is_asked_once_in_one_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    given, model, teacher = batch(), bert(2), bert(2, seed=1)
    student = dwindle.prepare(model, {"distill": WITHIN}, inputs=given, teacher=teacher)
    assert student.distillation is not None
    student.loss(given)
    asked: list[Teacher] = []
    ran: list[Tapping] = []  # graphs
    ask, run = Teacher.ask, Tapping._run

    def counted_ask(one: Teacher, *args: Any) -> Any:
        asked.append(one)
        return ask(one, *args)

    def counted_run(one: Tapping, *args: Any) -> Any:
        ran.append(one)
        return run(one, *args)

    monkeypatch.setattr(Teacher, "ask", counted_ask)
    monkeypatch.setattr(Tapping, "_run", counted_run)
    teacher.register_forward_hook(lambda *_: pytest.fail("the module is called beside its graph"))
    student.loss(given).backward()
    assert asked == [student.distillation.teacher]
    assert len(ran) == 2
    assert sum(one is student for one in ran) == 1  # so the other one is the teacher's
    assert all(p.grad is None for p in teacher.parameters())


def test_a_copy_has_the_teacher_and_gradients_of_its_own() -> None:
    given, model = batch(), bert(2)
    student = dwindle.prepare(model, {"distill": WITHIN}, inputs=given, teacher=bert(2, hidden=32, seed=1))
    other = copy.deepcopy(student)
    loss = other.loss(given)
    assert torch.equal(loss, student.loss(given))
    loss.backward()
    assert all(p.grad is None for p in student.parameters())
    assert any(p.grad is not None for p in other.parameters())


def test_taps_on_modules() -> None:
    given = batch()
    tap = {"student": "bert.pooler.dense", "loss": "cosine", "weight": 2.0}
    settings = {"taps": [tap], "logits": 0, "task": 0}
    model, teacher = bert(2), bert(2, seed=1)
    student = dwindle.prepare(model, {"distill": settings}, inputs=given, teacher=teacher)
    seen: list[Tensor] = []
    for one in (model, teacher):
        hook = one.bert.pooler.dense.register_forward_hook(lambda m, a, o: seen.append(o))
        one(**given)
        hook.remove()
    assert torch.allclose(student.loss(given), 2 * (1 - torch.cosine_similarity(*seen, dim=-1)).mean(), atol=1e-5)


def test_a_wrapper_and_checkpointing_change_nothing() -> None:
    given = batch()
    settings = {**W8, "distill": WITHIN}
    model, teacher = bert(2), bert(2, seed=1)
    student = dwindle.prepare(model, settings, inputs=given, teacher=teacher)
    student.train()

    def learned(**more: Any) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)  # dropout draws the same
        student.zero_grad()
        loss = student.loss(given, **more)
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    plain, grads = learned()
    student.activation_checkpointing_enable()
    wrapped, again = learned(model=lambda **kwargs: student(**kwargs))
    assert torch.equal(plain, wrapped)
    torch.testing.assert_close(again, grads)


@pytest.mark.parametrize(
    ("settings", "teacher", "match"),
    [
        ({"hidden": {"row": "encoder"}}, {}, "no blocks at 'encoder'"),
        ({"hidden": {"layers": [0, 9]}}, {}, "numbers from 0 to 1"),
        ({"hidden": {"layers": [0]}}, {}, "2 numbers"),
        ({"taps": [{"student": "bert.poller"}]}, {}, "bert.pooler"),
        ({"scores": 1.0}, {"heads": 4}, "different shapes"),
        ({}, {"vocab": 60}, "different vocabularies"),
        ({"hidden": 1.0}, {"layers": 1}, "more layers than the teacher"),
    ],
)
def test_what_cannot_be_compared_is_said_before_training(settings: Any, teacher: Any, match: str) -> None:
    other = bert(teacher.pop("layers", 2), seed=1, **teacher)
    with pytest.raises(DistillationError, match=match):
        dwindle.prepare(bert(2), {"distill": settings}, inputs=batch(), teacher=other)


def test_attention_that_cannot_be_seen_says_how_to_un_fuse_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mix(x, x, x)[0]  # type: ignore[no-any-return]  # scores (B H, queries, keys)

    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(2, 5, 16)
    with pytest.raises(DistillationError, match="attn_implementation"):
        dwindle.prepare(model, {"distill": {"scores": 1.0}}, inputs=x, teacher=model)


@pytest.mark.parametrize(
    "settings",
    [
        {"kd_until": 5, "task": 0},
        {"stages": [{"until": 5}]},
        {"stages": [{}, {}]},
        {"stages": [{"until": 5}, {"until": 5}, {}]},
        {"stages": 4},
        {"hidden": {"loss": "l1"}},
    ],
)
def test_settings_that_make_no_sense(settings: Any) -> None:
    with pytest.raises(RecipeError):
        dwindle.Recipe.of({"distill": settings})


def test_stages_by_number_want_the_number_of_steps() -> None:
    with pytest.raises(RecipeError, match="total_steps"):
        dwindle.prepare(bert(2), {"distill": {**WITHIN, "stages": 3}}, inputs=batch(), teacher=bert(2))
