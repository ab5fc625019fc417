"""From judged groups to the numbers of the frontier: accuracy, votes, tokens, truncation, loops, with intervals.

Rules, stated once:

* A problem is the unit. Accuracy is avg@k; intervals resample problems (see `rl.stats`).
* An undecided verdict means that the judge failed. Such a sample leaves every number about right and wrong, and is
  counted in `undecided`; its length is still a length, so it stays in the token statistics over all completions.
* A truncated completion without an answer is wrong, and `truncated` counts it apart.
* A group with aborted samples is refused: its lengths are censored.
* Length is completion tokens with thought, answer and EOS, in the evaluated model's own tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from rl import stats
from rl.stats import Estimate, TokenStats
from rl.tasks.base import REFLECTION_WORDS, Task
from rl.types import Completion, FinishReason, Rollout, RolloutGroup

LOOP_REPEATS = 4
LOOP_TOKENS = 24
LOOP_PERIOD = 64


@dataclass(frozen=True, slots=True)
class EvalSummary:
    """One model on one set of problems, k samples each. Shares are of completions, in 0..1.

    Example: 400 problems x 4 samples, accuracy 0.97 [0.96, 0.98], maj@4 0.98, pass@4 0.99, 65 tokens.
    """

    num_problems: int
    samples: int  # k, the same for every problem
    undecided: int  # completions that the judge could not decide
    accuracy: Estimate  # avg@k
    maj_at_k: float  # majority vote over k final answers
    pass_at_k: float | None  # at least one right of k; None if no problem has k decided samples
    tokens: TokenStats  # all completions
    tokens_right: TokenStats | None  # None if nothing is right
    tokens_wrong: TokenStats | None
    tokens_per_correct: float | None  # tokens of all decided completions over the number of right ones
    truncated: float  # share that ran out of tokens
    loops: float  # share that ended in a loop, see `ends_in_loop`
    think_share: float  # share that thought before answering, see `thinks`
    reflection_words: tuple[tuple[str, float], ...]  # (word, occurrences per completion)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json(to_json())` is the same summary."""
        return {**asdict(self), "reflection_words": [list(pair) for pair in self.reflection_words]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EvalSummary:
        def split(name: str) -> TokenStats | None:
            return None if data[name] is None else TokenStats.from_json(data[name])

        converted = {
            "accuracy": Estimate.from_json(data["accuracy"]),
            "tokens": TokenStats.from_json(data["tokens"]),
            "tokens_right": split("tokens_right"),
            "tokens_wrong": split("tokens_wrong"),
            "reflection_words": tuple((word, count) for word, count in data["reflection_words"]),
        }
        return cls(**{**data, **converted})


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A model minus its parent on the same problems, each with a paired 95 % interval over problems.

    Example: accuracy -0.01 [-0.02, 0.00], tokens -38.1 [-39.5, -36.8], tokens_relative -0.58 [-0.60, -0.57].
    """

    num_problems: int  # with a decided sample on both sides
    accuracy: Estimate  # avg@k minus the parent's avg@k
    tokens: Estimate  # mean tokens minus the parent's
    tokens_relative: Estimate  # mean tokens over the parent's, minus 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PairedDifference:
        names = ("accuracy", "tokens", "tokens_relative")
        return cls(data["num_problems"], *(Estimate.from_json(data[name]) for name in names))


def summarize(groups: Sequence[RolloutGroup], task: Task) -> EvalSummary:
    """Every headline number of one model. `groups` are its judged problems, k samples each.

    Raises ValueError by name for an empty list, a repeated problem, groups of different sizes, aborted samples, or when
    the judge decided nothing at all.
    """
    samples = _check(groups)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    decided = [decided_rollouts(group) for group in groups if decided_rollouts(group)]
    if not decided:
        raise ValueError(f"the judge decided none of the {len(rollouts)} completions, so there is no accuracy")
    right = [[rollout.right for rollout in kept] for kept in decided]
    answers = [[task.answer_of(rollout.completion.text) or None for rollout in kept] for kept in decided]
    tokens = stats.lengths([group.num_tokens for group in groups])
    assert tokens is not None  # _check refuses empty groups
    words = task.reflection_words or REFLECTION_WORDS
    counts = [count_words(rollout.completion.text, words) for rollout in rollouts]
    return EvalSummary(
        num_problems=len(groups),
        samples=samples,
        undecided=len(rollouts) - sum(map(len, right)),
        accuracy=stats.bootstrap_mean(stats.shares(right)),
        maj_at_k=stats.maj_at_k(answers, right),
        pass_at_k=stats.mean_pass_at_k(right, samples),
        tokens=tokens,
        tokens_right=stats.lengths([[r.num_tokens for r in kept if r.right] for kept in decided]),
        tokens_wrong=stats.lengths([[r.num_tokens for r in kept if not r.right] for kept in decided]),
        tokens_per_correct=stats.tokens_per_correct([[r.num_tokens for r in kept] for kept in decided], right),
        truncated=_share([r.completion.finish_reason is FinishReason.LENGTH for r in rollouts]),
        loops=_share([ends_in_loop(r.completion) for r in rollouts]),
        think_share=_share([thinks(r.completion.text) for r in rollouts]),
        reflection_words=tuple((word, sum(count[word] for count in counts) / len(counts)) for word in words),
    )


def compare(groups: Sequence[RolloutGroup], parent_groups: Sequence[RolloutGroup]) -> PairedDifference:
    """A model minus its parent, paired by problem: the same problems in any order, else an error that names one.

    Problems without a decided sample on both sides are left out. Both sides may have a different number of samples.
    """
    _check(groups)
    _check(parent_groups)
    parents = {group.problem.id: group for group in parent_groups}
    unpaired = sorted({group.problem.id for group in groups} ^ set(parents))
    if unpaired:
        raise ValueError(
            f"a paired comparison needs the same problems on both sides; {len(unpaired)} are only on one, such as "
            f"{unpaired[0]}: evaluate both models on the same problem set"
        )
    # Sorted by id, so that the drawn problems, and with them the interval, do not depend on the order of the input.
    ordered = sorted(groups, key=lambda group: group.problem.id)
    pairs = [(group, parents[group.problem.id]) for group in ordered]
    pairs = [(one, other) for one, other in pairs if decided_rollouts(one) and decided_rollouts(other)]
    if not pairs:
        raise ValueError("no problem has a decided sample on both sides, so there is nothing to compare")
    accuracy, parent_accuracy = (
        stats.shares([[r.right for r in decided_rollouts(pair[side])] for pair in pairs]) for side in (0, 1)
    )
    tokens, parent_tokens = (
        [sum(pair[side].num_tokens) / len(pair[side].rollouts) for pair in pairs] for side in (0, 1)
    )
    ratio = stats.bootstrap_ratio(tokens, parent_tokens)
    return PairedDifference(
        num_problems=len(pairs),
        accuracy=stats.bootstrap_difference(accuracy, parent_accuracy),
        tokens=stats.bootstrap_difference(tokens, parent_tokens),
        tokens_relative=Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1),
    )


def decided_rollouts(group: RolloutGroup) -> list[Rollout]:
    """The rollouts of a group that the judge could decide, in sample order."""
    return [rollout for rollout in group.rollouts if rollout.verdict.decided]


def ends_in_loop(completion: Completion) -> bool:
    """Whether a completion ended by repetition, or its last tokens are one block said again and again.

    The exact rule for the tail: for some block length p of 1 to 64 tokens, the last max(4 p, 24) tokens (without the
    closing EOS) repeat with period p: four times or more, and 24 tokens at least, so that `0000` is no loop. A model
    that loops and then gets out of it is not counted.
    """
    if completion.finish_reason is FinishReason.REPETITION:
        return True
    ids = completion.token_ids
    if completion.finish_reason is FinishReason.STOP:
        ids = ids[:-1]
    for period in range(1, LOOP_PERIOD + 1):
        span = max(LOOP_REPEATS * period, LOOP_TOKENS)
        if span > len(ids):
            return False
        tail = ids[-span:]
        if tail[period:] == tail[:-period]:
            return True
    return False


def thinks(text: str) -> bool:
    """Whether a thought precedes the answer: something between an optional `<think>` and the last `</think>`.

    `"1+1=2 </think>2"` does, `"</think>2"` and a thought that never ends do not.
    """
    thought, closed, _ = text.rpartition("</think>")
    return bool(closed) and bool(thought.strip().removeprefix("<think>").strip())


def count_words(text: str, words: Sequence[str] = REFLECTION_WORDS) -> dict[str, int]:
    """How often each word occurs as a whole word, whatever its case: `"Wait, waiting"` counts `wait` once."""
    counts = dict.fromkeys(words, 0)
    if not counts:
        return counts
    by_lower = {word.lower(): word for word in words}
    for found in _pattern(tuple(words)).findall(text):
        counts[by_lower[found.lower()]] += 1
    return counts


@lru_cache(maxsize=16)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, so that of two words that begin alike the longer one is found.
    ordered = sorted(words, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?!\w)", re.IGNORECASE)


def _check(groups: Sequence[RolloutGroup]) -> int:
    """The number of samples per problem, after refusing what has no honest number."""
    if not groups:
        raise ValueError("no groups to evaluate")
    samples = len(groups[0].rollouts)
    seen: set[str] = set()
    for group in groups:
        group.require_complete("evaluation")
        if len(group.rollouts) != samples or not samples:
            raise ValueError(
                f"problem {group.problem.id} has {len(group.rollouts)} samples, the first one has {samples}: "
                "every problem needs the same number, at least one"
            )
        if group.problem.id in seen:
            raise ValueError(f"problem {group.problem.id} occurs twice; each problem counts once")
        seen.add(group.problem.id)
    return samples


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
