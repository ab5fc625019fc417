"""The judge of whole-number answers, and problem sets made from GSM8K and MAWPS rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rl.problems import BadProblems
from rl.tasks.integers import answer_of, as_integer, extract, judge, numbers, read_integer_problems
from rl.tasks.word_problems import read_word_problems, select_problems, write_problems
from rl.types import Completion, FinishReason, JudgeFailure, Problem, TextPart

# (completion, whether it was cut off, the answer that is read)
EXTRACTED = [
    (r"<think>48/2 = 24</think>\boxed{72}", False, 72),
    (r"24</think> First \boxed{24}, no: \boxed{72}.", False, 72),
    (r"\boxed{1,080}", False, 1080),
    (r"\boxed{1{,}080}", False, 1080),
    (r"\boxed{1\,080}", False, 1080),
    ("\\boxed{1\u202f080}", False, 1080),
    (r"\boxed{\$72}", False, 72),
    (r"\boxed{$72$}", False, 72),
    (r"\boxed{€ 5}", False, 5),
    (r"\boxed{-5}", False, -5),
    (r"\boxed{\u22125}".replace("\\u2212", "\u2212"), False, -5),
    (r"\boxed{-\$5}", False, -5),
    (r"\boxed{$-5}", False, -5),
    (r"\boxed{+5}", False, 5),
    (r"\boxed{72.0}", False, 72),
    (r"\boxed{72.00}", False, 72),
    (r"\boxed{72.}", False, 72),
    (r"\boxed{072}", False, 72),
    (r"\boxed{\text{72 clips}}", False, 72),
    (r"\boxed{x = 5}", False, 5),
    (r"\boxed{12kg}", False, 12),
    (r"\boxed{50\%}", False, 50),
    (r"\boxed{7.5}", False, None),
    (r"\boxed{1/2}", False, None),
    (r"\boxed{\frac{14}{2}}", False, None),
    (r"\boxed{3+4}", False, None),
    (r"\boxed{}", False, None),
    (r"\boxed{five}", False, None),
    (r"\boxed{72", False, 72),  # not closed, so the last number
    ("<think>1</think>She sold 48+24=72 clips.", False, 72),
    ("<think>1</think>She sold 48-24 clips", False, 24),
    ("<think>1</think>It is 5 - 8 = -3.", False, -3),
    ("<think>1</think>That is $1,250.00!", False, 1250),
    ("<think>1</think>between 3,4 and 5", False, 5),
    ("<think>1</think>half: 1/2", False, None),
    ("<think>1</think>3.14", False, None),
    ("<think>1</think>room x2", False, None),
    ("<think>72</think>no number", False, None),
    ("<think>1</think><answer>72</answer>", False, 72),
    ("<think>1</think><answer>48+24 = 72 clips</answer> in 2 months", False, 72),
    (r"<think>1</think><answer>\boxed{72}</answer>", False, 72),
    ("The answer is 72", False, 72),  # a model that does not think has an answer too
    ("<think>48+24 = 72", False, None),
    ("<think>a</think>5<think>48+24 = 72", False, None),
    ("48+24 = 72", True, None),
    (r"24</think>\boxed{72} and", True, 72),
    ("24</think><answer>72</answer> and", True, 72),
    ("24</think>So it is 72", True, None),
    ("", False, None),
    ("1" * 101, False, None),
]


@pytest.mark.parametrize(("text", "cut_off", "answer"), EXTRACTED)
def test_where_the_answer_is_read(text, cut_off, answer):
    assert extract(text, cut_off) == answer


def test_the_arithmetic_of_the_docstrings():
    assert numbers("48/2 = 24, so $1,080.00 - 5") == [None, 24, 1080, 5]
    assert numbers("= -3, x2, 1,2") == [-3, 1, 2]
    assert (as_integer("$1,080.00"), as_integer("72 clips"), as_integer("7.5"), as_integer("3+4")) == (
        1080,
        72,
        None,
        None,
    )
    assert answer_of(r"</think>\boxed{1,080}") == "1080"


def judged(text: str, answer: str = "72", finish: FinishReason = FinishReason.STOP):
    problem = Problem("p", (TextPart("?"),), answer)
    return judge(problem, Completion(text, (1,), (0.0,), finish))


def test_verdicts_and_their_reasons():
    assert judged(r"<think>a</think>\boxed{72}").right
    assert judged(r"<think>a</think>\boxed{1080}", "1,080").right
    assert judged(r"<think>a</think>\boxed{72}", finish=FinishReason.LENGTH).right
    assert judged(r"<think>a</think>\boxed{71}").reason == "answered 71, expected 72"
    assert judged("<think>72").reason == "the thought never ended (finish reason stop)"
    assert judged("72", finish=FinishReason.LENGTH).reason == "the thought never ended (finish reason length)"
    assert judged("<think>a</think>none").reason == "no whole number as the answer (finish reason stop)"
    undecided = judged("72", "half")
    assert undecided.failure is JudgeFailure.UNPARSEABLE_GOLD and "'half' is not a whole number" in undecided.reason


def test_answers_that_are_no_integers_are_refused_with_their_line(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"question": "a", "answer": "1,080"}, {"question": "b", "answer": 0.5}, {"question": "c", "answer": "43.0"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadProblems) as caught:
        read_integer_problems(path)
    assert caught.value.rows == ((2, "the answer '0.5' is not a whole number; remove the problem, or use task: exact"),)
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[2])))
    assert [problem.answer for problem in read_integer_problems(path)] == ["1080", "43"]


# --- problem sets ----------------------------------------------------------------------------------------------------

GSM8K = [
    {"question": "Ann sold 48 clips in April and half as many in May. How many in all?",
     "answer": "Ann sold 48/2 = <<48/2=24>>24 clips in May.\nAnn sold 48+24 = <<48+24=72>>72 clips.\n#### 72"},
    {"question": "A boat costs 1,000 dollars and a sail 80. What is the price of both?",
     "answer": "It is 1000+80 = $<<1000+80=1080>>1,080.\n#### 1,080"},
    {"question": "Bo walks 2 miles a day for 3 days, then 4, then 5. How many miles?",
     "answer": "2*3 = <<2*3=6>>6\n6+4 = <<6+4=10>>10\n10+5 = <<10+5=15>>15\nSo it is 15.\n#### 15"},
]  # fmt: skip
MAWPS = [
    {"input": "Tom had 5 apples and bought 7 . How many now ?", "target": 12.0},
    {"input": "A rope of 3 m is cut in half . How long is each piece ?", "target": 1.5},
    {"input": "Tom had 5 apples and bought 7. How many now?", "target": 12},
    {"input": "Sue had 9 apples and bought 1. How many now?", "target": 10},
]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "gsm8k.jsonl", tmp_path / "mawps.jsonl"]
    for path, rows in zip(paths, (GSM8K, MAWPS), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def test_a_problem_set_from_both_forms(files, tmp_path):
    selection = select_problems(files, max_steps=3)
    assert {(problem.answer, problem.steps) for problem in selection.problems} == {(72, 2), (1080, 1), (12, 0), (10, 0)}
    assert dict(selection.dropped) == {
        "longer than max_steps": 1,
        "answer is not a whole number": 1,
        "near duplicate": 1,
    }
    assert selection.summary()["rows"] == 7
    path = tmp_path / "problems.jsonl"
    write_problems(path, selection.problems)
    made = read_integer_problems(path)
    assert {(problem.answer, problem.level) for problem in made} == {("72", 2), ("1080", 1), ("12", None), ("10", None)}
    assert {problem.text for problem in made} > {row["question"] for row in GSM8K[:2]}
    assert read_integer_problems(files[0])[1].answer == "1080"  # GSM8K's own form is read as it is


def test_a_row_of_another_form_is_named(files):
    files[1].write_text('{"input": "a", "target": 1}\n{"problem": "a", "solution": 1}\n[1]\n{"input": "b", \n')
    with pytest.raises(BadProblems) as caught:
        read_word_problems(files[1])
    assert [line for line, _ in caught.value.rows] == [2, 3, 4]
    assert caught.value.rows[0][1] == "no input and no target (the fields are: problem, solution)"


@pytest.mark.skipif("REASON_DATA" not in os.environ, reason="set REASON_DATA to a folder with gsm8k-train.jsonl")
def test_the_real_files():
    folder = Path(os.environ["REASON_DATA"])
    paths = [
        folder / "gsm8k-train.jsonl",
        *(folder / f"mawps-{n}.jsonl" for n in ("multiarith", "singleeq", "singleop")),
    ]
    selection = select_problems(paths, max_steps=3)
    first = [problem.steps > 0 for problem in selection.problems[:400]]
    assert 0.5 < sum(first) / len(first) < 0.9  # some of every file
    assert selection.kept + sum(selection.dropped.values()) == 7473 + 599 + 507 + 561 + 3
    assert selection.kept > 5000
