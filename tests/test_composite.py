"""Composite calls are written out where no pass knows them, at any size, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pruning import groups_of, outputs, random_cut, walked
from rules import ROWS, Around, called, told
from torch import Tensor, nn
from torch.nn import functional as F

import dwindle
from dwindle.passes.composite import write_out
from dwindle.passes.prune.proof import proven
from dwindle.passes.prune.transfer import rule_of
from dwindle.runtime.model import flat_outputs


class Cells(nn.Module):
    """An LSTM's cell and a GRU's, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.LSTMCell(6, 16), nn.GRUCell(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16)
        state = x.new_zeros(x.shape[0], 12)
        for i in range(3):
            h, c = self.first(x[:, i], (h, c))
            state = self.second(h, state)
        return self.last(state)


@pytest.mark.parametrize(
    ("name", "function", "groups"),
    [
        ("hstack", lambda m, x: m.b(torch.hstack([m.a(x)[:, :4], m.a(x)[:, 4:]])), 2),
        ("pairwise_distance", lambda m, x: m.b(m.a(x) * F.pairwise_distance(m.a(x), m.a(x) * 2)[:, None]), 1),
        ("tensordot", lambda m, x: torch.tensordot(m.a(x), m.b.weight, dims=([1], [1])), 1),
        ("fliplr", lambda m, x: m.b(m.a(x).fliplr()), 0),
    ],
)
def test_a_composite_call_is_pruned_through(name: str, function: Callable[..., Tensor], groups: int) -> None:
    model = Around(function, {"a": lambda: nn.Linear(6, 12), "b": lambda: nn.Linear(12, 3)}).eval()
    walk, batch = walked(model, torch.randn(ROWS))
    assert name not in called(walk)
    found = groups_of(walk)
    assert len(found) == groups, list(map(told, found))
    if found:
        assert proven(walk, random_cut(found, 0.4), [batch]) < 1e-12
    assert torch.equal(flat_outputs(walk.program.run(batch))[0], model(*batch))
    targets = [node.target for node in walk.program.graph.nodes]
    write_out(walk.program, rule_of)
    assert [node.target for node in walk.program.graph.nodes] == targets


def test_what_has_a_rule_stays_whole() -> None:
    model = Around(lambda m, x: F.cosine_similarity(m.a(x), x), {"a": lambda: nn.Linear(6, 6)})
    assert "cosine_similarity" in called(walked(model, torch.randn(ROWS))[0])


def test_what_is_written_in_place_stays_whole() -> None:
    model = Around(lambda m, x: torch.ops.aten.fill_diagonal_(m.a(x), 0.0), {"a": lambda: nn.Linear(6, 6)})
    assert "fill_diagonal_" in called(walked(model, torch.randn(ROWS))[0])


def test_cells_are_written_out_at_any_size_and_train_on() -> None:
    x = torch.randn(3, 4, 6)
    model = Cells().eval()
    walk, _ = walked(model, x)
    assert not called(walk) & {"lstm_cell", "gru_cell"}
    small = dwindle.compress(model, {"prune": {"ratio": 0.5}}, inputs=x)
    assert small.store.get("first.weight_ih").shape == (4 * 8, 6)
    (y,) = outputs(small, {"x": torch.randn(7, 4, 6)})
    assert y.shape == (7, 3)
    small.train()
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
