"""What `reason preflight` looks at, and what a check finds.

A check is a pure function `(subject) -> Iterator[Defect]`; a subject holds what it needs and nothing else: a tokenizer
with some rows, a config with the shapes of the stored weights, rows to train on, two vocabularies, two splits, a model
that can take steps. What differs between a sampler and a trainer is a function in the subject, so that a test plants a
defect by handing over another function.

Shapes and dtypes of weights come from the header of the safetensors files; no weight is read for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.guards import TokenRow, tokenize_row
from rl.prompts import render_prompt
from rl.types import Problem, TextPart

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    from rl.samplers.synced import Row, Scores

INDEX = "model.safetensors.index.json"
EMBEDDING = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEAD = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True, slots=True)
class Defect:
    """Something that would do damage without a word.

    Example: `Defect("positions", "sft.max_length", "32768 tokens are wanted, ... has 4096 positions", "lower ...")`.
    """

    check: str  # the name of the defect
    where: str  # the key, row or file
    found: str
    fix: str


@dataclass(frozen=True, slots=True)
class Example:
    """A question with a completion: text without EOS, and without what the template's prompt has opened."""

    name: str
    question: str
    completion: str


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors of a model folder: name -> shape, dtype ("F32", "BF16", ...) and file."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    files: Mapping[str, Path]

    def find(self, endings: Sequence[str]) -> str | None:
        """The tensor whose name has one of these endings, or None: `find(EMBEDDING)`."""
        return next((name for end in endings for name in self.shapes if name == end or name.endswith(f".{end}")), None)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in fp32."""
        from safetensors import safe_open

        with safe_open(str(self.files[name]), framework="pt") as file:
            return file.get_tensor(name).float()


@dataclass(frozen=True, slots=True)
class TokenizerSubject:
    """A tokenizer as its folder has it (pad token not filled in), with rows of the recipe's own problems."""

    where: str
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationConfig | None
    rows: tuple[Example, ...]
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """How many tokens a stage wants to have in one row. Example: `Context("sft.max_length", 32768)`."""

    where: str
    tokens: int


@dataclass(frozen=True, slots=True)
class ModelSubject:
    """A config with its tokenizer, the stored weights (None: not here) and what the stages want of it."""

    where: str
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    stored: Stored | None = None
    contexts: tuple[Context, ...] = ()
    rows: tuple[Example, ...] = ()
    read_weights: bool = False


Tokenize = Callable[[Example], TokenRow]
Prompt = Callable[[str], tuple[int, ...]]  # question -> what the sampler is given
Collate = Callable[[Sequence[TokenRow]], list[tuple[list[int], list[int]]]]  # -> (input ids, labels), padding removed


@dataclass(frozen=True, slots=True)
class RowsSubject:
    """Rows that a stage trains on, with the trainer's tokenising and collating, and the sampler's prompt."""

    where: str
    tokenizer: PreTrainedTokenizerBase
    rows: tuple[Example, ...]
    max_length: int
    tokenize: Tokenize
    prompt: Prompt
    collate: Collate
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One side of a pair: a tokenizer, its output rows, and the ids that end its completions."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    rows: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairSubject:
    """Two models that read the same token ids; `same_rows`: their output layers must have as many rows, too. `unlike`:
    what keeps the weights of two that are to be merged from meaning the same: "config key rope_theta is ..."."""

    where: str
    student: Vocabulary
    teacher: Vocabulary
    same_rows: bool
    unlike: str | None = None


@dataclass(frozen=True, slots=True)
class LimitSubject:
    """A training stage that reads what a sampling stage draws: do prompt and completion fit into its rows?"""

    where: str  # of max_length
    max_length: int
    source: str  # of max_tokens
    max_tokens: int
    longest_prompt: int


@dataclass(frozen=True, slots=True)
class PoolSubject:
    """A pool on the disk: what is wrong with its files, and how its completions ended."""

    where: str
    damage: tuple[str, ...]
    truncated: int
    samples: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class SplitSubject:
    """Questions to train on and questions that are measured on, as (name, text)."""

    where: str
    train: tuple[tuple[str, str], ...]
    test: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class TrainingSubject:
    """A model that takes two steps and scores tokens, each in two ways that must agree."""

    where: str
    steps: Callable[[int], list[tuple[float, float]]]  # rows of a micro-batch -> (loss, gradient norm) of two steps
    batch: int  # rows of an optimizer step
    drawn: Callable[[], tuple[Sequence[Row], Scores]]  # what the sampler drew, and its log-probs
    scores: Callable[[Sequence[Row]], Scores]  # the trainer's of the same
    tolerance: float  # nats, of log-probs
    relative: float  # of loss and gradient norm


Subject = (
    TokenizerSubject | ModelSubject | RowsSubject | PairSubject | LimitSubject | PoolSubject | SplitSubject
    | TrainingSubject
)  # fmt: skip


def problem(name: str, question: str) -> Problem:
    return Problem(id=name, question=(TextPart(question),), answer="")


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the EOS token, None without one."""
    return tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None


def rows_subject(
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    max_length: int,
    suffix: str = "",
) -> RowsSubject:
    """Rows as our SFT trains on them: `distill.guards` tokenises, TRL's collator makes the batch."""
    return RowsSubject(
        where,
        tokenizer,
        tuple(rows),
        max_length,
        lambda row: tokenize_row(tokenizer, row.question, row.completion, row.name, suffix),
        lambda question: render_prompt(tokenizer, problem("prompt", question), suffix),
        trl_batch(tokenizer),
        suffix,
    )


def trl_batch(tokenizer: PreTrainedTokenizerBase) -> Collate:
    """What TRL's collator makes of our rows, padding taken out again by its attention mask."""

    def collate(rows: Sequence[TokenRow]) -> list[tuple[list[int], list[int]]]:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else eos_of(tokenizer)
        assert pad is not None  # without EOS no row could be tokenised
        batch = DataCollatorForLanguageModeling(pad_token_id=pad)(
            [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
        )
        return [
            (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
            for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
        ]

    return collate


def read_stored(folder: Path) -> Stored | None:
    """The headers of a folder's safetensors files; None where it has none.

    Errors: ValueError that names a file whose header cannot be read.
    """
    shapes, dtypes, files = {}, {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(path).items():
            if name != "__metadata__":
                shapes[name], dtypes[name], files[name] = tuple(entry["shape"]), str(entry["dtype"]), path
    return Stored(shapes, dtypes, files) if shapes else None


def _header(path: Path) -> dict[str, Any]:
    """Eight bytes of length, then JSON (github.com/huggingface/safetensors, "Format")."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path} is not a safetensors file: its header would have {length} of {size} bytes")
        try:
            return json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: its header is no JSON ({error})") from error
