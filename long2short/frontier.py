"""The accuracy-token frontier: all arms in one table, each against its parent, the non-dominated ones marked.

An arm is one model evaluated on the test problems. Kimi k1.5 (2501.12599, section 3.4 and its long2short figure)
compares methods as points of accuracy over mean tokens; there is no scalar. Here every point carries its interval, and
every difference is paired: same problems, both models.

`*` marks an arm that no other arm dominates: none is at least as accurate with at most as many tokens, and better in
one of the two. Marks compare point estimates; the intervals say how sure they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rl.evaluate import EvalSummary, PairedDifference, compare
from rl.stats import Estimate, TokenStats
from rl.types import RolloutGroup

MARK = "*"


@dataclass(frozen=True, slots=True)
class Arm:
    """One model's evaluation. Example: `Arm("merge-0.4", groups, summarize(groups, task), label="merge")`."""

    name: str
    groups: tuple[RolloutGroup, ...]
    summary: EvalSummary
    label: str = ""  # the family it belongs to: "merge", "dpo"; sets its colour


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """An arm's line in the table."""

    name: str
    label: str
    summary: EvalSummary
    difference: PairedDifference | None  # against the parent; None for the parent itself
    aes: float | None  # accuracy efficiency score against the parent; None for the parent and for a parent at 0
    non_dominated: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms named by the user, one minus the other on the same problems."""

    name: str
    other: str
    difference: PairedDifference


@dataclass(frozen=True, slots=True)
class Frontier:
    """All arms, in the order given, and the pairs to compare."""

    parent: str
    rows: tuple[FrontierRow, ...]
    comparisons: tuple[Comparison, ...] = ()

    def row(self, name: str) -> FrontierRow:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without the groups; `from_json` reads them back, so a finished run can print its table."""
        rows = [{**asdict(row), "summary": row.summary.to_json()} for row in self.rows]
        return {"parent": self.parent, "rows": rows, "comparisons": [asdict(one) for one in self.comparisons]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Frontier:
        rows = []
        for row in data["rows"]:
            difference = None if row["difference"] is None else PairedDifference.from_json(row["difference"])
            rows.append(
                FrontierRow(**{**row, "summary": EvalSummary.from_json(row["summary"]), "difference": difference})
            )
        comparisons = [
            Comparison(one["name"], one["other"], PairedDifference.from_json(one["difference"]))
            for one in data["comparisons"]
        ]
        return cls(data["parent"], tuple(rows), tuple(comparisons))


def frontier(arms: Sequence[Arm], parent: str, pairs: Sequence[tuple[str, str]] = ()) -> Frontier:
    """Compare every arm with the parent and mark the non-dominated ones; `pairs` are compared as well.

    Raises ValueError for a repeated name, an unknown parent or pair, or arms with other problems or another k.
    """
    by_name = {arm.name: arm for arm in arms}
    if len(by_name) < len(arms):
        names = [arm.name for arm in arms]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two arms are called {twice!r}; names tell them apart in the table")
    for name in [parent, *(name for pair in pairs for name in pair)]:
        if name not in by_name:
            raise ValueError(f"{name!r} is not an arm; the arms are {', '.join(by_name)}")
    marks = non_dominated([(arm.summary.accuracy.value, arm.summary.tokens.mean.value) for arm in arms])
    base = by_name[parent]
    for arm in arms:
        if arm.summary.samples != base.summary.samples:
            raise ValueError(
                f"{arm.name} has {arm.summary.samples} samples per problem and {parent} has {base.summary.samples}: "
                "maj@k and pass@k compare only at the same k"
            )
    rows = []
    for arm, mark in zip(arms, marks, strict=True):
        difference = None if arm is base else compare(arm.groups, base.groups)
        score = None
        if difference is not None and base.summary.accuracy.value > 0:
            score = accuracy_efficiency(
                tokens=arm.summary.tokens.mean.value,
                accuracy=arm.summary.accuracy.value,
                parent_tokens=base.summary.tokens.mean.value,
                parent_accuracy=base.summary.accuracy.value,
            )
        rows.append(FrontierRow(arm.name, arm.label, arm.summary, difference, score, mark))
    comparisons = [
        Comparison(name, other, compare(by_name[name].groups, by_name[other].groups)) for name, other in pairs
    ]
    return Frontier(parent, tuple(rows), tuple(comparisons))


def non_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (accuracy, tokens) points no other point beats: accuracy up, tokens down.

    A point is dominated if another is at least as good in both and better in one, so exact equals stand or fall
    together. Example: `[(.9, 60), (.9, 30), (.7, 20), (.6, 25)]` gives `[False, True, True, False]`.
    """
    return [
        not any(
            other_accuracy >= accuracy
            and other_tokens <= tokens
            and (other_accuracy, other_tokens) != (accuracy, tokens)
            for other_accuracy, other_tokens in points
        )
        for accuracy, tokens in points
    ]


def accuracy_efficiency(
    *,
    tokens: float,
    accuracy: float,
    parent_tokens: float,
    parent_accuracy: float,
    alpha: float = 1.0,
    beta: float = 3.0,
    gamma: float = 5.0,
) -> float:
    """AES (used with O1-Pruner, 2501.12570, and after): alpha dL + beta dA if dA >= 0, else alpha dL - gamma |dA|.

    dL is the share of the parent's tokens saved, dA the accuracy gained relative to the parent's. A loss of accuracy
    weighs five times what the same share of tokens does; it is not the criterion by which Kimi k1.5 ranks methods.
    Example: 10,000 -> 5,000 tokens at parent accuracy .5: accuracy .5, .55, .45 gives 0.5, 0.8, 0.
    """
    saved = (parent_tokens - tokens) / parent_tokens
    gained = (accuracy - parent_accuracy) / parent_accuracy
    return alpha * saved + (beta if gained >= 0 else gamma) * gained


# --- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table: its two-line head, and the text of a row's cell."""

    head: str
    unit: str
    cell: Callable[[FrontierRow], str]


def share(value: float | None) -> str:
    """0.9512 -> "0.951"; nothing to say -> "-"."""
    return "-" if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """Tokens: one decimal below 1,000, none above. 61.25 -> "61.2", 12345.6 -> "12,346"."""
    if value is None:
        return "-"
    return f"{value:.1f}" if abs(value) < 1_000 else f"{value:,.0f}"


def interval(estimate: Estimate | None, form: Callable[[float], str]) -> str:
    """`Estimate(.95, .93, .97)` -> "0.950 [0.930, 0.970]"."""
    if estimate is None:
        return "-"
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def signed(value: float, digits: int = 3) -> str:
    """+0.012, -0.012, and 0 without a sign of its own: `signed(-0.0001) == "+0.000"`."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def signed_percent(value: float) -> str:
    return f"{signed(100 * value, 1)}%"


def _mean(stats: TokenStats | None) -> str:
    return count(None if stats is None else stats.mean.value)


def table_columns(found: Frontier) -> tuple[Column, ...]:
    """The columns, the arm's name first."""
    k = found.rows[0].summary.samples

    def change(row: FrontierRow) -> str:
        return "parent" if row.difference is None else interval(row.difference.accuracy, signed)

    def change_tokens(row: FrontierRow) -> str:
        return "parent" if row.difference is None else interval(row.difference.tokens_relative, signed_percent)

    return (
        Column("arm", "", lambda row: f"{MARK if row.non_dominated else ' '} {row.name}"),
        Column("accuracy", "95% interval", lambda row: interval(row.summary.accuracy, share)),
        Column("tokens", "mean, 95% interval", lambda row: interval(row.summary.tokens.mean, count)),
        Column("Δ accuracy", "paired with parent", change),
        Column("Δ tokens", "paired with parent", change_tokens),
        Column(f"maj@{k}", "", lambda row: share(row.summary.maj_at_k)),
        Column(f"pass@{k}", "", lambda row: share(row.summary.pass_at_k)),
        Column("tokens", "median", lambda row: count(row.summary.tokens.median)),
        Column("tokens", "p95", lambda row: count(row.summary.tokens.p95)),
        Column("tokens", "if right", lambda row: _mean(row.summary.tokens_right)),
        Column("tokens", "if wrong", lambda row: _mean(row.summary.tokens_wrong)),
        Column("tokens per", "right answer", lambda row: count(row.summary.tokens_per_correct)),
        Column("trun-", "cated", lambda row: percent(row.summary.truncated)),
        Column("loops", "", lambda row: percent(row.summary.loops)),
        Column("AES", "", lambda row: "-" if row.aes is None else signed(row.aes, 2)),
    )


def table(found: Frontier, width: int = 120) -> str:
    """The table as plain text. Where it is wider than `width`, it goes on in further blocks below, arm by arm."""
    columns = table_columns(found)
    cells = [[column.head, column.unit, *(column.cell(row) for row in found.rows)] for column in columns]
    sizes = [max(map(len, column)) for column in cells]
    blocks: list[list[int]] = [[]]
    used = sizes[0]
    for index in range(1, len(columns)):
        if blocks[-1] and used + 2 + sizes[index] > width:
            blocks.append([])
            used = sizes[0]
        blocks[-1].append(index)
        used += 2 + sizes[index]
    lines = []
    for block in blocks:
        shown = [0, *block]
        for line in range(len(cells[0])):
            parts = [
                cells[index][line].ljust(sizes[index]) if index == 0 else cells[index][line].rjust(sizes[index])
                for index in shown
            ]
            lines.append("  ".join(parts).rstrip())
            if line == 1:
                lines.append("-" * (sum(sizes[index] for index in shown) + 2 * len(block)))
        lines.append("")
    lines += comparison_lines(found)
    return "\n".join([*lines, *notes(found)])


def comparison_lines(found: Frontier) -> list[str]:
    """One line per pair: `student-sft against student-rl: accuracy +0.120 [..], tokens +12.5% [..]`."""
    lines = [
        f"{one.name} against {one.other}: accuracy {interval(one.difference.accuracy, signed)}, "
        f"tokens {interval(one.difference.tokens_relative, signed_percent)}"
        for one in found.comparisons
    ]
    return [*lines, ""] if lines else []


def notes(found: Frontier, mark: str = MARK) -> list[str]:
    """What the reader must know to read the table, in which `mark` stands for non-dominated."""
    first = found.rows[0].summary
    lines = [
        f"{first.num_problems} problems × {first.samples} samples; 95% intervals by bootstrap over problems, "
        f"differences paired with {found.parent} on the same problems.",
        f"{mark} no other arm is at least as accurate with at most as many tokens, and better in one of the two.",
    ]
    undecided = [f"{row.name} {row.summary.undecided}" for row in found.rows if row.summary.undecided]
    if undecided:
        lines.append(
            f"The judge failed on some completions, which count as neither right nor wrong: {', '.join(undecided)}."
        )
    return lines
