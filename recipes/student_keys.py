"""What `method: prepare` may be told: how a base model is made ready to be a student."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Ref, StageKeys

Token = Annotated[str, Field(min_length=1, max_length=200)]


class Prepare(StageKeys):
    """Give a base model the chat template, end of turn, padding and context that its traces need; same weights."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["prepare"]
    model: Ref
    """Model to start from: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    template: Literal["r1", "r1-zero"] | None = None
    """Chat template that replaces the model's own; r1 opens <think> in the prompt. null: the model's own."""
    eos_token: Token | None = None
    """String of the token that ends a turn [the tokenizer's]."""
    pad_token: Token | None = None
    """String of the token that fills rows up [the tokenizer's]."""
    context: Count | None = None
    """Positions in tokens, at least as many as the model has [the model's]."""
    rope_theta: Annotated[float, Field(gt=1, le=1e9)] | None = None
    """Base frequency of the rotary embedding [the model's]; raise it with the context."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        changes = (self.template, self.eos_token, self.pad_token, self.context, self.rope_theta)
        if all(change is None for change in changes):
            yield "method", "prepare changes nothing here; give template, eos_token, pad_token, context or rope_theta"
        if self.pad_token is not None and self.pad_token == self.eos_token:
            yield "pad_token", "is the end of a turn; name another token, or many trainers would never train the end"
