"""The arguments of the constraint checks: what kinds there are, and how each is read from JSON.

The type of a check's parameter is one of those at the end: the Python type, annotated with the function that makes it
from a JSON value or raises ValueError ("must be a whole number from 1 to 1,000,000, not 'five'").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

from rl.tasks.constraint_text import has_word, visible


class Relation(StrEnum):
    AT_LEAST = "at least"
    AT_MOST = "at most"
    EXACTLY = "exactly"
    LESS_THAN = "less than"
    MORE_THAN = "more than"
    AROUND = "around"  # within a tenth, rounded, and at least within 1: around 50 is 45 to 55, around 5 is 4 to 6


def allowed(relation: Relation, count: int) -> tuple[int, float]:
    """The least and the greatest number that a relation allows: `allowed(Relation.AROUND, 50) == (45, 55)`"""
    around = max(round(count / 10), 1)
    return {
        Relation.AT_LEAST: (count, math.inf),
        Relation.AT_MOST: (0, count),
        Relation.EXACTLY: (count, count),
        Relation.LESS_THAN: (0, count - 1),
        Relation.MORE_THAN: (count + 1, math.inf),
        Relation.AROUND: (count - around, count + around),
    }[relation]


def compared(found: int, relation: Relation, count: int, what: str) -> str:
    """What is wrong with a number, "" if nothing is: `compared(2, Relation.AT_MOST, 1, "words") == "2 words"`"""
    least, most = allowed(relation, count)
    return "" if least <= found <= most else f"{found} {what}"


def _relation(value: Any) -> Relation:
    if value not in list(Relation):
        raise ValueError(f"must be one of {', '.join(repr(str(known)) for known in Relation)}, not {value!r}")
    return Relation(value)


def _whole(least: int) -> Callable[[Any], int]:
    def parse(value: Any) -> int:
        if type(value) is not int or not least <= value <= 1_000_000:
            raise ValueError(f"must be a whole number from {least} to 1,000,000, not {value!r}")
        return value

    return parse


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"must be true or false, not {value!r}")
    return value


def _text(most: int, wordless: bool = True) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        text = visible(value) if isinstance(value, str) else ""
        if not text or len(text) > most or not (wordless or has_word(text)):
            what = "text" if wordless else "text with a letter or digit"
            raise ValueError(f"must be a {what} of 1 to {most:,} characters, not {str(value)[:80]!r}")
        return text

    return parse


def _texts(parse_one: Callable[[Any], str]) -> Callable[[Any], tuple[str, ...]]:
    def parse(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"must be a list of texts, at least one, not {str(value)[:80]!r}")
        return tuple(parse_one(one) for one in value)

    return parse


def _letter(value: Any) -> str:
    text = visible(value) if isinstance(value, str) else ""
    if len(text) != 1:
        raise ValueError(f"must be one character, not {str(value)[:80]!r}")
    return text


def _language(value: Any) -> str:
    from rl.language import LANGUAGES

    if value not in LANGUAGES:
        raise ValueError(f"must be one of {', '.join(sorted(LANGUAGES))}, not {value!r}")
    return value


Compare = Annotated[Relation, _relation]
Count = Annotated[int, _whole(0)]
Positive = Annotated[int, _whole(1)]  # of what every response has, so that 0 could never hold; also "the first", 1
Flag = Annotated[bool, _flag]
Letter = Annotated[str, _letter]
Keyword = Annotated[str, _text(200)]
Keywords = Annotated[tuple[str, ...], _texts(_text(200))]
Phrase = Annotated[str, _text(100_000)]
WordyPhrase = Annotated[str, _text(100_000, wordless=False)]
Options = Annotated[tuple[str, ...], _texts(_text(1_000, wordless=False))]
Code = Annotated[str, _language]
