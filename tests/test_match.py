"""The matcher and the rewrite engine, on graphs small enough to read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from dwindle.frontends.capture import capture
from dwindle.passes.match import Call, Index, Literal, Match, Maybe, Miss, Stored, Var, full_args, match
from dwindle.passes.rewrite import Rule, apply_rules
from dwindle.runtime.contract import Contract, Input
from dwindle.runtime.program import Program
from dwindle.runtime.store import Store

aten = torch.ops.aten
ADD, MUL, RELU, SIGMOID = aten.add.Tensor, aten.mul.Tensor, aten.relu.default, aten.sigmoid.default


class Tiny:
    """A graph under construction: inputs x and y, a stored w."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.y = self.graph.placeholder("x"), self.graph.placeholder("y")
        self.w = self.graph.get_attr("w")

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def program(self, *outputs: fx.Node) -> Program:
        self.graph.output(outputs)
        store = Store()
        store.put("w", nn.Parameter(torch.full((2,), 3.0)))
        structure = {"kind": "dict", "items": {"x": {"kind": "tensor"}, "y": {"kind": "tensor"}}}
        inputs = (Input("x", "float32", (2,)), Input("y", "float32", (2,)))
        parts = [{"kind": "tensor"} for _ in outputs]
        return Program.of(self.graph, store, Contract(False, structure, inputs, {"kind": "tuple", "items": parts}))


@pytest.fixture
def g() -> Tiny:
    return Tiny()


def missed(pattern: Call, root: fx.Node) -> Miss:
    found = match(pattern, root)
    assert isinstance(found, Miss)
    return found


def matched(pattern: Call, root: fx.Node) -> Match:
    found = match(pattern, root)
    assert isinstance(found, Match), found
    return found


# The matcher


def test_bindings_and_nodes(g: Tiny) -> None:
    inner = g.call(MUL, g.x, g.w)
    root = g.call(ADD, inner, g.y)
    found = matched(Call(ADD, Call(MUL, Var("a"), Stored("w"), name="inner"), Var("b")), root)
    assert found.root is root
    assert found.nodes == (root, inner)
    assert found.bindings == {"a": g.x, "w": g.w, "inner": inner, "b": g.y}
    assert found["inner"] is inner


def test_commuted_operands(g: Tiny) -> None:
    inner = g.call(RELU, g.x)
    one, other = g.call(ADD, inner, g.y), g.call(ADD, g.y, inner)
    pattern = Call(ADD, Call(RELU, Var("a"), shared=True), Var("b"), commutative=True)
    for root in (one, other):
        assert matched(pattern, root).bindings == {"a": g.x, "b": g.y}
    fixed = Call(ADD, Call(RELU, Var("a"), shared=True), Var("b"))
    assert match(fixed, one)
    assert missed(fixed, other).reason == "required aten.relu.default, found y (y)"


def test_a_failed_order_leaves_no_binding(g: Tiny) -> None:
    """The first order binds a to x before it fails; the second must not see that."""
    root = g.call(ADD, g.call(RELU, g.x), g.call(SIGMOID, g.y))
    pattern = Call(ADD, Call(SIGMOID, Var("a")), Call(RELU, Var("b")), commutative=True)
    assert matched(pattern, root).bindings == {"a": g.y, "b": g.x}


def test_one_node_bound_twice(g: Tiny) -> None:
    silu = Call(MUL, Var("x"), Call(SIGMOID, Var("x")), commutative=True)
    assert matched(silu, g.call(MUL, g.call(SIGMOID, g.x), g.x))["x"] is g.x
    assert "x is both" in missed(silu, g.call(MUL, g.y, g.call(SIGMOID, g.x))).reason
    square = Call(MUL, Var("x"), Var("x"))
    assert matched(square, g.call(MUL, g.x, g.x))
    assert missed(square, g.call(MUL, g.x, g.y)).reason == "x is both x (x) and y (y)"


def test_an_inner_choice_is_taken_back_when_it_does_not_fit_outside(g: Tiny) -> None:
    """(a * b) + b, whichever way round the product was written."""
    pattern = Call(ADD, Call(MUL, Var("a"), Var("b"), commutative=True), Var("b"), commutative=True)
    assert matched(pattern, g.call(ADD, g.call(MUL, g.x, g.y), g.y)).bindings == {"a": g.x, "b": g.y}
    assert matched(pattern, g.call(ADD, g.call(MUL, g.y, g.x), g.y)).bindings == {"a": g.x, "b": g.y}
    assert matched(pattern, g.call(ADD, g.y, g.call(MUL, g.y, g.x))).bindings == {"a": g.x, "b": g.y}


def test_literals(g: Tiny) -> None:
    root = g.call(aten.dropout.default, g.x, 0.5, False)
    assert matched(Call(aten.dropout.default, Var("x"), Literal("p"), False), root)["p"] == 0.5
    assert missed(Call(aten.dropout.default, Var("x"), Literal("p"), True), root).reason == "required True, found False"
    assert "required 0.1, found 0.5" in missed(Call(aten.dropout.default, Var("x"), 0.1), root).reason
    viewed = g.call(aten.view.default, g.x, [2, -1])
    assert matched(Call(aten.view.default, Var("x"), [2, -1]), viewed)
    assert missed(Call(aten.view.default, Var("x"), [2, 1]), viewed)
    assert matched(Call(aten.view.default, Var("x"), Literal("size")), viewed)["size"] == [2, -1]
    computed = g.call(aten.view.default, g.x, g.y)
    assert missed(Call(aten.view.default, Var("x"), Literal("size")), computed).reason == "size is computed"
    assert missed(Call(aten.view.default, Var("x"), [2, -1]), computed).reason == "required [2, -1], found y (y)"


def test_a_literal_bound_twice_must_be_equal(g: Tiny) -> None:
    pattern = Call(aten.dropout.default, Call(aten.dropout.default, Var("x"), Literal("p")), Literal("p"))
    inner = g.call(aten.dropout.default, g.x, 0.5, False)
    assert matched(pattern, g.call(aten.dropout.default, inner, 0.5, False))["p"] == 0.5
    inner = g.call(aten.dropout.default, g.x, 0.5, False)
    assert missed(pattern, g.call(aten.dropout.default, inner, 0.1, False)).reason == "p is both 0.5 and 0.1"


def test_defaults_and_keywords_are_filled_in(g: Tiny) -> None:
    plain, scaled = g.call(ADD, g.x, g.y), g.call(ADD, g.x, g.y, alpha=2)
    assert full_args(plain) == (g.x, g.y, 1)
    assert full_args(scaled) == (g.x, g.y, 2)
    pattern = Call(ADD, Var("a"), Var("b"), 1)
    assert matched(pattern, plain)
    assert missed(pattern, scaled).reason == "required 1, found 2"
    linear = g.call(aten.linear.default, g.x, g.w)
    assert matched(Call(aten.linear.default, Var("x"), Stored("w"), None), linear)
    named = g.call(aten.linear.default, g.x, weight=g.w, bias=g.y)
    assert matched(Call(aten.linear.default, Var("x"), Stored("w"), Var("b")), named)["b"] is g.y


def test_maybe_is_a_node_or_none(g: Tiny) -> None:
    pattern = Call(aten.linear.default, Var("x"), Stored("w"), Maybe("b"))
    assert matched(pattern, g.call(aten.linear.default, g.x, g.w))["b"] is None
    assert matched(pattern, g.call(aten.linear.default, g.x, g.w, g.y))["b"] is g.y
    assert missed(Call(ADD, Var("x"), Maybe("y")), g.call(ADD, g.x, 2)).reason == "y is a literal"


def test_reasons_name_what_is_wrong(g: Tiny) -> None:
    root = g.call(ADD, g.x, 2)
    assert (
        missed(Call((MUL, RELU)), root).reason
        == "required aten.mul.Tensor or aten.relu.default, found add_tensor (aten.add.Tensor)"
    )
    assert missed(Call(ADD, Var("x"), Var("y")), root) == Miss("y is not a node", 2)
    assert missed(Call(ADD, Stored("x")), root) == Miss("x is not a stored tensor", g.x)
    assert missed(Call(ADD, Call(RELU)), root).at is g.x
    assert missed(Call(RELU, Var("x"), Var("y")), g.call(RELU, g.x)).reason == "required 2 arguments, found 1"
    assert missed(Call(RELU), g.x).reason == "required aten.relu.default, found x (x)"


def test_an_inner_node_used_elsewhere_is_a_miss(g: Tiny) -> None:
    inner = g.call(RELU, g.x)
    root = g.call(ADD, inner, g.y)
    g.call(SIGMOID, inner)
    miss = missed(Call(ADD, Call(RELU, Var("a")), Var("b")), root)
    assert miss == Miss("relu_default is used by sigmoid_default as well", inner)
    assert matched(Call(ADD, Call(RELU, Var("a"), shared=True), Var("b")), root).bindings == {"a": g.x, "b": g.y}


def test_an_inner_node_used_twice_inside_is_no_miss(g: Tiny) -> None:
    inner = g.call(RELU, g.x)
    root = g.call(MUL, inner, g.call(SIGMOID, inner))
    relu = Call(RELU, Var("x"), name="r")
    assert matched(Call(MUL, relu, Call(SIGMOID, relu)), root)["r"] is inner


def test_the_index_finds_roots_by_target(g: Tiny) -> None:
    a, b = g.call(RELU, g.x), g.call(SIGMOID, g.y)
    c = g.call(RELU, b)
    index = Index(g.program(a, c))
    assert list(index.roots(Call(RELU))) == [a, c]
    assert list(index.roots(Call((SIGMOID, RELU)))) == [b, a, c]
    assert list(index.roots(Call(MUL))) == []


# The engine


class Silus(nn.Module):
    """Three written-out silu, one of them commuted, and one near-miss."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * torch.sigmoid(x)
        x = torch.sigmoid(x) * x
        x = self.linear(x)
        return x * torch.sigmoid(x), x * torch.sigmoid(y)


SILU = Rule(
    name="test.silu",
    pattern=Call(MUL, Var("x"), Call(SIGMOID, Var("x")), commutative=True),
    replace=lambda program, found: program.emit(aten.silu.default, found["x"], like=found.root),
)


def captured() -> tuple[Program, tuple[torch.Tensor, torch.Tensor]]:
    model = Silus()
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator))
    return capture(model, {"x": inputs[0], "y": inputs[1]}, Store.of(model)), inputs


def test_a_rule_fires_compares_refuses_and_repeats() -> None:
    program, inputs = captured()
    before = [t.detach() for t in program.run(inputs)]
    assert apply_rules(program, [SILU], "test") == 3
    program.graph.lint()
    assert len(program.calls(aten.silu.default)) == 3
    assert len(program.calls(SIGMOID)) == len(program.calls(MUL)) == 1  # x * sigmoid(y)
    for a, b in zip(program.run(inputs), before, strict=True):
        torch.testing.assert_close(a, b)
    for node in program.calls(aten.silu.default):
        assert node.meta["val"].shape[1:] == (4,)
    assert [(e.rule, e.applied, e.stage) for e in program.log] == [("test.silu", True, "test")] * 3
    assert len({e.where for e in program.log}) == 3
    code = program.module.code
    assert apply_rules(program, [SILU], "test") == 0
    assert program.module.code == code
    assert len(program.log) == 3


def test_rules_feed_one_another(g: Tiny) -> None:
    """relu(relu(x)) becomes relu(x) until one is left; a rule later in the tuple wakes an earlier one."""
    twice = Rule(
        name="test.twice", pattern=Call(RELU, Call(RELU, Var("x"), name="inner")), replace=lambda p, m: m["inner"]
    )
    clamp = Rule(
        name="test.clamp",
        pattern=Call(aten.clamp_min.default, Var("x"), 0),
        replace=lambda p, m: p.emit(RELU, m["x"], like=m.root),
    )
    node = g.x
    for _ in range(3):
        node = g.call(RELU, g.call(aten.clamp_min.default, node, 0))
    program = g.program(node)
    assert apply_rules(program, (twice, clamp), "test") == 3 + 5
    assert len(program.calls(RELU)) == 1
    assert program.run([torch.tensor([-1.0, 2.0])] * 2)[0].tolist() == [0.0, 2.0]


def test_a_decline_is_logged_once_with_its_reason(g: Tiny) -> None:
    a, b = g.call(RELU, g.x), g.call(RELU, g.y)
    program = g.program(a, b)
    only_x = Rule(
        name="test.only_x",
        pattern=Call(RELU, Var("v")),
        check=lambda p, m: None if m["v"].name == "x" else f"{m['v'].name} is not x",
        replace=lambda p, m: m["v"],
    )
    assert apply_rules(program, [only_x], "test") == 1
    declined = [e for e in program.log if not e.applied]
    assert [(e.rule, e.where, e.reason) for e in declined] == [("test.only_x", "relu_default_1", "y is not x")]
    assert len(program.log) == 2


def test_dead_nodes_are_dropped_and_inputs_kept(g: Tiny) -> None:
    root = g.call(ADD, g.call(RELU, g.x), g.w)
    program = g.program(root)
    drop = Rule(name="test.drop", pattern=Call(ADD, Call(RELU, Var("x")), Stored("w")), replace=lambda p, m: m["x"])
    assert apply_rules(program, [drop], "test") == 1
    assert [n.op for n in program.graph.nodes] == ["placeholder", "placeholder", "output"]


def test_an_empty_tuple_of_rules_does_nothing(g: Tiny) -> None:
    program = g.program(g.call(RELU, g.x))
    code = program.module.code
    assert apply_rules(program, (), "test") == 0
    assert program.module.code == code
    assert program.log == []
