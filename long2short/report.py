"""What a frontier run hands over: the picture (PNG) and one self-contained HTML page.

The page has no script and loads nothing: styles and charts are inline, and its content security policy refuses all
else. Model text is data: it is escaped, and characters that hide or reorder text are shown by name.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from long2short import charts
from long2short.frontier import (
    Arm,
    Frontier,
    FrontierRow,
    comparison_lines,
    count,
    interval,
    notes,
    percent,
    share,
    signed,
    signed_percent,
    table_columns,
)
from rl.runs import write_file, write_json
from rl.types import FinishReason, Rollout

TEXT_LIMIT = 8_000  # characters of one completion on the page; the middle of a longer one is left out, and said so
PANELS = (("reward", "reward"), ("accuracy", "accuracy"), ("tokens_mean", "mean tokens"), ("loss", "loss"))
# For print and the light page; the template has a second set for the dark one.
PALETTE = ("#2563a8", "#c4502e", "#2e8555", "#7f4fa3", "#a97a09", "#1f8a96", "#b0437a", "#66707c")


@dataclass(frozen=True, slots=True)
class TrainingCurve:
    """The lines of a training stage's metrics.jsonl. Example: `TrainingCurve("teacher", ({"step": 1, ..}, ..))`."""

    name: str
    rows: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage took. Example: `StageTime("teacher", "grpo", 171.3)`."""

    name: str
    method: str
    seconds: float
    reused: bool = False  # finished in an earlier run; the time is that run's


@dataclass(frozen=True, slots=True)
class Answer:
    """One arm's answer to an example, ready to be shown."""

    arm: str
    verdict: str
    reason: str
    tokens: int
    ended: str  # how it ended, if not by itself
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """One problem as several arms answered it."""

    kind: str
    problem: str
    level: int | None
    question: str
    reference: str
    answers: tuple[Answer, ...]


def write_report(
    folder: Path,
    found: Frontier,
    arms: Sequence[Arm],
    *,
    title: str,
    curves: Sequence[TrainingCurve] = (),
    times: Sequence[StageTime] = (),
    facts: Sequence[tuple[str, str]] = (),
    shown: Sequence[str] = (),
) -> None:
    """Write frontier.json, frontier.png and report.html into `folder`; see `render_page` for the parameters."""
    write_json(folder / "frontier.json", found.to_json(), "frontier.table")
    write_file(folder / "frontier.png", draw_png(found), "frontier.png")
    page = render_page(found, arms, title=title, curves=curves, times=times, facts=facts, shown=shown)
    write_file(folder / "report.html", page, "frontier.page")


# --- the picture --------------------------------------------------------------------------------------------------


def points_of(found: Frontier) -> list[charts.Point]:
    """The arms as points; arms of one label share a colour."""
    colours = colours_of([row.label or row.name for row in found.rows])
    return [
        charts.Point(
            name=row.name,
            x=row.summary.tokens.mean.value,
            x_low=row.summary.tokens.mean.low,
            x_high=row.summary.tokens.mean.high,
            y=row.summary.accuracy.value,
            y_low=row.summary.accuracy.low,
            y_high=row.summary.accuracy.high,
            colour=colours[row.label or row.name],
            joined=row.non_dominated,
            parent=row.name == found.parent,
            note=f"accuracy {interval(row.summary.accuracy, share)}, tokens {interval(row.summary.tokens.mean, count)}",
        )
        for row in found.rows
    ]


def colours_of(labels: Sequence[str]) -> dict[str, int]:
    """A colour per label, in order of first sight; after eight they repeat."""
    return {label: index % charts.COLOURS for index, label in enumerate(dict.fromkeys(labels))}


def draw_png(found: Frontier, *, dpi: int = 160) -> bytes:
    """The frontier as a PNG: error bars both ways, the non-dominated arms joined, the parent ringed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = points_of(found)
    figure = Figure(figsize=(9, 5.2), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    x_range, y_range = charts.ranges(points)
    axes.set_xlim(*x_range)
    axes.set_ylim(*y_range)
    axes.set_xlabel("mean tokens per completion", color="#4b5560")
    axes.set_ylabel("accuracy (avg@k)", color="#4b5560")
    legend = f"filled, joined: non-dominated    ring: {found.parent}, the parent    bars: 95% intervals"
    axes.set_title(legend, loc="left", fontsize=8.5, color="#66707c", pad=10, parse_math=False)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelcolor="#4b5560", labelsize=9)
    path = sorted((point.x, point.y) for point in points if point.joined)
    axes.plot(*zip(*path, strict=True), color="#8a94a0", linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
    for point in points:
        colour = PALETTE[point.colour]
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
            zorder=3,
        )
        if point.parent:
            axes.plot(point.x, point.y, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, zorder=3)
    figure.draw_without_rendering()  # the layout is known only now
    _label_png(axes, points, dpi)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _label_png(axes: Any, points: Sequence[charts.Point], dpi: int) -> None:
    zoom = dpi / 100  # pixels of the picture per pixel that place_labels thinks in
    spots = [tuple(axes.transData.transform((point.x, point.y)) / zoom) for point in points]

    def x(value: float) -> float:
        return float(axes.transData.transform((value, 0.0))[0] / zoom)

    def y(value: float) -> float:
        return float(axes.transData.transform((0.0, value))[1] / zoom)

    inside = axes.bbox.extents / zoom
    places = charts.place_labels(
        spots,
        [(charts.CHAR_WIDTH * len(point.name) + 4, 15.0) for point in points],
        charts.obstacles(points, x, y),
        (inside[0], inside[1], inside[2], inside[3]),
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
            color="#20262d" if point.joined or point.parent else "#4b5560",
            fontweight="bold" if point.parent else "normal",
            arrowprops={"arrowstyle": "-", "color": "#b7bec7", "linewidth": 0.8} if away else None,
            zorder=4,
            parse_math=False,
        )


# --- the page -----------------------------------------------------------------------------------------------------


def render_page(
    found: Frontier,
    arms: Sequence[Arm],
    *,
    title: str,
    curves: Sequence[TrainingCurve] = (),
    times: Sequence[StageTime] = (),
    facts: Sequence[tuple[str, str]] = (),
    shown: Sequence[str] = (),
) -> str:
    """The page as one string of HTML.

    `arms` are those of `found`; `shown` are the arms whose answers stand side by side (default: the parent and
    `brief_arm`); `facts` are shown under the title as name and value.
    """
    by_name = {arm.name: arm for arm in arms}
    brief = brief_arm(found)
    names = list(shown) or [found.parent, *([brief] if brief else [])]
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not an arm of the report; the arms are {', '.join(by_name)}")
    kinds, examples = pick_examples([by_name[name] for name in names])
    points = points_of(found)
    columns = table_columns(found)[1:]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["typeset"] = typeset
    template = environment.from_string(files("long2short").joinpath("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=visible(title),
        facts=[(visible(name), visible(value)) for name, value in facts],
        headline=headline(found, brief),
        parent=found.parent,
        scatter=charts.scatter(points),
        tables=(columns[:4], columns[4:]),
        rows=list(zip(found.rows, points, strict=True)),
        comparisons=[line for line in comparison_lines(found) if line],
        notes=notes(found, mark="Filled dot:"),
        histograms=_histograms(arms, points),
        panels=_panels(curves, {point.name: point.colour for point in points}),
        names=names,
        kinds=kinds,
        examples=examples,
        times=_times(times),
        total=duration(sum(time.seconds for time in times)),
    )


def brief_arm(found: Frontier, tolerance: float = 0.03) -> str | None:
    """The arm to show beside the parent: fewest tokens among those at most `tolerance` less accurate, else the most
    accurate other arm; None if the parent is alone."""
    others = [row for row in found.rows if row.name != found.parent]
    floor = found.row(found.parent).summary.accuracy.value - tolerance
    close = [row for row in others if row.summary.accuracy.value >= floor]
    if close:
        return min(close, key=lambda row: row.summary.tokens.mean.value).name
    return max(others, key=lambda row: row.summary.accuracy.value).name if others else None


def headline(found: Frontier, brief: str | None) -> list[str]:
    """One or two sentences that say what came out."""
    base = found.row(found.parent)
    lines = [f"{base.name}, the parent, is right in {_said(base)}."]
    if brief is not None and (difference := found.row(brief).difference) is not None:
        tokens = typeset(interval(difference.tokens_relative, signed_percent))
        accuracy = typeset(interval(difference.accuracy, signed))
        said = _said(found.row(brief))
        lines.append(f"{brief} is right in {said}: tokens {tokens}, accuracy {accuracy}, on the same problems.")
    return lines


def _said(row: FrontierRow) -> str:
    accuracy, tokens = percent(row.summary.accuracy.value), count(row.summary.tokens.mean.value)
    return f"{accuracy} of its answers, with {tokens} tokens on average"


def typeset(text: str) -> str:
    """A minus sign for the hyphen before a number, for the page: "[-1.5%, 2%]" -> "[−1.5%, 2%]"."""
    return re.sub(r"-(?=\d)", "\u2212", text)


def pick_examples(arms: Sequence[Arm], quota: int = 2) -> tuple[list[tuple[str, int]], list[Example]]:
    """Problems answered side by side, and how many problems are of each kind.

    The first sample of each arm counts, and problems come in the order of the test set: the first `quota` of each kind
    are shown, so that nothing is picked by hand. Kinds: who is right; problems with an undecided answer are left out.
    """
    if len(arms) < 2:
        return [], []
    answers = [{group.problem.id: group.rollouts[0] for group in arm.groups} for arm in arms]
    counts: Counter[str] = Counter()
    examples: dict[str, list[Example]] = {}
    for group in arms[0].groups:
        problem = group.problem
        rollouts = [by_id[problem.id] for by_id in answers]
        if not all(rollout.verdict.decided for rollout in rollouts):
            continue
        kind = _kind([arm.name for arm in arms], rollouts)
        counts[kind] += 1
        found = examples.setdefault(kind, [])
        if len(found) < quota:
            shown = [_answer(arm.name, rollout) for arm, rollout in zip(arms, rollouts, strict=True)]
            question, reference = readable(problem.text), readable(problem.answer)
            found.append(Example(kind, visible(problem.id), problem.level, question, reference, tuple(shown)))
    order = counts.most_common()
    return order, [example for kind, _ in order for example in examples[kind]]


def _kind(names: Sequence[str], rollouts: Sequence[Rollout]) -> str:
    right = [name for name, rollout in zip(names, rollouts, strict=True) if rollout.right]
    if len(right) == len(names):
        return "both right" if len(names) == 2 else "all right"
    return f"only {' and '.join(right)} right" if right else ("both wrong" if len(names) == 2 else "all wrong")


def _answer(arm: str, rollout: Rollout) -> Answer:
    reason = rollout.completion.finish_reason
    return Answer(
        arm=arm,
        verdict=str(rollout.verdict.outcome),
        reason=readable(rollout.verdict.reason, 300),
        tokens=rollout.num_tokens,
        ended="" if reason is FinishReason.STOP else {FinishReason.LENGTH: "truncated"}.get(reason, str(reason)),
        text=readable(rollout.completion.text),
    )


def visible(text: str) -> str:
    """Text from outside with every character that hides or reorders text shown by its code.

    Control characters, marks of direction, zero-width characters and lone surrogates: NUL becomes ⟨U+0000⟩, a
    right-to-left override ⟨U+202E⟩. Newlines, tabs and the joiners that scripts need stay.
    """
    return "".join(f"⟨U+{ord(character):04X}⟩" if _hides(character) else character for character in text)


def _hides(character: str) -> bool:
    kept = "\n\t\u200c\u200d"
    return character not in kept and unicodedata.category(character) in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def readable(text: str, limit: int = TEXT_LIMIT) -> str:
    """What the page shows of a text from outside: `shortened`, then `visible`."""
    return visible(shortened(text, limit))


def shortened(text: str, limit: int = TEXT_LIMIT) -> str:
    """At most `limit` characters of a text, three quarters from its start; what is left out is counted in its place."""
    if len(text) <= limit:
        return text
    head, tail = limit * 3 // 4, limit // 4
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters left out …]\n{text[-tail:]}"


def _histograms(arms: Sequence[Arm], points: Sequence[charts.Point]) -> list[tuple[Arm, Markup]]:
    edges = charts.bins(max(length for arm in arms for group in arm.groups for length in group.num_tokens))
    drawn = []
    for arm, point in zip(arms, points, strict=True):
        rollouts = [rollout for group in arm.groups for rollout in group.rollouts]
        right = [rollout.num_tokens for rollout in rollouts if rollout.right]
        others = [rollout.num_tokens for rollout in rollouts if not rollout.right]
        chart = charts.histogram(right, others, edges, mean=arm.summary.tokens.mean.value, colour=point.colour)
        drawn.append((arm, chart))
    return drawn


def _panels(curves: Sequence[TrainingCurve], arms: Mapping[str, int]) -> list[tuple[str, list[charts.Series], Markup]]:
    """A chart per measure over all stages that have it. Loss only for stages without a reward: RL's says nothing."""
    panels = []
    colours = _curve_colours([curve.name for curve in curves], arms)
    for key, label in PANELS:
        series = []
        for curve in curves:
            if key == "loss" and any("reward" in row for row in curve.rows):
                continue
            values = tuple((row["step"], row[key]) for row in curve.rows if isinstance(row.get(key), int | float))
            if values:
                series.append(charts.Series(curve.name, colours[curve.name], values))
        if series:
            panels.append((label, series, charts.lines(series, label)))
    return panels


def _curve_colours(names: Sequence[str], arms: Mapping[str, int]) -> dict[str, int]:
    """A stage has the colour of the arm it trained, unless another stage has it: then one that is free."""
    colours: dict[str, int] = {}
    for name in names:
        free = [colour for colour in range(charts.COLOURS) if colour not in colours.values()]
        wanted = arms.get(name)
        colours[name] = wanted if wanted in free else (free[0] if free else len(colours) % charts.COLOURS)
    return colours


def _times(times: Sequence[StageTime]) -> list[tuple[StageTime, str, float]]:
    longest = max((time.seconds for time in times), default=0.0) or 1.0
    return [(time, duration(time.seconds), 100 * time.seconds / longest) for time in times]


def duration(seconds: float) -> str:
    """3.2 -> "3.2 s", 171.3 -> "2 min 51 s", 4000 -> "1 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
