"""Problems -> judged RolloutGroups: sample, judge, keep the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from rl.judging import judge_attempts
from rl.prompts import render_prompt
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings, sample_seed
from rl.tasks.base import Task
from rl.types import Problem, Rollout, RolloutGroup


def sample_groups(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    task: Task,
    samples: int,
    settings: SamplingSettings,
    seed: int,
    suffix: str = "",
    first_sample: int = 0,
    report: Callable[[int], None] = lambda finished: None,
) -> list[RolloutGroup]:
    """k = `samples` judged completions of every problem, one group a problem, in order.

    Sample i of a problem is drawn with the seed (`seed`, problem id, i), so topping up from 8 to 16 with
    `first_sample=8` draws the same numbers as drawing 16 at once. All samples of a problem share its prompt ids.
    """
    prompts = [render_prompt(tokenizer, problem, suffix) for problem in problems]
    requests = [
        SampleRequest(prompt, sample_seed(seed, problem.id, first_sample + i))
        for problem, prompt in zip(problems, prompts, strict=True)
        for i in range(samples)
    ]
    completions = sampler.sample(requests, settings, report)
    asked = [problem for problem in problems for _ in range(samples)]
    verdicts = judge_attempts(task, list(zip(asked, completions, strict=True)))
    rollouts = [Rollout(completion, verdict) for completion, verdict in zip(completions, verdicts, strict=True)]
    return [
        RolloutGroup(problem, prompt, tuple(rollouts[index * samples : (index + 1) * samples]))
        for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
    ]
