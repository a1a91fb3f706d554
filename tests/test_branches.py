"""Models that branch on a value: captured as they go for the example, and other inputs are refused, never mistaken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import error
from pruning import groups_of, random_cut, walked
from torch import Tensor, fx, nn

import dwindle
from dwindle.frontends.branches import Branches
from dwindle.frontends.capture import capture
from dwindle.passes.canonicalize import canonicalize
from dwindle.passes.prune.proof import LIMIT, proven
from dwindle.runtime.errors import CaptureError, ExportError
from dwindle.runtime.onnx.export import export_onnx
from dwindle.runtime.program import checks
from dwindle.runtime.store import Store

HALF = {"prune": [{"ratio": 0.5, "score": "l2"}]}


class _Net(nn.Module):
    """Twice as much in the middle where `asks` says so."""

    def __init__(self, asks: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.wide, self.narrow, self.asks = nn.Linear(8, 32), nn.Linear(32, 8), asks

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        h = self.wide(x).relu()
        if self.asks(h, n):
            h = h * 2
        return self.narrow(h)


def _off_tape(h: Tensor, n: Tensor) -> bool:
    with torch.no_grad():
        return bool((n < 0).any())


def _twice(h: Tensor, n: Tensor) -> bool:
    low = n.min().item() < 0
    return all(low for _ in range(2))


# Each is true where some number is negative.
ASKS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "truth": lambda h, n: (n < 0).any(),
    "item": lambda h, n: (n < 0).any().item(),
    "is_nonzero": lambda h, n: torch.is_nonzero((n < 0).any()),
    "among": lambda h, n: -1 in n,
    "integer": lambda h, n: n.min().item() < 0,
    "float": lambda h, n: n.double().min().item() < -0.5,
    "beside a size": lambda h, n: n.sum().item() < h.shape[0] * (h.shape[0] - 1) // 2,
    "no_grad": _off_tape,
    "asked twice": _twice,
}


def _net(asks: Callable[[Tensor, Tensor], Any] = ASKS["truth"]) -> _Net:
    torch.manual_seed(0)
    return _Net(asks).eval()


def _example(batch: int = 5, low: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 8, generator=torch.Generator().manual_seed(batch)), torch.arange(batch) + low


def _checks(small: Any) -> list[fx.Node]:
    return [node for program in small.variants.values() for node in program.graph.nodes if checks(node)]


@pytest.mark.parametrize("low", [0, -1])
@pytest.mark.parametrize("name", ASKS)
def test_one_side_is_served_and_the_other_refused(name: str, low: int) -> None:
    model = _net(ASKS[name])
    small = dwindle.compress(model, {}, inputs=_example(low=low))
    assert len(_checks(small)) == 1
    for batch in (5, 7, 1):
        assert torch.equal(small(*_example(batch, low)), model(*_example(batch, low)))
    with pytest.raises(CaptureError) as caught:
        small(*_example(low=-1 - low))
    assert (caught.value.required, caught.value.found) == (f"{low < 0} there, as on the example inputs", low == 0)
    assert all(part in str(caught.value) for part in ("test_branches.py:", "cure: "))


def test_a_condition_in_an_assert_is_kept() -> None:
    class Asserts(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            assert (input > 0).all()
            return super().forward(input)

    x = torch.rand(4, 8) + 0.1
    model = Asserts(8, 8).eval()
    small = dwindle.compress(model, {}, inputs=x)
    assert torch.equal(small(x), model(x))
    with pytest.raises(CaptureError, match=r"assert \(input > 0\)\.all\(\)"):
        small(-x)


@pytest.mark.parametrize("recipe", [HALF, "zeroquant-w8a8"])
def test_the_check_outlives_compression_copies_and_files(recipe: Any, tmp_path: Path) -> None:
    small = dwindle.compress(_net(), recipe, inputs=_example())
    saved = dwindle.load(small.save(tmp_path / "small"))
    assert sum(p.numel() for p in small.parameters()) < 400 or recipe != HALF  # of 552
    assert torch.equal(saved(*_example(7)), small(*_example(7)))
    for model in (small, saved):
        with pytest.raises(CaptureError, match="goes another way"):
            model(*_example(low=-1))


@pytest.mark.parametrize("name", ["truth", "integer"])
def test_a_cut_is_proved_on_whatever_numbers(name: str) -> None:
    walk, batch = walked(_net(ASKS[name]), _example())
    cut = random_cut(groups_of(walk), 0.3)
    other = [batch[0], batch[1] - 9]  # goes the other way: both forms are the one that was captured
    assert cut
    assert proven(walk, cut, [batch, other]) < LIMIT


def test_a_branch_on_what_the_weights_make_is_followed() -> None:
    model = _net(lambda h, n: h[0].sum() > h[1].sum())
    x, n = _example()
    small, other = dwindle.compress(model, {}, inputs=(x, n)), x.flip(0)[3:]
    assert torch.equal(small(x, n), model(x, n))
    with pytest.raises(CaptureError, match=r"(?s)required: True there.*found: False"):
        small(other, n[:2])


def test_a_student_learns_on_one_side() -> None:
    model = _net().train()
    student = dwindle.prepare(model, HALF, inputs=_example())
    student.train()
    student(*_example()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    with pytest.raises(CaptureError, match="goes another way"):
        student(*_example(low=-1))
    finished = student.finish()
    with pytest.raises(CaptureError, match="goes another way"):
        finished(*_example(low=-1))


def test_compiled_it_still_refuses() -> None:
    model = _net(lambda h, n: "\"'\\" and (n < 0).any())
    small = dwindle.compress(model, {}, inputs=_example())
    torch._dynamo.reset()
    compiled = torch.compile(small, fullgraph=True)
    assert error(compiled(*_example(7)), model(*_example(7))) < 1e-6
    with pytest.raises(RuntimeError, match=r"goes another way .*required: False there.*found: True.*cure: "):
        compiled(*_example(7, low=-1))


def test_the_compile_backend_leaves_branches_to_dynamo() -> None:
    model = _net()
    compiled = torch.compile(model, backend="dwindle", options={"recipe": {}, "inner": "eager"})
    for low in (0, -1):
        with torch.no_grad():
            assert torch.equal(compiled(*_example(low=low)), model(*_example(low=low)))


def test_onnx_cannot_check_and_is_refused(tmp_path: Path) -> None:
    small = dwindle.compress(_net(), {}, inputs=_example())
    with pytest.raises(ExportError, match=r"(?s)one side of a branch.*test_branches\.py:\d+: "):
        export_onnx(small, tmp_path / "small.onnx")
    assert not list(tmp_path.iterdir())


def test_verification_runs_on_the_whole_example() -> None:
    x, n = _example(low=0)
    n[4] = -1  # of two rows none is negative
    model = _net()
    small = dwindle.compress(model, {}, inputs=(x, n))
    assert torch.equal(small(x, n), model(x, n))


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_example_stays_behind(training: bool) -> None:
    x, n = _example()
    before = torch.SymBool.__bool__
    model = _net()
    program = canonicalize(capture(model, {"x": x, "n": n}, Store.borrowing(model), training=training))
    assert torch.SymBool.__bool__ is before
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert values
    assert all(value.real_tensor is None for value in values)
    assert not any(hasattr(value.untyped_storage(), "real_storage") for value in values)
    assert sum(checks(node) for node in program.graph.nodes) == 1


def test_a_model_that_export_takes_as_it_is_has_no_checks() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    assert not _checks(dwindle.compress(model, {}, inputs=torch.randn(4, 8)))


def test_a_decision_without_its_check_is_refused() -> None:
    branches = Branches()
    branches.lines.append("model.py:3: if x:")
    graph = fx.Graph()
    graph.output(())
    with pytest.raises(CaptureError, match=r"(?s)does not check it.*model\.py:3: if x:.*0 checks"):
        branches.require_kept(graph)


class _Halves(torch.autograd.Function):
    """x / 2 and its true gradient; a no_grad in a forward, where torch takes no gradients anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


class _WithHalves(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self[1](_Halves.apply(self[0](input)))
        return found


def test_gradients_pass_a_function_that_works_without_them() -> None:
    model, x = _WithHalves(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
    model(x).square().sum().backward()
    store = Store.of(model, clone=True)
    program = capture(model, {"input": x}, store, training=True)
    program.run([x])[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(store.get(name).grad, parameter.grad)


def test_a_translator_that_asks_for_padding() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    config = transformers.FSMTConfig(
        langs=["en", "de"], src_vocab_size=40, tgt_vocab_size=40, pad_token_id=1, **sizes, **heads
    )
    torch.manual_seed(0)
    model = transformers.FSMTForConditionalGeneration(config).eval()
    ids = torch.randint(3, 40, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    with torch.no_grad():
        small = dwindle.compress(model, {}, inputs=inputs)
        more = {name: torch.cat([t, t.flip(0)]) for name, t in inputs.items()}
        assert error(small(**more).logits, model(**more, use_cache=False).logits) < 1e-6
        pruned = dwindle.compress(model, HALF, inputs=inputs)
        inputs["decoder_input_ids"] = torch.cat([ids[:, :4], torch.full((3, 1), 1)], 1)
        for compressed in (small, pruned):
            with pytest.raises(CaptureError, match=r"modeling_fsmt\.py:\d+: if not padding_mask\.any\(\)"):
                compressed(**inputs)


class _Skipping(nn.Module):
    """Layers that are skipped at random in training, each asked for in its own way."""

    def __init__(self, chance: float, *, item: bool) -> None:
        super().__init__()
        self.layers, self.chance, self.item = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), chance, item

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            drawn = torch.rand([])
            if self.training and (drawn.item() if self.item else drawn) < self.chance:
                continue
            x = x + layer(x)
        return x


@pytest.mark.parametrize("item", [False, True])
def test_what_chance_decides_is_refused_when_it_is_captured(item: bool) -> None:
    x = torch.randn(4, 8)
    for seed in range(3):  # whatever way the example goes
        torch.manual_seed(seed)
        with pytest.raises(CaptureError, match=r"(?s)goes by chance, at .*drawn.*layerdrop=0"):
            dwindle.prepare(_Skipping(0.3, item=item).train(), {}, inputs=x)(x)
    for model in (_Skipping(0.3, item=item).eval(), _Skipping(0.0, item=item).train()):
        student = dwindle.prepare(model, {}, inputs=x)
        for seed in range(5):
            torch.manual_seed(seed)
            torch.testing.assert_close(student(x), model(x))
