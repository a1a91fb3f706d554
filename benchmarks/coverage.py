"""Which architectures can be pruned by 30 %, and whether every cut is right.

    python benchmarks/coverage.py [--only bert gpt2 ...] [--again]

Each of `architectures.py` is captured, all default groups lose 30 % of their indices by the l2 score, and the cut is
proved: masked equals sliced in float64, with parameters and buffers randomised, at two batch sizes where the batch
may vary. Success is: the sliced graph runs forward and backward, its outputs keep their shapes, at least 10 % of the
parameters are gone that are not in embeddings, and the proof's error is below 1e-6.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import timing  # before torch
import torch
from architectures import ARCHITECTURES, Architecture
from results import Point, Results
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dwindle.frontends.capture import capture
from dwindle.frontends.compress import proof_inputs
from dwindle.frontends.inputs import as_arguments, flat_batches
from dwindle.passes.canonicalize import canonicalize
from dwindle.passes.prune.decide import PruneRule, chosen
from dwindle.passes.prune.groups import find_groups
from dwindle.passes.prune.keep import Kept, count
from dwindle.passes.prune.proof import LIMIT, proven
from dwindle.passes.prune.sliced import sliced
from dwindle.passes.prune.transfer import rule_of
from dwindle.passes.prune.walk import Walk
from dwindle.runtime.contract import Signature
from dwindle.runtime.errors import DwindleError
from dwindle.runtime.model import flat_outputs
from dwindle.runtime.store import Store

RATIO, LEAST = 0.3, 0.10
aten = torch.ops.aten


def measure(architecture: Architecture) -> Point:
    """One row of the table; what fails is named and stays in it."""
    point: Point = {"kind": architecture.kind, "captured": False, "success": False}
    model, inputs = architecture.make()
    started = time.process_time()
    try:
        arguments = as_arguments(model, inputs)
        program = canonicalize(capture(model, arguments, Store.of(model, clone=True)))
        program.tidy()
        point |= {"captured": True, "capture s": time.process_time() - started}
        (batch,) = (list(tensors) for tensors in flat_batches(program, Signature.of(model), [arguments]))
        started = time.process_time()
        walk = Walk.over(program, rule_of)
        groups = find_groups(walk)
        point |= {"analysis s": time.process_time() - started, "groups": sum(not g.reason for g in groups)}
        point["no rule for"] = sorted({g.reason.removeprefix("no rule for ") for g in groups if "no rule" in g.reason})
        kept = chosen(walk, [PruneRule(ratio=RATIO)])
        point["removed"] = removed(walk, kept)
        started = time.process_time()
        point["error"] = proven(walk, kept, proof_inputs(program, batch))
        point["proof s"] = time.process_time() - started
        before = [t.shape for t in flat_outputs(program.run(batch))]
        sliced(program, walk, kept)
        outputs = flat_outputs(program.run(batch))
        point["shapes kept"] = [t.shape for t in outputs] == before
        point["backward"] = backward(program.store, outputs)
    except (DwindleError, RuntimeError, ValueError, TypeError) as error:
        return point | {"failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    right = point["error"] < LIMIT and point["shapes kept"] and point["backward"]
    return point | {"success": bool(right and point["removed"] >= LEAST)}


def removed(walk: Walk, kept: Kept) -> float:
    """The share of parameters that are gone, embedding tables aside."""
    tables = {walk.program.tensor_of(node.args[0]) for node in walk.program.calls(aten.embedding.default)}
    before = after = 0
    for name, axes in walk.stored.items():
        tensor = walk.program.store.get(name)
        if isinstance(tensor, nn.Parameter) and name not in tables:
            before += tensor.numel()
            after += math.prod(count(axis, kept) for axis in axes)
    return 1 - after / max(before, 1)


def backward(store: Store, outputs: list[Tensor]) -> bool:
    """Whether a loss of all outputs has finite gradients, at least one."""
    floating = [t for t in outputs if t.is_floating_point() and t.requires_grad]
    if not floating:
        return False
    torch.stack([t.float().nan_to_num(neginf=0.0, posinf=0.0).square().mean() for t in floating]).sum().backward()
    gradients = [p.grad for p in store.parameters() if p.grad is not None]
    return bool(gradients) and all(bool(g.isfinite().all()) for g in gradients)


def show(rows: dict[str, Point], console: Console) -> None:
    """The table, and how many succeed by kind."""
    table = Table(title=f"Pruned by {RATIO:.0%}", title_justify="left")
    for heading in ("architecture", "groups", "removed", "error", "analysis s", "capture s", "proof s", "what fails"):
        table.add_column(heading)
    for name, point in rows.items():
        cells = [f"{point[key]:.{form}}" if key in point else "" for key, form in FORMS.items()]
        wrong = point.get("failure") or (
            "" if point["success"] else "too little" if point["removed"] < LEAST else "wrong"
        )
        table.add_row(name, str(point.get("groups", "")), *cells, wrong[:70])
    console.print(table)
    kinds = dict.fromkeys(point["kind"] for point in rows.values())
    for kind in [*kinds, None]:
        own = [point for point in rows.values() if kind in (None, point["kind"])]
        console.print(f"{kind or 'all'}: {sum(p['success'] for p in own)} of {len(own)}")


def wrong(point: Point) -> str:
    """Why a row is no success; empty where it is one."""
    if point["success"] or "failure" in point:
        return str(point.get("failure", ""))
    return f"only {point['removed']:.2f} removed" if point["removed"] < LEAST else "the cut is not right"


FORMS = {"removed": "2f", "error": "0e", "analysis s": "2f", "capture s": "1f", "proof s": "1f"}


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of architectures")
    parser.add_argument("--again", action="store_true", help="measure what is already there as well")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    timing.one_thread()
    results, console = Results("coverage", again=arguments.again), Console(width=150)
    rows: dict[str, Point] = {}
    wanted = [a for a in ARCHITECTURES if not arguments.only or a.name in arguments.only]
    for architecture in track(wanted, "Pruning", console=Console(stderr=True)):
        configuration = {"architecture": architecture.name, "ratio": RATIO}
        rows[architecture.name] = results.point(configuration, lambda a=architecture: measure(a))
    show(rows, console)


if __name__ == "__main__":
    main()
