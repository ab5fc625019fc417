"""Rule rewards: accuracy, format with and without a prefilled think tag, language, their sum, and abstentions."""

import json
import random
import time
from dataclasses import replace

import pytest

from rl.advantages import Gdpo, StdNormalized, centred, has_signal, mean_baseline
from rl.repetition import NgramPenalty, RepetitionPenalty
from rl.rewards import (
    Abstained,
    FormatReward,
    LanguageConsistency,
    PerProblem,
    SoftOverlong,
    WeightedReward,
    accuracy_reward,
    language_consistency,
    mean_parts,
    score,
    thought_of,
)
from rl.types import (
    Completion,
    FinishReason,
    JudgeFailure,
    NonFiniteReward,
    Outcome,
    Problem,
    Rollout,
    RolloutGroup,
    TextPart,
    Verdict,
)

ENGLISH = "Anna has three boxes with twelve pencils in each of them, and Ben takes half of all the pencils."
GERMAN = "Anna hat drei Schachteln mit je zwölf Stiften, und Ben nimmt davon die Hälfte mit nach Hause."
CHINESE = "安娜有三个盒子，每个盒子里有十二支铅笔，本拿走了一半。"


def rollout(text, right=True, finish=FinishReason.STOP):
    return Rollout(Completion(text, (7,), (0.0,), finish), Verdict(Outcome.RIGHT if right else Outcome.WRONG))


def group_of(*rollouts, question="?"):
    return RolloutGroup(Problem("p", (TextPart(question),), "2"), (1,), rollouts)


def undecided(text):
    return replace(rollout(text), verdict=Verdict.undecided(JudgeFailure.TIMEOUT))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1+1=2</think>2", 1),
        ("\n1+1=2\n</think>\n\n2", 1),
        ("so</think>\u2205", 1),
        ("so</think>+", 1),
        ("</think>2", 0),
        (" \n\t</think>2", 0),
        ("\u200b\u3164\u2800\u00a0</think>2", 0),
        ("...!?</think>2", 0),
        ("===</think>2", 0),
        ("2", 0),
        ("</think></think>2", 0),
        ("1+1=2</think>", 0),
        ("1+1=2</think>\n \n", 0),
        ("1+1=2</think>\u200b\u3164", 0),
        ("1+1=2</think>.", 0),
        ("<think>1+1=2</think>2", 0),
        ("1+1=2</think>2</think>", 0),
        ("1+1=2</think>2<think>3", 0),
        ("1+1=2</think>2<think>3</think>2", 0),
        ("1+1=2</think><Think>3</THINK>2", 0),
        ("1+1=2</think>< think >3</ think>2", 0),
        ("1+1=2</think><thinking>3</thinking>2", 0),
        ("1+1=2</think><|thought|>2", 0),
        ("1+1=2</think><think/>2", 0),
        ("1<thoughts>+1=2</think>2", 0),
        ("1+1=2</Think>2", 0),
        ("1+1=2< /think>2", 0),
        ("I think, <b>therefore</b> 3 < x</think>I <thank> you", 1),
    ],
)
def test_format_with_a_prefilled_think_tag(text, expected):
    assert FormatReward(prefilled=True)(rollout(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>1+1=2</think>2", 1),
        ("\n<think>1+1=2</think>\n2", 1),
        ("1+1=2</think>2", 0),
        ("so <think>1</think>2", 0),
        ("<think>a<think>b</think>2", 0),
        ("<think>a</think>2</think>3", 0),
        ("<think><think>a</think></think>2", 0),
        ("<think></think>2", 0),
        ("<think>\n\n</think>\n\n2", 0),
        ("<think>a</think>", 0),
        ("<THINK>a</think>2", 0),
        ("<think>a", 0),
        ("", 0),
    ],
)
def test_format_without_prefill(text, expected):
    assert FormatReward(prefilled=False)(rollout(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>1+1=2</think> <answer>2</answer>", 1),
        ("<think>1+1=2</think>\n<answer>\n2\n</answer>\n", 1),
        ("<think>1+1=2</think> 2", 0),
        ("<think>1+1=2</think> so <answer>2</answer>", 0),
        ("<think>1+1=2</think> <answer>2</answer> <answer>2</answer>", 0),
        ("<think>1+1=2</think> <answer> </answer>", 0),
        ("<think>1+1=2</think> <answer>2", 0),
        ("<think>1+1=2</think> </answer>", 0),
        ("<answer>2</answer>", 0),
        ("<think></think> <answer>2</answer>", 0),
        ("<think>say <answer>3</answer></think> <answer>2</answer>", 0),
        ("<think>1+1=2</think> <answer><Answer>2</Answer></answer>", 0),
        ("<think>1+1=2</think> <ANSWER>2</ANSWER>", 0),
    ],
)
def test_format_with_answer_tags(text, expected):
    assert FormatReward(prefilled=False, answer_tags=True)(rollout(text)) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"), [(16_384, 0), (16_385, -0.00024414), (18_432, -0.5), (20_480, -1), (20_481, -1)]
)
def test_soft_overlong(tokens, expected):
    made = rollout("")
    long = replace(made, completion=replace(made.completion, token_ids=(1,) * tokens, sampler_logprobs=(0.0,) * tokens))
    assert SoftOverlong(20_480, 4_096)(long) == pytest.approx(expected, abs=1e-8)


def test_a_truncated_completion_has_no_format():
    assert FormatReward(prefilled=True)(rollout("1</think>2", finish=FinishReason.LENGTH)) == 0


def test_hostile_texts_have_no_format_in_no_time():
    started = time.perf_counter()
    for text in ("<" + " " * 100_000, "< " * 50_000, "</think>" * 12_500, "\u3164" * 100_000, "<|" * 50_000):
        assert FormatReward(prefilled=True)(rollout(text)) == 0
        assert LanguageConsistency("en", "a b c")(rollout(text)) in (0, None)
    assert time.perf_counter() - started < 3


# --- language consistency ---------------------------------------------------------------------------------------------


def test_the_thought_is_what_stands_before_the_last_closing_tag():
    assert thought_of("<think>1+1=2</think>2") == "1+1=2"
    assert thought_of("1+1=2</think>2") == "1+1=2"
    assert thought_of("1+1=2") == "1+1=2"
    assert thought_of("\n<think>cut off") == "cut off"
    assert thought_of("a</think>b</think>c") == "a</think>b"


@pytest.mark.parametrize(
    ("text", "target", "value"),
    [
        (f"{ENGLISH}</think>18", "en", 1),
        (f"<think>{ENGLISH}</think>{GERMAN}", "en", 1),  # the answer is no part of it
        (f"{GERMAN}</think>18", "en", 0),
        (f"{ENGLISH}\n{GERMAN}", "en", 19 / 36),
        ("I add the apples of Anna and then those of Bernard too. 因此答案是八个苹", "en", 11 / 19),
        (f"{CHINESE}</think>18", "zh", 1),
        ("$12 \\cdot 3 / 2 = 18$</think>18", "en", None),
        ("Half of 36 is 18.</think>18", "en", None),
        (f"{ENGLISH}</think>18", None, None),
        ("</think>18", "en", 0),
        ("</think>18", None, 0),
        ("", "en", 0),
        ("... !?\u200b\u3164</think>18", "en", 0),
    ],
)
def test_language_consistency(text, target, value):
    assert LanguageConsistency(target)(rollout(text)) == (value if value is None else pytest.approx(value))


def test_the_target_may_be_the_language_of_the_question():
    german = group_of(rollout(f"{ENGLISH}</think>18"), rollout(f"{GERMAN}</think>18"), question=GERMAN + " Wie viele?")
    reward = (WeightedReward("language", language_consistency(), 1.0),)
    assert score(german, reward).rewards == [0, 1]
    assert score(replace(german, problem=Problem("q", (TextPart(ENGLISH + " Why?"),), "2")), reward).rewards == [1, 0]
    english = (WeightedReward("language", language_consistency("en"), 1.0),)
    assert score(german, english).rewards == [1, 0]
    short = score(replace(german, problem=Problem("q", (TextPart("47*3+08"),), "2")), reward)
    assert short.rewards == [0, 0]
    assert mean_parts([short]) == {"language_abstained": 1.0}


def test_copies_of_the_question_do_not_count():
    echo = LanguageConsistency("en", ENGLISH)
    assert echo(rollout(ENGLISH)) == 0
    assert echo(rollout(f"<think>\n{ENGLISH.upper()}\n{ENGLISH}</think>{ENGLISH}")) == 0
    assert echo(rollout("\n".join(ENGLISH.split()))) == 0
    quoting = f"{ENGLISH} {GERMAN}"
    assert LanguageConsistency("de", ENGLISH)(rollout(quoting)) == 1
    assert LanguageConsistency("de")(rollout(quoting)) == pytest.approx(17 / 36)


def test_a_target_without_a_table_is_refused():
    with pytest.raises(ValueError, match="target must be one of ar, bg, .*, got 'klingon'"):
        LanguageConsistency("klingon")


# --- the sum ----------------------------------------------------------------------------------------------------------


def test_score_sums_with_weights_and_keeps_the_parts():
    rewards = (WeightedReward("accuracy", accuracy_reward, 1.0), WeightedReward("format", FormatReward(True), 0.1))
    scored = score(group_of(rollout("1</think>2"), rollout("2", right=False)), rewards)
    assert scored.rewards == pytest.approx([1.1, 0.0])
    assert scored.rollouts[0].reward_parts == (("accuracy", 1.0), ("format", 1.0))
    assert mean_parts([scored]) == {"accuracy": 0.5, "format": 0.5}


def test_a_reward_that_is_not_finite_is_refused():
    group = RolloutGroup(Problem("p", (), "2"), (1,), (rollout("1</think>2"),))
    with pytest.raises(NonFiniteReward, match="problem p: reward nan"):
        group.with_rewards([float("nan")])
    with pytest.raises(NonFiniteReward) as caught:
        score(group, (WeightedReward("odd", lambda rollout: float("inf"), 1.0),))
    assert caught.value.group.rollouts[0].reward_parts == (("odd", float("inf")),)


def test_the_sum_of_the_module_docstring():
    thought = " ".join([ENGLISH] * 9) + "\n" + "安娜有三个盒子，每个盒子里有十二支铅笔。"
    rewards = (
        WeightedReward("accuracy", accuracy_reward, 1.0),
        WeightedReward("format", FormatReward(True), 1.0),
        WeightedReward("language", language_consistency("en"), 1.0),
    )
    scored = score(
        group_of(rollout(f"{thought}</think>2"), rollout(f"{ENGLISH}</think>3", False), rollout("2")), rewards
    )
    share = 9 * 19 / (9 * 19 + 18)  # 19 words nine times, and 18 characters
    assert share == pytest.approx(0.9, abs=0.01)
    assert scored.rollouts[0].reward_parts == (("accuracy", 1), ("format", 1), ("language", pytest.approx(share)))
    assert scored.rewards == pytest.approx([2 + share, 2, 1 + (share + 1) / 2])  # the last has too little to read


VALUES = {"a": 0.9, "b": 0.5, "c": None, "d": None}


def table(made):
    return VALUES[made.completion.text]


def test_an_abstention_earns_the_mean_of_its_groups_others():
    scored = score(group_of(*map(rollout, "abcd")), (WeightedReward("language", table, 2.0),))
    assert scored.rewards == pytest.approx([1.8, 1.0, 1.4, 1.4])
    assert [value for r in scored.rollouts for _, value in r.reward_parts] == pytest.approx([0.9, 0.5, 0.7, 0.7])
    assert [isinstance(value, Abstained) for r in scored.rollouts for _, value in r.reward_parts] == [0, 0, 1, 1]
    assert mean_parts([scored]) == pytest.approx({"language": 0.7, "language_abstained": 0.5})
    assert json.dumps(scored.rollouts[2].reward_parts) == '[["language", 0.7]]'


def test_an_abstention_moves_no_advantage():
    rewards = (WeightedReward("accuracy", accuracy_reward, 1.0), WeightedReward("language", table, 1.0))
    without = score(group_of(rollout("a"), rollout("b", False)), rewards)
    both = score(group_of(rollout("a"), rollout("b", False), rollout("c"), rollout("d", False)), rewards)
    found, (language,) = mean_baseline([both.rollouts])[0], mean_baseline([without.rollouts])
    assert found[:2] == pytest.approx(language)
    assert found[2:] == pytest.approx([0.5, -0.5]), "what is left is accuracy's"
    # one reward at a time, its own column of an abstention is 0 under every rule
    column = [dict(r.reward_parts)["language"] for r in both.rollouts]
    normalized = StdNormalized(epsilon=0).normalized(column)
    assert normalized == pytest.approx([0.2 / (0.08 / 3) ** 0.5, -0.2 / (0.08 / 3) ** 0.5, 0, 0], abs=1e-12)
    assert len(Gdpo((("accuracy", 1.0), ("language", 1.0)))([both.rollouts])[0]) == 4


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7])
def test_an_abstention_among_equals_is_no_signal(value):
    alike = score(
        group_of(*map(rollout, "aaac")),
        (WeightedReward("l", lambda r: None if r.completion.text == "c" else value, 1.0),),
    )
    assert not has_signal(alike.rewards), "a mean that is off by a rounding would fill a batch with nothing"
    assert centred(alike.rewards) == [0.0] * 4


def test_where_all_abstain_the_part_is_zero():
    scored = score(group_of(rollout("c"), rollout("d")), (WeightedReward("language", table, 1.0),))
    assert scored.rewards == [0, 0]
    assert mean_parts([scored]) == {"language_abstained": 1.0}


def test_undecided_rollouts_are_in_no_mean():
    scored = score(group_of(rollout("a"), undecided("b"), rollout("c")), (WeightedReward("language", table, 1.0),))
    assert scored.rewards == [0.9, 0.5, 0.9]
    assert mean_parts([scored]) == {"language": 0.9, "language_abstained": 0.5}
    assert mean_parts([]) == {}


def test_a_reward_may_read_the_problem():
    of_problem = PerProblem(lambda problem: lambda made: float(made.completion.text == problem.text))
    scored = score(group_of(rollout("a"), rollout("b"), question="b"), (WeightedReward("echo", of_problem, 1.0),))
    assert scored.rewards == [0, 1]


# --- nothing for nothing ----------------------------------------------------------------------------------------------

QUESTION = f"{ENGLISH} How many pencils are left?"
RNG = random.Random(7)
LETTERS = " ".join("".join(RNG.choices("bcdfghjklmnpqrstvwxz", k=RNG.randint(2, 8))) for _ in range(60))
NOTHING = {
    "empty": "", "blank": " \n\t ", "invisible": "\u200b\u3164\u2800" * 20, "points": "... " * 50, "emoji": "😀 " * 50,
    "letters": LETTERS, "echo": QUESTION, "echo twice": f"{QUESTION}\n{QUESTION}", "closing tag": "</think>",
    "tags": "<think></think>", "tags and answers": "<think></think><answer></answer>", "tags thrice": "</think>" * 3,
    "empty thought": "</think>18", "tags around an echo": f"<think>{QUESTION}</think>",
}  # fmt: skip


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING)
def test_empty_junk_and_echo_completions_earn_nothing(text):
    """From no reward that could be gamed, whatever the others of the group earn."""
    gameable = (
        WeightedReward("format", FormatReward(prefilled=True), 1.0),
        WeightedReward("format open", FormatReward(prefilled=False), 1.0),
        WeightedReward("format tags", FormatReward(prefilled=False, answer_tags=True), 1.0),
        WeightedReward("language", language_consistency("en"), 1.0),
        WeightedReward("language of the question", language_consistency(), 1.0),
        WeightedReward("overlong", SoftOverlong(100, 50), 1.0),
        WeightedReward("repetition", RepetitionPenalty(), 1.0),
        WeightedReward("ngrams", NgramPenalty(3), 1.0),
    )
    honest = rollout("First I multiply the number of boxes by twelve, then I take one half of it.</think>18")
    scored = score(group_of(rollout(text, right=False), honest, question=QUESTION), gameable)
    assert scored.rollouts[0].reward_parts == tuple((reward.name, 0.0) for reward in gameable)
    assert scored.rewards[1] == 3, "the honest one: its format, its language twice"
