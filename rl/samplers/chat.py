"""Chats: one text in, one text out, for models that judge.

    chat = SamplerChat(sampler, tokenizer, SamplingSettings(temperature=0.1), "Qwen/Qwen3-1.7B")  # a model right here
    chat([ChatRequest("2+2=?", seed=1)])   # [Answer(value="4", failure=None, ...)]

`rl.samplers.openai` has the one over an endpoint. A chat never guesses: a request that gets no complete reply has a
`JudgeFailure` and a reason, and neither is a score.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rl.prompts import render_prompt
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings
from rl.types import FinishReason, JudgeFailure, Problem, TextPart
from rl.workers import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One message of a user, and the seed that its reply is drawn with."""

    text: str
    seed: int  # 64 bits, see `rl.samplers.base.sample_seed`


class Chat(Protocol):
    """One answer a request, in order: the reply's text, or why there is none. Safe to call from any thread."""

    @property
    def name(self) -> str:
        """The model and how it is sampled: whatever may change its replies, for verifier versions."""
        ...

    def __call__(self, requests: Sequence[ChatRequest]) -> list[Answer]: ...


def without_control_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a space after the first character of every control token that it spells, so that none is read as
    one: what others wrote must not open a turn of the conversation. A control token of one character is left out.

    `"4<|end|>"` becomes `"4< |end|>"` where `<|end|>` is a control token.
    """
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            spelled = token.content
            text = text.replace(spelled, f"{spelled[0]} {spelled[1:]}" if len(spelled) > 1 else "")
    return text


class SamplerChat:
    """A `Chat` over a model in this process, through its tokenizer's chat template. Only one call runs at a time."""

    def __init__(
        self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, settings: SamplingSettings, model: str
    ) -> None:
        """`model`: what the sampler's model is called, for `name`."""
        self.sampler, self.tokenizer, self.settings = sampler, tokenizer, settings
        self.name = f"{model} ({settings})"
        self._lock = threading.Lock()

    def __call__(self, requests: Sequence[ChatRequest]) -> list[Answer]:
        started = time.perf_counter()
        prompts = [self._prompt(request.text) for request in requests]
        room = self.tokenizer.model_max_length - self.settings.max_tokens
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        asked = [SampleRequest(prompts[i], requests[i].seed) for i in fitting]
        with self._lock:
            drawn = self.sampler.sample(asked, self.settings) if asked else []
        completions = dict(zip(fitting, drawn, strict=True))
        each = (time.perf_counter() - started) / max(1, len(requests))
        answers = []
        for i, prompt in enumerate(prompts):
            if i not in completions:
                reason = f"a prompt of {len(prompt)} tokens leaves no room for {self.settings.max_tokens} new ones"
                answers.append(Answer(None, JudgeFailure.INFRASTRUCTURE, reason, each))
            elif (finish := completions[i].finish_reason) is not FinishReason.STOP:
                answers.append(Answer(None, JudgeFailure.CRASH, f"the reply has no end (finish reason {finish})", each))
            else:
                answers.append(Answer(completions[i].text, None, "", each))
        return answers

    def _prompt(self, text: str) -> tuple[int, ...]:
        clean = without_control_tokens(self.tokenizer, text)
        return render_prompt(self.tokenizer, Problem(id="chat", question=(TextPart(clean),), answer=""))
