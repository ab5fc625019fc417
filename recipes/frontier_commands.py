"""`reason frontier --arm NAME=POOL ...`: the frontier of pools that were filled without a recipe.

    reason frontier --arm long=pool-a --arm short=pool-b --parent long --problems ./problems.jsonl --tokenizer ./model \
        --out frontier

The table, and with --out all that a recipe's frontier stage writes: Markdown, CSV, JSON, pictures and the page. The
pools' addresses say how each was drawn; arms that were drawn otherwise than their parent are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.compare_commands import drawn_otherwise

if TYPE_CHECKING:
    from long2short.frontier import Arm, Frontier
    from recipes.direct import ProblemSet
    from rl.pool import PoolAddress

ArmsOption = Annotated[
    list[str] | None, typer.Option("--arm", metavar="NAME=POOL", help="Instead of a recipe: a pool. Repeat it.")
]
ParentOption = Annotated[str | None, typer.Option("--parent", help="With --arm: the arm to compare with.")]
ProblemsOption = Annotated[
    str | None, typer.Option("--problems", help="With --arm: the problems of the pools  [default: tiny]")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", metavar="MODEL", help="With --arm: whose tokens they are; adds thought, answer and ξ."),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="With --arm: write the page, pictures, CSV and JSON there.")
]


def refuse_options(with_recipe: bool, given: Mapping[str, Any]) -> None:
    """An option that says nothing here is a mistake: BadParameter that names it. `given`: option -> value or None."""
    for option, value in given.items():
        if value:
            there, here = ("--arm", "a RECIPE") if with_recipe else ("a RECIPE", "--arm")
            raise typer.BadParameter(f"{option} goes with {there}, not with {here}; remove it")


def pools_of(arms: Sequence[str], parent: str | None) -> dict[str, Path]:
    """The pools that `--arm` names, by arm; BadParameter for a malformed one and for a parent that is none of them."""
    from recipes.direct import pool_folder

    pools: dict[str, Path] = {}
    for text in arms:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder) or name in pools:
            raise typer.BadParameter(f"--arm {text}: write each as NAME=POOL, with different names")
        pools[name] = pool_folder(folder)
    if parent not in pools:
        raise typer.BadParameter(f"--parent must be one of the arms ({', '.join(pools)})")
    return pools


def frontier_of_pools(
    arms: Sequence[str],
    parent: str | None,
    problems: str | None,
    task: str | None,
    split: str | None,
    count: int | None,
    tokenizer: str | None,
    out: Path | None,
) -> tuple[dict[str, Any], list[str]]:
    """The frontier as JSON values, and lines about it; with `out` the files as well.

    Errors: ValueError for pools that cannot be compared (`long2short.frontier`), and for an `out` that holds something.
    """
    from recipes.direct import check_model, problem_set

    pools = pools_of(arms, parent)
    model = None if tokenizer is None else check_model(tokenizer)
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} holds something already; name a new folder")
    assert parent is not None
    return _compare(pools, parent, problem_set(problems or "tiny", split, count, task), model, out)


def _compare(
    pools: Mapping[str, Path], parent: str, chosen: ProblemSet, model: str | None, out: Path | None
) -> tuple[dict[str, Any], list[str]]:
    from long2short.frontier import Arm, frontier
    from long2short.frontier_efficiency import efficiency_of
    from recipes.direct import read_pool
    from rl.evaluate import summarize
    from rl.policy import load_tokenizer
    from rl.pool import Pool

    tokenizer = None if model is None else load_tokenizer(model)
    addresses = {name: Pool.open(folder).address for name, folder in pools.items()}
    loaded = []
    for name, folder in pools.items():
        groups = read_pool(folder, chosen)
        spent = None if tokenizer is None else efficiency_of(groups, chosen.task, tokenizer)
        loaded.append(Arm(name, groups, summarize(groups, chosen.task, tokenizer), efficiency=spent))
    found = frontier(loaded, parent)
    differs = _other_settings(addresses, parent)
    page = None if out is None else out / "report.html"
    if out is not None:
        _write(out, found, loaded, addresses, differs)
    value = found.to_json() | {"differs": differs, "page": None if page is None else str(page)}
    return value, [*differs, *([] if page is None else [f"page: {page}"])]


def _write(
    out: Path, found: Frontier, arms: Sequence[Arm], addresses: Mapping[str, PoolAddress], lines: Sequence[str]
) -> None:
    """All that a recipe's frontier stage writes."""
    from long2short.report import write_report

    out.mkdir(parents=True, exist_ok=True)
    first = found.rows[0].summary
    write_report(
        out,
        found,
        arms,
        title="Accuracy and tokens",
        facts=[
            ("problems", str(first.num_problems)),
            ("samples", f"{first.samples} a problem"),
            *(("differs", line) for line in lines),
        ],
        provenance={
            name: [(key, str(value)) for key, value in asdict(address).items()] for name, address in addresses.items()
        },
    )


def _other_settings(addresses: Mapping[str, PoolAddress], parent: str) -> list[str]:
    """A line for each setting in which an arm was drawn otherwise than its parent.

    Example: "brief was drawn with another max_tokens than teacher: 128 and 160".
    """
    return [
        f"{name} was drawn with another {key} than {parent}: {value} and {base}"
        for name, address in addresses.items()
        for key, (value, base) in drawn_otherwise(address, addresses[parent]).items()
    ]
