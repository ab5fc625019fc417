"""Budget forcing: holding the length of a thought from outside, at inference time (s1, 2501.19393, section 3).

Two moves, both by tokens that are put into the completion instead of drawn:

* *Max*: a thought that has not closed after `max_think_tokens` gets the closing string, and the answer is drawn.
* *Min*: an end of the thought that comes too early is cut off and replaced by "Wait", and drawing goes on.

Only token ids are handled; nothing that was drawn is ever tokenised again, only the two fixed strings are. A forced
token has log-prob 0.0 and stands in a `Segment` with `trained=False`, since no policy chose it: it stays out of every
loss, and counts in `num_tokens`, since it is read and paid for. (A pool on disk keeps no segments: judge and count such
completions, do not put them into one.)

Where a thought ends is read from the decoded text, so that it does not matter whether `</think>` is one token (the tiny
world, R1's students) or several (SmolLM2); see `thought_end`. The thought's length is the number of completion tokens
before that, with a `<think>` that the model itself wrote.

Deviations from s1: its code stops the engine at the end of the thought. A `Sampler` knows no stop strings, so the
answer behind an end that is then replaced is drawn and thrown away. An end-of-sequence token inside the thought also
counts as its end for *Min*; *Max* leaves such a completion alone, as it used no more than it might.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from rl.judging import judge_attempts
from rl.prompts import THINK_CLOSE, THINK_OPEN, render_text
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings, sample_seed
from rl.tasks.base import Task
from rl.types import Completion, FinishReason, Problem, Rollout, RolloutGroup, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ThinkingControl:
    """How a thought is held. The defaults hold nothing.

    Example: `ThinkingControl(max_think_tokens=512, waits=2, min_think_tokens=128)`: no thought is longer than 512
    tokens, and one that ends before its 128th goes on behind "Wait", twice at most.
    """

    max_think_tokens: int | None = None  # of the thought, forced tokens counted; None: only the sampler's limit
    waits: int = 0  # how often an early end of the thought is replaced
    min_think_tokens: int | None = None  # an end before that is early; None: every end is, as in s1
    wait_text: str = "Wait"  # s1's word
    closing_text: str | None = None  # what closes a thought by force; None: `closing_text(tokenizer)`
    answer_tokens: int | None = None  # most tokens behind a forced closing; None: what the sampler's limit leaves

    def __post_init__(self) -> None:
        for name in ("max_think_tokens", "min_think_tokens", "answer_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; leave it out to have none")
        if self.waits < 0:
            raise ValueError(f"waits must be at least 0, got {self.waits}")
        if self.min_think_tokens is not None and not self.waits:
            raise ValueError(
                f"min_think_tokens={self.min_think_tokens} needs waits of at least 1: a thought is made longer by "
                "replacing its end"
            )
        if (self.min_think_tokens or 0) > (self.max_think_tokens or math.inf):
            raise ValueError(
                f"min_think_tokens={self.min_think_tokens} is above max_think_tokens={self.max_think_tokens}"
            )
        if self.closing_text is not None and THINK_CLOSE not in self.closing_text:
            raise ValueError(f"closing_text must contain {THINK_CLOSE}, got {self.closing_text!r}")


# --- where a thought ends ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ThoughtEnd:
    """Where the first `</think>` of a completion stands, in tokens: ids[:thought] lies before it, ids[:closed] ends
    with the token that completes it."""

    thought: int
    closed: int


def thought_end(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> ThoughtEnd | None:
    """The end of the thought; None if it never closes.

    A token that holds the last character of the thought and the first of `</think>` belongs to the closing. Decodes
    log2(T) prefixes.
    Example, tokens in bars: "|4|=|4|</think>|4|" -> (3, 4); "|so|.</|think|>\\n|4|" -> (1, 4).
    """
    if THINK_CLOSE not in _decode(tokenizer, token_ids):
        return None
    closed = bisect_left(range(len(token_ids)), True, key=lambda n: THINK_CLOSE in _decode(tokenizer, token_ids[:n]))
    start = _decode(tokenizer, token_ids[:closed]).index(THINK_CLOSE)
    return ThoughtEnd(_tokens_before(tokenizer, token_ids[:closed], start), closed)


def _without_begun_closing(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> int:
    """How many tokens remain without a `</think>` that is begun at the end; a mere `<` may be the thought's own."""
    text = _decode(tokenizer, token_ids)
    for size in range(len(THINK_CLOSE) - 1, 1, -1):
        if text.endswith(THINK_CLOSE[:size]):
            return _tokens_before(tokenizer, token_ids, len(text) - size)
    return len(token_ids)


def _tokens_before(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], start: int) -> int:
    """How many tokens lie before character `start`. From the end, as it is a few tokens away; the decoded length of
    a prefix that ends within a character may be above that of a longer one, so it is not searched by halves."""
    count = len(token_ids)
    while len(_decode(tokenizer, token_ids[:count])) > start:
        count -= 1
    return count


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    # Cleaning up spaces would make a prefix's text no prefix of the text.
    text = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def closing_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """What closes a thought in the form of the template.

    A prompt that ends in "<think>" -> "</think>"; any other, such as "<think>" and a newline (R1's students) ->
    "\\n</think>". What follows is left to the model.
    """
    prompt = render_text(tokenizer, Problem(id="probe", question=(), answer=""))
    return THINK_CLOSE if prompt.endswith(THINK_OPEN) else f"\n{THINK_CLOSE}"


def forced_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """A fixed string as tokens; ValueError if the tokenizer cannot write it (the tiny world has no "Wait")."""
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    written = _decode(tokenizer, ids)
    if written != text or not ids:
        raise ValueError(
            f"the text {text!r} cannot be forced: this tokenizer makes {written!r} of it; choose one that it can write"
        )
    return ids


# --- completions that are partly forced -------------------------------------------------------------------------------


class Draft:
    """A completion in the making: drawn tokens, forced tokens, and what is cut off again."""

    def __init__(self, seed: int, limit: int | None = None) -> None:
        self.first_seed = self.seed = seed
        self.limit = limit  # new tokens that the next request may draw
        self.ids: list[int] = []
        self.finish_reason = FinishReason.LENGTH
        self.waits = 0
        self.answered = False  # what is drawn next, if anything, is the last of it
        self._logprobs: list[float] = []
        self._origins: list[tuple[int, bool]] = []  # of each token: the policy version, and whether it was drawn
        self._version = 0
        self._cuts = 0

    def add(self, drawn: Completion) -> None:
        self._version = drawn.policy_version
        self.finish_reason = drawn.finish_reason
        self.ids += drawn.token_ids
        self._logprobs += drawn.sampler_logprobs
        segments = drawn.segments or (Segment(drawn.num_tokens, drawn.policy_version),)
        self._origins += [(s.policy_version, s.trained) for s in segments for _ in range(s.num_tokens)]

    def force(self, ids: Sequence[int]) -> None:
        self.ids += ids
        self._logprobs += [0.0] * len(ids)
        self._origins += [(self._version, False)] * len(ids)

    def cut(self, count: int) -> None:
        """Keep the first `count` tokens. That the others were thrown away depended on the random numbers that drew
        them, so what comes next is drawn from a stream of its own."""
        if count == len(self.ids):
            return
        del self.ids[count:], self._logprobs[count:], self._origins[count:]
        self._cuts += 1
        self.seed = sample_seed(self.first_seed, "cut", self._cuts)

    def close(self, tokenizer: PreTrainedTokenizerBase, closing: Sequence[int]) -> None:
        """Close the thought by force. Should the model have begun to, its beginning gives way."""
        self.cut(_without_begun_closing(tokenizer, self.ids))
        self.force(closing)

    def request(self, prompt_ids: tuple[int, ...]) -> SampleRequest:
        return SampleRequest(prompt_ids, self.seed, tuple(self.ids), self.limit)

    def completion(self, tokenizer: PreTrainedTokenizerBase) -> Completion:
        """Its segments are empty where nothing was forced: it is what the sampler would have drawn in one go."""
        shown = self.ids[:-1] if self.finish_reason is FinishReason.STOP else self.ids
        text = tokenizer.decode(shown, skip_special_tokens=False)  # of the whole: a character may span tokens
        assert isinstance(text, str)
        segments = tuple(
            Segment(len(list(run)), version, trained) for (version, trained), run in groupby(self._origins)
        )
        return Completion(
            text,
            tuple(self.ids),
            tuple(self._logprobs),
            self.finish_reason,
            self._version,
            segments if len(segments) > 1 or not all(segment.trained for segment in segments) else (),
        )


def is_forced(completion: Completion) -> bool:
    """Whether some of its tokens were forced."""
    return any(not segment.trained for segment in completion.segments)


def force_budget(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    control: ThinkingControl,
    report: Callable[[int], None] = lambda finished: None,
) -> list[Completion]:
    """One completion a request, in order, with its thought held by `control`. `report` is told how many are done.

    `settings.max_tokens` counts the whole completion, forced tokens too. Token t is drawn with the t-th number of the
    request's seed, so a completion that the control does not touch is the one drawn without it; behind something that
    was cut off it is the t-th number of another seed, made from the request's. One call of the sampler a round, at most
    `waits` + 2 rounds. An end of thought is not replaced where the limit leaves no room behind the wait text.

    Finish reasons are the sampler's own of the last draw: an answer that ran into `answer_tokens` ends by `length`.
    Errors: ValueError for a request that has a prefix or a limit of its own, for a string that the tokenizer cannot
    write, and for a `settings.max_tokens` that leaves no answer behind `max_think_tokens`.

    Example, max_think_tokens 4, one token a character: a model that would write "abcdef</think>4" gives
    "abcd</think>4" with segments of 4, 1 (not trained) and 2 tokens, the EOS token being the last.
    """
    closing = forced_ids(tokenizer, control.closing_text or closing_text(tokenizer))
    wait = forced_ids(tokenizer, control.wait_text) if control.waits else ()
    if any(request.prefix or request.max_tokens is not None for request in requests):
        raise ValueError("budget forcing begins and limits completions itself: give requests without prefix and limit")
    thinking = settings.max_tokens if control.max_think_tokens is None else control.max_think_tokens
    if control.max_think_tokens is not None and settings.max_tokens <= thinking + len(closing):
        raise ValueError(
            f"max_tokens={settings.max_tokens} leaves no answer behind a thought of max_think_tokens={thinking} and "
            f"its closing of {len(closing)} tokens: raise the one or lower the other"
        )

    def goes_on(draft: Draft) -> bool:
        """Whether there is more to draw, and how much of it; puts in what is forced."""
        if draft.answered:
            return False
        end = thought_end(tokenizer, draft.ids)
        if end is None and draft.finish_reason is not FinishReason.STOP:
            if draft.finish_reason is not FinishReason.LENGTH or control.max_think_tokens is None:
                return False
            draft.close(tokenizer, closing)
            draft.limit, draft.answered = control.answer_tokens, True
            return True
        thought = len(draft.ids) - 1 if end is None else end.thought
        early = control.min_think_tokens is None or thought < control.min_think_tokens
        if early and draft.waits < control.waits and thought + len(wait) < thinking:
            draft.cut(thought)
            draft.force(wait)
            draft.limit, draft.waits = thinking - len(draft.ids), draft.waits + 1
            return True
        draft.limit, draft.answered = None, True
        return draft.finish_reason is FinishReason.LENGTH and len(draft.ids) < settings.max_tokens

    drafts = [Draft(request.seed, thinking) for request in requests]
    waiting = list(range(len(drafts)))
    while waiting:
        asked = [drafts[i].request(requests[i].prompt_ids) for i in waiting]
        for i, drawn in zip(waiting, sampler.sample(asked, settings), strict=True):
            drafts[i].add(drawn)
        waiting = [i for i in waiting if goes_on(drafts[i])]
        report(len(drafts) - len(waiting))
    return [draft.completion(tokenizer) for draft in drafts]


def force_groups(
    groups: Sequence[RolloutGroup],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    settings: SamplingSettings,
    control: ThinkingControl,
    seed: int,
    report: Callable[[int], None] = lambda finished: None,
) -> list[RolloutGroup]:
    """Given groups drawn again under `control`, and judged: the same problems, prompts and numbers of samples.

    Sample i is drawn with the seed (`seed`, problem id, i). With the seed, the settings and the model of `groups`,
    those that the control does not touch come out as they are there, so that the two can be compared in pairs.
    """
    asked = [(group, i) for group in groups for i in range(len(group.rollouts))]
    requests = [SampleRequest(group.prompt_ids, sample_seed(seed, group.problem.id, i)) for group, i in asked]
    completions = force_budget(sampler, tokenizer, requests, settings, control, report)
    attempts = [(group.problem, completion) for (group, _), completion in zip(asked, completions, strict=True)]
    verdicts = iter(judge_attempts(task, attempts))
    drawn = iter(completions)
    return [
        replace(group, rollouts=tuple(Rollout(next(drawn), next(verdicts)) for _ in group.rollouts)) for group in groups
    ]
