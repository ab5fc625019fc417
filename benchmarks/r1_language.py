"""How consistent the arms of the recipe `r1-tiny` are in their notation, beside accuracy; and what filters dropped.

reason run r1-tiny
python benchmarks/r1_language.py runs 0          (the folder of runs, the seed; reads the frontier's samples)

`consistent`: mean share of a thought's digits, signs and number words that are in the notation of its question.
`pure`: share of the thoughts in which it is at least .95, which is what the filter of the recipe lets pass.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean

from recipes.runner import plan_stages
from recipes.schema import load_recipe
from recipes.tasks import load_problems
from rl.jsonl import read_rows
from rl.pool import SAMPLE_FIELDS
from rl.rewards import thought_of
from rl.runs import read_json
from rl.tasks.tiny_words import LANGUAGES


def shares(pool: Path, questions: dict[str, str]) -> list[float]:
    """The share of each thought of a pool that is in the notation of its question; thoughts without a unit are left
    out."""
    found = []
    for path in sorted(pool.glob("samples-*.jsonl")):
        for _, row in read_rows(path, SAMPLE_FIELDS):
            notation = LANGUAGES.of(questions[row["problem"]])
            share = None if notation is None else LANGUAGES.share(thought_of(row["text"]), notation)
            if share is not None:
                found.append(share)
    return found


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs")
    recipe = load_recipe("r1-tiny", seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    questions = {p.id: p.text for p in load_problems(recipe.problems, "test", recipe.problems.test)}
    print(f"{'arm':8}{'accuracy':>10}{'tokens':>8}{'consistent':>12}{'pure':>7}")
    for planned in plan_stages(recipe, root=root):
        if planned.stage.hidden and planned.folder.finished:
            summary = read_json(planned.folder.final / "summary.json")
            found = shares(planned.folder.final / "pool", questions)
            print(
                f"{planned.stage.name.removeprefix('frontier.'):8}{summary['accuracy']['value']:10.3f}"
                f"{summary['tokens']['mean']['value']:8.1f}{fmean(found):12.3f}{fmean(s >= 0.95 for s in found):7.2f}"
            )
        elif planned.stage.name in ("traces", "preference") and planned.folder.finished:
            print(planned.stage.name, read_json(planned.folder.final / "summary.json"))


if __name__ == "__main__":
    main()
