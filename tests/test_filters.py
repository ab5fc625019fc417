"""Filters of traces: each has a planted row that it alone drops; thresholds; the keys that name them."""

from __future__ import annotations

import pytest

from distill.filters import (
    code_blocks,
    first_reason,
    leaked,
    long_paragraphs,
    malformed_think,
    mixed_language,
    near_duplicate,
    repetition,
    truncated,
)
from recipes.filter_keys import TraceFilters
from recipes.filter_stage import filters_of
from rl.decontamination import EvaluationIndex, EvaluationItem
from rl.problems import BadProblems
from rl.tasks import tiny_words
from rl.types import Problem, TextPart

QUESTION = "A farmer has 17 sheep in one field and 25 in another field. How many sheep does the farmer have in all?"
THOUGHT = (
    "The farmer keeps two groups of animals, so I have to add them up.\n\n"
    "First I take the sheep of the one field, then those of the other: $17 + 25 = 42$.\n\n"
    "To check, I take away what I added, and this gives back the number from which I started."
)
ANSWER = r"The farmer has \boxed{42} sheep."
GOOD = f"{THOUGHT}</think>{ANSWER}"
RAMBLING = (
    "I could also have begun with the other field, since the order of a sum does not change what it comes to; or have "
    "counted every animal one after another, which takes longer and leads to the same place. A third way is to round "
    "both numbers up to the next ten, which makes twenty and thirty, so fifty, and then to take away the three and the "
    "five that were too many, which leaves the same number as before. Somebody who wants to be very careful might draw "
    "a picture of the two meadows, with a dot for each of the animals, and go over them with a pencil until none is "
    "left that has no mark beside it."
)
REWORDED = (
    "In one field a farmer has 17 sheep and 25 in another field. How many sheep does the farmer have in all of them?"
)
LEAKED = (
    "Every morning a baker bakes 30 loaves of bread and sells all of them but 4 before noon to the people of the town."
)

FILTERS = {
    "malformed think": malformed_think(prefilled=True),
    "truncated": truncated,
    "mixed language": mixed_language(),
    "long paragraph": long_paragraphs(600),
    "code block": code_blocks,
    "repetition": repetition(),
    "near-duplicate question": near_duplicate(
        [Problem(name, (TextPart(text),), "42") for name, text in (("a", QUESTION), ("b", REWORDED))]
    ),
    "leaked from bakers": leaked(EvaluationIndex([EvaluationItem("bakers", "1", LEAKED)])),
}
PLANTED = {
    "malformed think": (QUESTION, f"{THOUGHT}</think>Well.</think>{ANSWER}"),
    "truncated": (QUESTION, rf"{THOUGHT}</think>The farmer has \boxed{{42"),
    "mixed language": (QUESTION, f"{THOUGHT}\n\n然后我们再检查一下这个结果是否正确，最后得到答案。</think>{ANSWER}"),
    "long paragraph": (QUESTION, f"{THOUGHT} {RAMBLING}</think>{ANSWER}"),
    "code block": (QUESTION, f"{THOUGHT}\n\n```python\nprint(17 + 25)\n```\n\nThat is it.</think>{ANSWER}"),
    "repetition": (QUESTION, f"{THOUGHT}\n\n{THOUGHT}</think>{ANSWER}"),
    "near-duplicate question": (REWORDED, GOOD),
    "leaked from bakers": (LEAKED, GOOD),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_each_filter_drops_its_planted_row_and_no_other_does(planted):
    question, text = PLANTED[planted]
    assert [found for keep in FILTERS.values() if (found := keep(question, text)) is not None] == [planted]
    assert first_reason(list(FILTERS.values()), question, text) == planted
    assert first_reason([keep for name, keep in FILTERS.items() if name != planted], question, text) is None


def test_a_good_row_passes_all():
    assert set(PLANTED) == set(FILTERS)
    assert first_reason(list(FILTERS.values()), QUESTION, GOOD) is None


def test_the_first_reason_counts():
    bad = f"<think>{THOUGHT}"
    assert first_reason([truncated, malformed_think(prefilled=True)], QUESTION, bad) == "truncated"
    assert first_reason([malformed_think(prefilled=True), truncated], QUESTION, bad) == "malformed think"
    assert first_reason([], QUESTION, bad) is None


def test_form():
    def forms(*texts, prefilled=True):
        return [malformed_think(prefilled)("q", text) is None for text in texts]

    assert forms("1+1=2</think>2", "1+1=2</think>2</think>2", "<think>1+1=2</think>2", "1+1=2") == [1, 0, 0, 1]
    assert forms(" <think>1</think>2", "1</think>2", "1<think></think>2", prefilled=False) == [True, False, False]


def test_truncation():
    cut = ["1+1=2", "1+1=2</think>", "1+1=2</think> \n", r"1</think>It is \boxed{2", "1</think>```python\nprint(1)\n"]
    whole = [r"1</think>It is \boxed{2}", r"1</think>\boxed{\frac{1}{2}}", r"1</think>\boxed{\{1, 2\}}", "1</think>2"]
    assert [truncated("q", text) for text in cut] == ["truncated"] * 5
    assert [truncated("q", text) for text in whole] == [None] * 4


def test_languages_of_a_task_and_a_target():
    keep = mixed_language(0.9, languages=tiny_words.LANGUAGES)
    assert keep("47*3", "47*3=41; </think>41") is None
    assert keep("four seven times three", "47*3=41; </think>41") == "mixed language"
    assert keep("hello", "47*3=41; </think>41") is None
    german = "Der Bauer hat zwei Weiden, auf denen seine Schafe stehen, und wir zählen sie alle zusammen.</think>42"
    assert mixed_language(target="de")(QUESTION, german) is None
    assert mixed_language()(QUESTION, german) == "mixed language"
    assert mixed_language()("17+25?", german) is None, "the question does not tell its language"
    with pytest.raises(ValueError, match="target must be one of digits, words, got 'en'"):
        mixed_language(target="en", languages=tiny_words.LANGUAGES)


def test_thresholds_are_inclusive_of_what_they_name():
    assert repetition(2, 0.4)("q", "a b c a b c") is None
    assert repetition(2, 0.39)("q", "a b c a b c") == "repetition"
    assert repetition(7, 0.0)("q", "a b c a b c") is None
    assert long_paragraphs(5)("q", "abcde\n \nabcde</think>a long answer") is None
    assert long_paragraphs(4)("q", "abcde</think>1") == "long paragraph"


def test_the_keys_name_the_filters(tmp_path):
    assert filters_of(None) == filters_of(TraceFilters()) == ()
    keys = TraceFilters.model_validate(
        {
            "format": True, "truncated": True, "language": {}, "paragraph": 600, "code_blocks": True, "repetition": {},
            "near_duplicates": True, "decontaminate": ("./bakers.jsonl",),
        }
    )  # fmt: skip
    assert list(keys.references()) == [("filters.decontaminate[0]", "./bakers.jsonl", "file")]
    path = tmp_path / "bakers.jsonl"
    path.write_text(f'{{"question": "{LEAKED}"}}\n')
    problems = [Problem(name, (TextPart(text),), "42") for name, text in (("a", QUESTION), ("b", REWORDED))]
    found = filters_of(keys, problems=problems, evaluations=[path])
    assert {planted: first_reason(found, *row) for planted, row in PLANTED.items()} == {name: name for name in PLANTED}
    assert first_reason(found, QUESTION, GOOD) is None
    path.write_text("{}\n")
    with pytest.raises(BadProblems, match="has no question"):
        filters_of(keys, problems=problems, evaluations=[path])
