"""Mathematics: right if the marked answer equals the reference, in whatever exact form it is written.

The answer is read by us: after the last `</think>`, the last balanced `\\boxed{...}`, else the last `<answer>` tag,
else what stands after the last `####` (rl/tasks/extraction.py). A fallback may be given for models that mark nothing.
What equals what is written down in rl/tasks/math_equal.py; math-verify 0.9.0 only decides on single expressions, in
worker processes that are killed when they hang (rl/workers.py). Plain numbers are compared here, without a worker.

A hang or a crash of the verifier is undecided, never wrong. So is a reference answer that cannot be read, which
`require_golds` refuses before anything is sampled.

    task = math_task()
    task.judge([(problem, completion)])   # [Verdict(Outcome.RIGHT)]
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from rl.problems import BadProblems
from rl.tasks.base import REFLECTION_WORDS, Attempt, Task
from rl.tasks.extraction import final_part, marked_answer, no_answer_reason
from rl.tasks.math_equal import MAX_ANSWER
from rl.tasks.math_text import as_rational, clean
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Verdict
from rl.workers import Answer, WorkerPool, python_worker

SECONDS = 5.0  # for one comparison; an ordinary one takes a few milliseconds
VERSION = "math-1"

# Where an answer stands in a completion that marks none: from the text after the last </think>, or None.
Fallback = Callable[[str], str | None]


def no_fallback(text: str) -> str | None:
    """An answer that is not marked is none: what RL should be trained with."""
    return None


def last_number(text: str) -> str | None:
    """The last number, as few-shot GSM8K has it: `last_number("so 1,080 pens in 3 boxes.") == "3"`."""
    found = re.findall(r"-?(?:\$\s?)?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?", text)
    return found[-1] if found else None


def last_formula(text: str) -> str | None:
    """The last formula between dollars, else the last line: `last_formula("so $x=2$ or $y=3$.") == "y=3"`."""
    found = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", text, re.DOTALL)
    if found:
        return next(group for group in found[-1] if group)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


FALLBACKS: dict[str, Fallback] = {"none": no_fallback, "number": last_number, "formula": last_formula}


@dataclass(frozen=True, slots=True)
class MathJudge:
    """The judge of the math task: a `Judge` with its pool of workers."""

    pool: WorkerPool
    fallback: Fallback = no_fallback

    def __call__(self, attempts: Sequence[Attempt]) -> list[Verdict]:
        """One verdict an attempt. Equal answers to one problem are compared once."""
        found: dict[int, Verdict] = {}
        waiting: dict[tuple[str, str, str], list[int]] = {}
        for index, (problem, completion) in enumerate(attempts):
            answer = self.extract(completion)
            verdict = _quick(problem, completion, answer)
            if verdict is not None:
                found[index] = verdict
            else:
                assert answer is not None
                waiting.setdefault((problem.answer, answer, problem.text), []).append(index)
        asked = [{"gold": gold, "answer": answer, "question": text} for gold, answer, text in waiting]
        for (gold, answer, _), indices, reply in zip(waiting, waiting.values(), self.pool.ask(asked), strict=True):
            verdict = _verdict(reply, gold, answer)
            found |= {
                index: verdict if place == 0 else replace(verdict, seconds=0.0) for place, index in enumerate(indices)
            }
        return [found[index] for index in range(len(attempts))]

    def extract(self, completion: Completion) -> str | None:
        """The answer that a completion gives, None if it gives none."""
        answer = marked_answer(completion)
        if answer is None and completion.finish_reason is FinishReason.STOP:
            rest = final_part(completion.text)
            answer = None if rest is None else self.fallback(rest)
        return answer or None

    def unreadable(self, golds: Sequence[str]) -> list[int]:
        """Which of these reference answers cannot be compared with anything."""
        kinds = [gold for gold in dict.fromkeys(golds) if plain_number(gold) is None]
        replies = self.pool.ask([{"gold": gold} for gold in kinds])
        bad = {
            gold for gold, reply in zip(kinds, replies, strict=True) if reply.failure is not None or not reply.value[0]
        }
        return [index for index, gold in enumerate(golds) if gold in bad]


def _quick(problem: Problem, completion: Completion, answer: str | None) -> Verdict | None:
    """What needs no worker: no answer, an absurd one, two plain numbers."""
    if answer is None:
        return Verdict(Outcome.WRONG, no_answer_reason(completion))
    if len(answer) > MAX_ANSWER:
        return Verdict(Outcome.WRONG, f"an answer of {len(answer):,} characters is none")
    gold, given = plain_number(problem.answer), plain_number(answer)
    if gold is None or given is None:
        return None
    return Verdict(Outcome.RIGHT) if gold == given else _wrong(problem.answer, answer)


def plain_number(text: str) -> Fraction | None:
    """A number that stands for itself, as an exact fraction; None for everything that a rule could read otherwise."""
    text = text.strip()
    return as_rational(clean(text)) if len(text) <= 40 and re.fullmatch(r"\$?-?[0-9./\\frac{} ]+\$?", text) else None


def _verdict(reply: Answer, gold: str, answer: str) -> Verdict:
    if reply.failure is not None:
        return replace(Verdict.undecided(reply.failure, f"{reply.reason}, on {answer[:80]!r}"), seconds=reply.seconds)
    readable, equal = reply.value
    if not readable:
        verdict = Verdict.undecided(JudgeFailure.UNPARSEABLE_GOLD, f"the reference {gold[:80]!r} cannot be read")
    else:
        verdict = Verdict(Outcome.RIGHT) if equal else _wrong(gold, answer)
    return replace(verdict, seconds=reply.seconds)


def _wrong(gold: str, answer: str) -> Verdict:
    return Verdict(Outcome.WRONG, f"answered {answer[:80]!r}, expected {gold[:80]!r}")


def math_judge(workers: int | None = None, timeout: float = SECONDS, fallback: Fallback = no_fallback) -> MathJudge:
    """A judge with workers of its own; they start when it is first asked."""
    count = workers or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)
    spawn = python_worker("rl.tasks.math_worker", str(timeout + 0.5))
    return MathJudge(WorkerPool(spawn, workers=count, timeout=timeout), fallback)


def math_task(judge: MathJudge | None = None) -> Task:
    """The task "math", by a judge of its own or the given one."""
    judge = judge or math_judge()
    name = next(name for name, fallback in FALLBACKS.items() if fallback is judge.fallback)

    def answer_of(text: str) -> str | None:
        """For majority votes: plain numbers as fractions, everything else in one spelling."""
        answer = judge.extract(Completion(text, (), (), FinishReason.STOP))
        if answer is None:
            return None
        spelled = clean(answer)
        number = as_rational(spelled)
        return str(number) if number is not None else re.sub(r"\s", "", spelled) or None

    version = VERSION if name == "none" else f"{VERSION}-{name}"
    return Task("math", judge, answer_of, version, REFLECTION_WORDS)


def math_verify_task(judge: MathJudge) -> Task:
    """math-verify by itself on the text after `</think>`, as a second opinion for audits; never to train on."""

    def judge_alone(attempts: Sequence[Attempt]) -> list[Verdict]:
        texts = [final_part(completion.text) or "" for _, completion in attempts]
        asked = [{"gold": p.answer, "text": text[:20_000]} for (p, _), text in zip(attempts, texts, strict=True)]
        replies = judge.pool.ask(asked)
        return [
            _verdict(reply, problem.answer, text[-80:])
            for reply, (problem, _), text in zip(replies, attempts, texts, strict=True)
        ]

    return Task("math-verify", judge_alone, math_task(judge).answer_of, "math-verify-0.9.0", REFLECTION_WORDS)


def require_golds(judge: MathJudge, path: str, problems: Sequence[Problem]) -> None:
    """Refuse problems whose reference answer cannot be compared with anything: BadProblems names every line."""
    bad = judge.unreadable([problem.answer for problem in problems])
    if bad:
        rows = [(int(problems[i].source.rpartition(":")[2] or 0), problems[i].answer) for i in bad]
        raise BadProblems(
            path, [(line, f"the reference answer {gold[:60]!r} cannot be read as mathematics") for line, gold in rows]
        )
