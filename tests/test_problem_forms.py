"""Forms of problems: a golden file of 229 questions, half of them traps, and real word problems."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.problem_forms import Form, form_of
from rl.types import Problem, TextPart

GOLDEN = Path(__file__).parent / "golden" / "problem_forms.jsonl"


def problem(question: str, answer: str) -> Problem:
    return Problem("p", (TextPart(question),), answer)


def form(question: str, answer: str) -> Form | None:
    found = form_of(problem(question, answer))
    return found.form if found else None


def test_the_golden_questions_get_their_forms():
    rows = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    traps = sum(row["form"] is None for row in rows)
    assert len(rows) >= 200 and 0.45 < traps / len(rows) < 0.55
    outcomes, right = Counter(), 0
    for row in rows:
        found = form(row["question"], row["answer"])
        outcomes[found is not None, row["form"] is not None] += 1
        right += found == row["form"]
    hits, misses, alarms = outcomes[True, True], outcomes[False, True], outcomes[True, False]
    precision, recall = hits / (hits + alarms), hits / (hits + misses)
    logging.getLogger(__name__).info(
        "forms: precision %.3f, recall %.3f, form right %.3f of %d", precision, recall, right / len(rows), len(rows)
    )
    assert precision >= 0.98 and recall >= 0.98 and right / len(rows) >= 0.98


@pytest.mark.parametrize(
    ("question", "answer", "expected", "evidence"),
    [
        ("How many sides has it? (A) 6 (B) 8 (C) 9", "9", Form.MULTIPLE_CHOICE, "(A) 6 (B) 8 (C) 9"),
        ("Which of the following is prime?", "7", Form.MULTIPLE_CHOICE, "Which of the following"),
        ("Solve x + 1 = 3.", r"\text{(B)}", Form.MULTIPLE_CHOICE, "answer: (B)"),
        ("Is 91 prime?", "No", Form.YES_OR_NO, "answer: No"),
        ("The set of rationals is countable.", r"$\text{True}$", Form.TRUE_OR_FALSE, "answer: True"),
        ("Let n be odd. Prove that n^2 is odd.", "n^2", Form.PROOF, "Prove that"),
    ],
)
def test_the_words_that_decided_are_kept(question: str, answer: str, expected: Form, evidence: str):
    found = form_of(problem(question, answer))
    assert found is not None
    assert found.form is expected
    assert evidence in found.evidence


@pytest.mark.parametrize(
    ("question", "open_answer", "closed_answer", "closed_form"),
    [
        ("Is it possible that 2x = 14? If so, find x.", "7", "No", Form.YES_OR_NO),
        (
            "State whether the claim is true or false, and for which n it fails first.",
            "40",
            "false",
            Form.TRUE_OR_FALSE,
        ),
        ("Prove that the sequence converges and find its limit.", "2", "See the solution.", Form.PROOF),
        ("What is the SI unit of force?", "newton", "(B)", Form.MULTIPLE_CHOICE),
    ],
)
def test_the_answer_decides_where_the_question_leaves_it_open(
    question: str, open_answer: str, closed_answer: str, closed_form: Form
):
    assert form(question, open_answer) is None
    assert form(question, closed_answer) is closed_form


@pytest.mark.parametrize(
    "text",
    [
        "(A) " * 20_000, "which of the following " * 5_000, "is " * 10_000 + "or false", "prove that " * 10_000,
        "\\text{(A)" * 10_000, "a) b) c) " * 10_000, " " * 100_000, "$" * 100_000, "\\n" * 9_000,
    ],
)  # fmt: skip
def test_hostile_texts_take_no_time(text: str):
    started = time.perf_counter()
    form_of(problem(text, "5"))
    form_of(problem("?", text))
    assert time.perf_counter() - started < 5


@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_has_a_form_or_none(question: str, answer: str):
    found = form_of(problem(question, answer))
    assert found is None or (isinstance(found.form, Form) and 0 < len(found.evidence) <= 80)


# --- real word problems: none of GSM8K is of a form that must go ------------------------------------------------------


def word_problems(folder: Path) -> list[Problem]:
    rows = [json.loads(line) for line in (folder / "gsm8k-train.jsonl").read_text(encoding="utf-8").splitlines()]
    return [problem(row["question"], row["answer"].rpartition("####")[2].strip()) for row in rows]


def test_made_word_problems_are_open(tmp_path: Path):
    asked = (
        "{a} chooses {n} of 60 beads, each of which costs ${n}. Which costs has {a}, in dollars?",
        "A true copy costs ${n}, a false one nothing. {a} buys the following: {n} true ones. What does {a} pay?",
        "{a} wants to show that reading helps and reads {n} pages on each of {n} days. How many pages is that?",
        "Yes or no: {n} of {n} people chose one of them in each of {n} votes. How many yes were there in all?",
    )
    rows = [
        {"question": text.format(a=name, n=n), "answer": f"{n} * {n} = <<{n}*{n}={n * n}>>{n * n}\n#### {n * n}"}
        for n, name in enumerate(("Ann", "Ben", "Cleo", "Dan", "Eve"), 12)
        for text in asked
    ]
    (tmp_path / "gsm8k-train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = word_problems(tmp_path)
    assert len(made) == 20
    assert [form_of(one) for one in made] == [None] * 20


@pytest.mark.skipif("REASON_DATA" not in os.environ, reason="set REASON_DATA to a folder with gsm8k-train.jsonl")
def test_hardly_any_problem_of_gsm8k_is_taken_for_another_form():
    problems = word_problems(Path(os.environ["REASON_DATA"]))[::3]
    found = [one for one in problems if form_of(one)]
    logging.getLogger(__name__).info("GSM8K: %d of %d flagged", len(found), len(problems))
    assert len(problems) == 2491
    assert len(found) <= 1
