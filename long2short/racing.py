"""Shortest rejection sampling by racing: a sample that can no longer be the shortest right one is stopped.

Kimi k1.5 (arXiv 2501.12599, section 2.4) samples a question n = 8 times and keeps the shortest right answer. The paper
draws all n to their end. Here, as soon as one right answer of L tokens has ended, the other samples of its problem are
limited to what could still beat it: L tokens for those with a lower sample index (ties go to the lowest index), L - 1
for those with a higher one. The selection is the same, sample for sample, and what could not change it is not drawn.

Why it is exact: let sample w with W tokens be what the whole pool would give. Only a right answer that is longer, or as
long with a higher index, can have lowered w's limit before w ends, and neither lowers it below W. So w is never cut,
and nothing that ends beats it.

No exact method draws less than every sample up to the winner's length, and samples of a problem that run side by side
draw hardly more, so they are started together (`together`). Whoever starts one sample of every problem first lets all
of these run to their end, which may be long and wrong.

Samples that were stopped have finish reason `aborted` and a length that says nothing, so everything but `select_raced`
refuses their groups (`RolloutGroup.require_complete`). For the same reason there is no majority vote in a race.

`Playback` is a sampler that plays a recorded pool: `replay_race` shows what a race would have drawn, without a model.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distill.traces import TraceSelection, counts, flaw
from long2short.shortest import AnswerOf, select_shortest
from rl.judging import judge_attempts
from rl.prompts import render_prompt
from rl.samplers.base import SampleRequest, SamplingSettings, StreamingSampler, gather, sample_seed
from rl.tasks.base import Attempt, Task, UndecidedLimit
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Place = tuple[int, int]  # (position of the problem, sample index)
Order = Callable[[Sequence[float], int], list[Place]]  # expected tokens of each problem, samples -> who starts when
LOST = "lost the race"  # the reason under which `select_raced` counts the samples that were stopped

# How long the engine may wait for verdicts: so many seconds in all, and this share of the race beyond them.
PATIENCE_SECONDS = 1.0
PATIENCE_SHARE = 0.05
# A judge whose last call was quicker is called in the engine's thread: to wake another one can cost more than that.
QUICK_SECONDS = 0.01

STOPPED = Verdict(Outcome.WRONG, "stopped and not judged: a right answer of this problem was at least as short")


def flawless(min_tokens: int = 0, prefilled: bool = True, forbidden: Collection[str] = ()) -> Callable[[Rollout], bool]:
    """The rule for what may end a race: exactly what `select_shortest` would take, given the same arguments."""
    return lambda rollout: flaw(rollout, min_tokens, prefilled, forbidden) is None


def together(expected: Sequence[float], samples: int) -> list[Place]:
    """All samples of a problem at once; the problems that are expected to be long first (ties in their order).

    The order of the problems does not change the tokens, but the time: long ones that start last run on alone (list
    scheduling by longest processing time: Graham, SIAM J. Appl. Math. 17, 1969).

    `together([20, 30], 2) == [(1, 0), (1, 1), (0, 0), (0, 1)]`
    """
    order = sorted(range(len(expected)), key=lambda position: -expected[position])
    return [(position, sample) for position in order for sample in range(samples)]


@dataclass(frozen=True, slots=True)
class RaceResult:
    """Raced groups in the order of the problems, their samples in order.

    Example: samples of 40 (right), 25 (wrong), 31 tokens (right) and one stopped after 30: winner 2, 126 tokens.
    """

    groups: tuple[RolloutGroup, ...]
    winners: tuple[int | None, ...]  # the sample that won each group
    saved: int | None = None  # tokens that were not drawn; only a replay knows how long they would have been
    steps: int | None = None  # decoding steps, each one token a slot; of a replay

    @property
    def tokens(self) -> int:
        """How many were drawn."""
        return sum(sum(group.num_tokens) for group in self.groups)

    def summary(self) -> dict[str, Any]:
        """For summary.json: problems and those with a winner, samples by how the race took them, tokens."""
        completions = [rollout.completion for group in self.groups for rollout in group.rollouts]
        stopped = [c for c in completions if c.finish_reason is FinishReason.ABORTED]
        return {
            "problems": len(self.groups),
            "won": sum(winner is not None for winner in self.winners),
            "samples": len(completions),
            "stopped": len(stopped),
            "never_started": sum(c.num_tokens == 0 for c in stopped),
            "tokens": self.tokens,
            "tokens_saved": self.saved,
        }


def race_shortest(
    sampler: StreamingSampler,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    task: Task,
    samples: int,
    settings: SamplingSettings,
    seed: int,
    suffix: str = "",
    *,
    acceptable: Callable[[Rollout], bool] | None = None,
    history: Mapping[str, float] | None = None,
    order: Order = together,
    majority: AnswerOf | None = None,
    patience: float = PATIENCE_SECONDS,
    report: Callable[[int], None] = lambda finished: None,
) -> RaceResult:
    """k = `samples` completions of every problem, drawn until none that is left can be the shortest right one.

    Sample i of a problem has the seed of `rl.rollout.sample_groups` and `rl.pool.fill_pool`, so what ends is what they
    would have drawn (but for the rounding of other batches, see rl/samplers/transformers.py).

    `acceptable` says which decided rollout may end a race; None is `flawless()`. An undecided one never does.
    `history` has the tokens to expect by problem id, say the mean of an earlier pool; it saves time, not tokens
    (`together`). A problem that it lacks is taken for an average one.

    Completions are judged while the engine goes on, in a thread, all that have ended since the last call together. The
    engine waits for them for `patience` seconds in all and 5 % of the race: with a quick judge, which never uses that
    up, each verdict is there before the next token is drawn; a slow one costs little, only the limits come later.

    Errors: JudgeFailed as soon as more completions of the race are undecided than the task's limit allows;
    RuntimeError for a sampler that stops a sample by itself; ValueError for `majority`, see `refuse_majority`.
    """
    refuse_majority(majority)
    prompts = [render_prompt(tokenizer, problem, suffix) for problem in problems]
    requests = {
        (position, sample): SampleRequest(prompts[position], sample_seed(seed, problem.id, sample))
        for position, problem in enumerate(problems)
        for sample in range(samples)
    }
    judge = _LimitedJudge(task, problems, len(requests))
    race = _Race(problems, order(_expected(problems, history), samples), settings.max_tokens, acceptable or flawless())
    rollouts = race.run(sampler, requests, settings, judge, patience, report)
    judge.hold_to_limit()
    groups = [RolloutGroup(problem, prompt) for problem, prompt in zip(problems, prompts, strict=True)]
    return _result(groups, samples, rollouts, race)


def select_raced(
    result: RaceResult,
    teacher: str,
    *,
    majority: AnswerOf | None = None,
    min_tokens: int = 0,
    prefilled: bool = True,
    forbidden: Collection[str] = (),
) -> TraceSelection:
    """The traces of `select_shortest` on the whole pool; samples that were stopped are counted as "lost the race".

    Example: a group of 8 with 40 tokens right, 31 right, 2 wrong and 4 stopped gives one trace and
    `{"lost the race": 4, "wrong": 2, "longer than the shortest": 1}`.

    Errors: ValueError for a race that was won by what this selection refuses (then a sample that was stopped for it may
    have been the shortest), and for `majority`.
    """
    refuse_majority(majority)
    for group, winner in zip(result.groups, result.winners, strict=True):
        reason = None if winner is None else flaw(group.rollouts[winner], min_tokens, prefilled, forbidden)
        if reason is not None:
            raise ValueError(
                f"the race of problem {group.problem.id} was won by sample {winner}, which is refused here: {reason}. "
                f"Race with acceptable=flawless({min_tokens}, {prefilled}, ...), so that it cannot win"
            )
    samples = max((len(group.rollouts) for group in result.groups), default=1)
    selection = select_shortest(
        result.groups,
        teacher=teacher,
        samples=samples,
        min_tokens=min_tokens,
        prefilled=prefilled,
        forbidden=forbidden,
    )
    dropped = Counter({LOST if reason == "aborted" else reason: n for reason, n in selection.dropped.items()})
    return TraceSelection(selection.traces, counts(dropped))


def refuse_majority(majority: AnswerOf | None) -> None:
    """ValueError if there is a majority vote: it counts the answers of all samples, and stopped ones have none."""
    if majority is not None:
        raise ValueError(
            "majority cannot be combined with racing: the vote counts the answers of all samples, and a race stops "
            "those that are too long to win before they have given theirs; leave out one of the two"
        )


def replay_race(
    groups: Sequence[RolloutGroup],
    *,
    samples: int = 8,
    slots: int = 256,
    acceptable: Callable[[Rollout], bool] | None = None,
    history: Mapping[str, float] | None = None,
    order: Order = together,
) -> RaceResult:
    """The race over the first `samples` completions of a recorded, complete pool, on an engine with so many slots.

    No model and no judge: completions and verdicts are the recorded ones, and every verdict is there at once.

    Example: 40 tokens right, 25 wrong, 31 right and 60 wrong in 2 slots: when the third ends, the fourth has drawn 16
    tokens and may draw 30. 126 tokens drawn, 30 saved, 70 steps.
    """
    playback = Playback(groups, samples, slots)
    settings = SamplingSettings(max_tokens=1 + max((c.num_tokens for c in playback.recorded.values()), default=0))
    problems = [group.problem for group in groups]
    race = _Race(problems, order(_expected(problems, history), samples), settings.max_tokens, acceptable or flawless())

    def judge(ended: Sequence[tuple[Place, Completion]]) -> list[Verdict]:
        return [groups[position].rollouts[sample].verdict for (position, sample), _ in ended]

    rollouts = race.run(playback, playback.requests, settings, judge, math.inf, lambda finished: None)
    result = _result(groups, samples, rollouts, race)
    all_tokens = sum(completion.num_tokens for completion in playback.recorded.values())
    return replace(result, saved=all_tokens - result.tokens, steps=playback.steps)


class Playback:
    """A `StreamingSampler` that plays back recorded completions: one token a slot and step, free slots filled at once.

    `requests` holds the request that stands for each completion; they may be asked for in any order. `steps` counts
    the decoding steps. A completion that is cut has no text, since there is no tokenizer here.
    """

    def __init__(self, groups: Sequence[RolloutGroup], samples: int, slots: int) -> None:
        if slots < 1 or samples < 1:
            raise ValueError(f"slots and samples must be at least 1, got {slots} and {samples}")
        self.policy_version = 0
        self.slots = slots
        self.steps = 0
        self.requests: dict[Place, SampleRequest] = {}
        self.recorded: dict[int, Completion] = {}  # by the seed of the request
        for position, group in enumerate(groups):
            group.require_complete("a replay")
            if len(group.rollouts) < samples:
                raise ValueError(
                    f"problem {group.problem.id} has {len(group.rollouts)} samples, a race of {samples} was asked for"
                )
            for sample in range(samples):
                seed = sample_seed("playback", position, sample)
                self.requests[position, sample] = SampleRequest(group.prompt_ids, seed)
                self.recorded[seed] = group.rollouts[sample].completion

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """The recorded completions, in order."""
        return gather(self.stream(requests, settings), len(requests), report)

    def stream(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, limits: list[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they end. The settings change nothing, they have done their work."""
        whole = [self.recorded[request.seed] for request in requests]
        queue, begun = deque(range(len(requests))), dict[int, int]()  # request -> the step before its first token
        now = 0

        def end(index: int) -> int:
            length = whole[index].num_tokens
            return begun[index] + (length if limits is None else min(length, limits[index]))

        while queue or begun:
            while queue and len(begun) < self.slots:
                begun[queue.popleft()] = now
            index = min(begun, key=end)
            # A limit that was lowered below what is drawn ends the request now, with what it has.
            self.steps, now = self.steps + max(end(index) - now, 0), max(end(index), now)
            drawn = now - begun.pop(index)
            yield index, whole[index] if drawn == whole[index].num_tokens else _cut(whole[index], drawn)


def _cut(completion: Completion, drawn: int) -> Completion:
    ids, logprobs = completion.token_ids[:drawn], completion.sampler_logprobs[:drawn]
    return Completion("", ids, logprobs, FinishReason.ABORTED, completion.policy_version)


class _Race:
    """Who has ended, who leads each problem, and how far the others may go."""

    def __init__(
        self,
        problems: Sequence[Problem],
        order: list[Place],
        max_tokens: int,
        acceptable: Callable[[Rollout], bool],
    ) -> None:
        self.order = order
        self.limits = [max_tokens] * len(order)
        self.best: dict[int, tuple[int, int]] = {}  # problem -> (tokens, sample) of the best there is
        self._problems, self._acceptable = problems, acceptable
        self._rivals: dict[int, list[tuple[int, int]]] = {}  # problem -> (sample, index of its request)
        for index, (position, sample) in enumerate(order):
            self._rivals.setdefault(position, []).append((sample, index))

    def run(
        self,
        sampler: StreamingSampler,
        requests: Mapping[Place, SampleRequest],
        settings: SamplingSettings,
        judge: Callable[[Sequence[tuple[Place, Completion]]], list[Verdict]],
        patience: float,
        report: Callable[[int], None],
    ) -> dict[Place, Rollout]:
        """Draw and judge all of them, whole or not."""
        rollouts: dict[Place, Rollout] = {}
        stream = sampler.stream([requests[place] for place in self.order], settings, self.limits)

        def follow(judging: _Judging) -> Iterator[tuple[int, Completion]]:
            for index, completion in stream:
                yield index, completion  # `gather` looks at it first: an index that was not asked for ends here
                place = self.order[index]
                if completion.finish_reason is FinishReason.ABORTED:
                    self._check_stopped(index, completion)
                    rollouts[place] = Rollout(completion, STOPPED)
                else:
                    judging.put(place, completion)
                take(judging.ready())
            take(judging.rest())

        def take(judged: Sequence[tuple[Place, Rollout]]) -> None:
            for place, rollout in judged:
                rollouts[place] = rollout
                if rollout.verdict.decided and self._acceptable(rollout):
                    self._lead(*place, rollout.num_tokens)

        try:
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="judge") as thread:
                gather(follow(_Judging(judge, thread, patience)), len(self.order), report)
        finally:
            if isinstance(stream, Generator):
                stream.close()  # after an error, so that an engine can drop what still runs
        return rollouts

    def _lead(self, position: int, sample: int, tokens: int) -> None:
        """An acceptable answer has ended: nobody need draw more than it takes to beat it."""
        if (tokens, sample) >= self.best.get(position, (math.inf, 0)):
            return
        self.best[position] = (tokens, sample)
        for rival, index in self._rivals[position]:
            if rival != sample:
                self.limits[index] = min(self.limits[index], tokens if rival < sample else tokens - 1)

    def _check_stopped(self, index: int, completion: Completion) -> None:
        position, sample = self.order[index]
        if position not in self.best or completion.num_tokens < self.limits[index]:
            raise RuntimeError(
                f"the sampler stopped sample {sample} of problem {self._problems[position].id} after "
                f"{completion.num_tokens} tokens, but it was allowed {self.limits[index]}: nobody can tell whether it "
                "would have won the race"
            )


class _Judging:
    """Judges what has ended: all that waits goes into the next call, a slow one happens in the thread."""

    def __init__(
        self,
        judge: Callable[[Sequence[tuple[Place, Completion]]], list[Verdict]],
        thread: ThreadPoolExecutor,
        patience: float,
    ) -> None:
        self._judge, self._thread, self._patience = judge, thread, patience
        self._waiting: list[tuple[Place, Completion]] = []
        self._asked: list[tuple[Place, Completion]] = []
        self._call: Future[list[Verdict]] | None = None
        self._quick = False  # whether the last call was
        self._started = time.monotonic()
        self._waited = 0.0

    def put(self, place: Place, completion: Completion) -> None:
        self._waiting.append((place, completion))

    def ready(self) -> list[tuple[Place, Rollout]]:
        """What is judged by now, or while there is patience left."""
        elapsed = time.monotonic() - self._started
        return self._collect(self._patience + PATIENCE_SHARE * elapsed - self._waited)

    def rest(self) -> list[tuple[Place, Rollout]]:
        """All that is left."""
        return self._collect(math.inf)

    def _collect(self, seconds: float) -> list[tuple[Place, Rollout]]:
        found: list[tuple[Place, Rollout]] = []
        started = time.monotonic()
        while True:
            left = min(max(started + seconds - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            if self._call is None:
                if not self._waiting:
                    break
                self._asked, self._waiting = self._waiting, []
                if self._quick and left > 0:
                    self._call = Future()
                    self._call.set_result(self._timed())
                else:
                    self._call = self._thread.submit(self._timed)
            if not wait([self._call], timeout=left).done:
                break
            verdicts, self._call = self._call.result(), None
            found += [
                (place, Rollout(completion, verdict))
                for (place, completion), verdict in zip(self._asked, verdicts, strict=True)
            ]
        self._waited += time.monotonic() - started
        return found

    def _timed(self) -> list[Verdict]:
        started = time.monotonic()
        verdicts = self._judge(self._asked)
        self._quick = time.monotonic() - started < QUICK_SECONDS
        return verdicts


class _LimitedJudge:
    """The task's judge, called many times, never twice at once, and held to its limit over all calls together."""

    def __init__(self, task: Task, problems: Sequence[Problem], total: int) -> None:
        self._task, self._problems, self._total = task, problems, total
        # Each call is a few completions: a limit on shares would stop at the first that is undecided.
        self._each = replace(task, limit=UndecidedLimit(share=1.0))
        self._attempts: list[Attempt] = []
        self._verdicts: list[Verdict] = []
        self._undecided = 0

    def __call__(self, ended: Sequence[tuple[Place, Completion]]) -> list[Verdict]:
        attempts = [(self._problems[position], completion) for (position, _), completion in ended]
        verdicts = judge_attempts(self._each, attempts)
        self._attempts += attempts
        self._verdicts += verdicts
        self._undecided += sum(not verdict.decided for verdict in verdicts)
        # More than the limit of all samples is more than that of those that will be judged: no need to wait for them.
        if self._task.limit.exceeded(self._undecided, self._total):
            self.hold_to_limit()
        return verdicts

    def hold_to_limit(self) -> None:
        """JudgeFailed if too many of the verdicts so far are undecided."""
        judge_attempts(replace(self._task, judge=lambda attempts: self._verdicts), self._attempts)


def _expected(problems: Sequence[Problem], history: Mapping[str, float] | None) -> list[float]:
    """The tokens to expect of each problem; the mean of the known for one that is not known."""
    known = [history[problem.id] for problem in problems if problem.id in history] if history else []
    mean = sum(known) / len(known) if known else 0.0
    return [(history or {}).get(problem.id, mean) for problem in problems]


def _result(groups: Sequence[RolloutGroup], samples: int, rollouts: Mapping[Place, Rollout], race: _Race) -> RaceResult:
    raced = [
        replace(group, rollouts=tuple(rollouts[position, sample] for sample in range(samples)))
        for position, group in enumerate(groups)
    ]
    winners = [race.best[position][1] if position in race.best else None for position in range(len(groups))]
    return RaceResult(tuple(raced), tuple(winners))
