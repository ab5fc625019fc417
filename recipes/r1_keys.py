"""What the stages of the R1 pipeline may be told that no other pipeline has: made data, and a preference model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Rate, Ref, Share, Split, StageKeys

MADE = "tiny"  # the pairs that the tiny world makes


class MadeTraces(StageKeys):
    """Traces that the tiny world makes: worked solutions for a cold start, or replies to general prompts."""

    MAKES: ClassVar[str | None] = "traces"

    method: Literal["made_traces"]
    kind: Literal["worked", "general"]
    """worked: careful solutions of train problems in the notation of their question. general: general prompts with
    right replies, half of them kind, and no thought."""
    count: Count
    """At most this many."""

    def splits(self) -> tuple[Split, ...]:
        return ("train",)


class PreferenceModel(StageKeys):
    """Train a reward model on pairs of answers, with the pairwise loss (R1, second RL stage)."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "preference model"

    method: Literal["preference_model"]
    model: Ref
    """Causal model that it starts as: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    pairs: Ref
    """JSONL file (./ ../ / or $NAME/...) with question, chosen and rejected; or `tiny`, pairs that the tiny world
    makes."""
    count: Count | None = None
    """pairs: tiny. How many."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Passes over the pairs."""
    batch_size: Count = 256
    """Pairs per optimizer step."""
    learning_rate: Rate = 6e-6
    """Peak learning rate."""
    max_length: Count = 8_192
    """Longest question plus answer in tokens; a longer one is refused, never cut."""
    weight_decay: Share = 0.0
    """Decoupled weight decay of AdamW."""

    def nested_references(self) -> Iterator[tuple[str, str, str]]:
        if self.pairs != MADE:
            yield "pairs", self.pairs, "file"

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.pairs == MADE) != (self.count is not None):
            yield "count", "goes with pairs: tiny, and that needs it"
