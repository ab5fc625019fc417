"""Traces from elsewhere enter a pool, as a model's own samples do, and are verified there before anything reads them.

A completion is matched with the problem it answers by the text of its question (ids of two data sets may be equal and
mean nothing), and judged by the task of the recipe: what its authors said of it does not count. So a wrong one can
never be a trace, selection and filters are those of any pool (`method: traces`), and `reason pool show / export /
check` read it.

Deviations from a sampled pool, told in its address (`native`): token ids and lengths are those of a named tokenizer,
which need not be the author's; log-probs are zeros, since nobody here has drawn these tokens; problems have
unequally many samples, and those without one are left out (`pool_groups_as_they_are`).

Line: `reason distill RECIPE`, the stage with `method: import_traces`; or `reason pool import`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.foreign import ForeignTrace, Unusable
from distill.traces import Trace, has_special
from rl.pool import Pool, pool_address
from rl.problems import BadProblems
from rl.prompts import THINK_CLOSE, THINK_OPEN, render_prompt, render_text
from rl.samplers.base import SamplingSettings
from rl.tasks.base import Task
from rl.tasks.extraction import final_part
from rl.types import Completion, FinishReason, Outcome, Problem, RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD = 512  # samples
EXAMPLES = 5  # of what was not matched, in the summary
UNMATCHED = "no such problem"
EMPTY = "empty"


def import_traces(
    folder: Path,
    rows: Iterable[ForeignTrace | Unusable],
    *,
    teacher: str,
    origin: Mapping[str, Any],
    problems: Sequence[Problem],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    suffix: str = "",
    strip: Sequence[str] = (),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Fill the pool in `folder` with the rows that answer one of `problems`, judge it, and say what became of them.

    `teacher` is the name of who wrote them, `origin` says where they are from (JSON values, part of the address).
    `strip`: instructions that stand before or behind the questions there and not here. Killed and called again with
    the same arguments, it goes on.

    Returns the summary: rows = imported + the sum of "left out"; and right, wrong, undecided of the imported ones.

    Errors: ValueError where no row answers a problem, with what was looked for; BadProblems from reading the rows;
    RunLocked, PoolFull and the judge's errors as in `rl.pool.fill_pool`.
    """
    ids = {problem.id: problem for problem in problems}
    texts = {_plain(problem.text): problem for problem in problems}
    tail = opened(tokenizer)
    samples: defaultdict[str, list[Completion]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    strangers: list[dict[str, Any]] = []
    read = 0
    for row in rows:
        read += 1
        if isinstance(row, Unusable):
            left_out[row.reason] += 1
            continue
        problem = texts.get(_plain(_stripped(row.question, strip)))
        if problem is None:
            left_out[UNMATCHED] += 1
            if len(strangers) < EXAMPLES:
                strangers.append({"row": row.row, "question": row.question[:200]})
            continue
        text = for_template(row.text, tail)
        if not text.strip():
            left_out[EMPTY] += 1
            continue
        samples[problem.id].append(_completion(text, row.finish, tokenizer))
    if not samples:
        looked = strangers[0]["question"] if strangers else "nothing"
        raise ValueError(
            f"none of the {read} rows answers one of the {len(problems)} problems: a question there begins "
            f"{looked[:80]!r}, one here {problems[0].text[:80]!r}; name instructions that stand there with strip"
        )
    longest = max(completion.num_tokens for completions in samples.values() for completion in completions)
    address = pool_address(
        f"imported: {teacher}", problems, tokenizer, SamplingSettings(max_tokens=longest), seed, suffix,
        native={"imported": dict(origin)},
    )  # fmt: skip
    pool = Pool.open(folder, address)
    wanted = [(ids[name], index) for name in ids for index in range(len(samples.get(name, ())))]
    with pool.writing():
        there = set(pool.keys_in_order())
        lacking = [(problem, index) for problem, index in wanted if (problem.id, index) not in there]
        prompts = {problem.id: render_prompt(tokenizer, problem, suffix) for problem, _ in lacking}
        for start in range(0, len(lacking), SHARD):
            pool.add_shard(
                [
                    (problem, index, prompts[problem.id], samples[problem.id][index])
                    for problem, index in lacking[start : start + SHARD]
                ]
            )
            progress(min(start + SHARD, len(lacking)), len(lacking))
        pool.judge(problems, task)
    outcomes = Counter(verdict.outcome for verdict in pool.verdicts(task.verifier_version).values())
    return {
        "rows": read,
        "imported": len(wanted),
        "left out": dict(sorted(left_out.items())),
        "unmatched_examples": strangers,
        "problems": len(problems),
        "problems_with_traces": len(samples),
        "outcomes": {str(outcome): outcomes[outcome] for outcome in Outcome},
        "finish_reasons": dict(sorted(Counter(str(c.finish_reason) for cs in samples.values() for c in cs).items())),
        "tokens": sum(c.num_tokens for cs in samples.values() for c in cs),
    }


def pool_groups_as_they_are(pool: Pool, problems: Sequence[Problem], verifier_version: str) -> list[RolloutGroup]:
    """The judged groups of a pool whose problems have unequally many samples, without the problems that have none.

    For selection, which looks at each sample by itself. A statistic over such groups would be biased: `Pool.groups`
    refuses them.
    """
    held = Counter(problem for problem, _ in pool.keys_in_order())
    by_size: defaultdict[int, list[Problem]] = defaultdict(list)
    for problem in problems:
        if held[problem.id]:
            by_size[held[problem.id]].append(problem)
    found = {
        group.problem.id: group
        for size, alike in by_size.items()
        for group in pool.groups(alike, verifier_version, size)
    }
    return [found[problem.id] for problem in problems if problem.id in found]


def opened(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a template writes behind the `<think>` that it opens, mostly a newline; None where it opens none."""
    prompt = render_text(tokenizer, Problem(id="probe", question=(), answer=""))
    stem = prompt.rstrip()
    return prompt[len(stem) :] if stem.endswith(THINK_OPEN) else None


def plain_traces(
    rows: Iterable[ForeignTrace | Unusable],
    *,
    source: str,
    teacher: str,
    tail: str | None,
    count_tokens: Callable[[str], int],
    forbidden: Collection[str] = (),
) -> list[Trace]:
    """Rows that teach something else than reasoning, as traces; nobody verifies them.

    `tail` is what `opened` says of the student's template. Where it opens `<think>` a row without a thought closes it
    at once, as Qwen3 writes what needs none: "4" becomes "\\n</think>\\n\\n4" with the tail "\\n", "</think>4" with
    the tail "".

    Errors: BadProblems, naming every row (20 of them) that cannot be used as it is: cut off, without an answer, with
    several turns or special tokens.
    """
    found: list[Trace] = []
    bad: list[tuple[int, str]] = []
    for row in rows:
        reason = row.reason if isinstance(row, Unusable) else _defect(row, forbidden)
        if reason is not None:
            bad.append((row.row, reason))
        elif isinstance(row, ForeignTrace):
            text = for_template(row.text, tail)
            if tail is not None and THINK_CLOSE not in text:
                text = f"{tail}{THINK_CLOSE}{tail * 2}{text}"
            identity = f"{source}-{sha256(row.question.encode()).hexdigest()[:16]}"
            found.append(Trace(identity, row.question, text, count_tokens(text), teacher, source))
    if bad or not found:
        raise BadProblems(source, bad or [(0, "is empty: expected one prompt and response a row")])
    return found


def _defect(row: ForeignTrace, forbidden: Collection[str]) -> str | None:
    answer = final_part(row.text)
    if row.finish is not FinishReason.STOP:
        return f"ended by {row.finish}"
    if not row.question.strip() or answer is None or not answer.strip():
        return "has no question or no answer"
    return "has a special token in its text" if has_special(row.text, forbidden) else None


def for_template(text: str, tail: str | None) -> str:
    """A text with think tags as a model of this template would write it: without what the prompt has written already.

    `for_template("<think>\\na</think>4", "\\n") == "a</think>4"`, `for_template("<think>a</think>4", None)` stays.
    """
    if tail is None or not text.lstrip().startswith(THINK_OPEN):
        return text
    return text.lstrip().removeprefix(THINK_OPEN).removeprefix(tail)


def _completion(text: str, finish: FinishReason, tokenizer: PreTrainedTokenizerBase) -> Completion:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if finish is FinishReason.STOP and isinstance(eos, int):
        ids.append(eos)
    return Completion(text, tuple(ids), (0.0,) * len(ids), finish)


def _stripped(question: str, strip: Sequence[str]) -> str:
    for instruction in strip:
        question = question.strip().removeprefix(instruction.strip()).removesuffix(instruction.strip())
    return question


def _plain(text: str) -> str:
    """A question as it is compared: in Unicode's composed form, any white space as one space. Signs and brackets stay,
    since other ones make another question."""
    return " ".join(unicodedata.normalize("NFC", text).split())
