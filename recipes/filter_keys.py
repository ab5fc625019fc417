"""What a stage that keeps traces may be told to drop: the keys of `filters:` (distill/filters.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from recipes.keys import Count, Keys, Ref, Share


class FilterLanguage(Keys):
    """Drop thoughts that mix languages."""

    least: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Least share of the thought that must be in the language."""
    target: str = "question"
    """The language of the question, or one that the task knows, such as en."""


class FilterRepetition(Keys):
    """Drop texts that repeat themselves."""

    ngram: Annotated[int, Field(ge=2, le=1000)] = 20
    """Words of an n-gram."""
    most: Share = 0.2
    """Largest share of n-grams that were there before."""


class TraceFilters(Keys):
    """What is dropped though its answer is right; every drop is counted under its reason."""

    format: bool = False
    """Drop what is not one thought, closed once, with an answer."""
    truncated: bool = False
    """Drop thoughts and answers that were cut off."""
    language: FilterLanguage | None = None
    """Drop thoughts that mix languages."""
    paragraph: Count | None = None
    """Drop thoughts with a paragraph of more characters."""
    code_blocks: bool = False
    """Drop thoughts with a fenced block of code."""
    repetition: FilterRepetition | None = None
    """Drop texts that repeat themselves."""
    near_duplicates: bool = False
    """Drop the traces of problems that repeat an earlier problem in other words."""
    decontaminate: Annotated[tuple[Ref, ...], Field(max_length=100)] = ()
    """Drop the traces of problems that stand in these evaluation sets: JSONL files (./ ../ / or $NAME/...)."""

    def references(self, key: str = "filters") -> Iterator[tuple[str, str, str]]:
        """(key, reference, what it must lead to) of the files that they read."""
        for index, ref in enumerate(self.decontaminate):
            yield f"{key}.decontaminate[{index}]", ref, "file"
