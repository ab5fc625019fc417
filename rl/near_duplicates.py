"""Problems that repeat each other in other words: MinHash to find candidates, their exact similarity to decide.

Similarity is the Jaccard index of the pairs of neighbouring words, each counted as often as it stands there: common
pairs over all pairs. "a b c d" and "a b c e" share 2 of 4: 0.5. Candidates come from MinHash with banding (Broder 1997;
datasketch): 126 hashes in 42 bands of 3 make a pair of similarity s a candidate with chance 1 - (1 - s^3)^42, .996 for
s = .5 and .9999 for s = .6. What is compared after that is the words themselves.

When are two problems one? In MAWPS, whose parts repeat each other in other words, numbers tell more than words do:

* Another number makes another problem. "Tom has 3 boxes of 6 pens" and "Tom has 9 boxes of 2 pens" have one answer and
  nearly all words in common; of 445 repetitions that common words and a common answer find there, 87 are such. So two
  problems must hold the same numbers (1 is not counted: "one fish" is often "a fish").
* With the same numbers and the same answer, half of the pairs in common are enough (`similarity` = .5).
* With the same numbers and other answers two problems mostly ask for two things ("How many red ones?", "How many blue
  ones?"), unless hardly a word differs (`other_answer` = .95) and no sign. Then one of the answers is likely to be
  wrong, and `Duplicate.answers_disagree` says so.

`numbers_matter=False` takes any number for any other: one problem stays of each template. Every problem is then a
candidate, at about 25 kB of memory; else only those are whose numbers some other problem has.

Duplicates of duplicates are one cluster, of which the first problem is kept: the order is an order of preference.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from rl.decontamination import words_of
from rl.tasks.exact import equal
from rl.types import Problem

BANDS, ROWS = 42, 3
_NUMBER_WORDS: dict[str, str] = dict(zip(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    map(str, range(13)), strict=True,
))  # fmt: skip

Shingles = frozenset[tuple[str, str, int]]  # two neighbouring words, and the how-manieth such pair it is


@dataclass(frozen=True, slots=True)
class DuplicateRule:
    """When two problems are one; see the module's text."""

    similarity: float = 0.5  # from which problems with equal answers are one
    other_answer: float = 0.95  # from which problems with other answers are one, if their formulas are the same
    numbers_matter: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.similarity <= self.other_answer <= 1:
            raise ValueError(f"a duplicate rule needs 0 < similarity <= other_answer <= 1, got {self}")


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A problem that repeats an earlier one.

    `link` is the pair that put it into the cluster of `kept`, in order: mostly (`kept`, `problem`) itself, else one of
    the problems that stand between them.
    """

    problem: Problem
    kept: Problem
    link: tuple[Problem, Problem]
    similarity: float  # of the two of `link`

    @property
    def answers_disagree(self) -> bool:
        return not equal(self.problem.answer, self.kept.answer)


def near_duplicates(
    problems: Sequence[Problem],
    rule: DuplicateRule | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Duplicate]:
    """The problems that repeat an earlier one, in order; all others may be kept."""
    from datasketch import MinHash, MinHashLSH

    rule = DuplicateRule() if rule is None else rule
    numbers = [_numbers(_words(problem, rule)) if rule.numbers_matter else "" for problem in problems]
    sharing = Counter(numbers)
    wanted = [index for index, held in enumerate(numbers) if sharing[held] > 1]
    shingles = {index: _shingles(_words(problems[index], rule)) for index in wanted}
    # The numbers are part of what is hashed: a thousand problems of one template do not share their buckets.
    hashed = ([f"{numbers[index]} {shingle}".encode() for shingle in shingles[index]] for index in wanted)
    buckets = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    clusters = _Clusters(len(problems))
    for done, (index, minhash) in enumerate(
        zip(wanted, MinHash.generator(hashed, num_perm=BANDS * ROWS), strict=True), 1
    ):
        for other in sorted(cast(list[int], buckets.query(minhash))):
            if numbers[other] == numbers[index] and not clusters.joined(other, index):
                similarity = _similarity(shingles[other], shingles[index])
                if similarity >= rule.similarity and _one(problems[other], problems[index], similarity, rule):
                    clusters.join(other, index, similarity)
        buckets.insert(index, minhash)
        progress(done, len(wanted))
    return [
        Duplicate(problems[index], problems[first], (problems[link[0]], problems[link[1]]), similarity)
        for index, first, link, similarity in clusters.members()
    ]


def _one(first: Problem, second: Problem, similarity: float, rule: DuplicateRule) -> bool:
    """Whether two problems that are similar, and hold the same numbers where these matter, are one."""
    if equal(first.answer, second.answer):
        return True
    return similarity >= rule.other_answer and _formulas(first, rule) == _formulas(second, rule)


def _formulas(problem: Problem, rule: DuplicateRule) -> str:
    """Digits and signs in order, brackets too: "(2 + 3) * 4" and "2 + (3 * 4)" are one text to `words_of`."""
    signs = re.sub(r"[\sA-Za-z.,;:?!'\"$]", "", problem.text)
    return signs if rule.numbers_matter else re.sub(r"[0-9]+", "0", signs)


def _words(problem: Problem, rule: DuplicateRule) -> list[str]:
    words = [_canonical(_NUMBER_WORDS.get(word, word)) for word in words_of(problem.text)]
    return words if rule.numbers_matter else ["0" if word[0].isdigit() else word for word in words]


def _numbers(words: Sequence[str]) -> str:
    """`_numbers(["1", "fish", "34.5", "2"]) == "2 34.5"`"""
    return " ".join(sorted(word for word in words if word[0].isdigit() and word != "1"))


def _shingles(words: Sequence[str]) -> Shingles:
    """The pairs of neighbours; a text of one word is a pair with nothing, so that it equals itself."""
    pairs = Counter(pairwise(words if len(words) > 1 else [*words, "", ""][:2]))
    return frozenset((*pair, number) for pair, count in pairs.items() for number in range(count))


def _canonical(word: str) -> str:
    """`_canonical("007.50") == "7.5"`; words stay."""
    if not word[0].isdigit():
        return word
    whole, _, part = word.partition(".")
    return re.sub(r"\.$", "", f"{whole.lstrip('0') or '0'}.{part.rstrip('0')}")


def _similarity(first: Shingles, second: Shingles) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)


class _Clusters:
    """Union-find over 0 .. count - 1. The root of a cluster is its smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))
        self._links: dict[int, tuple[tuple[int, int], float]] = {}  # what has a parent -> the pair that gave it one

    def joined(self, first: int, second: int) -> bool:
        return self._root(first) == self._root(second)

    def join(self, first: int, second: int, similarity: float) -> None:
        low, high = sorted((self._root(first), self._root(second)))
        self._parent[high] = low
        self._links[high] = ((first, second), similarity)

    def members(self) -> Iterator[tuple[int, int, tuple[int, int], float]]:
        """(member, root, link, similarity) of all but the roots, in order."""
        for member, (link, similarity) in sorted(self._links.items()):
            yield member, self._root(member), link, similarity

    def _root(self, member: int) -> int:
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]  # halve the path
            member = self._parent[member]
        return member
