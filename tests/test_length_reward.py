"""What stands around a length objective: scope, gates, warm-up, the steered weight, memory, and the resume of them."""

import json
import random
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from long2short.length_catalog import CATALOG, make
from long2short.length_limits import LcpoExact, LcpoMax, O1Pruner
from long2short.length_memory import DifficultyTargets, FirstSeen, Memory, ShortestRight, Stated, mean_length
from long2short.length_objectives import GroupLengths, Kimi
from long2short.length_reward import (
    AnswerTokens,
    DualWeight,
    LengthReward,
    MinSpread,
    ThinkTokens,
    Warmup,
    any_right,
    lengths_of,
    total_tokens,
)
from rl.collect import Remembering
from rl.faults import FaultRaised, reset_faults
from rl.policy import load_tokenizer
from rl.types import (
    Completion,
    FinishReason,
    JudgeFailure,
    Outcome,
    Problem,
    Rollout,
    RolloutGroup,
    TextPart,
    Verdict,
)

UNDECIDED = Verdict.undecided(JudgeFailure.TIMEOUT)


def group(lengths, right, rewards=None, finish=FinishReason.STOP, name="p", text=""):
    """`right` None: undecided."""
    rewards = rewards or [float(bool(value)) for value in right]
    rollouts = tuple(
        Rollout(
            Completion("", (7,) * length, (0.0,) * length, finish),
            UNDECIDED if is_right is None else Verdict(Outcome.RIGHT if is_right else Outcome.WRONG),
            reward,
        )
        for length, is_right, reward in zip(lengths, right, rewards, strict=True)
    )
    return RolloutGroup(Problem(name, (TextPart(text),), "1"), (1,), rollouts)


def test_the_weighted_value_is_added_after_the_warm_up():
    shape = LengthReward(Kimi(), 0.4, Warmup(2))
    groups = [group([10, 20], [True, True], [1.1, 1.1])]
    assert shape(groups, 2) is groups
    assert shape.metrics() == {"length_weight": 0.0, "length_value": 0.0}
    assert shape(groups, 3)[0].rewards == pytest.approx([1.3, 0.9])
    assert shape(groups, 3)[0].right == [True, True]
    assert shape.metrics()["length_weight"] == 0.4


def test_warm_up_is_a_step_or_a_ramp():
    assert [Warmup()(step) for step in (0, 1, 2)] == [0, 1, 1]
    assert [Warmup(2)(step) for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert [Warmup(10, 4)(step) for step in (10, 11, 12, 14, 99)] == [0, 0.25, 0.5, 1, 1]


def test_undecided_rollouts_count_for_nothing():
    shape = LengthReward(Kimi(), 1.0)
    found = shape([group([10, 20, 5000], [True, True, None]), group([3, 9], [None, None])], 1)
    assert found[0].rewards == [1.5, 0.5, 0.0]
    assert found[1].rewards == [0, 0]


def test_the_accuracy_floor_turns_the_squeeze_off():
    shape = LengthReward(Kimi(), 1.0, accuracy_floor=0.6)
    half = [group([10, 20], [True, False])]
    assert shape(half, 1) is half
    assert shape([group([10, 20], [True, True])], 1)[0].rewards == pytest.approx([1.5, 0.5])


def test_aborted_samples_are_refused_by_name():
    aborted = group([10, 20], [True, True], finish=FinishReason.ABORTED)
    with pytest.raises(ValueError, match="problem p: 2 of 2 samples were aborted"):
        LengthReward(Kimi(), 1.0)([aborted], 1)


def test_gates_are_per_group():
    wrong, near, far = group([10, 20], [False, False]), group([50, 51], [True, True]), group([10, 20], [True, True])
    assert LengthReward(Kimi(), 1.0)([wrong, near, far], 1)[0].rewards == [0, -0.5]
    gated = LengthReward(Kimi(), 1.0, gates=(any_right, MinSpread(4)))
    assert [one.rewards for one in gated([wrong, near, far], 1)] == [[0, 0], [1, 1], [1.5, 0.5]]
    assert gated([wrong, near], 1)[0].rewards == [0, 0] and "length_value" not in gated.metrics()
    assert any_right(GroupLengths((1, 2), (False, True))) and not any_right(GroupLengths((1, 2), (False, False)))
    assert MinSpread(1)(GroupLengths((50, 51), (True, True))) and not MinSpread(2)(GroupLengths((50, 51), (True, True)))


def test_a_prompt_that_states_a_budget_is_held_to_it():
    shape = LengthReward(LcpoExact(), 0.1, memory=Stated(at_most=False))
    stated = group([10, 20], [True, True], text="2+2 Think for 12 tokens.")
    assert shape([stated], 1)[0].rewards == pytest.approx([0.8, 0.2])


def test_a_budget_in_the_suffix_is_read():
    shape = LengthReward(LcpoMax(), 1.0, memory=Stated(at_most=True), suffix=" Think for maximum 1,012 tokens.")
    asked = group([12, 2012], [True, True], text="2+2 Think for maximum 5 tokens.")  # the last one counts
    assert shape([asked], 1)[0].rewards == pytest.approx([0.8, 0.2])
    shape.require_budgets([asked.problem])


NO_BUDGET = [
    (Stated(at_most=True), "", r'p states no budget: set length.target, or .* as " Think for maximum 512 tokens."'),
    (Stated(at_most=False), "", 'as " Think for 512 tokens."'),
    (Stated(at_most=False), "Think for maximum 9 tokens.", 'p states "Think for maximum 9 tokens.", which lcpo-max re'),
    (Stated(at_most=True), "Think for 9 tokens.", 'p states "Think for 9 tokens.", which lcpo-exact reads'),
]  # fmt: skip


@pytest.mark.parametrize(("memory", "text", "message"), NO_BUDGET)
def test_a_prompt_without_the_budget_that_is_read_there_is_refused(memory, text, message):
    asked = group([10, 20], [True, True], text=text)
    shape = LengthReward(LcpoMax() if memory.at_most else LcpoExact(), 1.0, memory=memory)
    with pytest.raises(ValueError, match=message):
        shape([asked], 1)
    with pytest.raises(ValueError, match=message):
        shape.require_budgets([asked.problem])
    LengthReward(LcpoMax(9), 1.0).require_budgets([asked.problem])  # a target of its own
    with pytest.raises(ValueError, match="problem p: there is no target; give one"):
        LengthReward(shape.objective, 1.0)([asked], 1)


def test_scopes_count_the_thought_or_the_answer(tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)

    def completion(text):
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        return Completion(text, ids, (0.0,) * len(ids), FinishReason.STOP)

    closed, whole = completion("1+1=2</think>02"), completion("1+1=2")
    think, answer = ThinkTokens(tokenizer), AnswerTokens(tokenizer)
    thought = len(tokenizer("1+1=2</think>", add_special_tokens=False)["input_ids"])
    assert (think(closed), answer(closed)) == (thought, closed.num_tokens - thought)
    assert answer(closed) >= 1 and total_tokens(closed) == closed.num_tokens
    assert (think(whole), answer(whole)) == (whole.num_tokens, 0)
    early = completion("1</think>1+1=2</think>02")  # the judge reads behind the last one
    assert answer(early) == answer(closed) and think(early) > think(closed)
    seen = lengths_of(RolloutGroup(Problem("p", (), ""), (), (Rollout(closed, Verdict(Outcome.RIGHT)),)), 4, think)
    assert seen == GroupLengths((thought,), (True,), (False,), "p", 4) == GroupLengths((thought,), (True,), (), "p", 4)


# --- the steered weight -----------------------------------------------------------------------------------------------


def test_the_weight_follows_the_accuracy_of_the_rollouts():
    weight = DualWeight(0.2, most=1.0, target=0.9)
    weight.count(1, [True] * 19 + [False])
    assert weight.value == 0.2  # the step is not over
    weight.count(2, [True] * 4)
    assert weight.value == pytest.approx(0.25)
    weight.count(2, [False])  # another round of the same step
    weight.count(3, [True])
    assert weight.value == pytest.approx(0.15)
    for step in range(4, 40):
        weight.count(step, [False])
    assert weight.value == 0
    for step in range(40, 80):
        weight.count(step, [True])
    assert weight.value == 1.0


def test_squeeze_until_the_paired_drop_is_reached_then_hold():
    weight = DualWeight(0.0, most=0.8, rate=2.0, drop=0.05, from_dev=True)
    weight.evaluated(0, 0.90)
    assert weight.target == pytest.approx(0.85) and weight.value == 0
    weight.evaluated(10, 0.90)
    assert weight.value == pytest.approx(0.08)
    weight.evaluated(20, 0.85)
    assert weight.value == pytest.approx(0.08)
    weight.evaluated(30, 0.80)
    assert weight.value == pytest.approx(0.0)
    weight.count(1, [True] * 8)
    weight.count(2, [True] * 8)
    assert weight.value == pytest.approx(0.0)  # rollouts do not move it


def test_the_weight_waits_for_the_warm_up():
    shape = LengthReward(Kimi(), DualWeight(0.0, 1.0, target=0.5, from_dev=True), Warmup(3))
    for step in (0, 1, 3):
        shape.evaluated(step, 1.0)
    assert shape.weight == DualWeight(0.0, 1.0, target=0.5, from_dev=True)
    shape.evaluated(4, 1.0)
    assert isinstance(shape.weight, DualWeight) and shape.weight.value == 0.5
    rollouts = LengthReward(Kimi(), DualWeight(0.0, 1.0, target=0.5), Warmup(1))
    for step in (1, 2, 3):
        rollouts([group([10, 20], [True, True])], step)
    assert rollouts.metrics()["length_weight"] == 0.5  # of step 2 alone: step 1 was still warming up


START, FREE, SLOPE, LAG = 0.92, 0.2, 0.2, 5  # of the policy below
TARGET = 0.87


def closed_loop(weight, steps, samples, every=0, rng=None):
    """(weight, true accuracy) of each step of a policy under a steered weight: a pressure follows the weight with a lag
    of five steps, and above `FREE` it costs accuracy. What the weight is told is drawn; without `rng` it is exact."""
    pressure, history = 0.0, []
    for step in range(1, steps + 1):
        accuracy = START - SLOPE * max(0.0, pressure - FREE)
        weight.count(step, verdicts(accuracy, samples, rng))
        if every and step % every == 0:
            weight.evaluated(step, fmean(verdicts(accuracy, samples, rng)))
        pressure += (weight.value - pressure) / LAG
        history.append((weight.value, accuracy))
    return history


def verdicts(accuracy, count, rng):
    if rng is not None:
        return [rng.random() < accuracy for _ in range(count)]
    right = round(accuracy * count)
    return [True] * right + [False] * (count - right)


def steered_by_dev():
    weight = DualWeight(0.0, 1.0, drop=0.05, from_dev=True)
    weight.evaluated(0, START)
    return weight


# 256 rollouts a step; 400 dev samples every tenth step; rollouts without noise.
LOOPS = {
    "rollouts": lambda rng: closed_loop(DualWeight(0.0, 1.0, target=TARGET), 300, 256, rng=rng),
    "dev": lambda rng: closed_loop(steered_by_dev(), 600, 400, 10, rng),
    "exact": lambda rng: closed_loop(DualWeight(0.0, 1.0, target=TARGET), 300, 10_000),
}


@pytest.mark.parametrize(("loop", "band"), [("rollouts", 0.03), ("dev", 0.02), ("exact", 0.001)])
@pytest.mark.parametrize("seed", range(3))
def test_the_loop_squeezes_reaches_the_target_and_holds(loop, band, seed):
    """The bands are those of 100 seeds. Without noise it comes to rest, so there is nothing for a dead band to do."""
    history = LOOPS[loop](random.Random(seed))
    first, held = history[: len(history) // 2], history[len(history) // 2 :]
    assert first[0][1] == START and first[0][0] < FREE  # it starts without cost
    assert TARGET - 0.04 <= min(accuracy for _, accuracy in first) <= TARGET + 0.005  # and squeezes until it has one
    assert all(abs(accuracy - TARGET) <= band for _, accuracy in held)
    assert fmean(accuracy for _, accuracy in held) == pytest.approx(TARGET, abs=0.012)
    assert fmean(weight for weight, _ in held) == pytest.approx(FREE + (START - TARGET) / SLOPE, abs=0.06)


def test_it_hunts_only_where_the_rate_is_too_high_for_the_cliff():
    def spread(rate):
        held = closed_loop(DualWeight(0.0, 1.0, rate, TARGET), 600, 10_000)[400:]
        return max(accuracy for _, accuracy in held) - min(accuracy for _, accuracy in held)

    assert spread(0.8 / SLOPE) < 0.001 and spread(1.2 / SLOPE) > 0.02


def test_a_weight_must_start_within_its_bound():
    with pytest.raises(ValueError, match=r"within \[0, 0.5\], got 0.6"):
        DualWeight(0.6, most=0.5)


# --- what a checkpoint stores -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_any_memory_goes_through_json_and_goes_on_alike(name):
    given = {"laser": {"target": 9}, "thinkprune": {"limits": lambda step: 9}, "soft-overlong": {"buffer": 2}}
    text = "Think for 12 tokens." if name == "lcpo-exact" else "Think for maximum 12 tokens."

    def fresh():
        limit = {"max_tokens": 50} if name in ("dast", "cosine", "soft-overlong") else {}
        chosen = make(name, **given.get(name, {}), **limit)
        return LengthReward(chosen.objective, DualWeight(0.3, 1.0, target=0.5), memory=chosen.memory)

    def step(shape, number):
        groups = [
            group([10 + number, 20, 7 * number], [True, number % 2 == 0, True], name="p", text=text),
            group([5, 9 + number, 30], [False, True, False], name="q", text=text),
        ]
        return [one.rewards for one in shape(groups, number)], shape.metrics()

    straight, resumed = fresh(), fresh()
    for number in range(1, 4):
        step(straight, number)
        step(resumed, number)
    stored = json.loads(json.dumps(resumed.as_json()))
    resumed = fresh()
    resumed.restore(stored)
    assert resumed.as_json() == straight.as_json() == stored
    for number in range(4, 8):
        assert step(straight, number) == step(resumed, number)


def test_a_shape_is_what_the_collector_stores():
    assert isinstance(LengthReward(Kimi(), 0.1), Remembering)
    for memory in (ShortestRight(), FirstSeen(mean_length), DifficultyTargets(), Stated(at_most=True)):
        found: Memory = memory
        assert found.as_json() == json.loads(json.dumps(found.as_json()))


SPEEDS = {"rollout_tokens_per_second", "train_tokens_per_second", "step_seconds", "judge_seconds"}


def results(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in SPEEDS and "seconds" not in k} for line in lines]
    return load_file(folder / "model" / "model.safetensors"), kept


# A memory by problem, with a weight steered by rollouts and one steered by evaluations. The untrained model is never
# right, so it takes an objective that pays wrong answers too.
REMEMBERING = {
    "rollouts": lambda: LengthReward(O1Pruner(), DualWeight(0.2, 1.0, target=0.02), memory=FirstSeen(mean_length)),
    "dev": lambda: LengthReward(
        O1Pruner(), DualWeight(0.2, 1.0, drop=0.3, from_dev=True), memory=FirstSeen(mean_length)
    ),
}


@pytest.fixture(scope="module")
def whole(tiny_model_folder, train_rl, tmp_path_factory):
    found = {}
    for name, shape in REMEMBERING.items():
        folder = tmp_path_factory.mktemp(name)
        train_rl(tiny_model_folder, folder, 6, save_every=2, eval_every=2, train_problems=5, shape=shape())
        found[name] = results(folder)
    return found


@pytest.mark.parametrize("name", sorted(REMEMBERING))
@pytest.mark.parametrize("step", [4, 6])
def test_an_interrupted_run_ends_in_the_same_bits(
    tiny_model_folder, train_rl, tmp_path, monkeypatch, whole, name, step
):
    monkeypatch.setenv("REASON_FAULT", f"grpo.step:{step}:raise")
    reset_faults()
    run = {"save_every": 2, "eval_every": 2, "train_problems": 5}
    with pytest.raises(FaultRaised):
        train_rl(tiny_model_folder, tmp_path, 6, shape=REMEMBERING[name](), **run)
    monkeypatch.delenv("REASON_FAULT")
    train_rl(tiny_model_folder, tmp_path, 6, shape=REMEMBERING[name](), **run)
    weights, lines = results(tmp_path)
    assert lines == whole[name][1]
    assert all(torch.equal(weights[key], value) for key, value in whole[name][0].items())
    assert len({line["length_weight"] for line in lines}) > 1  # it did move
    assert any(line["length_value"] for line in lines)
