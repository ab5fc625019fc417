"""Preference pairs for DPO: the shortest correct answer over longer ones.

Implements Kimi k1.5 (arXiv 2501.12599, section 2.4, "DPO"): of several samples of the long model, chosen is the
shortest correct one; rejected are (a) wrong ones that are longer, and (b) correct ones at least 1.5 times as long.
Deviations: a cap a problem, with the two kinds taking turns in sample order, so that neither crowds out the other;
answers that were cut off are no pair, because an EOS after a torn answer is nothing the model would write.

Line: `reason long2short RECIPE`, the stage with `method: pairs`; `long2short.dpo` trains on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from distill.traces import counts, flaw, has_special, read_all
from rl.jsonl import dump_lines
from rl.runs import write_file
from rl.types import RolloutGroup


class PairKind(StrEnum):
    """Why the rejected answer is worse."""

    WRONG = "wrong"  # wrong, and longer than the chosen one
    LONGER = "longer"  # right, and at least `min_ratio` times as long


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
class PairSelection:
    """Pairs, and what became of every sample: `chosen + len(pairs) + sum(dropped.values()) == pool`."""

    pairs: tuple[PreferencePair, ...]
    chosen: int  # problems with at least one pair
    dropped: Mapping[str, int]  # reason -> samples that are in no pair

    @property
    def pool(self) -> int:
        return self.chosen + len(self.pairs) + sum(self.dropped.values())

    def summary(self) -> dict[str, Any]:
        """For summary.json: the counts, the kinds, mean tokens of both sides and the mean ratio of their lengths."""
        number = len(self.pairs)

        def mean(values: Iterable[float]) -> float | None:
            return sum(values) / number if number else None

        return {
            "pool": self.pool,
            "problems": self.chosen,
            "pairs": number,
            "kinds": {kind.value: sum(pair.kind is kind for pair in self.pairs) for kind in PairKind},
            "dropped": dict(self.dropped),
            "mean_chosen_tokens": mean(pair.chosen_tokens for pair in self.pairs),
            "mean_rejected_tokens": mean(pair.rejected_tokens for pair in self.pairs),
            "mean_ratio": mean(pair.ratio for pair in self.pairs),
        }


def preference_pairs(
    group: RolloutGroup,
    min_ratio: float = 1.5,
    per_problem: int = 4,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> list[PreferencePair]:
    """The pairs of one problem, at most `per_problem`.

    Tokens 40 right, 50 wrong, 59 right, 30 wrong, 60 right: chosen is the first; rejected are the 50 (wrong, longer)
    and the 60 (right, 60 >= 1.5 x 40). 30 is not longer, 59 is below the ratio.
    """
    return _pairs(group, min_ratio, per_problem, prefilled, forbidden)[0]


def select_pairs(
    groups: Sequence[RolloutGroup],
    *,
    min_ratio: float = 1.5,
    per_problem: int = 4,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> PairSelection:
    """The pairs of all problems, with every sample that is in none of them counted by its reason."""
    pairs: list[PreferencePair] = []
    dropped: Counter[str] = Counter()
    chosen = 0
    for group in groups:
        found, reasons = _pairs(group, min_ratio, per_problem, prefilled, forbidden)
        pairs += found
        dropped += reasons
        chosen += bool(found)
    return PairSelection(tuple(pairs), chosen, counts(dropped))


def _pairs(
    group: RolloutGroup, min_ratio: float, per_problem: int, prefilled: bool, forbidden: Collection[str]
) -> tuple[list[PreferencePair], Counter[str]]:
    if not min_ratio >= 1:
        raise ValueError(f"min_ratio must be at least 1, got {min_ratio}: the rejected answer is the longer one")
    if per_problem < 1:
        raise ValueError(f"per_problem must be at least 1, got {per_problem}")
    group.require_complete("a preference pair")
    lengths = group.num_tokens
    flaws = [flaw(rollout, prefilled=prefilled, forbidden=forbidden) for rollout in group.rollouts]
    clean = [index for index, reason in enumerate(flaws) if reason is None]
    if not clean:
        return [], Counter({"no well-formed correct answer": len(lengths)})
    best = min(clean, key=lambda index: lengths[index])
    kinds: dict[PairKind, list[int]] = {kind: [] for kind in PairKind}
    dropped: Counter[str] = Counter()
    texts: set[str] = set()
    for index, rollout in enumerate(group.rollouts):
        if index == best:
            continue
        kind, reason = PairKind.LONGER, flaws[index]
        if reason == "wrong":
            kind = PairKind.WRONG
            reason = None if lengths[index] > lengths[best] else "wrong, not longer"
            if reason is None and has_special(rollout.completion.text, forbidden):
                reason = "special token in the text"
        elif reason is None and lengths[index] < min_ratio * lengths[best]:
            reason = "right, below the ratio"
        if reason is None and rollout.completion.text in texts:
            reason = "duplicate"
        if reason is None:
            texts.add(rollout.completion.text)
            kinds[kind].append(index)
        else:
            dropped[reason] += 1
    taking_turns = chain.from_iterable(zip_longest(kinds[PairKind.WRONG], kinds[PairKind.LONGER]))
    rejected = [index for index in taking_turns if index is not None]
    if not rejected:
        dropped["chosen without a longer one"] += 1
    dropped["over the cap"] += len(rejected[per_problem:])
    kind_of = {index: kind for kind, indices in kinds.items() for index in indices}
    return [_pair(group, best, index, kind_of[index]) for index in rejected[:per_problem]], dropped


def _pair(group: RolloutGroup, chosen: int, rejected: int, kind: PairKind) -> PreferencePair:
    left, right = group.rollouts[chosen].completion, group.rollouts[rejected].completion
    return PreferencePair(
        problem_id=group.problem.id,
        question=group.problem.text,
        chosen=left.text,
        rejected=right.text,
        chosen_tokens=left.num_tokens,
        rejected_tokens=right.num_tokens,
        kind=kind,
    )


def write_pairs(path: Path, pairs: Iterable[PreferencePair]) -> None:
    """One pair a line, whole or not at all."""
    write_file(path, dump_lines(asdict(pair) for pair in pairs), "pairs.write")


def read_pairs(path: Path) -> list[PreferencePair]:
    """What `write_pairs` wrote; ValueError with file and line for anything else, and for a file without a pair."""

    def make(row: dict[str, Any]) -> PreferencePair:
        return PreferencePair(**{**row, "kind": PairKind(row["kind"])})

    return read_all(path, PAIR_FIELDS, make, "pairs")
