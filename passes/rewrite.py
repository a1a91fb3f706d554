"""Rules, and the engine that applies them.

A rule reads like the thing it matches: pattern, condition, replacement. Declining is a value with a reason,
which goes to the program's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..runtime.program import Entry, Program
from .match import Call, Index, Match, Miss, match

Check = Callable[[Program, Match], str | None]
Replace = Callable[[Program, Match], Any]


def always(program: Program, found: Match) -> str | None:
    """The check of a rule without further conditions."""
    return None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rewrite.

    name: `file.rule`, as log, tests and report spell it
    check: None to go ahead, else the reason to decline
    replace: builds the replacement before the root and returns its node (or an existing one)
    approximate: the result may differ by rounding; such rules run only where something downstream needs them
    """

    name: str
    pattern: Call
    replace: Replace
    check: Check = always
    approximate: bool = False


def apply_rules(program: Program, rules: Iterable[Rule], stage: str) -> int:
    """Apply each rule wherever it matches, until none does; returns how many times any fired.

    Applied and declined matches are logged once each.
    """
    fired = 0
    declined: set[tuple[str, str]] = set()
    rules = tuple(rules)
    while True:
        before = fired
        for rule in rules:
            index = Index(program)
            for root in index.roots(rule.pattern):
                # A match earlier in this sweep may have erased this root.
                if root.graph is program.graph and not _erased(root):
                    fired += _try(program, rule, root, stage, declined)
        if fired == before:
            break
    if fired:
        program.tidy()
    return fired


def _try(program: Program, rule: Rule, root: fx.Node, stage: str, declined: set[tuple[str, str]]) -> bool:
    found = match(rule.pattern, root)
    if isinstance(found, Miss):
        return False
    where = root.name
    reason = rule.check(program, found)
    if reason is not None:
        if (rule.name, where) not in declined:
            declined.add((rule.name, where))
            program.log.append(Entry(stage=stage, rule=rule.name, where=where, applied=False, reason=reason))
        return False
    replacement = rule.replace(program, found)
    root.replace_all_uses_with(replacement)
    for node in found.nodes:
        if not node.users and not _erased(node):
            program.graph.erase_node(node)
    program.log.append(Entry(stage=stage, rule=rule.name, where=where))
    return True


def _erased(node: fx.Node) -> bool:
    return bool(node._erased)
