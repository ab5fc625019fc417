"""The frontier as a still picture: accuracy over mean tokens, PNG and SVG from one matplotlib figure.

Bars are 95 % intervals, both ways. The non-dominated arms are filled and joined; those that are dominated within noise
are hollow; both have colour and shape of their family. Arms dominated beyond noise are grey and hollow, collapsed ones
grey crosses; the parent has a ring. The page draws its own (report.js); its picture without JavaScript is
`charts.scatter`.

    write_file(folder / "frontier.svg", draw_svg(found), "frontier.svg")
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from long2short import charts
from long2short.charts import Standing
from long2short.frontier import Frontier, FrontierRow, count, interval, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# For print and the light page; report.css has these as --c0 .. --c7, and a second set for the dark page. Any two are at
# least 23 apart in CIE Lab, also as people see them who lack the red or the green cones (a search found them).
PALETTE = ("#174687", "#904103", "#16a677", "#a17de6", "#ae8f1a", "#037b94", "#6f2d52", "#5e4b32")
GREY = "#9aa3ad"  # dominated beyond noise, collapsed
TITLE_WIDTH = 110  # characters, in the size of the title
INK, MUTED = "#20262d", "#4b5560"


def points_of(found: Frontier) -> list[charts.Point]:
    """The arms as points; arms of one label share a style."""
    styles = families(found)
    return [
        charts.Point(
            name=row.name,
            x=row.summary.tokens.mean.value,
            x_low=row.summary.tokens.mean.low,
            x_high=row.summary.tokens.mean.high,
            y=row.summary.accuracy.value,
            y_low=row.summary.accuracy.low,
            y_high=row.summary.accuracy.high,
            style=charts.STYLES[styles.get(row.label or row.name, 0)],
            standing=standing(row),
            parent=row.name == found.parent,
            note=f"accuracy {interval(row.summary.accuracy, share)}, tokens {interval(row.summary.tokens.mean, count)}",
        )
        for row in found.rows
    ]


def standing(row: FrontierRow) -> Standing:
    """How an arm is drawn. Collapsed comes first: two tokens and no right answer are non-dominated too."""
    if row.collapsed:
        return Standing.COLLAPSED
    if row.joined:
        return Standing.FRONT
    return Standing.DOMINATED if row.beyond_noise else Standing.NOISE


def families(found: Frontier) -> dict[str, int]:
    """A position in `charts.STYLES` per label of the arms in colour, in order of first sight; after all they repeat.

    Grey arms' labels take none. An arm without a label is a family of its own.
    """
    labels = dict.fromkeys(row.label or row.name for row in found.rows if standing(row).coloured)
    return {label: index % len(charts.STYLES) for index, label in enumerate(labels)}


def meanings(found: Frontier) -> list[tuple[Standing, str]]:
    """What the ways of drawing mean, those that occur: `(Standing.FRONT, "joined: non-dominated, ..")`."""
    texts = {
        Standing.FRONT: "joined: non-dominated, by the point estimates",
        Standing.NOISE: "hollow, in colour: dominated, within noise (~)",
        Standing.DOMINATED: "hollow, grey: dominated beyond noise",
        Standing.COLLAPSED: "cross: collapsed, less than half as right as the parent",
    }
    seen = {standing(row) for row in found.rows}
    return [(one, text) for one, text in texts.items() if one in seen]


def wrapped(parts: Sequence[str], width: int = TITLE_WIDTH) -> list[str]:
    """The parts beside each other, four spaces between, in lines of at most `width` characters; no part is broken.

    Example: `wrapped(["ab", "cd", "e"], 8) == ["ab    cd", "e"]`.
    """
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 4 + len(part) <= width:
            lines[-1] += f"    {part}"
        else:
            lines.append(part)
    return lines


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
    said = [*(text for _, text in meanings(found)), f"ring: {found.parent}, the parent", "bars: 95% intervals"]
    axes.set_title(
        "\n".join(wrapped(said)),
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
        colour = PALETTE[point.style.colour] if point.standing.coloured else GREY
        axes.errorbar(
            point.x,
            point.y,
            xerr=[[point.x - point.x_low], [point.x_high - point.x]],
            yerr=[[point.y - point.y_low], [point.y_high - point.y]],
            color=colour,
            marker="x" if point.standing is Standing.COLLAPSED else point.style.marker,
            markersize=6.5,
            markerfacecolor=colour if point.joined else "white",
            markeredgewidth=1.5,
            elinewidth=1.2,
            zorder=4 if point.standing.coloured else 3,
        )
        if point.parent:
            axes.plot(point.x, point.y, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, zorder=3)
    named = families(found)
    if len(named) > 1 and any(row.label for row in found.rows):
        styles = [charts.STYLES[index] for index in named.values()]
        dots = [Line2D([], [], color=PALETTE[one.colour], marker=one.marker, linestyle="") for one in styles]
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
        spots, [(charts.CHAR_WIDTH * len(point.label) + 4, 15.0) for point in points], hidden, pixels(axes.patch)
    )
    for point, (label_x, label_y), (spot_x, spot_y) in zip(points, places, spots, strict=True):
        away = max(abs(label_y - spot_y), abs(label_x - spot_x) - charts.CHAR_WIDTH * len(point.label) / 2) > 22
        axes.annotate(
            point.label,
            (point.x, point.y),
            xytext=axes.transData.inverted().transform((label_x * zoom, label_y * zoom)),
            textcoords="data",
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK if point.standing.coloured or point.parent else "#7b858f",
            fontweight="bold" if point.parent else "normal",
            arrowprops={"arrowstyle": "-", "color": "#b7bec7", "linewidth": 0.8} if away else None,
            zorder=5,
            parse_math=False,
        )
