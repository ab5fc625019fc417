"""The tiny world: arithmetic, the demonstrations' truth, disjoint splits, an exact judge."""

import random

import pytest

from rl.tasks import tiny
from rl.tasks.base import split_of
from rl.types import Completion, FinishReason, Outcome, Problem, TextPart


def complete(text, finish=FinishReason.STOP):
    return Completion(text, (7,), (0.0,), finish)


def problem(question):
    return Problem("p", (TextPart(question),), tiny.solve(question))


def test_solve_works_left_to_right_modulo_100():
    assert tiny.solve("47*3+08-65") == "84"  # 41, 49, 84
    assert tiny.solve("03-09") == "94"


@pytest.mark.parametrize("question", ["", "47", "7*3", "47*33", "47/3", "47*3+8", "__import__('os')"])
def test_other_questions_are_refused(question):
    with pytest.raises(ValueError, match="tiny-world question"):
        tiny.solve(question)


@pytest.mark.parametrize("operation", tiny.OPERATIONS)
def test_working_always_ends_in_the_true_result(operation):
    for left in range(100):
        for right in range(2, 10) if operation == "*" else range(0, 100, 7):
            worked = tiny.working(left, operation, right)
            assert worked.endswith(f" so {tiny.apply(left, operation, right):02d}")


def test_working_examples():
    assert tiny.working(47, "*", 3) == "7*3=21, 4*3+2=14 so 41"
    assert tiny.working(47, "+", 38) == "7+8=15, 4+3+1=08 so 85"
    assert tiny.working(41, "-", 65) == "1-5=06, 4-6-1=07 so 76"


def test_the_misremembered_share_is_what_it_says_and_fixed():
    for operation, share in tiny.MISREMEMBERED.items():
        facts = [(a, b) for a in range(100) for b in (range(2, 10) if operation == "*" else range(100))]
        wrong = [
            fact
            for fact in facts
            if tiny.recall(fact[0], operation, fact[1]) != tiny.apply(fact[0], operation, fact[1])
        ]
        assert len(wrong) / len(facts) == pytest.approx(share, abs=0.05)
        assert all(tiny.recall(a, operation, b) % 10 == tiny.apply(a, operation, b) % 10 for a, b in wrong)


def test_splits_are_disjoint_stable_and_of_the_wanted_size():
    splits = {name: tiny.problems(name, 60) for name in ("train", "dev", "test")}
    ids = [p.id for found in splits.values() for p in found]
    assert len(ids) == len(set(ids)) == 180
    assert all(split_of(p) == name for name, found in splits.items() for p in found)
    assert [p.id for p in tiny.problems("test", 20)] == [p.id for p in splits["test"][:20]]
    assert {p.level for p in splits["train"]} == {2, 3, 4}


def test_checked_steps_repair_what_plain_steps_slip_on(monkeypatch):
    monkeypatch.setattr(tiny, "CHECKED", dict.fromkeys(tiny.OPERATIONS, 1.0))
    rng = random.Random(0)
    problems = tiny.problems("train", 300)
    right = dict.fromkeys(("plain", "careful"), 0)
    for p in problems:
        for style in right:
            text = tiny.demonstrate(p, style, rng)
            right[style] += tiny.judge(p, complete(text)).right
    assert right["careful"] == 300
    assert right["plain"] < 240


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("47*3=41; </think>41", Outcome.RIGHT),
        ("</think>41", Outcome.RIGHT),
        ("</think>40", Outcome.WRONG),
        ("</think>", Outcome.WRONG),
        ("</think>41 so 41", Outcome.WRONG),
        ("</think>40</think>41", Outcome.RIGHT),
        ("41", Outcome.WRONG),
    ],
)
def test_the_judge_reads_the_text_after_the_last_closing_tag(text, outcome):
    assert tiny.judge(problem("47*3"), complete(text)).outcome is outcome


def test_a_truncated_thought_is_wrong_with_its_reason():
    verdict = tiny.judge(problem("47*3"), complete("47*3=41; 41", FinishReason.LENGTH))
    assert verdict.outcome is Outcome.WRONG
    assert "never ended" in verdict.reason and "length" in verdict.reason


def test_the_tokenizer_decodes_to_exactly_the_text_and_knows_every_word():
    from rl.tasks.tiny_models import make_tokenizer

    tokenizer = make_tokenizer()
    stream = tiny.demonstrations({"guess": 1, "plain": 1, "careful": 1}, (2, 3, 4), seed=0)
    for _ in range(50):
        p, text = next(stream)
        ids = tokenizer(p.text + text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == p.text + text
