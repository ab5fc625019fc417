"""Rejection sampling into traces: what of a teacher's samples a student learns from.

Implements the data selection of DeepSeek-R1 (arXiv 2501.12948, section 2.3.3 and the distillation of 2.4): sample
several completions a prompt, keep the correct ones, drop what is cut off or malformed. Deviations: no language-mixing
or long-paragraph filters, because the verifier's tasks are not prose; a cap a problem, so that easy problems do not
crowd out hard ones.

Everything that is not kept is counted under one reason, and kept plus dropped is the pool. Traces are text, not token
ids, since the student's tokenizer may differ.

Line: `reason distill RECIPE`, the stage with `method: traces`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rl.jsonl import dump_lines, read_rows
from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.runs import write_file
from rl.samplers.base import sample_seed
from rl.types import FinishReason, Outcome, Rollout, RolloutGroup

TRACE_FIELDS = {"problem_id": str, "question": str, "text": str, "num_tokens": int, "teacher": str}


@dataclass(frozen=True, slots=True)
class Trace:
    """One completion to learn from.

    Example: `Trace("tiny-9f2c41", "47*3+08", "47*3=41; 41+08=49; </think>49", 17, "teacher-0a1b2c3d")`
    """

    problem_id: str
    question: str  # the problem's text, without the prompt suffix
    text: str  # the completion without EOS; the template's `<think>` is in the prompt, not here
    num_tokens: int  # in the teacher's tokens, EOS included
    teacher: str  # which model wrote it


@dataclass(frozen=True, slots=True)
class TraceSelection:
    """Traces, and what became of every sample of the pool: `kept + sum(dropped.values()) == pool`."""

    traces: tuple[Trace, ...]
    dropped: Mapping[str, int]  # reason -> samples

    @property
    def kept(self) -> int:
        return len(self.traces)

    @property
    def pool(self) -> int:
        return self.kept + sum(self.dropped.values())

    def summary(self) -> dict[str, Any]:
        """For summary.json: samples in the pool, kept, dropped by reason, problems with a trace, mean tokens kept."""
        tokens = [trace.num_tokens for trace in self.traces]
        return {
            "pool": self.pool,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "problems": len({trace.problem_id for trace in self.traces}),
            "mean_tokens": sum(tokens) / len(tokens) if tokens else None,
        }


def flaw(rollout: Rollout, min_tokens: int = 0, prefilled: bool = True, forbidden: Collection[str] = ()) -> str | None:
    """Why this completion is nothing to learn from, or None. The first of: how it ended, its verdict, its form.

    `prefilled`: the template's generation prompt ends in `<think>`, so the text holds exactly one `</think>` and no
    `<think>`; otherwise it opens with its own. `forbidden`: strings of special tokens, which would not be text to the
    student. Example: text `"4=4</think>"` has the flaw "empty answer".
    """
    finish = rollout.completion.finish_reason
    if finish is not FinishReason.STOP:
        return {
            FinishReason.LENGTH: "truncated",
            FinishReason.REPETITION: "repetition",
            FinishReason.ABORTED: "aborted",
        }[finish]
    if not rollout.right:
        return "wrong" if rollout.verdict.outcome is Outcome.WRONG else "undecided"
    text = rollout.completion.text
    opened = 0 if prefilled else 1
    head, closed, answer = text.partition(THINK_CLOSE)
    if text.count(THINK_OPEN) != opened or (opened and not head.lstrip().startswith(THINK_OPEN)):
        return "malformed think"
    if not closed or THINK_CLOSE in answer:
        return "malformed think"
    if not answer.strip():
        return "empty answer"
    if has_special(text, forbidden):
        return "special token in the text"
    if rollout.num_tokens < min_tokens:
        return "too short"
    return None


def has_special(text: str, forbidden: Collection[str]) -> bool:
    """Whether one of the strings of special tokens is in the text; the think tags are part of every trace."""
    return any(string in text for string in forbidden if string not in (THINK_OPEN, THINK_CLOSE))


def keep_correct(
    group: RolloutGroup, min_tokens: int = 0, prefilled: bool = True, forbidden: Collection[str] = ()
) -> tuple[list[int], Counter[str]]:
    """The sample indices of a group worth learning from, and how many fell to each reason.

    Completions: right, right and equal to the first, wrong, right but truncated -> `[0]` and
    `{"duplicate": 1, "wrong": 1, "truncated": 1}`. ValueError for a group with aborted samples.
    """
    group.require_complete("trace selection")
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    texts: set[str] = set()
    for index, rollout in enumerate(group.rollouts):
        reason = flaw(rollout, min_tokens, prefilled, forbidden)
        if reason is None and rollout.completion.text in texts:
            reason = "duplicate"
        if reason is None:
            kept.append(index)
            texts.add(rollout.completion.text)
        else:
            dropped[reason] += 1
    return kept, dropped


def select_traces(
    groups: Sequence[RolloutGroup],
    *,
    teacher: str,
    seed: int,
    per_problem: int = 4,
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> TraceSelection:
    """At most `per_problem` correct traces a problem, drawn at random by (`seed`, problem id); the rest is counted.

    The draw does not depend on the other problems. With 6 correct, distinct completions of 8 and a cap of 4:
    4 traces, `{"wrong": 2, "over the cap": 2}`.
    """
    if per_problem < 1:
        raise ValueError(f"per_problem must be at least 1, got {per_problem}")
    traces: list[Trace] = []
    dropped: Counter[str] = Counter()
    for group in groups:
        kept, reasons = keep_correct(group, min_tokens, prefilled, forbidden)
        dropped += reasons
        if len(kept) > per_problem:
            dropped["over the cap"] += len(kept) - per_problem
            rng = random.Random(sample_seed(seed, "traces", group.problem.id))
            kept = sorted(rng.sample(kept, per_problem))
        traces += [make_trace(group, index, teacher) for index in kept]
    return TraceSelection(tuple(traces), counts(dropped))


def make_trace(group: RolloutGroup, sample: int, teacher: str) -> Trace:
    """Sample number `sample` of a group as a trace."""
    completion = group.rollouts[sample].completion
    return Trace(group.problem.id, group.problem.text, completion.text, completion.num_tokens, teacher)


def counts(counter: Counter[str]) -> Mapping[str, int]:
    """A counter as a fixed mapping, most frequent reason first, ties by name."""
    ordered = sorted(((name, count) for name, count in counter.items() if count), key=lambda item: (-item[1], item[0]))
    return MappingProxyType(dict(ordered))


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """One trace a line, whole or not at all."""
    write_file(path, dump_lines(asdict(trace) for trace in traces), "traces.write")


def read_traces(path: Path) -> list[Trace]:
    """What `write_traces` wrote; ValueError with file and line for anything else, and for a file without a trace."""
    return read_all(path, TRACE_FIELDS, lambda row: Trace(**row), "traces")


def read_all(path: Path, fields: Mapping[str, type], make: Callable[[dict[str, Any]], Any], what: str) -> list[Any]:
    """All rows of a strict JSON lines file as values of `make`, at least one."""
    values = []
    for place, row in read_rows(path, fields):
        try:
            values.append(make(row))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not values:
        raise ValueError(f"{path} holds no {what}: nothing to train on")
    return values
