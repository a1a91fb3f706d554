"""Schemes: what they refuse, the codes they allow, and their spelling."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from hypothesis import given
from strategies import schemes, stochastic

from dwindle.runtime import scheme as presets
from dwindle.runtime.errors import SchemeError
from dwindle.runtime.scheme import Scheme


@pytest.mark.parametrize(
    ("kind", "bits", "qmin", "qmax", "dtype"),
    [
        ("symmetric", 2, -1, 1, torch.int8),
        ("symmetric", 4, -7, 7, torch.int8),
        ("symmetric", 8, -127, 127, torch.int8),
        ("symmetric", 9, -255, 255, torch.int32),
        ("symmetric", 16, -32767, 32767, torch.int32),
        ("asymmetric", 2, 0, 3, torch.uint8),
        ("asymmetric", 8, 0, 255, torch.uint8),
        ("asymmetric", 16, 0, 65535, torch.int32),
        ("ternary", 2, -1, 1, torch.int8),
        ("binary", 1, -1, 1, torch.int8),
    ],
)
def test_codes(kind: Any, bits: int, qmin: int, qmax: int, dtype: torch.dtype) -> None:
    scheme = Scheme(kind=kind, bits=bits)
    assert (scheme.qmin, scheme.qmax, scheme.code_dtype) == (qmin, qmax, dtype)


@pytest.mark.parametrize(
    ("fields", "required", "found"),
    [
        ({"kind": "cubic"}, "symmetric | asymmetric | ternary | binary", "'cubic'"),
        ({"granularity": "row"}, "tensor | channel | image | token | group | rows", "'row'"),
        ({"rounding": "up"}, "nearest | stochastic", "'up'"),
        ({"bits": 1}, "2 to 16 bits", "1"),
        ({"bits": 17}, "2 to 16 bits", "17"),
        ({"kind": "binary", "bits": 2}, "1 to 1 bits", "2"),
        ({"kind": "ternary", "bits": 8}, "2 to 2 bits", "8"),
        ({"granularity": "group"}, "both or neither", "group_size=None"),
        ({"group_size": 32}, "both or neither", "group_size=32"),
        ({"granularity": "group", "group_size": 0}, ">= 1", "0"),
    ],
)
def test_refuses_and_says_why(fields: dict[str, Any], required: str, found: str) -> None:
    with pytest.raises(SchemeError) as caught:
        Scheme(**fields)
    assert required in str(caught.value)
    assert found in str(caught.value)


@given(schemes())
def test_spelling_round_trips(scheme: Scheme) -> None:
    assert Scheme.parse(scheme.spell()) == scheme
    assert Scheme.parse(stochastic(scheme).spell()) == stochastic(scheme)


def test_spelling() -> None:
    assert presets.W4_G128.spell() == "4-symmetric-group128-nearest"
    assert Scheme(kind="binary", bits=1, rounding="stochastic").spell() == "1-binary-channel-stochastic"


@pytest.mark.parametrize(
    "text", ["", "8", "8-symmetric-channel", "x-symmetric-channel-nearest", "8-symmetric-groupx-nearest", "8-a-b-c"]
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(SchemeError):
        Scheme.parse(text)


def test_frozen_and_hashable() -> None:
    assert len({Scheme(), Scheme(), presets.W8_CHANNEL, presets.W4_CHANNEL}) == 2
    with pytest.raises(FrozenInstanceError):
        Scheme().bits = 4  # type: ignore[misc]
