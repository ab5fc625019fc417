"""The math task: what is extracted, what equals what, what hangs. The golden set is in test_math_golden.py."""

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from rl.judging import judge_attempts
from rl.tasks import math_worker
from rl.tasks.math_worker import exact
from rl.tasks.mathematics import (
    FALLBACKS,
    last_formula,
    last_number,
    math_judge,
    math_task,
    plain_number,
)
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, TextPart

pytestmark = pytest.mark.alone

RIGHT, WRONG, UNDECIDED = Outcome.RIGHT, Outcome.WRONG, Outcome.UNDECIDED


@pytest.fixture(scope="module")
def judge():
    judge = math_judge(workers=2, timeout=5.0)
    yield judge
    judge.pool.close()


def attempt(gold, text, question="", finish=FinishReason.STOP):
    return Problem("p", (TextPart(question),), gold), Completion(text, (), (), finish)


def boxed(gold, answer, question=""):
    return attempt(gold, rf"<think>so</think>It is \boxed{{{answer}}}.", question)


EQUAL = {
    "6=5 is no 5": ("5", "6=5", False),
    "a true chain": ("5", "2+3=5", True),
    "a name": ("5", "x=5", True),
    "the reference names, too": ("y=2x+1", "2x+1", True),
    "another name": ("x=5", "y=5", False),
    "near is not equal": ("5", r"5 \approx 6", False),
    "an exact side first": (r"\sqrt{2}", r"\sqrt2 \approx 1.414", True),
    "a rounded reference": ("1.41", r"\sqrt2 \approx 1.41", True),
    "a decimal is exact": (r"\frac13", "0.333333", False),
    "a recurring one too": (r"\frac13", r"0.\overline{3}", True),
    "pi is no decimal": (r"\pi", "3.14159265358979", False),
    "a calculation is no answer": ("7", "3+4", False),
    "nor is a product": ("42", r"6 \cdot 7", False),
    "a power is": ("1024", "2^{10}", True),
    "a fraction that can be reduced is": ("42", "84/2", True),
    "a factorial": ("120", "5!", True),
    "a binomial": ("10", r"\binom{5}{2}", True),
    "percent alone": ("50", r"50\%", False),
    "percent is a hundredth": (r"\frac12", r"50\%", True),
    "another unit": (r"5\text{ cm}", r"5\text{ m}", False),
    "no unit": (r"5\text{ cm}", "5", True),
    "another base": ("10", "10_2", False),
    "a part of a set": (r"\{1,2\}", "1", False),
    "a hedge": ("3", "3 \\text{ or } 5", False),
    "a set without order": (r"\{1,2\}", "2, 1", True),
    "a pair with": ("(1,2)", "(2,1)", False),
    "open and closed": ("[0,1)", "[0,1]", False),
    "plus or minus": (r"\pm 2", "2, -2", True),
    "another equation": ("3x-y+13=0", "3x+4y+14=0", False),
    "a multiple of an equation": ("x+2y=3", "2x+4y=6", True),
    "functions": ("(x+1)^2", "x^2+2x+1", True),
    "identities": (r"\cos^2 x", r"1-\sin^2 x", True),
    "an absolute value": ("x", "|x|", False),
    "capitals are other names": ("X", "x", False),
    "primes are other names": ("x'", "x", False),
    "a constant of integration": ("x^2+C", "x^2", False),
    "degrees in a sine": (r"\frac12", r"\sin 30^\circ", True),
    "logarithms": ("3", r"\log_2 8", True),
    "imaginary": ("i", r"\sqrt{-1}", True),
    "complex": ("1+2i", "2i+1", True),
    "signs of infinity": (r"\infty", r"-\infty", False),
    "rows and columns": (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", False),
    "words": (r"\text{Paris}", "paris", True),
    "choices": (r"\text{(B)}", "B", True),
    "letters in another case": ("B", "b", False),
    "nothing": (r"\emptyset", "no solution", True),
    "two numbers beside each other": ("7", "3 4", False),
    "a blank answer": ("5", " ", False),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_what_equals_what(judge, name):
    gold, answer, right = EQUAL[name]
    (verdict,) = judge([boxed(gold, answer)])
    assert verdict.outcome is (RIGHT if right else WRONG), verdict.reason


def test_decimals_mixed_numbers_and_degrees_become_exact():
    assert exact("0.25x") == r"(\frac{25}{100})x"
    assert exact(r"3\frac{1}{2}") == r"(3+\frac{1}{2})"
    assert exact(r"0.\overline{3}") == r"(\frac{3}{9})"
    assert exact(r"0.1\overline{6}") == r"(\frac{15}{90})"
    assert exact(r"\sin 30^{\circ}") == r"\sin (\frac{30 \pi}{180})"
    assert exact(r"x\frac{1}{2}") == r"x\frac{1}{2}" and exact(r"3\frac{5}{2}") == r"3\frac{5}{2}"


def test_model_text_is_never_evaluated(monkeypatch):
    """Whatever is asked, sympy's evaluating parser is not called."""
    import sympy.parsing.sympy_parser as sympy_parser

    def refuse(*arguments, **options):
        raise AssertionError("parse_expr was called")

    monkeypatch.setattr(sympy_parser, "parse_expr", refuse)
    for gold, answer in [("x^2+7x", "x(x+7)"), ("0.5", r"\frac{1}{2}"), ("a_1+b", "b+a_1"), ("1", "__import__('os')")]:
        math_worker.answer({"gold": gold, "answer": answer, "question": ""})
    assert math_worker.answer({"gold": r"2\sqrt{7}", "answer": r"\sqrt{28}", "question": ""}) == [True, True]


ASKED = {
    "What percent of 60 is 30?": ("50", r"50\%", True),
    "How many apples are there?": ("50", r"50\%", False),
    "Write 5 in base 2.": ("101_2", "101", True),
    "What is the base of the triangle?": ("101_2", "101", False),
    "Solve the inequality. Give an interval.": ("(1,2)", "1<x<2", True),
    "Which point is it?": ("(1,2)", "1<x<2", False),
    "What is 47*3+8?": ("149", "47*3+8", False),
    "What is $2^{10}$?": ("1024", "2^{10}", False),
    "Factor $x^2-1$.": ("(x+1)(x-1)", "x^2-1", False),
    "Is $2^{10}$ or $10^3$ larger?": ("2^{10}", "2^{10}", True),
}


@pytest.mark.parametrize("question", ASKED)
def test_what_the_question_settles(judge, question):
    gold, answer, right = ASKED[question]
    (verdict,) = judge([boxed(gold, answer, question)])
    assert verdict.outcome is (RIGHT if right else WRONG), verdict.reason


def test_where_the_answer_is_read(judge):
    texts = [
        (r"<think>\boxed{5}</think>\boxed{3}. Wait, \boxed{5}", RIGHT),  # the last box
        (r"<think>\boxed{5}</think>\boxed{5}. Wait, \boxed{3}", WRONG),
        (r"<think>\boxed{5}", WRONG),  # the thought never ended
        (r"<think>so</think><answer>5</answer>", RIGHT),
        ("<think>so</think>so\n#### 5\n", RIGHT),
        ("<think>so</think>5 is my number", WRONG),  # not marked
        (r"<think>a</think>\boxed{5}<think>\boxed{7}", WRONG),
        (r"\boxed{}", WRONG),
        ("", WRONG),
    ]
    verdicts = judge([attempt("5", text) for text, _ in texts])
    assert [verdict.outcome for verdict in verdicts] == [outcome for _, outcome in texts]
    assert verdicts[2].reason == "the thought never ended (finish reason stop)"
    cut = [r"<think>a</think>\boxed{5}", r"<think>a\boxed{5}", "<think>a</think>#### 5", r"\boxed{5}"]
    verdicts = judge([attempt("5", text, finish=FinishReason.LENGTH) for text in cut])
    assert [verdict.outcome for verdict in verdicts] == [RIGHT, WRONG, WRONG, WRONG]
    assert verdicts[1].reason == "the thought never ended (finish reason length)"


def test_fallbacks_are_chosen_by_the_task(judge):
    assert last_number("so 1,080 pens in 3 boxes.") == "3" and last_number("none") is None
    assert last_formula("so $x=2$ or $y=3$.") == "y=3" and last_formula("a\n b \n") == "b" and last_formula(" ") is None
    text = "<think>so</think>That makes $x = 5$ of 7."
    for name, gold in (("number", "7"), ("formula", "5")):
        one = math_judge(workers=1, fallback=FALLBACKS[name])
        assert one([attempt(gold, text)])[0].right, name
        assert not one([attempt(gold, text, finish=FinishReason.LENGTH)])[0].right
        assert math_task(one).verifier_version == f"math-1-{name}"
        one.pool.close()
    assert not judge([attempt("7", text)])[0].right
    assert math_task(judge).verifier_version == "math-1"


def test_plain_numbers_need_no_worker():
    idle = math_judge(workers=1)
    verdicts = idle([boxed("0.5", r"\frac12"), boxed("72", "73"), boxed("1/2", "$.50$"), attempt("5", "none")])
    assert [verdict.outcome for verdict in verdicts] == [RIGHT, WRONG, RIGHT, WRONG]
    assert idle.pool.pids() == []
    for text in ("1,2", "5%", "10_2", "3 4", "x", "2+3", "", "1" * 50):
        assert plain_number(text) is None, text


def test_equal_answers_are_compared_once(judge, monkeypatch):
    asked = []
    ask = judge.pool.ask
    monkeypatch.setattr(type(judge.pool), "ask", lambda pool, requests: asked.append(requests) or ask(requests))
    verdicts = judge([boxed("x+1", "1+x")] * 5 + [boxed("x+1", "x+2")])
    assert [verdict.right for verdict in verdicts] == [True] * 5 + [False]
    assert [len(requests) for requests in asked] == [2]


def test_a_reference_that_cannot_be_read_is_undecided(judge):
    (verdict,) = judge([boxed(r"\frac{1}{", "5")])
    assert verdict.failure is JudgeFailure.UNPARSEABLE_GOLD


def test_votes(judge):
    answer_of = math_task(judge).answer_of
    assert {answer_of(rf"</think>\boxed{{{text}}}") for text in ("0.50", "1/2", r"\frac12")} == {"1/2"}
    assert answer_of(r"\boxed{x + 1}") == answer_of(r"\boxed{ x+1 }") == "x+1"
    assert answer_of("five") is None


def test_empty_junk_and_echoes_earn_nothing(judge):
    """The negative control, over made references and all that there are."""
    from rl.sources import read_source

    problems = [
        Problem(f"m{n}", (TextPart(f"Compute ${expression}$."),), gold)
        for n, (expression, gold) in enumerate(
            [
                ("2+3", "5"),
                (r"\frac12+\frac13", r"\frac56"),
                ("x^2-1 = 0", r"\pm 1"),
                ("7!/5!", "42"),
                (r"\sqrt{50}", r"5\sqrt2"),
            ]
            * 4
        )
    ]
    folder = os.environ.get("REASON_DATA")
    if folder:
        problems += [problem for path in sorted(Path(folder).glob("[am]*.jsonl")) for problem in read_source(path)][::5]
        problems += read_source(Path(folder) / "gsm8k-train.jsonl")[::30]
    junk = [
        "",
        "?",
        "N/A",
        r"\text{answer}",
        "0 = 0",
        "x",
        r"\boxed",
        "1 or 2 or 3 or 4",
        "the answer",
        "NaN",
        "[]",
        "None",
    ]
    attempts = [boxed(p.answer, text, p.text) for p in problems[::10] for text in junk]
    echoes = [boxed(p.answer, p.text.removeprefix("Compute $").removesuffix("$."), p.text) for p in problems]
    bare = [attempt(p.answer, text, p.text) for p in problems for text in ("", p.text, "</think>", "<think></think>")]
    for asked in (attempts, echoes, bare):
        assert [problem.text for (problem, _), v in zip(asked, judge(asked), strict=True) if v.right] == []


HOSTILE = (
    "9^{9^{9^{9}}}",
    "123456789!!",
    r"\binom{1000000000}{500000000}",
    r"\gcd(10^{1000000},3)",
    r"\sin(10^{10^{10}})",
    "10^{10^{10}}",
    "123456789!",
    "{" * 3000 + "5" + "}" * 3000,
    "+".join(["1"] * 20_000),
    r"\sqrt{" * 150 + "2" + "}" * 150,
)


def hostile_set(count=1000):
    """1,000 items, one in a hundred hostile; the others with what is right for them."""
    attempts, expected = [], []
    for n in range(count):
        if n % 100 == 50:
            attempts.append(boxed("5", HOSTILE[n // 100 % len(HOSTILE)]))
            expected.append(None)
        else:
            right = n % 3 != 0
            attempts.append(boxed(f"x+{n}", f"{n}+x" if right else f"{n + 1}+x"))
            expected.append(RIGHT if right else WRONG)
    return attempts, expected


def check(verdicts, expected, timeout):
    assert len(verdicts) == len(expected)
    for verdict, outcome in zip(verdicts, expected, strict=True):
        if outcome is None:
            assert verdict.outcome in (WRONG, UNDECIDED) and verdict.seconds < timeout + 1
        else:
            assert verdict.outcome is outcome, verdict.reason


@pytest.mark.timeout(240)
def test_a_thousand_items_with_hostile_ones_are_all_labelled():
    """From the main thread, from threads, from asyncio: no hang, workers restored, no zombie, memory held."""
    timeout = 1.0
    judge = math_judge(workers=2, timeout=timeout)
    judge([boxed("x", "y")] * 4)
    attempts, expected = hostile_set()
    started = time.monotonic()
    check(judge_attempts(math_task(judge), attempts), expected, timeout)
    ordinary = time.monotonic() - started
    assert ordinary < 60

    found = {}
    threads = [
        threading.Thread(target=lambda part=part: found.update({part: judge(attempts[part::4])})) for part in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    for part in range(4):
        check(found[part], expected[part::4], timeout)

    async def at_once():
        return await asyncio.gather(*(asyncio.to_thread(judge, attempts[part::4]) for part in range(4)))

    for part, verdicts in enumerate(asyncio.run(at_once())):
        check(verdicts, expected[part::4], timeout)

    deadline = time.monotonic() + 10
    while len(judge.pool.pids()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    pids = judge.pool.pids()
    assert len(pids) == 2
    for pid in pids:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        assert status["State"][0] in "RS"
        assert int(status["VmHWM"].split()[0]) < 2 * 2**20  # KiB
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    states = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in children]
    assert "Z" not in states
    judge.pool.close()
