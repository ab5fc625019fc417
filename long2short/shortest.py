"""Shortest rejection sampling: sample a question n times, fine-tune on the shortest correct answer.

Implements Kimi k1.5 (arXiv 2501.12599, section 2.4, "shortest rejection sampling"; n = 8), followed by `distill.sft`.
Deviations, all off by default: the k shortest instead of one; guards against lucky guesses (`long2short.lucky_guesses`)
and a least number of tokens, because the shortest correct of n is where guesses collect; answers cut at their first
correct solution before they are compared (`long2short.first_solution`). Answers must also be well formed
(`distill.traces.flaw`).

Groups with aborted samples are welcome here and nowhere else: once a correct answer has ended, longer rollouts that
were stopped cannot be the shortest.

Merge with rejection sampling (the same section's "merge + rs") needs nothing of its own: a merged model is sampled as
any other, and what it gets right is kept. Before `sft`, `method: shortest` keeps the shortest, `method: traces` any:

    merged: {method: merge, long: teacher, short: ./models/tiny-short, weight: 0.5}
    merged-pool: {method: sample, model: merged, samples: 8}
    merged-shortest: {method: shortest, pool: merged-pool, samples: 8, min_right: 2}
    merge-rs: {method: sft, model: merged, traces: merged-shortest, max_length: 192}

Line: `reason long2short RECIPE`, the stage with `method: shortest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from distill.traces import Trace, TraceSelection, counts, flaw, make_trace
from long2short.lucky_guesses import AnswerOf as AnswerOf  # racing knows it from here
from long2short.lucky_guesses import Guard
from rl.types import RolloutGroup


def shortest_correct(
    group: RolloutGroup,
    *,
    teacher: str = "",
    guards: Sequence[Guard] = (),
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> Trace | None:
    """The correct completion with the fewest tokens as a trace, or None. Ties go to the lowest sample index.

    Tokens 40 right, 25 wrong, 31 right, 31 right -> sample 2. With `guards` that refuse it, the next one they let pass.
    """
    picked, _ = _pick(group, 1, guards, min_tokens, prefilled, forbidden)
    return make_trace(group, picked[0], teacher) if picked else None


def select_shortest(
    groups: Sequence[RolloutGroup],
    *,
    teacher: str,
    samples: int = 8,
    per_problem: int = 1,
    guards: Sequence[Guard] = (),
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> TraceSelection:
    """The `per_problem` shortest correct of the first `samples` completions of each problem, the shortest first; the
    others are counted by reason.

    Every sample is kept or dropped once: a group of 8 with tokens 40 right, 31 right and 6 wrong gives one trace and
    `{"wrong": 6, "longer than the shortest": 1}`; with `per_problem=2` it gives two, 31 before 40.
    """
    for name, value in (("samples", samples), ("per_problem", per_problem)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    traces: list[Trace] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        if len(group.rollouts) < samples:
            raise ValueError(
                f"problem {group.problem.id} has {len(group.rollouts)} samples, the shortest of {samples} was asked for"
            )
        first = RolloutGroup(group.problem, group.prompt_ids, group.rollouts[:samples])
        picked, reasons = _pick(first, per_problem, guards, min_tokens, prefilled, forbidden)
        dropped += reasons
        traces += [make_trace(first, index, teacher) for index in picked]
    return TraceSelection(tuple(traces), counts(dropped))


def _pick(
    group: RolloutGroup,
    most: int,
    guards: Sequence[Guard],
    min_tokens: int,
    prefilled: bool,
    forbidden: Collection[str],
) -> tuple[list[int], Counter[str]]:
    dropped: Counter[str] = Counter()
    fit: list[int] = []
    for index, rollout in enumerate(group.rollouts):
        reason = flaw(rollout, min_tokens, prefilled, forbidden)
        reason = reason or next((why for guard in guards if (why := guard(group, index)) is not None), None)
        if reason is None:
            fit.append(index)
        else:
            dropped[reason] += 1
    picked: list[int] = []
    texts: set[str] = set()
    for index in sorted(fit, key=lambda place: group.rollouts[place].num_tokens):
        text = group.rollouts[index].completion.text
        if len(picked) == most:
            dropped["longer than the shortest"] += 1
        elif text in texts:
            dropped["duplicate"] += 1
        else:
            picked.append(index)
            texts.add(text)
    return picked, dropped
