"""Partial rollouts: stitched completions are those drawn in one go, groups close whole, short ones get no favour."""

import json
import math
import random
from dataclasses import replace

import pytest

from rl.partial import PartialRollouts, staleness
from rl.policy import load_model, load_tokenizer
from rl.refusal import StepRefused
from rl.rollout import sample_groups
from rl.rows import training_rows
from rl.samplers.base import SamplingSettings, sample_seed
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.tasks.base import Task, one_by_one
from rl.tasks.tiny_models import make_tokenizer
from rl.types import Completion, FinishReason, Outcome, Problem, Segment, TextPart, Verdict

TOKENIZER = make_tokenizer()
EOS = TOKENIZER.get_vocab()[str(TOKENIZER.eos_token)]
TASK = Task("any", one_by_one(lambda problem, completion: Verdict(Outcome.RIGHT)), lambda text: None, "1", ())


class ScriptedSampler:
    """Token t of a completion and the length at which it stops are functions of its seed, as the protocol promises.

    `length_of(seed)` counts the EOS token. Log-probs also tell the policy version that drew them.
    """

    def __init__(self, length_of, version=0):
        self.length_of, self.policy_version = length_of, version
        self.requests, self.loops = [], set()

    def sample(self, requests, settings, report=lambda finished: None):
        self.requests.append(list(requests))
        return [self.complete(request, request.budget(settings)) for request in requests]

    def complete(self, request, budget):
        start, length = len(request.prefix), self.length_of(request.seed)
        end = min(start + budget, length)
        ids = [5 + sample_seed(request.seed, t) % 20 for t in range(start, end)]
        reason = FinishReason.LENGTH
        if end == length:
            reason = FinishReason.REPETITION if request.seed in self.loops else FinishReason.STOP
            ids[-1] = EOS if reason is FinishReason.STOP else ids[-1]
        logprobs = [-(t + 1) / 3 - self.policy_version for t in range(start, end)]
        return Completion("", tuple(ids), tuple(logprobs), reason, self.policy_version)


def problems(*names):
    return [Problem(name, (TextPart("1+2"), TextPart("*3")), "9", "made", 2) for name in names]


def lengths(table, samples=2, seed=0):
    """`length_of` for sample i of problem p started with this seed: `{"p": (4, 9)}`."""
    by_seed = {sample_seed(seed, name, i): table[name][i] for name in table for i in range(samples)}
    return by_seed.__getitem__


def advance(rollouts, sampler, new=(), samples=2, max_tokens=20, seed=0):
    return rollouts.advance(sampler, TOKENIZER, new, TASK, samples, SamplingSettings(max_tokens=max_tokens), seed)


def test_a_group_closes_when_its_last_completion_has_ended():
    sampler = ScriptedSampler(lengths({"p": (4, 9), "q": (2, 3)}))
    rollouts = PartialRollouts(budget=4)
    closed = advance(rollouts, sampler, problems("p", "q"))
    assert [group.problem.id for group in closed] == ["q"]
    sampler.policy_version = 1
    assert advance(rollouts, sampler) == []
    sampler.policy_version = 3
    (group,) = advance(rollouts, sampler)
    assert group.problem.id == "p" and group.num_tokens == [4, 9] and rollouts.groups == ()

    first, second = (rollout.completion for rollout in group.rollouts)
    assert first.segments == (Segment(4, 0),) and first.policy_version == 0
    assert second.segments == (Segment(4, 0), Segment(4, 1), Segment(1, 3)) and second.policy_version == 3
    # each token keeps the log-prob of the version that drew it
    versions = [0] * 4 + [1] * 4 + [3]
    assert second.sampler_logprobs == tuple(-(t + 1) / 3 - version for t, version in enumerate(versions))
    assert second.finish_reason is FinishReason.STOP and second.token_ids[-1] == EOS
    assert second.text == TOKENIZER.decode(list(second.token_ids[:-1])) and all(second.trained)

    # after the first iteration only the unfinished one is asked for, with what it has and no more than the budget
    asked = [[(request.prefix, request.max_tokens) for request in requests] for requests in sampler.requests]
    assert asked[0] == [((), 4)] * 4
    assert asked[1:] == [[(second.token_ids[:4], 4)], [(second.token_ids[:8], 4)]]


@pytest.mark.parametrize("budget", [1, 3, 7, 20, 99])
def test_stitched_completions_are_those_drawn_in_one_go(budget):
    generator = random.Random(budget)
    table = {f"p{i}": tuple(generator.randint(1, 30) for _ in range(3)) for i in range(12)}
    sampler = ScriptedSampler(lengths(table, samples=3))
    sampler.loops = {sample_seed(0, "p1", 0), sample_seed(0, "p2", 2)}
    settings = SamplingSettings(max_tokens=20)
    new = problems(*table)
    whole = sample_groups(sampler, TOKENIZER, new, TASK, 3, settings, seed=0)
    assert {r.completion.finish_reason for g in whole for r in g.rollouts} == {
        FinishReason.STOP, FinishReason.LENGTH, FinishReason.REPETITION,
    }  # fmt: skip

    rollouts, closed = PartialRollouts(budget), []
    for iteration in range(math.ceil(20 / budget)):
        closed += advance(rollouts, sampler, new if iteration == 0 else (), samples=3)
    assert rollouts.groups == ()
    by_id = {group.problem.id: group for group in closed}
    for group in whole:
        assert by_id[group.problem.id].prompt_ids == group.prompt_ids
        for one, stitched in zip(group.rollouts, by_id[group.problem.id].rollouts, strict=True):
            assert replace(stitched.completion, segments=(), text="") == one.completion
            assert stitched.verdict == one.verdict


def test_old_segments_can_be_left_out_of_the_loss_and_of_nothing_else():
    sampler = ScriptedSampler(lengths({"p": (4, 9)}))
    rollouts = PartialRollouts(budget=6, train_old_segments=False)
    assert advance(rollouts, sampler, problems("p")) == []
    sampler.policy_version = 1
    (group,) = advance(rollouts, sampler)
    first, second = (rollout.completion for rollout in group.rollouts)
    assert first.trained == (False,) * 4
    assert second.segments == (Segment(6, 0, trained=False), Segment(3, 1))
    assert group.num_tokens == [4, 9], "lengths are those of the whole completions"
    assert staleness([group], 1) == {"stale_versions_mean": 0, "stale_versions_max": 0}
    rows, counted = training_rows([group], [[0.5, -0.5]])
    assert counted == [0, 3] and [row.num_trained for row in rows] == [3]

    on_policy = PartialRollouts(budget=20, train_old_segments=False)
    sampler.policy_version = 5
    (fresh,) = advance(on_policy, sampler, problems("p"))
    assert all(all(rollout.completion.trained) for rollout in fresh.rollouts), "what was drawn just now is never old"


def test_a_group_keeps_its_limit_when_the_schedule_moves():
    table = {"down": (4, 15), "up": (4, 15)}
    rollouts = PartialRollouts(budget=6)
    assert advance(rollouts, ScriptedSampler(lengths(table)), problems("down"), max_tokens=10) == []
    assert advance(rollouts, ScriptedSampler(lengths(table)), problems("up"), max_tokens=12)[0].num_tokens == [4, 10]
    (group,) = advance(rollouts, ScriptedSampler(lengths(table)), max_tokens=5)
    assert group.problem.id == "up" and group.num_tokens == [4, 12]
    assert group.rollouts[1].completion.finish_reason is FinishReason.LENGTH


def test_a_completion_that_the_engine_cuts_itself_has_ended():
    sampler = ScriptedSampler(lengths({"p": (9, 9)}))
    complete = sampler.complete
    sampler.complete = lambda request, budget: complete(request, min(budget, 3))
    (group,) = advance(PartialRollouts(budget=6), sampler, problems("p"))
    assert group.num_tokens == [3, 3]
    assert {rollout.completion.finish_reason for rollout in group.rollouts} == {FinishReason.LENGTH}


def test_json_in_the_middle_of_a_rollout_goes_on_identically():
    table = {f"p{i}": (3 + 2 * i, 17 - i) for i in range(8)}
    sampler = ScriptedSampler(lengths(table))
    rollouts = PartialRollouts(budget=4, train_old_segments=False)
    for step in range(2):
        sampler.policy_version = step
        advance(rollouts, sampler, problems(f"p{2 * step}", f"p{2 * step + 1}"))
    assert any(sample.finish_reason for group in rollouts.groups for sample in group.samples), "some have ended"
    again = PartialRollouts.from_json(json.loads(json.dumps(rollouts.as_json(), sort_keys=True, allow_nan=False)))
    assert again.groups == rollouts.groups and again.as_json() == rollouts.as_json()
    later = []
    for run in (rollouts, again):
        closed = []
        for step in range(2, 8):
            sampler.policy_version = step
            new = problems(f"p{2 * step}", f"p{2 * step + 1}") if step < 4 else ()
            closed.append(advance(run, sampler, new))
        later.append(closed)
    assert later[0] == later[1] and sum(map(len, later[0])) == 8 and rollouts.groups == ()


def test_a_log_prob_that_is_not_finite_is_refused_and_changes_nothing():
    sampler = ScriptedSampler(lengths({"p": (4, 9), "q": (9, 9)}))
    rollouts = PartialRollouts(budget=4)
    advance(rollouts, sampler, problems("p"))
    before = rollouts.groups
    complete = sampler.complete

    def broken(request, budget):
        completion = complete(request, budget)
        return replace(completion, sampler_logprobs=(math.nan,) * completion.num_tokens)

    sampler.complete = broken
    with pytest.raises(StepRefused, match="a sampler log-prob is not finite.* problems p, q"):
        advance(rollouts, sampler, problems("q"))
    assert rollouts.groups == before


def test_staleness_is_in_versions_per_trained_token():
    sampler = ScriptedSampler(lengths({"p": (4, 9)}), version=7)
    rollouts = PartialRollouts(budget=8)
    assert advance(rollouts, sampler, problems("p")) == []
    assert rollouts.metrics() == {"open_groups": 1, "open_completions": 1, "open_tokens": 12}
    sampler.policy_version = 9
    closed = advance(rollouts, sampler)
    # 4 and 8 tokens of age 2, 1 token of age 0: 24 / 13
    assert staleness(closed, 9) == {"stale_versions_mean": pytest.approx(24 / 13), "stale_versions_max": 2}
    assert staleness([], 9) == {"stale_versions_mean": 0, "stale_versions_max": 0}
    assert rollouts.metrics() == {"open_groups": 0, "open_completions": 0, "open_tokens": 0}


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="budget must be at least 1 token per iteration, got 0"):
        PartialRollouts(budget=0)


# Short problems take 5 tokens, long ones 38: one iteration or four of 10 tokens. Half of the problems are long.
def is_long(problem):
    return problem.id.startswith("long")


def mixture(count, seed):
    generator = random.Random(seed)
    return problems(*(f"{generator.choice(('short', 'long'))}{seed}-{i}" for i in range(count)))


def mixture_lengths(seeds, count=16, samples=2):
    return {
        sample_seed(seed, problem.id, i): 38 if is_long(problem) else 5
        for seed in seeds
        for problem in mixture(count, seed)
        for i in range(samples)
    }.__getitem__


def test_filling_a_batch_with_what_finishes_first_favours_short_completions():
    """The naive way: more groups are started than are needed, the first to finish are trained on, the rest is lost."""
    sampler = ScriptedSampler(mixture_lengths(range(60)))
    trained = []
    for step in range(60):
        groups = sample_groups(
            sampler, TOKENIZER, mixture(16, step), TASK, 2, SamplingSettings(max_tokens=40), seed=step
        )
        trained += sorted(groups, key=lambda group: max(group.num_tokens))[:8]
    assert sum(is_long(group.problem) for group in trained) / len(trained) < 0.35


def test_partial_rollouts_train_on_every_started_group_once_and_on_long_ones_as_often_as_drawn():
    sampler = ScriptedSampler(mixture_lengths(range(60), count=8))
    rollouts, closed, started = PartialRollouts(budget=10), [], []
    for step in range(60):
        new = mixture(8, step)
        started.append([problem.id for problem in new])
        closed.append(advance(rollouts, sampler, new, max_tokens=40, seed=step))
    steady = [group for groups in closed[5:] for group in groups]
    share = sum(is_long(group.problem) for group in steady) / len(steady)
    assert share == pytest.approx(0.5, abs=0.06), "of 440 draws: standard error .024"
    assert len(steady) / 55 == pytest.approx(8, abs=0.1), "as many close as are started"
    trained = [group.problem.id for groups in closed for group in groups]
    still_open = [group.problem.id for group in rollouts.groups]
    assert sorted(trained + still_open) == sorted(name for names in started for name in names)
    assert set(still_open) <= {name for names in started[-3:] for name in names}, "none is older than four iterations"


def test_with_the_transformers_sampler_the_budget_changes_nothing_but_the_time(tiny_model_folder):
    sampler = TransformersSampler(load_model(tiny_model_folder), load_tokenizer(tiny_model_folder), batch_size=16)
    settings = SamplingSettings(max_tokens=24)
    new = tiny.problems("train", 4)
    whole = sample_groups(sampler, sampler.tokenizer, new, tiny.TASK, 3, settings, seed=1)
    assert {r.completion.finish_reason for g in whole for r in g.rollouts} == {FinishReason.STOP, FinishReason.LENGTH}
    rollouts, closed = PartialRollouts(budget=7), []
    for iteration in range(4):
        closed += rollouts.advance(
            sampler, sampler.tokenizer, new if iteration == 0 else (), tiny.TASK, 3, settings, seed=1
        )
    stitched = {group.problem.id: group for group in closed}
    assert len(stitched) == 4 and max(len(r.completion.segments) for g in closed for r in g.rollouts) == 4
    for group in whole:
        for one, other in zip(group.rollouts, stitched[group.problem.id].rollouts, strict=True):
            assert replace(other, completion=one.completion) == one
            left, right = one.completion, other.completion
            assert (right.text, right.token_ids, right.finish_reason) == (
                left.text, left.token_ids, left.finish_reason,
            )  # fmt: skip
            assert right.sampler_logprobs == pytest.approx(left.sampler_logprobs, abs=1e-5)
