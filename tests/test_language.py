"""Which language a text is in: what is stripped, what is a word, where the answer is left open; a labelled set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.language import (
    _RANGES,
    LANGUAGES,
    NO_LANGUAGE,
    _load_detector,
    language_of,
    language_share,
    prose,
    script_of,
    script_shares,
)

GOLDEN_FILE = Path(__file__).parent / "golden" / "languages.jsonl"
GOLDEN = [json.loads(line) for line in GOLDEN_FILE.read_text("utf-8").splitlines()]
ENGLISH = "Let me compute the sum of the first ten odd numbers, one by one."


def test_threads_agree_and_load_the_detector_once():
    _load_detector.cache_clear()
    texts = [row["text"] for row in GOLDEN[:24]]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(language_of, texts))
    assert _load_detector.cache_info().misses == 1
    assert together == [language_of(text) for text in texts]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Let $x=2$, then `f(x)` is 4.", "Let , then is ."),
        ("one ```python\ntwo = 2\n``` three", "one three"),
        ("one\n```\ntwo\n\nthree", "one"),  # never closed
        ("~~~\none\n~~~\ntwo", "two"),
        (r"a \(b c\) d \[ e f \] g $$ h i $$ j", "a d g j"),
        (r"so \begin{align*} one &= two \\ \end{align*} done", "so done"),
        (r"so \begin{align} one", "so one"),  # an environment that is never closed is no reason to read nothing
        (r"thus \boxed{\text{four}} and \frac{1}{2} and \alpha.", "thus { } and and ."),
        (r"a \\[2pt] b \$5 c", r"a \\[ ] b \$ c"),  # a line break and a dollar open nothing
        ("It costs $5 and she pays $10 for $two", "It costs $ and she pays $ for $two"),
        ("a $b\n\nc$ d", "a $b\n\nc$ d"),  # no formula holds an empty line
        ("`unclosed", "`unclosed"),
        ("see https://example.org/a?b=1 and www.example.org/x", "see and"),
        ("详见https://example.org/a。然后", "详见 。然后"),
        ("<b>one</b> <br/> two </think>", "one two"),
        ("if 3 < four and five > 2", "if < four and five >"),
        ("my_var x1 2nd 3.14 1,000 10:30 50% 5km v2.5", ""),
        ("小明有24个苹果", "小明有 个苹果"),
        ("\u0662\u0664 \u0633\u06cc\u0628", "\u0633\u06cc\u0628"),  # digits of other scripts
        ("a \t b \n c", "a b \n c"),
        ("", ""),
    ],
)
def test_prose_is_what_belongs_to_a_language(text, left):
    assert prose(text) == left


def test_script_shares_are_shares_of_letters():
    assert script_shares("x + да = 数学") == {"Latin": 0.2, "Cyrillic": 0.4, "Han": 0.4}
    assert script_shares("3 + 4 = 7!") == {}
    assert script_of("я") == "Cyrillic"
    assert [script_of(letter) for letter in "ゆユユ漢한ไ\u0967\u0964１1 é\u0301"] == [
        "Hiragana", "Katakana", "Katakana", "Han", "Hangul", "Thai", None, None, None, None, None, "Latin", None
    ]  # fmt: skip


def test_the_ranges_are_those_of_the_unicode_names():
    words = {"Burmese": ("MYANMAR",), "Han": ("CJK", "IDEOGRAPHIC"), "Latin": ("LATIN", "MODIFIER LETTER")}
    for script, ranges in _RANGES.items():
        for code in (code for first, last in ranges for code in range(first, last + 1, 1 + (last - first) // 500)):
            name = unicodedata.name(chr(code), "")  # "" where this Python's Unicode has no such letter
            if unicodedata.category(chr(code)).startswith("L") and name:
                assert any(word in name for word in words.get(script, (script.upper(),))), (script, hex(code), name)
            assert script_of(chr(code)) == script
            assert not unicodedata.category(chr(code)).startswith("Nd"), "a digit is no letter"


def test_worked_examples():
    assert language_of(ENGLISH) == "en"
    assert language_of("So x = 5.") is None
    english, chinese = "First I add the apples of Anna and then those of Bernard too", "因此答案是八个苹"
    assert (len(english.split()) - 1, len("".join(english.split())) - 1, len(chinese)) == (12, 47, 8), "I is one letter"
    assert language_share(f"{english}. {chinese}", "en") == pytest.approx(12 / 20)
    assert language_share(f"{english}. {chinese}", "zh") == 0, "8 characters are too few to tell, 12 are English"
    assert language_share(english, "en") == 1
    assert language_share(chinese, "zh") is None
    assert language_share(chinese, "en") is None
    assert language_share(english, "de") == 0


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        # one-letter words, short capitals, symbols, mixed scripts and runs of letters are no words of any language
        ("В треугольнике ABC проведена высота x из вершины C, тогда sin x равен числу abс и αβγd.", "ru", 1.0),
        ("三角形ABC中角C是直角所以sin A等于一半，长度为5 cm。", "zh", 1.0),
        (f"{ENGLISH} {'a' * 41}", "en", 1.0),
        # a word of another script counts against the target, however few there are of it
        ("Пусть число яблок равно двадцати, тогда answer будет десять яблок у каждого.", "ru", 10 / 11),
        # kana beside them make Han Japanese
        ("したがって答えは二つの数の積になる。", "ja", 1.0),
        ("したがって答えは二つの数の積になる。", "zh", 0.0),
        ("因此答案是两个数的乘积，不需要再减。", "ja", 0.0),
        # text without linguistic content
        ("xk qzv bnm trpl wqx zzkj plm qwrt vbnx mnbv dfgh kjhg zxcv", "en", 0.0),
        # nothing but formulas, code, numbers, punctuation: no answer
        ("$x$ $$y$$ `z` 12 !!! ... 😀", "en", None),
        ("", "en", None),
    ],
)  # fmt: skip
def test_shares(text, target, share):
    assert language_share(text, target) == (share if share is None else pytest.approx(share))


def test_a_change_of_language_within_a_stretch_goes_unseen():
    german = "Das ist schon alles."  # 17 letters: too few for a stretch of their own, so they join the one before
    assert language_share(f"{ENGLISH} {german}", "en") == 1
    chinese = "因此答案是两个数的乘积。"  # 11 characters
    assert language_share(f"{ENGLISH} That is really all. {chinese}", "en") == pytest.approx(18 / 29), "joined too"
    longer = "Das ist schon alles, was ich hier berechnen muss, also bin ich jetzt fertig."
    assert language_share(f"{ENGLISH} {longer}", "en") == pytest.approx(14 / 28)


def test_a_share_is_left_open_where_most_words_are_undecided():
    short, chinese = "we do it as he is so go on if he is in to it or no", "因此答案是两个数的乘积。"
    assert (len(short.split()), len("".join(short.split()))) == (17, 34)
    assert language_share(f"{short}. {chinese}", "en") is None
    assert language_share(f"{short}. {chinese}", "zh") == pytest.approx(11 / 28), "Latin words are not Chinese"
    assert language_share(f"we do it. {chinese}", "en") == 0, "3 words are left out of 14"


def test_a_target_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="no language 'xx'; known are ar, bg, bn"):
        language_share(ENGLISH, "xx")


def test_the_labelled_set():
    """Thoughts labelled before the detector was run: at most one language is wrong, what is too short is left open, and
    the shares of mixed thoughts are those counted by hand."""
    found = {row["id"]: (language_of(row["text"]), language_share(row["text"], row["target"])) for row in GOLDEN}
    labelled = [row for row in GOLDEN if row["language"] is not None]
    wrong = [row["id"] for row in labelled if found[row["id"]][0] not in (None, row["language"])]
    left_open = [row["id"] for row in labelled if found[row["id"]][0] is None]
    short = [row for row in GOLDEN if row["share"] is None]
    mixed = [row for row in GOLDEN if row["share"] not in (None, 1.0)]
    errors = [abs(found[row["id"]][1] - row["share"]) for row in mixed]
    scripts = {max(shares, key=shares.__getitem__) for row in labelled if (shares := script_shares(prose(row["text"])))}
    print(  # noqa: T201, the figures, for pytest -s
        f"\n{len(GOLDEN)} thoughts, {len(labelled)} with a language ({len({row['language'] for row in labelled})} of "
        f"them, {len(scripts)} scripts): {len(wrong)} wrong {wrong}, {len(left_open)} left open {left_open}; "
        f"{len(short)} too short; {len(mixed)} mixed, largest error of a share {max(errors):.3f}"
    )
    assert (len(labelled), len(short), len(mixed)) == (117, 16, 11)
    assert {row["language"] for row in labelled} == LANGUAGES, "every language that is offered has a thought"
    assert len(wrong) <= 1
    assert len(left_open) <= 2
    assert [row["id"] for row in short if found[row["id"]] != (None, None)] == []
    assert max(errors) <= 0.02
    assert [row["id"] for row in labelled if row["share"] == 1.0 and found[row["id"]][1] not in (None, 1.0)] == []


def test_the_detector_alone_would_name_a_language_for_what_is_too_short():
    """The control of the set: without stripping and abstaining these rows all get an answer."""
    answers = [_load_detector().classify(row["text"])[0] for row in GOLDEN if row["share"] is None]
    assert sum(answer != NO_LANGUAGE for answer in answers) >= 10


def questions(path: Path, count: int) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["question"] for _, line in zip(range(count), lines, strict=False)]


def test_word_problems_are_english(tmp_path):
    made = tmp_path / "gsm8k-train.jsonl"
    names = ("Ann", "Ben", "Carla", "Dan", "Eve", "Finn", "Gita", "Hugo", "Ines", "Jack")
    rows = [
        {"question": f"{name} has {n} boxes with {n + 2} pencils in each. How many are there?", "answer": "#### 1"}
        for n, name in enumerate(names * 2, 3)
    ]  # fmt: skip
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = os.environ.get("REASON_DATA")
    for path in [made, *([Path(folder) / made.name] if folder else [])]:
        texts = questions(path, 200)
        assert len(texts) >= 20
        assert sum(language_of(text) != "en" for text in texts) <= len(texts) // 100


# --- what must hold for any text --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=200), st.sampled_from(("en", "ru", "zh", "ko")))
def test_any_text_has_a_share_or_none(text, target):
    share = language_share(text, target)
    assert share is None or 0 <= share <= 1
    found = language_of(text)
    assert found is None or found in LANGUAGES
    assert found != target or (share is not None and share > 0.5)


HOSTILE = {
    "dollars": "$a " * 33_333, "displays": r"\[" * 50_000, "environments": r"\begin{ab}" * 10_000,
    "commands": r"\a{" * 33_333, "ticks": "`a" * 50_000, "fences": "~~~ " * 25_000, "tags": "<a" * 50_000,
    "letters": "a" * 100_000, "accents": "a" + "\u0301\u0316" * 50_000, "accented words": "ab\u0301\u0316 " * 20_000,
    "points": "." * 100_000, "digits": "1.a" * 33_333, "apostrophes": "ab'" * 33_333, "pairs": "ab. " * 25_000,
    "two scripts": "数は" * 50_000, "prose": (ENGLISH + " ") * 1_538, "surrogates": "\ud800a" * 50_000,
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hundred_thousand_hostile_characters_take_no_time(text):
    assert 99_000 <= len(text) <= 100_001
    started = time.perf_counter()
    language_share(text, "en")
    assert time.perf_counter() - started < 3  # a tenth of that on an idle machine; the traps take minutes


def test_importing_it_loads_neither_torch_nor_the_detector():
    heavy = "{'torch', 'numpy', 'py3langid'} & set(sys.modules)"
    code = f"import sys, rl.language, rl.rewards; sys.exit(str({heavy}) if {heavy} else 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr == ""
