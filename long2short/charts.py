"""The frontier as SVG text, for the page without JavaScript: a scatter with error bars. Needs markupsafe only.

Also what pictures and page share: how an arm is drawn (`Standing`, `STYLES`), where labels go, which ticks an axis has.
Every text that comes from outside goes through `Markup.format`, which escapes it. Colours are CSS variables of the page
(report.css: `--c0` .. `--c7`, `--grey`, ..), so that the chart follows the page into dark mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from markupsafe import Markup

CHAR_WIDTH = 7.2  # of a 12 px label, at most; only used to keep labels apart

Box = tuple[float, float, float, float]  # left, low, right, high


class Standing(StrEnum):
    """How an arm stands among the others, and so how its point is drawn."""

    FRONT = "front"  # non-dominated and not collapsed: filled, on the line
    NOISE = "noise"  # dominated, but by no arm beyond noise: hollow, in its colour
    DOMINATED = "dominated"  # beyond noise: hollow, grey
    COLLAPSED = "collapsed"  # a grey cross, and named so

    @property
    def coloured(self) -> bool:
        """Whether it is drawn in the style of its family."""
        return self in (Standing.FRONT, Standing.NOISE)


@dataclass(frozen=True, slots=True)
class Style:
    """What tells families apart: colour, shape of the points, dashes of the lines. Example: `STYLES[9]`."""

    colour: int  # --c0 .. --c7 of report.css
    symbol: str  # in plotly
    marker: str  # in matplotlib
    path: str  # of an SVG, around (0, 0), with a radius of about 1
    dash: str  # in plotly, and in CSS where it is not "solid"


def _polygon(corners: int, turn: float, radius: float, inner: float | None = None) -> str:
    """The path of a regular polygon whose first corner is `turn` degrees from the right; with `inner` a star.

    Example: `_polygon(4, 0, 1.0) == "M1.00 0.00L0.00 1.00L-1.00 0.00L-0.00 -1.00Z"`.
    """
    radii = [radius] if inner is None else [radius, inner]
    count = corners * len(radii)
    places = [(radii[i % len(radii)], math.radians(turn) + 2 * math.pi * i / count) for i in range(count)]
    return "M" + "L".join(f"{r * math.cos(angle):.2f} {r * math.sin(angle):.2f}" for r, angle in places) + "Z"


COLOURS = 8
CROSS = "M-1 -1L1 1M-1 1L1 -1"
SHAPES = (
    ("circle", "o", "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1 -1 0Z"),
    ("square", "s", _polygon(4, 45, 1.25)),
    ("diamond", "D", _polygon(4, 0, 1.3)),
    ("triangle-up", "^", _polygon(3, -90, 1.35)),
    ("triangle-down", "v", _polygon(3, 90, 1.35)),
    ("pentagon", "p", _polygon(5, -90, 1.2)),
    ("hexagon", "h", _polygon(6, 0, 1.15)),
    ("star", "*", _polygon(5, -90, 1.5, 0.65)),
)
DASHES = ("solid", "7px,3px", "2px,2px", "9px,3px,2px,3px")
# Twice as many as there are colours: the second eight have the same ones, with the next shape and the next dashes.
STYLES = tuple(
    Style(at % COLOURS, *SHAPES[turned % len(SHAPES)], DASHES[turned % len(DASHES)])
    for at in range(2 * COLOURS)
    for turned in (at + at // COLOURS,)
)


@dataclass(frozen=True, slots=True)
class Point:
    """A point of the scatter with its intervals, in data units. Example: tokens 61, accuracy .95."""

    name: str
    x: float
    x_low: float
    x_high: float
    y: float
    y_low: float
    y_high: float
    style: Style
    standing: Standing
    parent: bool
    note: str = ""  # shown when the pointer rests on it

    @property
    def joined(self) -> bool:
        return self.standing is Standing.FRONT

    @property
    def label(self) -> str:
        """What stands beside it."""
        return f"{self.name} (collapsed)" if self.standing is Standing.COLLAPSED else self.name


@dataclass(frozen=True, slots=True)
class Scale:
    """Data to pixels, linear. `Scale(0, 10, 100, 200)(5) == 150`; the pixel range may run downwards."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def padded(values: Iterable[float], *, floor: float = -math.inf, ceiling: float = math.inf) -> tuple[float, float]:
    """The range of the values with 6 % air, within floor and ceiling; never empty."""
    values = list(values)
    low, high = min(values), max(values)
    air = 0.06 * (high - low) or max(abs(high) * 0.05, 0.05)
    return max(low - air, floor), min(high + air, ceiling)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers within the range, at most `most` + 1: `ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Ticks with the same number of decimals: `[0.9, 0.95]` -> "0.90", "0.95"; `[0, 1500]` -> "0", "1,500"."""
    decimals = max((len(f"{value:.10f}".rstrip("0").partition(".")[2]) for value in values), default=0)
    return [f"{value:,.{decimals}f}" for value in values]


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], hidden: Sequence[Box], bounds: Box
) -> list[tuple[float, float]]:
    """Where to put the middle of each label so that it hides little: pixels in, pixels out.

    Greedy, in order: each label takes the cheapest of 60 places around its point. Hiding another label costs most, then
    leaving the picture, then hiding a point or one of `hidden`, then distance.
    """
    placed: list[tuple[float, float]] = []
    boxes: list[Box] = []
    dots = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        best, best_cost, best_box = (x, y), math.inf, (x, y, x, y)
        for distance in (8.0, 13.0, 19.0, 26.0, 36.0):
            for step in range(12):
                angle = math.pi / 6 * step
                middle_x = x + math.cos(angle) * (distance + width / 2)
                middle_y = y + math.sin(angle) * (distance + height / 2)
                box = (middle_x - width / 2, middle_y - height / 2, middle_x + width / 2, middle_y + height / 2)
                area = width * height
                cost = 8 * sum(_overlap(box, other) for other in boxes) / area
                cost += 6 * (area - _overlap(box, bounds)) / area
                cost += 4 * sum(_overlap(box, dot) for dot in dots) / area
                cost += 10 * sum(_overlap(box, other) for other in hidden) / area
                cost += distance / 50 + 0.02 * abs(math.sin(angle))
                if cost < best_cost - 1e-9:
                    best, best_cost, best_box = (middle_x, middle_y), cost, box
        placed.append(best)
        boxes.append(best_box)
    return placed


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def obstacles(points: Sequence[Point], x: Callable[[float], float], y: Callable[[float], float]) -> list[Box]:
    """What labels should not hide besides points: the error bars, and the line of the non-dominated in small pieces."""
    boxes = [box for point in points for box in error_bars(point, x, y)]
    path = [(x(a), y(b)) for a, b in sorted((point.x, point.y) for point in points if point.joined)]
    for (x0, y0), (x1, y1) in itertools.pairwise(path):
        pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 5))
        for index in range(pieces):
            middle_x, middle_y = x0 + (x1 - x0) * index / pieces, y0 + (y1 - y0) * index / pieces
            boxes.append((middle_x - 2.5, middle_y - 2.5, middle_x + 2.5, middle_y + 2.5))
    return boxes


def error_bars(point: Point, x: Callable[[float], float], y: Callable[[float], float]) -> list[Box]:
    """Both error bars of a point as thin boxes in pixels, a little longer than they are."""
    across, up = sorted((x(point.x_low), x(point.x_high))), sorted((y(point.y_low), y(point.y_high)))
    middle_x, middle_y = x(point.x), y(point.y)
    return [
        (across[0] - 4, middle_y - 2, across[1] + 4, middle_y + 2),
        (middle_x - 2, up[0] - 4, middle_x + 2, up[1] + 4),
    ]


def ranges(points: Sequence[Point]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The range of tokens and of accuracy that holds all intervals; tokens start at 0 where that costs little."""
    across = padded((value for point in points for value in (point.x_low, point.x_high)), floor=0.0)
    up = padded((value for point in points for value in (point.y_low, point.y_high)), floor=0.0, ceiling=1.005)
    if across[0] < 0.3 * across[1]:
        across = (0.0, across[1])
    return across, up


def scatter(points: Sequence[Point], *, width: int = 980, height: int = 500) -> Markup:
    """Accuracy over tokens with error bars both ways, drawn as their `Standing` says; the parent has a ring."""
    (x_low, x_high), (y_low, y_high) = ranges(points)
    left, right, top, bottom = 62, 16, 14, 48
    x, y = Scale(x_low, x_high, left, width - right), Scale(y_low, y_high, height - bottom, top)
    parts = [_frame(x, y, width, height, "mean tokens per completion", "accuracy (avg@k)", most_x=9, most_y=9)]
    path = sorted((point.x, point.y) for point in points if point.joined)
    parts.append(_polyline([(x(a), y(b)) for a, b in path], "path"))
    places = place_labels(
        [(x(point.x), y(point.y)) for point in points],
        [(CHAR_WIDTH * len(point.label) + 4, 15.0) for point in points],
        obstacles(points, x, y),
        (left, top, width - right, height - bottom),
    )
    for point, (label_x, label_y) in zip(points, places, strict=True):
        parts.append(_point(point, x, y, label_x, label_y))
    return _svg(width, height, "Accuracy over mean tokens, one point per arm", parts)


def key(style: Style, standing: Standing) -> Markup:
    """A small picture of how such a point is drawn, for a legend."""
    return Markup('<svg class="key" viewBox="-8 -8 16 16" aria-hidden="true"><g {}>{}</g></svg>').format(
        _colour(style, standing), _dot(style, standing)
    )


def _colour(style: Style, standing: Standing) -> Markup:
    return Markup('style="--c:var(--{})"').format(f"c{style.colour}" if standing.coloured else "grey")


def _dot(style: Style, standing: Standing, x: float = 0.0, y: float = 0.0) -> Markup:
    return Markup('<path class="dot {}" transform="translate({:.1f} {:.1f}) scale(5)" d="{}"/>').format(
        standing, x, y, CROSS if standing is Standing.COLLAPSED else style.path
    )


def _point(point: Point, x: Scale, y: Scale, label_x: float, label_y: float) -> Markup:
    middle_x, middle_y = x(point.x), y(point.y)
    half = CHAR_WIDTH * len(point.label) / 2
    away = math.hypot(max(0.0, abs(label_x - middle_x) - half), abs(label_y - middle_y))
    edge = min(max(middle_x, label_x - half), label_x + half)
    leader = Markup('<path class="leader" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(middle_x, middle_y, edge, label_y)
    ring = Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="10"/>').format(middle_x, middle_y)
    return Markup(
        '<g {}><title>{}</title>{}<path class="bar" d="M{:.1f} {:.1f}H{:.1f}M{:.1f} {:.1f}V{:.1f}"/>{}{}'
        '<text class="name{}" x="{:.1f}" y="{:.1f}">{}</text></g>'
    ).format(
        _colour(point.style, point.standing),
        f"{point.name}: {point.note}",
        leader if away > 22 else "",
        x(point.x_low),
        middle_y,
        x(point.x_high),
        middle_x,
        y(point.y_low),
        y(point.y_high),
        ring if point.parent else "",
        _dot(point.style, point.standing, middle_x, middle_y),
        " strong" if point.standing.coloured or point.parent else "",
        label_x,
        label_y + 4,
        point.label,
    )


def _frame(
    x: Scale, y: Scale, width: int, height: int, x_label: str, y_label: str, *, most_x: int, most_y: int
) -> Markup:
    parts: list[Markup] = []
    y_ticks, x_ticks = ticks(y.low, y.high, most_y), ticks(x.low, x.high, most_x)
    for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        parts.append(
            Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="tick end" x="{}" y="{:.1f}">{}</text>').format(
                x.start, y(tick), x.end, x.start - 7, y(tick) + 4, text
            )
        )
    for tick, text in zip(x_ticks, tick_texts(x_ticks), strict=True):
        parts.append(
            Markup(
                '<path class="grid" d="M{0:.1f} {1}V{2}"/><text class="tick mid" x="{0:.1f}" y="{3}">{4}</text>'
            ).format(x(tick), y.start, y.end, y.start + 16, text)
        )
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(x.start, y.start, x.end))
    middle_x, middle_y = (x.start + x.end) / 2, (y.start + y.end) / 2
    parts.append(
        Markup(
            '<text class="label mid" x="{:.1f}" y="{}">{}</text>'
            '<text class="label mid" transform="translate(13 {:.1f}) rotate(-90)">{}</text>'
        ).format(middle_x, height - 6, x_label, middle_y, y_label)
    )
    return Markup("").join(parts)


def _polyline(points: Sequence[tuple[float, float]], name: str) -> Markup:
    place = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return Markup('<polyline class="{}" points="{}"/>').format(name, place)


def _svg(width: int, height: int, label: str, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, Markup("").join(parts)
    )
