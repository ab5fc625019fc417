"""Length objectives: the papers' rules worked by hand, and what must hold of each for any group."""

import math
import pickle
from copy import deepcopy
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from long2short.length_catalog import CATALOG, make, parameters, required
from long2short.length_filter import Gfpo, brevity, kept, token_efficiency
from long2short.length_limits import stated_budget
from long2short.length_memory import (
    DifficultyTargets,
    FirstSeen,
    RightPercentile,
    ShortestRight,
    difficulty,
    laser_target,
    mean_length,
)
from long2short.length_objectives import GroupLengths, dast_reward, kimi_length_rewards
from rl.advantages import StdNormalized
from rl.schedules import StepSchedule
from rl.types import Completion, FinishReason, Outcome, Rollout, Verdict


def lengths_of(lengths, right, **more):
    return GroupLengths(tuple(lengths), tuple(bool(one) for one in right), **more)


def rewards(name, lengths, right, weight=None, accuracy=None, given=None, **more):
    """reward_accuracy x accuracy + weight x value, by default with the paper's two numbers."""
    entry = CATALOG[name]
    weight = entry.weight if weight is None else weight
    accuracy = entry.reward_accuracy if accuracy is None else accuracy
    values = make(name, **(given or {})).objective(lengths_of(lengths, right, **more))
    return [accuracy * one + weight * value for one, value in zip(right, values, strict=True)]


KIMI = [
    ([1000, 2000, 3000, 5000], [1, 0, 1, 0], [0.5, 0, 0.0, -0.5]),
    ([10, 10], [1, 0], [0, 0]),
    ([1000, 2000, 3000, 5000], [0, 0, 0, 0], [0, 0, 0, -0.5]),
    ([1000, 1500, 2000, 32768], [1, 1, 1, 1], [0.5, 0.4843, 0.4685, -0.5]),
]


@pytest.mark.parametrize(("lengths", "right", "expected"), KIMI)
def test_kimi(lengths, right, expected):
    assert kimi_length_rewards(lengths, [bool(r) for r in right]) == pytest.approx(expected, abs=1e-4)
    assert make("kimi").objective(lengths_of(lengths, right)) == pytest.approx(expected, abs=1e-4)


def test_kimi_all_wrong_centred_rewards_the_short_ones():
    values = make("kimi").objective(lengths_of([1000, 2000, 3000, 5000], [0, 0, 0, 0]))
    centred = [value - sum(values) / 4 for value in values]
    assert centred == pytest.approx([0.125, 0.125, 0.125, -0.375])


FOUR = [1000, 1400, 600, 3000]
# name, parameters, lengths, right, what else the group has, whole rewards
GOLDEN = [
    ("lcpo-exact", {"target": 1000}, FOUR[:3], [1, 1, 1], {}, [1, 0.88, 0.88]),
    ("lcpo-exact", {"target": 1000}, FOUR[:3], [0, 0, 0], {}, [0, -0.12, -0.12]),
    ("lcpo-exact", {}, [1400], [1], {"reference": 1000}, [0.88]),  # what the prompt states
    ("lcpo-exact", {}, [1400], [1], {}, [1]),
    ("lcpo-max", {"target": 1000}, FOUR, [1, 1, 1, 1], {}, [0.5, 0.38, 0.62, 0]),
    ("lcpo-max", {"target": 1000}, FOUR, [0, 0, 0, 0], {}, [0, 0, 0, 0]),
    ("lcpo-max-code", {"target": 1000}, FOUR, [1, 1, 1, 1], {}, [0.5, 0.44, 0.56, 0.2]),
    ("thinkprune", {"limits": StepSchedule(((1, 4000), (100, 3000)))}, [2500, 3500, 3500], [1, 1, 0], {"step": 99},
     [1, 1, 0]),
    ("thinkprune", {"limits": StepSchedule(((1, 4000), (100, 3000)))}, [2500, 3500, 3500], [1, 1, 0], {"step": 100},
     [1, 0, 0]),
    ("shorter-better", {}, [1000, 2000, 500, 3000], [1, 1, 0, 0], {}, [2, 1, -0.5, -2]),
    ("shorter-better", {}, [1000, 3000], [0, 0], {}, [-1, -1]),
    ("laser", {"target": 2000}, [1500, 2500, 1500], [1, 1, 0], {}, [1.5, 1, 0]),
    ("laser-d", {}, [1500, 2500, 1500], [1, 1, 0], {"reference": 2000}, [1.5, 1, 0]),
    ("laser-d", {}, [1500, 2500, 1500], [1, 1, 0], {}, [1, 1, 0]),
    ("laser-de", {}, [1500, 2500, 1500, 2500], [1, 1, 0, 0], {"reference": 2000}, [1.5, 1, 0, 0.5]),
    ("lc-r1", {}, [1000, 2000, 3000, 5000], [1, 0, 1, 0], {}, [1.6667, 0.3333, 1, -0.6667]),
    ("lc-r1", {}, [1000, 2000], [0, 0], {}, [0, 0]),
    ("soft-overlong", {"max_tokens": 20480, "buffer": 4096}, [16384, 16385, 18432, 20480, 20481], [0] * 5, {},
     [0, -0.00024414, -0.5, -1, -1]),
    ("cosine", {"max_tokens": 14336}, [0, 7168, 14336, 14337], [1, 1, 1, 1], {}, [2, 1.5, 1, -10]),
    ("cosine", {"max_tokens": 14336}, [0, 7168, 14336, 14337], [0, 0, 0, 0], {}, [-10, -5, 0, -10]),
    ("dler", {}, [4000, 4000, 10], [1, 0, 1], {"truncated": (True, True, False)}, [0.1, 0, 1]),
    ("toggle", {}, [1000, 2000, 4000, 3000], [1, 1, 1, 0], {"reference": 2000}, [1, 1, 0, 0]),
    ("toggle", {}, [1000, 2000, 4000, 3000], [1, 1, 1, 0], {"reference": 2000, "step": 11}, [1, 1, 1, 0]),
    ("toggle", {}, [1000, 2000, 4000, 3000], [1, 1, 1, 0], {"reference": 2000, "step": 21}, [1, 1, 0, 0]),
    ("toggle", {}, [1000, 4000, 4000, 3000], [1, 0, 0, 0], {"reference": 500}, [1, 0, 0, 0]),
    ("prime-linear", {}, [1000, 2000, 4000, 4000], [1, 1, 0, 0], {}, [0.9875, 0.975, -0.05, -0.05]),
    ("prime-linear", {}, [1000, 2000], [0, 0], {}, [0, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "lengths", "right", "more", "expected"), GOLDEN)
def test_golden_vectors(name, given, lengths, right, more, expected):
    assert rewards(name, lengths, right, given=given, **more) == pytest.approx(expected, abs=1e-4)


def test_arora_zanette_at_weight_point_four():
    found = rewards("arora-zanette", [1000, 2000, 3000, 500], [1, 1, 1, 0], weight=0.4)
    assert found == pytest.approx([0.9092, 0.8, 0.6908, 0], abs=1e-4)
    assert rewards("arora-zanette", [1000, 500], [1, 0], weight=0.4) == [0.8, 0]  # alone: 1 - alpha / 2
    assert rewards("arora-zanette", [1000, 500], [0, 0], weight=0.4) == [0, 0]


def test_alp_at_weight_1e_4():
    found = rewards("alp", [1000, 2000, 3000, 500], [1, 1, 0, 0], weight=1e-4)
    assert found == pytest.approx([0.95, 0.9, -0.15, -0.025])


def test_o1_pruner_less_its_constant():
    # lambda 2, reference 2000 tokens and accuracy .5; the latter is a constant of the group
    found = rewards("o1-pruner", [1000, 2000, 4000], [1, 1, 0], reference=2000)
    assert [one - 2 * 0.5 for one in found] == pytest.approx([2.0, 1.0, -1.5])


@pytest.mark.parametrize(("excess", "expected"), [(-0.5, 0.75), (0, 0.5), (0.5, 0.25), (1, 0.1)])
def test_dast_right(excess, expected):
    assert dast_reward(excess, True) == pytest.approx(expected)
    group = [round(1000 * (1 + excess)), round(1000 * (1 - excess))]  # all right, mean 1000: that is the budget
    assert rewards("dast", group, [1, 1], given={"max_tokens": 4096})[0] == pytest.approx(expected)


@pytest.mark.parametrize(("excess", "expected"), [(-0.5, -0.55), (0, -0.1), (0.5, -0.1)])
def test_dast_wrong(excess, expected):
    assert dast_reward(excess, False) == pytest.approx(expected)
    group = [round(4096 * (1 + excess))]  # nothing right: the budget is max_tokens
    assert rewards("dast", group, [0], given={"max_tokens": 4096}) == pytest.approx([expected])


@pytest.mark.parametrize(
    ("lengths", "right", "expected"),
    [
        ([0, 500, 1000, 2000], [1, 1, 1, 1], [1, 0.7071, 0, -0.7]),
        ([500, 1500, 2000], [0, 0, 0], [0, -0.7071, -1]),
    ],
)
def test_hapo(lengths, right, expected):
    value = make("hapo").objective
    assert value(lengths_of(lengths, right, reference=1000)) == pytest.approx(expected, abs=1e-4)
    assert value(lengths_of(lengths, right)) == [0.0] * len(lengths)


def rollout(length, reward):
    outcome = Outcome.RIGHT if reward else Outcome.WRONG
    return Rollout(Completion("", (7,) * length, (0.0,) * length, FinishReason.STOP), Verdict(outcome), reward)


def test_gfpo_keeps_the_three_shortest():
    lengths, given = [500, 900, 300, 2000, 700, 100], [1, 1, 0, 1, 0, 0]
    group = [rollout(length, float(reward)) for length, reward in zip(lengths, given, strict=True)]
    assert kept([-length for length in lengths], 3) == [0, 2, 5]
    (found,) = Gfpo(StdNormalized(0, epsilon=0), 3)([group])
    assert found == pytest.approx([1.4142, 0, -0.7071, 0, 0, -0.7071], abs=1e-4)
    assert Gfpo(StdNormalized(0), 9)([group]) == StdNormalized(0)([group])
    assert kept([token_efficiency(one) for one in group], 2) == [0, 1]
    assert Gfpo(StdNormalized(0), 2, token_efficiency)([group]) == [[0.0] * 6]  # both are right
    assert brevity(group[0]) == -500


# --- memories ---------------------------------------------------------------------------------------------------------


def test_laser_d_target():
    lengths = [500, 800, 1200, 2000, 3000, 4000]
    assert laser_target(lengths, 16 * 2 / 3) == 500
    assert laser_target(lengths, 1) == 4000
    assert laser_target(lengths, 3) == 800
    assert laser_target(lengths, 16 / 3) == 800


def test_difficulty_is_exact_at_the_thirds():
    words = [difficulty(lengths_of([1] * 3, [1] * right + [0] * (3 - right))) for right in range(4)]
    assert words == ["hard", "middling", "easy", "easy"]


def test_difficulty_targets_follow_the_steps():
    memory = DifficultyTargets(every=5)
    easy = lengths_of([10, 20, 30], [1, 1, 1], step=1)
    hard = lengths_of([10, 20, 30], [0, 0, 0], step=1)
    assert memory.recall(easy) is None and memory.recall(hard) is None
    assert memory.recall(replace(easy, step=2)) == 20  # 2 of 3 at least: half of the right ones
    assert memory.recall(replace(hard, step=2)) is None
    longer = replace(easy, lengths=(100, 200, 300))
    assert [memory.recall(replace(longer, step=step)) for step in range(3, 9)] == [20, 20, 20, 20, 200, 200]


def test_shortest_right_is_of_earlier_steps():
    memory = ShortestRight()
    first = lengths_of([900, 700, 100], [1, 1, 0], problem="p")
    assert memory.recall(first) is None
    assert memory.recall(replace(first, lengths=(600, 800, 100))) == 700
    assert memory.recall(first) == 600
    assert memory.recall(replace(first, problem="q")) is None


def test_first_seen_keeps_the_first_statistic():
    group = lengths_of([1000, 2000, 4000, 3000], [1, 1, 1, 0], problem="p")
    for memory, expected in ((FirstSeen(mean_length), 2500), (FirstSeen(RightPercentile(50)), 2000)):
        assert memory.recall(group) == expected
        assert memory.recall(replace(group, lengths=(1, 1, 1, 1))) == expected
    assert RightPercentile(75)(group) == 3000
    nothing = FirstSeen(RightPercentile(50))
    assert nothing.recall(replace(group, right=(False,) * 4)) is None
    assert nothing.recall(group) == 2000


def test_stated_budget():
    assert stated_budget("What is 2+2? Think for 512 tokens.") == 512
    assert stated_budget("Think for maximum 1024 tokens.") == 1024
    assert stated_budget("Think for a maximum of 64 tokens.") == 64
    assert stated_budget("Think hard.") is None


# --- what holds for any group -----------------------------------------------------------------------------------------

LIMIT = 10_000
GIVEN = {
    "target": 900,
    "limits": StepSchedule(((1, 1200),)),
    "buffer": 500,
    "max_tokens": LIMIT,
}
NAMES = sorted(CATALOG)
# Below its bound a right answer beats every wrong one; why the others have none stands in the two modules.
BOUNDS = {
    "kimi": 2, "arora-zanette": 1, "dast": 1.25, "lc-r1": 1, "prime-linear": 1, "laser": math.inf, "laser-d": math.inf,
    "laser-de": 1, "hapo": 1 / 0.7, "soft-overlong": 1, "dler": 1 / 0.9,
    "lcpo-exact": None, "lcpo-max": None, "lcpo-max-code": None, "o1-pruner": None, "thinkprune": None,
    "shorter-better": None, "alp": None, "cosine": None, "toggle": None,
}  # fmt: skip
samples = st.lists(st.tuples(st.integers(1, LIMIT), st.booleans()), min_size=1, max_size=16)
references = st.one_of(st.none(), st.integers(1, LIMIT))


def objective_of(name):
    return make(name, **{key: GIVEN[key] for key in required(name)}).objective


def group_of(drawn, reference=None):
    """The longest possible ones ran out of tokens."""
    lengths, right = tuple(n for n, _ in drawn), tuple(r for _, r in drawn)
    return GroupLengths(lengths, right, tuple(n == LIMIT for n in lengths), "p", 3, reference)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(samples, references, st.randoms())
def test_the_order_of_the_samples_does_not_matter(name, drawn, reference, random):
    order = list(range(len(drawn)))
    random.shuffle(order)
    values = objective_of(name)(group_of(drawn, reference))
    shuffled = objective_of(name)(group_of([drawn[i] for i in order], reference))
    assert shuffled == pytest.approx([values[i] for i in order], abs=1e-9)
    assert all(math.isfinite(value) for value in values) and len(values) == len(drawn)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lcpo-exact"])  # it pulls short ones up, too
@settings(max_examples=20)
@given(samples, references)
def test_a_longer_right_answer_is_never_worth_more(name, drawn, reference):
    values = objective_of(name)(group_of(drawn, reference))
    of_right = sorted((n, -value) for (n, is_right), value in zip(drawn, values, strict=True) if is_right)
    falling = [-value for _, value in of_right]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(falling))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20)
@given(samples, references)
def test_below_the_bound_a_right_answer_always_beats_a_wrong_one(name, drawn, reference):
    objective = objective_of(name)
    assert objective.bound() == (None if BOUNDS[name] is None else pytest.approx(BOUNDS[name]))
    bound = objective.bound()
    if bound is None:
        return
    values = objective(group_of(drawn, reference))
    for weight in (0.1 * min(bound, 10), 0.999 * min(bound, 10)):
        total = [r + weight * v for (_, r), v in zip(drawn, values, strict=True)]
        right = [t for t, (_, r) in zip(total, drawn, strict=True) if r]
        wrong = [t for t, (_, r) in zip(total, drawn, strict=True) if not r]
        assert not right or not wrong or min(right) > max(wrong)


# The bounds are no smaller than they must be: a group at which the rule crosses just above.
TIGHT = [
    ("kimi", [1, 100], [0, 1], {}),
    ("arora-zanette", [9_999] + [1] * 40 + [1], [1] * 41 + [0], {}),
    ("dast", [LIMIT] + [1] * 20 + [9_999], [1] * 21 + [0], {}),
    ("lc-r1", [1, LIMIT], [0, 1], {}),
    ("prime-linear", [1, LIMIT] + [LIMIT] * 200, [0] + [1] * 201, {}),
    ("laser-de", [LIMIT, LIMIT], [0, 1], {"reference": 5}),
    ("hapo", [1, 200], [0, 1], {"reference": 100}),
    ("soft-overlong", [1, LIMIT], [0, 1], {}),
    ("dler", [1, LIMIT], [0, 1], {"truncated": (False, True)}),
]


@pytest.mark.parametrize(("name", "lengths", "right", "more"), TIGHT)
def test_above_the_bound_it_can_cross(name, lengths, right, more):
    bound = BOUNDS[name]
    found = rewards(
        name, lengths, right, weight=1.01 * bound, accuracy=1, given={k: GIVEN[k] for k in required(name)}, **more
    )
    assert min(r for r, ok in zip(found, right, strict=True) if ok) < max(
        r for r, ok in zip(found, right, strict=True) if not ok
    )


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(1, LIMIT), st.lists(st.booleans(), min_size=1, max_size=8), references)
@settings(max_examples=10)
def test_equal_lengths_are_worth_the_same(name, length, right, reference):
    values = objective_of(name)(group_of([(length, one) for one in right], reference))
    assert len({value for value, one in zip(values, right, strict=True) if one}) <= 1
    assert len({value for value, one in zip(values, right, strict=True) if not one}) <= 1
    if name == "kimi":
        assert values == [0.0] * len(right)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_are_values_and_can_be_pickled(name):
    objective = objective_of(name)
    group = group_of([(10, True), (30, False), (LIMIT, True)], 20)
    assert pickle.dumps(objective)
    assert deepcopy(objective) == objective and objective(group) == objective(group)
    own: Any = objective
    assert {field.name for field in fields(own)} <= set(parameters(name))


def test_a_group_is_checked():
    for lengths, right, truncated in (((), (), ()), ((1, 2), (True,), ()), ((1, 2), (True, False), (True,))):
        with pytest.raises(ValueError, match="a group needs a verdict for each of its completions"):
            GroupLengths(lengths, right, truncated)


def test_the_catalog_refuses_what_an_objective_does_not_have():
    with pytest.raises(TypeError, match="alpha"):
        make("kimi", alpha=1.0)
    with pytest.raises(TypeError, match="target"):
        make("laser")
    assert required("laser") == ["target"]
    assert parameters("hapo") == {"floor": -0.7}
    assert parameters("toggle") == {"accuracy": 0.5, "period": 10, "percentile": 50.0}
