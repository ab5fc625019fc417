"""The sampler protocol: what every engine takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rl.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rl.repetition import RepetitionRule


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One completion to draw. k samples of a problem are k requests with k seeds, so none depends on the others.

    A request with a `prefix` goes on with a completion that was begun before. Token t of a completion (t from 0, the
    prefix counted) is always drawn with the t-th number of the seed's stream, so with unchanged weights a completion
    drawn in pieces is the one drawn in one go. What comes back holds the new tokens only.
    """

    prompt_ids: tuple[int, ...]
    seed: int  # 64 bits; see `sample_seed`
    prefix: tuple[int, ...] = ()  # completion tokens drawn before
    max_tokens: int | None = None  # new tokens this request may draw; None: the settings' limit less the prefix

    @property
    def context(self) -> tuple[int, ...]:
        """What the next token is drawn after: the prompt and the prefix."""
        return self.prompt_ids + self.prefix

    def budget(self, settings: SamplingSettings) -> int:
        """How many new tokens may be drawn. The settings' limit holds for the whole completion, prefix counted.

        Example: limit 10, prefix of 6: 4; with `max_tokens=3` only 3, with `max_tokens=7` still 4.
        """
        left = settings.max_tokens - len(self.prefix)
        budget = left if self.max_tokens is None else min(left, self.max_tokens)
        if budget < 1:
            raise ValueError(
                f"a request with a prefix of {len(self.prefix)} tokens and max_tokens {self.max_tokens} has nothing "
                f"left to draw under the limit of {settings.max_tokens}: it has ended, do not ask for it again"
            )
        return budget


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """The distribution to draw from. With `top_p` < 1 the log-probs are those of the truncated, renormalised one.

    A completion that runs in a circle by the rule `stop_repetition` is ended with finish reason `repetition`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256  # of a whole completion
    stop_repetition: RepetitionRule | None = None  # None: only EOS or the limit end a completion

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; use a small one to be nearly greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


class StaleEngine(RuntimeError):
    """An engine does not hold the trainer's weights; the message says what was compared and how far it was off."""


class Sampler(Protocol):
    """Draws completions. `policy_version` is stamped on every completion; the trainer raises it at each update."""

    policy_version: int

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """One completion a request, in order. `report` is told how many have finished."""
        ...


class StreamingSampler(Sampler, Protocol):
    """A sampler that hands completions over as they end, and can be told to end some early."""

    def stream(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, limits: list[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """(index of the request, its completion) as they end, in any order, each once.

        `limits[i]` is the most new tokens that request i may draw from now on. The caller may lower it between two
        completions: a request that has drawn so many without ending is ended with finish reason `aborted`, with the
        tokens it has (0 of them where it had not begun). None: nothing is cut but by the settings.
        """
        ...


@runtime_checkable
class ShardSampler(Protocol):
    """Draws many lists of requests at once, on as many engines as it has.

    `isinstance` tells it from a `Sampler` by its method.
    """

    def sample_shards(
        self,
        shards: Sequence[Sequence[SampleRequest]],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the shard, one completion a request in order) as shards are done, in any order, each once.

        `report` is told how many completions of all shards have finished.
        """
        ...


@dataclass(frozen=True, slots=True)
class OneByOne:
    """A `ShardSampler` of one sampler: the shards in their order."""

    sampler: Sampler

    def sample_shards(
        self,
        shards: Sequence[Sequence[SampleRequest]],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        before = 0
        for index, shard in enumerate(shards):
            yield index, self.sampler.sample(shard, settings, lambda done, before=before: report(before + done))
            before += len(shard)


# (model folder or hub id, its tokenizer) -> a sampler, freed at the end of the block
OpenSampler = Callable[[str, "PreTrainedTokenizerBase"], AbstractContextManager[Sampler]]


def gather(
    stream: Iterator[tuple[int, Completion]], count: int, report: Callable[[int], None] = lambda finished: None
) -> list[Completion]:
    """The completions of a stream in the order of their `count` requests.

    Errors: RuntimeError for a stream that leaves one out or gives one twice.
    """
    found: dict[int, Completion] = {}
    for index, completion in stream:
        if index in found or not 0 <= index < count:
            raise RuntimeError(f"the sampler gave completion {index} of {count} twice, or one that was not asked for")
        found[index] = completion
        report(len(found))
    if len(found) < count:
        raise RuntimeError(f"the sampler gave {len(found)} completions for {count} requests")
    return [found[index] for index in range(count)]


def sample_seed(*parts: object) -> int:
    """A 64-bit seed from anything printable: `sample_seed(root, "train", problem.id, sample_index)`."""
    return int.from_bytes(sha256(" ".join(map(str, parts)).encode()).digest()[:8], "big")
