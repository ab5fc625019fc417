"""The tiny world: left-to-right arithmetic modulo 100, with an exact verifier and a reason to think.

A problem is a chain such as `47*3+08-65`, worked from left to right, every result kept modulo 100 with two digits. A
completion of the base model comes in one of three styles (the prompt's template has already opened `<think>`):

    guess    </think>84                                                    shortest, often wrong
    plain    47*3=61; 61+08=69; 69-65=04; </think>04                       one recalled result a step: sometimes slips
    careful  47*3=61 wait 7*3=21, 4*3+2=14 so 41; ... </think>84           a step may be checked by working its digits

Why it has a bend. The world of the base model *misremembers* a fixed share of the facts (`recall`): for these operands
the recalled result has a fixed wrong tens digit, every time. Sharpening cannot remove such an error, because sampling
never shows the right result in a plain step; only working the digits (` wait ... so ..`) does, and it costs about 20
tokens. The share is large for multiplication, small for subtraction and zero for addition, so the cheapest correct
model checks the products and nothing else; a model that checks everything is right and long, one that checks nothing
is short and often wrong.

Levels are the number of operations. Problems are generated from a counter and split by the hash of their text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256

from rl.tasks.base import Task, one_by_one, split_of
from rl.types import Completion, Outcome, Problem, TextPart, Verdict

OPERATIONS = ("+", "-", "*")
# The share of facts that the base model's world misremembers, per operation.
MISREMEMBERED = {"+": 0.0, "-": 0.04, "*": 0.50}
# How often a careful demonstration checks a step: products more often than sums, as a person would, but not always.
CHECKED = {"+": 0.4, "-": 0.5, "*": 0.8}


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big")


def apply(left: int, operation: str, right: int) -> int:
    """The true result modulo 100: `apply(47, "*", 3) == 41`."""
    if operation == "+":
        return (left + right) % 100
    if operation == "-":
        return (left - right) % 100
    return (left * right) % 100


def recall(left: int, operation: str, right: int) -> int:
    """The result as the base model's world remembers it: for a fixed share of the facts, a fixed wrong tens digit."""
    true = apply(left, operation, right)
    fact = _hash(f"fact {left}{operation}{right}")
    if fact % 10_000 < MISREMEMBERED[operation] * 10_000:
        shift = 1 + (fact // 10_000) % 9
        return (true + 10 * shift) % 100
    return true


def working(left: int, operation: str, right: int) -> str:
    """The digits worked out; ends in the true result.

    `working(47, "*", 3) == "7*3=21, 4*3+2=14 so 41"`
    """
    tens, units = divmod(left, 10)
    if operation == "*":
        low = units * right
        carry, digit = divmod(low, 10)
        high = tens * right + carry
        return f"{units}*{right}={low:02d}, {tens}*{right}+{carry}={high:02d} so {high % 10}{digit}"
    other_tens, other_units = divmod(right, 10)
    if operation == "+":
        low = units + other_units
        carry, digit = divmod(low, 10)
        high = tens + other_tens + carry
        return f"{units}+{other_units}={low:02d}, {tens}+{other_tens}+{carry}={high:02d} so {high % 10}{digit}"
    borrow = int(units < other_units)
    low = units + 10 * borrow - other_units
    high = (tens - other_tens - borrow) % 10
    return f"{units}-{other_units}={low:02d}, {tens}-{other_tens}-{borrow}={high:02d} so {high}{low}"


def parse_question(question: str) -> tuple[int, list[tuple[str, int]]]:
    """`"47*3+08"` -> `(47, [("*", 3), ("+", 8)])`; ValueError for anything else."""
    if not re.fullmatch(r"\d\d(?:[+-]\d\d|\*\d)+", question):
        raise ValueError(f"not a tiny-world question: {question!r} (expected a chain such as 47*3+08)")
    steps = re.findall(r"([+*-])(\d+)", question)
    return int(question[:2]), [(operation, int(operand)) for operation, operand in steps]


def solve(question: str) -> str:
    """The true answer, two digits: `solve("47*3+08-65") == "84"`."""
    value, steps = parse_question(question)
    for operation, operand in steps:
        value = apply(value, operation, operand)
    return f"{value:02d}"


def make_problem(index: int, levels: Sequence[int], seed: str = "tiny") -> Problem:
    """Problem number `index` of an endless, fixed sequence over the given levels (numbers of operations)."""
    rng = random.Random(f"{seed} {index}")
    level = levels[rng.randrange(len(levels))]
    text = f"{rng.randrange(100):02d}"
    for _ in range(level):
        operation = OPERATIONS[rng.randrange(3)]
        text += f"*{rng.randrange(2, 10)}" if operation == "*" else f"{operation}{rng.randrange(100):02d}"
    return Problem(
        id=f"tiny-{_hash(text):016x}", question=(TextPart(text),), answer=solve(text), source="tiny", level=level
    )


def problems(split: str, count: int, levels: Sequence[int] = (2, 3, 4)) -> list[Problem]:
    """The first `count` distinct problems of a split ("train", "dev", "test"); splits are disjoint by construction."""
    found: dict[str, Problem] = {}
    index = 0
    while len(found) < count:
        problem = make_problem(index, levels)
        if split_of(problem) == split:
            found[problem.id] = problem
        index += 1
        if index > 1_000 * count + 10_000:
            raise ValueError(f"the tiny world has fewer than {count} {split} problems at levels {tuple(levels)}")
    return list(found.values())


def judge(problem: Problem, completion: Completion) -> Verdict:
    """Exact: the text after the last `</think>` must be the two-digit answer and nothing else."""
    _, closed, answer = completion.text.rpartition("</think>")
    if not closed:
        return Verdict(Outcome.WRONG, f"the thought never ended (finish reason {completion.finish_reason})")
    answer = answer.strip()
    if answer == problem.answer:
        return Verdict(Outcome.RIGHT)
    return Verdict(Outcome.WRONG, f"answered {answer[:20]!r}, expected {problem.answer!r}")


def answer_of(text: str) -> str | None:
    """The final answer a completion gives, for majority votes; None if it gives none."""
    _, closed, answer = text.rpartition("</think>")
    return answer.strip() if closed and answer.strip() else None


TASK = Task(
    name="tiny", judge=one_by_one(judge), answer_of=answer_of, verifier_version="tiny-1", reflection_words=("wait",)
)


# --- what the base model is pre-trained on -------------------------------------------------------------------------


def demonstrate(problem: Problem, style: str, rng: random.Random) -> str:
    """One completion in a style of the base model's world: "guess", "plain" or "careful" (each step checked with the
    probability that `CHECKED` gives its operation). Unchecked steps go on from the recalled, perhaps wrong, result."""
    value, steps = parse_question(problem.text)
    if style == "guess":
        return f"</think>{problem.answer}"
    text = ""
    for operation, operand in steps:
        shown = f"{operand}" if operation == "*" else f"{operand:02d}"
        recalled = recall(value, operation, operand)
        text += f"{value:02d}{operation}{shown}={recalled:02d}"
        if style == "careful" and rng.random() < CHECKED[operation]:
            text += f" wait {working(value, operation, operand)}"
            recalled = apply(value, operation, operand)
        text += "; "
        value = recalled
    return f"{text}</think>{value:02d}"


def demonstrations(styles: dict[str, float], levels: Sequence[int], seed: int) -> Iterator[tuple[Problem, str]]:
    """An endless stream of (problem, completion) over train problems, styles drawn with the given weights."""
    rng = random.Random(seed)
    names, weights = list(styles), list(styles.values())
    while True:
        problem = make_problem(rng.randrange(10**9), levels, seed="pretrain")
        if split_of(problem) != "train":
            continue
        yield problem, demonstrate(problem, rng.choices(names, weights)[0], rng)
