"""What a frontier run hands over: the table as JSON, the picture (PNG, SVG) and one self-contained HTML page.

The page loads nothing: plotly.js, styles, script and data are in it. Its content security policy lets only these two
scripts run, by their hashes, and refuses every request; nothing in them needs eval. Model text is data, see
`report_text`. Without JavaScript the table, a static picture, provenance and times are there.

    write_report(folder, frontier(arms, "teacher"), arms, title="tiny")
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from long2short import charts
from long2short.frontier import (
    Arm,
    Column,
    Frontier,
    FrontierRow,
    comparison_lines,
    count,
    limit_columns,
    notes,
    percent,
    signed,
    signed_percent,
    table_columns,
)
from long2short.frontier_scores import PARENT_SHARES
from long2short.frontier_text import table_csv, table_markdown
from long2short.pictures import draw_png, draw_svg, families, meanings, points_of, standing
from long2short.report_data import TrainingCurve, difficulty_of, figures, head_of, training_panels
from long2short.report_examples import BYTES, examples
from long2short.report_text import json_block, typeset, visible
from rl.runs import write_file, write_json
from rl.stats import Estimate

__all__ = ["StageTime", "TrainingCurve", "render_page", "write_report"]

TOLERANCE = 0.03  # of accuracy, for the arm that the headline is about
LISTED = 16  # token limits that are listed one by one
TABLE_WIDTH = 150  # characters that stand beside each other on a page of 1,180 pixels
NOTHING: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class StageTime:
    """How long a stage took. Example: `StageTime("teacher", "grpo", 171.3)`."""

    name: str
    method: str
    seconds: float  # of the run that finished it


def write_report(
    folder: Path,
    found: Frontier,
    arms: Sequence[Arm],
    *,
    title: str,
    curves: Sequence[TrainingCurve] = (),
    times: Sequence[StageTime] = (),
    facts: Sequence[tuple[str, str]] = (),
    provenance: Mapping[str, Sequence[tuple[str, str]]] = NOTHING,
) -> None:
    """Write the frontier into `folder` in all its forms: frontier.json, .md, .csv, .png, .svg, and report.html; see
    `render_page`."""
    write_json(folder / "frontier.json", found.to_json(), "frontier.table")
    write_file(folder / "frontier.md", table_markdown(found), "frontier.text")
    write_file(folder / "frontier.csv", table_csv(found), "frontier.text")
    write_file(folder / "frontier.png", draw_png(found), "frontier.png")
    write_file(folder / "frontier.svg", draw_svg(found), "frontier.svg")
    page = render_page(found, arms, title=title, curves=curves, times=times, facts=facts, provenance=provenance)
    write_file(folder / "report.html", page, "frontier.page")


def render_page(
    found: Frontier,
    arms: Sequence[Arm],
    *,
    title: str,
    curves: Sequence[TrainingCurve] = (),
    times: Sequence[StageTime] = (),
    facts: Sequence[tuple[str, str]] = (),
    provenance: Mapping[str, Sequence[tuple[str, str]]] = NOTHING,
    example_bytes: int = BYTES,
) -> str:
    """The page as one string of HTML.

    `arms` are those of `found`; `facts` stand under the title as name and value; `provenance` says of each arm where it
    comes from (recipe, seed, stage, method, parents, config, hashes), as name and value in order. The problems take at
    most `example_bytes` of it, see `report_examples`. ValueError for provenance or a training curve of an arm that is
    not in `arms`.
    """
    names = [arm.name for arm in arms]
    _require_arms("provenance", provenance, names)
    _require_arms("training curves", [arm for curve in curves for arm in curve.arms], names)
    brief = brief_arm(found)
    difficulty = difficulty_of(arms, found.parent)
    shown = examples(arms, difficulty.bin_of, example_bytes)
    panels = training_panels(curves, names)
    data = {
        **figures(found, arms, difficulty),
        "brief": None if brief is None else names.index(brief),
        "panels": panels,
        "problems": shown.to_json(),
    }
    plotly, script = plotly_js(), page_script()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(typeset=typeset, visible=visible, head_of=head_of, standing=standing)
    return environment.from_string(asset("report.html.j2")).render(
        title=title,
        style=Markup(asset("report.css")),
        policy=" ".join(script_hash(text) for text in (script, plotly)),
        plotly=Markup(plotly),
        script=Markup(script),
        data=json_block(data),
        facts=facts,
        headline=headline(found, brief),
        tiles=tiles(found, brief),
        parent=found.parent,
        scatter=charts.scatter(points_of(found)),
        families=_legend(found),
        meanings=[(charts.key(charts.STYLES[0], one), text) for one, text in meanings(found)],
        tables=blocks(table_columns(found)[1:], found.rows),
        limits=limit_columns(found)[1:] if found.rows[1:] else (),
        parent_shares=" and ".join(", ".join(f"{share:g}" for share in PARENT_SHARES).rsplit(", ", 1)),
        budgets=listed_budgets([point.budget for point in found.rows[0].curve.points]),
        rows=found.rows,
        comparisons=[line for line in comparison_lines(found) if line],
        notes=notes(found),
        difficulty=difficulty,
        panels=panels,
        examples=shown,
        provenance=[(name, provenance[name]) for name in names if name in provenance],
        times=_times(times),
        total=duration(sum(time.seconds for time in times)),
    )


def _require_arms(what: str, wanted: Iterable[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name not in names:
            raise ValueError(f"{what}: {name!r} is not an arm of the report; the arms are {', '.join(names)}")


# --- what the page is made of ---------------------------------------------------------------------------------------


@cache
def asset(name: str) -> str:
    """A file of this package that goes into the page."""
    return files("long2short").joinpath(name).read_text(encoding="utf-8")


@cache
def page_script() -> str:
    """The page's own script: its three files in one function, so that none of their names is global."""
    parts = [asset(name) for name in ("report.js", "report_charts.js", "report_browser.js")]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\nstart();\n})();\n"


@cache
def plotly_js() -> str:
    """plotly.js as the plotly package carries it: 4.8 MB, one script that is inert until it is called."""
    from importlib.util import find_spec

    spec = find_spec("plotly")  # not imported: the package itself takes a second and is not needed
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def script_hash(text: str) -> str:
    """The source expression of a content security policy that allows this inline script: `'sha256-…'`."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# --- what it says ---------------------------------------------------------------------------------------------------


def brief_arm(found: Frontier, tolerance: float = TOLERANCE) -> str | None:
    """The arm to show beside the parent: fewest tokens among those at most `tolerance` less accurate, else the most
    accurate other arm. Never a collapsed one; None if nothing else is there."""
    if close := _close(found, tolerance):
        return min(close, key=lambda row: row.summary.tokens.mean.value).name
    others = _others(found)
    return max(others, key=lambda row: row.summary.accuracy.value).name if others else None


def _others(found: Frontier) -> list[FrontierRow]:
    return [row for row in found.rows if row.name != found.parent and not row.collapsed]


def _close(found: Frontier, tolerance: float) -> list[FrontierRow]:
    least = found.row(found.parent).summary.accuracy.value - tolerance
    return [row for row in _others(found) if row.summary.accuracy.value >= least]


def headline(found: Frontier, brief: str | None, tolerance: float = TOLERANCE) -> list[str]:
    """A few sentences: which arm the large figures are about and why, which arms are on the line, which collapsed.

    Example: "brief is the briefest of 3 arms at most 0.03 less accurate than teacher."
    """
    by_tokens = sorted(found.rows, key=lambda row: row.summary.tokens.mean.value)
    lines = []
    close = _close(found, tolerance)
    if brief is None:
        summary = found.row(found.parent).summary
        lines.append(
            f"{found.parent} alone: right in {percent(summary.accuracy.value)} of its answers, "
            f"with {count(summary.tokens.mean.value)} tokens on average."
        )
    elif found.row(brief) in close:
        which = f"the briefest of {len(close)} arms" if len(close) > 1 else "the only arm"
        lines.append(f"{brief} is {which} at most {tolerance} less accurate than {found.parent}.")
    else:
        lines.append(
            f"No arm is at most {tolerance} less accurate than {found.parent}; {brief} is the most accurate other one."
        )
    lines.append(f"Non-dominated, from brief to long: {', '.join(row.name for row in by_tokens if row.joined)}.")
    if collapsed := [row.name for row in by_tokens if row.collapsed]:
        lines.append(f"Collapsed, less than half as right as {found.parent}: {', '.join(collapsed)}.")
    return lines


def listed_budgets(budgets: Sequence[int]) -> str:
    """`[8, 16, 32]` -> "3 limits: 8, 16, 32 tokens"; many are said by their ends: "40 limits from 8 to 47 tokens"."""
    if len(budgets) == 1:
        return f"one limit: {budgets[0]:,} tokens"
    if len(budgets) > LISTED:
        return f"{len(budgets)} limits from {budgets[0]:,} to {budgets[-1]:,} tokens"
    return f"{len(budgets)} limits: {', '.join(f'{budget:,}' for budget in budgets)} tokens"


def tiles(found: Frontier, brief: str | None) -> list[tuple[str, str, str]]:
    """The same in large figures: (figure, what it is, its interval or what it is compared with)."""
    if brief is None or (difference := found.row(brief).difference) is None:
        return []

    def change(what: str, estimate: Estimate, form: Callable[[float], str]) -> tuple[str, str, str]:
        span = f"95% interval {form(estimate.low)} to {form(estimate.high)}"
        return typeset(form(estimate.value)), what, typeset(span)

    arms = found.row(found.parent).summary, found.row(brief).summary
    lengths = [count(summary.tokens.mean.value) for summary in arms]
    rights = [percent(summary.accuracy.value) for summary in arms]
    return [
        change("tokens", difference.tokens_relative, signed_percent),
        change("accuracy", difference.accuracy, signed),
        (f"{lengths[0]} → {lengths[1]}", "mean tokens", f"{found.parent} → {brief}"),
        (f"{rights[0]} → {rights[1]}", "right", f"{found.parent} → {brief}"),
    ]


def _legend(found: Frontier) -> list[tuple[str, Markup]]:
    """What the styles of the static picture mean; nothing where they mean an arm each, or are one."""
    named = families(found)
    if len(named) < 2 or not any(row.label for row in found.rows):
        return []
    return [(name, charts.key(charts.STYLES[at], charts.Standing.FRONT)) for name, at in named.items()]


def blocks(columns: Sequence[Column], rows: Sequence[FrontierRow], width: int = TABLE_WIDTH) -> list[list[Column]]:
    """The columns in blocks, one table each, that are at most `width` characters wide with 24 for the arm's name."""
    found: list[list[Column]] = []
    used = 0
    for column in columns:
        size = 3 + max(map(len, (column.head, column.unit, *(column.cell(row) for row in rows))))
        if not found or used + size > width:
            found.append([])
            used = 24
        found[-1].append(column)
        used += size
    return found


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
