"""Leaks of evaluation questions: what is one, what is a template, and near duplicates among the problems themselves."""

from __future__ import annotations

import gzip
import json
import logging
import os
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.decontamination import EvaluationIndex, EvaluationItem, Kind, LeakRule, read_items, words_of
from rl.near_duplicates import DuplicateRule, near_duplicates
from rl.problems import BadProblems
from rl.tasks.exact import equal
from rl.types import Problem, TextPart

AYA = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. When she walks at a "
    "constant speed of $s$ kilometers per hour, the walk takes her 4 hours, including $t$ minutes in the coffee shop."
)


def problem(text: str, answer: str = "1", name: str = "p") -> Problem:
    return Problem(name, (TextPart(text),), answer)


def index(*texts: str, rule: LeakRule | None = None) -> EvaluationIndex:
    return EvaluationIndex([EvaluationItem("set", str(i), text) for i, text in enumerate(texts)], rule)


def kinds(found: EvaluationIndex, text: str) -> list[Kind]:
    return [overlap.kind for overlap in found.overlaps(problem(text))]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"A $1{,}000$-kilometer Walk: $\frac{x}{2} \le 3.5$", "a 1000 kilometer walk x / 2 <= 3.5"),
        ("Tom's 1,000 well-known dogs, 12,34", "tom s 1000 well known dogs 12 34"),
        ("x² − 3 = .5", "x ^ 2 - 3 = 0.5"),
        (r"$\left( 5-3 \right) \cdot \sqrt{2}$", "5 - 3 * sqrt 2"),
        ("\uff34\uff4f\uff4d ½", "tom 1 / 2"),
        ("二つの数", "二 つ の 数"),
        ("$$ ... !", ""),
    ],
)
def test_words_numbers_and_signs(text: str, words: str):
    assert " ".join(words_of(text)) == words


@given(st.text(max_size=50))
def test_words_are_their_own_words(text: str):
    assert words_of(" ".join(words_of(text))) == words_of(text)


# --- leaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        AYA,
        AYA.upper().replace("$", "").replace(".", " ."),
        f"Solve the problem below. Put the answer in a box.\n\n{AYA}\n\nThink step by step.",
        AYA.replace("$9$-kilometer-long", r"\(9\) kilometer  long"),
    ],
)
def test_a_copied_question_is_a_leak_with_both_texts(text: str):
    (leak,) = index("What is 2 + 2?", AYA).leaks(problem(text))
    assert leak.kind in (Kind.WHOLE, Kind.COVERAGE)
    assert (leak.coverage, leak.words, leak.item.id, leak.item.evaluation) == (1.0, 42, "1", "set")
    assert (leak.problem_text, leak.item.text) == (text, AYA)
    assert leak.shared.startswith("every morning aya goes for a 9 kilometer long walk")


def words(*numbers: int) -> str:
    """Words that no other number has: `words(0, 2)` is "wordaa wordac"."""
    return " ".join(f"word{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in numbers)


@pytest.mark.parametrize(
    ("shared", "length", "kind"),
    [
        (7, 40, None),  # fewer than 8 words in a row
        (8, 40, Kind.PART),
        (12, 40, Kind.PART),
        (13, 40, Kind.RUN),
        (20, 40, Kind.COVERAGE),  # half of the question
        (19, 40, Kind.RUN),
        (8, 16, Kind.COVERAGE),
        (8, 17, Kind.PART),
    ],
)
def test_thirteen_words_or_half_of_a_question_are_a_leak(shared: int, length: int, kind: Kind | None):
    found = index(words(*range(length)))
    text = f"{words(*range(100, 130))} {words(*range(3, 3 + shared))} {words(*range(140, 150))}"
    assert kinds(found, text) == ([] if kind is None else [kind])
    for overlap in found.overlaps(problem(text)):
        assert (overlap.words, overlap.coverage) == (shared, shared / length)
        assert overlap.shared == words(*range(3, 3 + shared))


def test_thirteen_words_must_stand_in_a_row():
    # The two stretches of 8 overlap in the question, not in the problem: 9 of its words are covered, 8 are in a row.
    found = index(words(*range(40)))
    (overlap,) = found.overlaps(problem(f"{words(*range(8))} and then {words(*range(1, 9))}"))
    assert (overlap.kind, overlap.words, overlap.coverage) == (Kind.PART, 8, 9 / 40)
    assert kinds(index(words(*range(40)), rule=LeakRule(run=8)), words(*range(8))) == [Kind.RUN]


def test_what_more_than_three_questions_share_is_a_template():
    stem = "construct a complete truth table for the following argument then say whether it is valid"  # 15 words
    questions = [f"{stem} {words(*range(20 * i, 20 * i + 20))}" for i in range(4)]
    assert kinds(index(*questions[:3]), f"{stem} {words(*range(200, 230))}") == [Kind.RUN] * 3
    (overlap,) = index(*questions).overlaps(problem(f"{stem} {words(*range(200, 230))}"))
    assert (overlap.kind, overlap.words, overlap.leaked) == (Kind.TEMPLATE, 15, False)
    # The question itself is a leak all the same, and so is a question that is nothing but the template.
    assert [o.item.id for o in index(*questions).leaks(problem(questions[2]))] == ["2"]
    assert kinds(index(*questions, stem), stem) == [Kind.WHOLE]
    assert kinds(index(*questions, stem), f"{words(*range(300, 310))} {stem}") == [Kind.COVERAGE]


def test_equal_questions_of_several_sets_make_no_template_and_are_each_named():
    items = [EvaluationItem(f"set {i}", "7", AYA) for i in range(5)]
    leaks = EvaluationIndex(items).leaks(problem(f"{AYA} Find t."))
    assert [leak.item.evaluation for leak in leaks] == [f"set {i}" for i in range(5)]


def test_a_shared_formula_is_no_leak_unless_it_is_the_question():
    formula = r"\frac{11 \times 10 \times 9 \times 8 \times 7}{5 \times 4 \times 3 \times 2 \times 1}"
    asked = (
        f"In how many ways can a committee of five be chosen from eleven people? It is ${formula}$. Explain the terms."
    )
    other = f"A box holds eleven marbles of other colours and five are drawn, which gives ${formula}$ draws. Why?"
    assert kinds(index(asked), other) == [Kind.TEMPLATE]
    assert kinds(index(f"Evaluate ${formula}$."), f"Please evaluate ${formula}$ for me.") == [Kind.COVERAGE]


@pytest.mark.parametrize(
    ("question", "text", "leaked"),
    [
        ("What is 2 + 2?", "What is 2 + 2?", True),
        ("What is 2 + 2?", "Answer in a box: what is 2+2 ?", True),
        ("What is 2 + 2?", "What is 2 + 2 * 3?", False),  # another problem
        ("What is 2 + 2?", "What is 2 + 22?", False),
        ("Find x.", "Find x.", True),
        ("Find x.", "Let 2x = 4. Find x.", False),  # fewer than 4 words are in anything
        ("Name the largest planet.", "Quiz. Name the largest planet. Then sing.", True),
        ("", "anything", False),
        ("?!", "?!", False),
    ],
)
def test_short_questions_are_matched_as_a_whole(question: str, text: str, leaked: bool):
    assert [leak.kind for leak in index(question).leaks(problem(text))] == ([Kind.WHOLE] if leaked else [])


def test_another_number_is_another_text():
    question = "A train of 120 cars leaves the station at 9 o'clock and another one of 80 cars leaves two hours later."
    assert index(question).leaks(problem(question.replace("9", "8"))) != []  # 12 of 20 words in a row are left
    assert index(question).leaks(problem(re.sub(r"[0-9]+", "77", question))) == []


def test_the_index_finds_what_comparing_everything_finds():
    rng = random.Random(0)
    vocabulary = words(*range(40)).split()
    stock = [" ".join(rng.choices(vocabulary, k=10)) for _ in range(6)]

    def text() -> str:
        return " ".join(
            rng.choice(stock) if rng.random() < 0.3 else " ".join(rng.choices(vocabulary, k=4)) for _ in range(6)
        )

    questions = [text() for _ in range(30)]
    found = index(*questions, rule=LeakRule(template=30))
    for _ in range(60):
        asked = text()
        theirs = set(zip(*(asked.split()[i:] for i in range(8)), strict=False))
        expected = {}
        for i, question in enumerate(questions):
            own = question.split()
            covered = {j + k for j in range(len(own) - 7) if tuple(own[j : j + 8]) in theirs for k in range(8)}
            if covered:
                expected[str(i)] = len(covered) / len(own)
        assert {o.item.id: o.coverage for o in found.overlaps(problem(asked))} == expected


# --- evaluation files -------------------------------------------------------------------------------------------------


def test_evaluation_files_are_read_by_their_question(tmp_path: Path):
    path = tmp_path / "exam.jsonl"
    path.write_text('{"problem": "One?", "id": 60}\n{"input": "Two?", "target": 2}\n\n{"question": "Three?"}\n')
    assert read_items(path) == [
        EvaluationItem("exam", "60", "One?"),
        EvaluationItem("exam", "line 2", "Two?"),
        EvaluationItem("exam", "line 4", "Three?"),
    ]
    zipped = tmp_path / "exam.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_items(zipped) == read_items(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"q": "One?"}\n',
            "1: has no question: expected a text in one of the fields question, problem, input, prompt",
        ),
        (b'{"question": 5}\n[]\n', "2: has no question"),
        (b"{\n", "1: Expecting"),
        (b"\n", "is empty"),
        (b"\xff\n", "cannot be read"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "exam.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadProblems, match=re.escape(message)):
        read_items(path)
    with pytest.raises(BadProblems, match="cannot be read"):
        read_items(tmp_path / "none.jsonl")


def test_a_rule_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="1 <= anchor <= run"):
        LeakRule(anchor=14)


# --- near duplicates --------------------------------------------------------------------------------------------------

BOXES = "Tom has 3 boxes with 4 red pens in each of them. How many pens does Tom have in all of his boxes?"


@pytest.mark.parametrize(
    ("text", "answer", "repeats"),
    [
        (BOXES, "12", True),
        (BOXES.upper().replace("?", " ?"), "12.0", True),
        (BOXES.replace("3", "three").replace("4", "four"), "12", True),
        (BOXES.replace("Tom", "Eve").replace("his", "her"), "12", True),
        (
            "How many pens does Tom have in all of his boxes? Tom has 3 boxes with 4 red pens in each of them.",
            "12",
            True,
        ),
        (BOXES.replace("3", "6").replace("4", "2"), "12", False),  # other numbers that happen to give the same
        (BOXES.replace("3", "5"), "20", False),
        (BOXES.replace("How many pens does Tom have", "What do the pens weigh, at 1 g each,"), "24", False),
        (BOXES, "7", True),  # the same question; one of the answers is wrong
    ],
)
def test_what_repeats_a_problem(text: str, answer: str, repeats: bool):
    found = near_duplicates([problem(BOXES, "12", "a"), problem(text, answer, "b")])
    assert [(d.problem.id, d.kept.id) for d in found] == ([("b", "a")] if repeats else [])
    assert all(d.answers_disagree == (answer == "7") for d in found)


def test_similarity_is_common_pairs_over_all_pairs():
    (found,) = near_duplicates([problem("a b c d", "1", "x"), problem("a b c e", "1", "y")])
    assert found.similarity == 0.5  # ab bc of ab bc cd ce
    (found,) = near_duplicates([problem("a a a", "1", "x"), problem("a a a a", "1", "y")])
    assert found.similarity == 2 / 3  # each pair counts as often as it stands there
    assert near_duplicates([problem("a b c d", "1", "x"), problem("a b e f", "1", "y")]) == []


def test_signs_and_order_keep_problems_with_other_answers_apart():
    for first, second in (
        ("Evaluate (2 + 3) * 4 exactly.", "Evaluate 2 + (3 * 4) exactly."),
        ("What is 7 - 3?", "What is 3 - 7?"),
        ("Solve |x| = 3.", "Solve x = 3."),
    ):
        assert near_duplicates([problem(first, "20", "x"), problem(second, "14", "y")]) == []


def test_one_problem_of_a_template_stays_where_numbers_do_not_matter():
    family = [problem(BOXES.replace("3", str(n)), str(4 * n), f"p{n}") for n in range(2, 9)]
    assert near_duplicates(family) == []
    found = near_duplicates(family, DuplicateRule(numbers_matter=False))
    assert [d.problem.id for d in found] == ["p3", "p4", "p5", "p6", "p7", "p8"]
    assert {d.kept.id for d in found} == {"p2"}


def test_duplicates_of_duplicates_are_one_cluster_and_its_first_is_kept():
    chain = [problem(words(*range(start, start + 12)), "5", f"p{start}") for start in (0, 2, 4, 6)]
    found = near_duplicates([chain[0], chain[3], chain[1], chain[2]])
    assert [d.problem.id for d in found] == ["p6", "p2", "p4"]
    assert {d.kept.id for d in found} == {"p0"}
    # p6 shares 5 of 17 pairs with p0 and 7 of 15 with p2: only p4, which came last, makes one cluster of them.
    links = {d.problem.id: [one.id for one in d.link] for d in found}
    assert links == {"p2": ["p0", "p2"], "p4": ["p6", "p4"], "p6": ["p2", "p4"]}
    assert all(d.similarity == 9 / 13 for d in found)


def test_texts_of_one_word_or_none():
    found = near_duplicates(
        [problem("x", "1", "a"), problem("x", "1", "b"), problem("y", "1", "c"), problem("?", "1", "d")]
    )
    assert [d.problem.id for d in found] == ["b"]
    assert near_duplicates([]) == []
    with pytest.raises(ValueError, match="0 < similarity"):
        DuplicateRule(similarity=0.0)


# --- real word problems, and made ones of their format ----------------------------------------------------------------


def mawps(folder: Path) -> list[Problem]:
    problems = []
    for name in ("addsub", "singleeq"):
        lines = (folder / f"mawps-{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for number, row in enumerate(map(json.loads, filter(None, lines))):
            problems.append(problem(row["input"], str(row["target"]), f"{name} {number}"))
    return problems


@pytest.fixture(params=["made", pytest.param("real", marks=pytest.mark.skipif(
    "REASON_DATA" not in os.environ, reason="set REASON_DATA to a folder with mawps-addsub.jsonl",
))])  # fmt: skip
def mawps_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "real":
        return Path(os.environ["REASON_DATA"])
    things = enumerate(("shells", "marbles", "stickers", "pears", "stamps"), 30)
    text = "Joan had {n} {thing} . She gave {given} {thing} to Sam . How many are left ?"
    rows = [(text.format(n=n, thing=thing, given=n // 3), n - n // 3) for n, thing in things]
    first = [{"input": text, "target": float(target)} for text, target in rows * 2]
    reworded = [(text.replace(" .", ".").replace("are left ?", "does she have left?"), target) for text, target in rows]
    second = [{"input": text, "target": target} for text, target in reworded]
    second += [{"input": re.sub("[0-9]+", "77", text), "target": target} for text, target in rows]
    for name, made in (("addsub", first), ("singleeq", second)):
        (tmp_path / f"mawps-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return tmp_path


def test_word_problems_that_repeat_each_other_are_those_of_an_all_pairs_search(mawps_folder: Path):
    problems = mawps(mawps_folder)
    number_words = "one two three four five six seven eight nine ten eleven twelve"
    digits = {word: str(number) for number, word in enumerate(number_words.split(" "), 1)}

    def read(one: Problem) -> tuple[list[str], Counter[tuple[str, str]]]:
        said = [digits.get(word, word) for word in words_of(one.text)]
        return sorted(word for word in said if word[0].isdigit() and word != "1"), Counter(pairwise(said))

    texts = [read(one) for one in problems]
    repeated = set()
    for later, (numbers, pairs) in enumerate(texts):
        for earlier in range(later):
            if texts[earlier][0] == numbers and equal(problems[earlier].answer, problems[later].answer):
                common = (texts[earlier][1] & pairs).total()
                if common / (texts[earlier][1] | pairs).total() >= 0.5:
                    repeated.add(problems[later].id)
    found = near_duplicates(problems)
    logging.getLogger(__name__).info("%d of %d repeat an earlier one", len(found), len(problems))
    assert repeated
    assert {d.problem.id for d in found if not d.answers_disagree} == repeated


def test_real_questions_do_not_leak_into_each_other_by_phrases(mawps_folder: Path):
    problems = mawps(mawps_folder)
    half = len(problems) // 2
    found = EvaluationIndex([EvaluationItem("first", one.id, one.text) for one in problems[:half]])
    leaks = {one.id for one in problems[half:] if found.leaks(one)}
    repeats = near_duplicates(problems)
    twins = {d.problem.id for d in repeats if d.kept in problems[:half] and d.problem in problems[half:]}
    logging.getLogger(__name__).info("%d leaks, %d repeats, %d both", len(leaks), len(twins), len(leaks & twins))
    assert len(leaks & twins) >= 0.9 * len(twins) > 0
    assert len(leaks - twins) <= 0.1 * len(leaks)
