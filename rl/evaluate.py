"""From judged groups to the numbers of the frontier: accuracy, votes, tokens, truncation, loops, with intervals.

Rules, stated once:

* A problem is the unit. Accuracy is avg@k; intervals resample problems (see `rl.stats`).
* An undecided verdict means that the judge failed. Such a sample leaves every number about right and wrong, and is
  counted in `undecided`; its length is still a length, so it stays in the token statistics over all completions.
* A truncated completion without an answer is wrong, and `truncated` counts it apart.
* A group with aborted samples is refused: its lengths are censored.
* Length is completion tokens with thought, answer and EOS, in the evaluated model's own tokenizer.
* A problem counts as solved by the majority if more than half of its decided samples are right, by any if one is. That
  needs verdicts only; maj@k, the vote over answers, needs to know which answers are alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rl import stats
from rl.stats import SHARE, SHARE_DIFFERENCE, Estimate, SignTest, TokenStats
from rl.tasks.base import REFLECTION_WORDS, Task
from rl.think_stats import thought_counter
from rl.types import Completion, FinishReason, Rollout, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    pass_at: tuple[tuple[int, float], ...]  # (j, unbiased pass@j), j = 1, 2, 4, .. up to k
    g_pass_at_k: float | None  # G-Pass@k at tau = 1: all k right; None as for pass@k
    mg_pass_at_k: float | None  # the mean of G-Pass@k over tau in (1/2, 1], see `mean_g_pass`
    tokens: TokenStats  # all completions
    tokens_right: TokenStats | None  # None if nothing is right
    tokens_wrong: TokenStats | None
    tokens_per_correct: float | None  # tokens of all decided completions over the number of right ones
    think_tokens: TokenStats | None  # of the thoughts, all completions; None where the tokenizer was not at hand
    answer_tokens: TokenStats | None  # of what follows them
    truncated: float  # share that ran out of tokens
    loops: float  # share that ended in a loop, see `ends_in_loop`
    think_share: float  # share that thought before answering, see `thinks`
    reflection_words: tuple[tuple[str, float], ...]  # (word, occurrences per completion)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json(to_json())` is the same summary."""
        lists = {name: [list(pair) for pair in getattr(self, name)] for name in ("pass_at", "reflection_words")}
        return {**asdict(self), **lists}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EvalSummary:
        """ValueError for the summary of another version of `reason`, which has other keys."""
        require_keys(cls, data, "a summary")
        split = ("tokens_right", "tokens_wrong", "think_tokens", "answer_tokens")
        converted = {
            "accuracy": Estimate.from_json(data["accuracy"]),
            "tokens": TokenStats.from_json(data["tokens"]),
            **{name: None if data[name] is None else TokenStats.from_json(data[name]) for name in split},
            **{name: tuple((key, value) for key, value in data[name]) for name in ("pass_at", "reflection_words")},
        }
        return cls(**{**data, **converted})


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A model minus its parent on the same problems, each with a paired 95 % interval over problems.

    Example: accuracy -0.01 [-0.02, 0.00], tokens -38.1 [-39.5, -36.8], tokens_relative -0.58 [-0.60, -0.57]; of 400
    problems 12 went up and 18 down, p = 0.36.
    """

    num_problems: int  # with a decided sample on both sides
    accuracy: Estimate  # avg@k minus the parent's avg@k
    tokens: Estimate  # mean tokens minus the parent's
    tokens_relative: Estimate  # mean tokens over the parent's, minus 1
    both_right: int  # problems that both solved at least once
    tokens_both_right: Estimate | None  # on these, tokens of right completions over the parent's, minus 1
    truncated: Estimate  # share that ran out of tokens minus the parent's
    accuracy_signs: SignTest  # of the problems' accuracies: up is better than the parent
    tokens_signs: SignTest  # of their mean tokens: up is longer
    only_any: tuple[int, int]  # problems with a right sample here and none at the parent's, and the other way round
    only_majority: tuple[int, int]  # problems solved by the majority here and not at the parent's, and the other way

    def to_json(self) -> dict[str, Any]:
        lists = {name: list(getattr(self, name)) for name in ("only_any", "only_majority")}
        return {**asdict(self), **lists}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PairedDifference:
        """ValueError for a difference that another version of `reason` wrote."""
        require_keys(cls, data, "a paired difference")
        both = data["tokens_both_right"]
        converted = {
            **{name: Estimate.from_json(data[name]) for name in ("accuracy", "tokens", "tokens_relative", "truncated")},
            "tokens_both_right": None if both is None else Estimate.from_json(both),
            **{name: SignTest.from_json(data[name]) for name in ("accuracy_signs", "tokens_signs")},
            **{name: tuple(data[name]) for name in ("only_any", "only_majority")},
        }
        return cls(**{**data, **converted})


def require_keys(kind: type, data: Any, what: str) -> None:
    """Refuse JSON that does not have exactly the fields of a dataclass."""
    names = {field.name for field in fields(kind)}
    if not isinstance(data, dict) or data.keys() != names:
        odd = sorted(names ^ set(data)) if isinstance(data, dict) else sorted(names)
        raise ValueError(
            f"{what} was written by another version of reason: its keys differ in {', '.join(odd)}; remove the folder "
            "it is in and run the same command, which computes it again from the samples"
        )


def summarize(
    groups: Sequence[RolloutGroup], task: Task, tokenizer: PreTrainedTokenizerBase | None = None
) -> EvalSummary:
    """Every headline number of one model. `groups` are its judged problems, k samples each; with its `tokenizer` the
    tokens are divided into thought and answer.

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
    thought = answer = None
    if tokenizer is not None:
        counted = thought_counter(tokenizer)
        thoughts = [[counted(rollout.completion) for rollout in group.rollouts] for group in groups]
        thought = stats.lengths(thoughts)
        answer = stats.lengths(
            [
                [whole - part for whole, part in zip(group.num_tokens, parts, strict=True)]
                for group, parts in zip(groups, thoughts, strict=True)
            ]
        )
    words = task.reflection_words or REFLECTION_WORDS
    counts = [count_words(rollout.completion.text, words) for rollout in rollouts]
    passes = [(k, stats.mean_pass_at_k(right, k)) for k in powers_of_two(samples)]
    return EvalSummary(
        num_problems=len(groups),
        samples=samples,
        undecided=len(rollouts) - sum(map(len, right)),
        accuracy=stats.bootstrap_mean(stats.shares(right), bounds=SHARE),
        maj_at_k=stats.maj_at_k(answers, right),
        pass_at_k=stats.mean_pass_at_k(right, samples),
        pass_at=tuple((k, value) for k, value in passes if value is not None),
        g_pass_at_k=stats.mean_g_pass_at_k(right, samples, 1.0),
        mg_pass_at_k=mean_g_pass(right, samples),
        tokens=tokens,
        tokens_right=stats.lengths([[r.num_tokens for r in kept if r.right] for kept in decided]),
        tokens_wrong=stats.lengths([[r.num_tokens for r in kept if not r.right] for kept in decided]),
        tokens_per_correct=stats.tokens_per_correct([[r.num_tokens for r in kept] for kept in decided], right),
        think_tokens=thought,
        answer_tokens=answer,
        truncated=_share([r.completion.finish_reason is FinishReason.LENGTH for r in rollouts]),
        loops=_share([ends_in_loop(r.completion) for r in rollouts]),
        think_share=_share([thinks(r.completion.text) for r in rollouts]),
        reflection_words=tuple((word, sum(count[word] for count in counts) / len(counts)) for word in words),
    )


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, .. and `most` itself: `powers_of_two(6) == [1, 2, 4, 6]`"""
    return sorted({2**i for i in range(most.bit_length())} | {most})


def mean_g_pass(right: Sequence[Sequence[bool]], k: int) -> float | None:
    """mG-Pass@k, the mean of G-Pass@k_tau over the upper half of tau: 2/k times the sum over tau = i/k from
    i = k/2 (rounded up) + 1 to k (2412.13147, equation 4); None as for pass@k.

    With an odd k these are fewer than k/2 terms, so that k right of k are below 1; at k = 1 there is none, and it is
    pass@1. Example: one problem with 4 of 4 right: 2/4 (1 + 1) = 1.
    """
    steps = range(-(-k // 2) + 1, k + 1)
    if not steps:
        return stats.mean_pass_at_k(right, k)
    values = [stats.mean_g_pass_at_k(right, k, i / k) for i in steps]
    kept = [value for value in values if value is not None]
    return 2 / k * sum(kept) if kept else None


def compare(groups: Sequence[RolloutGroup], parent_groups: Sequence[RolloutGroup]) -> PairedDifference:
    """A model minus its parent, paired by problem: the same problems in any order, else an error that names one.

    Problems without a decided sample on both sides are left out. Both sides may have a different number of samples, but
    then "solved by any" favours the one with more.
    """
    pairs = paired(groups, parent_groups)
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    right = [[[r.right for r in decided_rollouts(group)] for group in side] for side in sides]
    accuracy, parent_accuracy = map(stats.shares, right)
    tokens, parent_tokens = ([sum(group.num_tokens) / len(group.rollouts) for group in side] for side in sides)
    truncated, parent_truncated = (
        [_share([r.completion.finish_reason is FinishReason.LENGTH for r in group.rollouts]) for group in side]
        for side in sides
    )
    both = [(one, other) for one, other in pairs if any(one.right) and any(other.right)]
    shorter = None
    if both:
        costs, parent_costs = ([_mean_right_tokens(pair[side]) for pair in both] for side in (0, 1))
        shorter = _relative(costs, parent_costs)
    return PairedDifference(
        num_problems=len(pairs),
        accuracy=stats.bootstrap_difference(accuracy, parent_accuracy, bounds=SHARE_DIFFERENCE),
        tokens=stats.bootstrap_difference(tokens, parent_tokens),
        tokens_relative=_relative(tokens, parent_tokens),
        both_right=len(both),
        tokens_both_right=shorter,
        truncated=stats.bootstrap_difference(truncated, parent_truncated, bounds=SHARE_DIFFERENCE),
        accuracy_signs=stats.sign_test(accuracy - parent_accuracy),
        tokens_signs=stats.sign_test([one - other for one, other in zip(tokens, parent_tokens, strict=True)]),
        only_any=_only(accuracy > 0, parent_accuracy > 0),
        only_majority=_only(accuracy > 0.5, parent_accuracy > 0.5),
    )


def paired(
    groups: Sequence[RolloutGroup], parent_groups: Sequence[RolloutGroup]
) -> list[tuple[RolloutGroup, RolloutGroup]]:
    """The problems that have a decided sample on both sides, by id, after refusing what cannot be paired."""
    _check(groups)
    _check(parent_groups)
    parents = {group.problem.id: group for group in parent_groups}
    unpaired = sorted({group.problem.id for group in groups} ^ set(parents))
    if unpaired:
        raise ValueError(
            f"a paired comparison needs the same problems on both sides; {len(unpaired)} are only on one, such as "
            f"{unpaired[0]}: evaluate both models on the same problem set"
        )
    ordered = sorted(groups, key=lambda group: group.problem.id)
    pairs = [(group, parents[group.problem.id]) for group in ordered]
    pairs = [(one, other) for one, other in pairs if decided_rollouts(one) and decided_rollouts(other)]
    if not pairs:
        raise ValueError("no problem has a decided sample on both sides, so there is nothing to compare")
    return pairs


def _relative(values: Sequence[float], parent: Sequence[float]) -> Estimate:
    ratio = stats.bootstrap_ratio(values, parent)
    return Estimate(ratio.value - 1, ratio.low - 1, ratio.high - 1)


def _mean_right_tokens(group: RolloutGroup) -> float:
    lengths = [rollout.num_tokens for rollout in group.rollouts if rollout.right]
    return sum(lengths) / len(lengths)


def _only(here: NDArray[np.bool_], there: NDArray[np.bool_]) -> tuple[int, int]:
    return int((here & ~there).sum()), int((there & ~here).sum())


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
