"""Partial rollouts: a long completion is drawn over several iterations instead of holding one up.

Kimi k1.5 (2501.12599, section 2.6): an iteration has a budget of output tokens per completion. What is not done by then
is kept and goes on in the next iteration, under the weights of that time; only the new segment is drawn, the old ones
keep their tokens and the log-probs of the sampler that drew them. Segments may be left out of the loss.

What is ours:

1. A group is handed on when all its k completions have ended, then as a whole and once. Whoever fills a batch with what
   finishes first trains on the short completions of a group and on the problems with short ones; here every group that
   was started is trained on, only later. Nothing is dropped and nothing waits for a number of groups: an iteration
   returns what has closed, which may be nothing in the first ones. In the steady state that is as many groups as were
   started, with the true share of long ones.
2. A group keeps the token limit that it was started with, so that a schedule of the maximum length never cuts the
   samples of one problem at different lengths.
3. Token t of a completion is drawn with number t of its own random stream (rl/samplers/base.py), so with unchanged
   weights the budget changes nothing but the time.

What is left open at the end of training was sampled in vain. A completion counts as one in everything but the loss:
its reward and its length are those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rl.judging import judge_attempts
from rl.prompts import render_prompt
from rl.refusal import StepRefused
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings, sample_seed
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Problem, Rollout, RolloutGroup, Segment, TextPart


@dataclass(frozen=True, slots=True)
class OpenSample:
    """One completion so far. Without a finish reason it goes on in the next iteration.

    Example: 4 tokens of version 0, 4 of version 1, then the EOS of version 3: segments (4, 0), (4, 1), (1, 3), finish
    reason stop.
    """

    seed: int
    token_ids: tuple[int, ...] = ()  # (T,)
    sampler_logprobs: tuple[float, ...] = ()  # (T,), nats, of the sampler that drew each
    segments: tuple[Segment, ...] = ()  # one per iteration
    finish_reason: FinishReason | None = None

    def extended(self, drawn: Completion, asked: int, limit: int) -> OpenSample:
        """With the tokens of one more iteration, in which `asked` tokens were allowed, of `limit` in all.

        It goes on if it was cut by what was asked for. It has ended if it reached the limit, or if the engine cut it
        earlier, at a limit of its own, which it would do again.
        """
        token_ids = self.token_ids + drawn.token_ids
        cut = drawn.finish_reason is FinishReason.LENGTH and drawn.num_tokens == asked and len(token_ids) < limit
        return OpenSample(
            self.seed,
            token_ids,
            self.sampler_logprobs + drawn.sampler_logprobs,
            (*self.segments, Segment(drawn.num_tokens, drawn.policy_version)),
            None if cut else drawn.finish_reason,
        )


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """A problem whose k completions have not all ended."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    max_tokens: int  # the limit of the iteration in which it was started
    samples: tuple[OpenSample, ...]

    @property
    def done(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)


class PartialRollouts:
    """The open groups of a run; `advance` is one iteration.

    `budget` is how many tokens a completion may grow by in one iteration. With `train_old_segments` false only the
    tokens that the current policy drew are in the loss, which is then on-policy; a completion that ended in an earlier
    iteration still counts in the baseline, but is not trained on, so a group's long completions weigh more.
    """

    def __init__(self, budget: int, train_old_segments: bool = True, groups: Sequence[OpenGroup] = ()) -> None:
        if budget < 1:
            raise ValueError(f"budget must be at least 1 token per iteration, got {budget}")
        self.budget = budget
        self.train_old_segments = train_old_segments
        self.groups = tuple(groups)  # in the order in which they were started

    def advance(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        problems: Sequence[Problem],
        task: Task,
        samples: int,
        settings: SamplingSettings,
        seed: int,
        suffix: str = "",
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[RolloutGroup]:
        """Go on with what is open, start k = `samples` completions of each new problem, return the groups that closed.

        The arguments are those of `rl.rollout.sample_groups`, and `seed` must differ between iterations. If anything is
        raised the open groups are those before the call.

        Errors: StepRefused for a sampler log-prob that is not finite.
        """
        started = [
            OpenGroup(
                problem,
                render_prompt(tokenizer, problem, suffix),
                settings.max_tokens,
                tuple(OpenSample(sample_seed(seed, problem.id, i)) for i in range(samples)),
            )
            for problem in problems
        ]
        groups = _grown([*self.groups, *started], sampler, settings, self.budget, report)
        closed = [
            (group, self._completions(group, sampler.policy_version, tokenizer)) for group in groups if group.done
        ]
        judged = _judged(closed, task)
        self.groups = tuple(group for group in groups if not group.done)
        return judged

    def _completions(self, group: OpenGroup, version: int, tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Those of a group that is done; `version` is the policy's now, so segments of other versions are old."""
        # Without the EOS token; text is made once, of the whole, since a token may be a part of a character.
        texts = tokenizer.batch_decode(
            [list(s.token_ids[:-1] if s.finish_reason is FinishReason.STOP else s.token_ids) for s in group.samples],
            skip_special_tokens=False,
        )
        completions = []
        for sample, text in zip(group.samples, texts, strict=True):
            assert sample.finish_reason is not None
            segments = tuple(
                replace(segment, trained=self.train_old_segments or segment.policy_version == version)
                for segment in sample.segments
            )
            completions.append(
                Completion(
                    text,
                    sample.token_ids,
                    sample.sampler_logprobs,
                    sample.finish_reason,
                    segments[-1].policy_version,
                    segments,
                )
            )
        return completions

    def metrics(self) -> dict[str, float]:
        """What is open, for the logs."""
        samples = [sample for group in self.groups for sample in group.samples]
        return {
            "open_groups": float(len(self.groups)),
            "open_completions": float(sum(sample.finish_reason is None for sample in samples)),
            "open_tokens": float(sum(len(sample.token_ids) for sample in samples)),
        }

    def as_json(self) -> dict[str, object]:
        """All of it, exactly: a float is written with as many digits as tell it from every other."""
        return {
            "budget": self.budget,
            "train_old_segments": self.train_old_segments,
            "groups": [_group_json(group) for group in self.groups],
        }

    @classmethod
    def from_json(cls, state: dict) -> PartialRollouts:
        groups = [_group_from_json(group) for group in state["groups"]]
        return cls(state["budget"], state["train_old_segments"], groups)


def staleness(groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
    """How old the trained tokens are, for the logs: in policy versions (optimizer steps), up to `version`, which is the
    one that the iteration sampled with.

    Example: 12 trained tokens of version 7 and 1 of version 9, at version 9: mean 24 / 13, largest 2.
    """
    ages = [
        (version - segment.policy_version, segment.num_tokens)
        for group in groups
        for rollout in group.rollouts
        for segment in rollout.completion.segments
        if segment.trained
    ]
    tokens = sum(count for _, count in ages)
    return {
        "stale_versions_mean": sum(age * count for age, count in ages) / tokens if tokens else 0.0,
        "stale_versions_max": float(max((age for age, _ in ages), default=0)),
    }


def _judged(closed: Sequence[tuple[OpenGroup, list[Completion]]], task: Task) -> list[RolloutGroup]:
    attempts = [(group.problem, completion) for group, completions in closed for completion in completions]
    verdicts = iter(judge_attempts(task, attempts))
    return [
        RolloutGroup(group.problem, group.prompt_ids, tuple(Rollout(c, next(verdicts)) for c in completions))
        for group, completions in closed
    ]


def _grown(
    groups: Sequence[OpenGroup],
    sampler: Sampler,
    settings: SamplingSettings,
    budget: int,
    report: Callable[[int], None],
) -> list[OpenGroup]:
    """The groups with every completion that had not ended grown by at most `budget` tokens."""
    going = [
        (group, sample, min(budget, group.max_tokens - len(sample.token_ids)))
        for group in groups
        for sample in group.samples
        if sample.finish_reason is None
    ]
    requests = [
        SampleRequest(group.prompt_ids, sample.seed, prefix=sample.token_ids, max_tokens=asked)
        for group, sample, asked in going
    ]
    limit = max((group.max_tokens for group in groups), default=settings.max_tokens)
    drawn = sampler.sample(requests, replace(settings, max_tokens=limit), report)
    bad = [
        group.problem.id
        for (group, _, _), completion in zip(going, drawn, strict=True)
        if not all(map(math.isfinite, completion.sampler_logprobs))
    ]
    if bad:
        raise StepRefused("a sampler log-prob", bad)
    new = iter(zip(drawn, going, strict=True))
    grown = []
    for group in groups:
        samples = []
        for sample in group.samples:
            if sample.finish_reason is None:
                completion, (_, _, asked) = next(new)
                sample = sample.extended(completion, asked, group.max_tokens)
            samples.append(sample)
        grown.append(replace(group, samples=tuple(samples)))
    return grown


def _group_json(group: OpenGroup) -> dict[str, object]:
    problem = group.problem
    return {
        "problem": {
            "id": problem.id,
            "question": [part.text for part in problem.question],
            "answer": problem.answer,
            "source": problem.source,
            "level": problem.level,
            "spec": problem.spec,
        },
        "prompt_ids": list(group.prompt_ids),
        "max_tokens": group.max_tokens,
        "samples": [
            {
                "seed": sample.seed,
                "token_ids": list(sample.token_ids),
                "sampler_logprobs": list(sample.sampler_logprobs),
                "segments": [[segment.num_tokens, segment.policy_version] for segment in sample.segments],
                "finish_reason": sample.finish_reason,
            }
            for sample in group.samples
        ],
    }


def _group_from_json(state: dict) -> OpenGroup:
    problem = state["problem"]
    return OpenGroup(
        Problem(
            problem["id"],
            tuple(TextPart(text) for text in problem["question"]),
            problem["answer"],
            problem["source"],
            problem["level"],
            problem["spec"],
        ),
        tuple(state["prompt_ids"]),
        state["max_tokens"],
        tuple(
            OpenSample(
                sample["seed"],
                tuple(sample["token_ids"]),
                tuple(sample["sampler_logprobs"]),
                tuple(Segment(num_tokens, version) for num_tokens, version in sample["segments"]),
                None if sample["finish_reason"] is None else FinishReason(sample["finish_reason"]),
            )
            for sample in state["samples"]
        ),
    )
