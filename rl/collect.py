"""The judged, scored groups of one step: plain, dynamic or partial, from one source of problems.

The collector holds all that sampling remembers between steps: success rates, how many problems were drawn, and the
completions that are not done yet. It is stored with every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from rl.batch_rewards import WeightedBatchReward, add_batch_rewards
from rl.curriculum import ProblemSource, SuccessRates
from rl.dynamic import fill_with_signal
from rl.partial import PartialRollouts, staleness
from rl.rewards import WeightedReward, score
from rl.rollout import sample_groups
from rl.samplers.base import Sampler, SamplingSettings, sample_seed
from rl.schedules import StepSchedule
from rl.tasks.base import Task
from rl.types import Problem, RolloutGroup

Shape = Callable[[list[RolloutGroup], int], list[RolloutGroup]]


@runtime_checkable
class Remembering(Protocol):
    """A shape that remembers over steps: what it stores in a checkpoint (exact JSON values), is told and reports."""

    def as_json(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...

    def evaluated(self, step: int, accuracy: float) -> None:
        """The accuracy of an evaluation on dev problems."""
        ...

    def metrics(self) -> dict[str, float]: ...


def no_shaping(groups: list[RolloutGroup], step: int) -> list[RolloutGroup]:
    """Plain RL: the rule rewards as they are."""
    return groups


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """What a step samples."""

    problems_per_step: int
    group_size: int
    sampling: SamplingSettings  # its max_tokens is the largest there will ever be
    max_tokens: StepSchedule
    dynamic_rounds: int = 0  # 0: the problems of a step are those drawn first, with signal or without
    partial_budget: int | None = None  # tokens a completion may grow by in one step; None: it is finished in its step
    train_old_segments: bool = True


class Collector:
    """Collects the groups of a step; call `step` with 1, 2, 3, …

    `source` says which problems come next, `rewards`, `batch_rewards` and `shape` what their completions are worth, in
    this order. All samples are seeded by (`seed`, step, problem, sample), so a resumed run samples what it would have
    sampled.
    """

    def __init__(
        self,
        sampler: Sampler,
        tokenizer: PreTrainedTokenizerBase,
        source: ProblemSource,
        task: Task,
        rewards: Sequence[WeightedReward],
        settings: RolloutSettings,
        *,
        seed: int,
        batch_rewards: Sequence[WeightedBatchReward] = (),
        shape: Shape = no_shaping,
        suffix: str = "",
    ) -> None:
        if settings.sampling.top_p != 1:
            raise ValueError(
                f"RL needs top_p = 1, got {settings.sampling.top_p}: truncated sampling biases the importance ratio"
            )
        self.sampler, self.tokenizer, self.source, self.task = sampler, tokenizer, source, task
        self.rewards, self.settings, self.seed, self.shape, self.suffix = tuple(rewards), settings, seed, shape, suffix
        self.batch_rewards = tuple(batch_rewards)
        self.rates = SuccessRates()
        self.drawn = 0  # problems taken from the source so far
        self.partial: PartialRollouts | None = None
        if settings.partial_budget is not None:
            self.partial = PartialRollouts(settings.partial_budget, settings.train_old_segments)

    def step(self, step: int, groups: list[RolloutGroup]) -> dict[str, float]:
        """Fill `groups` with the scored groups of a step (from 1); returns the figures of their collection.

        Errors: NonFiniteReward for a reward that is not a number.
        """
        settings, wanted = self.settings, self.settings.problems_per_step
        draw = StepDraw(self.source.stream(step, self.drawn, self.rates))
        sampling = replace(settings.sampling, max_tokens=settings.max_tokens(step))

        def problems() -> list[Problem]:
            """The problems of a step that takes a fixed number of them."""
            chosen = draw.next(wanted)
            if len(chosen) < wanted:
                raise ValueError(
                    f"step {step} wants {wanted} different problems, but the source has only {len(chosen)}; "
                    "give it more problems or lower problems_per_step"
                )
            return chosen

        def sampled(chosen: Sequence[Problem]) -> list[RolloutGroup]:
            return self._scored(self._sample(chosen, step, sampling), step)

        collected: dict[str, float] = {}
        if self.partial is not None:
            version = self.sampler.policy_version
            groups += self._scored(self._advance(self.partial, problems(), step, sampling), step)
            self.rates.update(groups)
            collected = self.partial.metrics() | staleness(groups, version)
        elif settings.dynamic_rounds:
            filled = fill_with_signal(lambda count: sampled(draw.next(count)), wanted, settings.dynamic_rounds)
            groups += filled.groups
            self.rates.update(filled.sampled)
            collected = filled.metrics()
        else:
            groups += sampled(problems())
            self.rates.update(groups)
        self.drawn += draw.taken
        if isinstance(self.shape, Remembering):
            collected |= self.shape.metrics()
        return collected | {"max_tokens": float(sampling.max_tokens)}

    def as_json(self) -> dict[str, object]:
        """What a checkpoint stores; exact."""
        return {
            "rates": self.rates.as_json(),
            "drawn": self.drawn,
            "partial": None if self.partial is None else self.partial.as_json(),
            "policy_version": self.sampler.policy_version,
            "shape": self.shape.as_json() if isinstance(self.shape, Remembering) else None,
        }

    def restore(self, state: dict) -> None:
        """Go on from what `as_json` gave."""
        self.rates = SuccessRates.from_json(state["rates"])
        self.drawn = state["drawn"]
        if state["partial"] is not None:
            self.partial = PartialRollouts.from_json(state["partial"])
        self.sampler.policy_version = state["policy_version"]
        if isinstance(self.shape, Remembering) and state.get("shape"):  # a checkpoint of before shapes remembered
            self.shape.restore(state["shape"])

    def _sample(self, problems: Sequence[Problem], step: int, sampling: SamplingSettings) -> list[RolloutGroup]:
        return sample_groups(
            self.sampler, self.tokenizer, problems, self.task, self.settings.group_size, sampling,
            sample_seed(self.seed, "train", step), self.suffix,
        )  # fmt: skip

    def _advance(
        self, partial: PartialRollouts, problems: Sequence[Problem], step: int, sampling: SamplingSettings
    ) -> list[RolloutGroup]:
        return partial.advance(
            self.sampler, self.tokenizer, problems, self.task, self.settings.group_size, sampling,
            sample_seed(self.seed, "train", step), self.suffix,
        )  # fmt: skip

    def _scored(self, groups: Sequence[RolloutGroup], step: int) -> list[RolloutGroup]:
        scored = [score(group, self.rewards) for group in groups]
        return self.shape(add_batch_rewards(scored, self.batch_rewards), step)


class StepDraw:
    """Problems of one step's stream, none twice: a second copy would get the samples of the first, seed for seed."""

    def __init__(self, stream: Iterator[Problem]) -> None:
        self._stream = stream
        self._seen: set[str] = set()
        self.taken = 0  # from the stream, those that were passed over included

    def next(self, count: int) -> list[Problem]:
        """The next `count` problems, fewer if there are no others."""
        chosen: list[Problem] = []
        passed_over = 0
        while len(chosen) < count and passed_over <= len(self._seen):
            problem = next(self._stream, None)
            if problem is None:
                break
            self.taken += 1
            passed_over = passed_over + 1 if problem.id in self._seen else 0
            if not passed_over:
                self._seen.add(problem.id)
                chosen.append(problem)
        return chosen
