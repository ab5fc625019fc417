"""The frontier as a still picture: accuracy over mean tokens, PNG and SVG from one matplotlib figure.

Bars are 95 % intervals, both ways. The non-dominated arms are joined and in the colour of their family; the dominated
ones are grey and hollow; the parent has a ring. The page draws its own (report.js); its picture without JavaScript is
`charts.scatter`.

    write_file(folder / "frontier.svg", draw_svg(found), "frontier.svg")
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from long2short import charts
from long2short.frontier import Frontier, count, interval, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# For print and the light page; report.css has these as --c0 .. --c7, and a second set for the dark page.
PALETTE = ("#2563a8", "#c4502e", "#2e8555", "#7f4fa3", "#a97a09", "#1f8a96", "#b0437a", "#5b4b3a")
GREY = "#9aa3ad"  # dominated
INK, MUTED = "#20262d", "#4b5560"


def points_of(found: Frontier) -> list[charts.Point]:
    """The arms as points; arms of one label share a colour."""
    colours = families(found)
    return [
        charts.Point(
            name=row.name,
            x=row.summary.tokens.mean.value,
            x_low=row.summary.tokens.mean.low,
            x_high=row.summary.tokens.mean.high,
            y=row.summary.accuracy.value,
            y_low=row.summary.accuracy.low,
            y_high=row.summary.accuracy.high,
            colour=colours.get(row.label or row.name, 0),
            joined=row.non_dominated,
            parent=row.name == found.parent,
            note=f"accuracy {interval(row.summary.accuracy, share)}, tokens {interval(row.summary.tokens.mean, count)}",
        )
        for row in found.rows
    ]


def families(found: Frontier) -> dict[str, int]:
    """A colour per label of the non-dominated arms, in order of first sight; after eight they repeat.

    Dominated arms are grey, so their labels take no colour. An arm without a label is a family of its own.
    """
    labels = dict.fromkeys(row.label or row.name for row in found.rows if row.non_dominated)
    return {label: index % charts.COLOURS for index, label in enumerate(labels)}


def draw_png(found: Frontier, *, dpi: int = 160) -> bytes:
    """The picture as a PNG, 9 by 5.2 inches."""
    buffer = io.BytesIO()
    _figure(found, dpi).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def draw_svg(found: Frontier) -> bytes:
    """The picture as an SVG. Letters are outlines, so that it looks the same everywhere; the same frontier gives the
    same bytes."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "frontier", "svg.fonttype": "path"}):
        _figure(found, dpi=100).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _figure(found: Frontier, dpi: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    points = points_of(found)
    figure = Figure(figsize=(9, 5.2), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x_range, y_range = charts.ranges(points)
    axes.set_xlim(*x_range)
    axes.set_ylim(*y_range)
    axes.set_xlabel("mean tokens per completion", color=MUTED)
    axes.set_ylabel("accuracy (avg@k)", color=MUTED)
    # A name is free text: a $ in it is no formula.
    axes.set_title(
        f"joined: non-dominated    grey: dominated    ring: {found.parent}, the parent    bars: 95% intervals",
        loc="left",
        fontsize=8.5,
        color="#66707c",
        pad=10,
        parse_math=False,
    )
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelcolor=MUTED, labelsize=9)
    path = sorted((point.x, point.y) for point in points if point.joined)
    axes.plot(*zip(*path, strict=True), color="#8a94a0", linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
    for point in points:
        colour = PALETTE[point.colour] if point.joined else GREY
        axes.errorbar(
            point.x,
            point.y,
            xerr=[[point.x - point.x_low], [point.x_high - point.x]],
            yerr=[[point.y - point.y_low], [point.y_high - point.y]],
            color=colour,
            marker="o",
            markersize=6.5,
            markerfacecolor=colour if point.joined else "white",
            markeredgewidth=1.5,
            elinewidth=1.2,
            zorder=4 if point.joined else 3,
        )
        if point.parent:
            axes.plot(point.x, point.y, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=3)
    named = families(found)
    if len(named) > 1 and any(row.label for row in found.rows):
        dots = [Line2D([], [], color=PALETTE[colour], marker="o", linestyle="") for colour in named.values()]
        legend = axes.legend(dots, list(named), loc="lower right", fontsize=8.5, frameon=False, labelcolor=MUTED)
        for text in legend.get_texts():
            text.set_parse_math(False)
    figure.draw_without_rendering()  # the layout is known only now
    _label(axes, points, dpi)
    return figure


def _label(axes: Any, points: Sequence[charts.Point], dpi: int) -> None:
    zoom = dpi / 100  # pixels of the picture per pixel that place_labels thinks in
    spots = [tuple(axes.transData.transform((point.x, point.y)) / zoom) for point in points]

    def x(value: float) -> float:
        return float(axes.transData.transform((value, 0.0))[0] / zoom)

    def y(value: float) -> float:
        return float(axes.transData.transform((0.0, value))[1] / zoom)

    def pixels(artist: Any) -> charts.Box:
        left, low, right, high = artist.get_window_extent().extents / zoom
        return float(left), float(low), float(right), float(high)

    hidden = charts.obstacles(points, x, y)
    if (legend := axes.get_legend()) is not None:
        hidden.append(pixels(legend))
    places = charts.place_labels(
        spots, [(charts.CHAR_WIDTH * len(point.name) + 4, 15.0) for point in points], hidden, pixels(axes.patch)
    )
    for point, (label_x, label_y), (spot_x, spot_y) in zip(points, places, spots, strict=True):
        away = max(abs(label_y - spot_y), abs(label_x - spot_x) - charts.CHAR_WIDTH * len(point.name) / 2) > 22
        axes.annotate(
            point.name,
            (point.x, point.y),
            xytext=axes.transData.inverted().transform((label_x * zoom, label_y * zoom)),
            textcoords="data",
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK if point.joined or point.parent else "#7b858f",
            fontweight="bold" if point.parent else "normal",
            arrowprops={"arrowstyle": "-", "color": "#b7bec7", "linewidth": 0.8} if away else None,
            zorder=5,
            parse_math=False,
        )
