"""What each arm of the recipe `tiny` still checks: the share of steps with a worked check, per operation.

reason run tiny
python benchmarks/checks.py 0          (the seed; reads the samples of the frontier's evaluations)
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from recipes.runner import plan_stages
from recipes.schema import load_recipe
from rl.jsonl import read_rows
from rl.pool import SAMPLE_FIELDS
from rl.tasks.tiny import OPERATIONS

STEP = re.compile(r"\d\d([+*-])\d+=\d\d( wait )?")


def check_shares(pool: Path) -> dict[str, float]:
    """Share of checked steps per operation over all completions of a pool: {"+": 0.03, "-": 0.04, "*": 0.96}."""
    steps, checked = Counter(), Counter()
    for path in sorted(pool.glob("samples-*.jsonl")):
        for _, row in read_rows(path, SAMPLE_FIELDS):
            for operation, wait in STEP.findall(row["text"]):
                steps[operation] += 1
                checked[operation] += bool(wait)
    return {operation: checked[operation] / max(steps[operation], 1) for operation in OPERATIONS}


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    print(f"{'arm':12}" + "".join(f"{operation:>8}" for operation in OPERATIONS))
    for planned in plan_stages(load_recipe("tiny", seed=seed), root=Path("runs")):
        if planned.stage.hidden and planned.folder.finished:
            shares = check_shares(planned.folder.final / "pool")
            name = planned.stage.name.removeprefix("frontier.")
            print(f"{name:12}" + "".join(f"{shares[operation]:8.2f}" for operation in OPERATIONS))


if __name__ == "__main__":
    main()
