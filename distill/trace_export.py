"""Traces as a file for other trainers: chat messages with their thoughts, JSON lines or Parquet.

    reason traces export STAGE --to FILE --format messages

`datasets.load_dataset("json", data_files=FILE)` (or `"parquet"`) reads it, TRL's and other trainers take its
`messages`, and `distill.foreign.read_foreign` reads it back. Written whole or not at all, and never over a file that
is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from distill.foreign import with_tags
from distill.traces import Trace, read_traces
from rl.pool_export import write_lines
from rl.runs import write_file

Row = dict[str, Any]


def message_row(trace: Trace, suffix: str = "") -> Row:
    """A conversation of two messages, the `<think>` that the template wrote put back.

    Example: `{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content":
    "<think>easy</think>4"}], "problem": "p1", "teacher": "r1", "source": "tiny", "level": 2, "num_tokens": 9}`
    """
    return {
        "messages": [
            {"role": "user", "content": trace.question + suffix},
            {"role": "assistant", "content": with_tags(trace.text)},
        ],
        "problem": trace.problem_id,
        "teacher": trace.teacher,
        "source": trace.source,
        "level": trace.level,
        "num_tokens": trace.num_tokens,
    }


def write_parquet(file: IO[bytes], rows: Iterable[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    text, count = pyarrow.string(), pyarrow.int64()
    message = pyarrow.struct([("role", text), ("content", text)])
    schema = pyarrow.schema(
        [("messages", pyarrow.list_(message)), ("problem", text), ("teacher", text), ("source", text),
         ("level", count), ("num_tokens", count)]
    )  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), file)


FORMATS: dict[str, Callable[[IO[bytes], Iterable[Row]], None]] = {"messages": write_lines, "parquet": write_parquet}


def export_traces(path: Path, to: Path, write: Callable[[IO[bytes], Iterable[Row]], None], suffix: str = "") -> int:
    """Write the traces of a `traces.jsonl` to `to`; how many there are. `suffix` is appended to every question.

    Errors: ValueError if `to` is there, and as `distill.traces.read_traces`.
    """
    if to.exists():
        raise ValueError(f"{to} is there and is never overwritten; move it away or name another file")
    traces = read_traces(path)
    content = BytesIO()
    write(content, (message_row(trace, suffix) for trace in traces))
    to.parent.mkdir(parents=True, exist_ok=True)
    write_file(to, content.getvalue(), "traces.write")
    return len(traces)
