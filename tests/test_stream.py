"""Many batches through one graph, node by node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwindle.frontends.capture import capture
from dwindle.passes.quantize.sites import find_sites
from dwindle.passes.stream import Stream
from dwindle.runtime.program import Program
from dwindle.runtime.store import Store


def program_of(model: nn.Module, x: Tensor) -> Program:
    return capture(model, {"input": x}, Store.of(model, clone=True))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def test_values_are_those_of_a_forward_and_are_let_go() -> None:
    model, batches = net(), [torch.randn(n, 6) for n in (2, 3, 2)]
    program = program_of(model, batches[0])
    sites = find_sites(program)
    with Stream(program, [[x] for x in batches]) as stream:
        assert len(stream) == 3
        for i, site in enumerate(sites):
            assert site.activation is not None
            for x, given in zip(batches, stream.values(site.activation), strict=True):
                assert torch.equal(given, model[: 2 * i](x) if i else x)
        first = sites[0].activation
        assert first is not None
        with pytest.raises(AssertionError, match="was let go"):
            stream.values(first)
        (output,) = (n for n in program.graph.nodes if n.op == "output")
        for x, (y,) in zip(batches, stream.values(output), strict=True):
            assert torch.equal(y, model(x))
    assert not any(run.env for run in stream._runs)


def test_what_was_changed_is_seen_by_what_comes_later() -> None:
    model, x = net(), torch.randn(2, 6)
    program = program_of(model, x)
    first, second, _ = find_sites(program)
    assert first.activation is not None
    assert second.activation is not None
    with Stream(program, [[x]]) as stream:
        stream.keep(first.activation)
        stream.values(first.activation)
        program.store.put(first.fqn, nn.Parameter(torch.zeros(5, 6)))
        (seen,) = stream.values(second.activation)
        assert torch.equal(seen, model[0].bias.relu().expand(2, 5))
        assert torch.equal(stream.values(first.activation)[0], x)  # kept
        stream.drop(first.activation)
        with pytest.raises(AssertionError, match="was let go"):
            stream.values(first.activation)


def test_inputs_and_buffers_that_a_graph_writes_stay_as_they_are() -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, input: Tensor) -> Any:
            self.seen.add_(1)
            return input.add_(1) * self.seen

    model, x = Counts(), torch.zeros(2, 3)
    program = program_of(model, x.clone())
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    with Stream(program, [[x], [x]]) as stream:
        stream.values(output)
    assert torch.equal(x, torch.zeros(2, 3))
    assert float(program.store.get("seen")) == 0  # type: ignore[arg-type]  # a tensor
