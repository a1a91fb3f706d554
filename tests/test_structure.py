"""Calls and results as plain data: flatten, rebuild, and what JSON keeps."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dwindle.runtime.errors import CaptureError
from dwindle.runtime.structure import Output, describe, flatten, rebuild

CONSTANTS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=3)
LEAVES = CONSTANTS | st.builds(torch.zeros, st.integers(0, 3))
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


class Pair(NamedTuple):
    first: Any
    second: Any


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and value; tensors by identity."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@given(NESTED)
def test_rebuild_is_the_inverse_of_flatten(value: Any) -> None:
    structure, tensors = flatten(value)
    assert all(isinstance(t, Tensor) for t in tensors)
    assert same(rebuild(structure, tensors), value)
    assert same(rebuild(json.loads(json.dumps(structure)), tensors), value)


def test_tensors_come_out_in_order() -> None:
    a, b, c = torch.zeros(3).unbind()
    structure, tensors = flatten({"x": (a, 1), "y": [None, {"z": b}], "w": c})
    assert [id(t) for t in tensors] == [id(a), id(b), id(c)]
    assert structure["items"]["x"]["items"] == [{"kind": "tensor"}, {"kind": "constant", "value": 1}]


def test_a_model_output_comes_back_as_its_own_class() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(last_hidden_state=torch.ones(2), hidden_states=(torch.zeros(1), torch.zeros(2)))
    structure, tensors = flatten(value)
    back = rebuild(json.loads(json.dumps(structure)), tensors)
    assert type(back) is outputs.BaseModelOutput
    assert back.last_hidden_state is value.last_hidden_state
    assert same(back.hidden_states, value.hidden_states)
    assert back.attentions is None


@pytest.mark.parametrize(
    "path", ["transformers.no_such_module:Output", "transformers.modeling_outputs:NoSuch", "os:system", "builtins:dict"]
)
def test_a_class_that_is_not_there_or_not_trusted_becomes_an_output(path: str) -> None:
    x = torch.ones(1)
    structure = {"kind": "output", "class": path, "items": {"logits": {"kind": "tensor"}}}
    back = rebuild(structure, [x])
    assert type(back) is Output
    assert back.logits is back["logits"] is back[0] is x
    assert back[:1] == back.to_tuple() == (x,)


def test_a_class_of_transformers_that_is_no_output_is_not_called() -> None:
    pytest.importorskip("transformers")
    structure = {"kind": "output", "class": "transformers.pipelines:pipeline", "items": {}}
    assert type(rebuild(structure, [])) is Output


def test_an_output_without_the_name_has_no_such_attribute() -> None:
    with pytest.raises(AttributeError, match="loss"):
        _ = Output(logits=1).loss
    with pytest.raises(KeyError):
        Output(logits=1)["loss"]


def test_a_named_tuple_unpacks_as_before() -> None:
    a, b = torch.zeros(2).unbind()
    structure, tensors = flatten({"out": Pair(a, (b, 3))})
    back = rebuild(json.loads(json.dumps(structure)), tensors)["out"]
    first, (second, third) = back
    assert first is back.first is back[0] is a
    assert second is b
    assert third == 3
    assert isinstance(back, tuple)
    assert type(back).__name__ == "Pair"
    assert back._fields == Pair._fields


def test_an_ordered_dict_keeps_order_keys_and_attributes() -> None:
    a, b = torch.zeros(2).unbind()
    back = rebuild(*flatten(OrderedDict(second=b, first=a)))
    assert list(back) == ["second", "first"]
    assert back["first"] is back.first is a


@pytest.mark.parametrize("value", [{0: torch.zeros(1)}, {0: 1, "0": 2}, {"x": {(1, 2): 3}}])
def test_a_key_that_is_not_text_is_an_error(value: Any) -> None:
    """JSON would turn it into text, and the model would answer under another key."""
    with pytest.raises(CaptureError, match="text"):
        flatten(value)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.float32, [torch.Size([1]), b"bytes"]])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(CaptureError) as caught:
        flatten({"x": value})
    text = str(caught.value)
    assert "required: tensors, constants" in text
    assert "found: " in text
    assert "cure: " in text


def test_describe_takes_any_leaf() -> None:
    assert describe([1, 2 + 0j, "a"], complex) == {
        "kind": "list",
        "items": [{"kind": "constant", "value": 1}, {"kind": "tensor"}, {"kind": "constant", "value": "a"}],
    }


def test_constants_need_no_tensors() -> None:
    assert flatten((1, "a", None, True)) == (
        {"kind": "tuple", "items": [{"kind": "constant", "value": v} for v in (1, "a", None, True)]},
        [],
    )
