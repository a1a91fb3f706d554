"""A model as graphs: one Store, one Plan, and a graph per variant, behind the original call signature."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .contract import Contract, Key, Signature, bind_call, call_key
from .errors import CaptureError, DwindleError
from .graph_json import dtype_named
from .own_state import own_state
from .plan import Plan
from .program import Program
from .store import Store, view
from .structure import Structure, rebuild

MAX_VARIANTS = 8

# The attribute that holds the model's own dtype, as text.
DTYPE = "dtype"

# Growing captures and verifies, which borrows the model and wants the processor's threads alone: one at a time.
_GROWING = threading.RLock()

# (the model, training, arguments) -> a further variant of it
Grow = Callable[["GraphModel", bool, Mapping[str, Any]], Program]


class GraphModel(nn.Module):
    """Calls select a variant by mode and by which arguments are present; a new one is captured on first use.

    Parameters and buffers are those of the store, under the model's own names. `grow` captures the model once more
    and replays the Plan on it; None where the model is not at hand. Its state_dict has a tied tensor under every
    name, as the model's has, and each of them alone will do when one is loaded.
    """

    # Of an instance's own attributes, those that a copy gets otherwise: torch's tables, and what is made anew.
    NOT_COPIED: tuple[str, ...] = (
        *("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_compiled_call_impl"),
        *("store", "plan", "signature", "variants", "_grow", "_attributes"),
    )

    def __init__(
        self,
        store: Store,
        plan: Plan,
        signature: Signature,
        *,
        grow: Grow | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        view(store, self)
        # Past nn.Module's own __setattr__, which would register the store as a child of itself.
        self.__dict__["store"] = store
        self.plan, self.signature = plan, signature
        self.variants: dict[Key, Program] = {}
        self._grow = grow
        self._attributes = dict(attributes or {})
        self.register_state_dict_post_hook(_name_aliases)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.register_load_state_dict_pre_hook(_resolve_aliases)  # type: ignore[no-untyped-call]  # as above

    @classmethod
    def named(cls, model: nn.Module, suffix: str) -> type[Self]:
        """A subclass whose name and forward signature are the model's, for tools that inspect the class."""
        return cls.called(f"{type(model).__name__}{suffix}", Signature.of(model))

    @classmethod
    def called(cls, name: str, signature: Signature) -> type[Self]:
        """A subclass of that name and with that forward signature."""

        def forward(self: GraphModel, *args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs)

        forward.__signature__ = signature.as_inspect()  # type: ignore[attr-defined]  # read by inspect
        return type(name, (cls,), {"forward": forward, "__doc__": cls.__doc__})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original model's forward."""
        return self._call(args, kwargs)

    def add(self, program: Program) -> None:
        """Add a variant. Raises CaptureError above MAX_VARIANTS, naming those there are."""
        if len(self.variants) >= MAX_VARIANTS and program.contract.key not in self.variants:
            raise CaptureError(
                "too many variants of one model",
                required=f"at most {MAX_VARIANTS} combinations of mode, arguments and constants",
                found="\n    " + "\n    ".join(self.describe_variants()),
                cure="pass numbers that change from call to call as tensors",
            )
        self.variants[program.contract.key] = program

    def program(self, training: bool, structure: Structure, arguments: Callable[[], Mapping[str, Any]]) -> Program:
        """The variant that serves a call, captured if need be."""
        found = self.variants.get(call_key(training, structure))
        return found if found is not None else self._capture(training, structure, arguments())

    @property
    def contracts(self) -> list[Contract]:
        """What the variants captured so far take and give."""
        return [program.contract for program in self.variants.values()]

    def describe_variants(self) -> list[str]:
        """One line a variant."""
        return [contract.describe() for contract in self.contracts]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the floating-point parameters; where all are packed, that of the model they were."""
        held = (t.dtype for t in self.parameters() if t.is_floating_point())
        return next(held, None) or dtype_named(self._attributes.get(DTYPE, "float32"))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        structure, tensors = bind_call(self.signature, args, kwargs)
        program = self.program(self.training, structure, lambda: self.signature.bind(args, kwargs))
        program.contract.check(tensors)
        return rebuild(program.contract.output, self._run(program, program.contract.laid(tensors)))

    def _run(self, program: Program, tensors: Sequence[Tensor]) -> Any:
        return program.module(*tensors)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def _capture(self, training: bool, structure: Structure, arguments: Mapping[str, Any]) -> Program:
        if self._grow is None:
            given = ", ".join(structure["items"])
            raise CaptureError(
                f"no {'train' if training else 'eval'} variant for the arguments ({given})",
                required="one of\n    " + "\n    ".join(self.describe_variants()),
                found=f"{'train' if training else 'eval'}({given})",
                cure="call it as captured, or compress the original model with such inputs",
            )
        with _GROWING, own_state():
            known = self.variants.get(call_key(training, structure))  # of a thread that was here before
            if known is None:
                # A graph is captured of the values alone: hooks may have made them part of another.
                given = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), dict(arguments))
                known = self._grow(self, training, given)
                self.add(known)
            return known

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any module. One name of a tied tensor will do; unless strict, its others are told as missing.

        So does torch; load_model of safetensors, which accelerate calls, takes anything else for a damaged file.
        """
        found = super().load_state_dict(state_dict, strict, assign)
        if not strict:
            tied = {name for pair in _aliases(self, "") for name in pair}
            own = {key for name in tied for key in _of_entry(self.state_dict(), name)}
            found.missing_keys.extend(sorted(own - set(state_dict) - set(found.missing_keys)))
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # The model may have a child called `plan` or `log`: a fact of ours neither replaces it nor is refused.
        if isinstance(value, Tensor | nn.Module):
            super().__setattr__(name, value)
        else:
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("_attributes", {})
        if name in attributes:
            return attributes[name]
        return super().__getattr__(name)

    def __reduce__(self) -> Any:
        raise DwindleError(
            f"{type(self).__name__} cannot be pickled", cure="save() and dwindle.load() it, or save its state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Tensors of its own, and the same graphs on them. What was decided is shared; it never changes."""
        other = self.__new__(type(self))
        memo[id(self)] = other  # first: hooks and methods that are bound to this model are bound to the copy
        with torch.inference_mode(False):  # a tensor made in it could never be trained
            store = copy.deepcopy(self.store, memo)
            GraphModel.__init__(other, store, self.plan, self.signature, grow=self._grow, attributes=self._attributes)
            for name, value in self.__dict__.items():
                if name not in self.NOT_COPIED:
                    other.__dict__[name] = copy.deepcopy(value, memo)
        for program in self.variants.values():
            other.add(program.copy(store))
        return other


def _name_aliases(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for alias, name in _aliases(model, prefix):
        for key in _of_entry(state, name):
            state[alias + key.removeprefix(name)] = state[key]


def _resolve_aliases(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for alias, name in _aliases(model, prefix):
        for key in _of_entry(state, alias):
            state.setdefault(name + key.removeprefix(alias), state.pop(key))


def _aliases(model: nn.Module, prefix: str) -> list[tuple[str, str]]:
    store: Store = model.__dict__["store"]
    return [(prefix + alias, prefix + name) for alias, name in store.aliases.items()]


def _of_entry(state: Mapping[str, Any], name: str) -> list[str]:
    """The keys of a tensor, or of the parts of a QTensor."""
    return [key for key in state if key == name or key.startswith(f"{name}.")]


def flat_outputs(values: Any) -> list[Tensor]:
    """The tensors among a graph's flat outputs."""
    return [v for v in values if isinstance(v, Tensor)]
