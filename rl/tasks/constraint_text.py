"""How the constraint checks read a text: what a reader sees of it, its words, sentences, lines and paragraphs.

Every count that a reward hangs on is defined here, once, in words that a person could count by. Only letters and
digits make a word, so bare punctuation never fills a count, and characters that show nothing are not there. Every
function takes time in proportion to the length of the text, whatever the text is.

    words(visible("It's 3.14, roughly\\u200b.")) == ["It's", "3.14", "roughly"]
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from itertools import groupby

# Where marks and hidden characters are: planes 0 and 1, and the tags and selectors of plane 14.
_PLANES = (range(0x20000), range(0xE0000, 0xE0200))


def _class(wanted: Callable[[str], bool]) -> str:
    """The inside of a regex character class with all characters that are wanted, as ranges."""
    ranges: list[list[int]] = []
    for plane in _PLANES:
        for code in plane:
            if wanted(chr(code)):
                if ranges and ranges[-1][1] == code - 1:
                    ranges[-1][1] = code
                else:
                    ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def _shows_nothing(character: str) -> bool:
    category = unicodedata.category(character)
    if category == "Cc":
        return not character.isspace()
    # Cf: zero-width spaces and joiners, soft hyphens, direction marks, tags. Then Hangul fillers, variation selectors
    # and other characters that are letters, marks or symbols by category and blank on the page.
    return (
        category == "Cf"
        or character in "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
        or ("\u180b" <= character <= "\u180f" or "\ufe00" <= character <= "\ufe0f" or character >= "\U000e0100")
    )


_MARK = _class(lambda character: unicodedata.category(character).startswith("M"))
_HIDDEN = re.compile(f"[{_class(_shows_nothing)}]")
# As in the stream-safe text format (Unicode Standard Annex 15). Without a bound, composing a long run of marks takes
# time in proportion to its square: 10 s for 100,000 of them.
_MOST_MARKS = 30
_PILED_MARKS = re.compile(f"([{_MARK}]{{{_MOST_MARKS}}})[{_MARK}]+")

# Han, Hiragana and Katakana, which are written without blanks.
_IDEOGRAPH = (
    "\u3005\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_FIRST = rf"(?![_{_IDEOGRAPH}])\w"  # a letter or digit
_INSIDE = rf"(?![_{_IDEOGRAPH}])[\w{_MARK}]"  # the same, or a mark on one
_PART = rf"{_FIRST}(?:{_INSIDE})*+"
_WORD = re.compile(
    rf"[{_IDEOGRAPH}]|{_PART}(?:['\u2019.\-\u2010\u2011]{_PART}|(?<=[0-9])[,:][0-9]++(?:{_INSIDE})*+){{0,3}}+"
)
_CONTINUES = re.compile(_INSIDE)

_ABBREVIATIONS = frozenset(("mr", "mrs", "ms", "dr", "prof", "st", "vs", "cf", "fig", "vol", "approx"))
_INITIALS = re.compile(r"[^\W\d_](?:\.[^\W\d_])+")
_HALF_DAYS = frozenset(("a.m", "p.m"))
_TOKEN_BEFORE = re.compile(r"(?:(\w)\w*\s+)?(\w[\w.]*)$")  # with the first letter of the word before it
_NEXT_LETTER = re.compile(r"\s{1,3}[\"'(\u201c]?(\w)")
_LIST_MARKER = re.compile(r"[^\S\n]*(?:[-*+\u2022]|[0-9]{1,9}[.)])[^\S\n]+")
_QUOTES = "\"'\u201d\u2019\u00bb"
_CLOSING = _QUOTES + ")\\]*_"
_SENTENCE_END = re.compile(
    rf"(?<![.!?\u2026\u061f\u06d4\u0964\u0965])[.!?\u2026\u061f\u06d4\u0964\u0965]++[{_CLOSING}]*+(?=\s|\Z)"
    rf"|[\u3002\uff01\uff1f\uff61]++[{_CLOSING}\u300d\u300f\uff09]*+"
)

_STRAIGHT = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")


def visible(text: str) -> str:
    """What a reader sees: no hidden characters, accents composed (NFC), "\\n" as the line end, no outer blanks.

    `visible(" se\\u200bcret\\r\\n") == "secret"`, `visible("e\\u0301") == "\\u00e9"`
    """
    text = _HIDDEN.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = unicodedata.normalize("NFC", _PILED_MARKS.sub(r"\1", text))
    return text.strip()


def words(text: str) -> list[str]:
    """The words: runs of letters and digits with their marks. `words("Well-known: it's 3.14, 1,000 or *** a/b") ==
    ["Well-known", "it's", "3.14", "1,000", "or", "a", "b"]`

    One apostrophe, hyphen or full stop between two letters or digits joins them, a comma or colon two digits, three
    times at most: `words("a-b-c-d-e") == ["a-b-c-d", "e"]`, so a chain of hyphens does not pass for one word. Every
    Chinese or Japanese character is a word, as word processors count: `words("今天 OK") == ["今", "天", "OK"]`. Thai,
    Lao, Khmer and Burmese, which have no blanks either, are not taken apart: a run of their letters is one word.
    """
    return _WORD.findall(text)


def has_word(text: str) -> bool:
    """Whether there is a letter or digit: `has_word("*** !")` is False."""
    return _WORD.search(text) is not None


def from_first_word(text: str) -> str:
    """The text from its first letter or digit on: `from_first_word('**"Once** more') == "Once** more"`"""
    found = _WORD.search(text)
    return text[found.start() :] if found else ""


def sentences(text: str) -> list[str]:
    """The sentences: what ends in `.`, `!`, `?` or the like before a blank, or with its line, and holds a word.

    `sentences("Dr. May paid $3.50. Why?\\n- No idea") == ["Dr. May paid $3.50.", "Why?", "No idea"]`

    None ends with the stop of a title (Mr, Mrs, Ms, Dr, Prof, St), of vs, cf, fig, vol or approx, of letters with stops
    between them (`U.S.`, `e.g.`; `a.m.` and `p.m.` only where no capital follows), or of an initial, which is a single
    capital letter without a word in lower case before it ("John F. May", not "see plan B. Then"); and none ends with a
    quotation before a word in lower case ('"Why?" she asked'). `。`, `！` and `？` need no blank after them.
    """
    found = []
    for line in text.split("\n"):
        marker = _LIST_MARKER.match(line)
        start = marker.end() if marker else 0
        for end in _SENTENCE_END.finditer(line, start):
            if not _goes_on(line, end):
                found.append(line[start : end.end()].strip())
                start = end.end()
        found.append(line[start:].strip())
    return [sentence for sentence in found if has_word(sentence)]


def _goes_on(line: str, end: re.Match[str]) -> bool:
    """Whether a sentence goes on behind what looks like its end."""
    following = _NEXT_LETTER.match(line, end.end())
    if end.group()[-1] in _QUOTES:
        return following is not None and following.group(1).islower()
    if not end.group().startswith("."):
        return False
    before = _TOKEN_BEFORE.search(line[max(0, end.start() - 30) : end.start()])
    if before is None:
        return False
    word_before, token = before.groups()
    if token.casefold() in _HALF_DAYS:
        return following is not None and not following.group(1).isupper()
    return (
        token.casefold() in _ABBREVIATIONS
        or (len(token) == 1 and token.isupper() and not (word_before or "").islower())
        or _INITIALS.fullmatch(token) is not None
    )


def lines(text: str) -> list[str]:
    """The lines that hold a word: `lines("one\\n\\n---\\ntwo") == ["one", "two"]`"""
    return [line for line in text.split("\n") if has_word(line)]


def paragraphs(text: str) -> list[str]:
    """The blocks between blank lines that hold a word: `paragraphs("a\\nb\\n \\n***\\n\\nc") == ["a\\nb", "c"]`"""
    blocks = (
        "\n".join(block) for full, block in groupby(text.split("\n"), key=lambda line: bool(line.strip())) if full
    )
    return [block for block in blocks if has_word(block)]


def straight(text: str) -> str:
    """Typographic quotation marks and apostrophes as the plain ones: `straight("“don’t”") == '"don\\'t"'`"""
    return text.translate(_STRAIGHT)


def plain(text: str) -> str:
    """For comparing phrases: plain quotation marks, one blank for each run: `plain("don’t \\n go") == "don't go"`"""
    return " ".join(straight(text).split())


def folded(text: str) -> str:
    """As `plain`, without case: `folded("Stra\\u00dfe") == folded("STRASSE") == "strasse"`"""
    return plain(text).casefold()


def continues(character: str) -> bool:
    """Whether a character would carry on the word before it: a letter, digit or mark, no Chinese or Japanese one."""
    return _CONTINUES.match(character) is not None


def begins(text: str, phrase: str, at: int = 0) -> int | None:
    """Where the phrase ends that starts at a place; None if it does not, or breaks off inside a word.

    `begins("Well done", "Well") == 4`, `begins("Wellness", "Well") is None`
    """
    end = at + len(phrase)
    if not text.startswith(phrase, at) or (end < len(text) and continues(phrase[-1]) and continues(text[end])):
        return None
    return end


def ends(text: str, phrase: str) -> bool:
    """Whether the phrase ends the text, and starts no word in the middle: `ends("a cat", "cat")`, not `"bobcat"`."""
    start = len(text) - len(phrase)
    return text.endswith(phrase) and not (start > 0 and continues(phrase[0]) and continues(text[start - 1]))


def occurrences(text: str, keyword: str) -> int:
    """How often a keyword or phrase stands in a text, never inside a longer word; both as `folded` has them.

    `occurrences("a cat, cats, cat's, the cat-flap", "cat") == 3`: `cats` is another word.
    """
    if keyword not in text:  # much quicker than the search for a keyword that is not there
        return 0
    before = f"(?<!{_INSIDE})" if continues(keyword[0]) else ""
    after = f"(?!{_INSIDE})" if continues(keyword[-1]) else ""
    return len(re.findall(before + re.escape(keyword) + after, text))
