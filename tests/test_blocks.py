"""Blocks cut out of a graph: each is what it was in the whole, and stands where the teacher's stands."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from models import ZOO
from torch import Tensor, nn

import dwindle
from dwindle.frontends.capture import capture
from dwindle.frontends.student import Student
from dwindle.passes.blocks import BlockPair, pair_blocks
from dwindle.passes.canonicalize import canonicalize
from dwindle.passes.stream import Stream
from dwindle.runtime.errors import DistillationError
from dwindle.runtime.program import Program
from dwindle.runtime.store import Store

BLOCKS = {
    "bert": ["encoder.layer.0", "encoder.layer.1"],
    "gpt2": ["transformer.h.0", "transformer.h.1"],
    "llama": ["model.layers.0", "model.layers.1"],
    "t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    "vit": ["vit.layers.0", "vit.layers.1"],
}
W4A8: dict[str, Any] = {
    "quantize": [{"weight": {"bits": 4, "group_size": 16}, "activation": {}}, {"operators": ["embedding"]}]
}


def captured(model: nn.Module, inputs: dict[str, Tensor]) -> Program:
    program = canonicalize(capture(model, inputs, Store.borrowing(model)))
    program.tidy()
    return program


def graph_of(student: Student) -> Program:
    return next(p for p in student.variants.values() if not p.contract.training)


@functools.cache
def parts(name: str, quantised: bool) -> tuple[list[BlockPair], Program, Program, list[Tensor]]:
    return cut(name, W4A8 if quantised else {})


def cut(name: str, recipe: dict[str, Any]) -> tuple[list[BlockPair], Program, Program, list[Tensor]]:
    model, inputs = ZOO[name]()
    student, teacher = graph_of(dwindle.prepare(model, recipe, inputs=inputs)), captured(model, inputs)
    found, left = pair_blocks(student, teacher, ())
    assert [lesson.part.path for lesson in found] == BLOCKS[name]
    assert not left
    return found, student, teacher, list(inputs.values())


def values(program: Program, nodes: Any, tensors: list[Tensor]) -> list[Any]:
    with Stream(program, [tensors]) as stream:
        for node in nodes:
            stream.keep(node)
        return [stream.values(node)[0] for node in nodes]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_alone_gives_what_it_gives_in_the_whole(name: str) -> None:
    found, student, _, tensors = parts(name, True)
    for lesson in found:
        part = lesson.part
        held = values(student, [*part.inputs, *part.outputs], tensors)
        given, expected = held[: len(part.inputs)], held[len(part.inputs) :]
        for y, t in zip(part.module(part.own)(*given), expected, strict=True):
            assert torch.equal(y, t)


@pytest.mark.parametrize("name", BLOCKS)
def test_on_the_teachers_values_an_equal_student_gives_the_teachers(name: str) -> None:
    found, _, teacher, tensors = parts(name, False)
    for lesson in found:
        given, expected = (values(teacher, nodes, tensors) for nodes in (lesson.given, lesson.wanted))
        for y, t in zip(lesson.part.module(lesson.part.own)(*given), expected, strict=True):
            assert torch.equal(y, t)


@pytest.mark.parametrize("name", BLOCKS)
def test_own_parameters_are_those_of_the_block_alone(name: str) -> None:
    found, *_ = parts(name, True)
    model, _ = ZOO[name]()
    shared = {n for n, _ in model.named_parameters() if "relative_attention_bias" in n}
    assert len(shared) == (2 if name == "t5" else 0)  # both in a first block, and read by all
    for lesson in found:
        inside = {n for n, _ in model.named_parameters() if n.startswith(f"{lesson.part.path}.")}
        assert set(lesson.part.own) == inside - shared


def test_what_is_quantised_on_the_way_in_belongs_to_the_block() -> None:
    found, student, teacher, tensors = parts("bert", True)
    first = found[0]
    assert len(first.part.inputs) == len(first.given)  # codes and scales of the input are no inputs
    given, student_given = values(teacher, first.given, tensors), values(student, first.part.inputs, tensors)
    part = first.part.module(first.part.own)
    assert not torch.equal(part(*given)[0], part(*student_given)[0])  # the student's embeddings are quantised


def test_padding_is_known_by_the_mask_of_the_same_sequence() -> None:
    for name, places in {"bert": [1, 1], "t5": [1, 1, None, None], "vit": [None, None]}.items():
        found, *_ = parts(name, False)
        assert [lesson.mask for lesson in found] == places


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Tower(nn.Module):
    """A block that is called twice, one whose weights another one has as well, and two that can be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Residual()) for _ in range(5))
        self.blocks[3][0].linear = self.blocks[2][0].linear  # type: ignore[index]  # a Sequential

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 1, 1, 2, 3, 4):
            x = self.blocks[i](x)
        return x


def test_what_cannot_be_learned_alone_is_left_with_the_reason() -> None:
    torch.manual_seed(0)
    model, x = Tower().eval(), {"x": torch.randn(4, 8)}
    found, left = pair_blocks(graph_of(dwindle.prepare(model, {}, inputs=x)), captured(model, x), ())
    assert [lesson.part.path for lesson in found] == ["blocks.0", "blocks.4"]
    assert left["blocks.1"] == "it is called 2 times"
    assert "others read all of its parameters" in left["blocks.2"]
    assert "others read all of its parameters" in left["blocks.3"]


def test_a_block_that_writes_what_it_is_given_is_left() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return self.linear(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(Residual()), nn.Sequential(Writes()), nn.Sequential(Residual())])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Net().eval(), {"x": torch.randn(4, 8)}
    found, left = pair_blocks(graph_of(dwindle.prepare(model, {}, inputs=x)), captured(model, x), ())
    assert [lesson.part.path for lesson in found] == ["blocks.0", "blocks.2"]
    assert "in place" in left["blocks.1"]


def test_what_a_block_writes_of_its_own_is_written() -> None:
    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            y[:, 0] = 0.0
            return x + y

    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Sequential(Cuts()) for _ in range(2))).eval(), torch.randn(4, 8)
    found, left = pair_blocks(graph_of(dwindle.prepare(model, {}, inputs=x)), captured(model, {"input": x}), ())
    assert not left
    for lesson, block in zip(found, model, strict=True):
        assert torch.equal(lesson.part.module(lesson.part.own)(x.clone())[0], block(x))


def test_blocks_that_are_missing_are_stood_for_by_what_goes_into_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(Residual()) for _ in range(5))).eval()
    x = torch.randn(4, 8)
    student = dwindle.prepare(model, {"depth": {"row": "", "keep_layers": [2, 4]}}, inputs=x)
    found, _ = pair_blocks(graph_of(student), captured(model, {"input": x}), student.plan.drops)
    assert [lesson.part.path for lesson in found] == ["2", "4"]
    for lesson, before, after in zip(found, (0, 3), (3, 5), strict=True):
        program = captured(model, {"input": x})
        names = {node.name: node for node in program.graph.nodes}
        (given,), (wanted,) = (
            values(program, [names[n.name] for n in nodes], [x]) for nodes in (lesson.given, lesson.wanted)
        )
        assert torch.equal(given, model[:before](x))
        assert torch.equal(wanted, model[:after](x))


def test_models_that_do_not_have_the_same_blocks_are_refused() -> None:
    bert, inputs = ZOO["bert"]()
    student = graph_of(dwindle.prepare(bert, W4A8, inputs=inputs))
    llama, tokens = ZOO["llama"]()
    with pytest.raises(DistillationError, match=r"(?s)no blocks where.*model\.layers of 2.*names: encoder\.layer"):
        pair_blocks(student, captured(llama, tokens), ())
    mlp, x = ZOO["mlp"]()
    with pytest.raises(DistillationError, match="no blocks to learn from"):
        pair_blocks(student, captured(mlp, x), ())
    x = torch.randn(4, 8)
    three, five = (nn.Sequential(*(nn.Sequential(Residual()) for _ in range(n))).eval() for n in (3, 5))
    shallow = graph_of(dwindle.prepare(three, {}, inputs=x))
    with pytest.raises(
        DistillationError, match=r"(?s)not have the same blocks.*the 5 of the teacher.*3 in the student"
    ):
        pair_blocks(shallow, captured(five, {"input": x}), ())


def test_another_width_is_refused() -> None:
    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.blocks = nn.Linear(8, width), nn.ModuleList(nn.Sequential(Residual(width)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            for block in self.blocks:
                x = block(x)
            return x

    x = {"x": torch.randn(4, 8)}
    student = graph_of(dwindle.prepare(Wide(8).eval(), {}, inputs=x))
    with pytest.raises(DistillationError, match=r"(?s)blocks\.0 takes something else.*, 12\).*, 8\)"):
        pair_blocks(student, captured(Wide(12).eval(), x), ())
