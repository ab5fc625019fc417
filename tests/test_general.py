"""General prompts in RL: when they come, how they are judged and paid, what the figures leave out."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.batch_rewards import only
from rl.collect import StepDraw
from rl.curriculum import Curriculum, Shuffled, SuccessRates
from rl.general import GENERAL, WithGeneral, answered, first_general_step, general_prompts, is_general, with_general
from rl.judging import judge_attempts
from rl.tasks import tiny
from rl.tasks.base import Task, UndecidedLimit
from rl.train_metrics import rollout_metrics
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

PROBLEMS = tiny.problems("train", 40, (2,))
PROMPTS = general_prompts(f"say {number}" for number in range(12))
RATES = SuccessRates()


def completion(text, finish=FinishReason.STOP):
    return Completion(text, (), (), finish)


def drawn(source, step, count, before):
    return list(islice(source.stream(step, before, RATES), count))


def test_prompts_are_problems_without_an_answer_each_once():
    first, second = general_prompts(["hello", "thank you", "hello"])
    assert (first.text, first.answer, first.source) == ("hello", "", GENERAL)
    assert first.id != second.id
    assert is_general(first) and not is_general(PROBLEMS[0])
    with pytest.raises(ValueError, match=r"no general prompts: give general\.prompts some"):
        general_prompts([])


def test_they_come_in_the_last_share_of_the_steps():
    assert first_general_step(1700, 1300 / 1700) == 1301
    assert first_general_step(40, 0.75) == 31
    assert first_general_step(2, 0.0) == 1
    source = WithGeneral(Shuffled(PROBLEMS, 0), Shuffled(PROMPTS, 0), first_step=3, share=0.25)
    assert drawn(source, 2, 8, 8) == drawn(Shuffled(PROBLEMS, 0), 2, 8, 8)
    assert [is_general(p) for p in drawn(source, 3, 8, 16)] == [False, False, False, True] * 2


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_their_share_is_held_at_every_length(share, count):
    many = general_prompts(f"say {number}" for number in range(100))
    source = WithGeneral(Shuffled(tiny.problems("train", 100, (2,)), 0), Shuffled(many, 0), 1, share)
    assert sum(map(is_general, drawn(source, 1, count, 0))) == int(count * share)


def test_every_prompt_comes_once_before_any_comes_again():
    source = WithGeneral(Shuffled(PROBLEMS, 0), Shuffled(PROMPTS, 0), 1, 0.25)
    found = [p.id for step in range(6) for p in drawn(source, step + 1, 8, 8 * step) if is_general(p)]
    assert sorted(found) == sorted(p.id for p in PROMPTS)


def test_a_source_that_ends_ends_the_stream():
    source = WithGeneral(Curriculum(PROBLEMS[:5], 0, 2), Shuffled(PROMPTS, 0), 1, 0.25)
    assert len(StepDraw(source.stream(3, 0, RATES)).next(20)) == 6
    for first_step, share in ((1, 0.0), (1, 1.0), (0, 0.5)):
        with pytest.raises(ValueError, match="first_step must be at least 1 and share within"):
            WithGeneral(source, source, first_step, share)


def test_an_answer_is_all_that_their_verdict_knows():
    prompt = PROMPTS[0]
    judged = {
        "</think>hello": Outcome.RIGHT,
        "a thought</think>any text at all": Outcome.RIGHT,
        "</think> ": Outcome.WRONG,
        "<think>never ends": Outcome.WRONG,
    }
    assert {text: answered((prompt, completion(text))).outcome for text in judged} == judged
    cut = answered((prompt, completion("</think>hello", FinishReason.LENGTH)))
    assert (cut.outcome, cut.reason) == (Outcome.WRONG, "no answer (finish reason length)")


def test_the_task_is_asked_about_problems_with_a_reference_only():
    asked = []

    def judge(attempts):
        asked.extend(problem.id for problem, _ in attempts)
        return [Verdict.undecided(JudgeFailure.TIMEOUT) for _ in attempts]

    task = Task("t", judge, tiny.answer_of, "1", (), UndecidedLimit(share=1.0))
    attempts = [(problem, completion("</think>1")) for problem in (PROMPTS[0], PROBLEMS[0], PROMPTS[1], PROBLEMS[1])]
    verdicts = judge_attempts(with_general(task), attempts)
    assert [verdict.outcome for verdict in verdicts] == [Outcome.RIGHT, Outcome.UNDECIDED] * 2
    assert asked == [PROBLEMS[0].id, PROBLEMS[1].id]
    assert [v.outcome for v in with_general(tiny.TASK).judge(attempts[:1])] == [Outcome.RIGHT]


def group(problem, *right):
    verdicts = [Verdict(Outcome.RIGHT if one else Outcome.WRONG) for one in right]
    return RolloutGroup(
        problem, (), tuple(Rollout(Completion("x", (1,), (0.0,), FinishReason.STOP), v) for v in verdicts)
    )


def test_accuracy_is_that_of_problems_with_a_reference():
    groups = [group(PROBLEMS[0], True, False), group(PROMPTS[0], True, True)]
    figures = rollout_metrics(groups, tiny.TASK)
    assert (figures["accuracy"], figures["general"]) == (0.5, 0.5)
    assert "general" not in rollout_metrics(groups[:1], tiny.TASK)


def test_the_preference_model_pays_for_them_alone():
    groups = [group(PROBLEMS[0], True, False), group(PROMPTS[0], True, True)]
    reward = only(lambda wanted: [[1.0, 2.0] for _ in wanted], is_general)
    assert reward(groups) == [[None, None], [1.0, 2.0]]


def test_a_problem_of_a_set_is_never_taken_for_one():
    assert not is_general(Problem("p", (TextPart("hello"),), "", "set.jsonl:3"))
