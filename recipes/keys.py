"""The base classes of every key in a recipe: strict types and what all stages have in common."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
NonNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=10)]
TopP = Annotated[float, Field(gt=0, le=1)]
Level = Annotated[int, Field(ge=1, le=16)]
Ref = Annotated[str, Field(min_length=1, max_length=1000)]
Split = Literal["train", "dev", "test"]
Overflow = Literal["refuse", "drop"]


def key_descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings under a model's keys, those of its base classes first.

    Read when somebody asks: pydantic's own `use_attribute_docstrings` reads the source of every model whenever one
    is imported, a quarter of what it takes to refuse a recipe.
    """
    found = {}
    for each in reversed(model.__mro__):
        if issubclass(each, Keys) and each.__annotations__:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            assert isinstance(body, ast.ClassDef)
            for key, text in pairwise(body.body):
                if isinstance(key, ast.AnnAssign) and isinstance(key.target, ast.Name):
                    match text:
                        case ast.Expr(value=ast.Constant(value=str(words))):
                            found[key.target.id] = inspect.cleandoc(words)
    return found


def _describe(schema: dict[str, Any], model: type[BaseModel]) -> None:
    properties = schema.get("properties", {})
    for key, words in key_descriptions(model).items():
        if key in properties:
            properties[key]["description"] = words


class Keys(BaseModel):
    """Strict, frozen keys; `problems_with_keys` yields (key, message) for what only two keys together show."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True, json_schema_extra=_describe
    )

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from ()

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        found = list(self.problems_with_keys())
        if found:
            text = "; ".join(f"{key}: {message}" for key, message in found)
            raise PydanticCustomError("keys", "{text}", {"text": text, "found": found})
        return self


# What a key that takes a plain value or a mapping of keys tells pydantic of the two, so that an error is about the one
# that was meant; recipes/explain.py leaves them out of the key's name.
PLAIN, MAPPING = "<plain>", "<mapping>"


def plain_or_mapping(value: Any) -> str:
    """Which of the two a value is, read from a recipe or made already."""
    return MAPPING if isinstance(value, dict | Keys) else PLAIN


class StageKeys(Keys):
    """What every stage has in common: which of its keys name something to read, and what it makes.

    `REFERENCES` maps a key to what it must lead to; `MAKES` is what other stages can read from this one.
    """

    REFERENCES: ClassVar[dict[str, str]] = {}
    MAKES: ClassVar[str | None] = None
    method: Any

    def nested_references(self) -> Iterator[tuple[str, str, str]]:
        """(key, reference, what it must lead to) of references inside another key: ("max_tokens.pool", "a", "pool")."""
        yield from ()

    def splits(self) -> tuple[Split, ...]:
        """The splits of the problem set that the stage reads, () if it reads none."""
        return ()

    def more_models(self) -> tuple[str, ...]:
        """Names of further models beside the stage's own: "20" is what `STAGE@20` refers to, in `models/20`."""
        return ()


class SamplingKeys(StageKeys):
    """A stage that samples; the three keys default to the recipe's `sampling`."""

    temperature: Temperature | None = None
    """Softmax temperature of the sampler [sampling.temperature]."""
    top_p: TopP | None = None
    """Nucleus share of the sampler [sampling.top_p]."""
    max_tokens: Count | None = None
    """Longest completion in tokens, think and EOS included [sampling.max_tokens]."""
