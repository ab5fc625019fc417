"""What stands between our rows and TRL's silent defaults: tokenising, template, EOS, length.

TRL 1.16 cuts rows at 1024 tokens without a word (`max_length`; in DPO that is the end of the long rejected answer, the
very thing it is to learn from), appends EOS only to rows that are not conversations, and leaves a template that does
not reproduce the answer to a warning that is shown once. So we tokenise here, check, and hand over token ids:

* prompt = the chat template with its generation prompt, a prefilled `<think>` included: what a sampler is given;
* completion = the text tokenised by itself, as a sampler would go on from the prompt, plus EOS, which is trained;
* the template must round-trip: the whole conversation renders to prompt + completion + end of turn;
* no token is lost, unknown or special within the completion;
* a row over the length limit is an error or an explicit, counted drop; it is never cut.

The same checks hold for a row of SFT and for both sides of a DPO pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from rl.prompts import THINK_CLOSE, THINK_OPEN, render_prompt, render_text
from rl.types import Problem, TextPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overflow = Literal["refuse", "drop"]
IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One prompt with one completion to train on, as token ids.

    Example: `TokenRow("trace 0", (3, 12, 4, 5), (12, 6, 12, 1))`: EOS is id 1, and only the completion is trained.
    """

    name: str  # for messages
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # ends in EOS

    @property
    def input_ids(self) -> list[int]:
        return [*self.prompt_ids, *self.completion_ids]

    @property
    def labels(self) -> list[int]:
        """The prompt masked, the completion with its EOS trained."""
        return [IGNORED] * len(self.prompt_ids) + list(self.completion_ids)

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True, slots=True)
class PairRow:
    """One prompt with a chosen and a rejected completion; the prompt is one object, so both sides share it."""

    name: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]  # ends in EOS
    rejected_ids: tuple[int, ...]  # ends in EOS

    def __len__(self) -> int:
        """The length of the longer side with the prompt."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


Row = TypeVar("Row", TokenRow, PairRow)


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase, question: str, completion: str, name: str, suffix: str = ""
) -> TokenRow:
    """Tokenise one question and completion (text without EOS); ValueError, naming the row, where something is lost."""
    problem = Problem(id=name, question=(TextPart(question),), answer="")
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError(f"{name}: the tokenizer has no EOS token, so the student would never learn to stop")
    if not completion:
        raise ValueError(f"{name}: the completion is empty, there is nothing to train on")
    if tokenizer.chat_template is not None:
        _check_template(tokenizer, question + suffix, render_text(tokenizer, problem, suffix), completion, name)
    prompt_ids = render_prompt(tokenizer, problem, suffix)
    # Tokenised apart from the prompt: a sampler continues from the prompt's last token, so no merge may cross it.
    completion_ids = tuple(tokenizer(completion, add_special_tokens=False)["input_ids"])
    _check_tokens(tokenizer, completion, completion_ids, name)
    return TokenRow(name, prompt_ids, (*completion_ids, eos))


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase, question: str, chosen: str, rejected: str, name: str, suffix: str = ""
) -> PairRow:
    """Tokenise both sides of a pair with the same guards."""
    if chosen == rejected:
        raise ValueError(f"{name}: chosen and rejected are the same text, there is nothing to prefer")
    left = tokenize_row(tokenizer, question, chosen, f"{name}, chosen", suffix)
    right = tokenize_row(tokenizer, question, rejected, f"{name}, rejected", suffix)
    return PairRow(name, left.prompt_ids, left.completion_ids, right.completion_ids)


def within_length(rows: Sequence[Row], max_length: int, overflow: Overflow) -> tuple[list[Row], int]:
    """The rows that fit into `max_length` tokens, prompt and EOS included, and how many were dropped.

    Lengths 90, 100, 101 with `max_length` 100: "refuse" is a ValueError naming the third row with its length; "drop"
    gives two rows and 1. Dropping all is an error too.
    """
    if overflow not in ("refuse", "drop"):
        raise ValueError(f'overflow must be "refuse" or "drop", got {overflow!r}')
    if not rows:
        raise ValueError("there are no rows to train on")
    over = [row for row in rows if len(row) > max_length]
    if over and overflow == "refuse":
        named = ", ".join(f"{row.name} ({len(row)} tokens)" for row in over[:5])
        more = f" and {len(over) - 5} more" if len(over) > 5 else ""
        raise ValueError(
            f"{len(over)} of {len(rows)} rows are longer than max_length = {max_length}: {named}{more}. Nothing is "
            f'cut: raise max_length to {max(map(len, over))}, or set overflow to "drop" to leave them out'
        )
    if len(over) == len(rows):
        raise ValueError(f"all {len(rows)} rows are longer than max_length = {max_length}: nothing is left to train on")
    return [row for row in rows if len(row) <= max_length], len(over)


def _check_template(tokenizer: PreTrainedTokenizerBase, asked: str, prompt: str, completion: str, name: str) -> None:
    """The whole conversation must render to prompt + completion + end of turn, and the end of turn must be EOS."""
    stem = prompt.rstrip()
    prefill = prompt[len(stem) - len(THINK_OPEN) :] if stem.endswith(THINK_OPEN) else ""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": prefill + completion}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(rendered, str)
    expected = prompt + completion
    if not rendered.startswith(expected):
        position = _first_difference(rendered, expected)
        raise ValueError(
            f"{name}: the chat template does not round-trip. At character {position} the rendered conversation has "
            f"{rendered[position : position + 20]!r} where prompt and completion have "
            f"{expected[position : position + 20]!r}. The template changes what is trained (does it drop or rewrite "
            "the thought?): give the tokenizer a template that keeps the assistant's message as it is"
        )
    end, eos = rendered[len(expected) :], str(tokenizer.eos_token)
    if end.strip() and (not end.startswith(eos) or end[len(eos) :].strip()):
        raise ValueError(
            f"{name}: the chat template ends a turn with {end!r}, but the tokenizer's EOS token is "
            f"{eos!r}: a student trained on one and stopped by the other would not stop. Set eos_token "
            "to the end of turn"
        )


def _check_tokens(
    tokenizer: PreTrainedTokenizerBase, completion: str, completion_ids: tuple[int, ...], name: str
) -> None:
    """Nothing of the text may be unknown, special or changed by tokenising it."""
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in completion_ids:
        before = tokenizer.decode(list(completion_ids[: completion_ids.index(unknown)]))
        raise ValueError(
            f"{name}: the tokenizer does not know {completion[len(before) : len(before) + 20]!r} at character "
            f"{len(before)} of the completion; it would train on {tokenizer.unk_token!r}"
        )
    special = set(tokenizer.all_special_ids).intersection(completion_ids)
    strings = sorted({str(tokenizer.convert_ids_to_tokens(i)) for i in special} - {THINK_OPEN, THINK_CLOSE})
    if strings:
        raise ValueError(f"{name}: the completion contains {', '.join(strings)}, which the tokenizer reads as special")
    decoded = tokenizer.decode(list(completion_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)
    if decoded != completion:
        position = _first_difference(decoded, completion)
        raise ValueError(
            f"{name}: the completion does not survive the tokenizer. At character {position} it decodes to "
            f"{decoded[position : position + 20]!r} instead of {completion[position : position + 20]!r}"
        )


def _first_difference(left: str, right: str) -> int:
    """The first position at which two strings differ: `_first_difference("abc", "abd") == 2`."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
