"""What the cold start does for `r1-tiny`: its RL model and its student, with the cold start and from the base at once.

    reason run r1-tiny --seed 0 --runs runs
    reason run r1-tiny frontier --seed 0 --runs runs --set rl-1.model=base \
        --set 'frontier.arms={base: base, rl-1: rl-1, sft: sft}' --set 'frontier.compare=[]'
    PYTHONPATH=. python benchmarks/cold_start.py runs 0          (the folder of runs, the seed)

Both RL stages have the language reward and as many steps; differences are without minus with, paired over problems.
"""

from __future__ import annotations

import sys
from pathlib import Path

from recipes.compare_commands import read_both
from recipes.runner import plan_stages
from recipes.schema import load_recipe
from rl.evaluate import compare

WITHOUT = ("rl-1.model=base", "frontier.arms={base: base, rl-1: rl-1, sft: sft}", "frontier.compare=[]")


def main() -> None:
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    recipes = [load_recipe("r1-tiny", given, seed=seed) for given in ((), WITHOUT)]
    folders = [{it.stage.name: it.folder.final for it in plan_stages(recipe, root=root)} for recipe in recipes]
    for arm in ("rl-1", "sft"):
        have, lack = (found[f"frontier.{arm}"] / "pool" for found in folders)
        both = read_both(lack, have)
        found = compare(*both.groups)
        for what, value in (("accuracy", found.accuracy), ("tokens", found.tokens)):
            print(f"seed {seed}, {arm} without: {what} {value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]")


if __name__ == "__main__":
    main()
