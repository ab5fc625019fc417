"""The frontier as text for other programs: a Markdown table to paste, a CSV to compute with.

    write_file(folder / "frontier.md", table_markdown(found), "frontier.md")
    write_file(folder / "frontier.csv", table_csv(found), "frontier.csv")

The Markdown has the columns of the printed table, in two tables so that each fits a page, and a third one of what each
arm gives up at equal budget. The CSV has one line an arm
and every number of it as a column of its own, unrounded; what an arm has no number for is empty.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from long2short.frontier import Column, Frontier, FrontierRow, comparison_lines, limit_columns, notes, table_columns

FIRST = 7  # columns of the first Markdown table beside the name: the points and their differences


def table_markdown(found: Frontier) -> str:
    """The table, the compared pairs and the notes as GitHub's Markdown.

    What would be markup in a name is escaped. Example: `| \\* brief | 0.951 [0.935, 0.967] | 41.2 [40.1, 42.3] |`.
    """
    name, *columns = table_columns(found)
    parts = [[name, *columns[:FIRST]], [name, *columns[FIRST:]]]
    if len(found.rows) > 1:
        parts.append(list(limit_columns(found)))
    blocks = [_markdown(part, found.rows) for part in parts]
    lines = [line for line in comparison_lines(found) if line] + notes(found)
    return "\n\n".join([*blocks, "\n".join(f"- {_escaped(line)}" for line in lines)]) + "\n"


def _markdown(columns: Sequence[Column], rows: Sequence[FrontierRow]) -> str:
    lines = [
        [_escaped(_title(column)) for column in columns],
        ["---", *("---:" for _ in columns[1:])],
        *([_escaped(column.cell(row)) for column in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(column: Column) -> str:
    """`("trun-", "cated")` -> "truncated"."""
    return column.head[:-1] + column.unit if column.head.endswith("-") else f"{column.head} {column.unit}"


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text.strip())


def table_csv(found: Frontier) -> str:
    """One line per arm. An estimate is three columns: `accuracy`, `accuracy_low`, `accuracy_high`.

    Further columns: tokens_mean, tokens_median, difference_accuracy, difference_accuracy_signs_p,
    at_limit_80_difference, pass_at_1, curve_accuracy_at_40, curve_area, ..: the names of the JSON, joined. Numbers
    as Python writes them, lines end in a newline.
    """
    lines = [dict(_flat("", _for_csv(row))) for row in found.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _for_csv(row: FrontierRow) -> dict[str, Any]:
    """A row's JSON with the summary at the top level, lists of pairs as objects, and the curve as one object."""
    value = row.to_json()
    summary, curve = value.pop("summary"), value.pop("curve")
    at = {
        f"{name}_at_{point['budget']}": point[name]
        for point in curve["points"]
        for name in ("accuracy", "tokens", "cut")
    }
    return {
        "name": value.pop("name"),
        "label": value.pop("label"),
        **{name: dict(item) if name in ("pass_at", "reflection_words") else item for name, item in summary.items()},
        **value,
        "dominated_by": " ".join(value["dominated_by"]),
        "at_limits": None,
        "at_limit": {str(point["limit"]): {**point, "limit": None} for point in value["at_limits"]},
        "curve": {"area": curve["area"], **at},
    }


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(column, number) of everything in a JSON value; None is left out, so that its column stays empty."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            name = prefix if key == "value" else f"{prefix}_{key}" if prefix else str(key)
            yield from _flat(name, item)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _flat(f"{prefix}_{('here', 'parent')[place]}", item)
    elif value is not None:
        yield prefix, value
