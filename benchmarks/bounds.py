"""What the recipe `tiny` must show, checked on finished runs: one line a bound and seed.

    for seed in 0 1 2; do reason run tiny --seed $seed; done
    python benchmarks/bounds.py 0 1 2

Exit code 1 if a bound fails for two or more of the seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from long2short.frontier import Frontier, FrontierRow
from recipes.runner import plan_stages
from recipes.schema import load_recipe
from rl.runs import read_json


def bounds(found: Frontier) -> Iterator[tuple[str, str, bool]]:
    """(bound, figures, holds) for one frontier. Accuracies are shares, tokens are means over all completions."""
    base, teacher, brief, control = (found.row(name) for name in ("base", "teacher", "brief", "control"))
    accuracy, tokens = teacher.summary.accuracy.value, teacher.summary.tokens.mean.value
    yield "base accuracy <= 0.70", f"{base.summary.accuracy.value:.3f}", base.summary.accuracy.value <= 0.70
    gain = accuracy - base.summary.accuracy.value
    yield "teacher >= base + 0.25", f"{accuracy:.3f}, {gain:+.3f}", gain >= 0.25
    ratio = tokens / base.summary.tokens.mean.value
    yield "teacher tokens >= 1.5 x base", f"{tokens:.1f}, {ratio:.2f} x", ratio >= 1.5
    change = against(brief).tokens_relative.value
    yield "brief tokens <= 0.70 x teacher", f"{brief.summary.tokens.mean.value:.1f}, {change:+.1%}", change <= -0.30
    loss = against(brief).accuracy.value
    yield "brief accuracy >= teacher - 0.03", f"{brief.summary.accuracy.value:.3f}, {loss:+.3f}", loss >= -0.03
    drift = against(control).tokens_relative
    shown = f"{drift.value:+.1%} [{drift.low:+.1%}, {drift.high:+.1%}]"
    yield "control not shorter beyond noise", shown, drift.high >= 0
    shortened = [
        row for row in found.rows if row.label in ("merge", "sft", "dpo", "length_rl") and row.name != "student"
    ]
    bent = [row for row in shortened if against(row).accuracy.high < -0.05]
    shown = ", ".join(f"{row.name} {against(row).accuracy.value:+.3f}" for row in bent)
    yield "an arm clearly below the teacher", shown or "none", bool(bent)


def against(row: FrontierRow):
    """The paired difference to the teacher."""
    assert row.difference is not None
    return row.difference


def frontier_of(seed: int, root: Path, recipe: str = "tiny") -> Frontier:
    """The frontier of a finished run of a recipe; a seed that was not run is an error."""
    planned = plan_stages(load_recipe(recipe, seed=seed), root=root)[-1]
    if not planned.folder.finished:
        raise SystemExit(f"seed {seed} is not finished: reason run {recipe} --seed {seed}")
    return Frontier.from_json(read_json(planned.folder.final / "frontier.json"))


def main() -> int:
    seeds = [int(text) for text in sys.argv[1:]] or [0]
    failed: dict[str, int] = {}
    for seed in seeds:
        for bound, figures, holds in bounds(frontier_of(seed, Path("runs"))):
            print(f"seed {seed}  {'holds' if holds else 'FAILS'}  {bound:35} {figures}")
            failed[bound] = failed.get(bound, 0) + (not holds)
    return int(any(count >= 2 for count in failed.values()) or (len(seeds) == 1 and any(failed.values())))


if __name__ == "__main__":
    sys.exit(main())
