"""`reason compare`: two pools on the same problems, paired; and the text forms of `reason frontier`.

    reason compare runs/tiny/frontier.brief-0a1b2c3d runs/tiny/frontier.teacher-4e5f6a7b

The pools' addresses say whether they hold samples of the same problems, and their verdicts say what is right, so no
problem file is needed. Everything is A minus B: `rl.evaluate.compare`, as in the frontier and `evaluate --parent`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.options import JsonOption

if TYPE_CHECKING:
    from rl.pool import Pool, PoolAddress
    from rl.stats import SignTest
    from rl.types import RolloutGroup

PoolA = Annotated[Path, typer.Argument(metavar="POOL_A", help="A pool's folder, or the stage's.", show_default=False)]
FormOption = Annotated[bool | None, typer.Option("--markdown/--csv", help="The table as Markdown or as CSV.")]
PoolB = Annotated[Path, typer.Argument(metavar="POOL_B", help="What A is compared with.", show_default=False)]


def compare_command(
    pool_a: PoolA,
    pool_b: PoolB,
    task: Annotated[
        str | None, typer.Option("--task", help="Whose verdicts count: those of this task  [judged last in both]")
    ] = None,
    verifier: Annotated[
        str | None, typer.Option("--verifier", metavar="VERSION", help="Or those of this version of a verifier.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Two pools on the same problems: accuracy and tokens, A minus B, paired, with intervals and sign tests."""
    from recipes.console import show
    from recipes.direct import pool_folder

    if task is not None and verifier is not None:
        raise typer.BadParameter("give either --task or --verifier: both say whose verdicts count")
    folders = (pool_folder(pool_a), pool_folder(pool_b))
    found = read_both(*folders, version_of(task) if task is not None else verifier)
    value = compared(found)
    told = {"a": str(folders[0]), "b": str(folders[1])}
    show(told | value, comparison_text(found, value), as_json)


def version_of(task: str) -> str:
    """The verifier version of a task: `version_of("exact") == "exact-1"`; ValueError for one that there is not."""
    from recipes.tasks import open_task, section_for

    return open_task(section_for("problems.jsonl", task)).verifier_version


@dataclass(frozen=True, slots=True)
class Both:
    """Two pools, read: the judged groups of the same problems, as many samples of each."""

    groups: tuple[Sequence[RolloutGroup], Sequence[RolloutGroup]]
    verifier: str
    samples: int  # k, the first of each problem
    held: tuple[int, int]  # how many each pool has of every problem
    differs: Mapping[str, tuple[Any, Any]]  # what their addresses differ in, but for model and seed


def read_both(a: Path, b: Path, verifier: str | None = None) -> Both:
    """Read two pools for a paired comparison. `verifier` None takes the version that both have, the last in A.

    Of pools with another number of samples the first of both count: another k would favour one of them in "solved at
    least once". Errors: ValueError for pools of different problems, for one that lacks problems of the other, for a
    racing pool, and where no one verifier has judged both.
    """
    from rl.pool import Pool
    from rl.types import Problem

    pools = [Pool.open(folder) for folder in (a, b)]
    addresses = [asdict(pool.address) for pool in pools]
    if addresses[0]["problems"] != addresses[1]["problems"]:
        raise ValueError(
            f"{a} and {b} hold samples of different problem sets (fingerprints {addresses[0]['problems']} and "
            f"{addresses[1]['problems']}): a paired comparison needs the same problems; sample both on the same file, "
            "split and count"
        )
    counts = [Counter(problem for problem, _ in pool.keys_in_order()) for pool in pools]
    for folder, own, other in ((a, counts[0], counts[1]), (b, counts[1], counts[0])):
        if lacking := sorted(other.keys() - own.keys()):
            raise ValueError(
                f"{folder} lacks {len(lacking)} problems that the other pool has, such as {lacking[0]}: fill it first"
            )
    if not counts[0]:
        raise ValueError(f"{a} and {b} hold no samples: fill them first")
    held = (min(counts[0].values()), min(counts[1].values()))
    version = common_verifier(pools, verifier)
    problems = [Problem(name, (), "") for name in sorted(counts[0])]
    groups = (
        pools[0].groups(problems, version, min(held)),
        pools[1].groups(problems, version, min(held)),
    )
    return Both(groups, version, min(held), held, drawn_otherwise(*(pool.address for pool in pools)))


def drawn_otherwise(one: PoolAddress, other: PoolAddress) -> dict[str, tuple[Any, Any]]:
    """What two pools' addresses differ in, by field: `{"temperature": (0.5, 1.0)}`. The model is what is compared, and
    the seed changes nothing that is."""
    ours, theirs = asdict(one), asdict(other)
    return {
        name: (value, theirs[name])
        for name, value in ours.items()
        if name not in ("model", "seed") and value != theirs[name]
    }


def common_verifier(pools: Sequence[Pool], wanted: str | None) -> str:
    """The verifier version that has judged both pools; ValueError, naming what there is, without one."""
    known = [pool.verifiers() for pool in pools]
    common = [version for version in known[0] if version in known[1]]
    if wanted is None and common:
        return common[-1]
    if wanted in common:
        return str(wanted)
    has = "; ".join(f"{p.folder} by {', '.join(v) or 'nobody'}" for p, v in zip(pools, known, strict=True))
    what = "no verifier has judged" if wanted is None else f"verifier {wanted} has not judged"
    raise ValueError(f"{what} both pools: {has}; judge again with `reason rescore POOL PROBLEMS --task TASK`")


def compared(found: Both) -> dict[str, Any]:
    """Both sides and the paired difference as JSON values."""
    from rl.evaluate import compare

    difference = compare(*found.groups).to_json()  # first: it says what cannot be compared
    return {
        "verifier": found.verifier,
        "samples": found.samples,
        "held": list(found.held),
        "differs": {name: list(pair) for name, pair in found.differs.items()},
        "sides": [_side(groups) for groups in found.groups],
        "difference": difference,
    }


def _side(groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    from rl import stats
    from rl.evaluate import decided_rollouts
    from rl.types import FinishReason

    right = [[rollout.right for rollout in kept] for group in groups if (kept := decided_rollouts(group))]
    tokens = stats.lengths([group.num_tokens for group in groups])
    assert tokens is not None  # read_both has seen to it that there are samples
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    truncated = sum(rollout.completion.finish_reason is FinishReason.LENGTH for rollout in rollouts)
    return {
        "num_problems": len(groups),
        "undecided": len(rollouts) - sum(map(len, right)),
        "accuracy": asdict(stats.bootstrap_mean(stats.shares(right), bounds=stats.SHARE)),
        "tokens": asdict(tokens),
        "truncated": truncated / len(rollouts),
    }


def comparison_text(found: Both, value: Mapping[str, Any]) -> str:
    """The comparison as lines for people; `value` is `compared(found)`."""
    from long2short.frontier import count, few_problems, interval, percent, share, signed, signed_percent
    from recipes.console import columns
    from rl.evaluate import PairedDifference
    from rl.stats import FEW_PROBLEMS, Estimate

    difference = PairedDifference.from_json(value["difference"])
    sides = value["sides"]
    rows = [
        [
            f"accuracy (avg@{found.samples})",
            *(interval(Estimate.from_json(side["accuracy"]), share) for side in sides),
            interval(difference.accuracy, signed),
        ],
        [
            "tokens, mean",
            *(interval(Estimate.from_json(side["tokens"]["mean"]), count) for side in sides),
            interval(difference.tokens, lambda tokens: signed(tokens, 1)),
        ],
        ["", "", "", interval(difference.tokens_relative, signed_percent)],
        ["truncated", *(percent(side["truncated"]) for side in sides), interval(difference.truncated, signed_percent)],
        ["tokens, both right", "", "", interval(difference.tokens_both_right, signed_percent)],
    ]
    lines = [
        columns(["", "A", "B", "A - B, paired"], rows),
        "",
        f"accuracy: A better on {_signs(difference.accuracy_signs, 'worse')}",
        f"tokens:   A longer on {_signs(difference.tokens_signs, 'shorter')}",
        f"solved at least once: only by A {difference.only_any[0]}, only by B {difference.only_any[1]}",
        f"solved by the majority of its samples: only by A {difference.only_majority[0]}, "
        f"only by B {difference.only_majority[1]}",
        f"{difference.num_problems} problems x {found.samples} samples, judged by {found.verifier}; 95% intervals by "
        "bootstrap over problems.",
        f"Both right: the right completions of {difference.both_right} problems that both solved at least once.",
    ]
    if found.held[0] != found.held[1]:
        lines.append(f"A has {found.held[0]} samples a problem and B {found.held[1]}: the first {found.samples} count.")
    lines += [
        f"They were drawn with another {name}: {one} and {other}." for name, (one, other) in found.differs.items()
    ]
    undecided = [f"{name} {side['undecided']}" for name, side in zip("AB", sides, strict=True) if side["undecided"]]
    if undecided:
        lines.append(f"The judge failed on some completions, neither right nor wrong: {', '.join(undecided)}.")
    if difference.num_problems < FEW_PROBLEMS:
        lines.append(few_problems(difference.num_problems))
    return "\n".join(lines)


def _signs(test: SignTest, worse: str) -> str:
    p = "p < 0.001" if test.p < 0.001 else f"p = {test.p:.3f}"
    return f"{test.up} problems, {worse} on {test.down}, alike on {test.equal}; sign test {p}"


def frontier_forms(values: Iterable[Mapping[str, Any]], markdown: bool) -> str:
    """The tables of `frontier.json` values as Markdown, or else as CSV."""
    from long2short.frontier import Frontier
    from long2short.frontier_text import table_csv, table_markdown

    form = table_markdown if markdown else table_csv
    return "\n".join(form(Frontier.from_json(dict(value))) for value in values)
