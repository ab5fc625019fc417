"""Preference pairs of one problem: the shortest right answer over longer ones, and a long right one over a short guess.

Implements

* Kimi k1.5 (arXiv 2501.12599, section 2.4, "DPO"): of several samples of the long model, chosen is the shortest right
  one; rejected are (a) wrong ones that are longer, and (b) right ones at least 1.5 times as long.
* SILC of Sky-T1-Flash (NovaSky, 2025; short incorrect, long correct), as its code has it: rejected is the shortest
  wrong sample, chosen the shortest right one that is longer. Pairs on length alone come from problems that are often
  right, so they shorten where the model is sure and lower its accuracy where it is not; SILC says that a longer right
  answer beats a guess.

Deviations: a cap a problem, with Kimi's two kinds taking turns in sample order, so that neither crowds out the other;
more than one SILC pair a problem where it is asked for. `min_tokens` and `min_right` guard against lucky guesses, as in
shortest rejection sampling: the shortest right sample of n is where guesses collect, and here it would be what the
model learns to prefer. Answers that were cut off are no pair, because an EOS after a torn answer is nothing the model
would write.

Line: `reason long2short RECIPE`, the stage with `method: pairs` (`long2short.pair_selection` for all problems);
`long2short.dpo` and `long2short.simpo` train on them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from distill.traces import flaw, has_special, read_all
from rl.jsonl import dump_lines
from rl.runs import write_file
from rl.types import RolloutGroup


class PairKind(StrEnum):
    """Why the rejected answer is worse."""

    WRONG = "wrong"  # wrong, and longer than the chosen one
    LONGER = "longer"  # right, and at least `min_ratio` times as long
    SHORT_WRONG = "short wrong"  # wrong, and shorter than the chosen one (SILC)


PAIR_FIELDS = {
    "problem_id": str,
    "question": str,
    "chosen": str,
    "rejected": str,
    "chosen_tokens": int,
    "rejected_tokens": int,
    "kind": str,
}


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one question. Texts are without EOS, token counts with it.

    Example: `PreferencePair("tiny-9f", "47*3+08", "</think>49", "47*3=41; </think>49", 4, 10, PairKind.LONGER)`
    """

    problem_id: str
    question: str
    chosen: str
    rejected: str
    chosen_tokens: int
    rejected_tokens: int
    kind: PairKind

    @property
    def ratio(self) -> float:
        """How many times as long the rejected answer is: 10 tokens against 4 are 2.5."""
        return self.rejected_tokens / self.chosen_tokens


@dataclass(frozen=True, slots=True)
class PairRules:
    """Which samples make pairs.

    Example: `PairRules(min_ratio=1.5, per_problem=4, silc=1)`: at most 4 pairs after Kimi and 1 after SILC a problem.
    """

    min_ratio: float = 1.5  # a right one is rejected when it is at least so many times as long as the chosen one
    per_problem: int = 4  # at most so many of Kimi's pairs
    silc: int = 0  # at most so many SILC pairs
    min_tokens: int = 0  # a shorter right sample is not chosen
    min_right: int = 1  # a problem with fewer right samples gives no pair
    prefilled: bool = True  # as in `distill.traces.flaw`
    forbidden: Collection[str] = ()

    def __post_init__(self) -> None:
        if not self.min_ratio >= 1:
            raise ValueError(f"min_ratio must be at least 1, got {self.min_ratio}: the rejected answer is the longer")
        if self.per_problem < 1:
            raise ValueError(f"per_problem must be at least 1, got {self.per_problem}")
        for name, least in (("silc", 0), ("min_tokens", 0), ("min_right", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair as sample indices of one group: `Candidate(0, 4, PairKind.LONGER)`."""

    chosen: int
    rejected: int
    kind: PairKind


def preference_pairs(group: RolloutGroup, min_ratio: float = 1.5, per_problem: int = 4) -> list[PreferencePair]:
    """Kimi's pairs of one problem, at most `per_problem`.

    Tokens 40 right, 50 wrong, 59 right, 30 wrong, 60 right: chosen is the first; rejected are the 50 (wrong, longer)
    and the 60 (right, 60 >= 1.5 x 40). 30 is not longer, 59 is below the ratio.
    """
    return [make_pair(group, one) for one in candidates(group, PairRules(min_ratio, per_problem))[0]]


def candidates(group: RolloutGroup, rules: PairRules) -> tuple[list[Candidate], dict[int, str]]:
    """The pairs of a group, Kimi's before SILC's, and why each sample that is in none of them is in none.

    The docstring example of `preference_pairs` with `silc=1` adds `Candidate(0, 3, PairKind.SHORT_WRONG)`: the 30 that
    is wrong is the shortest wrong sample, and the 40 the shortest right one beyond it.

    ValueError for a group with aborted samples.
    """
    group.require_complete("a preference pair")
    lengths = group.num_tokens
    reasons = {index: _unfit(group, index, rules) for index in range(len(lengths))}
    right = [index for index, reason in reasons.items() if reason is None and group.right[index]]
    wrong = [index for index, reason in reasons.items() if reason is None and not group.right[index]]
    if not right:
        return [], dict.fromkeys(reasons, "no well-formed correct answer")
    if sum(group.right) < rules.min_right:
        return [], dict.fromkeys(reasons, "too few right samples")
    brief = [index for index in right if lengths[index] < rules.min_tokens]
    reasons |= dict.fromkeys(brief, "right, too short to be chosen")
    right = [index for index in right if index not in brief]
    if not right:
        return [], {index: reason or "nothing to choose" for index, reason in reasons.items()}
    found, why = _kimi(group, right, wrong, rules)
    found += _silc(group, right, wrong, rules.silc)
    used = {index for one in found for index in (one.chosen, one.rejected)}
    return found, {index: reason or why[index] for index, reason in reasons.items() if index not in used}


def _unfit(group: RolloutGroup, index: int, rules: PairRules) -> str | None:
    """Why a sample may be in no pair at all, or None. A wrong one may be malformed: it is only ever rejected."""
    rollout = group.rollouts[index]
    reason = flaw(rollout, prefilled=rules.prefilled, forbidden=rules.forbidden)
    if reason != "wrong":
        return reason
    if not rollout.completion.text:
        return "empty text"
    return "special token in the text" if has_special(rollout.completion.text, rules.forbidden) else None


def _kimi(
    group: RolloutGroup, right: Sequence[int], wrong: Sequence[int], rules: PairRules
) -> tuple[list[Candidate], dict[int, str]]:
    """Kimi's pairs, and for every right or wrong sample that is not in them the reason."""
    lengths = group.num_tokens
    best = min(right, key=lambda index: lengths[index])
    kinds: dict[PairKind, list[Candidate]] = {PairKind.WRONG: [], PairKind.LONGER: []}
    why = {best: "chosen without a longer one"}
    texts = {group.rollouts[best].completion.text}
    for index in sorted({*right, *wrong} - {best}):
        kind = PairKind.LONGER if group.right[index] else PairKind.WRONG
        text = group.rollouts[index].completion.text
        if kind is PairKind.WRONG and lengths[index] <= lengths[best]:
            why[index] = "wrong, not longer"
        elif kind is PairKind.LONGER and lengths[index] / lengths[best] < rules.min_ratio:
            # A quotient, so that what was written is met: 55 / 50 is 1.1, but 1.1 * 50 is above 55.
            why[index] = "right, below the ratio"
        elif text in texts:
            why[index] = "duplicate"
        else:
            texts.add(text)
            kinds[kind].append(Candidate(best, index, kind))
            why[index] = "over the cap"
    taking_turns = chain.from_iterable(zip_longest(kinds[PairKind.WRONG], kinds[PairKind.LONGER]))
    return [one for one in taking_turns if one is not None][: rules.per_problem], why


def _silc(group: RolloutGroup, right: Sequence[int], wrong: Sequence[int], most: int) -> list[Candidate]:
    """SILC: the shortest wrong samples, each under the shortest right one that is longer; equal texts count once."""
    lengths = group.num_tokens
    found: list[Candidate] = []
    texts: set[str] = set()
    for index in sorted(wrong, key=lambda place: (lengths[place], place)):
        longer = [place for place in right if lengths[place] > lengths[index]]
        text = group.rollouts[index].completion.text
        if longer and text not in texts and len(found) < most:
            texts.add(text)
            found.append(Candidate(min(longer, key=lambda place: lengths[place]), index, PairKind.SHORT_WRONG))
    return found


def make_pair(group: RolloutGroup, candidate: Candidate) -> PreferencePair:
    """A candidate as a pair with its texts."""
    chosen, rejected = (group.rollouts[index].completion for index in (candidate.chosen, candidate.rejected))
    return PreferencePair(
        problem_id=group.problem.id,
        question=group.problem.text,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_tokens=chosen.num_tokens,
        rejected_tokens=rejected.num_tokens,
        kind=candidate.kind,
    )


def write_pairs(path: Path, pairs: Iterable[PreferencePair]) -> None:
    """One pair a line, whole or not at all."""
    write_file(path, dump_lines(asdict(pair) for pair in pairs), "pairs.write")


def read_pairs(path: Path) -> list[PreferencePair]:
    """What `write_pairs` wrote; ValueError with file and line for anything else, and for a file without a pair."""

    def make(row: dict[str, Any]) -> PreferencePair:
        return PreferencePair(**{**row, "kind": PairKind(row["kind"])})

    return read_all(path, PAIR_FIELDS, make, "pairs")
