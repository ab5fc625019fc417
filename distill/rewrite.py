"""Cold start: worked solutions rewritten into the think template, as traces for SFT.

After the cold start of DeepSeek-R1 (arXiv 2501.12948, section 2.3.1): before RL the model sees some solutions in the
form that RL will reward. There they are long, made by a model and edited by people; here they are the short ones that
come with a problem set (GSM8K, arXiv 2110.14168), as they are but for the calculator marks. So this teaches the form
and hardly any reasoning.

A solution of GSM8K, `Ann sold 48/2 = <<48/2=24>>24 clips.` with the answer 24, becomes

    <think>
    Ann sold 48/2 = 24 clips.
    </think>
    \\boxed{24}

Line: `reason distill RECIPE`, the stage with `method: worked_solutions`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from distill.traces import Trace, TraceSelection, counts, has_special
from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.tasks.base import split_of
from rl.types import Problem

TEACHER = "worked solutions"
_MARK = re.compile(r"<<[^<>\n]*>>")


def without_marks(solution: str) -> str | None:
    """The solution without GSM8K's calculator marks, None if a broken one is left.

    `without_marks("48/2 = <<48/2=24>>24") == "48/2 = 24"`, `without_marks("48/2 = <<48/2=24") is None`
    """
    plain = _MARK.sub("", solution)
    return None if "<<" in plain or ">>" in plain else plain


def think_text(solution: str, answer: str, prefilled: bool) -> str:
    """A completion that thinks the solution and boxes the answer. `prefilled`: the template opens `<think>`.

    `think_text("1+1 = 2", "2", prefilled=True) == "1+1 = 2\\n</think>\\n\\\\boxed{2}"`; else "<think>\\n" comes first.
    """
    opening = "" if prefilled else f"{THINK_OPEN}\n"
    return f"{opening}{solution.strip()}\n{THINK_CLOSE}\n\\boxed{{{answer}}}"


def rewrite_solutions(
    solved: Sequence[tuple[Problem, str]],
    *,
    count_tokens: Callable[[str], int],
    prefilled: bool,
    forbidden: Collection[str] = (),
    count: int | None = None,
) -> TraceSelection:
    """A trace for each problem of the train split that has a worked solution, at most `count` of them, in order.

    `count_tokens`: how many tokens a text has, EOS left out. `forbidden`: strings of special tokens. Everything that is
    no trace is counted under its reason, and kept plus dropped is the number of problems.
    """
    traces: list[Trace] = []
    dropped: Counter[str] = Counter()
    for problem, solution in solved:
        plain = without_marks(solution)
        reason = _flaw(problem, solution, plain, forbidden)
        if reason is None and count is not None and len(traces) == count:
            reason = "over the count"
        if reason is not None or plain is None:
            dropped[str(reason)] += 1
            continue
        text = think_text(plain, problem.answer, prefilled)
        traces.append(Trace(problem.id, problem.text, text, count_tokens(text) + 1, TEACHER))
    return TraceSelection(tuple(traces), counts(dropped))


def _flaw(problem: Problem, solution: str, plain: str | None, forbidden: Collection[str]) -> str | None:
    """Why a solution makes no trace, or None."""
    if not solution:
        return "no worked solution"
    if split_of(problem) != "train":
        return "not in the train split"
    if plain is None:
        return "broken calculator mark"
    if THINK_OPEN in plain or THINK_CLOSE in plain or has_special(plain, forbidden):
        return "special token in the text"
    return None
