"""Kimi k1.5's four ways to shorten, on several seeds of `tiny-long2short`, as Markdown, next to Kimi's own figure.

    for seed in 0 1 2; do reason run tiny-long2short --seed $seed; done
    PYTHONPATH=. python benchmarks/four_ways.py 0 1 2

A difference is paired with the teacher of the same seed; `*` stands where its 95 % interval excludes 0. Kimi's columns
are the points of the long2short figure of arXiv 2501.12599, read off its vector markers to about 1 %, relative to the
long model of that figure. Exit code 1 if for two or more seeds DPO or shortest rejection sampling is not shorter than
its parent beyond its interval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bounds import against, frontier_of
from long2short.frontier import Frontier, FrontierRow
from rl.stats import Estimate


@dataclass(frozen=True, slots=True)
class Kimi:
    """Tokens and accuracy (percent) of one point of Kimi's figure. Example: `Kimi((645, 88.2), (1446, 25.9))`."""

    math: tuple[float, float]  # MATH-500
    aime: tuple[float, float]  # AIME 2024


LONG = Kimi((1321, 94.1), (4205, 63.3))
WAYS = {  # arm -> what Kimi's figure has of it
    "brief": Kimi((1198, 94.6), (3263, 60.8)),
    "dpo": Kimi((1103, 91.6), (3115, 47.1)),
    "merge-rs": Kimi((902, 90.2), (3028, 42.9)),
    "merge-50": Kimi((857, 89.2), (3134, 39.0)),
    "shortest": Kimi((645, 88.2), (1446, 25.9)),
}
OTHERS = ("merge-search", "control")


def change(point: tuple[float, float], base: tuple[float, float]) -> str:
    """`change((645, 88.2), (1321, 94.1)) == "−51 %, −5.9"`: tokens relative, accuracy in points."""
    tokens, points = 100 * (point[0] / base[0] - 1), point[1] - base[1]
    return f"{tokens:+.0f} %, {points:+.1f}".replace("-", "−")


def cell(rows: Sequence[FrontierRow], pick: Callable[[FrontierRow], Estimate], form: str, scale: float = 1.0) -> str:
    """One number a seed, marked where its interval excludes 0."""
    parts = []
    for row in rows:
        found = pick(row)
        parts.append(f"{scale * found.value:{form}}" + ("*" if found.low > 0 or found.high < 0 else ""))
    return " / ".join(parts).replace("-", "−")


def lines(found: Sequence[Frontier]) -> list[str]:
    table = [
        "| arm | accuracy | tokens | Δ accuracy | Δ tokens, % | Kimi: MATH-500 | Kimi: AIME 2024 |",
        "|---|---|---|---|---|---|---|",
    ]
    parents = [one.row(one.parent) for one in found]
    for name in (found[0].parent, *WAYS, *OTHERS):
        rows = [one.row(name) for one in found]
        accuracy = " / ".join(f"{row.summary.accuracy.value:.3f}" for row in rows)
        tokens = " / ".join(f"{row.summary.tokens.mean.value:.1f}" for row in rows)
        rest = ["parent", "parent", f"{LONG.math[1]} at {LONG.math[0]:,}", f"{LONG.aime[1]} at {LONG.aime[0]:,}"]
        if rows != parents:
            kimi = WAYS.get(name)
            rest = [
                cell(rows, lambda row: against(row).accuracy, "+.3f"),
                cell(rows, lambda row: against(row).tokens_relative, "+.1f", 100),
                change(kimi.math, LONG.math) if kimi else "",
                change(kimi.aime, LONG.aime) if kimi else "",
            ]
        table.append(f"| {' | '.join([name, accuracy, tokens, *rest])} |")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    asked = parser.parse_args()
    found = [frontier_of(seed, asked.runs, "tiny-long2short") for seed in asked.seeds]
    print("\n".join(lines(found)))
    longer = [sum(against(one.row(name)).tokens_relative.high >= 0 for one in found) for name in ("dpo", "shortest")]
    return int(max(longer) >= 2)


if __name__ == "__main__":
    sys.exit(main())
