"""What a person sees of a run: progress on stderr, results on stdout, or with `--json` one JSON object on stdout.

On a terminal progress is a rich bar; elsewhere (a log file, CI) it is plain lines, one per stage and at most one every
ten seconds in between.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recipes.runner import Report, StageResult, Status

LINE_SECONDS = 10.0
MAX_LINES = 22  # of an error message: one screen


def show(value: Mapping[str, Any], text: str, as_json: bool) -> None:
    """The result of a command: the JSON object, or the text for people."""
    if as_json:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    try:
        sys.stdout.write(text.rstrip("\n") + "\n")
        sys.stdout.flush()
    except UnicodeEncodeError:  # a terminal without UTF-8
        sys.stdout.write(text.encode("ascii", "backslashreplace").decode().rstrip("\n") + "\n")


def say(text: str) -> None:
    """A line for people, on stderr."""
    stream = sys.stderr
    stream.write(text.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8") + "\n")
    stream.flush()


def one_screen(text: str) -> str:
    """At most 22 lines of at most 400 characters: an error message must not scroll away."""
    lines = [line if len(line) <= 400 else line[:397] + "..." for line in text.splitlines() if line.strip()]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"and {len(lines) - MAX_LINES + 1} more lines"]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """`duration(7.26) == "7.3 s"`, `duration(171) == "2 min 51 s"`, `duration(7320) == "2 h 02 min"`"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table, columns padded to their widest cell."""
    sizes = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    lines = [
        "  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# --- progress --------------------------------------------------------------------------------------------------------


class PlainReport:
    """Progress as lines of text, for logs. `clock` and `line` are given by tests."""

    def __init__(self, line: Callable[[str], None] = say, clock: Callable[[], float] = time.monotonic) -> None:
        self.line, self.clock = line, clock
        self.last = clock()

    def stage_started(self, name: str, method: str, position: int, total: int, status: Status) -> None:
        self.line(f"[{position}/{total}] {name} ({method}): {'goes on' if status == 'resumed' else 'starts'}")
        self.last = self.clock()

    def stage_progress(self, name: str, done: int, total: int, note: str) -> None:
        now = self.clock()
        if now - self.last >= LINE_SECONDS:
            self.last = now
            self.line(f"  {name}: {done}/{total} {note}".rstrip())

    def stage_finished(self, result: StageResult, position: int, total: int) -> None:
        what = "was done before" if result.status == "reused" else f"done in {duration(result.seconds)}"
        self.line(f"[{position}/{total}] {result.name} ({result.method}): {what}")
        for note in stage_notes(result):
            self.line(f"  {result.name}: {note}")


class BarReport:
    """Progress as a bar on a terminal; finished stages stay as lines above it."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.lines = PlainReport(line=lambda text: progress.console.print(text, markup=False, highlight=False))
        self.task: Any = None

    def stage_started(self, name: str, method: str, position: int, total: int, status: Status) -> None:
        self._clear()
        self.task = self.progress.add_task(f"[{position}/{total}] {name}", total=None, note=method)

    def stage_progress(self, name: str, done: int, total: int, note: str) -> None:
        if self.task is None:
            self.task = self.progress.add_task(name, total=total, note=note)
        self.progress.update(self.task, completed=done, total=total, note=note)

    def stage_finished(self, result: StageResult, position: int, total: int) -> None:
        self._clear()
        self.lines.stage_finished(result, position, total)

    def _clear(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None


@contextmanager
def open_report() -> Iterator[Report]:
    """A report on stderr for the time of a run. What libraries print meanwhile goes to stderr too."""
    terminal = sys.stderr.isatty()
    with redirect_stdout(sys.stderr):
        if not terminal:
            yield PlainReport()
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        ) as progress:
            yield BarReport(progress)


# --- results ---------------------------------------------------------------------------------------------------------


def run_result(recipe: str, seed: int, results: Sequence[StageResult]) -> tuple[dict[str, Any], str]:
    """What `reason run` returns, as JSON and as text: a row per stage, what pairs there are to train on, the table of
    each frontier."""
    stages = [
        {
            "name": result.name,
            "method": result.method,
            "status": str(result.status),
            "seconds": result.seconds,
            "folder": str(result.folder),
            "notes": stage_notes(result),
        }
        for result in results
    ]
    rows = [
        [result.name, result.method, str(result.status), duration(result.seconds), str(result.folder)]
        for result in results
    ]
    text = [columns(["stage", "method", "", "time", "folder"], rows)]
    frontiers: dict[str, Any] = {}
    pairs: dict[str, Any] = {}
    for result in results:
        if result.method == "pairs" and (result.folder / "summary.json").is_file():
            pairs[result.name] = json.loads((result.folder / "summary.json").read_text(encoding="utf-8"))
            text += ["", f"pairs of stage {result.name}", *pairs_lines(pairs[result.name])]
        if result.method == "frontier" and (result.folder / "frontier.json").is_file():
            frontiers[result.name] = json.loads((result.folder / "frontier.json").read_text(encoding="utf-8"))
            text += ["", frontier_text(frontiers[result.name]), *frontier_files(result.folder)]
    value = {"recipe": recipe, "seed": seed, "stages": stages, "pairs": pairs, "frontiers": frontiers}
    return value, "\n".join(text)


def pairs_lines(summary: Mapping[str, Any]) -> list[str]:
    """What to look at before training on the pairs of a stage."""
    from long2short.pair_selection import summary_lines

    return summary_lines(summary)


PAIRS_AT_A_GLANCE = 5  # lines: how many, from how many problems, both lengths, their ratio


def stage_notes(result: StageResult) -> list[str]:
    """What a finished stage has to say for itself: why it chose a model, why it stopped early, what it warned of."""
    path = result.folder / "summary.json"
    if result.method not in ("select", "merge_search", "pairs", "length_rl") or not path.is_file():
        return []
    summary = json.loads(path.read_text(encoding="utf-8"))
    if result.method == "pairs":  # now, and not only at the end: the next stage may train on them for hours
        shown = PAIRS_AT_A_GLANCE if summary["pairs"] else 1
        return [" ".join(line.split()) for line in pairs_lines(summary)[:shown]]
    if result.method in ("select", "merge_search"):
        return [f"chose {summary['chosen']}: {summary['reason']}"] if "reason" in summary else []
    stopped = summary.get("stopped")
    notes = [f"stopped at {stopped}; the model of step {summary['kept_step']} is handed on"] if stopped else []
    warnings = [f"step {alarm['step']}: {alarm['says']}" for alarm in summary.get("alarms", [])]
    return notes + [warning for warning in warnings if warning != stopped]


def frontier_files(folder: Path) -> list[str]:
    """Where to look at a finished frontier."""
    return [f"{name}: {folder / file}" for name, file in (("picture", "frontier.png"), ("page", "report.html"))]


def frontier_text(value: Mapping[str, Any]) -> str:
    """The table of a `frontier.json`."""
    from shutil import get_terminal_size

    from long2short.frontier import Frontier, table

    return table(Frontier.from_json(dict(value)), width=max(100, get_terminal_size().columns))


def summary_text(summary: Mapping[str, Any], difference: Mapping[str, Any] | None = None) -> str:
    """A `summary.json` as lines for people, with the paired difference to a parent if there is one."""
    from long2short.frontier import few_problems
    from rl.stats import FEW_PROBLEMS

    def interval(estimate: Mapping[str, Any], digits: int) -> str:
        return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"

    tokens = summary["tokens"]
    per_correct = summary["tokens_per_correct"]
    lines = [
        f"problems x samples    {summary['num_problems']} x {summary['samples']}",
        f"accuracy (avg@{summary['samples']})".ljust(22) + interval(summary["accuracy"], 3),
        f"maj@{summary['samples']}".ljust(22) + f"{summary['maj_at_k']:.3f}",
        f"pass@{summary['samples']}".ljust(22)
        + ("-" if summary["pass_at_k"] is None else f"{summary['pass_at_k']:.3f}"),
        f"tokens, mean          {interval(tokens['mean'], 1)}",
        f"tokens, median, p95   {tokens['median']:.0f}, {tokens['p95']:.0f}",
        f"tokens per correct    {'-' if per_correct is None else f'{per_correct:.1f}'}",
        f"truncated             {summary['truncated']:.1%}",
        f"loops                 {summary['loops']:.1%}",
    ]
    if summary["undecided"]:
        lines.append(f"undecided by judge    {summary['undecided']}")
    if summary["num_problems"] < FEW_PROBLEMS:
        lines.append(few_problems(summary["num_problems"]))
    if difference is not None:
        lines += [
            f"accuracy - parent's   {interval(difference['accuracy'], 3)}",
            f"tokens - parent's     {interval(difference['tokens'], 1)}",
        ]
    return "\n".join(lines)
