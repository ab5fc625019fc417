"""The types that flow between stages. Standard library only.

Everything in `reason` is a function of a `RolloutGroup`: one problem with its k judged completions. RL takes group
advantages from it, distillation keeps its correct completions, shortest rejection sampling picks one, DPO pairs two,
evaluation counts them. All types are frozen: a stage makes new values, it never edits what another stage made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum


class FinishReason(StrEnum):
    """How a completion ended."""

    STOP = "stop"  # the model ended by itself, with an end-of-sequence token
    LENGTH = "length"  # the token budget ran out; usually there is no answer
    REPETITION = "repetition"  # a loop was detected and the rollout was stopped
    ABORTED = "aborted"  # stopped from outside (a race was lost, an engine died); says nothing about the model


class Outcome(StrEnum):
    RIGHT = "right"
    WRONG = "wrong"
    UNDECIDED = "undecided"  # the judge failed, not the model


class JudgeFailure(StrEnum):
    """Why a verdict is undecided."""

    TIMEOUT = "timeout"  # the verifier did not come to an end in its time and was killed
    CRASH = "crash"  # the verifier died, or said something that is no verdict
    INFRASTRUCTURE = "infrastructure"  # there was nothing to judge with: no sandbox, no endpoint
    UNPARSEABLE_GOLD = "unparseable gold"  # the reference answer cannot be read, so nothing can equal it


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says of one completion.

    `UNDECIDED` means that the judge failed (verifier hung, sandbox down); it never counts as 0 and leaves the group's
    baseline. A truncated completion without an answer is `WRONG`: its finish reason is kept beside it.

    Example: `Verdict(Outcome.WRONG, "no </think>: the thought never ended")`,
    `Verdict.undecided(JudgeFailure.TIMEOUT, "no answer in 5 s")`
    """

    outcome: Outcome
    reason: str = ""
    failure: JudgeFailure | None = None  # given exactly when it is undecided
    seconds: float = field(default=0.0, compare=False)  # wall time of judging this one completion

    def __post_init__(self) -> None:
        if (self.failure is not None) != (self.outcome is Outcome.UNDECIDED):
            raise ValueError(
                f"a verdict has a failure exactly when it is undecided, not {self.outcome}, {self.failure}"
            )

    @classmethod
    def undecided(cls, failure: JudgeFailure, reason: str = "") -> Verdict:
        return cls(Outcome.UNDECIDED, reason, failure)

    @property
    def right(self) -> bool:
        return self.outcome is Outcome.RIGHT

    @property
    def decided(self) -> bool:
        return self.outcome is not Outcome.UNDECIDED


@dataclass(frozen=True, slots=True)
class TextPart:
    """One piece of a question. Text today; an image part is a second class, not a change of `Problem`."""

    text: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with its reference answer.

    Example: `Problem(id="tiny-9f2c41", question=(TextPart("47*3+08"),), answer="49", level=2)`
    """

    id: str  # stable and unique within a problem set
    question: tuple[TextPart, ...]  # content parts, in order
    answer: str  # the reference (gold) answer
    source: str = ""  # where it came from: a task's name or file:line
    level: int | None = None  # difficulty level, if the task has one
    spec: str = ""  # what the task's judge needs beside the answer (tests, constraints), as JSON; its own affair

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.question)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a completion that one policy version sampled in one go.

    A completion that was continued over several iterations (partial rollouts, Kimi k1.5, 2501.12599, section 2.6) has
    several, in order; their `num_tokens` sum to the completion's.

    Example: 40 tokens drawn at version 7 that stay out of the loss: `Segment(40, policy_version=7, trained=False)`.
    """

    num_tokens: int
    policy_version: int
    trained: bool = True  # whether the policy loss is taken on these tokens


@dataclass(frozen=True, slots=True)
class Completion:
    """What the sampler returned for one prompt: token in, token out.

    `token_ids` are the sampled tokens, with the EOS token when the model ended by itself, without prompt or padding;
    `len(token_ids)` is *the* length of a completion everywhere in `reason`. `sampler_logprobs[t]` is the
    log-probability (nats) of `token_ids[t]` under the sampler's processed distribution: at its temperature, after
    top-p.

    Example: `Completion("4</think>4", (7, 3, 7, 1), (-0.1, -0.2, 0.0, 0.0), FinishReason.STOP)`, `num_tokens` 4.
    """

    text: str  # decoded without the EOS token; for reading and judging, never re-tokenised for training
    token_ids: tuple[int, ...]  # (T,)
    sampler_logprobs: tuple[float, ...]  # (T,), nats
    finish_reason: FinishReason
    policy_version: int = 0  # how many optimizer steps the policy that drew the last token had taken
    segments: tuple[Segment, ...] = ()  # empty for a completion drawn in one go

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.sampler_logprobs):
            raise ValueError(
                f"{len(self.token_ids)} token ids but {len(self.sampler_logprobs)} sampler log-probs in one completion"
            )
        if self.segments and sum(segment.num_tokens for segment in self.segments) != len(self.token_ids):
            raise ValueError(
                f"segments of {[segment.num_tokens for segment in self.segments]} tokens do not add up to the "
                f"{len(self.token_ids)} tokens of their completion"
            )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def trained(self) -> tuple[bool, ...]:
        """Which tokens the policy loss is taken on, (T,): all of them, unless a segment says no."""
        if not self.segments:
            return (True,) * self.num_tokens
        return tuple(segment.trained for segment in self.segments for _ in range(segment.num_tokens))


@dataclass(frozen=True, slots=True)
class Rollout:
    """A judged completion.

    `verdict` and `reward` stay apart: a length objective changes the reward; selection and evaluation read the verdict.
    """

    completion: Completion
    verdict: Verdict
    reward: float = 0.0  # what the learner sees
    reward_parts: tuple[tuple[str, float], ...] = ()  # (name, value before its weight), for the logs

    @property
    def right(self) -> bool:
        return self.verdict.right

    @property
    def num_tokens(self) -> int:
        return self.completion.num_tokens


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """One problem with its k judged completions, in sample order.

    Example: a problem, its prompt ids and 8 rollouts; `rollouts[3]` is sample 3, drawn with seed (root, problem id, 3).
    """

    problem: Problem
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...] = field(default=())

    @property
    def num_tokens(self) -> list[int]:
        """Completion lengths in tokens, in sample order: (k,)."""
        return [rollout.num_tokens for rollout in self.rollouts]

    @property
    def right(self) -> list[bool]:
        return [rollout.right for rollout in self.rollouts]

    @property
    def rewards(self) -> list[float]:
        return [rollout.reward for rollout in self.rollouts]

    def with_rewards(self, rewards: list[float]) -> RolloutGroup:
        """The same group with other rewards; refuses a non-finite one, since a NaN must never become a number."""
        rollouts = tuple(replace(r, reward=reward) for r, reward in zip(self.rollouts, rewards, strict=True))
        group = replace(self, rollouts=rollouts)
        bad = [reward for reward in rewards if not math.isfinite(reward)]
        if bad:
            raise NonFiniteReward(group, bad[0])
        return group

    def require_complete(self, what: str) -> None:
        """Refuse a group with aborted samples: its lengths are censored, so every statistic on it is biased."""
        aborted = sum(r.completion.finish_reason is FinishReason.ABORTED for r in self.rollouts)
        if aborted:
            raise ValueError(
                f"{what} cannot use problem {self.problem.id}: {aborted} of {len(self.rollouts)} samples were aborted; "
                "only shortest selection reads such groups"
            )


class NonFiniteReward(ValueError):
    """A reward that is not a number. `group` holds it, for whoever writes it down."""

    def __init__(self, group: RolloutGroup, reward: float) -> None:
        super().__init__(f"problem {group.problem.id}: reward {reward} is not a finite number")
        self.group = group
