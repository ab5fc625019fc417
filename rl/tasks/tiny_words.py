"""The tiny world in two notations, digits and number words, so that thoughts really mix their language.

DeepSeek-R1 (arXiv 2501.12948, section 2.2.4 of v1, "DeepSeek-R1-Zero ... language mixing", and 2.3.2) pays for thoughts
in the language of the question and filters traces that mix. The tiny world of `rl.tasks.tiny` has one way to write a
step; here it has two, and they are its languages:

    digits   47*3=41; 41+08=49; </think>49
    words    four seven times three is four one; four one plus zero eight is four nine; </think>49

A chain of operations is asked in one of them, by the hash of its text; the answer is always two digits, so the verifier
is blind to the notation. The base model's demonstrations write a share of their steps in the notation that the question
has not. `LANGUAGES` tells the notations apart, as `rl.language` does with natural languages: exactly, by the units of a
text (a digit, a sign, a number word). Words and digits cost the same number of tokens.

Beside arithmetic the world has general prompts (rl/tasks/tiny_general.py); `demonstrations` mixes a few of them in.

Recipe: `problems: {source: tiny, notations: both}`; `reason run r1-tiny`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

from rl.language import Languages
from rl.tasks import tiny
from rl.tasks.base import Task, split_of
from rl.tasks.tiny_general import NEW_WORDS, NUMBERS, general_problem, some_reply
from rl.types import Problem, TextPart

SPELLED = {
    **dict(zip("0123456789", NUMBERS, strict=True)),
    "+": "plus", "-": "minus", "*": "times", "=": "is",
}  # fmt: skip
_SIGN_OF = {word: sign for sign, word in SPELLED.items()}
_ANY_WORD = "|".join(_SIGN_OF)
_RUN_OF_SIGNS = re.compile(r"[0-9+*=-]+")
_RUN_OF_WORDS = re.compile(rf"\b(?:{_ANY_WORD})(?: (?:{_ANY_WORD}))*\b")
GENERAL_SHARE = 0.1  # of the demonstrations

# What the tokenizer of rl/tasks/tiny_models.py learns beside its own words, and the token that each starts as. A word
# is one token, alone and after a blank; a blank before digits is one as well.
NEW_TOKENS: dict[str, str] = {
    blank + word: sign
    for word, sign in [*_SIGN_OF.items(), *((word, "<|unk|>") for word in NEW_WORDS)]
    for blank in ("", " ")
} | {" ": "<|unk|>"}


def spell(text: str) -> str:
    """Digits and signs as words: `spell("47*3=41; ") == "four seven times three is four one; "`."""
    return _RUN_OF_SIGNS.sub(lambda run: " ".join(SPELLED[sign] for sign in run[0]), text)


def digits(text: str) -> str:
    """Number words as digits and signs, the inverse of `spell`: `digits("four times two is eight") == "4*2=8"`."""
    return _RUN_OF_WORDS.sub(lambda run: "".join(_SIGN_OF[word] for word in run[0].split(" ")), text)


# --- the notations as languages ---------------------------------------------------------------------------------------


def notation_share(text: str, target: str) -> float | None:
    """The share of a text's units that are in the notation `target`, "digits" or "words"; None for a text without any.

    `notation_share("47*3=41; four one", "digits") == 7 / 9`

    Errors: ValueError for another target.
    """
    if target not in LANGUAGES.known:
        raise ValueError(f"no notation {target[:40]!r}; known are {', '.join(sorted(LANGUAGES.known))}")
    units = {
        "digits": sum(map(len, _RUN_OF_SIGNS.findall(text))),
        "words": sum(len(run.split(" ")) for run in _RUN_OF_WORDS.findall(text)),
    }
    total = sum(units.values())
    return units[target] / total if total else None


def notation_of(text: str) -> str | None:
    """The notation of more than half of a text's units, or None: `notation_of("four plus two") == "words"`."""
    return next((known for known in ("digits", "words") if (notation_share(text, known) or 0) > 0.5), None)


LANGUAGES = Languages(notation_of, notation_share, frozenset({"digits", "words"}))


# --- problems ---------------------------------------------------------------------------------------------------------


def in_its_notation(problem: Problem) -> Problem:
    """A problem of the tiny world in the notation that the hash of its chain says: half of them become words."""
    if sha256(f"notation {problem.text}".encode()).digest()[0] % 2 == 0:
        return problem
    return replace(problem, id=f"{problem.id}-words", question=(TextPart(spell(problem.text)),))


def problems(split: str, count: int, levels: Sequence[int] = (2, 3, 4)) -> list[Problem]:
    """The problems of `rl.tasks.tiny.problems`, each in its notation. Splits are those of the chains, so no chain is in
    two splits in two notations."""
    return [in_its_notation(problem) for problem in tiny.problems(split, count, levels)]


TASK: Task = replace(tiny.TASK, name="tiny-words", verifier_version="tiny-words-1", languages=LANGUAGES)


# --- what the base model is pre-trained on ----------------------------------------------------------------------------


def mix_notations(text: str, notation: str, mixed: float, rng: random.Random) -> str:
    """A thought in digits, each step written in `notation` or, with probability `mixed`, in the other one.

    `mix_notations("47*3=41; </think>41", "words", 0.0, rng) == "four seven times three is four one; </think>41"`
    """
    thought, closed, answer = text.partition("</think>")
    steps = re.findall(r".+?(?:; |$)", thought)
    written = (spell(step) if (notation == "words") != (rng.random() < mixed) else step for step in steps)
    return "".join(written) + closed + answer


def demonstrate(problem: Problem, style: str, mixed: float, rng: random.Random) -> str:
    """One completion in a style of `rl.tasks.tiny.demonstrate`, for a problem in either notation."""
    plain = replace(problem, question=(TextPart(digits(problem.text)),))
    return mix_notations(tiny.demonstrate(plain, style, rng), notation_of(problem.text) or "digits", mixed, rng)


def demonstrations(
    styles: dict[str, float], levels: Sequence[int], seed: int, *, mixed: float
) -> Iterator[tuple[Problem, str]]:
    """An endless stream of (problem, completion) over train problems in both notations, and some general prompts with
    replies of every quality. `mixed`: the share of steps in the notation that the question has not."""
    rng = random.Random(seed)
    names, weights = list(styles), list(styles.values())
    while True:
        if rng.random() < GENERAL_SHARE:
            problem = general_problem(rng.randrange(10**9))
            if split_of(problem) == "train":
                yield problem, f"</think>{some_reply(problem.text, rng)}"
            continue
        chain = tiny.make_problem(rng.randrange(10**9), levels, seed="pretrain")
        if split_of(chain) == "train":
            problem = in_its_notation(chain)
            yield problem, demonstrate(problem, rng.choices(names, weights)[0], mixed, rng)
