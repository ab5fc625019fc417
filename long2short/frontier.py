"""The accuracy-token frontier: all arms in one table, each against its parent, the non-dominated ones marked.

An arm is one model evaluated on the test problems. Kimi k1.5 (2501.12599, section 3.4 and its long2short figure)
compares methods as points of accuracy over mean tokens; there is no scalar. Here every point carries its interval, and
every difference is paired: same problems, both models, with a sign test beside it.

`*` marks an arm that no other arm dominates: none is at least as accurate with at most as many tokens, and better in
one of the two, by the point estimates. `~` marks one that is dominated by those, but by no arm beyond noise: of the
paired differences in accuracy and tokens, no other arm has both intervals on its better side. An arm is collapsed where
its whole interval of accuracy lies below half of its parent's: two tokens and no right answer are non-dominated too, so
such an arm is named, and left out of the line that joins the others and of the headline.

The budget curve of an arm is accuracy under a token limit, from its one pool: a completion longer than the limit is
wrong (`rl.budget_curve.truncated_accuracy`). All arms share the limits: the longest completion of all, halved again
and again (`budget_grid`). `long2short.frontier_scores` has the numbers that take two arms,
`long2short.frontier_efficiency` those read from thoughts, `long2short.frontier_text` the table as Markdown and CSV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from long2short.frontier_efficiency import Efficiency
from long2short.frontier_scores import (
    AtLimit,
    accuracy_efficiency,
    at_limit,
    dominates_beyond_noise,
    dominators,
    non_dominated,
    overthinking_scores,
    parent_limits,
)
from rl.budget_curve import BudgetCurve, truncated_accuracy
from rl.evaluate import EvalSummary, PairedDifference, compare, require_keys
from rl.stats import FEW_PROBLEMS, Estimate, SignTest, TokenStats
from rl.types import RolloutGroup

__all__ = [
    "Arm", "FrontierRow", "Comparison", "Frontier", "frontier", "budget_grid", "accuracy_efficiency", "non_dominated",
    "Column", "table", "table_columns", "limit_columns", "comparison_lines", "notes",
    "few_problems", "share", "count", "interval", "percent", "signed",
    "signed_percent",
]  # fmt: skip

MARK = "*"
UNSURE = "~"
COLLAPSED = 0.5  # of the parent's accuracy


@dataclass(frozen=True, slots=True)
class Arm:
    """One model's evaluation. Example: `Arm("merge-0.4", groups, summarize(groups, task), label="merge")`."""

    name: str
    groups: tuple[RolloutGroup, ...]
    summary: EvalSummary
    label: str = ""  # the family it belongs to: "merge", "dpo"; sets its colour
    efficiency: Efficiency | None = None  # takes the arm's tokenizer, see `efficiency_of`


@dataclass(frozen=True, slots=True)
class FrontierRow:
    """An arm's line in the table."""

    name: str
    label: str
    summary: EvalSummary
    difference: PairedDifference | None  # against the parent; None for the parent itself
    aes: float | None  # accuracy efficiency score against the parent; None for the parent and for a parent at 0
    non_dominated: bool
    dominated_by: tuple[str, ...]  # the arms that dominate it: those that do beyond noise, then the most accurate first
    beyond_noise: bool  # whether the first of these dominates it beyond noise
    collapsed: bool  # less than half as right as the parent
    at_limits: tuple[AtLimit, ...]  # at limits that all arms share, by limit
    efficiency: Efficiency | None  # None where the tokenizer was not at hand
    overthinking: float | None  # LLMThinkBench's score among these arms; None if all spend the same
    curve: BudgetCurve  # accuracy under a token limit

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json(to_json())` is the same row."""
        return {
            **asdict(self),
            "summary": self.summary.to_json(),
            "difference": None if self.difference is None else self.difference.to_json(),
            "dominated_by": list(self.dominated_by),
            "at_limits": [asdict(point) for point in self.at_limits],
            "curve": self.curve.to_json(),
        }

    @property
    def mark(self) -> str:
        """What stands before its name in the table: `*`, `~` or a space."""
        return MARK if self.non_dominated else " " if self.beyond_noise else UNSURE

    @property
    def joined(self) -> bool:
        """Whether it is on the line of the non-dominated."""
        return self.non_dominated and not self.collapsed

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FrontierRow:
        """ValueError for a row that another version of `reason` wrote."""
        require_keys(cls, data, "a frontier")
        kinds = {"difference": PairedDifference, "efficiency": Efficiency}
        converted = {
            "summary": EvalSummary.from_json(data["summary"]),
            "curve": BudgetCurve.from_json(data["curve"]),
            "dominated_by": tuple(data["dominated_by"]),
            "at_limits": tuple(map(AtLimit.from_json, data["at_limits"])),
            **{name: None if data[name] is None else kind.from_json(data[name]) for name, kind in kinds.items()},
        }
        return cls(**{**data, **converted})


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
        pairs = [{"name": p.name, "other": p.other, "difference": p.difference.to_json()} for p in self.comparisons]
        return {"parent": self.parent, "rows": [row.to_json() for row in self.rows], "comparisons": pairs}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Frontier:
        """ValueError for a frontier that another version of `reason` wrote; it says what to do."""
        comparisons = [
            Comparison(one["name"], one["other"], PairedDifference.from_json(one["difference"]))
            for one in data["comparisons"]
        ]
        return cls(data["parent"], tuple(map(FrontierRow.from_json, data["rows"])), tuple(comparisons))


def frontier(
    arms: Sequence[Arm], parent: str, pairs: Sequence[tuple[str, str]] = (), budgets: Sequence[int] = ()
) -> Frontier:
    """Compare every arm with the parent and mark the non-dominated ones; `pairs` are compared as well.

    `budgets` are the token limits of the curves, by default the `budget_grid` of the longest completion.

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
    points = [(arm.summary.accuracy.value, arm.summary.tokens.mean.value) for arm in arms]
    base = by_name[parent]
    for arm in arms:
        if arm.summary.samples != base.summary.samples:
            raise ValueError(
                f"{arm.name} has {arm.summary.samples} samples per problem and {parent} has {base.summary.samples}: "
                "maj@k and pass@k compare only at the same k"
            )
    limits = budgets or budget_grid(max(length for arm in arms for group in arm.groups for length in group.num_tokens))
    shared = parent_limits(base.summary.tokens.mean.value)
    floor = COLLAPSED * base.summary.accuracy.value
    rows = []
    for arm, beaten_by, overthinking in zip(arms, dominators(points), overthinking_scores(points), strict=True):
        difference = None if arm is base else _compared(arm, base)
        score = None
        if difference is not None and base.summary.accuracy.value > 0:
            score = accuracy_efficiency(
                tokens=arm.summary.tokens.mean.value,
                accuracy=arm.summary.accuracy.value,
                parent_tokens=base.summary.tokens.mean.value,
                parent_accuracy=base.summary.accuracy.value,
            )
        surely = {place for place in beaten_by if dominates_beyond_noise(arm.groups, arms[place].groups)}
        ordered = sorted(beaten_by, key=lambda place: (place not in surely, -points[place][0]))
        rows.append(
            FrontierRow(
                name=arm.name,
                label=arm.label,
                summary=arm.summary,
                difference=difference,
                aes=score,
                non_dominated=not beaten_by,
                dominated_by=tuple(arms[place].name for place in ordered),
                beyond_noise=bool(surely),
                collapsed=arm.summary.accuracy.high < floor,
                at_limits=tuple(at_limit(arm.groups, None if arm is base else base.groups, one) for one in shared),
                efficiency=arm.efficiency,
                overthinking=overthinking,
                curve=truncated_accuracy(arm.groups, limits),
            )
        )
    comparisons = [Comparison(name, other, _compared(by_name[name], by_name[other])) for name, other in pairs]
    return Frontier(parent, tuple(rows), tuple(comparisons))


def _compared(arm: Arm, other: Arm) -> PairedDifference:
    """An arm minus another; what cannot be compared is refused by the names of both."""
    try:
        return compare(arm.groups, other.groups)
    except ValueError as error:
        raise ValueError(f"{arm.name} against {other.name}: {error}") from error


def budget_grid(longest: int, halvings: int = 6) -> list[int]:
    """Token limits for a curve: the longest completion, halved again and again, rounded up, with half steps between.

    Two points a halving: `budget_grid(160, 2) == [40, 57, 80, 114, 160]`, `budget_grid(2) == [1, 2]`.
    """
    return sorted({max(1, ceil(longest / 2 ** (step / 2))) for step in range(2 * halvings + 1)})


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


def signs(test: SignTest) -> str:
    """`SignTest(5, 1, 1, .21875)` -> "+5 -1, p 0.22"; a p below .001 is "p<0.001"."""
    p = "p<0.001" if test.p < 0.001 else f"p {test.p:.2g}" if test.p < 0.1 else f"p {test.p:.2f}"
    return f"+{test.up} -{test.down}, {p}"


def _mean(stats: TokenStats | None) -> str:
    return count(None if stats is None else stats.mean.value)


def _split(row: FrontierRow) -> str:
    """Mean tokens of thought and of answer, such as "52.1 + 4.0"."""
    thought, answer = row.summary.think_tokens, row.summary.answer_tokens
    return "-" if thought is None else f"{_mean(thought)} + {_mean(answer)}"


def limit_columns(found: Frontier) -> tuple[Column, ...]:
    """What each arm gives up, or gains, at equal budget: accuracy and its difference under each shared limit."""

    def column(limit: int) -> Column:
        def cell(row: FrontierRow) -> str:
            def text(point: AtLimit) -> str:
                own = share(point.accuracy.value)
                return own if point.difference is None else f"{own}, {interval(point.difference, signed)}"

            return _at(row, limit, text)

        return Column(f"at most {limit} tokens", "accuracy, Δ", cell)

    name = Column("arm", "", lambda row: f"{row.mark} {row.name}")
    return (name, *(column(point.limit) for point in found.rows[0].at_limits))


def _at(row: FrontierRow, limit: int, text: Callable[[AtLimit], str]) -> str:
    return next((text(point) for point in row.at_limits if point.limit == limit), "-")


def _dominated_by(row: FrontierRow) -> str:
    """`alp`, `alp and 3 more`, `~ alp`: the first of those that dominate an arm, and whether that is within noise."""
    if not row.dominated_by:
        return "collapsed" if row.collapsed else "-"
    first, more = row.dominated_by[0], len(row.dominated_by) - 1
    return f"{'' if row.beyond_noise else f'{UNSURE} '}{first}" + (f" and {more} more" if more else "")


def table_columns(found: Frontier) -> tuple[Column, ...]:
    """The columns, the arm's name first."""
    k = found.rows[0].summary.samples

    def difference(row: FrontierRow, cell: Callable[[PairedDifference], str]) -> str:
        return "parent" if row.difference is None else cell(row.difference)

    limit = max(1, ceil(found.row(found.parent).summary.tokens.mean.value))

    def held(row: FrontierRow) -> str:
        return "parent" if row.difference is None else _at(row, limit, lambda point: interval(point.difference, signed))

    def efficiency(row: FrontierRow, cell: Callable[[Efficiency], Estimate | None]) -> str:
        estimate = None if row.efficiency is None else cell(row.efficiency)
        return "-" if estimate is None else share(estimate.value)

    return (
        Column("arm", "", lambda row: f"{row.mark} {row.name}"),
        Column("accuracy", "95% interval", lambda row: interval(row.summary.accuracy, share)),
        Column("tokens", "mean, 95% interval", lambda row: interval(row.summary.tokens.mean, count)),
        Column("Δ accuracy", "paired with parent", lambda row: difference(row, lambda d: interval(d.accuracy, signed))),
        Column(
            "Δ tokens",
            "paired with parent",
            lambda row: difference(row, lambda d: interval(d.tokens_relative, signed_percent)),
        ),
        Column("sign test", "problems up, down", lambda row: difference(row, lambda d: signs(d.accuracy_signs))),
        Column("Δ accuracy", f"with at most {limit} tokens", held),
        Column("dominated by", f"{UNSURE} within noise", _dominated_by),
        Column(f"maj@{k}", "", lambda row: share(row.summary.maj_at_k)),
        Column(f"pass@{k}", "", lambda row: share(row.summary.pass_at_k)),
        Column(f"G-Pass@{k}", "τ = 1", lambda row: share(row.summary.g_pass_at_k)),
        Column("tokens", "median", lambda row: count(row.summary.tokens.median)),
        Column("tokens", "p95", lambda row: count(row.summary.tokens.p95)),
        Column("tokens", "if right", lambda row: _mean(row.summary.tokens_right)),
        Column("tokens", "if wrong", lambda row: _mean(row.summary.tokens_wrong)),
        Column("tokens", "think + answer", _split),
        Column("tokens per", "right answer", lambda row: count(row.summary.tokens_per_correct)),
        Column("trun-", "cated", lambda row: percent(row.summary.truncated)),
        Column("loops", "", lambda row: percent(row.summary.loops)),
        Column("budget curve", "area", lambda row: share(row.curve.area.value)),
        Column("AES", "", lambda row: "-" if row.aes is None else signed(row.aes, 2)),
        Column("ξ_O", "outcome efficiency", lambda row: efficiency(row, lambda found: found.outcome)),
        Column("ξ_UT", "underthinking", lambda row: efficiency(row, lambda found: found.underthinking)),
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
        f"tokens {interval(one.difference.tokens_relative, signed_percent)}, "
        f"sign test {signs(one.difference.accuracy_signs)}"
        for one in found.comparisons
    ]
    return [*lines, ""] if lines else []


def notes(found: Frontier) -> list[str]:
    """What the reader must know to read the table."""
    first = found.rows[0].summary
    lines = [
        f"{first.num_problems} problems × {first.samples} samples; 95% intervals by bootstrap over problems, "
        f"differences paired with {found.parent} on the same problems.",
        f"{MARK} no other arm is at least as accurate with at most as many tokens, and better in one of the two, by "
        "the point estimates.",
    ]
    if len(found.rows) > 1:
        lines += [
            f"{UNSURE} dominated, but by no arm beyond noise, that is with both paired intervals on one side.",
            "Sign test: problems on which an arm is better and worse than its parent; exact, two-sided. Each interval "
            "is a 95% one by itself: of twenty arms that are like their parent one is expected outside.",
            "With at most so many tokens (the parent's mean): a longer completion is wrong, for the arm and for its "
            "parent; nobody is asked for an answer there (reason budget does that).",
            "Budget curve, area: accuracy over log2 of such a limit, averaged over the limits that these arms share. "
            "AES: share of tokens saved, plus 3 times the share of accuracy gained or minus 5 times that lost.",
            "ξ_O: tokens up to the first right solution over all tokens, 0 for a wrong answer; solutions are found by "
            "their text.",
        ]
    if collapsed := [row.name for row in found.rows if row.collapsed]:
        lines.append(
            f"Collapsed: {', '.join(collapsed)} {'is' if len(collapsed) == 1 else 'are'} less than half as right as "
            f"{found.parent}."
        )
    fewest = min(row.difference.num_problems if row.difference else row.summary.num_problems for row in found.rows)
    if fewest < FEW_PROBLEMS:
        lines.append(few_problems(fewest))
    undecided = [f"{row.name} {row.summary.undecided}" for row in found.rows if row.summary.undecided]
    if undecided:
        lines.append(
            f"The judge failed on some completions, which count as neither right nor wrong: {', '.join(undecided)}."
        )
    return lines


def few_problems(problems: int) -> str:
    """What intervals are worth with fewer than 100 problems, from benchmarks/coverage.py."""
    return (
        f"Only {problems} problems: with fewer than {FEW_PROBLEMS} the intervals are rough. With 30 they hold an "
        "accuracy of .1 to .9 in 93 to 95% of simulated sets, but one of .03 or .97 in only 81 to 86% "
        "(benchmarks/coverage.py)."
    )
