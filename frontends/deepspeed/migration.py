"""What becomes of each key of a DeepSpeed configuration: maps, differs, had no effect, comes later, is refused.

print(migrate(parse("ds_config.json"), total_steps=3000))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args

from pydantic import BaseModel
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .catalogue import FACTS
from .config import DEAD, GROUPS, LEGACY, ROOT, SHARED, TECHNIQUES, DeepSpeedConfig, Note, keys_of
from .facts import NO_EFFECT, Site, Verdict
from .sections import Group, QuantizeTraining
from .spelling import Path, dotted

PRINTED_WIDTH = 110
WIDE = 90  # columns; below, what a key becomes is left out
STYLES: dict[Verdict, str] = {"differs": "yellow", "not yet": "magenta", "rejected": "bold red", "engine": "dim"}
OFF = "nothing: it is off"
ENGINE = "left to DeepSpeed or to the training loop"
ENGINE_NOTES = {
    "fp16": "remembered: DeepSpeed's MoQ needs it, dwindle's does not",
    "zero_optimization": "DeepSpeed's MoQ is reported to do nothing in stages 1 to 3; training here is torch's own",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One key and its fate. given: False for a default that is worth knowing."""

    key: str
    value: Any
    verdict: Verdict
    note: str = ""
    to: str = ""
    given: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**vars(self), "value": _plain(self.value)}


@dataclass(frozen=True)
class Migration:
    """One finding per key that was given, and per default that matters; what was noted while reading."""

    findings: tuple[Finding, ...]
    notes: tuple[Note, ...] = ()

    def of(self, key: str) -> Finding:
        """The finding of a dotted key, which may leave out `compression_training`. Raises KeyError."""
        for finding in self.findings:
            if finding.key in (key, f"{ROOT}.{key}"):
                return finding
        raise KeyError(key)

    @property
    def rejected(self) -> tuple[Finding, ...]:
        """Keys that nothing reads, each with the key that is read in its note."""
        return tuple(finding for finding in self.findings if finding.verdict == "rejected")

    def summary(self) -> str:
        """Counts in one line."""
        given = Counter(finding.verdict for finding in self.findings if finding.given)
        counts = [f"{given[verdict]} {_SPOKEN[verdict]}" for verdict in get_args(Verdict) if given[verdict]]
        defaults = sum(not finding.given for finding in self.findings)
        told = f"; {defaults} defaults to know of" if defaults else ""
        return f"{given.total()} keys: {', '.join(counts) or 'none'}{told}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "summary": self.summary(),
            "findings": [finding.to_json() for finding in self.findings],
            "notes": [note._asdict() for note in self.notes],
        }

    def __str__(self) -> str:
        console = Console(width=PRINTED_WIDTH, no_color=True, force_terminal=False, record=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        sections: dict[str, list[Finding]] = {}
        for finding in self.findings:
            sections.setdefault(_section(finding), []).append(finding)
        for name, findings in sections.items():
            if any(f.to == OFF and f.key in (f"{name}.enabled", f"{name}.{SHARED}.enabled") for f in findings):
                yield Text.assemble((name, "bold"), f" is off: {len(findings)} keys without effect\n")
            else:
                yield from _told(name, findings, options.max_width >= WIDE)
        if self.notes:
            yield Text("Notes\n", style="bold")
            yield from (Text(f"  {note.key}: {note.text}") for note in self.notes)
            yield Text()
        yield Text(self.summary())


_SPOKEN: dict[Verdict, str] = {
    "maps": "map",
    "differs": "differ",
    "no effect in DeepSpeed": "without effect in DeepSpeed",
    "not yet": "not yet",
    "rejected": "rejected",
    "engine": "of the engine",
}


def migrate(config: DeepSpeedConfig, *, total_steps: int | None = None) -> Migration:
    """The fate of every key. total_steps: of the training, to tell which drops of bits it reaches."""
    findings = [_finding(item.path, item.value, config, total_steps) for item in config.given]
    order = {section: rank for rank, section in enumerate(dict.fromkeys(map(_section, findings)))}
    findings += _defaults(config, total_steps)
    findings.sort(key=lambda finding: order.get(_section(finding), len(order)))
    return Migration(tuple(findings), config.notes)


def _finding(path: Path, value: Any, config: DeepSpeedConfig, total_steps: int | None) -> Finding:
    key = dotted(path)
    if path[0] not in (ROOT, LEGACY, "eigenvalue"):
        return Finding(key=key, value=value, verdict="engine", note=ENGINE_NOTES.get(key, ENGINE))
    section = config.off(path)
    if section is not None and path in ((*section, "enabled"), (*section, SHARED, "enabled")):
        return Finding(key=key, value=value, verdict="maps", to=OFF)
    if section is not None:
        return Finding(key=key, value=value, verdict=NO_EFFECT, note=f"{section[-1]} is off")
    dead = next((meant for place, meant in DEAD.items() if path[: len(place)] == place), None)
    if dead is not None:
        note = f"no DeepSpeed reads it, whatever tutorials say; write {dead}"
        return Finding(key=key, value=value, verdict="rejected", note=note)
    if path == (ROOT,):
        return Finding(key=key, value=value, verdict="maps", note="empty: nothing is compressed")
    return _judged(path, _site(path, value, True, config, total_steps)) or Finding(
        key=key, value=value, verdict=NO_EFFECT, note=f"{SHARED} wins over a group's params, defaults too"
    )


def _defaults(config: DeepSpeedConfig, total_steps: int | None) -> Iterator[Finding]:
    """Findings of keys that were not given and whose default is worth knowing."""
    given = {item.path for item in config.given}
    for path, value in _fields(config):
        if not any(place[: len(path)] == path for place in given):
            found = _judged(path, _site(path, value, False, config, total_steps))
            if found is not None:
                yield found


def _fields(config: DeepSpeedConfig) -> Iterator[tuple[Path, Any]]:
    """Every key that the enabled sections could have given, with the value that counts."""
    for name, (model, group_model) in TECHNIQUES.items():
        section = config.section(name)
        if section is None:
            continue
        yield from (((ROOT, name, SHARED, key), getattr(section, key)) for key in keys_of(model))
        groups: tuple[Group, ...] = getattr(section, "groups", ())
        for group in groups:
            place: Path = (ROOT, name, GROUPS, group.name)
            yield (*place, "modules"), group.modules
            data = group.model_dump(by_alias=True)
            yield from (((*place, "params", key), data[key]) for key in keys_of(group_model))
    if config.legacy is not None:
        for key in keys_of(QuantizeTraining):
            value = getattr(config.legacy, key)
            nested = isinstance(value, BaseModel)
            yield from (((LEGACY, key, k), v) for k, v in value) if nested else (((LEGACY, key), value),)


def _site(path: Path, value: Any, given: bool, config: DeepSpeedConfig, total_steps: int | None) -> Site:
    """A key as the facts name it: without what all keys share, and with `group` for a group's name."""
    short, group = path, None
    if path[0] == ROOT:
        short = tuple(part for part in path[1:] if part != SHARED) if path[2:3] == (SHARED,) else path[1:]
        if path[2:3] == (GROUPS,) and len(path) > 3:
            groups: tuple[Group, ...] = getattr(config.section(path[1]), "groups", ())
            group = next(item for item in groups if item.name == path[3])
            short = (path[1], "group", path[-1])
    return Site(key=dotted(short), value=value, given=given, config=config, group=group, total_steps=total_steps)


def _judged(path: Path, site: Site) -> Finding | None:
    facts = [fact for fact in FACTS if fnmatchcase(site.key, fact.key) and fact.applies(site)]
    if not facts:
        return None
    notes = [fact.note if isinstance(fact.note, str) else fact.note(site) for fact in facts]
    return Finding(
        key=dotted(path),
        value=site.value,
        verdict=facts[0].verdict,
        note="; ".join(dict.fromkeys(note for note in notes if note)),
        to=next((fact.to for fact in facts if fact.to), "").format(value=site.value),
        given=site.given,
    )


def _section(finding: Finding) -> str:
    if finding.verdict == "engine":
        return "engine"
    path = finding.key.split(".")
    return dotted(tuple(path[: 2 if path[0] == ROOT else 1]))


def _told(section: str, findings: list[Finding], wide: bool) -> Iterator[RenderableType]:
    """A table that refers to notes, and the notes below it: they are long, and many keys share one."""
    table = Table(title=Text(section), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("key", "value", "verdict", *(("becomes",) if wide else ()), "note"):
        table.add_column(name, overflow="fold")
    notes = list(dict.fromkeys(finding.note for finding in findings if finding.note))
    for finding in findings:
        key = finding.key.removeprefix(f"{section}.").removeprefix(f"{SHARED}.").removeprefix(f"{GROUPS}.")
        value = _shown(finding.value) if finding.given else f"({_shown(finding.value)})"
        verdict = Text(finding.verdict, style=STYLES.get(finding.verdict, ""))
        becomes = [Text(finding.to)] if wide else []
        note = str(notes.index(finding.note) + 1) if finding.note else ""
        table.add_row(Text(key), Text(value), verdict, *becomes, note)
    yield table
    for number, note in enumerate(notes, 1):
        yield Padding(Text(f"{number}. {note}"), (0, 0, 0, 2))
    yield Text()


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Mapping):
        return "{...}" if value else "{}"
    return ", ".join(map(_shown, value)) if isinstance(value, tuple) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
