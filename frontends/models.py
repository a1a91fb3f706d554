"""What a person names on the command line, loaded: models, example inputs and calibration data.

    MODEL   a local transformers directory | an artifact | package.module:factory
    DATA    a text file, one text a line   | package.module:factory

A model's factory returns a module or (module, inputs); a data factory returns an iterable of batches, each a dict
of keyword arguments, a tuple or a tensor. Modules are also looked for in the working directory. Nothing is fetched.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..runtime.errors import CaptureError, DwindleError, MissingDependencyError
from ..runtime.saving import MANIFEST
from .inputs import example_inputs

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")
BATCH, TOKENS = 8, 128

# Tokens of a real text make errors that are worth reading.
TEXTS = (
    "The committee will publish the results of its inquiry on Thursday, after eleven months of hearings.",
    "Prices rose again in the spring, though more slowly than the bank had said in its last report of the year.",
)

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class SourceError(DwindleError):
    """A model or data that was named on the command line and cannot be loaded."""


@dataclass(frozen=True)
class Source:
    """A model to compress. inputs: one example call; tokenizer: None for models that take no text."""

    name: str
    model: nn.Module
    inputs: Any
    tokenizer: Any = None


def is_artifact(named: str) -> bool:
    """Whether `named` is a folder that `Compressed.save` wrote."""
    return (Path(named) / MANIFEST).is_file()


def load_source(named: str) -> Source:
    """The model that `named` stands for, in eval mode, with an example call. Raises SourceError."""
    path = Path(named)
    if is_artifact(named):
        raise SourceError(
            f"{named} is compressed already",
            required="the original model: a transformers directory or package.module:factory",
            found="an artifact",
            cure="give the model that it was made from; `dwindle inspect` reads artifacts",
        )
    if (path / CONFIG).is_file():
        return _from_directory(path)
    if path.exists() or not _FACTORY.fullmatch(named):
        raise SourceError(
            f"no model at {named!r}",
            required=f"a transformers directory (with {CONFIG}), an artifact, or package.module:factory",
            found=("a file" if path.is_file() else f"a folder without {CONFIG}") if path.exists() else "no such path",
        )
    made = call_factory(named)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise SourceError(
            f"{named} gives no model",
            required="a torch.nn.Module, or (module, inputs)",
            found=type(model).__name__,
        )
    model.eval()
    if inputs is None:
        inputs = _examples(named, model)
    return Source(named.partition(":")[2], model, inputs)


def load_data(named: str, source: Source) -> Iterable[Any]:
    """Calibration batches that `named` stands for. Raises SourceError."""
    path = Path(named)
    if path.is_file():
        return _text_batches(path, source)
    if path.exists() or not _FACTORY.fullmatch(named):
        found = "a folder" if path.exists() else "no such file"
        raise SourceError(
            f"no data at {named!r}", required="a text file, or package.module:factory of batches", found=found
        )
    batches = call_factory(named)
    if not isinstance(batches, Iterable):
        raise SourceError(f"{named} gives no batches", required="an iterable of batches", found=type(batches).__name__)
    return batches


def call_factory(named: str) -> Any:
    """Import package.module and call its factory. Raises SourceError, chained to what went wrong inside."""
    module, _, attribute = named.partition(":")
    with _working_directory():
        try:
            factory: Any = importlib.import_module(module)
            for part in attribute.split("."):
                factory = getattr(factory, part)
        except (ImportError, AttributeError) as error:
            raise SourceError(
                f"{named} cannot be imported", required="package.module:factory", found=error, cure="see --debug"
            ) from error
        if not callable(factory):
            raise SourceError(f"{named} is no factory", required="a callable", found=type(factory).__name__)
        try:
            return factory()
        except DwindleError:
            raise
        except Exception as error:
            raise SourceError(
                f"{named}() failed", found=f"{type(error).__name__}: {error}", cure="see --debug"
            ) from error


@contextmanager
def _working_directory() -> Iterator[None]:
    """Import from the working directory, as `python -m` does; a console script does not by itself."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _from_directory(path: Path) -> Source:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", "hf", f"loading {path}") from error
    logging: Any = importlib.import_module("transformers.utils.logging")
    logging.disable_progress_bar()  # the command has its own
    try:
        named = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("architectures") or [""]
        cls = getattr(transformers, named[0], None) or transformers.AutoModel
        model: nn.Module = cls.from_pretrained(path, local_files_only=True).eval()
        has_tokenizer = any((path / name).is_file() for name in TOKENIZERS)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) if has_tokenizer else None
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, those of safetensors, ...
        raise SourceError(
            f"{path} cannot be loaded",
            required="a directory that save_pretrained wrote",
            found=f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}",
            cure="see --debug",
        ) from error
    inputs = _tokenized(model, tokenizer) if tokenizer is not None else None
    return Source(path.resolve().name, model, inputs or _examples(str(path), model), tokenizer)


def _examples(named: str, model: nn.Module) -> dict[str, Any]:
    try:
        return example_inputs(model)
    except CaptureError as error:
        raise SourceError(
            f"no example inputs for {named}",
            required="a factory that returns (module, inputs)",
            found=f"a {type(model).__name__} alone, and no transformers config to make inputs from",
        ) from error


def _tokenized(model: nn.Module, tokenizer: Any) -> dict[str, Any] | None:
    """A call with what the tokenizer gives, so that the compressed model serves such calls; None if it is no such."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "") != "input_ids" or getattr(config, "is_encoder_decoder", False):
        return None
    # All texts are cut to the length of the shortest, so that there is no padding. What a model gives at a padded
    # position nobody reads, and it differs most after quantising: the error that is printed would be about that.
    common = min(len(ids) for ids in tokenizer(list(TEXTS))["input_ids"])
    return _encode(tokenizer, list(TEXTS), inspect.signature(model.forward).parameters, longest=common, padding=False)


def _encode(
    tokenizer: Any, texts: list[str], taken: Iterable[str], *, longest: int = TOKENS, padding: bool = True
) -> dict[str, Any]:
    if padding and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(longest, tokenizer.model_max_length)
    encoded: Mapping[str, Any] = tokenizer(
        texts, padding=padding, truncation=True, max_length=longest, return_tensors="pt"
    )
    return {name: value for name, value in encoded.items() if name in taken}


def _text_batches(path: Path, source: Source) -> list[dict[str, Any]]:
    if source.tokenizer is None:
        raise SourceError(
            f"{path} is text, and {source.name} has no tokenizer",
            required="a transformers directory with a tokenizer, or package.module:factory of batches",
            found="no tokenizer",
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path} is not text", required="text in UTF-8, one text a line", found=error, cure="convert it to UTF-8"
        ) from error
    texts = [line for line in lines if line]
    if not texts:
        raise SourceError(f"{path} has no text", required="at least one line that is not blank", found="none")
    taken = inspect.signature(source.model.forward).parameters
    return [_encode(source.tokenizer, texts[i : i + BATCH], taken) for i in range(0, len(texts), BATCH)]
