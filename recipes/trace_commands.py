"""`reason traces export` and `reason pool import`: traces as files for other trainers, and others' traces as a pool.

reason traces export runs/tiny/traces-0a1b2c3d --to traces.jsonl --format messages
reason pool import openr1.parquet problems.jsonl --out ./openr1 --tokenizer ./student --teacher deepseek-r1
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from recipes.options import CountOption, JsonOption, SplitOption, SuffixOption, TaskOption

traces_app = typer.Typer(help="Take traces elsewhere.", no_args_is_help=True)


class TraceFormat(StrEnum):
    """The keys of `distill.trace_export.FORMATS`."""

    MESSAGES = "messages"
    PARQUET = "parquet"


@traces_app.command("export")
def export(
    traces: Annotated[Path, typer.Argument(metavar="TRACES", help="A traces.jsonl, or the folder of its stage.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The file to write; never overwritten.")],
    form: Annotated[
        TraceFormat, typer.Option("--format", help="Chat messages, as JSON lines or as Parquet.")
    ] = TraceFormat.MESSAGES,
    prompt_suffix: SuffixOption = "",
    as_json: JsonOption = False,
) -> None:
    """Write traces as chat messages with their thoughts, for any trainer that `datasets` feeds."""
    from distill.trace_export import FORMATS, export_traces
    from recipes.console import show

    path = traces / "traces.jsonl" if traces.is_dir() else traces
    if not path.is_file():
        raise ValueError(f"{traces} holds no traces: there is no file {path}")
    rows = export_traces(path, to, FORMATS[form], prompt_suffix)
    show({"traces": str(path), "file": str(to), "format": form, "rows": rows}, f"{rows:,} traces in {to}", as_json)


def import_command(
    source: Annotated[
        str,
        typer.Argument(metavar="TRACES", help="A file (JSONL, Parquet, CSV), a saved data set, or a hub id."),
    ],
    problems: Annotated[
        str, typer.Argument(metavar="PROBLEMS", help="The problems they answer: `tiny`, a file, or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the pool.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="MODEL", help="The student: its template, and its tokens are counted.")
    ],
    teacher: Annotated[str, typer.Option("--teacher", metavar="NAME", help="Who wrote them.")],
    strip: Annotated[
        list[str] | None,
        typer.Option("--strip", metavar="TEXT", help="An instruction that only the questions there have. Repeatable."),
    ] = None,
    prompt_suffix: SuffixOption = "",
    split: SplitOption = None,
    count: CountOption = None,
    task: TaskOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take traces from elsewhere into a pool and judge every one; what its authors say of it does not count."""
    from distill.foreign import read_foreign
    from distill.imported import import_traces
    from recipes.console import show
    from recipes.direct import check_model, problem_set
    from rl.policy import load_tokenizer

    model, chosen = check_model(tokenizer), problem_set(problems, split, count, task)
    summary = import_traces(
        out,
        read_foreign(source),
        teacher=teacher,
        origin={"source": source},
        problems=chosen.problems,
        task=chosen.task,
        tokenizer=load_tokenizer(model),
        suffix=prompt_suffix,
        strip=strip or (),
    )
    outcomes, left_out = summary["outcomes"], sum(summary["left out"].values())
    text = (
        f"{summary['imported']:,} of {summary['rows']:,} in {out}: {outcomes['right']:,} right, {outcomes['wrong']:,} "
        f"wrong, {outcomes['undecided']:,} undecided; {left_out:,} left out"
    )
    show({"pool": str(out)} | summary, text, as_json)
