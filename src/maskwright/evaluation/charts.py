"""Line charts as inline SVG without scripts or other files; colours come from the page's style (`--s0` ... `--s5`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 36
POINTS = 400  # per line, about the width in pixels
COLOURS = 6
LARGEST = 1e100  # values above are left out, as those that are not finite

Line = tuple[Sequence[float], Sequence[float]]  # x, y


def chart(
    lines: Mapping[str, Line],
    *,
    x_name: str = "step",
    percent: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Markup:
    """Draws lines with ticks and a legend.

    Args:
        lines: x and y values by name; points that are not finite are left out, or beyond `LARGEST`.
        x_name: Label of the x axis.
        percent: Whether y is 0 ... 1, shown as 0 ... 100.
        bounds: Range of y; default: that of the data.

    Returns:
        An SVG element; empty if there is nothing to draw.
    """
    drawn = {name: xy for name, line in lines.items() if len((xy := _finite(line))[0])}
    if not drawn:
        return Markup()
    x_low, x_high = _bounds([x for x, _ in drawn.values()])
    y_low, y_high = bounds or _bounds([y for _, y in drawn.values()])
    x_ticks, y_ticks = _ticks(x_low, x_high, 5), _ticks(y_low, y_high, 5)
    if bounds is None:
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(drawn))}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{down(y) + 4:.1f}" text-anchor="end">{_label(y, percent)}</text>')
    for x in x_ticks:
        text = _label(x, percent and bounds is not None)
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_name)}</text>')
    for number, (xs, ys) in enumerate(drawn.values()):
        colour = f"var(--s{number % COLOURS})"
        dashed = ' stroke-dasharray="5 3"' if number >= COLOURS else ""
        if len(xs) == 1:
            parts.append(f'<circle cx="{across(xs[0]):.1f}" cy="{down(ys[0]):.1f}" r="3.5" fill="{colour}"/>')
        else:
            path = " ".join(
                f"{across(x):.1f},{down(min(max(y, y_low), y_high)):.1f}" for x, y in zip(xs, ys, strict=True)
            )
            parts.append(f'<polyline points="{path}" stroke="{colour}"{dashed}/>')
    parts.append("</svg>")
    parts.append('<div class="legend">')
    for number, (name, (_, ys)) in enumerate(drawn.items()):
        last = "" if bounds else f" <b>{_figure(ys[-1], percent)}</b>"  # of a curve over recall the last says nothing
        parts.append(f'<span><i style="background:var(--s{number % COLOURS})"></i>{escape(name)}{last}</span>')
    parts.append("</div>")
    return Markup("".join(parts))


def _finite(line: Line) -> tuple[list[float], list[float]]:
    """The line without gaps, averaged down to `POINTS`."""
    x, y = (np.asarray(v, np.float64) for v in line)
    there = (np.abs(x) < LARGEST) & (np.abs(y) < LARGEST)  # not NaN either
    x, y = x[there], y[there]
    if len(x) > POINTS:
        starts = np.linspace(0, len(x), POINTS, endpoint=False).astype(int)
        counts = np.diff(np.append(starts, len(x)))
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
    return x.tolist(), y.tolist()


def _bounds(columns: Sequence[Sequence[float]]) -> tuple[float, float]:
    low, high = min(map(min, columns)), max(map(max, columns))
    if high > low:
        return low, high
    return (0.0, 1.0) if low == 0 else (low - abs(low) / 10, low + abs(low) / 10)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers at 1, 2 or 5 times a power of ten, about `count` of them, within the bounds."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * s for s in (1, 2, 5, 10) if power * s >= rough * 0.999)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)] or [low]


def _label(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g}"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.3g} k"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3 or not value:
        return f"{value:.3g}"
    return _short(f"{value:.1e}".replace(".0e", "e"))  # 6e-4: a longer one would not fit beside the axis


def _figure(value: float, percent: bool) -> str:
    """A number of the legend: three significant digits, also where they are zeros, so that lines can be compared."""
    value = float(f"{100 * value if percent else value:.3g}")
    if value and not 1e-3 <= abs(value) < 1e9:
        return _short(f"{value:.2e}")
    unit, scale = next(((u, s) for u, s in ((" M", 1e6), (" k", 1e3)) if abs(value) >= s), ("", 1.0))
    return f"{value / scale:#.3g}".rstrip(".") + unit


def _short(text: str) -> str:
    """A number such as 6.0e-04 without what is superfluous in its exponent."""
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"
