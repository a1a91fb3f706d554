"""Which architectures can be pruned by 30 %, and whether every cut is right.

    python benchmarks/coverage.py [--family transformers timm ...] [--only bert gpt2 ...] [--peer] [--again]

Each architecture of the catalogue is captured, all default groups lose 30 % of their indices by the l2 score, and the
cut is proved: masked equals sliced in float64, with parameters and buffers randomised, at two batch sizes where the
batch may vary. Success is: the sliced graph runs forward and backward, its outputs keep their shapes, at least 10 % of
the parameters are gone that are not in embeddings, and the proof's error is below 1e-6. What cannot be captured fails.

`--peer` does the same with Torch-Pruning, in the same run: see peer.py. torchvision's and timm's models are measured
where these are installed: see image_models.py. Both sides work in processes with a limit on their CPU time.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping

import children
import peer
import timing  # before torch
import torch
from catalogue import FAMILIES, LEAST, RATIO, named, present
from results import Point, Results, command_line
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from dwindle.frontends.assemble import proof_inputs
from dwindle.frontends.capture import capture
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
from dwindle.runtime.model import flat_outputs
from dwindle.runtime.store import Store

SECONDS = 200  # of CPU time for one architecture
aten = torch.ops.aten


def measure(name: str, child: children.Child) -> Point:
    """One row of the table; what fails is named and stays in it."""
    point: Point = {"kind": named(name).kind, "captured": False, "success": False}
    started = time.monotonic()
    try:
        for found in child(name):
            point |= found
    except (TimeoutError, ChildProcessError) as error:
        point["failure"] = str(error)
    point["s"] = time.monotonic() - started
    if "failure" in point:
        return point
    right = point["error"] < LIMIT and point["shapes kept"] and point["backward"]
    return point | {"success": bool(right and point["removed"] >= LEAST)}


def _measured(name: str) -> Iterator[Point]:
    """What is found, step by step, so that a step that never ends leaves what came before it."""
    timing.quiet_on_one_thread()
    model, inputs = named(name).make()
    try:
        started = time.process_time()
        arguments = as_arguments(model, inputs)
        program = canonicalize(capture(model, arguments, Store.of(model, clone=True)))
        program.tidy()
        yield {"captured": True, "capture s": time.process_time() - started}
        (batch,) = (list(tensors) for tensors in flat_batches(program, Signature.of(model), [arguments]))
        started = time.process_time()
        walk = Walk.over(program, rule_of)
        groups = find_groups(walk)
        yield {
            "analysis s": time.process_time() - started,
            "groups": sum(not g.reason for g in groups),
            "no rule for": sorted({g.reason.removeprefix("no rule for ") for g in groups if "no rule" in g.reason}),
        }
        kept = chosen(walk, [PruneRule(ratio=RATIO)])
        yield {"removed": removed(walk, kept)}
        started = time.process_time()
        batches = proof_inputs(program, batch)
        yield {"error": proven(walk, kept, batches), "batches": len(batches)}
        yield {"proof s": time.process_time() - started}
        before = [t.shape for t in flat_outputs(program.run(batch))]
        sliced(program, walk, kept)
        outputs = flat_outputs(program.run(batch))
        yield {"forward": True, "shapes kept": [t.shape for t in outputs] == before}
        yield {"backward": backward(program.store, outputs)}
    except Exception as error:  # whatever it is, it is what this table shows
        yield {"failure": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


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


def show(rows: Mapping[str, Point], peers: Mapping[str, Point], console: Console) -> None:
    """The table, and how many succeed by kind and by family."""
    table = Table(title=f"Pruned by {RATIO:.0%}", title_justify="left")
    headings = ["architecture", "captured", "groups", "removed", "forward", "backward", "error", "s", "what fails"]
    for heading in [*headings, *(["peer", "removed", "what fails"] if peers else [])]:
        table.add_column(heading)
    for name, point in rows.items():
        beside = peers.get(name, {})
        told = [_told(beside, "success"), _told(beside, "removed", ".2f"), peer.why(beside)[:40]] if peers else []
        table.add_row(
            name,
            _told(point, "captured"),
            _told(point, "groups"),
            _told(point, "removed", ".2f"),
            _told(point, "forward"),
            _told(point, "backward"),
            _told(point, "error", ".0e"),
            _told(point, "s", ".0f"),
            why(point)[:70],
            *told,
        )
    console.print(table)
    for title, own in _subsets(rows).items():
        line = f"{title}: {sum(rows[name]['success'] for name in own)} of {len(own)}"
        if peers:
            beside = [peers[name] for name in own if name in peers]
            line += f"; peer: {sum(p['success'] for p in beside)} of {len(beside)}"
            line += f", {sum(p['runs'] for p in beside)} with outputs of any shape"
        console.print(line)


def _subsets(rows: Mapping[str, Point]) -> dict[str, list[str]]:
    """Names by kind, by family, and all."""
    found: dict[str, list[str]] = {}
    for name, point in rows.items():
        family = name.partition("/")[0] if "/" in name else "transformers"
        kind = point["kind"] if family == "transformers" else None
        for title in filter(None, (kind, family)):
            found.setdefault(title, []).append(name)
    return found | {"all": list(rows)}


def _told(point: Point, key: str, form: str = "") -> str:
    value = point.get(key, "")
    return ("yes" if value else "no") if isinstance(value, bool) else format(value, form if value != "" else "")


def why(point: Point) -> str:
    """Why a row is no success; empty where it is one."""
    if point["success"] or "failure" in point:
        return str(point.get("failure", ""))
    if point["removed"] < LEAST:
        return f"only {point['removed']:.2f} removed"
    return "no gradient" if not point["backward"] else "outputs change shape" if not point["shapes kept"] else "wrong"


def main() -> None:
    """Measure what is not there yet, and print the table."""
    parser = command_line(__doc__)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, help="packages that models come from (all installed)")
    parser.add_argument("--only", nargs="+", help="names of architectures")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning as well (the extra `peers`)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.peer and peer.version() is None:
        parser.error("--peer needs Torch-Pruning: pip install -e '.[peers]'")
    found = present()
    for family in arguments.family or ():
        if family not in found:
            parser.error(f"{family} is not installed")
    results, console = Results("coverage", again=arguments.again), Console(width=190 if arguments.peer else 150)
    ours, theirs = children.Child(_measured, SECONDS), children.Child(peer.tried, peer.SECONDS)
    rows: dict[str, Point] = {}
    peers: dict[str, Point] = {}
    names = [row.name for family in arguments.family or found for row in found[family]]
    wanted = [name for name in names if not arguments.only or name in arguments.only]
    for name in track(wanted, "Pruning", console=Console(stderr=True)):
        configuration = {"architecture": name, "ratio": RATIO}
        rows[name] = results.point(configuration, lambda n=name: measure(n, ours))
        if arguments.peer:
            configuration["peer"] = f"torch-pruning {peer.version()}"
            peers[name] = results.point(configuration, lambda n=name: peer.measure(n, theirs), peer=True)
    show(rows, peers, console)


if __name__ == "__main__":
    main()
