"""Example inputs: from whatever a person passes to named arguments, or found for transformers models."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..runtime.contract import Signature, bind_call, call_key
from ..runtime.errors import CalibrationError, CaptureError, DwindleError
from ..runtime.program import Program

EXAMPLE_TOKENS = 16
WITHOUT_LABELS = "give a dict of the forward's arguments, or inputs without labels"


def as_arguments(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """One call's arguments by parameter name.

    inputs: a mapping of keyword arguments, a tuple of positional ones, one tensor, or None, which makes up
    an example for a transformers model.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError("no model", required="a torch.nn.Module", found=type(model).__name__)
    _require_unwrapped(model)
    signature = Signature.of(model)
    if inputs is None:
        inputs = example_inputs(model)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not (isinstance(inputs, tuple | list) or _has_names(inputs)):
        raise CaptureError(
            "example inputs of an unknown type",
            required="a dict of keyword arguments, a tuple of positional ones, or a tensor",
            found=type(inputs).__name__,
            cure="give one batch, such as next(iter(loader))" if isinstance(inputs, DataLoader) else None,
        )
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple | list) else ((), dict(inputs))
    _require_named(model, len(args))
    if len(args) > len(signature.names):
        raise _too_many(CaptureError, "more inputs than forward takes", signature, inputs)
    return signature.bind(tuple(args), kwargs)


def _require_unwrapped(model: nn.Module) -> None:
    """Refuse what torch puts around a model: its forward has no argument names, and its tensors other names."""
    kind = type(model)
    wrapped = "_orig_mod" if hasattr(model, "_orig_mod") else None
    if wrapped is None and kind.__module__.startswith("torch.nn.parallel") and hasattr(model, "module"):
        wrapped = "module"
    if wrapped is not None:
        what = "torch.compile" if wrapped == "_orig_mod" else kind.__name__
        raise CaptureError(
            f"the model is wrapped by {what}",
            required="the model itself",
            found=f"{kind.__name__}({type(getattr(model, wrapped)).__name__})",
            cure=f"pass model.{wrapped}" + (", and compile what comes back" if wrapped == "_orig_mod" else ""),
        )


def _require_named(model: nn.Module, positional: int) -> None:
    """Refuse a call of which some arguments have no name. Keyword arguments may go to **kwargs."""
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    named = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        raise CaptureError(
            "forward takes arguments by position alone",
            required="a forward whose arguments can be given by name",
            found=f"{type(model).__name__}.forward{inspect.signature(model.forward)}",
            cure="drop the / from its signature, or wrap the model in a module without one",
        )
    nameless = kinds == [inspect.Parameter.VAR_POSITIONAL]
    if nameless or (inspect.Parameter.VAR_POSITIONAL in kinds and positional > named):
        raise CaptureError(
            "forward takes arguments without names",
            required="a forward whose arguments have names",
            found=f"{type(model).__name__}.forward{inspect.signature(model.forward)}",
            cure="wrap the model in a module whose forward names each argument, such as forward(self, x, mask)",
        )


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """A small batch for a transformers model, from its config. Raises CaptureError for other models."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    if config is not None and main == "input_ids" and hasattr(config, "vocab_size"):
        ids = torch.randint(0, config.vocab_size, (2, EXAMPLE_TOKENS), generator=generator)
        example: dict[str, Any] = {"input_ids": ids}
        if "attention_mask" in names:
            example["attention_mask"] = torch.ones_like(ids)
        if getattr(config, "is_encoder_decoder", False):
            example["decoder_input_ids"] = ids[:, : EXAMPLE_TOKENS // 2].clone()
        return example
    if config is not None and main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        pixels = torch.randn(2, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels}
    raise CaptureError(
        f"no example inputs for {type(model).__name__}",
        required="inputs=... (one batch: a dict of keyword arguments, a tuple, or a tensor)",
        found="none, and the model has no transformers config to make one from",
    )


def flat_batches(program: Program, signature: Signature, data: Iterable[Any]) -> Iterator[list[Tensor]]:
    """Batches of calibration data as flat inputs of `program`.

    Each batch is a mapping, tuple or tensor as for `as_arguments`; arguments the program does not take
    (labels) are dropped by name. Raises CalibrationError for a batch that lacks one it takes, or has more without
    names than forward takes.
    """
    wanted = program.contract.arguments["items"]
    for batch in _taken(data):
        args = (batch,) if isinstance(batch, Tensor) else tuple(batch) if isinstance(batch, tuple | list) else ()
        kwargs = {n: v for n, v in dict(batch).items() if n in wanted} if _has_names(batch) else {}
        if len(args) > len(signature.names):
            what = "a batch of calibration data has more than forward takes"
            raise _too_many(CalibrationError, what, signature, batch)
        bound = {**_constants(wanted), **signature.bind(args, kwargs)}
        structure, tensors = bind_call(signature, (), {k: v for k, v in bound.items() if k in wanted})
        if call_key(program.contract.training, structure) != program.contract.key:
            raise CalibrationError(
                "a batch of calibration data does not fit the captured call",
                required=", ".join(wanted),
                found=", ".join(bound) or type(batch).__name__,
                cure="give batches with the same arguments as inputs=",
            )
        program.contract.check(tensors)
        yield tensors


def refuse_one_batch(data: Iterable[Any]) -> None:
    """Raise CalibrationError for one batch in place of several: its names, or rows, would be taken for batches."""
    if isinstance(data, Tensor) or _has_names(data):
        raise CalibrationError(
            "data is one batch",
            required="an iterable of batches, such as a list or a DataLoader",
            found=type(data).__name__,
            cure="data=[batch]",
        )


def _taken(data: Iterable[Any]) -> Iterator[Any]:
    """The batches; what goes wrong while they are made is said to be the data's, not a pass's."""
    refuse_one_batch(data)
    try:
        yield from data
    except DwindleError:
        raise
    except Exception as error:
        raise CalibrationError(
            "the calibration data cannot be read",
            required="an iterable of batches",
            found=f"{type(error).__name__}: {error}",
        ) from error


def _has_names(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "keys")  # BatchEncoding has keys and is no Mapping


def _constants(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: part["value"] for name, part in arguments.items() if part["kind"] == "constant"}


def _too_many(kind: type[DwindleError], what: str, signature: Signature, given: Any) -> DwindleError:
    names = signature.names
    required, found = f"at most {len(names)}: {', '.join(names)}", f"a {type(given).__name__} of {len(given)}"
    return kind(what, required=required, found=found, cure=WITHOUT_LABELS)
