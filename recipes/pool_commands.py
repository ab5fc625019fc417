"""`reason pool show / check / export / join`: what is in a pool, whether it is whole, and how to take it elsewhere.

Exit code 3 of `check` says that something is wrong with the pool; 4 that it was in use or a disk failed.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recipes.options import CountOption, JsonOption, PoolArgument, SplitOption, TaskOption

if TYPE_CHECKING:
    from rl.pool_export import PoolSummary

EXIT_DEFECT = 3
MOST_FINDINGS = 20  # shown to people; --json gives all

pool_app = typer.Typer(help="Look at a pool of samples, check it, export it, join parts of one.", no_args_is_help=True)


class FormatName(StrEnum):
    """The keys of `rl.pool_export.FORMATS`."""

    MESSAGES = "messages"
    ROWS = "rows"
    PARQUET = "parquet"


@pool_app.command("show")
def show_pool(pool: PoolArgument, as_json: JsonOption = False) -> None:
    """What a pool holds: problems x samples, tokens, how completions ended, what the verifiers say."""
    from recipes.console import show
    from recipes.direct import pool_folder
    from rl.pool import Pool
    from rl.pool_export import summarize_pool

    folder = pool_folder(pool)
    found = summarize_pool(Pool.open(folder, racing=None))
    show({"pool": str(folder)} | found.to_json(), summary_text(folder, found), as_json)


def summary_text(folder: Path, found: PoolSummary) -> str:
    """A pool's summary as lines for people."""
    each = f"{found.most}" if found.fewest == found.most else f"{found.fewest} to {found.most}"
    mean = found.tokens / found.num_samples if found.num_samples else 0.0
    rows = [
        ("pool", str(folder)),
        ("problems x samples", f"{found.num_problems} x {each}, {found.num_samples:,} in {found.num_shards} shards"),
        ("tokens", f"{found.tokens:,}, {mean:.1f} on average"),
        ("ended by", ", ".join(f"{reason} {count:,}" for reason, count in found.finish_reasons.items()) or "-"),
        ("bytes", f"{found.size:,}"),
    ]
    for version, counts in found.verifiers.items():
        judged = max(sum(counts.values()), 1)
        rows.append((f"verifier {version}", f"{counts['right'] / judged:.1%} right, {counts['undecided']} undecided"))
    if not found.verifiers:
        rows.append(("verifiers", "none has judged all of it"))
    rows += [(f"address: {name}", str(value)) for name, value in found.address.items()]
    rows.append(("content", found.canonical_hash))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


@pool_app.command("check")
def check(pool: PoolArgument, as_json: JsonOption = False) -> None:
    """Hash and read all of a pool: missing, changed, torn, duplicate and foreign content. Exit code 3 on findings."""
    from recipes.console import show
    from recipes.direct import pool_folder
    from rl.pool_check import check_pool

    folder = pool_folder(pool)
    findings = check_pool(folder)
    value = {
        "pool": str(folder),
        "findings": [
            {
                "damage": one.damage,
                "file": one.file,
                "problem": None if one.key is None else one.key[0],
                "sample": None if one.key is None else one.key[1],
                "detail": one.detail,
            }
            for one in findings
        ],
    }
    lines = [str(one) for one in findings[:MOST_FINDINGS]]
    if len(findings) > MOST_FINDINGS:
        lines.append(f"and {len(findings) - MOST_FINDINGS} more; --json lists all")
    lines.append(f"{folder}: {len(findings)} findings" if findings else f"{folder}: nothing wrong")
    show(value, "\n".join(lines), as_json)
    if findings:
        raise typer.Exit(EXIT_DEFECT)


@pool_app.command("export")
def export(
    pool: PoolArgument,
    problems: Annotated[
        str, typer.Argument(metavar="PROBLEMS", help="The problems of the pool: `tiny`, a file, or a hub id.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="The file to write; never overwritten.")],
    form: Annotated[
        FormatName, typer.Option("--format", help="messages and rows are JSON lines, parquet holds the rows.")
    ] = FormatName.MESSAGES,
    verifier: Annotated[
        str | None, typer.Option("--verifier", metavar="VERSION", help="Whose verdicts  [the one that judged last]")
    ] = None,
    right_only: Annotated[bool, typer.Option("--right-only", help="Leave out what is wrong or undecided.")] = False,
    prompt_suffix: Annotated[
        str, typer.Option("--prompt-suffix", help="What was appended to every question when it was sampled.")
    ] = "",
    split: SplitOption = None,
    count: CountOption = None,
    task: TaskOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a pool's samples to a file that `datasets.load_dataset` reads, in an order that only content decides."""
    from recipes.console import show
    from recipes.direct import pool_folder, problem_set
    from rl.pool import Pool
    from rl.pool_export import FORMATS, export_pool

    folder, chosen = pool_folder(pool), problem_set(problems, split, count, task)
    opened = Pool.open(folder)
    rows = export_pool(opened, chosen.problems, to, FORMATS[form], verifier, right_only, prompt_suffix)
    value = {"pool": str(folder), "file": str(to), "format": form, "rows": rows, "samples": len(opened)}
    show(value, f"{rows:,} of {len(opened):,} samples in {to}", as_json)


@pool_app.command("join")
def join(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The pool to add to; made where there is none.")],
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Pools of the same address.")],
    as_json: JsonOption = False,
) -> None:
    """Make one pool of parts that were filled apart; what is in two of them is kept once."""
    from recipes.console import show
    from recipes.direct import pool_folder
    from rl.pool_parts import join_pools

    joined = join_pools(out, [pool_folder(part) for part in parts])
    value = {
        "pool": str(out),
        "parts": len(parts),
        "samples": len(joined),
        "verifiers": joined.verifiers(),
        "canonical_hash": joined.canonical_hash(),
    }
    judged = ", ".join(joined.verifiers()) or "nobody"
    show(value, f"{len(joined):,} samples of {len(parts)} parts in {out}, judged by {judged}", as_json)
