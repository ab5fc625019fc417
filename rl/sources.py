"""Problems from anywhere: a JSONL file, a Parquet, CSV or JSON file, a data set of the hub, one of its splits.

    read_source("./problems.jsonl")
    read_source("./test-00000-of-00001.parquet", Columns("prompt", "target"))
    read_source("HuggingFaceH4/MATH-500:test")           # hub id and split; needs a network or a filled cache
    read_source("openai/gsm8k/main:train")               # hub id, configuration, split

JSONL is read by our own strict reader, which keeps every character of an answer; the others by `datasets`, whose types
are those of the table (an answer 142.0 stays "142.0", which the math task calls 142).
"""

from __future__ import annotations

import re
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
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_problems(path, columns)
    if path.suffix in TABLES:
        if not path.is_file():
            raise BadProblems(path, [(0, "cannot be read: there is no such file")])
        return _rows(str(source), _load(TABLES[path.suffix], str(source), data_files=str(path), split="train"), columns)
    found = HUB.fullmatch(str(source))
    if found is None:
        kinds = ".jsonl, .jsonl.gz, " + ", ".join(TABLES)
        raise BadProblems(source, [(0, f"is neither a file of a known kind ({kinds}) nor a hub id (org/name:split)")])
    split = found["split"] or "train"
    return _rows(str(source), _load(found["name"], str(source), name=found["configuration"], split=split), columns)


def _load(builder: str, source: str, **arguments: Any) -> Any:
    """The rows of one split, by `datasets`; whatever it raises names the source."""
    from datasets import load_dataset

    try:
        return load_dataset(builder, **arguments)
    except (OSError, ValueError, RuntimeError) as error:  # not found, no network, no such split, a broken table
        reason = " ".join(str(error).split())
        raise BadProblems(source, [(0, f"cannot be loaded: {reason[:300] or type(error).__name__}")]) from error


def _rows(source: str, rows: Any, columns: Columns | None) -> list[Problem]:
    return [problem for problem, _ in problems_of_rows(source, iter(rows), columns)]
