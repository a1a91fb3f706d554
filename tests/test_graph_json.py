"""Graphs as JSON: everything a graph holds comes back, and a file cannot bring in anything else."""

from __future__ import annotations

import json
import operator
import os
from typing import Any

import pytest
import torch
from torch import fx, nn

from dwindle.runtime.errors import ArtifactError
from dwindle.runtime.graph_json import graph_from_json, graph_to_json, resolve, spell
from dwindle.runtime.ops.catalog import OPS

aten = torch.ops.aten
CPU = torch.device("cpu")


def test_arguments_of_every_kind() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    arguments = (
        [1, 2.5, True, None, float("inf"), float("-inf"), 1 - 2j, [x, (x, ())]],
        (slice(None, x, 2), "%x", "a'\"b\n", {"key": (x, torch.bfloat16)}),
        (torch.int8, torch.strided, torch.channels_last, CPU, torch.device("cuda:1"), torch.device("cuda")),
    )
    graph.call_function(operator.getitem, arguments, {"dtype": torch.float16})
    graph.output((x,))
    nodes = graph_to_json(graph, torch.device("cuda:0"))
    copy = graph_from_json(json.loads(json.dumps(nodes, allow_nan=False)), torch.device("cuda:0"), ())
    call = next(iter(copy.find_nodes(op="call_function", target=operator.getitem)))
    placed = (*arguments[:2], (*arguments[2][:-1], torch.device("cuda:0")))
    assert repr(call.args) == repr(placed)  # nodes are equal by name
    assert type(call.args[0]) is type(graph.find_nodes(op="call_function", target=operator.getitem)[0].args[0])
    assert graph_to_json(copy, torch.device("cuda:0")) == nodes


def test_devices_follow_the_model() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(aten.zeros.default, ([2],), {"device": CPU}),))
    moved = graph_from_json(graph_to_json(graph, CPU), torch.device("meta"), ())
    view_ = fx.GraphModule(nn.Module(), moved)
    assert view_()[0].is_meta


@pytest.mark.parametrize("operator", OPS, ids=lambda o: o.name)
def test_every_operator_of_ours_is_allowed(operator: Any) -> None:
    assert resolve(spell(operator.overload)) is operator.overload


ALLOWED = (
    "torch.ops.aten.add.Tensor",
    "torch.ops.aten.sym_size.int",
    "torch.ops.aten.einsum.default",
    "operator.getitem",
    "math.ceil",
    "torch.sym_int",
    "builtins.round",
)
FORBIDDEN = (
    "os.system",
    "torch.load",
    "torch.ops.load_library",
    "torch.ops.aten.add",
    "torch.ops.aten.add.Tensor.__init__",
    "torch.ops.aten.__class__.mro",
    "torch.ops.aten.nothing.default",
    "torch.ops.__dict__.get.x",
    "torch.ops.torchvision.nothing.default",
    "torch.ops.prims.add.default",
    "torch.ops.aten.from_file.default",
    "torch.ops.aten._assert_async.msg",
    "torch.ops.aten.save.default",
    "builtins.eval",
    "operator.attrgetter",
    "operator.methodcaller",
    "",
)


@pytest.mark.parametrize("target", ALLOWED)
def test_resolve_is_the_inverse_of_spell(target: str) -> None:
    assert spell(resolve(target)) == target


@pytest.mark.parametrize("target", FORBIDDEN)
def test_resolve_refuses(target: str) -> None:
    with pytest.raises(ArtifactError, match="required: "):
        resolve(target)


class Opaque:
    """A value that no file can hold."""


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (torch.add, (1, 2)),
        (os.system, ("true",)),
        (aten.add, (1, 2)),
        (aten.from_file.default, ("file",)),
        (aten.add.Tensor, (Opaque(), 2)),
        (aten.add.Tensor, (torch.Generator(), 2)),
    ],
)
def test_a_call_that_could_not_be_loaded_is_not_saved(target: Any, args: tuple[Any, ...]) -> None:
    graph = fx.Graph()
    new = graph.create_node("call_function", target, (), name="wrong")
    new._args = args  # what a pass with a bug could leave
    with pytest.raises(ArtifactError, match=r"(?s)node 'wrong' cannot be saved.*required: .*found: .*cure: "):
        graph_to_json(graph, CPU)


def test_other_kinds_of_node_are_not_saved() -> None:
    graph = fx.Graph()
    graph.output((graph.call_method("exec", (graph.placeholder("x"),)),))
    with pytest.raises(ArtifactError, match="call_method"):
        graph_to_json(graph, CPU)


def small() -> list[dict[str, Any]]:
    """x + w, as saved."""
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    graph.output((graph.call_function(aten.add.Tensor, (x, w), {"alpha": 2}),))
    return graph_to_json(graph, CPU)


def test_a_node_is_a_short_line() -> None:
    x, w, add, output = small()
    assert x == {"op": "placeholder", "name": "x", "target": "x"}
    assert w == {"op": "get_attr", "name": "w", "target": "w"}
    call = {"op": "call_function", "name": "add_tensor", "target": "torch.ops.aten.add.Tensor"}
    assert add == {**call, "args": ["%x", "%w"], "kwargs": {"alpha": 2}}
    assert output == {"op": "output", "name": "output", "target": "output", "args": [{"tuple": ["%add_tensor"]}]}
    assert graph_to_json(graph_from_json(small(), CPU, {"w"}), CPU) == small()


INJECTED = "x=__import__('os').system('true')"
X, W, ADD, OUTPUT = range(4)
EDITS: list[tuple[int, dict[str, Any]]] = [
    *((ADD, {"target": target}) for target in FORBIDDEN),
    (ADD, {"op": "call_method"}),
    (ADD, {"op": "call_module", "target": "w"}),
    (X, {"target": INJECTED}),
    (X, {"target": "import"}),
    (ADD, {"kwargs": {INJECTED: 1}}),
    (ADD, {"kwargs": {"import": 1}}),
    (W, {"target": "v"}),
    (W, {"target": "forward"}),
    (W, {"name": "x"}),
    (W, {"name": ["x"]}),
    (ADD, {"args": ["%output"]}),
    (ADD, {"args": ["x"]}),
    (ADD, {"args": [{"dtype": "load"}]}),
    (ADD, {"args": [{"dtype": "strided"}]}),
    (ADD, {"args": [{"object": "os"}]}),
    (ADD, {"args": [{"str": "a", "dtype": "float32"}]}),
    (ADD, {"args": [{}]}),
    (ADD, {"args": [{"float": "1"}]}),
    (OUTPUT, {"op": "placeholder", "target": "y"}),
]


@pytest.mark.parametrize(("position", "change"), EDITS, ids=lambda v: json.dumps(v))
def test_a_changed_node_is_refused(position: int, change: dict[str, Any]) -> None:
    nodes = small()
    nodes[position].update(change)
    with pytest.raises(ArtifactError):
        graph_from_json(nodes, CPU, {"w"})


def test_a_node_after_the_output_is_refused() -> None:
    with pytest.raises(ArtifactError, match="output node, last"):
        graph_from_json([*small(), {"op": "placeholder", "name": "y", "target": "y"}], CPU, {"w"})


def test_a_name_that_would_become_source_is_refused_both_ways() -> None:
    """fx quotes parts of an attribute path without escaping them."""
    name = 'a") or __import__("os").system("true'
    nodes = small()
    nodes[W]["target"] = name
    with pytest.raises(ArtifactError, match="name of a stored tensor"):
        graph_from_json(nodes, CPU, {name})
    graph = graph_from_json(small(), CPU, {"w"})
    next(iter(graph.find_nodes(op="get_attr"))).target = name
    with pytest.raises(ArtifactError, match="name of a stored tensor"):
        graph_to_json(graph, CPU)
