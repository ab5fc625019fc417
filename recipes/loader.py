"""Reads a recipe file: strict YAML that remembers the line of every key.

A small YAML: booleans are `true` and `false` only (`no`, `on`, `yes` are texts), whole numbers are decimal (`017`,
`0x1F`, `12:30` are texts), `1e-5` is a number, NaN and infinity are refused. Duplicate keys, tabs, tags, merge keys,
keys that are not texts, and anchors that multiply are refused with their line. Values are built from parser events, so
a tag can never construct anything and a bomb is stopped while it is read.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_VALUES = 10_000  # counted after aliases are expanded
MAX_ALIASES = 100
MAX_DEPTH = 20
MAX_FAULTS = 10  # shown at once: one screen

Loc = tuple[str | int, ...]

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NOT_TEXT = re.compile("[^\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a recipe: `tiny.yaml:12: stages.teacher.group_sise: unknown key; did you mean ...`"""

    message: str
    where: str = ""  # the file, or the command-line option that brought the value in
    line: int | None = None
    key: str = ""

    def __str__(self) -> str:
        place = f"{self.where}:{self.line}" if self.line is not None else self.where
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        return text if len(text) <= 400 else text[:397] + "..."


class RecipeError(ValueError):
    """A recipe that cannot be used. `str()` lists what is wrong, one line each, at most ten lines."""

    def __init__(
        self, message: str, path: str | Path = "", line: int | None = None, key: str = "", faults: Sequence[Fault] = ()
    ) -> None:
        self.faults: tuple[Fault, ...] = tuple(faults) or (Fault(message, str(path), line, key),)
        first = self.faults[0]
        self.message, self.path, self.line, self.key = first.message, first.where, first.line, first.key
        lines = [str(fault) for fault in self.faults[:MAX_FAULTS]]
        if len(self.faults) > MAX_FAULTS:
            lines.append(f"and {len(self.faults) - MAX_FAULTS} more")
        super().__init__("\n".join(lines))

    @classmethod
    def of(cls, faults: Sequence[Fault]) -> RecipeError:
        return cls("", faults=faults)


def likely(word: str, known: Iterable[str]) -> str:
    """`likely("group_sise", ["group_size", "steps"]) == "; did you mean group_size?"`, "" if nothing is near."""
    near = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def dotted(loc: Loc) -> str:
    """`dotted(("stages", "a", "betas", 0)) == "stages.a.betas[0]"`"""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(slots=True)
class Document:
    """A parsed recipe: plain values, and where each of them was written."""

    where: str  # the file as the user named it
    values: dict[str, Any]
    lines: dict[Loc, int] = field(default_factory=dict)  # 1-based line of each key or list item
    options: dict[Loc, str] = field(default_factory=dict)  # values that came from the command line, not the file

    def fault(self, loc: Loc, message: str) -> Fault:
        """A fault at a key, or at the nearest key around it that the document has."""
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.options:
                return Fault(message, self.options[loc[:length]], None, dotted(loc))
            if loc[:length] in self.lines:
                return Fault(message, self.where, self.lines[loc[:length]], dotted(loc))
        return Fault(message, self.where, 1 if self.lines else None, dotted(loc))


def read_recipe_file(path: str | Path) -> Document:
    """Read and parse a recipe file; RecipeError with file and line for everything that is not plain, strict YAML."""
    where = str(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError("there is no such file", where) from None
    except IsADirectoryError:
        raise RecipeError("is a folder, not a recipe file", where) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"cannot be read: {reason}", where) from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"is larger than {MAX_BYTES:,} bytes; a recipe is a few kilobytes", where)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError("is not UTF-8 text", where, line) from None
    return parse_recipe(text, where)


def parse_recipe(text: str, where: str) -> Document:
    """Parse the text of a recipe. The whole must be a mapping."""
    parser = _Parser(text, where)
    value = parser.parse()
    if value is None:
        raise RecipeError("is empty", where)
    if not isinstance(value, dict):
        raise RecipeError(f"must be a mapping of keys, not {describe(value)}", where, 1)
    return Document(where=where, values=value, lines=parser.lines)


def parse_value(text: str, where: str) -> Any:
    """Parse one value of a `--set key=value` by the same rules: `parse_value("1e-5", "--set") == 1e-05`."""
    if len(text) > 10_000:
        raise RecipeError("the value is too long", where[:80])
    return _Parser(text, where, lines=False).parse()


def describe(value: Any) -> str:
    """A value as an error message shows it: `describe("16") == "the text '16'"`."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:37] + '...'!r}"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return str(value)[:40]


class _Parser:
    """Builds plain values from YAML events, collecting faults that need not end the reading."""

    def __init__(self, text: str, where: str, lines: bool = True) -> None:
        self.where = where
        self.numbered = lines
        self.lines: dict[Loc, int] = {}
        self.faults: list[Fault] = []
        self.anchors: dict[str, tuple[Any, int]] = {}  # name -> value, number of values in it
        self.values = self.aliases = 0
        self._refuse_characters(text)
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.events = loader(text)

    def parse(self) -> Any:
        try:
            self.events.get_event()  # start of the stream
            if self.events.check_event(yaml.StreamEndEvent):
                return None
            self.events.get_event()  # start of the document
            value = self._value(())
            self.events.get_event()  # end of the document
            if not self.events.check_event(yaml.StreamEndEvent):
                message = "a second document starts here; a recipe is one document"
                raise self._error(self.events.peek_event(), (), message)
        except yaml.MarkedYAMLError as error:
            raise self._syntax_error(error) from None
        except (yaml.YAMLError, UnicodeError, ValueError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(f"not valid YAML: {str(error).splitlines()[0]}", self.where) from None
        finally:
            self.events.dispose()
        if self.faults:
            raise RecipeError.of(self.faults)
        return value

    def _refuse_characters(self, text: str) -> None:
        found = [
            Fault(
                "tab character; indent with spaces (inside a text write \\t in double quotes)"
                if match.group() == "\t"
                else f"character U+{ord(match.group()):04X} is not allowed in a recipe",
                self.where,
                text.count("\n", 0, match.start()) + 1 if self.numbered else None,
            )
            for match, _ in zip(_NOT_TEXT.finditer(text), range(MAX_FAULTS), strict=False)
        ]
        if found:
            raise RecipeError.of(found)

    def _syntax_error(self, error: yaml.MarkedYAMLError) -> RecipeError:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None and self.numbered else None
        what = " ".join(str(part) for part in (error.context, error.problem) if part)
        return RecipeError(f"not valid YAML: {what or 'cannot be parsed'}", self.where, line)

    def _line(self, event: yaml.Event) -> int | None:
        return event.start_mark.line + 1 if self.numbered else None

    def _error(self, event: yaml.Event, loc: Loc, message: str) -> RecipeError:
        return RecipeError(message, self.where, self._line(event), dotted(loc))

    def _fault(self, event: yaml.Event, loc: Loc, message: str) -> None:
        self.faults.append(Fault(message, self.where, self._line(event), dotted(loc)))
        if len(self.faults) > 10 * MAX_FAULTS:
            raise RecipeError.of(self.faults)

    def _count(self, event: yaml.Event, loc: Loc, number: int = 1) -> None:
        self.values += number
        if self.values > MAX_VALUES:
            raise self._error(event, (), f"more than {MAX_VALUES:,} values; a recipe is a few hundred")
        if len(loc) >= MAX_DEPTH:
            raise self._error(event, loc[:3], f"nested more than {MAX_DEPTH} deep")

    def _value(self, loc: Loc) -> Any:
        event = self.events.get_event()
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, loc)
        before = self.values
        self._count(event, loc)
        if event.tag is not None:
            self._fault(event, loc, f"tags such as {str(event.tag)[:60]!r} are refused; write plain values")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, loc)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(loc)
        else:
            value = self._mapping(loc)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.values - before)
        return value

    def _alias(self, event: yaml.AliasEvent, loc: Loc) -> Any:
        self.aliases += 1
        if self.aliases > MAX_ALIASES:
            raise self._error(event, loc, f"more than {MAX_ALIASES} aliases (*name)")
        if event.anchor not in self.anchors:
            self._fault(event, loc, f"the alias *{event.anchor} names no anchor before it")
            return None
        value, size = self.anchors[event.anchor]
        self._count(event, loc, size)
        return value

    def _sequence(self, loc: Loc) -> list[Any]:
        items: list[Any] = []
        while not self.events.check_event(yaml.SequenceEndEvent):
            here = (*loc, len(items))
            line = self._line(self.events.peek_event())
            if line is not None:
                self.lines[here] = line
            items.append(self._value(here))
        self.events.get_event()
        return items

    def _mapping(self, loc: Loc) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not self.events.check_event(yaml.MappingEndEvent):
            event = self.events.peek_event()
            key = self._key(event, loc)
            here = loc if key is None else (*loc, key)
            if key is not None and key in mapping:
                first = f"; first given on line {self.lines[here]}" if here in self.lines else ""
                self._fault(event, here, f"duplicate key{first}")
            elif key is not None and self.numbered:
                self.lines[here] = event.start_mark.line + 1
            value = self._value(here if key is not None else (*loc, "?"))
            if key is not None:
                mapping[key] = value
        self.events.get_event()
        return mapping

    def _key(self, event: yaml.Event, loc: Loc) -> str | None:
        if not isinstance(event, yaml.ScalarEvent):
            self._fault(event, loc, "a key must be a text, not a list, a mapping or an alias")
            self._value((*loc, "?"))
            return None
        key = self._value((*loc, "?"))
        if not isinstance(key, str):
            self._fault(event, loc, f"a key must be a text, not {describe(key)}; put it in quotes")
            return None
        if key == "<<" and event.implicit[0]:
            self._fault(event, loc, "merge keys (<<) are not read; write the keys out")
            return None
        return key

    def _scalar(self, event: yaml.ScalarEvent, loc: Loc) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            if any("\ud800" <= character <= "\udfff" for character in text):
                self._fault(event, loc, "holds half of a surrogate pair, which is not a character")
                return ""
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if _NOT_FINITE.fullmatch(text):
            self._fault(event, loc, f"{text} is not a finite number")
            return 0
        if _INT.fullmatch(text):
            if len(text) > 30:
                self._fault(event, loc, "the number is too long")
                return 0
            return int(text)
        if _FLOAT.fullmatch(text):
            value = float(text)
            if not math.isfinite(value):
                self._fault(event, loc, f"{text[:40]} is not a finite number")
                return 0
            return value
        return text
