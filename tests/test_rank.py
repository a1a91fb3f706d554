"""Which layers matter: what is measured equals what is computed by hand, and the search what trying all would find."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import ZOO
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.frontends.rank import rank_layers
from dwindle.passes.influence import Ranking, cosines
from dwindle.runtime.errors import CalibrationError, RecipeError

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


def first(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


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


@pytest.mark.parametrize("by", ["influence", "change", "greedy"])
def test_a_recipe_asks_for_it_and_is_decided_once(by: str) -> None:
    model, batches = gpt2()
    batches = unlabelled(batches)
    ranking = rank_layers(model, batches, by=by, quiet=True)  # type: ignore[arg-type]  # it is a way
    recipe = {"depth": {"keep": 2, "by": by}, "quantize": [{"activation": {"range": "static"}}]}
    small = dwindle.compress(model, recipe, inputs=batches[0], data=iter(batches))  # read twice
    gone = [edit.path for edit in small.plan.drops]
    assert gone == [f"{ROWS['gpt2']}.{i}" for i in range(4) if i not in ranking.keep(2)]
    said = {entry.where: entry.reason for entry in small.log if entry.rule == f"drop.{by}"}
    assert list(said) == gone
    assert all(("influence" if by == "influence" else "output changes by") in reason for reason in said.values())
    named = {"depth": {"keep_layers": list(ranking.keep(2))}, "quantize": recipe["quantize"]}
    same = dwindle.compress(model, named, inputs=batches[0], data=batches)
    assert torch.equal(first(small(**batches[1])), first(same(**batches[1])))
    again = small(**batches[1], output_hidden_states=True)  # a variant of its own
    assert len(again.hidden_states) == 3
    assert torch.equal(again.logits, first(small(**batches[1])))


def test_training_goes_by_data_too() -> None:
    model, batches = gpt2()
    ranking = rank_layers(model, unlabelled(batches), by="greedy", measure="logits", quiet=True)
    limit = sum(ranking.rows[0].changes[:2]) / 2
    stay = ranking.within(limit)
    assert len(stay) == 3
    recipe = {"depth": {"max_change": limit, "by": "greedy", "measure": "logits"}}
    student = dwindle.prepare(model, recipe, inputs=unlabelled(batches)[0], data=unlabelled(batches))
    assert [edit.path for edit in student.plan.drops] == [f"{ROWS['gpt2']}.{i}" for i in range(4) if i not in stay]
    student.loss(batches[0]).backward()


def test_a_second_rule_goes_by_what_the_first_has_left() -> None:
    model, inputs = ZOO["t5"]()
    for part in ("SelfAttention.o", "EncDecAttention.o", "DenseReluDense.wo"):
        for number in (0, 1):
            for name, module in model.named_modules():
                if name.startswith(f"decoder.block.{number}.") and name.endswith(part):
                    nn.init.normal_(module.weight, std=0.3 * (number + 1))
    rules = [{"row": "encoder.block", "keep_layers": [1]}, {"row": "decoder.block", "keep": 1, "by": "change"}]
    small = dwindle.compress(model, {"depth": rules}, inputs=inputs, data=[inputs])
    drops = [edit.path for edit in small.plan.drops]
    assert drops[0] == "encoder.block.0"
    with torch.no_grad():
        whole = model(**inputs)
    apart: list[float] = []
    for number in (0, 1):
        both = [rules[0], {"row": "decoder.block", "keep_layers": [1 - number]}]
        found = dwindle.compress(model, {"depth": both}, inputs=inputs)(**inputs)
        kept = inputs["attention_mask"].bool()
        pairs = [(whole.logits, found.logits)]
        pairs += [(whole.encoder_last_hidden_state[kept], found.encoder_last_hidden_state[kept])]
        error = sum(float((a - b).detach().double().square().sum()) for a, b in pairs)
        apart.append(math.sqrt(error / sum(float(a.detach().double().square().sum()) for a, _ in pairs)))
    assert drops[1] == f"decoder.block.{apart.index(min(apart))}"
    said = next(e.reason for e in small.log if e.rule == "drop.change")
    assert float(said.split(" by ")[1].split()[0]) == pytest.approx(min(apart), rel=5e-3)


def batches_of(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    yield batch


def test_data_that_is_missing_or_says_nothing() -> None:
    model, batches = gpt2(2)
    (batch, _) = unlabelled(batches)
    recipe = {"depth": {"keep": 1, "by": "influence"}}
    with pytest.raises(CalibrationError, match=r"(?s)chooses layers by influence.*found: none.*cure: give data="):
        dwindle.compress(model, recipe, inputs=batch)
    with pytest.raises(CalibrationError, match=r"(?s)chooses layers by influence.*found: none.*cure: give data="):
        dwindle.prepare(model, recipe, inputs=batch)
    for none in (None, [], iter(())):
        with pytest.raises(CalibrationError, match=r"(?s)ranked by data.*required: data=.*cure: give a few batches"):
            rank_layers(model, none, inputs=batch, quiet=True)
    with pytest.raises(CalibrationError, match=r"(?s)at least one batch"):
        dwindle.compress(model, recipe, inputs=batch, data=[])
    masked = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(CalibrationError, match=r"(?s)influence of transformer.h.0 cannot.*no padding.*found: none"):
        rank_layers(model, [masked], quiet=True)
    with pytest.raises(CalibrationError, match=r"(?s)change of the loss.*labels in inputs=.*found: logits.*cure"):
        rank_layers(model, [batch], by="change", measure="loss", quiet=True)
    assert rank_layers(model, batches_of(batch), quiet=True).rows[0].row == ROWS["gpt2"]
    nn.init.constant_(model.get_parameter("transformer.h.1.mlp.c_fc.bias"), math.nan)
    with pytest.raises(CalibrationError, match=r"transformer\.h\.1 cannot be measured"):
        rank_layers(model, [batch], quiet=True)
    bert, inputs = ZOO["bert"]()
    with pytest.raises(CalibrationError, match=r"(?s)output with logits.*found: last_hidden_state, pooler_output"):
        rank_layers(bert, [inputs], by="change", measure="logits", quiet=True)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"keep": 3, "by": "influence"}, "1 to 2 layers"),
        ({"keep": 2, "by": "influence"}, r"(?s)keeps all layers of encoder.layer of 2.*leave the rule out"),
        ({"keep": 2}, r"(?s)keeps all layers of encoder.layer of 2.*leave the rule out"),
        ({"keep_layers": [1, 0]}, "keeps all layers"),
        ({"max_change": 1e-6, "by": "greedy"}, "keeps all layers"),
        ({"keep": 1, "by": "size"}, "'influence', 'change' or 'greedy'"),
        ({"keep": 1, "by": "influence", "spread": "even"}, "by in place of spread"),
        ({"keep_layers": [1], "by": "influence"}, "by in place of"),
        ({"keep": 1, "max_change": 0.1}, "max_change beside by: greedy"),
        ({"keep": 1, "by": "influence", "max_change": 0.1}, "max_change beside by: greedy"),
        ({"keep": 1, "by": "influence", "measure": "loss"}, "measure beside by: change"),
        ({"by": "greedy", "max_change": 0}, "greater than 0"),
        ({"by": "greedy"}, "either keep or keep_layers"),
        ([{"keep": 1, "by": "influence"}, {"keep_layers": [1]}], r"(?s)one rule for each row.*encoder.layer"),
    ],
    ids=str,
)
def test_rules_that_contradict_themselves(rule: Any, words: str) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(RecipeError, match=words):
        dwindle.compress(model, {"depth": rule}, inputs=inputs, data=[inputs])


def test_arguments_that_contradict_themselves() -> None:
    model, inputs = ZOO["bert"]()
    for wrong in ({"by": "size"}, {"keep": 0}, {"keep": 2}, {"by": "change", "max_change": 0.1}):
        with pytest.raises(RecipeError, match="required"):
            rank_layers(model, [inputs], quiet=True, **wrong)  # type: ignore[arg-type]  # that is the test
    ranking = rank_layers(model, [inputs], quiet=True)
    with pytest.raises(RecipeError, match=r"(?s)1 to 2 layers.*found: 3"):
        ranking.keep(3)
    with pytest.raises(RecipeError, match="an order by 'greedy'"):
        ranking.within(0.1)
    mlp, example = ZOO["mlp"]()
    with pytest.raises(RecipeError, match="no blocks that repeat"):
        rank_layers(mlp, [example], quiet=True)


def test_a_layer_that_all_calls_share_is_declined() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 99,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model = transformers.AlbertModel(transformers.AlbertConfig(intermediate_size=64, **sizes)).eval()
    batch = {"input_ids": torch.randint(3, 99, (2, 8))}
    ranking = rank_layers(model, [batch], quiet=True)
    assert ranking.order == ()
    assert "it is called 3 times" in str(ranking)
    with pytest.raises(RecipeError, match=r"(?s)one block, encoder.*it is called 3 times.*fewer calls"):
        dwindle.compress(model, {"depth": {"keep": 1, "by": "influence"}}, inputs=batch, data=[batch])
    with pytest.raises(RecipeError, match=r"(?s)one block, encoder.*it is called 3 times.*fewer calls"):
        dwindle.compress(model, {"depth": {"keep": 1}}, inputs=batch)


class Tower(nn.Module):
    """Two blocks that can go, and one between them that changes the width."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((8, 8), (8, 6), (6, 6))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in widths)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("by", ["influence", "change", "greedy"])
def test_blocks_that_cannot_go_are_listed_and_stay(by: Any) -> None:
    torch.manual_seed(0)
    model, x = Tower().eval(), torch.randn(16, 8)
    ranking = rank_layers(model, [x], by=by, quiet=True)
    assert sorted(ranking.order) == [0, 2]
    assert "blocks.1 stays: nothing that goes in has the shape of what comes out" in str(ranking)
    assert ranking.keep(1) == (1,)
    small = dwindle.compress(model, {"depth": {"keep": 1, "by": by}}, inputs=x, data=[x])
    assert [edit.path for edit in small.plan.drops] == ["blocks.0", "blocks.2"]
    frozen = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in ((8, 6), (6, 4), (4, 4)))).eval()
    with pytest.raises(RecipeError, match=r"(?s)2 layers.*at most 1.*found: 0: nothing that goes in.*keep more layers"):
        dwindle.compress(frozen, {"depth": {"row": "", "keep": 1, "by": by}}, inputs=x, data=[x])


def test_a_convolution_has_its_tokens_where_the_pixels_are() -> None:
    model, inputs = ZOO["resnet"]()
    row = "resnet.encoder.stages.0.layers"
    expected = by_hooks(model, row, inputs, None, channels=1)
    (ranking,) = rank_layers(model, [inputs], row=row, quiet=True).rows
    assert [block.influence for block in ranking.blocks] == pytest.approx(expected, rel=1e-4)
    rows = [ranking.row for ranking in rank_layers(model, [inputs], quiet=True).rows]
    assert "resnet.encoder.stages" in rows
    assert row not in rows  # the stage can go as a whole


def test_cosines_of_zeros() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 3.0]])
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.1, 0.1]])
    assert cosines(x, y).tolist() == pytest.approx([1, 0, 0, 1])


def test_nothing_of_the_model_changes_and_all_is_shown() -> None:
    model, batches = gpt2()
    before = copy.deepcopy(model.state_dict())
    model.train()
    ranking = rank_layers(model, unlabelled(batches), by="greedy", quiet=True)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    shown = str(ranking)
    for word in ("Layers of transformer.h by greedy", "goes", "influence", "with those before", "relative change"):
        assert word in shown
    (row,) = ranking.to_json()["rows"]
    assert row["order"] == ranking.order
    assert [block["number"] for block in row["blocks"]] == [0, 1, 2, 3]
    assert dwindle.rank_layers is rank_layers
    assert isinstance(ranking["transformer.h"], Ranking)


def test_progress_is_shown_once_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = gpt2(2)
    rank_layers(model, unlabelled(batches), by="change")
    shown = capsys.readouterr()
    assert "Ranking transformer.h" in shown.err
    assert not shown.out
    rank_layers(model, unlabelled(batches), quiet=True)
    assert not capsys.readouterr().err
