"""Packed weights kept as int8: as long as the tensor is the same and unwritten, and as far as there is room."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from models import ZOO
from torch import Tensor

import dwindle
from dwindle.runtime import unpacked
from dwindle.runtime.layout import unpack
from dwindle.runtime.ops.catalog import LIBRARY
from dwindle.runtime.ops.qlinear import QLINEAR
from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme

assert LIBRARY is not None

SCHEMES = {
    "binary": Scheme(bits=1, kind="binary"),
    "ternary": Scheme(bits=2, kind="ternary"),
    "3 bits": Scheme(bits=3),
    "4 bits": Scheme(bits=4),
}


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    unpacked.forget()
    yield
    unpacked.forget()


def packed(scheme: Scheme, rows: int = 24, columns: int = 72, seed: int = 0) -> QTensor:
    return QTensor.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), scheme)


def codes_of(weight: QTensor) -> Tensor:
    return unpacked.int8_codes(weight.codes, weight.shape[1], weight.scheme)


@pytest.mark.parametrize("kind", SCHEMES)
@pytest.mark.parametrize("columns", [1, 63, 64, 72, 128])
def test_the_numbers_are_those_of_the_reference(kind: str, columns: int) -> None:
    weight, generator = packed(SCHEMES[kind], columns=columns), torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (3, 5, columns), generator=generator, dtype=torch.int8)
    args = (x, torch.rand(3, 5, 1, generator=generator), weight.codes, weight.scale, None, torch.randn(24))
    expected = QLINEAR.reference(*args, weight.scheme.spell(), torch.float32)
    for _ in range(2):  # unpacked, then kept
        assert torch.equal(torch.ops.dwindle.qlinear.default(*args, weight.scheme.spell(), torch.float32), expected)
    assert codes_of(weight) is codes_of(weight)


def test_eight_bits_are_what_is_stored() -> None:
    weight = packed(Scheme())
    assert codes_of(weight) is weight.codes
    assert not unpacked._KEPT


def test_a_write_is_seen() -> None:
    weight = packed(SCHEMES["binary"])
    before = codes_of(weight)
    weight.refresh(-weight.dequantize())
    assert torch.equal(codes_of(weight), -before)
    weight.load_state_dict(packed(SCHEMES["binary"], seed=1).state_dict())
    assert torch.equal(codes_of(weight), weight.int_codes())
    assert len(unpacked._KEPT) == 1


def test_another_tensor_is_another() -> None:
    weight = packed(SCHEMES["ternary"])
    kept = codes_of(weight)
    twin = copy.deepcopy(weight)
    assert codes_of(twin) is not kept
    twin.codes = packed(SCHEMES["ternary"], seed=1).codes
    assert torch.equal(codes_of(twin), twin.int_codes())
    before = twin.codes
    twin.codes.data = packed(SCHEMES["ternary"], seed=2).codes  # the object stays
    assert twin.codes is before
    assert torch.equal(codes_of(twin), unpack(twin.codes, 72, twin.scheme))


def test_what_is_kept_goes_with_its_tensor() -> None:
    weight = packed(SCHEMES["binary"])
    codes_of(weight)
    assert len(unpacked._KEPT) == 1
    del weight
    gc.collect()
    assert not unpacked._KEPT


def test_beyond_the_room_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [packed(SCHEMES["binary"], seed=i) for i in range(3)]
    monkeypatch.setattr(unpacked, "ROOM", 2 * 24 * 72)
    found = [codes_of(weight) for weight in weights]
    assert [codes_of(w) is f for w, f in zip(weights, found, strict=True)] == [True, True, False]
    weights[0].refresh(weights[0].dequantize())  # of the same size, so there is room for it
    assert codes_of(weights[0]) is codes_of(weights[0])
    assert all(torch.equal(codes_of(w), w.int_codes()) for w in weights)


def test_a_tensor_without_versions_is_not_kept() -> None:
    with torch.inference_mode():
        weight = packed(SCHEMES["binary"])
        assert torch.equal(codes_of(weight), weight.int_codes())
    assert not unpacked._KEPT


def test_threads_may_meet() -> None:
    weights = [packed(SCHEMES["binary"], 64, 64, seed=i) for i in range(4)]
    expected, wrong = [w.int_codes() for w in weights], list[int]()

    def work() -> None:
        for i in range(200):
            if not torch.equal(codes_of(weights[i % 4]), expected[i % 4]):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(unpacked._KEPT) == 4


def test_a_model_is_saved_and_counted_without_it() -> None:
    model, inputs = ZOO["mlp"]()
    small = dwindle.compress(model, "xtc-binary", inputs=inputs)
    names, nbytes = list(small.state_dict()), small.store.nbytes()
    expected = small(**inputs)
    assert unpacked._KEPT
    assert (list(small.state_dict()), small.store.nbytes()) == (names, nbytes)
    other = copy.deepcopy(small)
    with torch.no_grad():
        for value in other.store.modules():
            if isinstance(value, QTensor):
                value.scale.mul_(2)
                value.refresh(-value.dequantize())
    assert torch.equal(small(**inputs), expected)
    assert not torch.equal(other(**inputs), expected)
