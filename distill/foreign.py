"""Traces that others have published, whatever their columns are called.

Recognised, from the columns of the first row (`FORMS`), or told (`TraceColumns`):

    problem, generations, finish_reasons                     OpenR1-Math-220k: several completions a row
    problem, deepseek_reasoning, deepseek_solution           OpenThoughts-114k, its configuration `metadata`
    question, deepseek_thinking_trajectory, deepseek_attempt s1K-1.1
    messages: [{role, content, reasoning_content}]           chat messages; the thought in tags or in a field of its own
    conversations: [{from, value}]                           ShareGPT: OpenThoughts, Bespoke-Stratos
    prompt, response and the like                            flat rows; the thought in tags or in a column of its own

A thought comes out as `<think> ... </think>` and the answer after it, whether it stood in these tags, between
`<|begin_of_thought|>` and `<|end_of_thought|>`, in a field beside the answer, or behind a template that opens `<think>`
itself and leaves only the closing tag. Nothing here is trusted: what is read is verified before it is a trace
(distill/imported.py). A cell of the wrong type stops the reading and is named by row and column; a conversation of more
than one turn is no completion of a problem, and is counted.

    for row in read_foreign("./openr1.parquet"): ...
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.problems import BadProblems
from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.sources import read_table
from rl.types import FinishReason

FINISH = {
    "stop": FinishReason.STOP, "eos": FinishReason.STOP, "end_turn": FinishReason.STOP,
    "length": FinishReason.LENGTH, "max_tokens": FinishReason.LENGTH,
    "repetition": FinishReason.REPETITION,
}  # fmt: skip
USERS, ASSISTANTS = ("user", "human"), ("assistant", "gpt")
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")  # beside the content of a message
MANY_TURNS = "more than one turn"

_OTHER_TAGS = {
    "<|begin_of_thought|>": THINK_OPEN, "<|end_of_thought|>": THINK_CLOSE,
    "<|begin_of_solution|>": "", "<|end_of_solution|>": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TraceColumns:
    """Which columns of a table of traces hold what.

    `response` holds a text, a list of texts (several completions of one question), or a list of messages, in which
    case the question is in it too and `question` is None.

    Example: `TraceColumns("problem", "generations", finish="finish_reasons")`
    """

    question: str | None
    response: str
    thought: str | None = None
    finish: str | None = None  # "stop", "length", ...; a list where `response` is one


# In the order in which they are tried: a row of OpenR1-Math-220k has `messages` too, with one of its generations.
FORMS = (
    TraceColumns("problem", "generations", finish="finish_reasons"),
    TraceColumns("problem", "deepseek_solution", thought="deepseek_reasoning"),
    TraceColumns("question", "deepseek_attempt", thought="deepseek_thinking_trajectory"),
    TraceColumns(None, "messages", finish="finish_reason"),
    TraceColumns(None, "conversations", finish="finish_reason"),
    *(
        TraceColumns(question, response, thought, "finish_reason")
        for question in ("prompt", "question", "problem", "instruction", "input")
        for response in ("response", "completion", "output", "generation", "generated_solution")
        for thought in ("reasoning", "reasoning_content", "thinking", "thought", None)
    ),
)


@dataclass(frozen=True, slots=True)
class ForeignTrace:
    """One completion from elsewhere, not verified.

    Example: `ForeignTrace(17, "What is 6 x 7?", "<think>\\n6 x 7 = 42\\n</think>\\n\\n42", FinishReason.STOP)`
    """

    row: int  # of the table, from 1
    question: str
    text: str  # the thought in `<think> </think>`, the answer after it
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class Unusable:
    """A row that holds no completion of one question, with the reason."""

    row: int
    reason: str


def read_foreign(source: str | Path, columns: TraceColumns | None = None) -> Iterator[ForeignTrace | Unusable]:
    """All completions of a source that `rl.sources.read_table` reads, in order.

    Errors: BadProblems, naming row and column, for columns that are not there and cells of another type.
    """
    for number, row in enumerate(read_table(source), 1):
        columns = columns or form_of(row)
        if columns is None:
            told = ", ".join(str(name)[:40] for name in list(row)[:12]) or "none"
            raise BadProblems(
                source, [(number, f"has no columns that look like traces (there are: {told}); name them with columns")]
            )
        try:
            yield from _traces(number, row, columns)
        except _BadCell as reason:
            raise BadProblems(source, [(number, str(reason))]) from None


def form_of(row: Mapping[str, Any]) -> TraceColumns | None:
    """The first of `FORMS` whose question, response and thought a row has."""
    for form in FORMS:
        if all(name in row for name in (form.question, form.response, form.thought) if name is not None):
            return form
    return None


def with_tags(text: str, thought: str | None = None) -> str:
    """A completion with its thought in think tags, wherever it stood.

    `with_tags("4", "2+2=4") == "<think>\\n2+2=4\\n</think>\\n\\n4"`, `with_tags("2+2=4</think>4") ==
    "<think>2+2=4</think>4"`; a text without any thought stays as it is.
    """
    if thought is not None and thought.strip():
        return f"{THINK_OPEN}\n{thought.strip()}\n{THINK_CLOSE}\n\n{text.strip()}"
    if any(tag in text for tag in _OTHER_TAGS):
        text = re.sub("|".join(map(re.escape, _OTHER_TAGS)), lambda found: _OTHER_TAGS[found[0]], text).strip()
    if THINK_CLOSE in text and THINK_OPEN not in text:
        return THINK_OPEN + text
    return text


class _BadCell(ValueError):
    """What is wrong with one cell; the message names its column."""


def _traces(number: int, row: Mapping[str, Any], columns: TraceColumns) -> Iterator[ForeignTrace | Unusable]:
    for name in (columns.question, columns.response):
        if name is not None and name not in row:
            raise _BadCell(f"has no column {name!r} (there are: {', '.join(map(str, list(row)[:12]))})")
    cell = row[columns.response]
    finish = None if columns.finish is None else row.get(columns.finish)
    if columns.question is None:
        found = _conversation(cell, columns.response)
        if found is None:
            yield Unusable(number, MANY_TURNS)
            return
        question, text = found
        yield _trace(number, question, text, finish, columns.finish)
        return
    question = _text(row[columns.question], columns.question)
    answers = _listed(cell)
    thoughts = _listed(row.get(columns.thought)) if columns.thought is not None else [None]
    reasons = finish if isinstance(finish, list) else [finish] * len(answers)
    if len(thoughts) not in (1, len(answers)) or len(reasons) != len(answers):
        raise _BadCell(
            f"{columns.response} holds {len(answers)} completions, but there are {len(thoughts)} in {columns.thought} "
            f"and {len(reasons)} in {columns.finish}"
        )
    thoughts = thoughts if len(thoughts) == len(answers) else thoughts * len(answers)
    for answer, thought, reason in zip(answers, thoughts, reasons, strict=True):
        inner = None if thought is None else _text(thought, columns.thought or "")
        text = with_tags(_text(answer, columns.response), inner)
        yield _trace(number, question, text, reason, columns.finish)


def _trace(number: int, question: str, text: str, finish: object, column: str | None) -> ForeignTrace:
    if finish is None:
        # Nothing is said of how it ended: a thought that never does was cut off.
        cut = THINK_OPEN in text and THINK_CLOSE not in text
        return ForeignTrace(number, question, text, FinishReason.LENGTH if cut else FinishReason.STOP)
    if not isinstance(finish, str) or finish not in FINISH:
        raise _BadCell(f"{column} is {str(finish)[:40]!r}, not one of {', '.join(FINISH)} or nothing")
    return ForeignTrace(number, question, text, FINISH[finish])


def _conversation(cell: object, column: str) -> tuple[str, str] | None:
    """(question, text with tags) of a conversation of one turn, None of another; a system message does not count."""
    if not isinstance(cell, Sequence) or isinstance(cell, str):
        raise _BadCell(f"{column} is a {type(cell).__name__}, not a list of messages")
    turns: list[tuple[str, Mapping[str, Any]]] = []
    for place, message in enumerate(cell):
        if not isinstance(message, Mapping):
            raise _BadCell(f"{column}[{place}] is a {type(message).__name__}, not a message")
        role = message.get("role", message.get("from"))
        if role not in ("system", *USERS, *ASSISTANTS):
            raise _BadCell(f"{column}[{place}] is of role {str(role)[:40]!r}, which is neither a user nor an assistant")
        if role != "system":
            turns.append((role, message))
    if len(turns) != 2 or turns[0][0] not in USERS or turns[1][0] not in ASSISTANTS:
        return None
    (_, asked), (_, answered) = turns
    thought = next((answered[name] for name in THOUGHT_FIELDS if answered.get(name)), None)
    inner = None if thought is None else _text(thought, f"{column}[1]")
    return _content(asked, column), with_tags(_content(answered, column), inner)


def _content(message: Mapping[str, Any], column: str) -> str:
    return _text(message.get("content", message.get("value")), f"the content of a message in {column}")


def _listed(cell: object) -> list[object]:
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def _text(cell: object, column: str) -> str:
    if not isinstance(cell, str):
        raise _BadCell(f"{column} must be a text, not {'null' if cell is None else type(cell).__name__}")
    return cell
