"""One sampler on every rank: each draws its share of the requests, all get all completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

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
        if self.ranks.world == 1:
            return own
        rows = [(c.text, c.token_ids, c.sampler_logprobs, c.finish_reason, c.policy_version) for c in own]
        return [
            Completion(text, tuple(ids), tuple(logprobs), FinishReason(reason), version)
            for text, ids, logprobs, reason, version in self.ranks.unshare(rows)
        ]
