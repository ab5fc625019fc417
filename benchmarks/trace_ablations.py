"""What verification and the choice among right traces do for a student: one pool, one base, equal numbers of rows.

    reason run r1-tiny --seed 0 --runs runs
    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/trace_ablations.py runs 0          (the folder of runs, the seed)

Students of the recipe's `base` on traces of its `pool`, three of a problem: right ones at random, the shortest right
ones, and any that ended by themselves (nothing verified). Every set has as many rows as the smallest, drawn by the
seed; SFT as the recipe's, on reasoning rows alone. Scored on the recipe's test problems, four samples each; differences
are paired with the random right ones.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from distill.selection import Chooser, at_random, shortest
from distill.sft import SftSettings, train
from distill.traces import Trace, has_special, make_trace, select_traces
from recipes.runner import plan_stages
from recipes.schema import load_recipe
from recipes.tasks import load_problems, open_task
from rl.evaluate import compare, summarize
from rl.policy import load_model, load_tokenizer
from rl.pool import Pool
from rl.rollout import sample_groups
from rl.samplers.base import SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.types import FinishReason, RolloutGroup

PER_PROBLEM = 3


def unverified(groups: Sequence[RolloutGroup], seed: int, forbidden: Collection[str]) -> list[Trace]:
    """Three of a problem among all that ended by themselves with a closed thought, right or wrong."""
    found = []
    for group in groups:
        usable = [
            index
            for index, rollout in enumerate(group.rollouts)
            if rollout.completion.finish_reason is FinishReason.STOP
            and rollout.completion.text.count("</think>") == 1
            and not has_special(rollout.completion.text, forbidden)
        ]
        chosen = random.Random(f"{seed} {group.problem.id}").sample(usable, min(PER_PROBLEM, len(usable)))
        found += [make_trace(group, index, "unverified") for index in sorted(chosen)]
    return found


def main() -> None:
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    recipe = load_recipe("r1-tiny", seed=seed)
    folders = {planned.stage.name: planned.folder.final for planned in plan_stages(recipe, root=root)}
    task, pool, sft = open_task(recipe.problems), recipe.stages["pool"].config, recipe.stages["sft"].config
    problems = load_problems(recipe.problems, "train", recipe.problems.train)[: pool.count]
    groups = list(Pool.open(folders["pool"] / "pool").groups(problems, task.verifier_version, pool.samples))

    forbidden = frozenset(load_tokenizer(folders["base"] / "model").all_special_tokens)

    def right(choose: Chooser) -> list[Trace]:
        selection = select_traces(
            groups, teacher="rl-1", seed=seed, per_problem=PER_PROBLEM, choose=choose, forbidden=forbidden
        )
        return list(selection.traces)

    sets = {
        "random right": right(at_random),
        "shortest right": right(shortest),
        "unverified": unverified(groups, seed, forbidden),
    }
    rows = min(map(len, sets.values()))
    wrong = sum(not rollout.right for group in groups for rollout in group.rollouts) / (len(groups) * pool.samples)
    print(f"seed {seed}: {rows} rows each; {wrong:.1%} of the pool is wrong")
    test = load_problems(recipe.problems, "test", recipe.problems.test)
    settings = SamplingSettings(max_tokens=recipe.sampling.max_tokens)
    judged: dict[str, list[RolloutGroup]] = {}
    for name, traces in sets.items():
        kept = sorted(random.Random(seed).sample(range(len(traces)), rows))
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            train(
                folder, model=folders["base"] / "model", traces=[traces[index] for index in kept],
                settings=SftSettings(
                    sft.epochs, sft.learning_rate, sft.batch_size, sft.max_length, seed,
                    warmup_ratio=sft.warmup_ratio, save_every=0,
                ),
            )  # fmt: skip
            model, tokenizer = load_model(str(folder / "model")), load_tokenizer(folder / "model")
            sampler = TransformersSampler(model, tokenizer, recipe.sampling.batch_size)
            judged[name] = sample_groups(sampler, tokenizer, test, task, 4, settings, seed)
        summary = summarize(judged[name], task)
        print(f"{name:16} accuracy {summary.accuracy.value:.3f}  tokens {summary.tokens.mean.value:.1f}", flush=True)
    for name in ("shortest right", "unverified"):
        found = compare(judged[name], judged["random right"])
        for what, value in (("accuracy", found.accuracy), ("tokens", found.tokens)):
            print(f"{name} against random right: {what} {value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]")


if __name__ == "__main__":
    main()
