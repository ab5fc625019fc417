"""Races into a pool: what was raced is on the disk, so a killed run goes on with the problems that are left.

Run it: a recipe with a `method: race` stage; it makes what `sample` and `shortest` make, from fewer tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from distill.traces import TraceSelection
from long2short.racing import flawless, race_shortest
from long2short.shortest import select_shortest
from rl.pool import Pool
from rl.prompts import render_prompt
from rl.samplers.base import SamplingSettings, StreamingSampler
from rl.tasks.base import Task
from rl.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RACE_SAMPLES = 4096  # that race together: enough to keep an engine busy, few enough to lose to a kill


def race_into_pool(
    pool: Pool,
    sampler: StreamingSampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    task: Task,
    samples: int,
    settings: SamplingSettings,
    seed: int,
    suffix: str = "",
    *,
    teacher: str = "",
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TraceSelection:
    """Race `samples` completions of each problem that the pool lacks, then select the shortest right one of each.

    `pool` is a racing pool (`pool_address(..., racing=True)`). The other arguments are those of `race_shortest` and
    `select_shortest`; both get one rule for what may win. `progress(done, total)` counts samples.

    Errors: ValueError for a plain pool; RunLocked, PoolFull as `rl.pool.fill_pool`.
    """
    if not pool.address.racing:
        raise ValueError(f"{pool.folder} is a plain pool: a race needs one whose address says so")
    total = samples * len(problems)
    acceptable = flawless(min_tokens, prefilled, forbidden)
    at_once = max(1, RACE_SAMPLES // samples)
    with pool.writing():
        unraced = {problem.id for problem, _ in pool.missing(problems, samples)}
        left = [problem for problem in problems if problem.id in unraced]
        done = total - samples * len(left)
        progress(done, total)
        for start in range(0, len(left), at_once):
            racing = left[start : start + at_once]
            result = race_shortest(
                sampler, tokenizer, racing, task, samples, settings, seed, suffix, acceptable=acceptable,
                report=lambda finished, before=done: progress(before + finished, total),
            )  # fmt: skip
            prompts = [render_prompt(tokenizer, problem, suffix) for problem in racing]
            pool.add_shard(
                [
                    (problem, i, prompt, rollout.completion)
                    for problem, prompt, group in zip(racing, prompts, result.groups, strict=True)
                    for i, rollout in enumerate(group.rollouts)
                ]
            )
            done += samples * len(racing)
        pool.judge(problems, task)
    return select_shortest(
        pool.groups(problems, task.verifier_version, samples),
        teacher=teacher, samples=samples, min_tokens=min_tokens, prefilled=prefilled, forbidden=forbidden,
    )  # fmt: skip
