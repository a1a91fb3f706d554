"""Charts as SVG text: no library, the same text for the same numbers, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 1040.0, 260.0  # in the units of the picture, which scales with the page
LEFT, RIGHT, TOP, BOTTOM = 52.0, 8.0, 12.0, 42.0
LOW = 190.0  # height of a curve's picture, of which a page has two
LEAST_STEP = 4.0  # a bar and the gap after it; charts of more bars are wider, and scroll


@dataclass(frozen=True)
class Bar:
    """One bar. title: what is shown on hover; group: bars of one group stand under one label."""

    value: float
    title: str
    group: str


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Upright bars over a scale from zero, with the groups named below; `label` says it to a screen reader."""
    step = max((WIDTH - LEFT - RIGHT) / max(len(bars), 1), LEAST_STEP)
    width = LEFT + RIGHT + step * len(bars)
    ticks = scale([bar.value for bar in bars if math.isfinite(bar.value)])
    height = HEIGHT - TOP - BOTTOM
    base = TOP + height
    parts = [
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {_n(width)} {_n(HEIGHT)}" '
        f'style="min-width:{_n(width) if width > WIDTH + 1 else "640"}px">'
    ]
    for tick in ticks:
        y = base - height * tick / ticks[-1]
        parts.append(f'<line class="grid" x1="{_n(LEFT)}" x2="{_n(width - RIGHT)}" y1="{_n(y)}" y2="{_n(y)}"/>')
        parts.append(f'<text class="tick" x="{_n(LEFT - 8)}" y="{_n(y + 4)}" text-anchor="end">{tick:g}</text>')
    for i, bar in enumerate(bars):
        tall = height if not math.isfinite(bar.value) else max(height * bar.value / ticks[-1], 1.0)
        x, wide = LEFT + i * step + step * 0.12, step * 0.76
        parts.append(
            f'<rect class="bar" x="{_n(x)}" y="{_n(base - tall)}" width="{_n(wide)}" height="{_n(tall)}" '
            f'rx="{_n(min(3.0, wide / 3))}" tabindex="0"><title>{escape(bar.title)}</title></rect>'
        )
    parts.extend(_groups(bars, step, base))
    return "\n".join([*parts, "</svg>"])


def curve_chart(
    points: Sequence[tuple[float, float | None]],
    *,
    end: float,
    label: str,
    stairs: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """A curve over 0 to `end`, on a scale from zero, or from below where it goes there; a gap where y is None.

    stairs: a value holds until the next. marks: upright lines at x, with what they say on hover
    """
    ys = [y for _, y in points if y is not None]
    up, down = scale(ys), scale([-y for y in ys]) if min(ys, default=0.0) < 0 else [0.0]
    ticks = [-t for t in reversed(down[1:])] + up
    height, low, high, base = LOW - TOP - BOTTOM, ticks[0], ticks[-1], LOW - BOTTOM

    def x_of(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * x / max(end, 1)

    def y_of(y: float) -> float:
        return base - height * (y - low) / (high - low)

    parts = [
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="0 0 {_n(WIDTH)} {_n(LOW)}" '
        'style="min-width:640px">'
    ]
    for tick in ticks:
        level = y_of(tick)
        parts.append(f'<line class="grid" x1="{_n(LEFT)}" x2="{_n(WIDTH - RIGHT)}" y1="{_n(level)}" y2="{_n(level)}"/>')
        parts.append(f'<text class="tick" x="{_n(LEFT - 8)}" y="{_n(level + 4)}" text-anchor="end">{tick:g}</text>')
    for tick in (t for t in scale([end]) if t <= end):
        anchor = "end" if x_of(tick) > WIDTH - 40 else "middle"
        where = f'x="{_n(x_of(tick))}" y="{_n(base + 22)}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {where}>{tick:,.10g}</text>')
    for at, title in marks:
        line = f"M{_n(x_of(at))} {_n(TOP)}V{_n(base)}"
        parts.append(f'<path class="mark" d="{line}"><title>{escape(title)}</title></path>')
    path, joined = "", False
    for at, value in points:
        if value is not None:
            x, y = _n(x_of(at)), _n(y_of(value))
            path += f"M{x} {y}" if not joined else f"H{x}V{y}" if stairs else f"L{x} {y}"
        joined = value is not None
    return "\n".join([*parts, f'<path class="curve" d="{path}"/>', "</svg>"])


def scale(values: Sequence[float]) -> list[float]:
    """Round numbers from zero to at least the largest value, four or five steps."""
    top = max([*values, 0.0]) or 1.0
    power = 10.0 ** math.floor(math.log10(top / 4))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 5 >= top)
    return [round(i * step, 12) for i in range(math.ceil(top / step - 1e-9) + 1)]


def _groups(bars: Sequence[Bar], step: float, base: float) -> list[str]:
    parts: list[str] = []
    start = 0
    for end in range(1, len(bars) + 1):
        if end < len(bars) and bars[end].group == bars[start].group:
            continue
        x0, x1 = LEFT + start * step, LEFT + end * step
        parts.append(f'<path class="group" d="M{_n(x0 + 2)} {_n(base + 6)}H{_n(x1 - 2)}"/>')
        name = _short(bars[start].group, x1 - x0)
        if name:
            middle = f'x="{_n((x0 + x1) / 2)}" y="{_n(base + 22)}" text-anchor="middle"'
            parts.append(f'<text class="tick" {middle}>{escape(name)}<title>{escape(bars[start].group)}</title></text>')
        start = end
    return parts


def _short(name: str, room: float) -> str:
    """As much of a path's end as fits, about 7 units a letter."""
    path = name.split(".")
    for i in range(len(path)):
        tail = ".".join(path[i:])
        if 7 * len(tail) <= room:
            return tail
    return ""


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
