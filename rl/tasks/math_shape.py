"""How a mathematical answer is built: its text is cleaned and read into a shape, before anything is computed.

Only the leaves of a shape (`Value`) are mathematics for a computer algebra system; lists, sets, intervals, chains of
equations, units, percent signs and words are told apart here, because that is where verifiers are fooled: `6=5`, `5%`,
`3 or 5` and `10_2` are all "equal" to something else if they are handed over as they are. Standard library only.

    read(r"x = \\frac{1}{2} \\text{ cm}")   # Chain(names=("x",), sides=(Value("\\\\frac{1}{2}", unit="cm"),), ...)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rl.tasks.math_text import CLOSE_TEXT, OPEN_TEXT, UNIT_OF, clean, unit_name

MAX_DEPTH = 20  # brackets within brackets; deeper is no answer


class Unreadable(ValueError):
    """A text that has no shape: unbalanced, empty in places, nested too deeply."""


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Words:
    """Words and nothing else, in lower case: `Words("no solution")`."""

    text: str


@dataclass(frozen=True, slots=True)
class Value:
    """One expression and what stood around it: `Value("5", percent=True)` for `5\\%`, `Value("101", base="2")` for
    `101_2`."""

    latex: str
    unit: str = ""  # "cm", "$"
    percent: bool = False
    degrees: bool = False
    base: str = ""


@dataclass(frozen=True, slots=True)
class Several:
    """Several answers, or one with several parts. `brackets` is "" for a bare list, "{}" for a set (both without
    order), "()", "[]", "[)", "(]" for tuples and intervals. `of` names the variable if it was an inequality.

    Example: `1 < x \\le 2` -> `Several((Value("1"), Value("2")), "(]", of="x")`.
    """

    items: tuple[Shape, ...]
    brackets: str = ""
    of: str = ""

    @property
    def ordered(self) -> bool:
        return self.brackets not in ("", "{}")


@dataclass(frozen=True, slots=True)
class Union:
    """Sets joined by \\cup, or inequalities by "or"."""

    parts: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """`a = b \\approx c`. `names` are the sides that only name the rest (`x`, `f(2)`, `\\text{Area}`), `sides` the
    others, in order, `exact` how many of them stand before the first ≈."""

    names: tuple[str, ...]
    sides: tuple[Shape, ...]
    exact: int


@dataclass(frozen=True, slots=True)
class Relation:
    """Sides with relations that are no chain of equations and no interval: `x \\ne 2`, `x < y`."""

    operators: tuple[str, ...]
    sides: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Matrix:
    rows: tuple[tuple[Shape, ...], ...]


Shape = Words | Value | Several | Union | Chain | Relation | Matrix


# --- reading ---------------------------------------------------------------------------------------------------------

_OPENERS, _CLOSERS = "([{", ")]}"
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_KNOWN_NAMES = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "gcd", "lcm", "max", "min", "mod")
) | {"or", "and", "inf"}
_NOTHING = frozenset(
    {"no solution", "no solutions", "none", "no real solution", "no real solutions", "empty set", "the empty set"}
)


_THOUSANDS = re.compile(r"(?<![0-9,.])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")


def read(text: str) -> Shape:
    """The shape of an answer; Unreadable for what has none."""
    text = clean(text)
    if not re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates: (100,200) is a point
        text = _THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    return _read(text, 0)


def _read(text: str, depth: int) -> Shape:
    text = text.strip()
    if not text:
        raise Unreadable("nothing is there")
    if depth > MAX_DEPTH:
        raise Unreadable("nested too deeply")
    words = _words(text)
    if words is not None:
        return words
    inner = _enclosed(text, OPEN_TEXT, CLOSE_TEXT)
    if inner is not None:
        return _read(inner, depth + 1)
    matrix = re.fullmatch(r"\\begin\{([bpvBV]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", text)
    if matrix is not None and matrix.group(1) not in ("vmatrix", "Vmatrix"):
        return _matrix(matrix.group(2), depth)
    parts = _split(text, r"\\cup(?![A-Za-z])")
    if len(parts) > 1:
        return Union(tuple(_read(part, depth + 1) for part in parts))
    listed = _list(text, depth)
    if listed is not None:
        return listed
    related = _related(text, depth)
    if related is not None:
        return related
    bracketed = _bracketed(text, depth)
    if bracketed is not None:
        return bracketed
    if len(re.findall(r"\\[pm]{2}(?![A-Za-z])", text)) == 1 and re.search(r"\\(?:pm|mp)(?![A-Za-z])", text):
        both = [re.sub(r"\\(?:pm|mp)(?![A-Za-z])\s*", sign, text) for sign in "+-"]
        return Several(tuple(_read(one.lstrip("+"), depth + 1) for one in both))
    return _value(text)


def _words(text: str) -> Words | None:
    """A text of words alone. Three letters in a row are a word unless they are a function's name; fewer only count in
    `\\text{}`, since `ab` is a product."""
    if re.fullmatch(r"\\emptyset|\\\{ ?\\\}", text):
        return Words("no solution")
    bare = text.replace(OPEN_TEXT, " ").replace(CLOSE_TEXT, " ")
    bare = re.sub(r"\s+", " ", bare).strip(" .!\"'")
    if not re.fullmatch(r"[^\W\d_]+(?:[ '\u2019,-]+[^\W\d_]+)*", bare):
        return None
    found = _WORD.findall(bare)
    spoken = OPEN_TEXT in text and len(bare) > 1
    if not spoken and not any(word.lower() == "no" or _is_word(word) for word in found):
        return None
    if {"or", "and"} & {word.lower() for word in found} and all(
        len(word) == 1 or word.lower() in ("or", "and") for word in found
    ):
        return None  # "B or C" is a list
    lowered = bare.casefold()
    return Words("no solution" if lowered in _NOTHING else lowered)


def _is_word(text: str) -> bool:
    return re.search(r"[^\W\d_]{3}", text) is not None and text.lower() not in _KNOWN_NAMES


def _enclosed(text: str, left: str, right: str) -> str | None:
    """What stands inside, if the text is one pair of these around everything."""
    if not (text.startswith(left) and text.endswith(right)) or len(text) < len(left) + len(right):
        return None
    inner = text[len(left) : len(text) - len(right)]
    return None if left in inner or right in inner else inner


def _tokens(text: str) -> list[tuple[str, int]]:
    """(token, depth before it): single characters, and commands (`\\frac`, `\\{`) whole. Every bracket opens or closes,
    whatever its kind, since `[1,2)` is an interval.

    Errors: Unreadable where something closes that was not opened, or stays open.
    """
    found: list[tuple[str, int]] = []
    depth = 0
    for match in re.finditer(r"\\begin\{\w+\}|\\end\{\w+\}|\\[A-Za-z]+|\\.|.", text, re.DOTALL):
        token = match.group()
        name = token[1:] if token.startswith("\\") else ""
        opens = token in _OPENERS or token in ("\\{", OPEN_TEXT) or name in ("langle", "lfloor", "lceil")
        opens = opens or name.startswith("begin{")
        closes = token in _CLOSERS or token in ("\\}", CLOSE_TEXT) or name in ("rangle", "rfloor", "rceil")
        closes = closes or name.startswith("end{")
        if closes:
            depth -= 1
            if depth < 0:
                raise Unreadable("a bracket closes that was not opened")
        found.append((token, depth))
        if opens:
            depth += 1
    if depth:
        raise Unreadable("a bracket is not closed")
    return found


def _split(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand in no bracket."""
    return [piece for piece, _ in _split_with(text, separator)]


def _split_with(text: str, separator: str) -> list[tuple[str, str]]:
    """(piece, the separator after it or "")."""
    pattern = re.compile(separator)
    starts: dict[int, int] = {}  # position -> depth, of everything outside of brackets
    position = 0
    for token, depth in _tokens(text):
        starts[position] = depth
        position += len(token)
    pieces: list[tuple[str, str]] = []
    begin = 0
    for match in pattern.finditer(text):
        if starts.get(match.start(), 1) == 0 and match.start() >= begin:
            pieces.append((text[begin : match.start()], match.group()))
            begin = match.end()
    return [*pieces, (text[begin:], "")]


_AND_OR = rf"(?:{OPEN_TEXT}\s*(?:and|or)\s*{CLOSE_TEXT}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))"


def _list(text: str, depth: int) -> Shape | None:
    """A bare list: `1, 2`, `2 and 1`, `x = 1 or x = 2`; inequalities joined by "or" are a union."""
    pieces = _split_with(text, rf"[,;]\s*{_AND_OR}|{_AND_OR}|[,;]")
    if len(pieces) == 1:
        return None
    items = tuple(_read(piece, depth + 1) for piece, _ in pieces)
    between = " ".join(separator for _, separator in pieces)
    if all(isinstance(item, Several) and item.of for item in items):
        if "or" in between:
            return Union(items)
        both = _intersection(items)
        if both is not None:
            return both
    flat: list[Shape] = []
    for item in items:  # "±1, 2" and "x = 1, x = 2"
        flat += item.items if isinstance(item, Several) and not item.brackets else [item]
    return Several(tuple(flat))


def _intersection(items: Sequence[Shape]) -> Shape | None:
    """`x > 1 and x < 3` as one interval."""
    if len(items) != 2:
        return None
    below, above = items
    if not (isinstance(below, Several) and isinstance(above, Several)) or below.of != above.of:
        return None
    if below.items[0] == Value(r"-\infty"):
        below, above = above, below
    if below.items[1] == Value(r"\infty") and above.items[0] == Value(r"-\infty"):
        return Several((below.items[0], above.items[1]), below.brackets[0] + above.brackets[1], below.of)
    return None


_OPERATOR = r"\\(?:approx|le|ge|ne|in)(?![A-Za-z])|[=<>]"


def _related(text: str, depth: int) -> Shape | None:
    pieces = _split_with(text, _OPERATOR)
    if len(pieces) == 1:
        return None
    operators = [operator for _, operator in pieces[:-1]]
    texts = [piece.strip() for piece, _ in pieces]
    if any(not piece for piece in texts):
        raise Unreadable("a relation has nothing on one side")
    if operators == [r"\in"] and _is_name(texts[0]):
        return _read(texts[1], depth + 1)
    if set(operators) <= {"=", r"\approx"}:
        names = tuple(re.sub(r"\s", "", piece) for piece in texts if _is_name(piece))
        if len(names) == len(texts):  # x = y
            names, texts = names[:1], texts[1:]
            operators = operators[1:]
        else:
            kept = [i for i, piece in enumerate(texts) if not _is_name(piece)]
            operators = [operators[i - 1] if i else "=" for i in kept][1:]
            texts = [texts[i] for i in kept]
        sides = tuple(_read(piece, depth + 1) for piece in texts)
        exact = 1 + next((i for i, operator in enumerate(operators) if operator != "="), len(operators))
        return Chain(names, sides, exact)
    interval = _interval(operators, texts, depth)
    if interval is not None:
        return interval
    return Relation(tuple(operators), tuple(_read(piece, depth + 1) for piece in texts))


_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def _interval(operators: list[str], texts: list[str], depth: int) -> Shape | None:
    """`1 < x \\le 2`, `x > 3`, `3 < x` as intervals; None for anything else."""
    if not set(operators) <= set(_FLIPPED):
        return None
    if operators[0] in (">", r"\ge"):  # read from small to large
        operators, texts = [_FLIPPED[operator] for operator in reversed(operators)], texts[::-1]
    if not set(operators) <= {"<", r"\le"} or len(operators) > 2:
        return None
    variable = 1 if len(texts) == 3 else next((i for i, piece in enumerate(texts) if _is_variable(piece)), -1)
    if variable < 0 or not _is_variable(texts[variable]) or sum(map(_is_variable, texts)) > 1:
        return None
    low = _read(texts[variable - 1], depth + 1) if variable else Value(r"-\infty")
    high = _read(texts[variable + 1], depth + 1) if variable + 1 < len(texts) else Value(r"\infty")
    left = "[" if variable and operators[variable - 1] == r"\le" else "("
    right = "]" if variable + 1 < len(texts) and operators[variable] == r"\le" else ")"
    return Several((low, high), left + right, of=texts[variable])


def _is_variable(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega)", text) is not None


def _is_name(text: str) -> bool:
    """Whether a side of an equation only names the other: `x`, `A_n`, `f(2)`, `P(A)`, `\\angle ABC`, `\\text{Area}`,
    `|AB|`, `\\overline{AB}`. Not `e` and not `i`, which are numbers."""
    text = text.strip()
    if _enclosed(text, OPEN_TEXT, CLOSE_TEXT) is not None or isinstance(_words(text), Words):
        return True
    if text in ("e", "i"):
        return False
    text = re.sub(r"\\(?:angle|triangle|overline|vec|hat|bar|mathbf|measuredangle)(?![A-Za-z])\s*", "", text)
    text = text.replace("{", "").replace("}", "").strip(" |")
    if re.fullmatch(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)", text):  # (x, y) = (1, 2)
        return True
    names = r"(?:[A-Za-z]{1,3}|\\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|varphi))'*(?:_\w+)?'*"
    return re.fullmatch(rf"m?\s?(?:{names})(?:\s?\([^()]*\))?", text) is not None


_BRACKETS = {"(": ")", "[": "]", "\\{": "\\}", "\\langle": "\\rangle", "{": "}"}


def _bracketed(text: str, depth: int) -> Shape | None:
    """Something in one pair of brackets around the whole."""
    tokens = _tokens(text)
    first, last = tokens[0][0], tokens[-1][0]
    if (
        first not in _BRACKETS
        or any(at == 0 for _, at in tokens[1:-1])
        or last not in (")", "]", "\\}", "\\rangle", "}")
    ):
        return None
    if len(tokens) < 3 or tokens[-1][1] != 0:
        return None
    inner = text[len(first) : len(text) - len(last)]
    items = _split(inner, r"[,;]")
    kind = {"\\{": "{", "\\langle": "(", "{": ""}.get(first, first) + {"\\}": "}", "\\rangle": ")", "}": ""}.get(
        last, last
    )
    if kind not in ("()", "[]", "[)", "(]", "{}", ""):
        raise Unreadable(f"{first} is closed by {last}")
    if kind == "" or (len(items) == 1 and kind != "{}"):
        return _read(inner, depth + 1)
    if kind == "{}" and re.search(r"\\mid(?![A-Za-z])|\||:", inner):
        return Value(re.sub(r"\s", "", text))  # a set by its property: text to us
    if kind in ("[)", "(]") and len(items) != 2:
        raise Unreadable("a half-open interval has two ends")
    if kind == "{}":
        spread: list[Shape] = []
        for item in items:
            shape = _read(item, depth + 1)
            spread += shape.items if isinstance(shape, Several) and not shape.brackets else [shape]
        return Several(tuple(spread), kind)
    return Several(tuple(_read(item, depth + 1) for item in items), kind)


def _matrix(body: str, depth: int) -> Matrix:
    rows = [row for row in re.split(r"\\\\", re.sub(r"\\hline", "", body)) if row.strip()]
    return Matrix(tuple(tuple(_read(cell, depth + 1) for cell in _split(row, "&")) for row in rows))


# --- one value -------------------------------------------------------------------------------------------------------

_BARE_UNIT = re.compile(
    r"(?<=[0-9}!)])\s*(?:(?P<spaced>(?<=\s)[A-Za-z]{1,2})|(?P<long>[A-Za-z]{2,}(?:\s+[A-Za-z]{2,}){0,3}))"
    r"(?P<power>\^\{[23]\})?$"
)


def _value(text: str) -> Value:
    text = text.strip()
    unit, percent, degrees, base = "", False, False, ""
    if text.endswith("\\%"):
        text, percent = text[:-2].strip(), True
    spelled = re.fullmatch(rf"(.*\S)\s*{OPEN_TEXT}?\s*(?:percent|percentage|pct)\s*{CLOSE_TEXT}?", text, re.IGNORECASE)
    if spelled and not percent:
        text, percent = spelled.group(1), True
    money = re.fullmatch(r"([+-]?)\s*(\\\$|\u20ac|\u00a3)\s*(.+)", text) or re.fullmatch(r"()()(.+?)\s*\\\$", text)
    if money:
        sign, symbol, rest = money.groups()
        text, unit = f"{sign}{rest}".strip(), {"\\$": "$", "": "$"}.get(symbol, symbol)
    named = re.fullmatch(rf"(.*[^\s])\s*{OPEN_TEXT}([^{CLOSE_TEXT}]*){CLOSE_TEXT}((?:\^\{{[0-9-]+\}})?)", text)
    bare = _BARE_UNIT.search(text) if named is None else None
    if named and named.group(2).strip():
        text, unit = named.group(1), unit or unit_name(named.group(2) + named.group(3).strip("^{}"))
    elif named:
        text = named.group(1)
    elif bare and _is_unit(bare):
        spelling = (bare.group("spaced") or bare.group("long")) + (bare.group("power") or "").strip("^{}")
        text, unit = text[: bare.start()], unit or unit_name(spelling)
    if text.endswith(r"^{\circ}") and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])", text):
        text, degrees = text.removesuffix(r"^{\circ}").strip(), True
    elif match := re.fullmatch(r"(.+)\^\{\\circ\} ?([CF])", text):
        text, unit = match.group(1).strip(), "\u00b0" + match.group(2)
    if unit == "degree":
        unit, degrees = "", True
    subscript = re.fullmatch(rf"([0-9A-F]+)\s*_\s*\{{?\s*{OPEN_TEXT}?\s*([0-9]+|[a-z]+)\s*{CLOSE_TEXT}?\s*\}}?", text)
    if subscript:
        text, base = subscript.group(1), subscript.group(2)
    if OPEN_TEXT in text or "\\$" in text or "\\%" in text:
        raise Unreadable("words within an expression")
    text = _numbers_joined(text)
    if not text:
        raise Unreadable("nothing is there")
    return Value(text, unit, percent, degrees, base)


def _numbers_joined(text: str) -> str:
    """`12 345` is one number; `3 4` is no expression, though a parser may make 7 of it."""
    if re.fullmatch(r"[+-]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]+)?", text):
        return text.replace(" ", "")
    if re.search(r"[0-9.]\s+[0-9]", text):
        raise Unreadable("two numbers with nothing between them")
    return text.strip()


def _is_unit(found: re.Match[str]) -> bool:
    spaced, long = found.group("spaced"), found.group("long")
    if spaced is not None:
        return spaced.lower() in UNIT_OF
    words = long.split()
    if words[0].lower() in _KNOWN_NAMES and words[0].lower() not in UNIT_OF:
        return False
    return all(word.lower() in UNIT_OF or len(word) >= 3 for word in words)
