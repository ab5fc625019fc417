"""What the stages may be told that make traces out of pools, of each other and of what others have published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.filter_keys import TraceFilters
from recipes.keys import Count, Keys, NonNegative, Ref, Share, Split, StageKeys
from recipes.problem_keys import Column, Url, Variable, source_kind

PartName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Licences = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=300)], Annotated[str, Field(min_length=1, max_length=1000)]],
    Field(max_length=1000),
]


class TraceJudge(Keys):
    """keep: judge. Who scores the right completions of a problem."""

    kind: Literal["preference", "helpfulness"]
    """preference: a reward model with one output, on the summary. helpfulness: a judging model behind an endpoint."""
    model: Ref
    """preference: a stage, a folder (./ ../ /) or a hub id of a sequence classifier; else the model's name there."""
    url: Url | None = None
    """helpfulness: base URL of an OpenAI-compatible endpoint."""
    key_variable: Variable | None = None
    """Environment variable that holds the endpoint's key."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.url is None) != (self.kind == "preference"):
            yield "url", "helpfulness needs it, preference does not take it"


class Traces(StageKeys):
    """Keep the correct, well-formed, untruncated completions of a pool as traces for SFT."""

    REFERENCES: ClassVar[dict[str, str]] = {"pool": "pool"}
    MAKES: ClassVar[str | None] = "traces"

    method: Literal["traces"]
    pool: Ref
    """The `sample` or `import_traces` stage to read."""
    keep: Literal["random", "all", "shortest", "stratified", "judge"] = "random"
    """Which correct ones of a problem: per_problem at random, all, the shortest, one of each of per_problem quantiles
    of their lengths, or those that a judge scores highest."""
    per_problem: Count = 4
    """At most this many traces per problem; not with keep: all."""
    per_level: Count | None = None
    """At most this many traces of problems of one level; null: no limit."""
    per_source: Count | None = None
    """At most this many traces of problems of one data set; null: no limit."""
    min_tokens: NonNegative = 0
    """Shorter completions are dropped and counted."""
    filters: TraceFilters | None = None
    """What is dropped though its answer is right."""
    judge: TraceJudge | None = None
    """keep: judge. Who scores."""
    licences: Licences = Field(default_factory=dict)
    """Licence of each data set, by the name that the data card gives it, as free text for that card."""

    def nested_references(self) -> Iterator[tuple[str, str, str]]:
        if self.filters is not None:
            yield from self.filters.references()
        if self.judge is not None and self.judge.kind == "preference":
            yield "judge.model", self.judge.model, "preference model"

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.keep == "all" and "per_problem" in self.model_fields_set:
            yield "per_problem", "has no effect with keep: all; remove it"
        if (self.keep == "judge") != (self.judge is not None):
            yield "judge", "goes with keep: judge, and that needs it"


class MixPart(Keys):
    """One set of a mix."""

    traces: Ref | None = None
    """A stage that makes traces."""
    file: Ref | None = None
    """Instead: rows that are no reasoning and are not verified, a JSONL, Parquet or CSV file (./ ../ / or $NAME/...) of
    chat messages or of prompts and responses."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the rows of the mix; the shares of all parts sum to 1."""
    count: Count | None = None
    """Instead: so many rows; with neither, all of them."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.traces is None) == (self.file is None):
            yield "traces", "give either traces or file"
        if self.share is not None and self.count is not None:
            yield "count", "give either share or count"


class LongKeys(Keys):
    """Long and short thoughts in a proportion, in every part that thinks."""

    share: Share = 0.2
    """Share of the rows that are long; about one in five for students of 3B and less."""
    tokens: Count | None = None
    """A thought with its answer is long from more tokens than this on."""
    percentile: Annotated[float, Field(gt=0, lt=100)] | None = None
    """Instead: long is longer than this percentile of all the mix is offered."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.tokens is None) == (self.percentile is None):
            yield "tokens", "give either tokens or percentile"


class Mix(StageKeys):
    """Mix traces of several stages, and rows that are no reasoning, in shares or counts."""

    MAKES: ClassVar[str | None] = "traces"

    method: Literal["mix"]
    parts: Annotated[dict[PartName, MixPart], Field(min_length=1, max_length=100)]
    """What is mixed, by name."""
    rows: Count | None = None
    """Rows of the whole where the parts have shares; null: as many as the parts allow. No row is taken twice."""
    long: LongKeys | None = None
    """Proportion of long and short thoughts; null leaves it as it is."""
    model: Ref | None = None
    """The student, where a part is a file: its template says who opens <think>, its tokens are counted."""
    licences: Licences = Field(default_factory=dict)
    """Licence of each data set, by the name that the data card gives it, as free text for that card."""

    def nested_references(self) -> Iterator[tuple[str, str, str]]:
        for name, part in self.parts.items():
            if part.traces is not None:
                yield f"parts.{name}.traces", part.traces, "traces"
            elif part.file is not None:
                yield f"parts.{name}.file", part.file, "file"
        if self.model is not None:
            yield "model", self.model, "model"

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        shares = [part.share for part in self.parts.values() if part.share is not None]
        if shares and len(shares) < len(self.parts):
            name = next(name for name, part in self.parts.items() if part.share is None)
            yield f"parts.{name}.share", "missing: either every part has a share, or none"
        elif shares and abs(sum(shares) - 1) > 1e-6:
            yield "parts", f"the shares sum to {sum(shares):g}, not to 1"
        if self.rows is not None and not shares:
            yield "rows", "is the size of a mix of shares; give every part a share, or remove it"
        if any(part.file is not None for part in self.parts.values()) != (self.model is not None):
            yield "model", "goes with parts that are files, and those need it"


class ForeignColumns(Keys):
    """Which columns of a table of traces hold what, where that is not seen from its first row."""

    question: Column | None = None
    """Column of the question; null where the response is a conversation."""
    response: Column
    """Column of the completion: a text, a list of texts, or a list of messages."""
    thought: Column | None = None
    """Column of the thought, where it is not in the response."""
    finish: Column | None = None
    """Column of how it ended: stop or length."""


class ImportTraces(StageKeys):
    """Take traces from elsewhere into a pool and verify them as if they had been sampled here."""

    MAKES: ClassVar[str | None] = "pool"

    method: Literal["import_traces"]
    source: Annotated[str, Field(min_length=1, max_length=1000)]
    """A file (JSONL, Parquet, CSV) or saved data set whose path starts with ./ ../ / or $NAME/, or a hub id
    (org/name/configuration:split)."""
    teacher: Annotated[str, Field(min_length=1, max_length=200)]
    """Name of the model that wrote them, for the data card."""
    model: Ref
    """The student: its template says who opens <think>, its tokens are counted."""
    columns: ForeignColumns | None = None
    """Which columns of the source hold what [seen from the first row]."""
    strip: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=10_000)], ...], Field(max_length=20)] = ()
    """Instructions before or behind the questions there that the problems here do not have."""

    def nested_references(self) -> Iterator[tuple[str, str, str]]:
        if source_kind(self.source) != "hub":
            yield "source", self.source, "file"
        yield "model", self.model, "model"

    def splits(self) -> tuple[Split, ...]:
        return ("train",)
