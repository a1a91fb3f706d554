"""Store: one entry for each tensor, all of its names, and views that see every change."""

from __future__ import annotations

import pytest
import torch
from models import ZOO
from torch import nn

from dwindle.runtime.qtensor import QTensor
from dwindle.runtime.scheme import Scheme
from dwindle.runtime.store import Store, tensors_of, view


class Counting(nn.Module):
    """Buffers of both kinds, one of them tied."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.inner.register_buffer("alias", self.table)


def test_tied_weights_are_one_entry_with_aliases() -> None:
    model, _ = ZOO["tied_lm"]()
    store = Store.of(model)
    assert store.aliases == {"head.weight": "embedding.weight"}
    assert store.canonical("head.weight") == "embedding.weight"
    assert store.canonical("up.weight") == "up.weight"
    assert store.names_of("embedding.weight") == ["embedding.weight", "head.weight"]
    assert store.get("head.weight") is store.get("embedding.weight") is model.head.weight
    assert [name for name, _ in store.entries()].count("embedding.weight") == 1
    assert "head.weight" not in dict(store.entries())


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied_lm", "bert", "gpt2", "llama", "t5"])
def test_a_store_has_every_name_and_no_byte_twice(name: str) -> None:
    model, _ = ZOO[name]()
    store = Store.of(model)
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for full, tensor in everything:
        assert store.get(full) is tensor
    assert {id(t) for _, t in store.entries()} == {id(t) for _, t in everything}
    assert store.nbytes() == sum({id(t): t.numel() * t.element_size() for _, t in everything}.values())
    assert set(store.state_dict()) == {store.canonical(n) for n in model.state_dict()}


def test_a_clone_shares_no_storage_and_keeps_ties_kinds_and_layout() -> None:
    model, _ = ZOO["tied_lm"]()
    model.up.weight.requires_grad_(False)
    model.up.weight.data = model.up.weight.data.t().contiguous().t()
    store = Store.of(model, clone=True)
    mine = {t.untyped_storage().data_ptr() for t in tensors_of(store)}
    assert not mine & {t.untyped_storage().data_ptr() for t in tensors_of(model)}
    assert store.aliases == {"head.weight": "embedding.weight"}
    up = store.get("up.weight")
    assert isinstance(up, nn.Parameter)
    assert not up.requires_grad
    assert up.stride() == model.up.weight.stride()
    assert torch.equal(up, model.up.weight)
    assert store.get("down.weight").requires_grad


def test_buffers_keep_their_persistence() -> None:
    store = Store.of(Counting())
    assert store.aliases == {"inner.alias": "table"}
    assert set(store.state_dict()) == {"inner.weight", "inner.bias", "count"}


def test_put_and_get() -> None:
    store = Store()
    weight, buffer = nn.Parameter(torch.ones(2)), torch.zeros(3)
    store.put("a.b.weight", weight)
    store.put("a.b.buffer", buffer)
    assert store.get("a.b.weight") is weight
    assert store.get("a.b.buffer") is buffer
    assert store.get("a.b") is None  # a place, not a tensor
    assert store.get("a.x.weight") is None
    assert store.get("a.b.weight.deeper") is None
    assert [name for name, _ in store.entries()] == ["a.b.weight", "a.b.buffer"]


def test_put_replaces_whatever_was_there() -> None:
    store = Store()
    store.put("a.weight", nn.Parameter(torch.ones(2, 8)))
    q = QTensor.quantize(torch.ones(2, 8), Scheme())
    store.put("a.weight", q)
    assert store.get("a.weight") is q
    assert list(store.parameters()) == []
    assert set(store.state_dict()) == {"a.weight.codes", "a.weight.scale"}
    assert store.nbytes() == q.nbytes
    assert [(name, value) for name, value in store.entries()] == [("a.weight", q)]
    store.put("a.weight", torch.ones(1))
    assert isinstance(store.get("a.weight"), torch.Tensor)
    assert list(store._modules["a"]._modules) == []


def test_a_replaced_tied_weight_is_seen_under_all_names() -> None:
    model, _ = ZOO["tied_lm"]()
    store = Store.of(model)
    q = QTensor.quantize(store.get("embedding.weight"), Scheme())
    store.put("embedding.weight", q)
    assert store.get("head.weight") is q


def test_constants_are_stored_once() -> None:
    store = Store()
    first = store.constant(torch.arange(3))
    assert first == "constants.c0"
    assert store.constant(torch.arange(3)) == first
    others = [
        store.constant(torch.arange(3.0)),
        store.constant(torch.arange(4)),
        store.constant(torch.arange(3).reshape(1, 3)),
    ]
    assert others == ["constants.c1", "constants.c2", "constants.c3"]
    assert torch.equal(store.get(first), torch.arange(3))
    assert store.state_dict() == {}


def test_a_view_sees_casts_and_replacements() -> None:
    model, _ = ZOO["tied_lm"]()
    store = Store.of(model, clone=True)
    a, b = nn.Module(), nn.Module()
    view(store, a)
    view(store, b)
    a.to(torch.float64)
    assert {t.dtype for t in [*store.parameters(), *b.parameters()]} == {torch.float64}
    replacement = nn.Parameter(torch.ones(32, 16))
    store.put("up.weight", replacement)
    assert a.get_parameter("up.weight") is replacement
    assert b.get_parameter("up.weight") is replacement
    store.put("fresh", torch.ones(1), persistent=False)
    assert "fresh" in dict(b.named_buffers())
    assert "fresh" not in b.state_dict()
    assert all(p.dtype == torch.float32 for p in model.parameters())
