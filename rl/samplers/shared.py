"""Sampling on all ranks of a run: each draws its share of the requests, or the first draws for all. All get all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from rl.distributed import gathered
from rl.ranks import Ranks
from rl.samplers.base import Sampler, SampleRequest, SamplingSettings
from rl.types import Completion, FinishReason


class SharedSampler:
    """A `Sampler` over the ranks of a run. Seeds belong to requests, so who draws one does not change what is drawn,
    but for the rounding of another batch.

    `policy` is the model behind `sampler`, a module that `rl.distributed.shard` may have sharded: its weights are
    gathered while the samples are drawn. `precision` makes the context that the trainer's forward runs in: under bf16
    autocast on one side only, the log-probs of the two differed by five times as much on average (tests/
    test_precision.py).
    """

    def __init__(
        self,
        sampler: Sampler,
        ranks: Ranks,
        policy: nn.Module,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.sampler, self.ranks, self.policy, self.precision = sampler, ranks, policy, precision
        self.policy_version = sampler.policy_version

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """As `Sampler.sample`, on every rank; `report` is told this rank's share times the number of ranks."""
        self.sampler.policy_version = self.policy_version
        with gathered(self.policy), self.precision():
            own = self.sampler.sample(
                self.ranks.share(requests),
                settings,
                lambda finished: report(min(finished * self.ranks.world, len(requests))),
            )
        return own if self.ranks.world == 1 else _completions(self.ranks.unshare(_rows(own)))


class FromFirst:
    """A `Sampler` over the ranks of a run that rank 0 draws from, for all: a server, which is as near to any rank, and
    whose weights must be handed over once. `sampler` is None on the other ranks, the rest as in `SharedSampler`.
    """

    def __init__(
        self,
        sampler: Sampler | None,
        ranks: Ranks,
        policy: nn.Module,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.sampler, self.ranks, self.policy, self.precision = sampler, ranks, policy, precision
        self.policy_version = 0

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """As `Sampler.sample`, on every rank."""
        own: list[Completion] = []
        with gathered(self.policy), self.precision():
            if self.sampler is not None:
                self.sampler.policy_version = self.policy_version
                own = self.sampler.sample(requests, settings, report)
        return own if self.ranks.world == 1 else _completions(self.ranks.from_first(_rows(own)))


def _rows(completions: Sequence[Completion]) -> list[tuple[object, ...]]:
    return [(c.text, c.token_ids, c.sampler_logprobs, c.finish_reason, c.policy_version) for c in completions]


def _completions(rows: Sequence[Sequence[Any]]) -> list[Completion]:
    return [
        Completion(text, tuple(ids), tuple(logprobs), FinishReason(reason), version)
        for text, ids, logprobs, reason, version in rows
    ]
