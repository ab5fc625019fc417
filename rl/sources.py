"""Problems from anywhere: a JSONL file, a Parquet, CSV or JSON file, a saved data set, one of the hub, a split of it.

    read_source("./problems.jsonl")
    read_source("./test-00000-of-00001.parquet", Columns("prompt", "target"))
    read_source("HuggingFaceH4/MATH-500:test")           # hub id and split; needs a network or a filled cache
    read_source("openai/gsm8k/main:train")               # hub id, configuration, split
    read_source("./saved/train")                         # a folder that `datasets` has written with save_to_disk

JSONL is read by our own strict reader, which keeps every character of an answer; the others by `datasets`, whose types
are those of the table (an answer 142.0 stays "142.0", which the math task calls 142).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rl.problems import BadProblems, Columns, problems_of_rows, read_problems
from rl.types import Problem

TABLES = {".parquet": "parquet", ".csv": "csv", ".json": "json"}
HUB = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<configuration>[\w.-]+))?(?::(?P<split>[\w.-]+))?", re.ASCII
)


def is_hub_source(source: str) -> bool:
    """`is_hub_source("openai/gsm8k/main:train")`, but not of `./problems.jsonl` or `problems.jsonl`."""
    return HUB.fullmatch(source) is not None


def read_source(source: str | Path, columns: Columns | None = None) -> list[Problem]:
    """The problems of a file or of a hub data set, in order.

    Errors: BadProblems with line (or row number) and reason of every row that is no problem, and for a source that
    cannot be read at all.
    """
    path = Path(source)
    if _is_lines(path):
        return read_problems(path, columns)
    return _rows(str(source), _table(source), columns)


def read_table(source: str | Path) -> Iterator[Mapping[str, Any]]:
    """The rows of any such source as they are, for those who look for something else in them than problems.

    Errors: BadProblems with the line of a row of a JSONL file that is no object, and for a source that cannot be read.
    """
    path = Path(source)
    yield from _lines(path) if _is_lines(path) else _table(source)


def is_saved_dataset(path: Path) -> bool:
    """Whether `datasets` has written this folder with save_to_disk: one split, or several of them in folders."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _is_lines(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz")) and not path.is_dir()


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise BadProblems(path, [(number, f"is not JSON: {error}")]) from None
                if not isinstance(row, dict):
                    raise BadProblems(path, [(number, f"is a {type(row).__name__}, not an object")])
                yield row
    except (OSError, EOFError) as error:
        raise BadProblems(path, [(0, f"cannot be read: {error}")]) from None


def _table(source: str | Path) -> Any:
    """The rows of a source that `datasets` reads."""
    from datasets import load_dataset, load_from_disk

    path, name = Path(source), str(source)
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = ", ".join(f"{name}/{split.name}" for split in sorted(path.iterdir()) if split.is_dir())
            raise BadProblems(source, [(0, f"holds several splits: name one of {splits}")])
        if not is_saved_dataset(path):
            raise BadProblems(source, [(0, "is a folder, but none that `datasets` has written with save_to_disk")])
        return _load(load_from_disk, name, str(path))
    if path.suffix in TABLES:
        if not path.is_file():
            raise BadProblems(path, [(0, "cannot be read: there is no such file")])
        return _load(load_dataset, name, TABLES[path.suffix], data_files=str(path), split="train")
    found = HUB.fullmatch(name)
    if found is None:
        kinds = ".jsonl, .jsonl.gz, " + ", ".join(TABLES)
        raise BadProblems(
            source,
            [(0, f"is neither a file of a known kind ({kinds}) nor a saved data set nor a hub id (org/name:split)")],
        )
    return _load(load_dataset, name, found["name"], name=found["configuration"], split=found["split"] or "train")


def _load(load: Callable[..., Any], source: str, *arguments: Any, **options: Any) -> Any:
    """The rows of one split, by `datasets`; whatever it raises names the source."""
    try:
        return load(*arguments, **options)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such split, a broken table
        reason = " ".join(str(error).split())
        raise BadProblems(source, [(0, f"cannot be loaded: {reason[:300] or type(error).__name__}")]) from error


def _rows(source: str, rows: Any, columns: Columns | None) -> list[Problem]:
    return [problem for problem, _ in problems_of_rows(source, iter(rows), columns)]
