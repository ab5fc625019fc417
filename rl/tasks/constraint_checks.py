"""Checks of a response against an instruction that a rule can decide, in the manner of IFEval (2311.07911).

A check is a function of the text of a response and of arguments that it names and types. It returns what is wrong, and
"" if nothing is: `word_count("two words", Relation.AT_MOST, 1) == "2 words"`. `CHECKS` has all of them by name; the
types of their parameters are how the arguments of a problem are read, so that a check is defined in one place.

Texts are read as a reader sees them (`visible` in rl/tasks/constraint_text.py, where words, sentences, lines and
paragraphs are defined). So zero-width characters neither hide a word nor make one. A letter of another alphabet that
looks the same is another letter, except where something is forbidden (`keywords_absent`, `no_comma`).
"""

from __future__ import annotations

import inspect
import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar, get_type_hints

from rl.tasks.constraint_arguments import (
    Code,
    Compare,
    Count,
    Flag,
    Keyword,
    Keywords,
    Letter,
    Options,
    Phrase,
    Positive,
    WordyPhrase,
    compared,
)
from rl.tasks.constraint_text import (
    begins,
    ends,
    folded,
    from_first_word,
    has_word,
    lines,
    occurrences,
    paragraphs,
    plain,
    sentences,
    straight,
    visible,
    words,
)

Fault = str  # what is wrong with a response; "" if nothing is

# --- the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Check:
    """A check with what reads its arguments, by their names, and those that need not be given."""

    name: str
    function: Callable[..., Fault]
    parsers: Mapping[str, Callable[[Any], Any]]
    optional: frozenset[str]
    read: Callable[[str], str]  # what the function gets of a response

    def fault(self, response: str, arguments: Mapping[str, Any]) -> Fault:
        return self.function(self.read(response), **arguments)


CHECKS: dict[str, Check] = {}
Function = TypeVar("Function", bound=Callable[..., Fault])


def _check(function: Function, read: Callable[[str], str] = visible) -> Function:
    hints = get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    CHECKS[function.__name__] = Check(
        function.__name__,
        function,
        {parameter.name: hints[parameter.name].__metadata__[0] for parameter in parameters},
        frozenset(parameter.name for parameter in parameters if parameter.default is not parameter.empty),
        read,
    )
    return function


def _raw_check(function: Function) -> Function:
    """A check of what a program reads, not a person: it gets the hidden characters too."""
    return _check(function, read=str.strip)


# --- how long ---------------------------------------------------------------------------------------------------------


@_check
def word_count(text: str, relation: Compare, count: Positive) -> Fault:
    """The number of words. "It's 3.14 - or so" has 4, "word-by-word" 1."""
    return compared(len(words(text)), relation, count, "words")


@_check
def sentence_count(text: str, relation: Compare, count: Positive) -> Fault:
    """The number of sentences. "Dr. No? Yes! ..." has 2, each item of a list is one at least."""
    return compared(len(sentences(text)), relation, count, "sentences")


@_check
def longest_sentence(text: str, relation: Compare, count: Positive) -> Fault:
    """The number of words of the longest sentence: 3 in "One two three. One two."."""
    longest = max((len(words(sentence)) for sentence in sentences(text)), default=0)
    return compared(longest, relation, count, "words in the longest sentence")


@_check
def line_count(text: str, relation: Compare, count: Positive) -> Fault:
    """The number of lines that hold a word. "one\\n\\n---\\ntwo" has 2."""
    return compared(len(lines(text)), relation, count, "lines")


@_check
def paragraph_count(text: str, relation: Compare, count: Positive) -> Fault:
    """The number of paragraphs, which blank lines divide. "a\\nb\\n\\n***\\n\\nc" has 2."""
    return compared(len(paragraphs(text)), relation, count, "paragraphs")


@_check
def character_count(text: str, relation: Compare, count: Positive) -> Fault:
    """The number of characters that are seen, blanks included. "naïve no" has 8."""
    return compared(len(text), relation, count, "characters")


@_check
def part_count(text: str, divider: Phrase, relation: Compare, count: Positive) -> Fault:
    """The number of parts between lines that are the divider and nothing else, each with a word in it.

    With the divider `* * *`, "one\\n* * *\\ntwo" has 2 parts; "one * * * two" has 1.
    """
    parts = [False]  # whether each has a word
    for line in text.split("\n"):
        if line.strip() == divider:
            parts.append(False)
        else:
            parts[-1] = parts[-1] or has_word(line)
    if not all(parts):
        return f"an empty part beside a line {divider!r}"
    return compared(len(parts), relation, count, f"parts divided by a line {divider!r}")


@_check
def paragraph_word_count(text: str, paragraph: Positive, relation: Compare, count: Positive) -> Fault:
    """The number of words of one paragraph, the first being 1. The second of "a b\\n\\nc" has 1."""
    found = paragraphs(text)
    if len(found) < paragraph:
        return f"{len(found)} paragraphs"
    return compared(len(words(found[paragraph - 1])), relation, count, f"words in paragraph {paragraph}")


@_check
def paragraph_first_word(text: str, paragraph: Positive, word: WordyPhrase) -> Fault:
    """One paragraph, the first being 1, starts with a word or phrase, in either case, whatever signs stand before it.

    The second of "a\\n\\n**Once more**" starts with "once" and with "Once more", not with "on".
    """
    found = paragraphs(text)
    if len(found) < paragraph:
        return f"{len(found)} paragraphs"
    start = from_first_word(folded(found[paragraph - 1]))
    if begins(start, from_first_word(folded(word))) is not None:
        return ""
    return f"paragraph {paragraph} starts with {start[:20]!r}"


# --- what is in it ----------------------------------------------------------------------------------------------------


@_check
def keywords_present(text: str, keywords: Keywords) -> Fault:
    """Every keyword or phrase stands there as words of its own, in either case: "Cats" does not hold "cat"."""
    text = folded(text)
    return next((f"no {keyword!r}" for keyword in keywords if not occurrences(text, folded(keyword))), "")


# Letters of other alphabets that pass for Latin ones, without case.
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕԁһԛԝѵвнкмтгοανρικυχετγωηѡɑıɡʏ",
    "aeopcyxijsdhqwvbhkmtroavpikuxetywnwaigy",
)


@lru_cache(maxsize=4096)
def _without_dress(character: str) -> str:
    """A fullwidth, circled or mathematical letter as the plain one; no sign that stands for a whole phrase (U+FDFA)."""
    plainer = unicodedata.normalize("NFKC", character)
    return plainer if len(plainer) <= 3 else character


def _unmasked(text: str) -> str:
    return folded(text if text.isascii() else "".join(map(_without_dress, text))).translate(_LOOKALIKES)


@_check
def keywords_absent(text: str, keywords: Keywords) -> Fault:
    """No keyword or phrase stands there as words of its own, in either case: "secretary" does not hold "secret".

    It stands there too where it is cut by Markdown ("se**cret**") or spelled with letters that look the same: fullwidth
    or mathematical ones, or those of another alphabet ("sеcret" with a Cyrillic е).
    """
    readings = {_unmasked(text), _unmasked(re.sub(r"[*_~`]+", "", text))}
    for keyword in keywords:
        if any(occurrences(read, _unmasked(keyword)) for read in readings):
            return f"has {keyword!r}"
    return ""


@_check
def keyword_count(text: str, keyword: Keyword, relation: Compare, count: Count) -> Fault:
    """How often a keyword or phrase stands there as words of its own. "Cat, cats, cat's" has "cat" 2 times."""
    return compared(occurrences(folded(text), folded(keyword)), relation, count, f"times {keyword!r}")


@_check
def letter_count(text: str, letter: Letter, relation: Compare, count: Count, ignore_case: Flag = True) -> Fault:
    """How often a letter, or any other character, stands there. "Eye, é" has 2 e; 1 with `ignore_case` false."""
    if ignore_case:
        text, letter = text.lower(), letter.lower()
    return compared(text.count(letter), relation, count, f"times {letter!r}")


# All punctuation with COMMA in its Unicode name, and the low quotation mark that looks like one.
_COMMA = re.compile(
    "[,\u055d\u060c\u07f8\u1363\u1802\u1808\u201a\u2e32\u2e34\u2e41\u2e49\u2e4c\u3001\ua4fe\ua60d\ua6f5\ufe10\ufe11"
    "\ufe50\ufe51\uff0c\uff64\U0001144d\U0001145a\U00016e97\U0001da87]"
)


@_check
def no_comma(text: str) -> Fault:
    """There is no comma, of any script: "1,000" has one, and so has "一，二"."""
    found = _COMMA.search(text)
    return f"has {found.group()!r} at character {found.start()}" if found else ""


@_check
def no_repeated_lines(text: str) -> Fault:
    """No two lines have the same words in the same order. "One.\\n- one" repeats a line, a second "---" does not."""
    seen: set[tuple[str, ...]] = set()
    for line in lines(text):
        spelled = tuple(words(folded(line)))
        if spelled in seen:
            return f"repeats the line {line.strip()[:40]!r}"
        seen.add(spelled)
    return ""


@_check
def language(text: str, code: Code) -> Fault:
    """More than half of the words are in a language (ISO 639-1), as `rl.language.language_of` tells.

    A text too short to tell is wrong: `language_of` wants some 40 letters of a script that several languages share.
    """
    from rl.language import language_of

    found = language_of(text.lower() if text.isupper() else text)  # it takes short words in capitals for names
    return "" if found == code else f"its language is {found or 'not to be told'}"


# --- upper and lower case ---------------------------------------------------------------------------------------------


@_check
def all_lowercase(text: str) -> Fault:
    """There are letters, and none is upper or title case: "the 3 cats", not "42"."""
    return "" if text.islower() else "not all lower case"


@_check
def all_uppercase(text: str) -> Fault:
    """There are letters, and none is lower or title case: "3 CATS!", not "42"."""
    return "" if text.isupper() else "not all upper case"


@_check
def capital_word_count(text: str, relation: Compare, count: Count) -> Fault:
    """The number of words all of whose letters are capitals. "I saw NASA's GPT-4 at the USA" has 3: I, GPT-4, USA."""
    return compared(sum(word.isupper() for word in words(text)), relation, count, "words in capitals")


# --- how it starts and ends -------------------------------------------------------------------------------------------


@_check
def starts_with(text: str, phrase: Phrase) -> Fault:
    """It starts with exactly this phrase, in this case, not inside a word: "Wellness" does not start with "Well"."""
    return "" if begins(plain(text), plain(phrase)) is not None else f"starts with {plain(text)[:40]!r}"


@_check
def ends_with(text: str, phrase: Phrase) -> Fault:
    """It ends with exactly this phrase, in this case, and nothing after it: "Bye!" does not end with "Bye"."""
    return "" if ends(plain(text), plain(phrase)) else f"ends with {plain(text)[-40:]!r}"


@_check
def wrapped_in_quotes(text: str) -> Fault:
    """It is one quotation in double quotation marks, straight or typographic.

    '"It is "so" so."' is one; '"Yes" and "no"' is not: the quotation that starts it does not end it.
    """
    marked = straight(text)
    if len(marked) < 3 or not (marked.startswith('"') and marked.endswith('"')):
        return "not between double quotation marks"
    depth, opened = 0, False
    for place, character in enumerate(marked):
        if character == '"':
            before = marked[place - 1 : place]
            opened = opened if before == '"' else not before or before.isspace() or before in "([{\u2013\u2014"
            depth += 1 if opened else -1
            if depth == 0 and place < len(marked) - 1:
                return f"its first quotation ends at character {place}"
    return ""


@_check
def title(text: str) -> Fault:
    """There is a title in double angular brackets on one line, with a word: "<<Joy>>"; "<Joy>" and "<<>>" are none."""
    return "" if any(map(has_word, re.findall(r"<<([^<>\n]+)>>", text))) else "no <<title>>"


@_check
def postscript(text: str, marker: Phrase) -> Fault:
    """A line starts with the marker, in this case, and words stand before it and behind it: "Bye.\\nP.S. Call me."."""
    text, marker = straight(text), straight(marker)
    place = -1
    start = 0
    for line in text.split("\n"):
        offset = len(line) - len(line.lstrip("*_#> \t"))
        if line.startswith(marker, offset):
            place = start + offset
        start += len(line) + 1
    if place < 0:
        return f"no line starts with {marker!r}"
    if not has_word(text[:place]):
        return "nothing before the postscript"
    return "" if has_word(text[place + len(marker) :]) else "an empty postscript"


@_check
def repeats_prompt(text: str, prompt: WordyPhrase) -> Fault:
    """It starts with the prompt, in this case, and then says something that is not the prompt again."""
    text, prompt = plain(text), plain(prompt)
    start = 0
    while (end := begins(text, prompt, start)) is not None:
        start = end + 1 if text.startswith(" ", end) else end
    if start == 0:
        return f"starts with {text[:40]!r}"
    return "" if has_word(text[start:]) else "nothing after the prompt"


# --- its form ---------------------------------------------------------------------------------------------------------


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@_raw_check
def json_only(text: str) -> Fault:
    """It is one JSON object or list, not an empty one, by itself or in one fence of three backticks, and nothing else.

    '{"a": 1}' is; '[]', '"a"', '{"a": NaN}' and 'Here you are: {"a": 1}' are not.
    """
    body = text
    if text.startswith("```"):
        opening, _, rest = text.partition("\n")
        if opening[3:].strip().casefold() not in ("", "json") or not rest.endswith("```"):
            return "not one JSON fence"
        body = rest.removesuffix("```")
    try:
        # Numbers stay text: one of 5,000 digits is JSON, but Python makes no int of it.
        value = json.loads(body, parse_constant=_no_constant, parse_int=str, parse_float=str)
    except RecursionError:
        return "JSON that is nested too deeply"
    except ValueError as error:
        return f"not JSON: {str(error)[:60]}"
    return "" if isinstance(value, dict | list) and value else "no JSON object or list with something in it"


def _items(text: str, marker: str) -> int:
    item = re.compile(rf"[ \t]*(?:{marker})[ \t]+(?=\S)")
    return sum(1 for line in lines(text) if (found := item.match(line)) and has_word(line[found.end() :]))


@_check
def bullet_count(text: str, relation: Compare, count: Count) -> Fault:
    """The number of lines "* item", "- item", "+ item" or "• item", nested ones too. "**Bold**" and "-1" are none."""
    return compared(_items(text, "[-*+\u2022]"), relation, count, "bullet points")


@_check
def numbered_count(text: str, relation: Compare, count: Count) -> Fault:
    """The number of lines "1. item" or "1) item", nested ones too. "1.5 litres" is none."""
    return compared(_items(text, "[0-9]{1,9}[.)]"), relation, count, "numbered items")


_HIGHLIGHT = re.compile(r"(?<!\*)(\*{1,3})(?![\s*])([^*\n]+)(?<!\s)\1(?!\*)")


@_check
def highlight_count(text: str, relation: Compare, count: Count) -> Fault:
    """The number of stretches within a line in one, two or three asterisks: "*so* **and** so" has 2, "2 * 3 * 4" 0."""
    found = sum(has_word(inside) for _, inside in _HIGHLIGHT.findall(text))
    return compared(found, relation, count, "highlighted sections")


@_check
def placeholder_count(text: str, relation: Compare, count: Count) -> Fault:
    """The number of square brackets around a letter, on one line: "[your name] [1] [a link](x)" has 1."""
    found = re.findall(r"\[([^\[\]\n]+)\](?!\()", text)
    return compared(sum(any(map(str.isalpha, inside)) for inside in found), relation, count, "placeholders")


@_check
def section_count(text: str, marker: Phrase, relation: Compare, count: Count) -> Fault:
    """The number of sections: from a line that starts with the marker and a number or letter, to the next such line.

    "## Section 1\\nOne.\\nSection B: two." has 2. A section with no word counts for none, equal labels count once.
    """
    label = r"(?:[ \t]{1,3}(?:[0-9]{1,4}|[IVXLC]{1,7}|[A-Za-z])|[0-9]{1,4})(?!\w)"
    heading = re.compile(rf"[*_#> \t]*{re.escape(marker)}({label})")
    sections: dict[str, bool] = {}
    current = ""
    for line in text.split("\n"):
        found = heading.match(line)
        if found:
            current, line = found.group(1).strip(), line[found.end() :]
        if current:
            sections[current] = sections.get(current, False) or has_word(line)
    return compared(sum(sections.values()), relation, count, f"sections marked {marker!r}")


@_check
def two_responses(text: str) -> Fault:
    """Two responses whose words differ, with six asterisks between them, once: "Yes.\\n******\\nNo."."""
    parts = re.split(r"(?<!\*)\*{6}(?!\*)", text)
    if len(parts) != 2:
        return f"{len(parts) - 1} times ******"
    first, second = (words(folded(part)) for part in parts)
    if not first or not second:
        return "an empty response beside ******"
    return "" if first != second else "twice the same response"


@_check
def one_of(text: str, options: Options) -> Fault:
    """It is one of the options, in either case, give or take quotation marks, asterisks and a full stop around it.

    Of yes and no, "**Yes.**" is one; "Yes, it is" and "y" are none.
    """

    def bare(spelled: str) -> str:
        return folded(spelled).strip(" \"'*.")

    return "" if bare(text) in map(bare, options) else f"{text[:40]!r} is no option"
