"""Contracts and signatures: which calls a variant serves, and what is said about those it does not."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dwindle.runtime.contract import Contract, Input, Signature, bind_call, call_key
from dwindle.runtime.errors import CaptureError
from dwindle.runtime.structure import flatten

IDS = torch.zeros(2, 8, dtype=torch.int64)
STRUCTURE, _ = flatten({"input_ids": IDS, "embeddings": IDS.float()[..., None].expand(2, 8, 16), "return_dict": False})
CONTRACT = Contract(
    training=False,
    arguments=STRUCTURE,
    inputs=(
        Input("input_ids", "int64", ("batch", "sequence")),
        Input("embeddings", "float32", ("batch", "sequence", 16)),
    ),
    output={"kind": "tensor"},
    limits={"batch": (1, None), "sequence": (2, 64)},
)


def call(batch: int = 3, sequence: int = 5, width: int = 16, **other: Any) -> list[Tensor]:
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    return [ids, torch.zeros(other.get("batch2", batch), sequence, width, dtype=other.get("dtype", torch.float32))]


@pytest.mark.parametrize("tensors", [call(), call(1, 2), call(9, 64), [call()[0].int(), call()[1]]])
def test_fitting_calls_pass(tensors: list[Tensor]) -> None:
    CONTRACT.check(tensors)


@pytest.mark.parametrize(
    ("tensors", "name", "required", "found"),
    [
        (call(width=15), "embeddings", "float32 ['batch', 'sequence', 16]", "float32 [3, 5, 15]"),
        (call(sequence=65), "input_ids", "with 2 <= sequence <= 64", "int64 [3, 65]"),
        (call(sequence=1), "input_ids", "with 2 <= sequence <= 64", "int64 [3, 1]"),
        (call(batch=0), "input_ids", "with 1 <= batch <= any", "int64 [0, 5]"),
        (call(batch2=2), "embeddings", "with batch = 3, as in input_ids", "float32 [2, 5, 16]"),
        (call(dtype=torch.int64), "embeddings", "float32", "int64 [3, 5, 16]"),
        (call(dtype=torch.bfloat16), "embeddings", "float32", "bfloat16 [3, 5, 16]"),
        ([call()[0].bool(), call()[1]], "input_ids", "int64", "bool [3, 5]"),
        ([IDS.float(), call()[1]], "input_ids", "int64 ['batch', 'sequence']", "float32 [2, 8]"),
        ([IDS[0], call()[1]], "input_ids", "int64 ['batch', 'sequence']", "int64 [8]"),
        ([IDS[None], call()[1]], "input_ids", "int64 ['batch', 'sequence']", "int64 [1, 2, 8]"),
    ],
)
def test_a_misfit_is_named_with_required_and_found(tensors: list[Tensor], name: str, required: str, found: str) -> None:
    with pytest.raises(CaptureError) as caught:
        CONTRACT.check(tensors)
    text = str(caught.value)
    assert f"input {name!r}" in text
    assert required in text.partition("required: ")[2].partition("found: ")[0]
    assert found in text.partition("found: ")[2].partition("cure: ")[0]
    assert "cure: " in text


def test_json_round_trips() -> None:
    back = Contract.from_json(json.loads(json.dumps(CONTRACT.to_json())))
    assert back == CONTRACT
    assert back.key == CONTRACT.key
    assert hash(back.key) == hash(CONTRACT.key)


def test_describe_is_one_line() -> None:
    assert CONTRACT.describe() == (
        "eval(input_ids=int64['batch', 'sequence'], embeddings=float32['batch', 'sequence', 16], return_dict=False)"
    )


def test_describe_shows_nested_arguments() -> None:
    structure, _ = flatten({"state": (IDS, [IDS, 1]), "n": None})
    inputs = tuple(Input(f"state.{i}", "int64", ("batch", 8)) for i in range(2))
    text = Contract(True, structure, inputs, {"kind": "tensor"}).describe()
    assert text == "train(state=tuple(int64['batch', 8], list(int64['batch', 8], 1)), n=None)"


# Keys


def key(*args: Any, training: bool = False) -> Any:
    return call_key(training, flatten(args)[0])


def test_keys_ignore_shapes_and_tell_everything_else() -> None:
    assert key(IDS, 1) == key(IDS[:1], 1)
    different = [
        key(IDS, 1),
        key(IDS, 1, training=True),
        key(IDS, True),
        key(IDS, 1.0),
        key(IDS, "1"),
        key(IDS, None),
        key(1, IDS),
        key(IDS),
        key((IDS, 1)),
        key([IDS, 1]),
        key({"a": IDS}),
        key({"b": IDS}),
    ]
    assert len(set(different)) == len(different)


# Signatures


class Model(nn.Module):
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        scale: float = 1.0,
        sizes: tuple[int, ...] = (1, 2),
        use_cache: bool = True,
    ) -> Tensor:
        return input_ids


class Open(nn.Module):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def test_a_signature_has_names_and_constant_defaults() -> None:
    s = Signature.of(Model())
    assert s.names == ("input_ids", "attention_mask", "scale", "sizes", "use_cache")
    assert s.defaults == {"attention_mask": None, "scale": 1.0, "use_cache": True}
    assert not s.open_ended
    assert Signature.of(Open()).names == ("x",)
    assert Signature.of(Open()).open_ended


def test_positional_and_keyword_calls_have_one_key() -> None:
    s = Signature.of(Model())
    mask = torch.ones(2, 8)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((IDS, mask), {}),
        ((IDS,), {"attention_mask": mask}),
        ((), {"attention_mask": mask, "input_ids": IDS}),
        ((IDS, mask, 1.0), {"use_cache": True}),
    ]
    bound = [bind_call(s, *c) for c in calls]
    assert len({call_key(False, structure) for structure, _ in bound}) == 1
    assert all(tensors[0] is IDS and tensors[1] is mask for _, tensors in bound)


def test_defaults_are_dropped_and_other_values_kept() -> None:
    s = Signature.of(Model())
    assert s.bind((IDS,), {"attention_mask": None, "scale": 1.0, "use_cache": True}) == {"input_ids": IDS}
    assert list(s.bind((IDS,), {"use_cache": False, "scale": 2.0})) == ["input_ids", "scale", "use_cache"]
    tensor_scale = s.bind((IDS,), {"scale": torch.tensor(1.0)})
    assert set(tensor_scale) == {"input_ids", "scale"}


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((IDS,), {"labels": IDS}, "argument 'labels' unknown"),
        ((IDS,), {"input_ids": IDS}, "argument 'input_ids' given twice"),
        ((1, 2, 3, 4, 5, 6), {}, "too many positional arguments"),
    ],
)
def test_calls_the_model_does_not_take_are_refused(args: Any, kwargs: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text) as caught:
        Signature.of(Model()).bind(args, kwargs)
    assert "required: " in str(caught.value)
    assert "found: " in str(caught.value)


def test_an_open_ended_signature_takes_any_keyword() -> None:
    s = Signature.of(Open())
    assert list(s.bind((), {"z": 1, "x": IDS, "y": None})) == ["x", "z", "y"]
    with pytest.raises(CaptureError, match="given twice"):
        s.bind((IDS,), {"x": IDS})


def test_a_signature_survives_json() -> None:
    s = Signature.of(Model())
    data = json.loads(json.dumps(s.to_json()))
    back = Signature(data["names"], data["defaults"], data["open_ended"])
    assert (back.names, back.defaults, back.open_ended) == (s.names, s.defaults, s.open_ended)


def test_as_inspect_is_what_tools_read() -> None:
    parameters = Signature.of(Model()).as_inspect().parameters
    assert list(parameters) == ["self", "input_ids", "attention_mask", "scale", "sizes", "use_cache"]
    assert parameters["input_ids"].default is inspect.Parameter.empty
    assert parameters["scale"].default == 1.0
    assert parameters["sizes"].default is None  # Python wants it to have one


def test_as_inspect_is_not_misled_by_a_name() -> None:
    parameters = Signature(["default_state", "x"], {}, False).as_inspect().parameters
    assert parameters["x"].default is inspect.Parameter.empty
