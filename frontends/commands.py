"""The shell: `dwindle compress | inspect | bench | migrate | demo`.

    exit code 0   done
              1   a DwindleError, shown as a panel with what was required, what was found and the cure
              2   a command line that cannot be read

Results go to the output stream, progress and errors to the error stream. torch is imported when a command runs,
so that `dwindle --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from ..runtime.errors import ArtifactError, DwindleError
from ..runtime.files import appearing, require_free

if TYPE_CHECKING:
    from .recipe import Recipe

DEBUG = "dwindle.debug"


class _Readable(TyperGroup):
    """Shows a DwindleError as a panel, and its traceback only after --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DwindleError as error:
            if ctx.find_root().meta.get(DEBUG):
                raise
            Console(stderr=True).print(panel(error))
            ctx.exit(1)
        except OSError as error:  # no space, no permission, no such device
            if ctx.find_root().meta.get(DEBUG):
                raise
            Console(stderr=True).print(panel(ArtifactError("a file cannot be read or written", found=error)))
            ctx.exit(1)


def panel(error: DwindleError) -> Panel:
    """An error as a person reads it."""
    parts = Table.grid(padding=(0, 2))
    parts.add_column(style="dim")
    parts.add_column(overflow="fold")
    for name in ("required", "found", "cure"):
        value = getattr(error, name)
        if value is not None:
            parts.add_row(name, Text(str(value).strip()))
    body = Group(Text(error.message), parts)
    return Panel(body, title=type(error).__name__, title_align="left", border_style="red")


app = typer.Typer(
    cls=_Readable,
    help="Make PyTorch models smaller and faster by rewriting their graphs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _debug(ctx: typer.Context, value: bool) -> bool:
    if value:
        ctx.find_root().meta[DEBUG] = True
    return value


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} is not a list of positive numbers, such as 1,8")
    return numbers


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(version("dwindle"))
        raise typer.Exit


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A transformers directory, an artifact, or package.module:factory.")
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A preset's name, or a .json or .yaml file.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", "-d", help="Calibration data: a text file, one text a line, or package.module:factory of batches."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print plain data instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_debug)]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, by commas.")]
Sequences = Annotated[str, typer.Option("--seq", help="Tokens in a row, by commas; left out for other models.")]


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make PyTorch models smaller and faster by rewriting their graphs."""


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write: artifact and report.html.")],
    recipe: RecipeName = "zeroquant-w8a8",
    data: Data = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx for ONNX Runtime too.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compress a model after training, and save it with its report."""
    require_free(out)
    from ..runtime.onnx.export import require_dtypes, require_packages
    from .compress import compress as compress_model
    from .models import load_data, load_source
    from .page import write_page
    from .progress import steps
    from .recipe import Recipe

    parsed = Recipe.of(recipe)
    _require_data(parsed, data)
    if onnx:
        require_packages()
    with steps() as stage, _quiet_libraries():
        with stage.step(f"Loading {Path(model).name}"):
            source = load_source(model)
        if onnx:  # what cannot be exported is refused before anything is written
            require_dtypes({t.dtype for t in [*source.model.parameters(), *source.model.buffers()]})
        batches = None if data is None else stage.track(load_data(data, source), "Calibrating")
        with stage.step(f"Compressing with {parsed.name or recipe}"):
            small = compress_model(source.model, parsed, inputs=source.inputs, data=batches)
        with stage.step("Measuring latency"):
            report = small.report()
        with appearing(out) as draft:
            with stage.step("Writing"):
                small.save(draft)
                write_page(report, draft / "report.html", title=source.name)
            if onnx:
                with stage.step("Exporting to ONNX"):
                    small.export_onnx(draft / "model.onnx", provider="cpu")
    _show(as_json, report.to_json, report, Text(f"Wrote {out}{os.sep}"))


@app.command()
def inspect(
    model: Model,
    recipe: RecipeName = "zeroquant-w8a8",
    groups: Annotated[bool, typer.Option("--groups", help="What pruning would cut together, and why.")] = False,
    graph: Annotated[
        Path | None, typer.Option(help="Write the groups as .svg, .dot or .graphml.", show_default=False)
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Rank the layers on --data, by influence, change or greedy.", show_default=False),
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact is, or what a recipe would do to a model, its groups for pruning, or how layers rank."""
    from .models import is_artifact, load_source
    from .progress import steps

    if is_artifact(model):
        from ..runtime.artifact import load

        with steps() as stage, stage.step(f"Loading {Path(model).name}"), _quiet_libraries():
            small = load(model)
        files = {file.name: file.stat().st_size for file in sorted(Path(model).iterdir()) if file.is_file()}
        plain = {"variants": small.describe_variants(), "files": files, **small.report().to_json()}
        _show(as_json, lambda: plain, small.report(), _facts(small.describe_variants(), files))
        return
    if groups or graph is not None:
        from .coupling import couple

        with steps() as stage, _quiet_libraries():
            with stage.step(f"Loading {Path(model).name}"):
                source = load_source(model)
            with stage.step("Capturing"):
                coupled = couple(source.model, source.inputs)
        wrote = [] if graph is None else [Text(f"Wrote {coupled.write(graph)}")]
        _show(as_json, coupled.to_json, coupled, *wrote)
        return
    if layers is not None:
        from .models import load_data
        from .rank import rank_layers

        with steps() as stage, _quiet_libraries():
            with stage.step(f"Loading {Path(model).name}"):
                source = load_source(model)
            batches = None if data is None else load_data(data, source)
            ranking = rank_layers(source.model, batches, inputs=source.inputs, by=cast(Any, layers))
        _show(as_json, ranking.to_json, ranking)
        return
    from .survey import survey

    with steps() as stage, _quiet_libraries():
        with stage.step(f"Loading {Path(model).name}"):
            source = load_source(model)
        with stage.step("Capturing"):
            found = survey(source.model, recipe, source.inputs)
    _show(as_json, found.to_json, found)


@app.command()
def bench(
    model: Model,
    recipe: RecipeName = "zeroquant-w8a8",
    data: Data = None,
    batch: Batches = "1,8",
    seq: Sequences = "16,128",
    seconds: Annotated[float, typer.Option(min=0.01, help="How long to time each form at each shape.")] = 1.5,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time torch.compile of both too; minutes for large models.")
    ] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time the original, the compressed model, and torch.compile of both, taking turns."""
    batches, sequences = _numbers(batch), _numbers(seq)
    import torch

    from .bench import bench as measure
    from .compress import compress as compress_model
    from .inputs import as_arguments
    from .models import load_data, load_source
    from .progress import steps
    from .recipe import Recipe

    parsed = Recipe.of(recipe)
    _require_data(parsed, data)
    with steps() as stage, _quiet_libraries():
        with stage.step(f"Loading {Path(model).name}"):
            source = load_source(model)
        calibration = None if data is None else stage.track(load_data(data, source), "Calibrating")
        with stage.step(f"Compressing with {parsed.name or recipe}"):
            small = compress_model(source.model, parsed, inputs=source.inputs, data=calibration)
        contenders: dict[str, Callable[..., Any]] = {"eager": source.model, "compressed": small}
        if compiled:
            contenders |= {
                "eager, compiled": torch.compile(source.model),
                "compressed, compiled": torch.compile(small),
            }
        with stage.step("Timing") as advance:
            arguments = as_arguments(source.model, source.inputs)
            found = measure(
                contenders,
                arguments,
                batches=batches,
                sequences=sequences,
                seconds=seconds,
                may_fail=tuple(contenders)[2:],
                progress=advance,
            )
    c = small.certificate
    plain = {"recipe": parsed.plain(), "bytes_before": c.bytes_before, "bytes_after": c.bytes_after, **found.to_json()}
    _show(as_json, lambda: plain, found)


@app.command()
def migrate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A DeepSpeed configuration, JSON.")],
    total_steps: Annotated[
        int | None, typer.Option("--total-steps", min=1, help="Steps of the training, to tell which drops it reaches.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The recipe to write that does the same, JSON.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what becomes of each key of a DeepSpeed configuration, and write it as a recipe."""
    if output is not None:
        if output.suffix != ".json":
            raise typer.BadParameter(f"{str(output)!r} does not end in .json")
        require_free(output)
    from .deepspeed.config import parse
    from .deepspeed.migration import migrate as report
    from .recipe import Recipe

    parsed = parse(config)
    found = report(parsed, total_steps=total_steps)
    _show(as_json, found.to_json, found)
    if output is not None:
        recipe = Recipe.of_deepspeed(parsed)
        with appearing(output) as draft:
            draft.write_text(json.dumps(recipe.plain(), indent=1) + "\n", encoding="utf-8")
        if not as_json:
            _show(False, dict, Text(f"Wrote {output}"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("dwindle-demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer documents: about a minute on two idle cores.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compress a sentence encoder and see what it costs in answers found, on real data."""
    require_free(out)
    from .demo import run_demo

    with _quiet_libraries():
        figures = run_demo(out, quick=quick)
    _show(as_json, figures.to_json, figures)


def _require_data(recipe: Recipe, data: str | None) -> None:
    """Ask for calibration data before the work. Raises CalibrationError."""
    from .calibration import require_data

    require_data(recipe, data, "--data")


def _facts(variants: list[str], files: Mapping[str, int]) -> Table:
    from ..runtime.report import size

    table = Table(title="Serves", title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    for variant in variants:
        table.add_row("variant", Text(variant))
    for name, count in files.items():
        table.add_row("file", Text(f"{name}, {size(count)}"))
    return table


def _show(as_json: bool, plain: Callable[[], Any], *shown: Any) -> None:
    if as_json:
        typer.echo(json.dumps(plain(), indent=1, default=str))
        return
    console = Console()
    for part in shown:
        console.print(part)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """torch and transformers warn of matters that are theirs; `python -W default -m dwindle` shows them."""
    import warnings

    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield
