"""Success rates and the three sources of problems: what they draw, and that it depends on nothing else."""

import json
import random
from collections import Counter
from itertools import islice

import pytest

from rl.curriculum import Curriculum, Prioritized, Shuffled, SuccessRates
from rl.samplers.base import sample_seed
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, Verdict

NEW = SuccessRates()  # nothing measured yet


def problems(count, levels=None):
    return [Problem(f"p{i}", (), "", level=levels[i] if levels else None) for i in range(count)]


def group(problem_id, outcomes):
    """A group from letters: r right, w wrong, u undecided."""
    verdicts = {
        "r": Verdict(Outcome.RIGHT),
        "w": Verdict(Outcome.WRONG),
        "u": Verdict.undecided(JudgeFailure.CRASH),
    }
    completion = Completion("", (7,), (0.0,), FinishReason.STOP)
    return RolloutGroup(
        Problem(problem_id, (), ""), (1,), tuple(Rollout(completion, verdicts[letter]) for letter in outcomes)
    )


def measured(rates):
    """Success rates with these values, from groups of ten."""
    made = SuccessRates()
    made.update(group(name, "r" * round(10 * rate) + "w" * round(10 * (1 - rate))) for name, rate in rates.items())
    return made


def draw(source, step, count, rates):
    """The problems of a step, when every step takes `count`."""
    return list(islice(source.stream(step, (step - 1) * count, rates), count))


def names(drawn):
    return [problem.id for problem in drawn]


def test_rates_forget_and_leave_undecided_rollouts_out():
    rates = SuccessRates(decay=0.5)
    assert rates.rate("p") is None
    rates.update([group("p", "rwurwu")])
    assert rates.rate("p") == 0.5
    rates.update([group("p", "rrrr"), group("q", "uu")])
    # attempts 4 x .5 + 4 = 6, successes 2 x .5 + 4 = 5
    assert rates.rate("p") == pytest.approx(5 / 6)
    assert rates.rate("q") is None


@pytest.mark.parametrize(("decay", "expected"), [(1.0, 6 / 8), (0.0, 1.0)])
def test_decay_1_is_the_plain_average_and_0_the_last_group(decay, expected):
    rates = SuccessRates(decay)
    rates.update([group("p", "rrww")])
    rates.update([group("p", "rrrr")])
    assert rates.rate("p") == pytest.approx(expected)


def test_rates_survive_json_exactly():
    generator = random.Random(0)
    rates = SuccessRates(decay=0.3)
    batches = [
        [group(f"p{generator.randrange(9)}", generator.choices("rwu", k=3)) for _ in range(5)] for _ in range(20)
    ]
    for batch in batches[:10]:
        rates.update(batch)
    again = SuccessRates.from_json(json.loads(json.dumps(rates.as_json(), sort_keys=True)))
    for batch in batches[10:]:
        rates.update(batch)
        again.update(batch)
    assert again.as_json() == rates.as_json()
    assert again.rate("p3") == rates.rate("p3") not in (None, 0.0, 1.0)


def test_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        SuccessRates(1.5)


def test_shuffled_takes_every_problem_once_an_epoch():
    source = Shuffled(problems(10), seed=1)
    drawn = [problem.id for step in range(1, 6) for problem in draw(source, step, 4, NEW)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(names(problems(10)))
    assert drawn[:10] != drawn[10:]
    assert names(draw(source, 3, 4, NEW)) == drawn[8:12], "a step does not depend on the steps before it"
    assert names(draw(Shuffled(problems(10), seed=2), 1, 4, NEW)) != drawn[:4]


def test_shuffled_draws_what_every_earlier_version_drew():
    """Position n is entry n mod N of a permutation seeded by (seed, "epoch", n div N)."""
    source, expected = Shuffled(problems(5), seed=3), []
    for position in range(4, 12):
        order = list(range(5))
        random.Random(sample_seed(3, "epoch", position // 5)).shuffle(order)
        expected.append(f"p{order[position % 5]}")
    assert names(draw(source, 2, 4, NEW) + draw(source, 3, 4, NEW)) == expected


def test_a_stream_goes_on_where_an_uneven_number_was_drawn():
    source = Shuffled(problems(10), seed=1)
    first_epoch = names(islice(source.stream(1, 0, NEW), 10))
    assert names(islice(source.stream(2, 7, NEW), 3)) == first_epoch[7:]


def test_curriculum_by_level_rises_and_then_stays_hard():
    levels = [3, 4, 5, 6, 7]
    source = Curriculum(problems(50, levels * 10), seed=0, switch_step=6)
    seen = [{problem.level for problem in draw(source, step, 10, NEW)} for step in range(1, 9)]
    assert seen[0] == {3}
    for step in range(2, 6):
        assert seen[step - 1] <= set(levels[:step]), step
    assert {problem.level for problem in islice(source.stream(5, 0, NEW), 30)} == set(levels), "all before the switch"
    assert seen[5] == seen[6] == seen[7] == {6, 7}
    assert names(draw(source, 6, 10, NEW)) != names(draw(source, 7, 10, NEW))
    assert names(draw(source, 7, 10, NEW)) == names(draw(source, 7, 10, NEW))


def test_curriculum_by_level_has_opened_all_levels_by_the_step_before_the_switch():
    # 5 levels in 2 steps: ceil(5 x 1 / 2) = 3, then 5
    source = Curriculum(problems(50, [3, 4, 5, 6, 7] * 10), seed=0, switch_step=3)
    assert {problem.level for problem in draw(source, 1, 30, NEW)} == {3, 4, 5}
    assert {problem.level for problem in draw(source, 2, 30, NEW)} == {3, 4, 5, 6, 7}


def test_curriculum_by_level_goes_on_with_the_nearest_levels():
    source = Curriculum(problems(5, [3, 4, 5, 6, 7]), seed=0, switch_step=5)
    assert [problem.level for problem in draw(source, 1, 5, NEW)][2:] == [5, 6, 7], "then the next easiest"
    hard = [problem.level for problem in draw(source, 5, 5, NEW)]
    assert set(hard[:2]) == {6, 7} and hard[2:] == [5, 4, 3], "then the next hardest"


def test_curriculum_by_rate_is_shuffled_and_then_takes_what_is_seldom_solved():
    rates = measured({"p0": 1.0, "p1": 0.9, "p2": 0.2, "p3": 0.0, "p4": 0.7})
    source = Curriculum(problems(6), seed=0, switch_step=3)
    for step in (1, 2):
        assert draw(source, step, 2, rates) == draw(Shuffled(problems(6), seed=0), step, 2, rates)
    drawn = names(draw(source, 3, 6, rates))
    assert set(drawn[:3]) == {"p2", "p3", "p5"}, "p5 was never sampled, so it is not known to be easy"
    assert drawn[3:] == ["p4", "p1", "p0"]


def test_curriculum_without_hard_problems_takes_the_least_easy():
    source = Curriculum(problems(3), seed=0, switch_step=2)
    assert names(draw(source, 2, 2, measured({"p0": 1.0, "p1": 0.8, "p2": 0.9}))) == ["p1", "p2"]


def test_equal_or_missing_levels_are_no_levels():
    rates = measured({"p0": 1.0, "p1": 0.1, "p2": 1.0})
    for levels in ([4, 4, 4], [4, None, 5]):
        assert names(draw(Curriculum(problems(3, levels), seed=0, switch_step=2), 2, 1, rates)) == ["p1"]


def test_prioritized_probabilities():
    # 1 - s = .1, .5, .9, 0; sum 1.5
    rates = measured({"p0": 0.9, "p1": 0.5, "p2": 0.1, "p3": 1.0})
    assert Prioritized(problems(4), 0, floor=0).probabilities(rates) == pytest.approx([1 / 15, 1 / 3, 0.6, 0])
    # with a floor of .2: .2, .5, .9, .2; sum 1.8
    floored = Prioritized(problems(4), 0, floor=0.2).probabilities(rates)
    assert floored == pytest.approx([0.2 / 1.8, 0.5 / 1.8, 0.9 / 1.8, 0.2 / 1.8])
    # p4 was never sampled: weight 1
    assert Prioritized(problems(5), 0, floor=0).probabilities(rates) == pytest.approx([0.04, 0.2, 0.36, 0, 0.4])


def test_prioritized_draws_with_those_probabilities_and_nothing_twice():
    rates = measured({"p0": 0.9, "p1": 0.5, "p2": 0.1, "p3": 1.0})
    source = Prioritized(problems(4), seed=5, floor=0)
    steps = [names(draw(source, step, 3, rates)) for step in range(1, 4001)]
    assert all(sorted(drawn) == ["p0", "p1", "p2"] for drawn in steps)
    first = Counter(drawn[0] for drawn in steps)
    # margins of 4 standard errors: sqrt(.6 x .4 / 4000) = .0077
    assert [first[f"p{i}"] / 4000 for i in range(3)] == pytest.approx([1 / 15, 1 / 3, 0.6], abs=0.031)
    # the second one from the rest: after p2, p1 comes before p0 in .5 / .6 of the cases
    after = Counter(drawn[1] for drawn in steps if drawn[0] == "p2")
    assert after["p1"] / after.total() == pytest.approx(5 / 6, abs=0.031)
    assert draw(source, 17, 3, rates) == draw(Prioritized(problems(4), seed=5, floor=0), 17, 3, rates)


def test_prioritized_takes_what_is_always_solved_last():
    rates = measured({"p0": 1.0, "p1": 0.1, "p2": 1.0})
    firsts = {names(draw(Prioritized(problems(3), seed, floor=0), 1, 3, rates))[0] for seed in range(20)}
    assert firsts == {"p1"}
    everything_solved = measured({"p0": 1.0, "p1": 1.0})
    assert Prioritized(problems(2), 0, floor=0).probabilities(everything_solved) == [0.5, 0.5]


@pytest.mark.parametrize("source", [Prioritized(problems(3), 0), Curriculum(problems(3), 0, switch_step=2)])
def test_a_stream_without_repetition_ends_when_all_problems_have_come(source):
    assert sorted(names(draw(source, 2, 9, NEW))) == ["p0", "p1", "p2"]


def test_what_makes_no_sense_is_refused():
    for make in (lambda: Shuffled([], 0), lambda: Curriculum([], 0, 2), lambda: Prioritized([], 0)):
        with pytest.raises(ValueError, match="no problems to draw from"):
            make()
    with pytest.raises(ValueError, match="switch_step must be at least 2, got 1"):
        Curriculum(problems(3), 0, switch_step=1)
    with pytest.raises(ValueError, match=r"floor must be in \[0, 1\], got -0.1"):
        Prioritized(problems(3), 0, floor=-0.1)
