"""Rejection sampling into traces: what of a teacher's samples a student learns from.

Implements the data selection of DeepSeek-R1 (arXiv 2501.12948, section 2.3.3 and the distillation of 2.4): sample
several completions a prompt, keep the correct ones, drop what is cut off or malformed, and what a filter finds
(distill/filters.py). Deviations: a cap a problem, so that easy problems do not crowd out hard ones; how its traces are
chosen is a function (distill/selection.py); caps a level and a source.

Everything that is not kept is counted under one reason, and kept plus dropped is the pool. Traces are text, not token
ids, since the student's tokenizer may differ.

Line: `reason distill RECIPE`, the stage with `method: traces`.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from distill.filters import TextFilter, first_reason
from distill.selection import Chooser, at_random
from rl.jsonl import dump_lines, read_rows
from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.rewards import says_something
from rl.runs import write_file
from rl.samplers.base import sample_seed
from rl.sources import is_hub_source
from rl.types import FinishReason, Outcome, Rollout, RolloutGroup

TRACE_FIELDS = {"problem_id": str, "question": str, "text": str, "num_tokens": int, "teacher": str}
ORIGIN_FIELDS = {"source": str, "level": int}  # left out of a file where there is nothing to say


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
    source: str = ""  # the data set of the problem, see `source_name`
    level: int | None = None  # its difficulty, if it has one

    @property
    def thinks(self) -> bool:
        """Whether a thought precedes the answer: not so in rows that teach something else than reasoning."""
        head, closed, _ = self.text.partition(THINK_CLOSE)
        return bool(closed) and says_something(head.replace(THINK_OPEN, ""))


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
    student. A thought without a letter or a digit is empty, as it is to `rl.rewards.FormatReward`: it would teach not
    to think. Example: text `"4=4</think>"` has the flaw "empty answer", `"</think>4"` "empty thought".
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
    if not says_something(head.replace(THINK_OPEN, "")):
        return "empty thought"
    if has_special(text, forbidden):
        return "special token in the text"
    if rollout.num_tokens < min_tokens:
        return "too short"
    return None


def has_special(text: str, forbidden: Collection[str]) -> bool:
    """Whether one of the strings of special tokens is in the text; the think tags are part of every trace."""
    return any(string in text for string in forbidden if string not in (THINK_OPEN, THINK_CLOSE))


def keep_correct(
    group: RolloutGroup,
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
    filters: Sequence[TextFilter] = (),
) -> tuple[list[int], Counter[str]]:
    """The sample indices of a group worth learning from, and how many fell to each reason.

    `filters` are asked about what has no flaw, in order; the first reason counts.

    Completions: right, right and equal to the first, wrong, right but truncated -> `[0]` and
    `{"duplicate": 1, "wrong": 1, "truncated": 1}`. ValueError for a group with aborted samples.
    """
    group.require_complete("trace selection")
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    texts: set[str] = set()
    for index, rollout in enumerate(group.rollouts):
        reason = flaw(rollout, min_tokens, prefilled, forbidden)
        if reason is None:
            reason = first_reason(filters, group.problem.text, rollout.completion.text)
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
    per_problem: int | None = 4,
    choose: Chooser = at_random,
    filters: Sequence[TextFilter] = (),
    per_level: int | None = None,
    per_source: int | None = None,
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> TraceSelection:
    """At most `per_problem` correct traces a problem (None: all of them), as `choose` chooses; the rest is counted.

    After that at most `per_level` traces of problems of one level and `per_source` of one source stay, drawn at random
    by `seed`. With 6 correct, distinct completions of 8 and a cap of 4: 4 traces, `{"wrong": 2, "over the cap": 2}`.

    Errors: ValueError for a cap below 1, for a cap a level where a problem has none, and for aborted samples.
    """
    caps = {"per_problem": per_problem, "per_level": per_level, "per_source": per_source}
    for name, cap in caps.items():
        if cap is not None and cap < 1:
            raise ValueError(f"{name} must be at least 1, got {cap}")
    dropped: Counter[str] = Counter()
    worthy: list[RolloutGroup] = []  # each with nothing but what is worth learning from
    for group in groups:
        kept, reasons = keep_correct(group, min_tokens, prefilled, forbidden, filters)
        dropped += reasons
        worthy.append(replace(group, rollouts=tuple(group.rollouts[index] for index in kept)))
    if per_problem is not None:
        crowded = [place for place, group in enumerate(worthy) if len(group.rollouts) > per_problem]
        chosen = choose([worthy[place] for place in crowded], per_problem, seed) if crowded else []
        for place, samples in zip(crowded, chosen, strict=True):
            group = worthy[place]
            dropped["over the cap"] += len(group.rollouts) - len(samples)
            worthy[place] = replace(group, rollouts=tuple(group.rollouts[index] for index in samples))
    traces = [make_trace(group, index, teacher) for group in worthy for index in range(len(group.rollouts))]
    for what, cap, kind_of in (("level", per_level, _level_of), ("source", per_source, _source_of)):
        if cap is not None:
            fitting = _capped(traces, kind_of, cap, seed, what)
            dropped[f"over the cap of its {what}"] += len(traces) - len(fitting)
            traces = fitting
    return TraceSelection(tuple(traces), counts(dropped))


def _capped(traces: Sequence[Trace], kind_of: Callable[[Trace], object], cap: int, seed: int, what: str) -> list[Trace]:
    """At most `cap` traces of a kind, drawn by (`seed`, `what`, kind); the order stays."""
    kinds: defaultdict[object, list[int]] = defaultdict(list)
    for place, trace in enumerate(traces):
        kinds[kind_of(trace)].append(place)
    kept: set[int] = set()
    for kind, places in kinds.items():
        rng = random.Random(sample_seed(seed, what, kind))
        kept.update(places if len(places) <= cap else rng.sample(places, cap))
    return [trace for place, trace in enumerate(traces) if place in kept]


def _level_of(trace: Trace) -> int:
    if trace.level is None:
        raise ValueError(f"per_level needs problems with levels, and problem {trace.problem_id} has none: remove it")
    return trace.level


def _source_of(trace: Trace) -> str:
    return trace.source


def source_name(source: str) -> str:
    """The data set in a problem's `source`, without its line and without folders, which are this machine's affair.

    `source_name("/data/gsm8k.jsonl:17") == "gsm8k.jsonl"`, `source_name("openai/gsm8k/main:train:17") ==
    "openai/gsm8k/main:train"`, `source_name("tiny") == "tiny"`
    """
    name = re.sub(r":[0-9]+$", "", source)
    return name if is_hub_source(name) else Path(name).name


def make_trace(group: RolloutGroup, sample: int, teacher: str) -> Trace:
    """Sample number `sample` of a group as a trace."""
    completion, problem = group.rollouts[sample].completion, group.problem
    source = source_name(problem.source)
    return Trace(problem.id, problem.text, completion.text, completion.num_tokens, teacher, source, problem.level)


def counts(counter: Counter[str]) -> Mapping[str, int]:
    """A counter as a fixed mapping, most frequent reason first, ties by name."""
    ordered = sorted(((name, count) for name, count in counter.items() if count), key=lambda item: (-item[1], item[0]))
    return MappingProxyType(dict(ordered))


def write_traces(path: Path, traces: Iterable[Trace]) -> None:
    """One trace a line, whole or not at all."""
    rows = (asdict(trace) for trace in traces)
    said = (
        {name: value for name, value in row.items() if value not in ("", None) or name in TRACE_FIELDS} for row in rows
    )
    write_file(path, dump_lines(said), "traces.write")


def read_traces(path: Path) -> list[Trace]:
    """What `write_traces` wrote; ValueError with file and line for anything else, and for a file without a trace."""
    return read_all(path, TRACE_FIELDS, lambda row: Trace(**row), "traces", ORIGIN_FIELDS)


def read_all(
    path: Path,
    fields: Mapping[str, type],
    make: Callable[[dict[str, Any]], Any],
    what: str,
    optional: Mapping[str, type] = MappingProxyType({}),
) -> list[Any]:
    """All rows of a strict JSON lines file as values of `make`, at least one."""
    values = []
    for place, row in read_rows(path, fields, optional):
        try:
            values.append(make(row))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not values:
        raise ValueError(f"{path} holds no {what}: nothing to train on")
    return values
