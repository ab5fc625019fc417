"""First correct solution: where a thought is cut, who confirms it, and what becomes of the rest."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.traces import flaw
from long2short.first_solution import cut_at, cut_groups, restate, solutions, stated_answer, turn_points
from long2short.shortest import select_shortest
from rl.tasks import exact, integers, tiny
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

CLIPS = "48/2 = 24, so 48+24 = 72 clips. Wait, is it half of 48? Yes: 48+24 = 72. Alternatively, 3*24 = 72. </think>"


def encode(text: str) -> list[int]:
    """One token a character and an EOS."""
    return [ord(character) for character in text] + [1]


def group(*texts: str, task: Task = integers.TASK, answer: str = "72", problem: Problem | None = None) -> RolloutGroup:
    problem = problem or Problem("p1", (TextPart("How many clips?"),), answer)
    completions = [Completion(t, tuple(encode(t)), (-0.5,) * (len(t) + 1), FinishReason.STOP) for t in texts]
    verdicts = task.judge([(problem, completion) for completion in completions])
    return RolloutGroup(problem, (3,), tuple(map(Rollout, completions, verdicts)))


def texts(groups) -> list[str]:
    return [rollout.completion.text for one in groups for rollout in one.rollouts]


def test_the_docstrings_examples():
    assert solutions("6*7=42. Wait, 6*7=41? No. Hmm, 42.") == [(8, "42"), (26, "41"), (34, "42")]
    assert turn_points("It is 4. Wait, 2+2? But let me check: 4") == [9, 20]
    assert turn_points("I should check 4, so we wait") == []
    assert stated_answer("so 48+24 = 1,080 in 3 boxes") == "3"
    assert stated_answer(r"3 makes \boxed{x+1}") == "x+1"
    assert stated_answer("48-24") == "24"
    assert stated_answer("it is -24") == "-24"
    assert stated_answer("no number") is None
    assert restate("a</think>It is 4.", "5", integers.TASK) == "</think>It is 5."
    assert restate("<think>a</think>It is 4.", "5", integers.TASK) == "<think></think>It is 5."
    assert cut_at("4+4=8, wait 4+4=8; </think>8", 7) == "4+4=8; </think>8"
    assert cut_at("4+4=8; </think>8", 7) is None


def test_first_solution_and_reflection():
    whole = group(f"{CLIPS}\\boxed{{72}}")
    first = cut_groups([whole], integers.TASK, encode)
    assert texts(first.groups) == [r"48/2 = 24, so 48+24 = 72 clips. </think>\boxed{72}"]
    second = cut_groups([whole], integers.TASK, encode, reflections=1)
    assert texts(second.groups) == [
        r"48/2 = 24, so 48+24 = 72 clips. Wait, is it half of 48? Yes: 48+24 = 72. </think>\boxed{72}"
    ]
    (rollout,) = first.groups[0].rollouts
    assert rollout.completion.token_ids == tuple(encode(rollout.completion.text))
    assert rollout.right
    assert flaw(rollout) is None
    assert first.summary() == {
        "cut": 1,
        "whole": {},
        "mean_tokens_before": whole.num_tokens[0],
        "mean_tokens_after": rollout.num_tokens,
    }
    # Three right solutions: a third one is the whole thought.
    assert cut_groups([whole], integers.TASK, encode, reflections=2).groups == (whole,)
    assert cut_groups([whole], integers.TASK, encode, reflections=9).whole == {"no earlier right solution": 1}
    with pytest.raises(ValueError, match="reflections must be 0 or more, got -1"):
        cut_groups([whole], integers.TASK, encode, reflections=-1)


def test_a_wrong_first_solution_is_kept_with_its_correction():
    text = "48+48/2 = 70. Wait, 48+24 = 72. Let me double-check: 48+24 = 72. Hmm, is 71 closer? No. </think>72"
    made = cut_groups([group(text)], integers.TASK, encode)
    assert texts(made.groups) == ["48+48/2 = 70. Wait, 48+24 = 72. </think>72"]


def test_what_the_tokenizer_does_not_know_stays_whole():
    whole = group("48+24 = 72. Wait, 48+24 = 72. </think>72")
    made = cut_groups([whole], integers.TASK, lambda text: None)
    assert made.groups == (whole,) and made.whole == {"once cut: unknown to the tokenizer": 1}


def test_the_tiny_world_loses_its_last_check():
    """There a turn stands inside a step, so the step's first result is a solution."""
    problem = tiny.problems("train", 1, (2,))[0]
    value, ((op1, x1), (op2, x2)) = tiny.parse_question(problem.text)
    middle = tiny.apply(value, op1, x1)
    last = f"{middle:02d}{op2}{x2}={problem.answer}"
    text = f"{value}{op1}{x1}={middle:02d}; {last} wait {tiny.working(middle, op2, x2)}; </think>{problem.answer}"
    ids = tuple(encode(text))
    whole = RolloutGroup(
        problem, (3,), (Rollout(Completion(text, ids, (0.0,) * len(ids), FinishReason.STOP), Verdict(Outcome.RIGHT)),)
    )
    made = cut_groups([whole], tiny.TASK, encode)
    assert texts(made.groups) == [f"{value}{op1}{x1}={middle:02d}; {last}; </think>{problem.answer}"]


def test_how_often_an_intermediate_result_passes_for_the_answer():
    """The limit that the module names, on 400 careful demonstrations: few cuts lose a step of the calculation."""
    rng = random.Random(0)
    groups, steps = [], []
    for problem in tiny.problems("train", 400, (2, 3, 4)):
        groups.append(group(tiny.demonstrate(problem, "careful", rng), task=tiny.TASK, problem=problem))
        steps.append(len(tiny.parse_question(problem.text)[1]))
    made = cut_groups(groups, tiny.TASK, encode)
    about = made.summary()
    assert made.cut > 100
    assert about["mean_tokens_after"] < 0.8 * about["mean_tokens_before"]
    short = sum(text.count(";") < number for text, number in zip(texts(made.groups), steps, strict=True))
    lost = short - sum(text.count(";") < number for text, number in zip(texts(groups), steps, strict=True))
    assert 0 < lost < 0.06 * made.cut


def test_only_well_formed_right_completions_are_cut():
    wrong, malformed = CLIPS + "71", CLIPS + "a</think>72"
    whole = group(wrong, malformed, "So</think>72", CLIPS + "72")
    made = cut_groups([whole], integers.TASK, encode)
    assert texts(made.groups)[:3] == [wrong, malformed, "So</think>72"]
    assert (made.cut, made.whole) == (1, {"no earlier right solution": 1})
    # Selection works on the result as on a pool, and every sample is counted.
    selection = select_shortest(made.groups, teacher="t", samples=4, per_problem=2)
    assert [trace.num_tokens for trace in selection.traces] == sorted(made.groups[0].num_tokens[2:])
    assert dict(selection.dropped) == {"wrong": 1, "malformed think": 1}


def test_an_answer_repeated_in_prose_does_not_confirm_a_wrong_solution():
    """Only one of two places would be restated: the probe must then be the box alone."""
    text = "It is 70. Wait, 72. Wait, yes 72. </think>The answer is \\boxed{72}. So Ann sold 72 clips."
    assert restate(text, "70", integers.TASK) == r"</think>The answer is \boxed{70}. So Ann sold 70 clips."
    twice = "It is 70. Wait, 1080. Wait, yes 1080. </think>\\boxed{1{,}080} clips, that is 1080."
    assert restate(twice, "70", integers.TASK) == r"</think>\boxed{70}"
    for one, answer in ((text, "72"), (twice, "1080")):
        made = cut_groups([group(one, answer=answer)], integers.TASK, encode)
        assert texts(made.groups)[0].startswith(f"It is 70. Wait, {answer}. </think>")


def test_a_cut_is_judged_again_and_refused_without_a_loss():
    """A judge that reads the thought as well: what is right with it is not right without it."""

    def judge(attempts):
        return [
            Verdict(
                Outcome.RIGHT if c.text.endswith("72") and ("3*24" in c.text or len(c.text) < 15) else Outcome.WRONG
            )
            for _, c in attempts
        ]

    task = Task("reads the thought", judge, integers.TASK.answer_of, "v", ())
    whole = group(CLIPS + "72", task=task)
    assert whole.right == [True]
    made = cut_groups([whole], task, encode)
    assert made.groups == (whole,)
    assert dict(made.whole) == {"once cut: wrong": 1}
    longer = cut_groups([group(CLIPS + "72")], integers.TASK, lambda text: [1] * 1000)
    assert dict(longer.whole) == {"once cut: not shorter": 1}


def test_a_template_that_does_not_prefill():
    whole = group("<think>" + CLIPS + "72")
    made = cut_groups([whole], integers.TASK, encode, prefilled=False)
    assert texts(made.groups) == ["<think>48/2 = 24, so 48+24 = 72 clips. </think>72"]


def test_text_answers_and_commas():
    capital = group("It is Paris. Wait, Paris. </think>\\boxed{Paris}", task=exact.TASK, answer="Paris")
    assert cut_groups([capital], exact.TASK, encode).groups == (capital,)  # no number, no box: nothing is stated
    boxed = group("\\boxed{Paris}. Wait, Paris it is. </think>\\boxed{Paris}", task=exact.TASK, answer="Paris")
    assert texts(cut_groups([boxed], exact.TASK, encode).groups) == ["\\boxed{Paris}. </think>\\boxed{Paris}"]
    commas = group("40*27 = 1,080. Wait, is it 1080? Yes. </think>1,080 clips", answer="1080")
    assert texts(cut_groups([commas], integers.TASK, encode).groups) == ["40*27 = 1,080. </think>1,080 clips"]


PIECES = st.sampled_from(
    [
        "48+24 = 72",
        "so 70",
        "Wait, ",
        "Hmm, ",
        ". ",
        "; ",
        "\n\n",
        "let me check: ",
        "But wait, ",
        "clips",
        "\\boxed{72}",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join), st.integers(0, 2))
def test_whatever_is_cut_is_shorter_right_and_without_a_flaw(thought, reflections):
    whole = group(f"{thought}</think>72")
    made = cut_groups([whole], integers.TASK, encode, reflections=reflections)
    (old,), (new,) = whole.rollouts, made.groups[0].rollouts
    assert made.cut + sum(made.whole.values()) == (flaw(old) is None)
    if made.cut:
        kept = new.completion.text.partition("</think>")[0]
        assert new.num_tokens < old.num_tokens
        assert new.right
        assert flaw(new) is None
        assert thought.startswith(kept.rstrip(" .;,!\n"))
        assert sum(answer == "72" for _, answer in solutions(kept)) == reflections + 1
    else:
        assert new == old
