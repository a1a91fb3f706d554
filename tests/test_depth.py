"""Depth: a graph without some of its blocks is the model without them; and it is pruned, quantised and trained so."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import ROWS, without
from models import ZOO, first
from torch import Tensor, nn

import dwindle
from dwindle.frontends.capture import capture
from dwindle.frontends.resize import TransplantError
from dwindle.passes.canonicalize import canonicalize
from dwindle.passes.depth import Row, find_rows, spread_over
from dwindle.runtime.compressed import Compressed
from dwindle.runtime.errors import RecipeError
from dwindle.runtime.store import Store

EVERYTHING: dict[str, Any] = {
    "prune": {"ratio": 0.5, "scopes": ["heads", "rows"]},
    "quantize": [{"activation": {}}],
}


def rows(model: nn.Module, inputs: dict[str, Tensor]) -> list[Row]:
    program = canonicalize(capture(model, inputs, Store.of(model, clone=True)))
    program.tidy()
    return find_rows(program)


def shallow(name: str, layers: list[int], **more: Any) -> tuple[Compressed, nn.Module, dict[str, Tensor]]:
    model, inputs = ZOO[name]()
    rule = {"row": ROWS[name], "keep_layers": layers}
    return dwindle.compress(model, {"depth": rule, **more}, inputs=inputs), model, inputs


@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_a_graph_without_a_block_is_the_model_without_it(name: str, gone: int) -> None:
    small, model, inputs = shallow(name, [1 - gone])
    with torch.no_grad():
        torch.testing.assert_close(first(small(**inputs)), first(without(model, ROWS[name], gone)(**inputs)))
    path = f"{ROWS[name]}.{gone}"
    assert [edit.path for edit in small.plan.drops] == [path]
    assert not any(key.startswith(f"{path}.") for key in small.state_dict())


def test_the_position_bias_of_a_block_that_goes_stays() -> None:
    small, model, inputs = shallow("t5", [1])
    block = model.decoder.block[0]
    for part in (block.layer[0].SelfAttention.o, block.layer[1].EncDecAttention.o, block.layer[2].DenseReluDense.wo):
        nn.init.zeros_(part.weight)  # it adds nothing to what goes through it
    with torch.no_grad():
        torch.testing.assert_close(first(small(**inputs)), first(model(**inputs)))
    held = [key for key in small.state_dict() if key.startswith("decoder.block.0.")]
    assert held == ["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    with pytest.raises(TransplantError, match="hold nothing which others read"):
        dwindle.transplant(small, model, inputs=inputs)


class Tower(nn.Module):
    """Blocks of four kinds in one row: alike, one that is called twice, one that changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.blocks.append(nn.Sequential(nn.Linear(8, 6), nn.Tanh()))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.blocks[0](x)
        x = x + self.blocks[1](x)
        return self.blocks[3](self.blocks[1](self.blocks[2](x)))


def test_what_cannot_go_says_why() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    (row,) = rows(Tower().eval(), {"x": x})
    reasons = {block.number: block.reason for block in row.blocks}
    assert reasons[0] == reasons[2] == ""
    assert reasons[1] == "it is called 2 times"
    assert "the shape of what comes out" in reasons[3]
    with pytest.raises(RecipeError, match=r"(?s)blocks.1 cannot be dropped.*called 2 times.*keep it"):
        dwindle.compress(Tower().eval(), {"depth": {"keep_layers": [0, 2, 3]}}, inputs=x)


def test_of_several_streams_the_one_without_a_product_counts() -> None:
    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor, beside: Tensor) -> Tensor:
            return x + self.one(self.two(beside))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.ModuleList(Merging() for _ in range(2))

        def forward(self, x: Tensor, beside: Tensor) -> Tensor:
            for block in self.rows:
                x = block(x, beside)
            return x

    torch.manual_seed(0)
    model, inputs = Two().eval(), {"x": torch.randn(3, 8), "beside": torch.randn(3, 8)}
    small = dwindle.compress(model, {"depth": {"keep_layers": [0]}}, inputs=inputs)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs), model.rows[0](**inputs))


@pytest.mark.parametrize(
    ("spread", "found"),
    [("even", [1, 3, 5, 7, 9, 11]), ("ends", [0, 2, 4, 7, 9, 11]), ("first", [*range(6)]), ("last", [*range(6, 12)])],
)
def test_six_of_twelve(spread: Any, found: list[int]) -> None:
    assert spread_over(12, 6, spread) == found
    assert spread_over(12, 12, spread) == [*range(12)]
    assert len(set(spread_over(12, 5, spread))) == 5
    assert len(spread_over(12, 1, spread)) == 1


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"keep": 3}, "1 to 2 layers"),
        ({"keep": 0}, "greater than or equal to 1"),
        ({"keep_layers": [0, 0]}, "0 twice"),
        ({"keep_layers": [0, 5]}, "numbers from 0 to 1"),
        ({"keep_layers": []}, "at least one"),
        ({}, "either keep or keep_layers"),
        ({"keep": 1, "keep_layers": [1]}, "either keep or keep_layers"),
        ({"keep": 1, "row": "encoder.layers"}, r"rows are encoder.layer of 2"),
        ([{"keep": 1}, {"keep_layers": [1]}], "one rule for each row"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(rule: Any, words: str) -> None:
    model, inputs = ZOO["bert"]()
    with pytest.raises(RecipeError, match=words):
        dwindle.compress(model, {"depth": rule}, inputs=inputs)


def test_of_two_rows_one_has_to_be_named() -> None:
    model, inputs = ZOO["t5"]()
    with pytest.raises(RecipeError, match=r"(?s)several rows.*encoder.block of 2, decoder.block of 2"):
        dwindle.compress(model, {"depth": {"keep": 1}}, inputs=inputs)
    both = [{"row": row, "keep_layers": [0]} for row in ("encoder.block", "decoder.block")]
    small = dwindle.compress(model, {"depth": both}, inputs=inputs)
    assert [edit.path for edit in small.plan.drops] == ["encoder.block.1", "decoder.block.1"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_what_stays_is_pruned_and_quantised_in_one_run(name: str, tmp_path: Path) -> None:
    small, model, inputs = shallow(name, [0], **EVERYTHING)
    alone = without(model, ROWS[name], 1)
    apart = dwindle.compress(alone, EVERYTHING, inputs=inputs)
    assert torch.equal(first(small(**inputs)), first(apart(**inputs)))
    assert small.plan.slices == apart.plan.slices
    small.save(tmp_path / "small")
    loaded = dwindle.load(tmp_path / "small")
    assert loaded.plan == small.plan
    assert torch.equal(first(loaded(**inputs)), first(small(**inputs)))


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["dropped", "all"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_the_eager_module_follows(name: str, more: dict[str, Any]) -> None:
    small, model, inputs = shallow(name, [1], **more)
    eager = dwindle.transplant(small, model, inputs=inputs)
    with torch.no_grad():
        torch.testing.assert_close(first(eager(**inputs)), first(small(**inputs)))
    assert eager.config.num_hidden_layers == 1
    assert model.config.num_hidden_layers == 2
    assert all(p.requires_grad for p in eager.parameters()) == (not more)
    if name in ("gpt2", "llama"):
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        prompt = inputs["input_ids"][:1]
        cached, plain = (eager.generate(prompt, use_cache=use, **settings) for use in (True, False))
        assert torch.equal(cached, plain)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def stages() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(*(Residual() for _ in range(3))) for _ in range(3))).eval()


@pytest.mark.parametrize("more", [{}, {"quantize": [{"activation": {}}]}], ids=["dropped", "all"])
def test_the_eager_module_follows_where_rows_lie_in_rows(more: dict[str, Any]) -> None:
    model, x = stages(), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    rules = [{"row": "", "keep_layers": [1, 2]}, {"row": "1", "keep_layers": [1]}]
    small = dwindle.compress(model, {"depth": rules, **more}, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    assert isinstance(eager, nn.Sequential)
    assert [len(stage) for stage in eager] == [1, 3]  # type: ignore[arg-type]  # they are rows
    with torch.no_grad():
        torch.testing.assert_close(eager(x), small(x))
        if not more:
            torch.testing.assert_close(eager(x), model[2](model[1][1](x)))  # type: ignore[index]  # as above


@pytest.mark.parametrize("keep", [[0, 2], [1, 2], [2]], ids=str)
def test_the_eager_module_follows_where_blocks_share_a_weight(keep: list[int]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Sequential(nn.Sequential(Residual())) for _ in range(3))).eval(), torch.randn(4, 8)
    model[1][0][0].linear.weight = model[0][0][0].linear.weight  # type: ignore[index, union-attr]  # modules in rows
    small = dwindle.compress(model, {"depth": {"row": "", "keep_layers": keep}}, inputs=x)
    eager = dwindle.transplant(small, model, inputs=x)
    with torch.no_grad():
        torch.testing.assert_close(eager(x), nn.Sequential(*(model[i] for i in keep))(x))


def bart() -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2) | {"vocab_size": 96, "d_model": 16}
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings"), 32)
    ids = torch.randint(3, 90, (2, 7))
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes)).eval()
    return model, {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


@pytest.mark.parametrize(("side", "counts"), [("encoder", (1, 2)), ("decoder", (2, 1))])
@pytest.mark.parametrize("name", ["t5", "bart"])  # two configs, and one for both
def test_a_config_counts_the_layers_of_encoder_and_decoder_apart(
    name: str, side: str, counts: tuple[int, int], tmp_path: Path
) -> None:
    model, inputs = ZOO["t5"]() if name == "t5" else bart()
    row = f"{side}.block" if name == "t5" else f"model.{side}.layers"
    small = dwindle.compress(model, {"depth": {"row": row, "keep_layers": [0]}}, inputs=inputs)
    eager: Any = dwindle.transplant(small, model, inputs=inputs)
    names = ("num_layers", "num_decoder_layers") if name == "t5" else ("encoder_layers", "decoder_layers")
    assert tuple(getattr(eager.config, n) for n in names) == counts
    eager.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()  # a wrong number would make up weights
    with torch.no_grad():
        torch.testing.assert_close(first(again(**inputs)), first(small(**inputs)))


@pytest.mark.parametrize("more", [{}, EVERYTHING], ids=["dropped", "all"])
def test_what_stays_is_trained(more: dict[str, Any]) -> None:
    model, inputs = ZOO["bert"]()
    before = copy.deepcopy(model.state_dict())
    student = dwindle.prepare(model, {"depth": {"keep": 1}, **more}, inputs=inputs)
    assert not any("layer.0." in key for key in student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    student.train()
    for _ in range(3):
        first(student(**inputs)).square().mean().backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    small = student.eval().finish()
    assert torch.equal(first(small(**inputs)), first(student(**inputs)))
    hidden = small(**inputs, output_hidden_states=True)  # a variant that is captured after the cut
    assert torch.equal(first(hidden), first(small(**inputs)))
    assert [edit.path for edit in small.plan.drops] == ["encoder.layer.0"]
    student.load_state_dict(before)  # the whole model's
    assert torch.equal(
        student.state_dict()["encoder.layer.1.output.dense.weight"], model.encoder.layer[1].output.dense.weight
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_torch_compile_refuses_it() -> None:
    model, inputs = ZOO["bert"]()
    compiled = torch.compile(model, backend="dwindle", options={"recipe": {"depth": {"keep": 1}}})
    with pytest.raises(Exception, match=r"torch\.compile cannot prune"):
        compiled(**inputs)
