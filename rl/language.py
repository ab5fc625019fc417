"""In which language a thought is written: by its script first, by a detector only where several languages share one.

It serves the language consistency of DeepSeek-R1 (2501.12948, section on the first RL stage: the share of the words of
the chain of thought that are in the target language; the reward is in rl/rewards.py). The paper does not say how the
language of a word is found. Every detector is wrong on short and on mathematical text, so here:

1. `prose` takes out what belongs to no language: code, LaTeX, tags, URLs, numbers, identifiers.
2. What is left are words: runs of letters of one script. One letter (a variable), up to five capitals (the triangle
   ABC), more than 40 letters, and the names in `SYMBOLS` are no words. Chinese, Japanese, Korean, Thai, Lao, Khmer and
   Burmese are counted by the character.
3. Greek, Hebrew, Hangul and most other scripts decide the language. Han is Japanese where kana stand beside it.
4. Latin, Cyrillic, Arabic and Devanagari do not. There py3langid decides, on stretches of at least 40 letters and only
   where it is at least half sure; the rest stays undecided.

A stretch is a few sentences, or some 120 letters of a long one: a change of language on a smaller scale goes unseen.
Every function is deterministic, linear in the text, and safe to call from any thread. The detector is loaded at its
first use.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

# --- what belongs to no language --------------------------------------------------------------------------------------

# How code and formulas open, how they close, and within how many characters they must: without that bound a text of
# openers alone would take quadratic time. `\\` and `\$` open nothing.
_OPENER = re.compile(r"\\\\|\\\$|```|~~~|`|\$\$|\$|\\\(|\\\[|\\begin\{[A-Za-z]{1,20}\*?\}")
_CLOSERS = {"`": ("`", 200), "$": ("$", 1_000), "\\(": ("\\)", 1_000), "$$": ("$$", 2_000), "\\[": ("\\]", 2_000)}
_ENVIRONMENT = 2_000
_COMMAND = r"\\[A-Za-z]{1,30}\*?(?:\{[^{}]{0,200}\}|\[[^\[\]]{0,200}\])*"
_TAG = r"<[/!A-Za-z][^<>\n]{0,100}>"
_URL = r"(?:https?://|www\.)[!-~]+"
_NO_PROSE = re.compile(f"{_COMMAND}|{_TAG}|{_URL}")
_TOKEN = re.compile(r"[A-Za-z\d_]+(?:[.,:/-](?=\d)[A-Za-z\d_]+)*%?")


def prose(text: str) -> str:
    """The text without code, LaTeX, tags, URLs, numbers and identifiers; blanks are collapsed, lines stay.

    A fence that is never closed is code to the end. A single `$` opens a formula if no blank follows it and the next
    one has no blank before and no digit after it, so that "$5 and $10" is money.

    `prose("Let $x=2$, then `f(x)` is 4.") == "Let , then is ."`
    """
    text = _NO_PROSE.sub(" ", "".join(_outside_spans(text)))
    text = _TOKEN.sub(lambda token: token[0] if token[0].isalpha() else " ", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def _outside_spans(text: str) -> Iterator[str]:
    """The pieces of the text outside code and formulas, with a blank after each."""
    start = position = 0
    while opener := _OPENER.search(text, position):
        position = opener.end()
        end = _end_of_span(text, opener.group(), position)
        if end is not None:
            yield text[start : opener.start()] + " "
            start = position = end
    yield text[start:]


def _end_of_span(text: str, opener: str, start: int) -> int | None:
    """Where what was opened before `start` ends, None if it opens nothing."""
    if opener in ("```", "~~~"):
        end = text.find(opener, start)
        return len(text) if end < 0 else end + len(opener)
    if opener.startswith("\\begin"):
        closer, within = opener.replace("begin", "end"), _ENVIRONMENT
    elif opener in _CLOSERS:
        closer, within = _CLOSERS[opener]
    else:
        return None
    end = text.find(closer, start, start + within)
    if end < 0 or (len(closer) == 1 and "\n\n" in text[start:end]):
        return None
    if opener == "$" and (text[start].isspace() or text[end - 1].isspace() or text[end + 1 : end + 2].isdigit()):
        return None
    return end + len(closer)


# --- words and their scripts ------------------------------------------------------------------------------------------

# First and last code point of the letters of each script, its vowel signs included, its digits and punctuation not.
_RANGES: dict[str, tuple[tuple[int, int], ...]] = {
    "Latin": (
        (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x2AF), (0x1E00, 0x1EFF), (0x2C60, 0x2C7F),
        (0xA722, 0xA787), (0xA78B, 0xA7FF), (0xFB00, 0xFB06), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A),
    ),
    "Greek": (
        (0x370, 0x373), (0x376, 0x377), (0x37B, 0x37D), (0x386, 0x386), (0x388, 0x3E1), (0x3F0, 0x3F5), (0x3F7, 0x3FF),
        (0x1F00, 0x1FBC), (0x1FC2, 0x1FCC), (0x1FD0, 0x1FDB), (0x1FE0, 0x1FEC), (0x1FF2, 0x1FFC),
    ),
    "Cyrillic": ((0x400, 0x481), (0x48A, 0x52F), (0x1C80, 0x1C88), (0xA640, 0xA69F)),
    "Armenian": ((0x531, 0x556), (0x560, 0x588)),
    "Hebrew": ((0x591, 0x5BD), (0x5BF, 0x5BF), (0x5C1, 0x5C2), (0x5C4, 0x5C5), (0x5C7, 0x5C7), (0x5D0, 0x5F2)),
    "Arabic": (
        (0x610, 0x61A), (0x620, 0x65F), (0x66E, 0x6D3), (0x6D5, 0x6DC), (0x6DF, 0x6E8), (0x6EA, 0x6EF), (0x6FA, 0x6FC),
        (0x750, 0x77F), (0x8A0, 0x8E1), (0xFB50, 0xFBB1), (0xFBD3, 0xFD3D), (0xFD50, 0xFDC7), (0xFDF0, 0xFDFB),
        (0xFE70, 0xFEFC),
    ),
    "Devanagari": ((0x900, 0x963), (0x971, 0x97F)),
    "Bengali": ((0x980, 0x9E3), (0x9F0, 0x9F1)),
    "Gurmukhi": ((0xA00, 0xA65), (0xA70, 0xA7F)),
    "Gujarati": ((0xA80, 0xAE5), (0xAF9, 0xAFF)),
    "Tamil": ((0xB80, 0xBE5),),
    "Telugu": ((0xC00, 0xC65),),
    "Kannada": ((0xC80, 0xCE5),),
    "Malayalam": ((0xD00, 0xD65), (0xD7A, 0xD7F)),
    "Sinhala": ((0xD80, 0xDE5), (0xDF2, 0xDF3)),
    "Thai": ((0xE01, 0xE3A), (0xE40, 0xE4E)),
    "Lao": ((0xE80, 0xECD), (0xEDC, 0xEDF)),
    "Burmese": ((0x1000, 0x103F), (0x1050, 0x108F)),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
    "Khmer": ((0x1780, 0x17D3), (0x17DC, 0x17DD)),
    "Hangul": (
        (0x1100, 0x115E), (0x1161, 0x11FF), (0x3131, 0x3163), (0x3165, 0x318E), (0xA960, 0xA97C), (0xAC00, 0xD7FB),
    ),
    "Hiragana": ((0x3041, 0x309F),),
    "Katakana": ((0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "Han": ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)),
}  # fmt: skip
_STARTS = sorted((first, last, script) for script, ranges in _RANGES.items() for first, last in ranges)
# Scripts that are written without blanks, or whose words are too long for a word to be the unit.
BY_CHARACTER = frozenset(("Thai", "Lao", "Burmese", "Khmer", "Hangul", "Hiragana", "Katakana", "Han"))
# Names that mathematics and physics use in every language.
SYMBOLS = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "log", "ln", "lg",
    "exp", "lim", "max", "min", "sup", "inf", "mod", "gcd", "lcm", "det", "dim", "deg", "arg", "ker", "rad", "km", "cm",
    "mm", "nm", "kg", "mg", "ml", "hz", "khz", "mhz", "ghz", "kw", "kwh", "pa", "kpa", "mol",
))  # fmt: skip
LONGEST_WORD = 40


@lru_cache(maxsize=65_536)
def script_of(letter: str) -> str | None:
    """`script_of("я") == "Cyrillic"`; None for what is no letter of a script that is known here."""
    i = bisect_right(_STARTS, (ord(letter), 0x110000, "")) - 1
    _, last, script = _STARTS[max(i, 0)]
    return script if i >= 0 and ord(letter) <= last else None


def script_shares(text: str) -> dict[str, float]:
    """The share of each script in the letters of a text, as it stands.

    `script_shares("x + да = 数学") == {"Latin": .2, "Cyrillic": .4, "Han": .4}`
    """
    counts = Counter(script for letter in text if (script := script_of(letter)) is not None)
    return {script: count / counts.total() for script, count in counts.items()}


def _letters(scripts: Sequence[str]) -> str:
    return "".join(f"{chr(a)}-{chr(z)}" for script in scripts for a, z in _RANGES[script])


_SPACED = _letters([script for script in _RANGES if script not in BY_CHARACTER])
_MARKS = "\u0300-\u036f\u200c\u200d"  # accents of their own; joiners, as Persian and Indic words have them inside
_RUN = re.compile(f"[{_SPACED}](?:['’]?[{_SPACED}{_MARKS}])*|[{_letters(sorted(BY_CHARACTER))}]+")
_SENTENCE_END = re.compile(r"[.!?…](?=\s|$)|[。！？؟।॥\n]")


def _words(text: str) -> Iterator[tuple[int, str, str]]:
    """(Number of its sentence, script, letters) of every word; those by character come as runs of one script."""
    for number, sentence in enumerate(_SENTENCE_END.split(prose(text))):
        for run in _RUN.findall(sentence):
            script = script_of(run[0])
            assert script is not None
            if script in BY_CHARACTER:
                yield from ((number, kind, piece) for kind, piece in _by_script(run))
            elif _is_word(run):
                yield number, script, run


def _by_script(run: str) -> Iterator[tuple[str, str]]:
    """A run of characters in pieces of one script: "数は" is ("Han", "数"), ("Hiragana", "は")."""
    start = 0
    for end in range(1, len(run) + 1):
        if end == len(run) or script_of(run[end]) != script_of(run[start]):
            script = script_of(run[start])
            assert script is not None
            yield script, run[start:end]
            start = end


def _is_word(run: str) -> bool:
    if not 2 <= len(run) <= LONGEST_WORD or (run.isupper() and len(run) <= 5) or run.lower() in SYMBOLS:
        return False
    return len({script for letter in run if (script := script_of(letter)) is not None}) == 1


# --- languages --------------------------------------------------------------------------------------------------------

NO_LANGUAGE = "zxx"  # ISO 639's code for text without linguistic content: what the detector calls junk
SURE = 0.5  # the least probability at which the detector is believed
MOST_LETTERS = 120  # a stretch is closed here even in the middle of a sentence

Decide = Callable[[Sequence[str]], str | None]


@dataclass(frozen=True, slots=True)
class _Family:
    """Scripts that are read together, the languages (ISO 639-1) that they may hold, and how one is chosen."""

    scripts: tuple[str, ...]
    languages: tuple[str, ...]
    decide: Decide  # from the words of one stretch
    least: int = 10  # letters that a stretch must have


def _only(language: str, words: Sequence[str]) -> str:
    return language


def _han_or_kana(words: Sequence[str]) -> str:
    """Japanese if one character in ten is kana: a Japanese sentence has about half, a Chinese one may quote some."""
    kana = sum(len(word) for word in words if script_of(word[0]) != "Han")
    return "ja" if 10 * kana >= sum(map(len, words)) else "zh"


def _detected(languages: tuple[str, ...], words: Sequence[str]) -> str | None:
    found, probability = _detector().classify(" ".join(words))
    return found if probability >= SURE and (found in languages or found == NO_LANGUAGE) else None


# Languages that a detector does not tell from one of these (Malay, Galician, Bosnian, Nynorsk, ...) are not offered.
_SHARED = {
    "Latin": (
        "ca", "cs", "da", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "id", "it", "lt", "lv", "nl", "no", "pl",
        "pt", "ro", "sk", "sl", "sv", "sw", "tl", "tr", "vi",
    ),
    "Cyrillic": ("bg", "kk", "mk", "mn", "ru", "sr", "uk"),
    "Arabic": ("ar", "fa", "ur"),
    "Devanagari": ("hi", "mr", "ne"),
}  # fmt: skip
_OWN = {
    "Greek": "el", "Armenian": "hy", "Hebrew": "he", "Bengali": "bn", "Gurmukhi": "pa", "Gujarati": "gu", "Tamil": "ta",
    "Telugu": "te", "Kannada": "kn", "Malayalam": "ml", "Sinhala": "si", "Thai": "th", "Lao": "lo", "Burmese": "my",
    "Georgian": "ka", "Khmer": "km", "Hangul": "ko",
}  # fmt: skip
_FAMILIES = (
    *(_Family((script,), codes, partial(_detected, codes), least=40) for script, codes in _SHARED.items()),
    *(_Family((script,), (code,), partial(_only, code)) for script, code in _OWN.items()),
    _Family(("Han", "Hiragana", "Katakana"), ("zh", "ja"), _han_or_kana),
)
_FAMILY_OF = {script: family for family in _FAMILIES for script in family.scripts}
LANGUAGES = frozenset(language for family in _FAMILIES for language in family.languages)

_LOADING = Lock()


@dataclass(frozen=True, slots=True)
class Languages:
    """How the language of a task's texts is told: `NATURAL` below, or that of a made world (rl/tasks/tiny_words.py)."""

    of: Callable[[str], str | None]  # the language of a text, None where it does not tell
    share: Callable[[str, str], float | None]  # the share of a text that is in a language, None where it does not tell
    known: frozenset[str]


def _detector() -> LanguageIdentifier:
    with _LOADING:
        return _load_detector()


@cache
def _load_detector() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    detector = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    detector.set_languages({NO_LANGUAGE}.union(*_SHARED.values()))
    return detector


def _stretches(words: Sequence[tuple[int, str]], least: int) -> list[list[str]]:
    """(Number of its sentence, letters) of words in stretches of at least `least` letters.

    A stretch is closed at the end of a sentence, or at MOST_LETTERS. A rest that is too short joins the one before.
    """
    stretches: list[list[str]] = []
    letters, last = MOST_LETTERS, 0
    for number, word in words:
        if letters >= MOST_LETTERS or (letters >= least and number != last):
            stretches.append([])
            letters = 0
        stretches[-1].append(word)
        letters, last = letters + len(word), number
    if letters < least and len(stretches) > 1:
        rest = stretches.pop()
        stretches[-1] += rest
    return stretches


def _counts(text: str) -> Counter[tuple[tuple[str, ...], str | None]]:
    """How many words of each (languages that their script may hold, language or None)."""
    words: dict[_Family, list[tuple[int, str]]] = {}
    for number, script, word in _words(text):
        words.setdefault(_FAMILY_OF[script], []).append((number, word))
    counts: Counter[tuple[tuple[str, ...], str | None]] = Counter()
    for family, found in words.items():
        by_character = family.scripts[0] in BY_CHARACTER
        for stretch in _stretches(found, family.least):
            letters = sum(map(len, stretch))
            language = family.decide(stretch) if letters >= family.least else None
            counts[family.languages, language] += letters if by_character else len(stretch)
    return counts


def language_of(text: str) -> str | None:
    """The language (ISO 639-1, one of `LANGUAGES`) of more than half of the words of a text; None if there is none.

    None too where too little is left to tell: fewer than 40 letters of a script that several languages share, fewer
    than 10 of any other.

    `language_of("Let me compute the sum of the first ten odd numbers, one by one.") == "en"`,
    `language_of("So x = 5.") is None`
    """
    counts = _counts(text)
    for (_, language), count in counts.items():
        if language not in (None, NO_LANGUAGE) and 2 * count > counts.total():
            return language
    return None


def language_share(text: str, target: str) -> float | None:
    """The share of the words of a text that are in the language `target`, one of `LANGUAGES`; in [0, 1].

    Words of an undecided stretch that may be in the target language count on neither side. None if they are more than
    half of the words, or if nothing is decided at all: too short, or nothing but code and formulas.

    Example: of 12 English words (47 letters) and 8 Chinese characters .6 are English. The 8 are too few to tell Chinese
    from Japanese: for the target "zh" they count on neither side, which leaves 0 of 12, and alone they give None.

    Errors: ValueError for another target.
    """
    if target not in LANGUAGES:
        raise ValueError(f"no language {target!r}; known are {', '.join(sorted(LANGUAGES))}")
    counts = _counts(text)
    unknown = sum(n for (languages, language), n in counts.items() if language is None and target in languages)
    decided = any(language is not None for _, language in counts)
    if not decided or 2 * unknown > counts.total():
        return None
    return sum(n for (_, language), n in counts.items() if language == target) / (counts.total() - unknown)


NATURAL = Languages(language_of, language_share, LANGUAGES)
