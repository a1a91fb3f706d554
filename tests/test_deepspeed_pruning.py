"""DeepSpeed's pruning sections: the recipes they become, what they may say of the graph, and training with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from deepspeed_configs import JSON, activations, engine, falling, group, technique
from hypothesis import assume, example, given
from hypothesis import strategies as st
from models import ZOO
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.deepspeed import init_compression, redundancy_clean
from dwindle.frontends.deepspeed.config import parse
from dwindle.frontends.deepspeed.pruning import pruned, sparsified
from dwindle.frontends.recipe import Recipe
from dwindle.passes.prune.groups import kept_count
from dwindle.passes.schedule import Ramp
from dwindle.runtime.errors import RecipeError
from dwindle.runtime.qtensor import QTensor

FFN = group(("intermediate.dense",), [[r"layer.\w+.output.dense"]], dense_ratio=0.6)
QKV = [["self.query", "self.key", "self.value"]]
HEADS = group(("attention.output.dense",), QKV, dense_ratio=0.6)
BERT = "encoder.layer.0."


def rows(*groups: JSON, **shared: Any) -> JSON:
    return technique({f"rp{i}": own for i, own in enumerate(groups)}, **{"schedule_offset": 0} | shared)


def heads(*groups: JSON, num_heads: int = 4, **shared: Any) -> JSON:
    return rows(*groups, **{"num_heads": num_heads} | shared)


def ratio_of(dense_ratio: float) -> float:
    (entry,) = pruned(parse(engine(row_pruning=rows(group(dense_ratio=dense_ratio)))))
    assert entry.ratio is not None
    return entry.ratio


def shape(model: Any, name: str) -> tuple[int, ...]:
    value = model.store.get(name)
    assert isinstance(value, Tensor | QTensor)
    return tuple(value.shape)


def compressed(name: str, **sections: JSON) -> Any:
    model, inputs = ZOO[name]()
    return dwindle.compress(model, engine(**sections), inputs=inputs)


def test_each_group_is_an_entry() -> None:
    cp = group(("conv1",), [["conv2", "bn1"], ["conv3"]][:1], dense_ratio=0.5)
    config = engine(
        row_pruning=rows(FFN, method="topk", schedule_offset=7),
        head_pruning=heads(HEADS, num_heads=12, schedule_offset=9),
        channel_pruning=rows(cp, group(("conv9",), dense_ratio=1.0)),
    )
    row, head, channel, all_stay = Recipe.of(config).prune
    assert (row.scopes, row.side, row.patterns, row.score) == (
        ("rows",),
        "outputs",
        ("intermediate.dense",),
        "movement",
    )
    assert (row.ratio, row.num_heads, row.related) == (0.4, None, (r"layer.\w+.output.dense",))
    assert (head.scopes, head.side, head.num_heads, head.score) == (("heads",), "inputs", 12, "movement")
    assert (head.related, head.section) == (tuple(QKV[0]), "head_pruning")
    assert (channel.scopes, channel.side, channel.score) == (("channels",), "outputs", "l1")
    assert (channel.related, all_stay.related, all_stay.ratio) == (("conv2", "bn1"), (), 0.0)
    assert [rule.ramp for rule in Recipe.of(config).prunes()[:2]] == [Ramp(offset=7), Ramp(offset=9)]
    assert [rule.modules for rule in Recipe.of(config).prunes()] == [()] * 4
    assert Recipe.of(Recipe.of(config).plain()) == Recipe.of(config)


@given(digits=st.integers(1, 4), k=st.integers(1, 10**4), n=st.integers(1, 10**5))
@example(digits=1, k=6, n=12)
@example(digits=2, k=7, n=100)
def test_as_many_stay_as_the_ratio_says(digits: int, k: int, n: int) -> None:
    """ceil(r n), the product being exact."""
    k = min(k, 10**digits)
    assert kept_count(n, ratio_of(k / 10**digits)) == max(1, -(-k * n // 10**digits))


@given(ratio=st.floats(1e-4, 1), n=st.integers(1, 10**5))
def test_as_many_stay_as_in_deepspeed(ratio: float, n: int) -> None:
    """ceil of the floats' product, except where that lies within its own error of a whole number."""
    assume(abs(ratio * n - round(ratio * n)) > 1e-8)
    assert kept_count(n, ratio_of(ratio)) == math.ceil(ratio * n)
    assert (math.ceil(0.07 * 100), kept_count(100, ratio_of(0.07))) == (8, 7)  # as the report says


def test_a_file_trains_and_what_was_masked_is_cut() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=12, intermediate_size=64
    )
    torch.manual_seed(0)
    model = BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() == 1 else 0.0)
    inputs = {"input_ids": torch.randint(3, 99, (2, 8))}
    data = engine(
        row_pruning=rows(FFN, method="l1", schedule_offset=2),
        head_pruning=heads(HEADS, num_heads=12, method="topk", schedule_offset=3),
        weight_quantization=falling(10, 8, 1, ("query", "key", "value", "dense")),
        activation_quantization=activations(("query", "key", "value", "dense")),
    )
    student = dwindle.prepare(model.train(), data, inputs=inputs)
    optimizer = torch.optim.SGD(student.parameters(), 0.05)
    for _ in range(5):
        student(**inputs)[0].square().mean().backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    small = student.eval().finish()
    stay, wide = math.ceil(0.6 * 12), math.ceil(0.6 * 64)  # 8 heads, 39 rows
    for i in range(2):
        block = f"encoder.layer.{i}."
        assert shape(small, f"{block}attention.self.query.weight") == (stay * 4, 48)
        assert shape(small, f"{block}attention.output.dense.weight") == (48, stay * 4)
        assert shape(small, f"{block}intermediate.dense.weight") == (wide, 48)
        assert shape(small, f"{block}output.dense.weight") == (48, wide)
    assert all(isinstance(small.store.get(edit.fqn), QTensor) for edit in small.plan.quantizations)
    torch.testing.assert_close(small(**inputs)[0], student(**inputs)[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("method", ["l1", "topk"])
def test_channels_are_exact_with_their_batch_norms(method: str) -> None:
    """DeepSpeed masks before the batch norm, and cleans to something else."""
    cp = group((r"layer\.0\.convolution",), [[r"layer\.1\.convolution", r"layer\.0\.normalization"]], dense_ratio=0.3)
    model, inputs = ZOO["resnet"]()
    student = dwindle.prepare(model.train(), engine(channel_pruning=rows(cp, method=method)), inputs=inputs)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    for _ in range(2):
        student(**inputs)[0].square().mean().backward()
        optimizer.step()
        student.step()
        optimizer.zero_grad()
    small = student.eval().finish()
    block = "resnet.encoder.stages.1.layers.0.layer."
    assert shape(small, f"{block}0.convolution.weight") == (5, 8, 3, 3)
    assert shape(small, f"{block}0.normalization.running_mean") == (5,)
    assert shape(small, f"{block}1.convolution.weight") == (16, 5, 3, 3)
    torch.testing.assert_close(small(**inputs)[0], student(**inputs)[0], rtol=1e-4, atol=2e-5)


class Stack(nn.Module):
    """(N, 6) to (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 20), nn.Linear(20, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(F.relu(self.two(F.relu(self.one(x)))))


def test_rows_are_outputs_and_not_the_inputs_of_the_module() -> None:
    x = torch.randn(5, 6)
    small = dwindle.compress(Stack(), engine(row_pruning=rows(group(("two",), dense_ratio=0.5))), inputs=x)
    assert [shape(small, f"{name}.weight") for name in ("one", "two", "three")] == [(20, 6), (5, 20), (2, 5)]
    other = {"ratio": 0.5, "modules": "two", "side": "inputs"}
    small = dwindle.compress(Stack(), {"prune": other}, inputs=x)
    assert [shape(small, f"{name}.weight") for name in ("one", "two", "three")] == [(10, 6), (10, 10), (2, 10)]
    both = dwindle.compress(Stack(), {"prune": {"ratio": 0.5, "patterns": "^two$"}}, inputs=x)
    assert [shape(both, f"{name}.weight") for name in ("one", "two", "three")] == [(10, 6), (5, 10), (2, 5)]


def test_conv1d_of_transformers_is_a_linear() -> None:
    """Its weights lie the other way, and query, key and value are one; DeepSpeed passed it over in silence."""
    ffn = group((r"mlp\.c_fc",), [[r"mlp\.c_proj"]], dense_ratio=0.5)
    own = group((r"attn\.c_proj",), [["c_attn"]], dense_ratio=0.5)
    small = compressed("gpt2", row_pruning=rows(ffn), head_pruning=heads(own, method="l1"))
    assert shape(small, "transformer.h.0.mlp.c_fc.weight") == (32, 64)
    assert shape(small, "transformer.h.1.attn.c_attn.weight") == (32, 48)
    assert shape(small, "transformer.h.1.attn.c_proj.weight") == (16, 32)


REFUSED: list[tuple[str, JSON, str]] = [
    (
        "bert",
        {"head_pruning": heads(HEADS, num_heads=12, method="l1")},
        r"graph says 4 .*num_heads 12.*set num_heads to 4",
    ),
    (
        "llama",
        {"head_pruning": heads(group(("o_proj",), dense_ratio=0.5), method="l1")},
        r"graph says 2 .*share keys and values count as one.*num_heads 4",
    ),
    (
        "bert",
        {"head_pruning": heads(group(("n.output.dense",), [["query", "intermediate"]], dense_ratio=0.5), method="l1")},
        r"related_modules names encoder.layer.0.intermediate.dense.*graph says .*self.key.*'intermediate'",
    ),
    (
        "bert",
        {"row_pruning": rows(group(("layer.0.intermediate",), [[r"layer.\w+.output.dense"]], dense_ratio=0.5))},
        r"related_modules names encoder.layer.1.output.dense",
    ),
    (
        "bert",
        {"row_pruning": rows(group(("intermediate",), [["nowhere"]], dense_ratio=0.5))},
        r"'nowhere' matches nothing.*nearest",
    ),
    ("bert", {"row_pruning": rows(group(("intermediat.dense",), dense_ratio=0.5))}, r"matches nothing.*intermediate.d"),
    (
        "bert",
        {"row_pruning": rows(group(("query",), dense_ratio=0.5))},
        r"row_pruning names encoder.layer.0.attention.self.query.*outputs that are rows.*heads of 4",
    ),
    (
        "bert",
        {"row_pruning": rows(group(("output.dense",), dense_ratio=0.5))},
        r"row_pruning names encoder.layer.0.attention.output.dense.*hidden of 32, which stay: it is an output",
    ),
    ("bert", {"row_pruning": rows(group(None, dense_ratio=0.5))}, r"row_pruning names .*outputs that are rows"),
    ("bert", {"head_pruning": heads(group(("query",), dense_ratio=0.5))}, r"names .*query, whose inputs.*hidden of 32"),
    (
        "bert",
        {"row_pruning": rows(group(("intermediate", "layer.0.inter"), dense_ratio=0.5))},
        r"two patterns of row_pruning choose encoder.layer.0.intermediate.dense",
    ),
    (
        "llama",
        {"row_pruning": rows(group(("gate_proj",), dense_ratio=0.5), group(("up_proj",), dense_ratio=0.75))},
        r"two entries of row_pruning choose what is one group.*gate_proj.*one of different_groups",
    ),
    ("resnet", {"channel_pruning": rows(group(("classifier",), dense_ratio=0.5))}, r"channel_pruning names classifier"),
]


@pytest.mark.parametrize(("name", "sections", "said"), REFUSED, ids=[said[:40] for *_, said in REFUSED])
def test_what_the_graph_does_not_say_is_refused(name: str, sections: JSON, said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){said}"):
        compressed(name, **sections)


def test_one_entry_may_name_all_that_is_one_group() -> None:
    both = group(("gate_proj", "up_proj"), [["down_proj"], ["down_proj"]], dense_ratio=0.5)
    small = compressed(
        "llama",
        row_pruning=rows(both),
        head_pruning=heads(group(("o_proj",), dense_ratio=0.5), num_heads=2, method="l1"),
    )
    assert shape(small, "model.layers.0.mlp.up_proj.weight") == (24, 32)
    assert shape(small, "model.layers.0.self_attn.q_proj.weight") == (16, 32)


def test_what_is_learned_needs_training() -> None:
    with pytest.raises(RecipeError, match=r"movement is learned.*\n.*prepare"):
        compressed("bert", row_pruning=rows(FFN, method="topk"))


@pytest.mark.parametrize("key", ["patterns", "related"])
def test_patterns_are_regular_expressions(key: str) -> None:
    with pytest.raises(RecipeError, match="no regular expression"):
        Recipe.of({"prune": {"ratio": 0.5, key: "layer.["}})


def test_a_recipe_of_ones_own_may_expect_too() -> None:
    model, inputs = ZOO["bert"]()
    rule = {"ratio": 0.5, "scopes": "heads", "num_heads": 4, "related": "query"}
    assert shape(dwindle.compress(model, {"prune": rule}, inputs=inputs), f"{BERT}attention.self.key.weight") == (
        16,
        32,
    )
    with pytest.raises(RecipeError, match="the graph says 4"):
        dwindle.compress(model, {"prune": rule | {"num_heads": 5}}, inputs=inputs)


@pytest.mark.parametrize("name", ["row_pruning", "head_pruning", "channel_pruning", "sparse_pruning"])
def test_nothing_is_pruned_in_place(name: str) -> None:
    section = heads(FFN) if name == "head_pruning" else rows(FFN)
    model, _ = ZOO["mlp"]()
    for call in (init_compression, redundancy_clean):
        with pytest.raises(RecipeError, match=rf"(?s)not pruned in place.*{name}.*dwindle.prepare.*dwindle.compress"):
            call(model, engine(**{name: section}))


def sparse(*groups: JSON, **shared: Any) -> tuple[JSON, ...]:
    section = parse(engine(sparse_pruning=rows(*groups, **shared))).sparse_pruning
    assert section is not None
    return sparsified(section)


@pytest.mark.parametrize(("method", "score"), [("l1", "l1"), ("topk", "movement")])
def test_single_weights(method: str, score: str) -> None:
    first, second = group(("query",), dense_ratio=0.9), group(("dense", "key"), dense_ratio=0.25)
    found = sparse(first, second, method=method, schedule_offset=5)
    common: JSON = {"pattern": "unstructured", "score": score, "operators": ("linear", "conv2d"), "budget": "layer"}
    common["schedule"] = {"type": "cubic", "offset": 5, "length": 0, "every": 1}
    assert found == (
        {"ratio": 0.1, "patterns": ("query",), **common},
        {"ratio": 0.75, "patterns": ("dense", "key"), **common},
    )


@pytest.mark.parametrize(("block", "pattern"), [("4x1", "4x1"), ("2:4", "2:4"), ("1:4", "3:4")])
def test_snip_momentum(block: str, pattern: str) -> None:
    shared = {"method": "snip_momentum", "schedule_offset": 1000, "schedule_offset_end": 51500, "dense_ratio": 0.2}
    more = {"schedule_offset_stride": 1000, "block_pattern": block, "excluded_modules": ["classifier"]}
    (entry,) = sparse(**shared, **more)
    assert entry == {
        "ratio": 0.8,
        "pattern": pattern,
        "score": "snip_momentum",
        "exclude": ("classifier",),
        "operators": ("linear", "conv1d", "conv2d"),
        "budget": "network",
        "schedule": {"type": "exponential", "offset": 1000, "length": 50000, "every": 1000},
    }


@pytest.mark.parametrize(
    ("block", "said"), [("channelx1", "whole channels"), ("1xchannel", "whole"), ("4:4", "0 < N < M")]
)
def test_blocks_that_are_refused(block: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        sparse(method="snip_momentum", block_pattern=block)
