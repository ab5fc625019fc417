"""Watching a length squeeze for collapse: to guessing, to empty thoughts, to wrong answers, to one length.

A length reward pays for brevity in groups that are all wrong too (Kimi's min(0, λ) gives the longer ones less), so a
policy that was pushed past the length it needs is paid to go on: accuracy falls to 0 at two tokens and stays there.
Kimi k1.5 (2501.12599, section 2.4) does not say how that is noticed; the signals and their limits are ours:

    accuracy      mean accuracy of the window's batches under `accuracy_floor`, or `accuracy_margin` under that of the
                  first window, or under half of that, which comes first for a weak start; the same for the accuracy of
                  an evaluation against that of the starting model
    empty_think   share of completions that close a thought with nothing in it, or have none
    guess_rate    share of completions that answer after a thought of fewer than `guess_tokens` tokens, or end before
                  that many without having closed it
    spread        tokens between the longest and the shortest completion of a group: near 0 a length reward has nothing
                  to choose from, or multiplies a difference of one token
    entropy       mean of −log p of the sampled tokens, nats: an estimate of the policy's entropy

The first three are alarms: they stop the run where `stop` says so. The others are warnings. A figure is averaged over
the last `window` steps and says nothing before there are so many; each signal is reported once. A step's figures are
those of its rollouts, so they describe the policy before the step's update, and an alarm comes before that update.

A model that thinks without tags is not held to empty_think and guess_rate, which could only say that it has no thought:
one of whose first window's completions fewer than a tenth hold a tag, under a template that opens none. A warning
(`no_think_tags`) says so once. A model that gives its tags up later is held to both.

Run it: any recipe with a `method: length_rl` stage; the keys are `collapse:`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean

from rl.prompts import THINK_CLOSE, THINK_OPEN
from rl.types import FinishReason, RolloutGroup

FEW_TAGGED = 0.1  # below this share of completions with a think tag in the first window, a model thinks without tags
OF_THOUGHT = ("empty_think", "guess_rate")  # the signals that read think tags


@dataclass(frozen=True, slots=True)
class CollapseLimits:
    """When a signal is reported; None: never.

    Example: window 5, margin .2: first five steps at .92 on average, then a window at .71 -> accuracy is reported.
    """

    window: int = 5  # steps
    accuracy_floor: float | None = None
    accuracy_margin: float | None = 0.2
    batches_compare: bool = True  # False: problems are drawn by success, so only evaluations are held to the margin
    empty_think: float | None = 0.5
    guess_rate: float | None = 0.5
    guess_tokens: int = 8  # an answer after a shorter thought is a guess
    spread: float | None = 1.0  # tokens
    entropy: float | None = None  # nats per token

    def accuracy_limit(self, start: float | None) -> float | None:
        """The accuracy below which there is an alarm; `start` is what it was at first, None while that is unknown.

        A start below the margin could lose everything without an alarm: half of the start is lost at the latest.
        Example: floor .5, margin .2: start .9 -> .7, start .6 -> .5; without a floor: start .18 -> .09.
        """
        relative = (
            None if start is None or self.accuracy_margin is None else max(start - self.accuracy_margin, start / 2)
        )
        given = [limit for limit in (self.accuracy_floor, relative) if limit is not None]
        return max(given) if given else None


@dataclass(frozen=True, slots=True)
class ThoughtReader:
    """How long the thought of a completion is, in tokens; None while it never ended or was never begun by the rules.

    `prefilled`: the template has opened `<think>`, so a text without the closing tag is a thought that did not end.
    Example, prefilled: "1+1=2</think>2" -> 5 with a token a character; "</think>2" -> 0; "1+1=2" -> None. Otherwise
    "2" -> 0: there was no thought; "<think>1+1" -> None.
    """

    prefilled: bool
    count_tokens: Callable[[str], int] = field(default=len)

    def __call__(self, text: str) -> int | None:
        thought, closed, _ = text.rpartition(THINK_CLOSE)
        if not closed:
            return None if self.prefilled or THINK_OPEN in text else 0
        thought = thought.strip().removeprefix(THINK_OPEN).strip()
        return self.count_tokens(thought) if thought else 0

    def tagged(self, text: str) -> bool:
        """Whether a think tag stands in the completion or opens it: whether it is a thought by the rules at all."""
        return self.prefilled or THINK_OPEN in text or THINK_CLOSE in text


@dataclass(frozen=True, slots=True)
class StepHealth:
    """The figures of one step's rollouts. Example: `StepHealth(.91, 0., .02, 14.5, .21)`, a healthy step."""

    accuracy: float | None  # None where the judge decided nothing
    empty_think: float
    guess_rate: float
    spread: float  # tokens, mean over groups
    entropy: float  # nats per token, estimated from the sampled ones
    guess_accuracy: float | None = None  # of the guesses alone; None without guesses
    tagged: float = 1.0  # share of completions with a think tag, the template's included

    def metrics(self) -> dict[str, float]:
        """What metrics.jsonl gets; accuracy and spread are there already."""
        found = {"empty_think": self.empty_think, "guess_rate": self.guess_rate, "sampled_entropy": self.entropy}
        return found if self.guess_accuracy is None else found | {"guess_accuracy": self.guess_accuracy}


def step_health(groups: Sequence[RolloutGroup], thought_tokens: ThoughtReader, guess_tokens: int = 8) -> StepHealth:
    """The figures of a step's judged groups, at least one.

    A completion that ran into its limit inside the thought is neither empty nor a guess. One that ended by itself
    there is a guess if it is shorter than `guess_tokens` as a whole: it has nothing else that could be a thought.
    Example: completions "a</think>4" (right) and "</think>7" (wrong) of one problem, a token a character and a tag:
    accuracy .5, empty_think .5, guess_rate 1 with guess_tokens 8, guess_accuracy .5.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    decided = [rollout for rollout in rollouts if rollout.verdict.decided]
    thoughts = [thought_tokens(rollout.completion.text) for rollout in rollouts]
    empty = [length == 0 for length in thoughts]
    guessed = [
        (rollout.num_tokens if length is None else length) < guess_tokens
        and rollout.completion.finish_reason is FinishReason.STOP
        for length, rollout in zip(thoughts, rollouts, strict=True)
    ]
    guesses = [rollout for rollout, is_guess in zip(rollouts, guessed, strict=True) if is_guess]
    judged = [rollout.right for rollout in guesses if rollout.verdict.decided]
    logprobs = [value for rollout in rollouts for value in rollout.completion.sampler_logprobs]
    return StepHealth(
        accuracy=fmean(rollout.right for rollout in decided) if decided else None,
        empty_think=fmean(empty),
        guess_rate=fmean(guessed),
        spread=fmean(max(group.num_tokens) - min(group.num_tokens) for group in groups),
        entropy=-fmean(logprobs),
        guess_accuracy=fmean(judged) if judged else None,
        tagged=fmean(thought_tokens.tagged(rollout.completion.text) for rollout in rollouts),
    )


@dataclass(frozen=True, slots=True)
class Signal:
    """One thing that is watched: which figure, against which limit (given the starting accuracy), and what to say."""

    name: str
    figure: Callable[[StepHealth], float | None]
    limit: Callable[[CollapseLimits, float | None], float | None]
    says: str
    below: bool = False  # crossed below the limit, else at it and above
    serious: bool = True  # an alarm, else a warning

    def crossed(
        self, steps: Sequence[StepHealth], limits: CollapseLimits, start: float | None
    ) -> tuple[float, float] | None:
        """(mean over the steps, limit) if that is on the wrong side, else None."""
        values = [value for health in steps if (value := self.figure(health)) is not None]
        limit = self.limit(limits, start)
        if limit is None or not values:
            return None
        mean = fmean(values)
        return (mean, limit) if (mean < limit if self.below else mean >= limit) else None


SIGNALS = (
    Signal(
        "accuracy", lambda health: health.accuracy,
        lambda limits, start: limits.accuracy_limit(start if limits.batches_compare else None),
        "accuracy {value:.2f} is below {limit:.2f}", below=True,
    ),
    Signal(
        "empty_think", lambda health: health.empty_think, lambda limits, start: limits.empty_think,
        "{value:.0%} of the completions have no thought (limit {limit:.0%})",
    ),
    Signal(
        "guess_rate", lambda health: health.guess_rate, lambda limits, start: limits.guess_rate,
        "{value:.0%} of the completions answer almost without a thought (limit {limit:.0%})",
    ),
    Signal(
        "spread", lambda health: health.spread, lambda limits, start: limits.spread,
        "completions of a problem differ by {value:.2f} tokens (limit {limit:g}): a length reward has nothing to "
        "choose from", below=True, serious=False,
    ),
    Signal(
        "entropy", lambda health: health.entropy, lambda limits, start: limits.entropy,
        "entropy {value:.4f} nats a token is below {limit:g}", below=True, serious=False,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Alarm:
    """A signal that crossed its limit. Example: `Alarm(14, "guess_rate", .55, .5, "55% of the completions ...")`."""

    step: int
    signal: str
    value: float
    limit: float
    says: str
    serious: bool = True

    def __str__(self) -> str:
        return f"step {self.step}: {self.says}"


class CollapseMonitor:
    """Sees every step of a run, and every evaluation; remembers the last window, the first one, and what it reported.

    `stop`: whether an alarm ends the run. All that it remembers is in `as_json`, so a resumed run reports what the
    uninterrupted one would have.
    """

    def __init__(self, limits: CollapseLimits, thought_tokens: ThoughtReader, *, stop: bool = True) -> None:
        self.limits, self.thought_tokens, self.stop = limits, thought_tokens, stop
        self.alarms: list[Alarm] = []
        self._window: list[StepHealth] = []
        self._first: list[float] = []  # accuracies of the first window
        self._tagged: list[float] = []  # shares of completions with a think tag, of the first window

    @property
    def start_accuracy(self) -> float | None:
        """Mean accuracy of the first `window` steps; None until they are over."""
        return fmean(self._first) if len(self._first) == self.limits.window else None

    @property
    def untagged(self) -> bool:
        """Whether the model thinks without tags, as far as the first window has shown it."""
        return bool(self._tagged) and fmean(self._tagged) < FEW_TAGGED

    @property
    def stopped(self) -> Alarm | None:
        """The alarm that ends the run, if there is one."""
        return next((alarm for alarm in self.alarms if alarm.serious), None) if self.stop else None

    @property
    def healthy(self) -> bool:
        """Whether the newest step, taken by itself, is within the limits of all alarms: its model may be kept."""
        return not self._last_crosses("accuracy", *OF_THOUGHT)

    def read(self, step: int, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Look at a step's rollouts, before its update; returns figures for the log, without groups none."""
        if not groups:  # partial rollouts: nothing has closed yet
            return {}
        health = step_health(groups, self.thought_tokens, self.limits.guess_tokens)
        self.observe(step, health)
        return health.metrics() | {"alarms": float(len(self.alarms))}

    def observe(self, step: int, health: StepHealth) -> None:
        """Take in the figures of a step; what crosses its limit for the first time is added to `alarms`."""
        size = self.limits.window
        if health.accuracy is not None and len(self._first) < size:
            self._first.append(health.accuracy)
        if len(self._tagged) < size:
            self._tagged.append(health.tagged)
        self._window = [*self._window, health][-size:]
        if len(self._window) < size:
            return
        self._warn_of_no_tags(step)
        for signal in self._watched():
            if crossed := signal.crossed(self._window, self.limits, self.start_accuracy):
                value, limit = crossed
                says = signal.says.format(value=value, limit=limit)
                self._add(Alarm(step, signal.name, value, limit, says, signal.serious))

    def observe_dev(self, step: int, accuracy: float, start: float) -> bool:
        """Take in an evaluation and that of the starting model on the same problems; whether the model may be kept.

        One evaluation is enough: it is over fixed problems, and as a rule over more of them than a step. A model whose
        newest rollouts are guesses is not kept either, however many of them are right.
        """
        limit = self.limits.accuracy_limit(start)
        if limit is None or accuracy >= limit:
            return not (self.stop and self._last_crosses(*OF_THOUGHT))
        says = f"accuracy on dev problems {accuracy:.2f} is below {limit:.2f}"
        self._add(Alarm(step, "dev_accuracy", accuracy, limit, says))
        return not self.stop

    def as_json(self) -> dict[str, object]:
        """What a checkpoint stores; exact."""
        return {
            "window": [asdict(health) for health in self._window],
            "first": self._first,
            "tagged": self._tagged,
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def restore(self, state: dict) -> None:
        """Go on from what `as_json` gave."""
        self._window = [StepHealth(**health) for health in state["window"]]
        self._first = list(state["first"])
        self._tagged = list(state.get("tagged", [1.0] * self.limits.window))  # a checkpoint of before: held to all
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]

    def _watched(self) -> list[Signal]:
        """The signals that this model is held to."""
        return [signal for signal in SIGNALS if not (self.untagged and signal.name in OF_THOUGHT)]

    def _warn_of_no_tags(self, step: int) -> None:
        """Say once that the signals of the thought are not watched, if they would have been."""
        if self.untagged and (self.limits.empty_think, self.limits.guess_rate) != (None, None):
            share = fmean(self._tagged)
            says = (
                f"{share:.0%} of the first completions hold a think tag (fewer than {FEW_TAGGED:.0%}): empty_think and "
                "guess_rate are not watched; give the model a template that opens <think>, or set both to null"
            )
            self._add(Alarm(step, "no_think_tags", share, FEW_TAGGED, says, serious=False))

    def _last_crosses(self, *names: str) -> bool:
        """Whether one of these signals is over the line in the newest step alone. Inside the first window the start is
        what there is of it, so that a model which lost its accuracy at once does not pass for well."""
        start = fmean(self._first) if self._first else None
        return any(
            signal.crossed(self._window[-1:], self.limits, start) for signal in self._watched() if signal.name in names
        )

    def _add(self, alarm: Alarm) -> None:
        """Keep an alarm unless its signal was reported before."""
        if all(known.signal != alarm.signal for known in self.alarms):
            self.alarms.append(alarm)
