"""The exact judge: where an answer is read, and what is equal."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.tasks.exact import answer_of, as_number, equal, extract, final_part, judge, last_answer_tag, last_box, normalize
from rl.types import Completion, FinishReason, Outcome, Problem, TextPart


def verdict(text: str, gold: str = "5", finish: FinishReason = FinishReason.STOP) -> Outcome:
    problem = Problem("p", (TextPart("?"),), gold)
    return judge(problem, Completion(text, (), (), finish)).outcome


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{3}. Wait, \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{5} and then \boxed{6", "5"),
        (r"so \boxed{6", "6"),  # no balanced box: the last number
        (r"\boxed{}", None),
        ("<answer>5</answer>", "5"),
        ("<answer> 5 </answer> or <answer>7</answer>", "7"),
        ("<answer>5</answer> <answer>7", "5"),
        (r"<answer>\boxed{5}</answer>", "5"),
        (r"<answer>7</answer> \boxed{5}", "5"),
        ("work\n#### 5", "5"),
        ("work\n#### 5\nthanks", "5"),
        ("work ####", None),
        ("The answer is 5.", "5"),
        ("3 + 2 = 5", "5"),
        ("x is 7\n\n5", "5"),
        ("It costs $1,250.50 today", "$1,250.50"),
        ("x+1", "x+1"),
        ("The capital is Paris", "The capital is Paris"),
        ("I think\nParis", "Paris"),
        ("", None),
        ("  \n ", None),
        ("a </think> 5", "5"),
        (r"\boxed{9}</think>The answer is 5", "5"),
        (r"<think>\boxed{9}</think>\boxed{5}", "5"),
        ("</think>", None),
        (r"<think>\boxed{5}", None),
        (r"a</think>b<think>\boxed{5}", None),
        ("a</think>4</think>5", "5"),
    ],
)
def test_where_the_answer_is_read(text: str, answer: str | None):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("text", "finish", "right"),
    [
        ("5", FinishReason.STOP, True),
        ("thinking</think>5", FinishReason.STOP, True),
        ("<think>so 5", FinishReason.STOP, False),
        ("so 5", FinishReason.LENGTH, False),  # the template may have opened the thought
        (r"so \boxed{5}", FinishReason.LENGTH, False),
        (r"so</think>\boxed{5}", FinishReason.LENGTH, True),
        (r"so</think><answer>5</answer> and", FinishReason.REPETITION, True),
        ("so</think>The answer is 5", FinishReason.LENGTH, False),  # perhaps the first digit of 52
        (r"so</think>\boxed{5", FinishReason.LENGTH, False),
        (r"so \boxed{5}", FinishReason.ABORTED, False),
    ],
)
def test_cut_off_completions(text: str, finish: FinishReason, right: bool):
    assert verdict(text, finish=finish) is (Outcome.RIGHT if right else Outcome.WRONG)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1/2", "0.5"), (r"\frac{1}{2}", "0.5"), (r"\dfrac{1}{2}", ".50"), (r"-\frac{1}{2}", "-0.5"), ("1 / 2", "1/2"),
        ("5", "5.0"), ("5.", "5"), ("05", "5"), ("+5", "5"), ("1,000", "1000"), ("1,250.50", "1250.5"),
        ("$5", "5"), (r"\$5", "5"), ("$ 5", "5"), ("-$5", "$-5"), ("5%", "5"), (r"5\%", "5 %"), ("$5$", "5"),
        ("\u22125", "-5"), (r"\(5\)", "5"), ("**5**", "5"), ("`5`.", "5"), (r"\text{5}", "5"),
        ("Paris", "paris"), (r"\text{Paris}.", "Paris"), ("Yes", "yes"), ("x+1", "x+1"), ("a  b", "a b"), ("B", "B"),
        ("2/4", "1/2"), ("0.1", "1/10"), ("10" * 30, "10" * 30 + ".0"),
    ],
)  # fmt: skip
def test_equal(answer: str, gold: str):
    assert equal(answer, gold)
    assert equal(gold, answer)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("6=5", "5"), (r"5\approx6", "5"), ("10_2", "10"), ("50%", "0.5"), ("$5", "5%"), ("1,00", "100"), ("1 2", "12"),
        ("1,2", "12"), ("5 or 6", "5"), ("3,5", "5"), ("5x", "5"), ("1e3", "1000"), ("1/0", "0"), ("0/0", "0"),
        ("x", "X"), ("b", "B"), ("1+x", "x+1"), ("", "5"), ("five", "5"), ("0.333", "1/3"), ("٥", "5"), ("²", "2"),
        ("1" * 101, "1" * 101 + ".0"), ("0x5", "5"), ("--5", "5"), ("5/", "5"), (":", "5"), ("1__000", "1000"),
        ("__import__('os').system('true')", "0"), ("10**10**10", "1"), ("factorial(10**9)", "1"),
    ],
)  # fmt: skip
def test_not_equal(answer: str, gold: str):
    assert not equal(answer, gold)
    assert not equal(gold, answer)


def test_worked_examples():
    assert as_number("1,250.50") == (Fraction(2501, 2), "")
    assert as_number("50%") == (50, "%")
    assert as_number("x") is None
    assert normalize(r" **$\text{Paris}$.** ") == "Paris"
    assert final_part("a</think>4") == "4"
    assert final_part("<think>4") is None
    assert last_box(r"\boxed{3}. Wait, \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert last_answer_tag("<answer>4</answer>") == "4"


def test_votes_have_one_spelling():
    assert {answer_of(text) for text in ("0.50", r"\boxed{1/2}", r"</think>\frac{1}{2}")} == {"1/2"}
    assert answer_of("<think>5") is None
    assert answer_of(r"\boxed{Paris.}") == "Paris"


def test_verdicts_say_why():
    problem = Problem("p", (TextPart("?"),), "5")

    def reason(text: str, finish: FinishReason = FinishReason.STOP) -> str:
        return judge(problem, Completion(text, (), (), finish)).reason

    assert reason("6") == "answered '6', expected '5'"
    assert reason("<think>5") == "the thought never ended (finish reason stop)"
    assert reason("5", FinishReason.LENGTH) == "the thought never ended (finish reason length)"
    assert reason("a</think>") == "no final answer (finish reason stop)"
    assert len(reason("x" * 10_000)) < 120


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 100_000, "{" * 300_000 + "}" * 300_000, "<answer>" * 100_000, "9," * 200_000 + " x", "#" * 500_000,
        "$" * 100_000, "." * 100_000, "1/" * 100_000 + " 1", r"\frac{" * 50_000, "</think>" * 100_000 + "-" * 100_000,
    ],
)  # fmt: skip
def test_hostile_texts_take_no_time(text: str):
    started = time.perf_counter()
    assert verdict(text) is Outcome.WRONG
    answer_of(text)
    assert time.perf_counter() - started < 5


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=1000))
def test_every_fraction_equals_itself_in_both_spellings(value: Fraction):
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    assert equal(f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}")
    assert not equal(f"{sign}{top}/{bottom}", f"{sign}{top + 1}/{bottom}")


@given(st.text(max_size=80))
def test_any_text_gets_a_verdict(text: str):
    assert verdict(text, gold="a gold that no text has") is Outcome.WRONG
    assert verdict(text + r"</think>\boxed{5}") is Outcome.RIGHT
