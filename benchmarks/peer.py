"""What Torch-Pruning makes of an architecture, for `coverage.py --peer`: pip install -e '.[peers]'

It is used as its documentation says: a pruner over the model and its example inputs, the l2 norm of a group as score,
30 % of each, the layers that make the outputs left alone. What it cannot know of attention it is told: the heads of
every projection, and afterwards the new numbers of heads and their widths are written into the modules that hold them.
Three ways are tried, and the best counts:

    plain      nothing is said of heads
    widths     heads are named, each loses 30 % of its width
    heads      heads are named, 30 % of them go

Success is that of `coverage.py` as far as it applies: the pruned model runs forward and backward, its outputs keep
their shapes, and at least 10 % of the parameters are gone that are not in embeddings. Whether what it computes then
is right is not asked. A process of its own does the work; one that hangs or dies is counted as that.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import children
import timing  # before torch
import torch
from catalogue import LEAST, RATIO, named
from results import Point
from torch import Tensor, nn
from torch.utils import _pytree

SECONDS = 10
WAYS = ("plain", "widths", "heads")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
WIDTHS = ("attention_head_size", "head_dim", "attention_head_dim", "head_size", "key_value_proj_dim", "dim_per_head")
TOTALS = ("all_head_size", "inner_dim", "embed_dim", "split_size", "attn_dim", "total_dim", "dim", "hidden_size")


def version() -> str | None:
    """Of Torch-Pruning; None where it is not installed."""
    try:
        return importlib.metadata.version("torch-pruning")
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(name: str, child: children.Child) -> Point:
    """The best of all ways for the architecture of that name, in at most SECONDS of CPU time altogether."""
    best: Point = {"success": False, "runs": False}
    started = time.monotonic()
    try:
        for point in child(name):
            best = max(best, point, key=_merit)
    except (TimeoutError, ChildProcessError) as error:
        if not best["success"]:
            best = best | {"failure": str(error)}
    return best | {"s": time.monotonic() - started}


def why(point: Point) -> str:
    """Why a row is no success; empty where it is one."""
    if point.get("success", True) or "failure" in point:
        return str(point.get("failure", ""))
    if point["removed"] < LEAST:
        return f"only {point['removed']:.2f} removed"
    return "outputs change shape" if point["backward"] else "no gradient"


def _merit(point: Point) -> tuple[bool, bool, bool, float]:
    return point["success"], point["runs"], "way" in point, point.get("removed", 0.0)


def tried(name: str) -> Iterator[Point]:
    """Every way until one succeeds."""
    timing.quiet_on_one_thread()
    for way in WAYS:
        model, inputs = named(name).make()
        point = _one(model, inputs, way)
        yield point
        if point["success"]:
            return


def _one(model: nn.Module, inputs: Mapping[str, Any], way: str) -> Point:
    import torch_pruning

    point: Point = {"way": way, "success": False, "runs": False}
    counted, before = _counted(model), _outputs(model(**inputs))
    shapes, size = [t.shape for t in before], sum(p.numel() for p in counted.values())
    heads = {} if way == "plain" else _heads(model)
    try:
        pruner = torch_pruning.pruner.BasePruner(
            model,
            dict(inputs),
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            ignored_layers=_last_layers(model, inputs),
            num_heads=dict(heads),
            prune_num_heads=way == "heads",
            prune_head_dims=way != "heads",
            head_pruning_ratio=RATIO if way == "heads" else 0.0,
            in_channel_groups={},
            out_channel_groups={},
            output_transform=lambda values: [t for t in _outputs(values) if t.requires_grad],
        )
        widths = {layer: (count, _width(layer)) for layer, count in heads.items()}
        pruner.step()
        _tell(model, widths, pruner.num_heads)
        after = _outputs(model(**inputs))
        point["shapes kept"] = [t.shape for t in after] == shapes
        point["backward"] = _backward(model, after)
    except Exception as error:  # whatever another project raises is what this table shows
        return point | {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    left = dict(model.named_parameters())
    point["removed"] = 1 - sum(left[name].numel() for name in counted if name in left) / max(1, size)
    point["runs"] = bool(point["backward"] and point["removed"] >= LEAST)
    return point | {"success": bool(point["runs"] and point["shapes kept"])}


def _outputs(values: Any) -> list[Tensor]:
    """Floating tensors among what a model gave."""
    return [t for t in _pytree.tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


def _counted(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are in no embedding table."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {name: p for name, p in model.named_parameters() if id(p) not in tables}


def _last_layers(model: nn.Module, inputs: Mapping[str, Any]) -> list[nn.Module]:
    """Layers with parameters from which an output comes with no other in between."""
    made: dict[Any, nn.Module] = {}

    def note(module: nn.Module, args: Any, result: Any) -> None:
        for tensor in _outputs(result):
            if tensor.grad_fn is not None:
                made.setdefault(tensor.grad_fn, module)

    layers = [m for m in model.modules() if list(m.parameters(recurse=False)) and not list(m.children())]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    waiting = [t.grad_fn for t in _outputs(model(**inputs)) if t.grad_fn is not None]
    for hook in hooks:
        hook.remove()
    found, seen = {}, set()
    while waiting:
        step = waiting.pop()
        if step in made:
            found[made[step]] = None
        elif step not in seen:
            seen.add(step)
            waiting += [source for source, _ in step.next_functions if source is not None]
    return list(found)


def _first(module: nn.Module, names: tuple[str, ...]) -> int:
    found = (getattr(module, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 1), 0)


def _width(layer: nn.Module) -> int:
    """How many channels a layer gives."""
    return int(getattr(layer, "out_features", 0) or getattr(layer, "nf", 0) or layer.weight.shape[0])


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Projections of modules that name their heads: those to queries, keys and values."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        count = _first(module, HEADS) or (_first(config, HEADS) if "attention" in type(module).__name__.lower() else 0)
        keys = _first(module, KEY_HEADS) or (_first(config, KEY_HEADS) if config is not None else 0) or count
        for name, layer in module.named_children() if count else ():
            if isinstance(layer, nn.Linear) and name[:1] in "qkv":
                own = keys if name[0] in "kv" else count
                if layer.out_features % own == 0 and (name.startswith("qkv") or name in _PROJECTIONS):
                    found[layer] = own
    return found


_PROJECTIONS = frozenset(f"{letter}{end}" for letter in "qkv" for end in ("", "_proj", "_lin", "_linear", "_attn")) | {
    "query",
    "key",
    "value",
    "query_proj",
    "key_proj",
    "value_proj",
    "to_q",
    "to_k",
    "to_v",
}


def _tell(model: nn.Module, before: Mapping[nn.Module, tuple[int, int]], heads: Mapping[nn.Module, int]) -> None:
    """Write new numbers of heads, and their widths, into the modules that hold the old ones."""
    for module in model.modules():
        layers = [layer for layer in module.children() if layer in before]
        if not layers:
            continue
        first = layers[0]
        parts = 3 if len(layers) == 1 else 1
        old, width = before[first][0], before[first][1] // parts
        new, now = heads[first], _width(first) // parts
        known = {old: new}, {width // old: now // new}, {width: now}
        for names, numbers in zip((HEADS, WIDTHS, TOTALS), known, strict=True):
            for name in names:
                value = getattr(module, name, None)
                if isinstance(value, int) and value in numbers:
                    setattr(module, name, numbers[value])
        keys = heads[layers[1]] if len(layers) > 1 else new
        for name in KEY_HEADS:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, keys)
        if isinstance(getattr(module, "num_key_value_groups", None), int):
            module.num_key_value_groups = max(1, new // keys)


def _backward(model: nn.Module, outputs: list[Tensor]) -> bool:
    """Whether a loss of all outputs has finite gradients, at least one."""
    losses = [t.float().nan_to_num(neginf=0.0, posinf=0.0).square().mean() for t in outputs if t.requires_grad]
    if not losses:
        return False
    torch.stack(losses).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(gradients) and all(math.isfinite(float(g.abs().sum())) for g in gradients)
