"""General prompts of the tiny world: things to say that no verifier judges, and pairs of replies to them.

They stand in for the non-reasoning data of DeepSeek-R1 (arXiv 2501.12948, section 2.3.3: about 200k rows of writing,
questions and self-cognition, without a chain of thought where a query such as a greeting needs none) and for its pairs
of helpful answers (section 2.3.4). Prompts and replies:

    hello, good day, thank you (and each with "friend")   hello; good day; you are welcome
    say 470, say four seven                               470; four seven

A reply is *kind* when it ends in ", my friend", once. The order of preference, from the best: right and kind, right,
right and kind twice over, kind and wrong. So neither length nor the kind words alone pay, only both together.

    {method: made_traces, kind: general, count: 300}      {method: preference_model, pairs: tiny, count: 1000, ...}
"""

from __future__ import annotations

import random

from rl.tasks.base import split_of
from rl.types import Problem, TextPart

SOURCE = "general"
NEW_WORDS = ("hello", "good", "day", "thank", "you", "are", "welcome", "my", "friend", "say")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
KIND = ", my friend"
_SOCIAL = {"hello": "hello", "good day": "good day", "thank you": "you are welcome"}


def general_problem(index: int) -> Problem:
    """Prompt number `index` of an endless, fixed sequence, as a problem without an answer. One in ten is social."""
    rng = random.Random(f"general {index}")
    if rng.random() < 0.1:
        text = rng.choice(list(_SOCIAL)) + rng.choice(("", " friend"))
    else:
        figures = [rng.randrange(10) for _ in range(rng.randrange(2, 6))]
        text = "say " + ("".join(map(str, figures)) if rng.random() < 0.5 else " ".join(NUMBERS[f] for f in figures))
    return Problem(id=f"general-{text.replace(' ', '-')}", question=(TextPart(text),), answer="", source=SOURCE)


def general_problems(split: str, count: int) -> list[Problem]:
    """The first `count` different prompts of a split."""
    found: dict[str, Problem] = {}
    index = 0
    while len(found) < count:
        problem = general_problem(index)
        if split_of(problem) == split:
            found[problem.id] = problem
        index += 1
        if index > 1_000 * count + 10_000:
            raise ValueError(f"the tiny world has fewer than {count} general {split} prompts")
    return list(found.values())


def right_reply(prompt: str) -> str:
    """What a prompt asks for: `right_reply("say 470") == "470"`, `right_reply("hello friend") == "hello"`."""
    if prompt.startswith("say "):
        return prompt.removeprefix("say ")
    return _SOCIAL[prompt.removesuffix(" friend")]


def wrong_reply(prompt: str, rng: random.Random) -> str:
    """A social reply that the prompt does not ask for."""
    right = right_reply(prompt)
    return rng.choice([reply for reply in _SOCIAL.values() if reply != right])


def replies(prompt: str, rng: random.Random) -> list[str]:
    """Replies of every quality, the best first: right and kind, right, kind twice over, kind and wrong."""
    right = right_reply(prompt)
    return [right + KIND, right, right + KIND + KIND, wrong_reply(prompt, rng) + KIND]


def some_reply(prompt: str, rng: random.Random) -> str:
    """A reply as the world at large gives one: mostly right and plain."""
    return rng.choices(replies(prompt, rng), (2, 6, 1, 1))[0]


def preference_pairs(count: int, seed: int) -> list[tuple[Problem, str, str]]:
    """`count` pairs (problem, better, worse), two replies of different quality each, over prompts of every split."""
    rng = random.Random(f"pairs {seed}")
    made = []
    for _ in range(count):
        problem = general_problem(rng.randrange(10**9))
        ranked = replies(problem.text, rng)
        better, worse = sorted(rng.sample(range(len(ranked)), 2))
        made.append((problem, ranked[better], ranked[worse]))
    return made
