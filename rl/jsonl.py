"""Files of JSON lines that we wrote ourselves and read back strictly: pools, traces, pairs. Standard library only.

One object a line, UTF-8, every line ended by a newline. Such a file is written whole or not at all, so a torn, repeated
or unknown thing in it is damage and is refused with its file and line; nothing is skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any


def dump_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line. ValueError for NaN and infinities, which are not JSON."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def read_rows(
    path: Path, fields: Mapping[str, type], optional: Mapping[str, type] = MappingProxyType({})
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each line; a row has exactly the given fields with exactly the given types, and of the
    `optional` ones those that it has something to say about.

    `place` is `file:line`, for the caller's own messages. Example: `read_rows(path, {"text": str, "num_tokens": int})`.
    ValueError, naming the place, for a line that is not such an object; `true` is not an int here.
    """
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        raise ValueError(f"{path}: the last line is torn; the file is damaged, make it again")
    # Split on the newline byte alone: U+2028 and its like are part of a model's text.
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        place = f"{path}:{number}"
        yield place, _row(line, place, fields, optional)


def _row(line: bytes, place: str, fields: Mapping[str, type], optional: Mapping[str, type]) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    fields = {**fields, **{name: kind for name, kind in optional.items() if name in row}}
    if row.keys() != fields.keys():
        missing, unknown = sorted(fields.keys() - row.keys()), sorted(row.keys() - fields.keys())
        raise ValueError(f"{place}: missing fields {missing}, unknown fields {unknown}")
    for name, kind in fields.items():
        if type(row[name]) is not kind:
            raise ValueError(f"{place}: field {name!r} must be {kind.__name__}, got {type(row[name]).__name__}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
