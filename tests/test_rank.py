"""Which layers matter: what is measured equals what is computed by hand, and the search what trying all would find."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import ROWS, by_hooks, gpt2, identity, unlabelled, without
from models import ZOO
from torch import Tensor, nn

from dwindle.frontends.rank import rank_layers
from dwindle.passes.influence import cosines
from dwindle.runtime.errors import RecipeError


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_influence_is_what_hooks_see_on_tokens_that_are_no_padding(name: str) -> None:
    model, inputs = ZOO[name]()
    ranking = rank_layers(model, [inputs], quiet=True)
    (row,) = ranking.rows
    assert row.row == ROWS[name]
    expected = by_hooks(model, ROWS[name], inputs, inputs.get("attention_mask"))
    assert [block.influence for block in row.blocks] == pytest.approx(expected, rel=1e-5)
    assert list(ranking.order) == sorted(range(2), key=expected.__getitem__)


def test_an_encoder_decoder_has_two_rows_and_a_mask_for_each() -> None:
    model, inputs = ZOO["t5"]()
    masks = {
        "encoder.block": inputs["attention_mask"],
        "decoder.block": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }
    inputs["decoder_attention_mask"] = masks["decoder.block"]
    ranking = rank_layers(model, [inputs], quiet=True)
    assert [row.row for row in ranking.rows] == list(masks)
    for row, mask in masks.items():
        expected = by_hooks(model, row, inputs, mask)
        assert [block.influence for block in ranking[row].blocks] == pytest.approx(expected, rel=1e-5)
        (alone,) = rank_layers(model, [inputs], row=row, quiet=True).rows
        assert alone == ranking[row]
    with pytest.raises(RecipeError, match=r"(?s)several rows.*'encoder.block', 'decoder.block'"):
        ranking.order  # noqa: B018  # a property that raises
    with pytest.raises(RecipeError, match=r"(?s)not ranked.*'decoder.block'"):
        ranking["decoder.blocks"]
    with pytest.raises(RecipeError, match=r"(?s)means no row.*rows are encoder.block of 2"):
        rank_layers(model, [inputs], row="decoder.blocks", quiet=True)


def outputs_of(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(**batch).logits.double() for batch in batches]


def relative(before: list[Tensor], after: list[Tensor], batches: list[dict[str, Tensor]]) -> float:
    kept = [batch["attention_mask"].bool() for batch in batches]
    a, b = (torch.cat([t[keep] for t, keep in zip(side, kept, strict=True)]) for side in (before, after))
    return float((a - b).norm() / a.norm())


def divergence(before: list[Tensor], after: list[Tensor], batches: list[dict[str, Tensor]]) -> float:
    kept = [batch["attention_mask"].bool() for batch in batches]
    p, q = (torch.cat([t[keep] for t, keep in zip(side, kept, strict=True)]).softmax(-1) for side in (before, after))
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize(("measure", "by_hand"), [("output", relative), ("logits", divergence)])
def test_change_is_that_of_the_model_without_the_layer(measure: Any, by_hand: Callable[..., float]) -> None:
    model, batches = gpt2()
    batches = unlabelled(batches)
    whole = outputs_of(model, batches)
    expected = [by_hand(whole, outputs_of(without(model, ROWS["gpt2"], i), batches), batches) for i in range(4)]
    (row,) = rank_layers(model, batches, by="change", measure=measure, quiet=True).rows
    assert [block.change for block in row.blocks] == pytest.approx(expected, rel=1e-4)
    assert list(row.order) == sorted(range(4), key=expected.__getitem__)
    assert min(expected) > 0.01


def test_change_of_the_loss() -> None:
    model, batches = gpt2()

    def loss(of: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(of(**batch).loss) for batch in batches) / len(batches)

    expected = [loss(without(model, ROWS["gpt2"], i)) - loss(model) for i in range(4)]
    (row,) = rank_layers(model, batches, by="change", measure="loss", quiet=True).rows
    assert [block.change for block in row.blocks] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    (plain,) = rank_layers(model, unlabelled(batches), by="change", quiet=True).rows
    (with_loss,) = rank_layers(model, batches, by="change", quiet=True).rows
    assert [b.change for b in with_loss.blocks] == pytest.approx([b.change for b in plain.blocks])  # it is no output


class Writes(nn.Module):
    """Blocks that write their input in place, count their calls in a buffer, and draw noise."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = x + torch.rand_like(x) * 0.01
        for i, row in enumerate(self.rows):
            x = x + row(x) * (i + 1)
            x.mul_(self.calls)
        return x


def test_a_graph_that_writes_and_draws_is_run_from_its_inputs() -> None:
    torch.manual_seed(0)
    model, x = Writes().eval(), torch.randn(4, 8)
    (row,) = rank_layers(model, [x], row="rows", by="greedy", quiet=True).rows
    assert float(model.calls) == 0

    def call(*gone: int) -> Tensor:
        other = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            other.calls.add_(1)
            y = x + torch.rand_like(x) * 0.01
            for i, block in enumerate(model.rows):
                y = y + block(y) * (i + 1) if i not in gone else y + y * (i + 1)
                y.mul_(other.calls)
            return y

    whole = call()
    expected = [float((call(i) - whole).norm() / whole.norm()) for i in range(3)]
    assert [block.change for block in row.blocks] == pytest.approx(expected, rel=1e-4)
    assert row.changes[1] == pytest.approx(float((call(*row.order) - whole).norm() / whole.norm()), rel=1e-4)


@pytest.mark.parametrize("by", ["influence", "change", "greedy"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "t5"])
def test_a_block_that_adds_nothing_goes_first(name: str, by: Any) -> None:
    model, inputs = ZOO[name]()
    identity(model, name, 0)
    (row,) = rank_layers(model, [inputs], row=ROWS[name], by=by, quiet=True).rows
    assert row.order[0] == 0
    assert row.blocks[0].influence == pytest.approx(0, abs=1e-12)
    assert row.blocks[1].influence > 1e-3  # type: ignore[operator]  # it is measured
    if by != "influence":
        assert row.blocks[0].change == pytest.approx(0, abs=1e-6)
    assert row.keep(1) == (1,)


def test_of_equals_the_later_goes_first() -> None:
    model, batches = gpt2()
    for number in (0, 2, 3):
        identity(model, "gpt2", number)
    for by in ("influence", "change", "greedy"):
        ranking = rank_layers(model, unlabelled(batches), by=by, quiet=True)  # type: ignore[arg-type]  # they are ways
        assert ranking.order[:3] == (3, 2, 0), by
        assert ranking.keep(2) == (0, 1)
    assert ranking.within(1e-5) == (1,)


def test_the_greedy_search_is_that_of_trying_all() -> None:
    model, batches = gpt2(5)
    batches = unlabelled(batches)
    whole = outputs_of(model, batches)
    gone: list[int] = []
    changes: list[float] = []
    while len(gone) < 4:
        tried = {
            i: relative(whole, outputs_of(without(model, ROWS["gpt2"], *gone, i), batches), batches)
            for i in range(5)
            if i not in gone
        }
        gone.append(min(tried, key=tried.__getitem__))
        changes.append(tried[gone[-1]])
    ranking = rank_layers(model, batches, by="greedy", quiet=True)
    assert list(ranking.order) == gone
    assert ranking.rows[0].changes == pytest.approx(changes, rel=1e-4)
    assert ranking.keep(2) == tuple(sorted({*range(5)} - {*gone[:3]}))
    short = rank_layers(model, batches, by="greedy", keep=3, quiet=True)
    assert list(short.order) == gone[:2]
    with pytest.raises(RecipeError, match="a search that ended at 3"):
        short.keep(2)
    limit = (changes[0] + changes[1]) / 2
    within = rank_layers(model, batches, by="greedy", max_change=limit, quiet=True)
    stay = tuple(sorted({*range(5)} - {gone[0]}))
    assert within.within(limit) == within.keep(4) == ranking.within(limit) == stay
    assert ranking.within(changes[0] / 2) == (0, 1, 2, 3, 4)


def test_a_convolution_has_its_tokens_where_the_pixels_are() -> None:
    model, inputs = ZOO["resnet"]()
    row = "resnet.encoder.stages.0.layers"
    expected = by_hooks(model, row, inputs, None, channels=1)
    (ranking,) = rank_layers(model, [inputs], row=row, quiet=True).rows
    assert [block.influence for block in ranking.blocks] == pytest.approx(expected, rel=1e-4)
    rows = [ranking.row for ranking in rank_layers(model, [inputs], quiet=True).rows]
    assert "resnet.encoder.stages" in rows
    assert row not in rows  # the stage can go as a whole


@pytest.mark.parametrize("padding", [1, "same"])
def test_however_its_padding_is_said(padding: int | str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(6, 6, 3, padding=padding)

        def forward(self, x: Tensor) -> Tensor:
            """(B, 6, T), channels first."""
            return x + self.mix(x)

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block(), Block()).eval(), torch.randn(2, 6, 9)
    expected = by_hooks(model, "", {"input": x}, None, channels=1)
    (ranking,) = rank_layers(model, [x], quiet=True).rows
    assert [block.influence for block in ranking.blocks] == pytest.approx(expected, rel=1e-4)


def test_cosines_of_zeros() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 3.0]])
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.1, 0.1]])
    assert cosines(x, y).tolist() == pytest.approx([1, 0, 0, 1])
