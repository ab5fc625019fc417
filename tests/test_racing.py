"""Racing for the shortest right answer: the selection of the whole pool, for fewer tokens."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from long2short.racing import LOST, Playback, RaceResult, flawless, race_shortest, replay_race, select_raced, together
from long2short.shortest import select_shortest
from rl.judging import JudgeFailed
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.tasks import tiny
from rl.tasks.base import Attempt, Task, UndecidedLimit, one_by_one
from rl.tasks.tiny_models import make_tokenizer
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

RIGHT, WRONG = Verdict(Outcome.RIGHT), Verdict(Outcome.WRONG)
UNDECIDED = Verdict.undecided(JudgeFailure.TIMEOUT)


def rollout(tokens: int, verdict: Verdict = RIGHT, finish: str = "stop", text: str = "4</think>49") -> Rollout:
    ids = tuple(range(tokens))
    return Rollout(Completion(text, ids, tuple(-float(i) for i in ids), FinishReason(finish)), verdict)


def group(*rollouts: Rollout, name: str = "p1") -> RolloutGroup:
    return RolloutGroup(Problem(name, (TextPart("47*3+08"),), "49"), (3, 4), rollouts)


def ends(result: RaceResult) -> list[tuple[int, str]]:
    return [(r.num_tokens, r.completion.finish_reason.value) for g in result.groups for r in g.rollouts]


# --- replays: by hand, and against the selection of the whole pool ----------------------------------------------------


def test_a_right_answer_limits_the_others_and_a_tie_goes_to_the_lowest_index():
    samples = [rollout(40), rollout(25, WRONG), rollout(31), rollout(31), rollout(32)]
    # Sample 2 ends first. Sample 0 might have tied with it, and has drawn its 31; 3 ended in the same step.
    assert ends(replay_race([group(*samples)], samples=5)) == [
        (31, "aborted"), (25, "stop"), (31, "stop"), (31, "stop"), (31, "aborted"),
    ]  # fmt: skip
    # One after the other, each limit is known before the first token: 3 could only lose the tie, at 31.
    alone = replay_race([group(*samples)], samples=5, slots=1)
    assert ends(alone) == [(40, "stop"), (25, "stop"), (31, "stop"), (30, "aborted"), (30, "aborted")]
    assert alone.winners == (2,)
    # A lower index may tie, and then it wins; what starts when one token is too many is not started.
    tie = [rollout(31), rollout(31), rollout(1)]
    late = replay_race([group(*tie)], samples=3, slots=1, order=lambda expected, samples: [(0, 1), (0, 0), (0, 2)])
    assert ends(late) == [(31, "stop"), (31, "stop"), (1, "stop")]
    one = replay_race([group(rollout(1), rollout(2))], samples=2, slots=1)
    assert ends(one) == [(1, "stop"), (0, "aborted")]
    assert one.summary()["never_started"] == 1


def test_a_replay_counts_tokens_and_steps():
    raced = replay_race([group(rollout(40), rollout(25, WRONG), rollout(31), rollout(60, WRONG))], samples=4, slots=2)
    assert ends(raced) == [(40, "stop"), (25, "stop"), (31, "stop"), (30, "aborted")]
    assert (raced.winners, raced.tokens, raced.saved, raced.steps) == ((2,), 126, 30, 70)
    assert raced.summary() == {
        "problems": 1, "won": 1, "samples": 4, "stopped": 1, "never_started": 0, "tokens": 126, "tokens_saved": 30,
    }  # fmt: skip
    cut = raced.groups[0].rollouts[3].completion
    assert cut.token_ids == tuple(range(30))
    assert cut.sampler_logprobs[-1] == -29.0


def test_only_what_the_selection_takes_ends_a_race():
    refused = [
        rollout(5, WRONG),
        rollout(5, UNDECIDED),
        rollout(5, finish="length"),
        rollout(5, finish="repetition"),
        rollout(5, text="4</think>"),
        rollout(5, text="49"),
    ]
    for other in refused:
        assert ends(replay_race([group(other, rollout(40))], samples=2))[1] == (40, "stop")
    longer = group(rollout(5), rollout(40))
    assert ends(replay_race([longer], samples=2)) == [(5, "stop"), (5, "aborted")]
    assert replay_race([longer], samples=2, acceptable=flawless(min_tokens=6)).saved == 0
    assert replay_race([longer], samples=2, acceptable=flawless(prefilled=False)).saved == 0
    assert replay_race([longer], samples=2, acceptable=flawless(forbidden=["</think>4", "49"])).saved == 0
    # A rule that looks at nothing is still not asked about what nobody could judge.
    undecided = group(rollout(5, UNDECIDED), rollout(40))
    assert replay_race([undecided], samples=2, acceptable=lambda rollout: True).winners == (1,)


def random_group(rng: random.Random, name: str) -> RolloutGroup:
    """Short lengths, so that ties are common; one group in ten is all wrong."""
    hopeless = rng.random() < 0.1

    def draw() -> Rollout:
        verdict = rng.choice([WRONG, UNDECIDED] if hopeless else [RIGHT, RIGHT, WRONG, UNDECIDED])
        finish = rng.choice(["stop"] * 6 + ["length", "repetition"])
        text = rng.choice(["4</think>49"] * 6 + ["49", "4</think>"])
        return rollout(rng.randint(1, 12), verdict, finish, text)

    return group(*(draw() for _ in range(8)), name=name)


def one_of_each_first(expected: Sequence[float], samples: int) -> list[tuple[int, int]]:
    return [(position, sample) for sample in range(samples) for position in range(len(expected))]


def floor(group: RolloutGroup, acceptable: Callable[[Rollout], bool]) -> int:
    """The tokens that no exact method can do without: every sample up to where it could not win any more."""
    won = min(((r.num_tokens, i) for i, r in enumerate(group.rollouts) if acceptable(r)), default=None)
    if won is None:
        return sum(group.num_tokens)
    return sum(min(tokens, won[0] - (i > won[1])) for i, tokens in enumerate(group.num_tokens))


def test_a_race_selects_what_the_whole_pool_selects():
    rng = random.Random(0)
    seen = Counter()
    for trial in range(60):
        groups = [random_group(rng, f"p{trial}-{i}") for i in range(5)]
        min_tokens = rng.choice([0, 0, 4])
        acceptable = flawless(min_tokens)
        raced = replay_race(
            groups,
            slots=rng.choice([1, 2, 3, 8, 17, 40]),
            acceptable=acceptable,
            history={group.problem.id: rng.random() for group in groups[::2]},
            order=rng.choice([together, one_of_each_first, lambda e, n: rng.sample(together(e, n), n * len(e))]),
        )
        whole = select_shortest(groups, teacher="t", min_tokens=min_tokens)
        selection = select_raced(raced, "t", min_tokens=min_tokens)
        assert selection.traces == whole.traces
        assert selection.pool == whole.pool == 40
        for raced_group, group_, winner in zip(raced.groups, groups, raced.winners, strict=True):
            assert sum(raced_group.num_tokens) >= floor(group_, acceptable)
            stopped = [r.completion.finish_reason is FinishReason.ABORTED for r in raced_group.rollouts]
            seen += Counter(stopped=sum(stopped), ended=8 - sum(stopped), won=winner is not None)
            for now, then, cut in zip(raced_group.rollouts, group_.rollouts, stopped, strict=True):
                assert now.completion.token_ids == then.completion.token_ids[: now.num_tokens]
                assert cut or now == then
            if winner is None:
                assert not any(stopped)
        # Those that ended are counted as in the whole pool, the others were right, wrong or flawed, and not the best.
        assert selection.dropped.get(LOST, 0) == raced.summary()["stopped"]
        assert all(selection.dropped.get(reason, 0) <= n for reason, n in whole.dropped.items())
    assert min(seen["stopped"], seen["ended"], seen["won"], 300 - seen["won"]) > 20


def test_side_by_side_a_race_draws_hardly_more_than_it_must():
    rng = random.Random(1)
    groups = [random_group(rng, f"p{i}") for i in range(40)]
    raced = replay_race(groups, slots=8 * 40)
    for raced_group, group_, winner in zip(raced.groups, groups, raced.winners, strict=True):
        least = floor(group_, flawless())
        # Samples of a higher index run to the winner's length, when it ends: one token too many.
        assert least <= sum(raced_group.num_tokens) <= least + (0 if winner is None else 7 - winner)


def test_long_problems_start_first_and_unknown_ones_count_as_average():
    assert together([20, 30], 2) == [(1, 0), (1, 1), (0, 0), (0, 1)]
    assert together([0, 0], 1) == [(0, 0), (1, 0)]
    groups = [group(rollout(n, WRONG), name=str(n)) for n in (3, 5, 9)]
    asked = []
    history = {"3": 3.0, "9": 9.0}
    replay_race(groups, samples=1, history=history, order=lambda e, n: asked.append(list(e)) or together(e, n))
    assert asked == [[3.0, 6.0, 9.0]]
    # Two slots: 3 and 5, then 9 alone, 12 steps; with the long one first 9.
    assert replay_race(groups, samples=1, slots=2).steps == 12
    assert replay_race(groups, samples=1, slots=2, history=history).steps == 9


def test_playback_plays_what_was_recorded():
    groups = [group(rollout(3), rollout(2, WRONG)), group(rollout(4), rollout(1), name="p2")]
    playback = Playback(groups, samples=2, slots=2)
    places = list(playback.requests)
    drawn = playback.sample([playback.requests[place] for place in places], SamplingSettings())
    assert drawn == [groups[p].rollouts[i].completion for p, i in places]
    assert playback.steps == 6  # 3 2 | 4 from step 2, 1 from step 3
    with pytest.raises(ValueError, match="problem p1 has 2 samples, a race of 8 was asked for"):
        replay_race(groups)
    with pytest.raises(ValueError, match="slots and samples must be at least 1, got 0 and 2"):
        Playback(groups, samples=2, slots=0)
    with pytest.raises(ValueError, match="a replay cannot use problem p1: 1 of 1 samples were aborted"):
        replay_race([group(rollout(3, WRONG, "aborted"))], samples=1)


# --- the selection ----------------------------------------------------------------------------------------------------


def test_stopped_samples_are_counted_as_such():
    whole = group(rollout(40), rollout(31), rollout(5, WRONG), rollout(6, WRONG), *[rollout(50)] * 4)
    selection = select_raced(replay_race([whole], slots=1), "t")
    assert [trace.num_tokens for trace in selection.traces] == [31]
    assert dict(selection.dropped) == {LOST: 4, "wrong": 2, "longer than the shortest": 1}


def test_a_race_is_selected_by_the_rule_it_was_raced_with():
    raced = replay_race([group(rollout(5), rollout(40))], samples=2)
    with pytest.raises(ValueError, match=r"problem p1 was won by sample 0, which is refused here: too short.*flawless"):
        select_raced(raced, "t", min_tokens=6)


def test_there_is_no_majority_vote_in_a_race():
    raced = replay_race([group(rollout(5), rollout(40))], samples=2)
    with pytest.raises(ValueError, match="majority cannot be combined with racing"):
        select_raced(raced, "t", majority=tiny.answer_of)
    with pytest.raises(ValueError, match="majority cannot be combined with racing"):
        race(Scripted([4]), TASK, 1, majority=tiny.answer_of)


# --- live -------------------------------------------------------------------------------------------------------------

PROBLEMS = tiny.problems("train", 3)


class Scripted:
    """Completions of given lengths, one after the other, in the order of the requests; the text tells the length."""

    policy_version = 0

    def __init__(self, lengths: Sequence[int], after_all: Callable[[], object] = lambda: None) -> None:
        self.lengths, self.after_all = lengths, after_all
        self.requests: list[SampleRequest] = []
        self.given: list[int] = []
        self.closed = False

    def sample(self, requests, settings, report=lambda finished: None) -> list[Completion]:
        raise AssertionError("a race streams")

    def stream(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, limits: list[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        assert limits is not None
        self.requests = list(requests)
        try:
            for index, length in zip(range(len(requests)), self.lengths, strict=True):
                drawn = min(length, limits[index])
                finish = FinishReason.STOP if drawn == length else FinishReason.ABORTED
                self.given.append(drawn)
                yield index, Completion(f"4</think>{length}", (7,) * drawn, (0.0,) * drawn, finish)
            self.after_all()
        finally:
            self.closed = True


def verdict_by_length(problem: Problem, completion: Completion) -> Verdict:
    """Even lengths are right, those that 5 divides undecided."""
    length = int(completion.text.partition("</think>")[2])
    if length % 5 == 0:
        return UNDECIDED
    return RIGHT if length % 2 == 0 else WRONG


TASK = replace(tiny.TASK, judge=one_by_one(verdict_by_length))


def race(sampler, task: Task, samples: int, problems=PROBLEMS[:1], patience=60.0, **options) -> RaceResult:
    """With more patience than a busy machine could use up, so that each verdict is there in time."""
    settings = SamplingSettings(max_tokens=64)
    tokenizer = make_tokenizer()
    return race_shortest(sampler, tokenizer, problems, task, samples, settings, 7, patience=patience, **options)


def test_a_live_race_asks_for_the_samples_of_a_pool():
    sampler = Scripted([9, 8, 12, 6, 6, 7, *[3, 3, 3, 3, 4, 5]])
    finished = []
    raced = race(sampler, TASK, 6, PROBLEMS[:2], report=finished.append)
    assert [request.seed for request in sampler.requests] == [
        sample_seed(7, problem.id, i) for problem in PROBLEMS[:2] for i in range(6)
    ]
    assert sampler.given == [9, 8, 7, 6, 5, 5, *[3, 3, 3, 3, 4, 3]]
    assert finished == list(range(1, 13))
    assert raced.winners == (3, 4)
    assert [group.problem for group in raced.groups] == PROBLEMS[:2]
    assert [r.verdict.outcome.value for r in raced.groups[0].rollouts] == [
        "wrong", "right", "wrong", "right", "wrong", "wrong",
    ]  # fmt: skip
    assert "not judged" in raced.groups[0].rollouts[2].verdict.reason
    assert raced.summary()["tokens_saved"] is None


def test_the_live_race_on_a_model_selects_what_the_pool_selects(tiny_model_folder: Path):
    from rl.policy import load_model, load_tokenizer
    from rl.rollout import sample_groups
    from rl.samplers.transformers import TransformersSampler

    def by_first_token(problem: Problem, completion: Completion) -> Verdict:
        return RIGHT if completion.token_ids[0] % 2 else WRONG

    def acceptable(rollout: Rollout) -> bool:
        return rollout.right and rollout.completion.finish_reason is FinishReason.STOP

    def shortest(group: RolloutGroup) -> int | None:
        found = [(r.num_tokens, i) for i, r in enumerate(group.rollouts) if acceptable(r)]
        return min(found)[1] if found else None

    task = replace(tiny.TASK, judge=one_by_one(by_first_token))
    tokenizer = load_tokenizer(tiny_model_folder)
    sampler = TransformersSampler(load_model(tiny_model_folder), tokenizer, batch_size=12)
    problems, settings = tiny.problems("train", 8), SamplingSettings(max_tokens=48)
    whole = sample_groups(sampler, tokenizer, problems, task, 8, settings, 3)
    raced = race_shortest(sampler, tokenizer, problems, task, 8, settings, 3, acceptable=acceptable, patience=60)
    assert list(raced.winners) == [shortest(group) for group in whole]
    assert sum(winner is not None for winner in raced.winners) > 4
    assert raced.tokens < 0.9 * sum(sum(group.num_tokens) for group in whole)
    for raced_group, group_ in zip(raced.groups, whole, strict=True):
        for now, then in zip(raced_group.rollouts, group_.rollouts, strict=True):
            assert now.completion.token_ids == then.completion.token_ids[: now.num_tokens]


def test_a_slow_judge_does_not_hold_the_engine_up():
    drawn, calls = threading.Event(), []

    def slow(attempts: Sequence[Attempt]) -> list[Verdict]:
        calls.append(len(attempts))
        assert drawn.wait(30)
        return [verdict_by_length(*attempt) for attempt in attempts]

    for patience in (0.0, 0.05):
        drawn.clear()
        calls.clear()
        sampler = Scripted([9, 8, 12, 6, 7], after_all=drawn.set)
        raced = race(sampler, replace(TASK, judge=slow), 5, patience=patience)
        assert calls == [1, 4]  # what ended during the first call is judged together
        assert sampler.given == [9, 8, 12, 6, 7]  # no limit came in time
        assert raced.winners == (3,)


def test_a_verdict_that_comes_late_still_limits_what_is_left():
    gate = threading.Event()

    def slow(attempts: Sequence[Attempt]) -> list[Verdict]:
        assert gate.wait(30)
        return [verdict_by_length(*attempt) for attempt in attempts]

    class Waits(Scripted):
        """Short wrong ones until the limits are lowered, up to two seconds; the verdict needs a millisecond."""

        def stream(self, requests, settings, limits=None):
            assert limits is not None
            for index, completion in super().stream(requests, settings, limits):
                if index == 3:
                    gate.set()
                if index > 3 and limits[-1] == 64:
                    time.sleep(0.01)
                yield index, completion

    sampler = Waits([8, 9, 11, *[7] * 200, 20])
    raced = race(sampler, replace(TASK, judge=slow), 204, patience=0.0)
    assert sampler.given[:3] == [8, 9, 11]
    assert sampler.given[-1] == 7
    assert raced.winners == (0,)


# --- judges that fail -------------------------------------------------------------------------------------------------


def test_a_few_undecided_verdicts_are_no_reason_to_stop():
    raced = race(Scripted([5, 10, 9, 8, 7]), TASK, 5)
    assert raced.winners == (3,)
    assert ends(raced)[:2] == [(5, "stop"), (10, "stop")]


def test_a_judge_that_is_down_stops_the_race_as_soon_as_it_is_certain():
    sampler = Scripted([5] * 30)
    with pytest.raises(JudgeFailed, match=r"could not decide 8 of 8 completions \(8 timeout\)"):
        race(sampler, TASK, 10, PROBLEMS)
    assert len(sampler.given) == 8
    assert sampler.closed


def test_the_limit_holds_for_the_whole_race():
    # 1 of 10 may be undecided; but only 4 are judged, since 8 is right and the others are stopped.
    task = replace(TASK, limit=UndecidedLimit(share=0.2, least=1))
    with pytest.raises(JudgeFailed, match="could not decide 1 of 4 completions"):
        race(Scripted([5, 9, 9, 8, 20, 20, 20, 20, 20, 20]), task, 10)
    assert race(Scripted([5, 9, 9, 9, 8, 20, 20, 20, 20, 20]), task, 10).winners == (4,)
    with pytest.raises(JudgeFailed, match="could not decide 4 of 4"):
        race(Scripted([5] * 4), TASK, 4)


def test_what_the_judge_raises_ends_the_race():
    def broken(attempts: Sequence[Attempt]) -> list[Verdict]:
        raise OSError("the endpoint is gone")

    sampler = Scripted([5, 6])
    with pytest.raises(OSError, match="the endpoint is gone"):
        race(sampler, replace(TASK, judge=broken), 2)
    assert sampler.closed
    with pytest.raises(RuntimeError, match="1 completions were judged and got 0 verdicts"):
        race(Scripted([5, 6]), replace(TASK, judge=lambda attempts: []), 2)


# --- samplers that break the protocol ---------------------------------------------------------------------------------


def test_a_sampler_that_stops_a_sample_by_itself_is_refused():
    class Dies(Scripted):
        def stream(self, requests, settings, limits=None):
            for index, completion in super().stream(requests, settings, limits):
                yield index, replace(completion, finish_reason=FinishReason.ABORTED) if index == 1 else completion

    with pytest.raises(RuntimeError, match="stopped sample 1 of problem tiny-.* after 9 tokens, but it was allowed 64"):
        race(Dies([7, 9, 8]), TASK, 3)
    with pytest.raises(RuntimeError, match="after 9 tokens, but it was allowed 11"):
        race(Dies([12, 9, 8]), TASK, 3)


def test_a_sampler_that_leaves_one_out_is_refused():
    class Forgets(Scripted):
        def stream(self, requests, settings, limits=None):
            yield from list(super().stream(requests, settings, limits))[:-1]

    with pytest.raises(RuntimeError, match="gave 2 completions for 3 requests"):
        race(Forgets([7, 9, 8]), TASK, 3)
