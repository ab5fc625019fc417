"""From a problem to the prompt the model sees, by the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"


def render_text(tokenizer: PreTrainedTokenizerBase, problem: Problem, suffix: str = "") -> str:
    """The prompt as text, up to and including the generation prompt. A model without a chat template gets the bare
    question followed by a newline."""
    question = problem.text + suffix
    if tokenizer.chat_template is None:
        return question + "\n"
    messages = [{"role": "user", "content": question}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


def render_prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem, suffix: str = "") -> tuple[int, ...]:
    """The prompt as token ids. The template writes its own special tokens, so none are added on top of it."""
    text = render_text(tokenizer, problem, suffix)
    bare = tokenizer.chat_template is None
    return tuple(tokenizer(text, add_special_tokens=bare)["input_ids"])


def prefills_think(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has already opened `<think>` when the model begins to write (as R1's students do)."""
    probe = Problem(id="probe", question=(), answer="")
    return render_text(tokenizer, probe).rstrip().endswith(THINK_OPEN)
