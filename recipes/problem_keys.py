"""What the `problems:` section of a recipe may be told: where problems come from and how their answers are judged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from recipes.keys import Count, Keys, Level, Share
from rl.tasks.puzzle_sets import PuzzlesRefused, look_up

TaskName = Literal["exact", "integers", "math", "code", "constraints", "choice", "judge"]
Column = Annotated[str, Field(min_length=1, max_length=200)]
Url = Annotated[str, Field(pattern=r"^https?://[^\s@]+$", max_length=500)]
Variable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


class ColumnKeys(Keys):
    """Which columns of the source hold what, where that is not seen from its first row."""

    question: Column
    """Column of the question."""
    answer: Column | None = None
    """Column of the reference answer; null takes the last box of the solution."""
    solution: Column | None = None
    """Column of the worked solution."""
    id: Column | None = None
    """Column of a unique id; null makes one from the question."""
    level: Column | None = None
    """Column of the difficulty."""
    spec: Column | None = None
    """Column of what the task needs beside the answer (tests, constraints)."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.answer is None and self.solution is None:
            yield "answer", "required, unless solution names a column whose last box is the answer"


class PuzzleKeys(Keys):
    """Puzzles made by reasoning-gym (extra `puzzles`); scored in the sandbox only."""

    sets: Annotated[tuple[Name, ...], Field(min_length=1, max_length=100)]
    """Names of the sets to draw from, such as [knights_knaves, mini_sudoku]."""
    difficulty: Level = 1
    """How hard, from 1; what that means is each set's own affair, and one with fewer levels gives its highest."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        for index, name in enumerate(self.sets):
            try:
                look_up(name)
            except PuzzlesRefused as reason:
                yield f"sets[{index}]", str(reason)


class JudgeKeys(Keys):
    """task: judge. A model compares the answer with the reference."""

    url: Url
    """Base URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."""
    model: Annotated[str, Field(min_length=1, max_length=200)]
    """Name of the model there."""
    key_variable: Variable | None = None
    """Environment variable that holds the key; null sends none."""
    orders: Literal[1, 2] = 2
    """Ask once, or in both orders of answer and reference."""
    workers: Annotated[int, Field(ge=1, le=256)] = 8
    """Requests at a time."""


class Problems(Keys):
    """The problem set and how much of each of its splits is used."""

    source: Annotated[str, Field(min_length=1, max_length=1000)]
    """`tiny`, `puzzles`, a file (JSONL, .jsonl.gz, Parquet, CSV) whose path starts with ./ ../ / or $NAME/, a hub id
    (org/name:split), or a stage that makes problems."""
    task: TaskName = "exact"
    """How answers are judged (the tiny world and puzzles have their own judges): exact compares texts and numbers,
    integers reads the last box or number as a whole number, math decides equality of expressions, code runs hidden
    tests in the sandbox, constraints checks instructions, choice reads a letter, judge asks a model."""
    columns: ColumnKeys | None = None
    """Which columns of the source hold what [seen from the first row]."""
    fallback: Literal["none", "number", "formula"] = "none"
    """math only: what counts as the answer of a completion that marks none."""
    puzzles: PuzzleKeys | None = None
    """source: puzzles. Which ones."""
    judge: JudgeKeys | None = None
    """task: judge. Who judges."""
    max_undecided: Share = 0.02
    """Stop the run where the judge cannot decide a larger share of a step's completions."""
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    """Difficulty levels, tiny only [2, 3, 4]."""
    notations: Literal["digits", "both"] = "digits"
    """tiny only: questions and thoughts in digits, or half of the questions in number words, so that thoughts mix."""
    train: Count = 4000
    """At most this many train problems."""
    dev: Count = 200
    """At most this many dev problems: checkpoints, weights and models are chosen on these."""
    test: Count = 400
    """At most this many test problems: the frontier is computed on these."""
    prompt_suffix: Annotated[str, Field(max_length=10_000)] = ""
    """Appended to every question in the user turn."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        own_judge = {"tiny": "the tiny world has", "puzzles": "puzzles have"}.get(self.source)
        if own_judge is not None and self.task != "exact":
            yield "task", f"{own_judge} {'its' if self.source == 'tiny' else 'their'} own judge; remove this key"
        if own_judge is not None and self.columns is not None:
            yield "columns", f"{self.source} is no table; remove this key"
        if (self.source == "puzzles") != (self.puzzles is not None):
            yield "puzzles", "goes with source: puzzles, and that needs it"
        if self.source != "tiny" and self.notations != "digits":
            yield "notations", "only the tiny world has notations; remove this key"
        if (self.task == "judge") != (self.judge is not None):
            yield "judge", "goes with task: judge, and that needs it"
        if self.task == "choice" and self.columns is not None:
            yield "columns", "the columns of multiple choice have fixed names (rl/tasks/choice.py); remove this key"
        if self.fallback != "none" and self.task != "math":
            yield "fallback", f"has no effect with task: {self.task}; remove it"

    @property
    def judged_by(self) -> dict[str, object]:
        """What decides how answers are judged, apart from the task's name, as plain JSON values; {} by default."""
        keys = {"columns": self.columns, "puzzles": self.puzzles, "judge": self.judge}
        found: dict[str, object] = {k: v.model_dump(mode="json") for k, v in keys.items() if v is not None}
        plain = {"fallback": "none", "notations": "digits"}
        return found | {key: getattr(self, key) for key, value in plain.items() if getattr(self, key) != value}


def is_path(ref: str) -> bool:
    return ref.startswith(("./", "../", "/"))


def source_kind(source: str) -> Literal["made", "file", "hub", "stage"]:
    """`source_kind("tiny") == "made"`; "./p.jsonl" and "$DATA/p.jsonl" are files, "org/name:test" is a hub id, other
    words are stages."""
    if source in ("tiny", "puzzles"):
        return "made"
    if is_path(source) or source.startswith("$"):
        return "file"
    return "hub" if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.:/-]+", source, re.ASCII) else "stage"
