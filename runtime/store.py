"""One module that owns every tensor of a model under the model's original names.

Graphs own nothing: a variant's GraphModule is a *view*, which shares the Store's dictionaries, so moving,
casting or replacing a tensor in one place shows everywhere. A tied weight is one entry with aliases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from .qtensor import QTensor


class Store(nn.Module):
    """Parameters, buffers and QTensors by dotted name.

    aliases: every other name of a tied tensor -> the name it is stored under.
    forms: what a tensor here is where it is not the model's of that name: one with a batch norm folded in
    borrows: the parameters are somebody else's. adopts: what `adopt` does to a tensor of another store
    calls: how often a graph calls a weight whose inputs have static ranges, by its name
    """

    def __init__(self) -> None:
        super().__init__()
        self.aliases: dict[str, str] = {}
        self.forms: dict[str, str] = {}
        self.calls: dict[str, int] = {}
        self.borrows = False
        self.adopts: Literal["as it is", "frozen", "cloned", "owned"] = "as it is"

    @staticmethod
    def of(model: nn.Module, *, clone: bool = False) -> Store:
        """All parameters and buffers of `model`: the very same objects, or clones that share no storage."""
        store = Store()
        seen: dict[int, str] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            first = seen.setdefault(id(tensor), name)
            if first != name:
                store.aliases[name] = first
                continue
            store.put(name, _clone(tensor) if clone else tensor, persistent=_is_persistent(model, name))
        return store

    @staticmethod
    def borrowing(model: nn.Module) -> Store:
        """The model's own parameters, and clones of its buffers: graphs write those (counters, running statistics)."""
        store = Store.of(model)
        store.borrows = True
        for name, tensor in list(store.entries()):
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter):
                store.put(name, _clone(tensor), persistent=store.is_persistent(name))
        return store

    def fork(self) -> Store:
        """The same tensors under the same names; what is put into either is not in the other."""
        store = Store()
        for name, value in self.entries():
            store.put(name, value, persistent=self.is_persistent(name))
        store.aliases.update(self.aliases)
        return store

    def canonical(self, name: str) -> str:
        """The name a tensor is stored under."""
        return self.aliases.get(name, name)

    def names_of(self, name: str) -> list[str]:
        """All names of one stored tensor, its own first."""
        return [name, *(alias for alias, to in self.aliases.items() if to == name)]

    def put(self, name: str, value: Tensor | nn.Module, *, persistent: bool = True) -> None:
        """Store a Parameter, buffer or module under a dotted name, in place of what was there."""
        # The tables are written directly: register_parameter refuses names that this class has as methods.
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]  # None is never stored
        for table in (owner._parameters, owner._buffers, owner._modules):
            table.pop(leaf, None)
        owner._non_persistent_buffers_set.discard(leaf)
        if isinstance(value, nn.Module):
            owner._modules[leaf] = value
        elif isinstance(value, nn.Parameter):
            owner._parameters[leaf] = value
        else:
            owner._buffers[leaf] = value
            if not persistent:
                owner._non_persistent_buffers_set.add(leaf)

    def take(self, name: str) -> None:
        """Take out a Parameter or buffer."""
        *path, leaf = name.split(".")
        owner = self.get_submodule(".".join(path))
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner._non_persistent_buffers_set.discard(leaf)

    def get(self, name: str) -> Tensor | QTensor | None:
        """What is stored under `name` or its alias; None if nothing is."""
        *path, leaf = self.canonical(name).split(".")
        owner: nn.Module | None = self
        for part in path:
            owner = owner._modules.get(part) if owner is not None else None
        if owner is None:
            return None
        for tensors in (owner._parameters, owner._buffers):
            tensor = tensors.get(leaf)
            if tensor is not None:
                return tensor
        module = owner._modules.get(leaf)
        return module if isinstance(module, QTensor) else None

    def is_persistent(self, name: str) -> bool:
        """Whether a stored tensor belongs to the state_dict."""
        return _is_persistent(self, name)

    def constant(self, value: Tensor) -> str:
        """Store a constant of a graph once, whatever variant it comes from, and give its name."""
        constants = self._modules.get("constants")
        stored = constants._buffers if constants is not None else {}
        for name, known in stored.items():
            same = known is not None and known.dtype == value.dtype and known.device == value.device
            if same and torch.equal(known, value):  # type: ignore[arg-type]  # not None
                return f"constants.{name}"
        name = next(f"constants.c{i}" for i in range(len(stored) + 1) if f"c{i}" not in stored)
        self.put(name, value, persistent=False)
        return name

    def adopt(self, name: str, tensor: Tensor, *, persistent: bool) -> None:
        """`put` a tensor of another store, frozen or cloned as `freeze` and `own` did with what was here before."""
        if self.adopts in ("cloned", "owned"):
            tensor = _clone(tensor)
        if self.adopts in ("frozen", "cloned") and isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor.detach(), requires_grad=False)
        self.put(name, tensor, persistent=persistent)

    def alias_as(self, other: Store) -> None:
        """Take over the aliases of another store for what is stored here."""
        taken = {alias: name for alias, name in other.aliases.items() if self.get(name) is not None}
        self.aliases.clear()  # and not replaced: a child may be called `aliases`
        self.aliases.update(taken)

    def freeze(self, *, clone: bool = False) -> None:
        """Parameter objects of our own, which take no gradient; with `clone`, all floating tensors on own memory."""
        self.adopts = "cloned" if clone else "frozen"
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    data = parameter.detach().clone() if clone else parameter.detach()
                    module._parameters[name] = nn.Parameter(data, requires_grad=False)
            if clone and not isinstance(module, QTensor):
                module._buffers.update({n: b.clone() for n, b in module._buffers.items() if b is not None})

    def own(self) -> None:
        """Clones in place of all tensors, which take gradients as those did."""
        self.adopts = "owned"
        for name, value in list(self.entries()):
            if isinstance(value, Tensor):
                self.put(name, _clone(value), persistent=self.is_persistent(name))

    def entries(self) -> Iterator[tuple[str, Tensor | QTensor]]:
        """Everything stored, once: parameters, buffers, and QTensors whole."""
        yield from _entries(self, "")

    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(t.numel() * t.element_size() for t in tensors_of(self))


def view(store: Store, module: nn.Module) -> None:
    """Make `module` see the store's tensors as its own (and the store see what `module.to()` does to them)."""
    module._parameters, module._buffers = store._parameters, store._buffers
    module._modules = store._modules
    module._non_persistent_buffers_set = store._non_persistent_buffers_set


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers below `module`, each once."""
    yield from module.parameters()
    yield from module.buffers()


def _is_persistent(module: nn.Module, name: str) -> bool:
    *path, leaf = name.split(".")
    for part in path:
        module = module._modules[part]  # type: ignore[assignment]  # the path exists
    return leaf not in module._non_persistent_buffers_set


def _entries(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor | QTensor]]:
    for table in (module._parameters, module._buffers):
        for name, value in table.items():
            if value is not None:
                yield prefix + name, value
    for name, child in module._modules.items():
        if isinstance(child, QTensor):
            yield prefix + name, child
        elif child is not None:
            yield from _entries(child, f"{prefix}{name}.")


def _clone(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in it could never be trained
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
