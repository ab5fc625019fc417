"""Instruction constraints: what each check counts, what may not pass for it, and how specs and rows are read."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rl.language
from rl.judging import JudgeFailed, judge_attempts
from rl.problems import BadProblems
from rl.tasks import constraint_checks as checks
from rl.tasks.constraint_arguments import Relation, allowed, compared
from rl.tasks.constraint_checks import CHECKS
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
from rl.tasks.constraints import (
    RLVR_FUNCTIONS,
    TASK,
    BadConstraints,
    Constraint,
    judge,
    parse_constraints,
    read_constraint_problems,
    rlvr_constraints,
)
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, TextPart, Verdict

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden" / "constraints.jsonl").read_text(encoding="utf-8").splitlines()
]
AT_LEAST, AT_MOST, EXACTLY = Relation.AT_LEAST, Relation.AT_MOST, Relation.EXACTLY


def constraint(check: str, **arguments: Any) -> Constraint:
    (parsed,) = parse_constraints([{"check": check, **arguments}])
    return parsed


# --- the golden file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['constraint']['check']}: {row['why']}")
def test_the_golden_file_says_what_keeps_to_a_constraint(row: dict[str, Any]):
    (parsed,) = parse_constraints([row["constraint"]])
    assert (parsed.fault(row["response"]) == "") is row["holds"], row["why"]


def test_the_golden_file_has_three_cases_of_either_kind_for_every_check():
    counts = Counter((row["constraint"]["check"], row["holds"]) for row in GOLDEN)
    assert len(CHECKS) == 33
    assert all(counts[name, holds] >= 3 for name in CHECKS for holds in (True, False))
    assert all(row["why"] for row in GOLDEN)
    assert len({json.dumps([row["constraint"], row["response"]]) for row in GOLDEN}) == len(GOLDEN)


@pytest.mark.parametrize("hidden", ["\u200b", "\u2060", "\ufeff", "\u00ad", "\u3164", "\ufe0f", "\U000e0041", "\x00"])
def test_hidden_characters_change_no_verdict_on_what_a_person_reads(hidden: str):
    for row in GOLDEN:
        if row["constraint"]["check"] != "json_only":
            (parsed,) = parse_constraints([row["constraint"]])
            assert (parsed.fault(hidden + hidden.join(row["response"])) == "") is row["holds"], row["why"]


# --- worked examples --------------------------------------------------------------------------------------------------


def test_how_texts_are_read():
    assert words(visible("It's 3.14, roughly\u200b.")) == ["It's", "3.14", "roughly"]
    assert visible(" se\u200bcret\r\n") == "secret" and visible("e\u0301") == "\u00e9"
    assert words("Well-known: it's 3.14, 1,000 or *** a/b") == ["Well-known", "it's", "3.14", "1,000", "or", "a", "b"]
    assert words("a-b-c-d-e") == ["a-b-c-d", "e"]
    assert words("今天 OK") == ["今", "天", "OK"]
    assert words("हिन्दी में") == ["हिन्दी", "में"] and words("U.S. at 12:30") == ["U.S", "at", "12:30"]
    assert not has_word("*** !") and not has_word("\u0301 \u0301")
    assert from_first_word('**"Once** more') == "Once** more" and from_first_word("**") == ""
    assert sentences("Dr. May paid $3.50. Why?\n- No idea") == ["Dr. May paid $3.50.", "Why?", "No idea"]
    assert sentences("So do I. Then, in the U.S. and e.g. here, it ends.") == [
        "So do I.",
        "Then, in the U.S. and e.g. here, it ends.",
    ]
    assert sentences('"No?" he said. He said "No." Then he left.') == [
        '"No?" he said.',
        'He said "No."',
        "Then he left.",
    ]
    assert sentences("Meet John F. May. J. K. Roe, see plan B. Then go.") == [
        "Meet John F. May.",
        "J. K. Roe, see plan B.",
        "Then go.",
    ]
    assert sentences("At 9 a.m. he rose. He slept at 9 p.m. Then it rained.") == [
        "At 9 a.m. he rose.",
        "He slept at 9 p.m.",
        "Then it rained.",
    ]
    assert lines("one\n\n---\ntwo") == ["one", "two"]
    assert paragraphs("a\nb\n \n***\n\nc") == ["a\nb", "c"]
    assert straight("“don’t”") == '"don\'t"' and plain("don’t \n go") == "don't go"
    assert folded("Stra\u00dfe") == folded("STRASSE") == "strasse"
    assert begins("Well done", "Well") == 4 and begins("Wellness", "Well") is None
    assert ends("a cat", "cat") and not ends("bobcat", "cat")
    assert occurrences("a cat, cats, cat's, the cat-flap", "cat") == 3


def test_the_checks_do_what_their_descriptions_say():
    assert checks.word_count("two words", AT_MOST, 1) == "2 words"
    assert not checks.word_count("It's 3.14 - or so", EXACTLY, 4) and not checks.word_count("word-by-word", EXACTLY, 1)
    assert not checks.sentence_count("Dr. No? Yes! ...", EXACTLY, 2)
    assert not checks.longest_sentence("One two three. One two.", EXACTLY, 3)
    assert not checks.line_count("one\n\n---\ntwo", EXACTLY, 2)
    assert not checks.paragraph_count("a\nb\n\n***\n\nc", EXACTLY, 2)
    assert not checks.character_count("naïve no", EXACTLY, 8)
    assert not checks.part_count("one\n* * *\ntwo", "* * *", EXACTLY, 2)
    assert not checks.part_count("one * * * two", "* * *", EXACTLY, 1)
    assert not checks.paragraph_word_count("a b\n\nc", 2, EXACTLY, 1)
    once = "a\n\n**Once more**"
    assert not checks.paragraph_first_word(once, 2, "once") and not checks.paragraph_first_word(once, 2, "Once more")
    assert checks.paragraph_first_word(once, 2, "on") == "paragraph 2 starts with 'once more**'"
    assert checks.keywords_present("Cats", ("cat",)) == "no 'cat'"
    assert not checks.keywords_absent("secretary", ("secret",))
    assert checks.keywords_absent("se**cret**", ("secret",)) and checks.keywords_absent("s\u0435cret", ("secret",))
    assert not checks.keyword_count("Cat, cats, cat's", "cat", EXACTLY, 2)
    assert not checks.letter_count("Eye, é", "e", EXACTLY, 2) and not checks.letter_count(
        "Eye, é", "e", EXACTLY, 1, False
    )
    assert checks.no_comma("1,000") == "has ',' at character 1" and checks.no_comma("一，二")
    assert checks.no_repeated_lines("One.\n- one") and not checks.no_repeated_lines("---\none\n---")
    assert not checks.all_lowercase("the 3 cats") and checks.all_lowercase("42")
    assert not checks.all_uppercase("3 CATS!") and checks.all_uppercase("42")
    assert not checks.capital_word_count("I saw NASA's GPT-4 at the USA", EXACTLY, 3)
    assert checks.starts_with("Wellness", "Well") and checks.ends_with("Bye!", "Bye")
    assert not checks.wrapped_in_quotes('"It is "so" so."')
    assert checks.wrapped_in_quotes('"Yes" and "no"') == "its first quotation ends at character 4"
    assert not checks.title("<<Joy>>") and checks.title("<Joy>") and checks.title("<<>>")
    assert not checks.postscript("Bye.\nP.S. Call me.", "P.S.")
    assert checks.repeats_prompt("Why? Why?", "Why?") == "nothing after the prompt"
    assert not checks.json_only('{"a": 1}') and not checks.json_only(f"[{'1' * 5_000}]")
    assert all(map(checks.json_only, ("[]", '"a"', '{"a": NaN}', 'Here you are: {"a": 1}')))
    assert not checks.bullet_count("* item\n- item\n+ item\n• item\n**Bold**\n-1", EXACTLY, 4)
    assert not checks.numbered_count("1. item\n1) item\n1.5 litres", EXACTLY, 2)
    assert not checks.highlight_count("*so* **and so**", EXACTLY, 2)
    assert not checks.highlight_count("2 * 3 * 4", EXACTLY, 0)
    assert not checks.placeholder_count("[your name] [1] [a link](x)", EXACTLY, 1)
    assert not checks.section_count("## Section 1\nOne.\nSection B: two.", "Section", EXACTLY, 2)
    assert not checks.two_responses("Yes.\n******\nNo.")
    assert not checks.one_of("**Yes.**", ("yes", "no"))
    assert checks.one_of("Yes, it is", ("yes", "no")) and checks.one_of("y", ("yes", "no"))


def test_around_is_within_a_tenth_and_within_one():
    assert allowed(Relation.AROUND, 50) == (45, 55)
    assert allowed(Relation.AROUND, 5) == (4, 6)
    assert compared(2, AT_MOST, 1, "words") == "2 words"


def test_commas_are_all_punctuation_that_unicode_names_so_and_one_that_looks_so():
    named = {
        character
        for character in map(chr, range(0x20000))
        if unicodedata.category(character) == "Po" and "COMMA" in unicodedata.name(character, "").split()
    }
    assert {character for character in map(chr, range(0x20000)) if checks.no_comma(character)} == named | {"\u201a"}


def test_a_language_that_cannot_be_told_is_not_the_one_asked_for(monkeypatch: pytest.MonkeyPatch):
    german = constraint("language", code="de")
    for answer, fault in (("de", ""), ("fr", "its language is fr"), (None, "its language is not to be told")):
        monkeypatch.setattr(rl.language, "language_of", lambda text, answer=answer: answer)
        assert german.fault("whatever") == fault


# --- properties -------------------------------------------------------------------------------------------------------

FIXED = settings(max_examples=60, derandomize=True, deadline=None)  # the same examples on every run, on any machine
TEXTS = st.text(alphabet=st.one_of(st.characters(), st.sampled_from(list("ab I.,*-\"'[]<>#\n\r\t{}1é今\u0301\u200b"))))
EXAMPLES = {row["constraint"]["check"]: row["constraint"] for row in GOLDEN}


@FIXED
@given(TEXTS)
def test_any_text_gets_an_answer_from_every_check(text: str):
    for spec in EXAMPLES.values():
        assert isinstance(parse_constraints([spec])[0].fault(text), str)


@FIXED
@given(TEXTS)
def test_what_is_seen_does_not_change_when_it_is_looked_at_again(text: str):
    seen = visible(text)
    assert visible(seen) == seen
    assert visible("\u200b".join(text)) == visible(text)


@FIXED
@given(TEXTS, TEXTS)
def test_the_words_of_two_texts_are_those_of_both(first: str, second: str):
    assert words(first + "\n" + second) == words(first) + words(second)


@FIXED
@given(TEXTS)
def test_lines_and_sentences_hold_the_words_of_their_text(text: str):
    text = visible(text)
    assert [word for line in lines(text) for word in words(line)] == words(text)
    assert [word for block in paragraphs(text) for word in words(block)] == words(text)
    assert len(sentences(text)) >= len(lines(text)) >= len(paragraphs(text))


@FIXED
@given(st.integers(0, 60), st.integers(0, 50))
def test_relations_agree_with_each_other(found: int, count: int):
    keeps = {relation: compared(found, relation, count, "words") == "" for relation in Relation}
    assert keeps[Relation.AT_LEAST] is not keeps[Relation.LESS_THAN]
    assert keeps[Relation.AT_MOST] is not keeps[Relation.MORE_THAN]
    assert keeps[Relation.EXACTLY] is (keeps[Relation.AT_LEAST] and keeps[Relation.AT_MOST])
    assert keeps[Relation.AROUND] or not keeps[Relation.EXACTLY]


@FIXED
@given(st.lists(st.sampled_from(["cat", "Cats", "a", "dog.", "CAT!", "the\n", "cat's"])).map(" ".join))
def test_a_keyword_is_present_absent_and_counted_alike(text: str):
    count = sum(word.casefold().strip("!'s.\n") == "cat" and word != "Cats" for word in text.split())
    assert (constraint("keywords_present", keywords=["cat"]).fault(text) == "") is (count > 0)
    assert (constraint("keywords_absent", keywords=["cat"]).fault(text) == "") is (count == 0)
    assert constraint("keyword_count", keyword="cat", relation="exactly", count=count).fault(text) == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@FIXED
@given(st.lists(JSON, min_size=1) | st.dictionaries(st.text(max_size=3), JSON, min_size=1), st.booleans())
def test_json_is_json_by_itself_and_nothing_with_prose_around_it(value: Any, fenced: bool):
    text = json.dumps(value, indent=1)
    text = f"```json\n{text}\n```" if fenced else text
    assert checks.json_only(text) == ""
    assert checks.json_only("Here: " + text) and checks.json_only(text + " Done.")


# --- bounded time -----------------------------------------------------------------------------------------------------

LONG = 100_000
HOSTILE = {
    "stops before a letter": "!" * (LONG - 1) + "x",
    "open asterisks": "*a" * (LONG // 2),
    "piled marks": "a" + "\u0301\u0316" * (LONG // 2),
    "titles and items": "- Dr. A.\n" * (LONG // 9),
    "nested JSON": '{"a":[' * (LONG // 6),
}
HOSTILE_TO = {
    "json_only": "[" + "1" * (LONG - 2) + "]",
    "keywords_present": "cat" * (LONG // 3),
    "keywords_absent": "\ufdfa" * LONG,
    "repeats_prompt": "What is 2+2? " * (LONG // 13),
    "two_responses": "a******" * (LONG // 7),
    "section_count": "Section 1\n" * (LONG // 10),
    "postscript": "P.S.\n" * (LONG // 5),
    "part_count": "* * *\na\n" * (LONG // 8),
    "title": "<<a" * (LONG // 3),
    "placeholder_count": "[a" * (LONG // 2),
    "wrapped_in_quotes": '"' * LONG,
    "longest_sentence": "A. " * (LONG // 3),
    "highlight_count": "*x" + " " * (LONG - 3) + "*",
    "no_repeated_lines": "a\n" * (LONG // 2),
    "word_count": "a-" * (LONG // 2),
}


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_hundred_thousand_hostile_characters_take_no_time(name: str):
    (parsed,) = parse_constraints([EXAMPLES[name]])
    parsed.fault("Der Hund lief gestern über die Straße und suchte seinen Ball.")  # loads the language detector
    texts = dict(HOSTILE)
    if name in HOSTILE_TO:
        texts["its own"] = HOSTILE_TO[name]
    for what, text in texts.items():
        started = time.process_time()  # of this process: the machine may be busy
        parsed.fault(text)
        assert time.process_time() - started < 3, what  # a quadratic scan would take minutes


# --- specs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"check": "word_cuont", "relation": "at most"}, "no check 'word_cuont'; did you mean 'word_count'?"),
        ({"check": "zzz"}, "no check 'zzz'; there are all_lowercase, "),
        ({"check": "word_count", "cuont": 3}, "word_count has no argument 'cuont'; did you mean 'count'?"),
        ({"check": "no_comma", "count": 3}, "no_comma has no argument 'count'; there are none"),
        ({"check": "word_count", "relation": "at most"}, "word_count needs count"),
        ({"check": "word_count", "relation": "at mots", "count": 3}, "word_count: relation must be one of 'at le"),
        ({"check": "word_count", "relation": ["at most"], "count": 3}, "word_count: relation must be one of"),
        ({"check": "word_count", "relation": "at most", "count": "3"}, "count must be a whole number from 1 to "),
        ({"check": "word_count", "relation": "at most", "count": True}, "word_count: count must be a whole number"),
        ({"check": "word_count", "relation": "at most", "count": 3.0}, "word_count: count must be a whole number"),
        ({"check": "word_count", "relation": "exactly", "count": 0}, "word_count: count must be a whole number from 1"),
        ({"check": "bullet_count", "relation": "at least", "count": 0}, "bullet_count: every response has at least 0"),
        ({"check": "bullet_count", "relation": "less than", "count": 1}, "less than 1 leaves only 0; that is 'exact"),
        ({"check": "title", "check2": 1}, "title has no argument 'check2'"),
        ({"check": "letter_count", "letter": "ab", "relation": "exactly", "count": 1}, "letter must be one character"),
        (
            {"check": "letter_count", "letter": "a", "relation": "exactly", "count": 1, "ignore_case": 1},
            "letter_count: ignore_case must be true or false, not 1",
        ),
        ({"check": "keywords_present", "keywords": "cat"}, "keywords must be a list of texts, at least one, not 'cat'"),
        ({"check": "keywords_present", "keywords": []}, "keywords must be a list of texts, at least one"),
        ({"check": "keywords_present", "keywords": ["cat", "\u200b"]}, "keywords must be a text of 1 to 200 char"),
        ({"check": "keywords_present", "keywords": ["x" * 201]}, "keywords must be a text of 1 to 200 characters"),
        ({"check": "one_of", "options": ["yes", "!"]}, "options must be a text with a letter or digit"),
        ({"check": "ends_with", "phrase": " "}, "phrase must be a text of 1 to 100,000 characters"),
        ({"check": "language", "code": "german"}, "code must be one of ar, bg, bn,"),
        ({"check": None}, "a constraint is an object with the name of its check"),
        ("title", "a constraint is an object with the name of its check, not 'title'"),
    ],
)  # fmt: skip
def test_a_constraint_that_cannot_be_read_is_refused_by_name(spec: Any, message: str):
    with pytest.raises(BadConstraints) as error:
        parse_constraints([{"check": "no_comma"}, spec])
    assert message in str(error.value)


@pytest.mark.parametrize("values", [[], {}, None, "title", {"check": "title"}])
def test_constraints_are_a_list_with_something_in_it(values: Any):
    with pytest.raises(BadConstraints, match="must be a list with at least one"):
        parse_constraints(values)


def test_a_phrase_is_read_as_responses_are():
    assert constraint("starts_with", phrase=" cafe\u0301\u200b ").arguments == {"phrase": "caf\u00e9"}
    assert str(constraint("word_count", relation="at most", count=50)) == 'word_count(relation="at most", count=50)'


# --- judging ----------------------------------------------------------------------------------------------------------

SHORT_AND_LOWER = [{"check": "word_count", "relation": "at most", "count": 3}, {"check": "all_lowercase"}]


def problem(constraints: Any = SHORT_AND_LOWER, question: str = "name a fruit") -> Problem:
    return Problem("p", (TextPart(question),), "", spec=json.dumps(constraints))


def verdict(text: str, finish: FinishReason = FinishReason.STOP, constraints: Any = SHORT_AND_LOWER) -> Verdict:
    return judge(problem(constraints), Completion(text, (), (), finish))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("an apple", None),
        ("\n an apple \n", None),
        ("A long Thought, with capitals.</think>\nan apple", None),
        ("<think>Hm, let me see.</think>an apple", None),
        ("a</think>Bad One Here</think>an apple", None),
        ("an apple or pear", 'word_count(relation="at most", count=3): 4 words'),  # the first that is broken
        ("An Apple Or Pear", 'word_count(relation="at most", count=3): 4 words'),
        ("An apple", "all_lowercase(): not all lower case"),
        ("an apple</think>An apple", "all_lowercase(): not all lower case"),  # kept to in the thought only
        ("<think>an apple", "the thought never ended (finish reason stop)"),
        ("a</think>an <think>apple", "the thought never ended (finish reason stop)"),
        ("an apple</think>", "a response without a word"),
        ("", "a response without a word"),
        (" \n\t", "a response without a word"),
        ("... *** \u200b\u3164 !", "a response without a word"),
        ("name a fruit", "the question again"),
        ("hm</think> Name  a\nFRUIT\u200b", "the question again"),
    ],
)
def test_what_is_judged_is_the_response(text: str, reason: str | None):
    expected = Verdict(Outcome.RIGHT) if reason is None else Verdict(Outcome.WRONG, reason)
    assert verdict(text) == expected


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.REPETITION, FinishReason.ABORTED])
def test_a_completion_that_did_not_end_by_itself_is_wrong(finish: FinishReason):
    assert verdict("hm</think>an apple", finish) == Verdict(
        Outcome.WRONG, f"did not end by itself (finish reason {finish})"
    )


@pytest.mark.parametrize(
    "response", ["", "!!!", "\u200b", "name a fruit", "Name a fruit", "{}", "[]", '""', "****** ******"]
)
def test_empty_junk_and_echoed_responses_are_wrong_whatever_is_asked(response: str):
    for spec in EXAMPLES.values():
        assert verdict(response, constraints=[spec]).outcome is Outcome.WRONG


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the spec is not JSON"),
        ("[", "the spec is not JSON"),
        ("[" * 100_000, "the spec is nested too deeply"),
        ('[{"check": "title", "check": "no_comma"}]', "the key 'check' stands there twice"),
        ('[{"check": "word_count", "relation": "at most", "count": NaN}]', "NaN is not a JSON number"),
        ("[]", "must be a list with at least one"),
        ('[{"check": "titel"}]', "there is no check 'titel'; did you mean 'title'?"),
    ],
)
def test_a_spec_that_cannot_be_read_is_undecided(spec: str, message: str):
    found = judge(Problem("p", (TextPart("?"),), "", spec=spec), Completion("an apple", (), (), FinishReason.STOP))
    assert found.outcome is Outcome.UNDECIDED and found.failure is JudgeFailure.UNPARSEABLE_GOLD
    assert found.reason.startswith("problem p: ") and message in found.reason


def test_a_problem_set_without_constraints_stops_the_run():
    attempt = (Problem("p", (TextPart("?"),), "4"), Completion("4", (), (), FinishReason.STOP))
    with pytest.raises(JudgeFailed, match=r"16 of 16 completions \(16 unparseable gold\)"):
        judge_attempts(TASK, [attempt] * 16)


def test_the_task_times_its_verdicts_and_has_no_votes():
    attempts = [(problem(), Completion(text, (), (), FinishReason.STOP)) for text in ("an apple", "An apple")]
    verdicts = judge_attempts(TASK, attempts)
    assert [found.right for found in verdicts] == [True, False]
    assert all(found.seconds > 0 for found in verdicts)
    assert TASK.answer_of("an apple") is None
    assert TASK.verifier_version == "constraints-1"


def test_the_task_is_imported_without_torch():
    code = "import sys, rl.tasks.constraints; sys.exit('torch' in sys.modules or 'py3langid' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], timeout=60).returncode == 0


# --- problem files ----------------------------------------------------------------------------------------------------

# One row for each function of open-instruct's if_functions.py: its parameters that are not null, a response that keeps
# to the instruction and one that does not.
RLVR_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "verify_keywords": ({"keyword_list": ["sun", "moon"]}, "The sun and the Moon.", "Sunny moons."),
    "verify_keyword_frequency": ({"word": "sun", "N": 2}, "Sun, sun.", "Sun."),
    "validate_forbidden_words": ({"forbidden_words": ["sun"]}, "A sunny day.", "The sun."),
    "verify_letter_frequency": ({"letter": "q", "N": 1}, "quite Q", "quite quick"),
    "validate_response_language": (
        {"language": "fr"},
        "Le chien a traversé la rue hier soir pour chercher son ballon.",
        "The dog crossed the street last night to look for its ball.",
    ),
    "verify_paragraph_count": ({"N": 2}, "One.\n* * *\nTwo.", "One.\n\nTwo."),
    "validate_word_constraint": ({"N": 3, "quantifier": "at least"}, "one two three", "one two"),
    "verify_sentence_constraint": ({"N": 3, "quantifier": "around"}, "One. Two.", "One."),
    "validate_paragraphs": ({"N": 2, "i": 2, "first_word": "Then"}, "A.\n\nThen b.", "Then.\n\nA."),
    "verify_postscript": ({"postscript_marker": "P.P.S"}, "Bye.\nP.P.S Call.", "Bye.\nP.S. Call."),
    "validate_placeholders": ({"N": 1}, "Dear [name], hi.", "Dear name, hi."),
    "verify_bullet_points": ({"N": 1}, "* one", "* one\n* two"),
    "validate_title": ({}, "<<Joy>> is all.", "Joy is all."),
    "validate_choice": ({"options": ["yes", "no"]}, "Yes", "ye"),
    "validate_highlighted_sections": ({"N": 1}, "So *very* much.", "So very much."),
    "validate_sections": ({"N": 2, "section_splitter": "SECTION"}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"),
    "validate_json_format": ({}, '{"a": 1}', "a: 1"),
    "validate_repeat_prompt": ({"original_prompt": "Why so?"}, "Why so? For fun.", "For fun."),
    "validate_two_responses": ({}, "Yes. ****** No.", "Yes. No."),
    "validate_uppercase": ({}, "ALL OF IT", "All of it"),
    "validate_lowercase": ({}, "all of it", "All of it"),
    "validate_frequency_capital_words": ({"N": 1, "quantifier": "at most"}, "ONE word", "ONE WORD"),
    "validate_end": ({"end_phrase": "That is all."}, "Hi. That is all.", "That is all. Hi."),
    "validate_quotation": ({}, '"All of it."', "All of it."),
    "validate_no_commas": ({}, "One and two.", "One, two."),
}
PARAMETERS = (
    "N", "quantifier", "end_phrase", "keyword_list", "word", "forbidden_words", "letter", "i", "first_word",
    "postscript_marker", "options", "section_splitter", "original_prompt",
)  # fmt: skip


def rlvr_row(function: str) -> dict[str, Any]:
    """A row in the form of allenai/RLVR-IFeval, whose ground truth names every parameter, most of them null."""
    call = {"func_name": function, **dict.fromkeys(PARAMETERS), **RLVR_ROWS[function][0]}
    return {
        "messages": [{"role": "user", "content": f"Say something, to please {function}."}],
        "ground_truth": json.dumps(call),
        "dataset": "ifeval",
        "constraint_type": "Made",
        "constraint": "...",
    }


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_rlvr_ifeval_rows_are_read_and_judged(tmp_path: Path):
    assert RLVR_ROWS.keys() == RLVR_FUNCTIONS.keys() and len(RLVR_ROWS) == 25
    read = read_constraint_problems(write(tmp_path / "rlvr.jsonl", *map(rlvr_row, RLVR_ROWS)))
    for found, (function, (_, right, wrong)) in zip(read, RLVR_ROWS.items(), strict=True):
        assert found.text == f"Say something, to please {function}."
        assert judge(found, Completion(right, (), (), FinishReason.STOP)) == Verdict(Outcome.RIGHT), function
        assert judge(found, Completion(wrong, (), (), FinishReason.STOP)).outcome is Outcome.WRONG, function


def test_an_rlvr_call_becomes_our_constraint():
    call = {"func_name": "validate_word_constraint", "N": 50, "quantifier": "at least", "letter": None}
    assert rlvr_constraints(call) == [{"check": "word_count", "relation": "at least", "count": 50}]


def test_our_rows_are_read(tmp_path: Path):
    rows = [
        {"question": "Name a fruit.", "constraints": SHORT_AND_LOWER, "note": "ignored"},
        {"question": "Größe?", "constraints": [{"check": "title"}], "id": 7, "level": 2},
    ]
    path = write(tmp_path / "own.jsonl", *rows)
    first, second = read_constraint_problems(path)
    identity = sha256(b"Name a fruit.").hexdigest()[:16]  # stays when lines are added, moved or removed
    assert (first.id, first.answer, first.level, first.source) == (identity, "", None, f"{path}:1")
    assert json.loads(first.spec) == SHORT_AND_LOWER
    assert (second.id, second.text, second.level) == ("7", "Größe?", 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("", "the line is not JSON"),
        ("{", "the line is not JSON"),
        ("[1]", "the line is no object with question and constraints"),
        ({"question": "?"}, "constraints must be a list with at least one, not 'None'"),
        ({"constraints": SHORT_AND_LOWER}, "question must be a text, not 'None'"),
        ({"question": " ", "constraints": SHORT_AND_LOWER}, "question must be a text"),
        ({"question": "?", "constraints": [{"check": "titel"}]}, "there is no check 'titel'; did you mean 'title'?"),
        ({"question": "?", "constraints": SHORT_AND_LOWER, "id": True}, "id must be a text of 1 to 200 characters"),
        ({"question": "?", "constraints": SHORT_AND_LOWER, "level": -1}, "level must be a whole number from 0"),
        ({"question": "\ud800", "constraints": SHORT_AND_LOWER}, "half of a surrogate pair"),
        ({"question": "first", "constraints": SHORT_AND_LOWER}, "the same id or question as line 1"),
        ({"question": "?", "constraints": SHORT_AND_LOWER, "pad": "x" * 1_000_000}, "longer than 1,000,000 bytes"),
        ('{"question": "?", "question": "!"}', "the key 'question' stands there twice"),
        (
            rlvr_row("validate_title") | {"ground_truth": "42"},
            "ground_truth must name a function (func_name), not '42'",
        ),
        (rlvr_row("validate_title") | {"ground_truth": "x"}, "ground_truth is not JSON"),
        (
            rlvr_row("validate_title") | {"ground_truth": {"func_name": "validate_titel"}},
            "there is no function 'validate_titel'; did you mean 'validate_title'?",
        ),
        (
            rlvr_row("validate_title") | {"ground_truth": {"func_name": "validate_placeholders", "N": None}},
            "validate_placeholders needs N",
        ),
        (
            rlvr_row("validate_title") | {"ground_truth": {"func_name": "validate_title", "N": 3}},
            "validate_title has no parameter 'N'",
        ),
        (
            rlvr_row("validate_title") | {"ground_truth": {"func_name": "validate_choice", "options": "yes/no"}},
            "one_of: options must be a list of texts, at least one, not 'yes/no'",
        ),
        (rlvr_row("validate_title") | {"messages": []}, "messages must be one message of the user"),
        (rlvr_row("validate_title") | {"messages": [{"role": "system", "content": "x"}]}, "not of 'system'"),
    ],
)
def test_a_row_that_is_no_problem_is_refused_with_its_line(row: Any, reason: str, tmp_path: Path):
    path = write(tmp_path / "bad.jsonl", {"question": "first", "constraints": SHORT_AND_LOWER}, row)
    with pytest.raises(BadProblems) as error:
        read_constraint_problems(path)
    ((line, message),) = error.value.rows
    assert line == 2 and reason in message
    assert str(error.value).startswith(f"{path}:2: ")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path):
    with pytest.raises(BadProblems, match="cannot be read"):
        read_constraint_problems(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadProblems, match="is empty"):
        read_constraint_problems(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"question": "Größe?"}\n'.encode("latin-1"))
    with pytest.raises(BadProblems, match=r"is not UTF-8 \(byte 17 of the line\)"):
        read_constraint_problems(tmp_path / "latin.jsonl")
