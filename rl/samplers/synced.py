"""An engine of its own whose weights follow the trainer's, and a check that they really did.

Sampling with weights that are one update old looks like sampling with the right ones: rewards rise, ratios are near 1,
and the run is off-policy all the same. So nothing is assumed here. Before anything is drawn, and after every hand-over,
both sides compute the log-probs of the same few completions, and the run stops if they disagree (`StaleEngine`):

1. They differ by more than two implementations of one model may (mean |Δ| above the tolerance).
2. The trainer's have moved since the last check and the engine's are what they were, to the last bit. This finds an
   update that is smaller than the difference between the two, as a small learning rate and bf16 make it.

An engine may share its device with the trainer (colocated); with vLLM's `enable_sleep_mode` it gives its memory back
between two calls. Or it is a server, which holds whatever its last user left there: it is given the weights first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rl.packing import pack
from rl.policy import PolicyModel
from rl.rows import TrainingRow
from rl.samplers.base import SampleRequest, SamplingSettings, StaleEngine, StreamingSampler, sample_seed
from rl.types import Completion

Row = tuple[tuple[int, ...], tuple[int, ...]]  # prompt ids, completion ids
Weights = Iterable[tuple[str, torch.Tensor]]  # by the names of the model's checkpoint
Scores = list[list[float]]  # log-probs in nats, at temperature 1, one list a row

PROBES = 4
PROBE_TOKENS = 32
# fp32 on a CPU agrees to 1e-6, bf16 on a GPU to about 1e-2.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class WeightedEngine(StreamingSampler, Protocol):
    """An engine that has weights of its own. `policy_version` is that of the weights it holds."""

    def load_weights(self, weights: Weights, policy_version: int) -> None: ...

    def score(self, rows: Sequence[Row]) -> Scores: ...

    def sleep(self) -> None: ...

    def wake_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Agreement:
    """One comparison of engine and trainer on the same tokens: mean and largest |Δ| in nats.

    Example: log-probs (-.1, -.2) and (-.1, -.5) at version 3: `Agreement(3, .15, .3)`.
    """

    policy_version: int
    mean: float
    largest: float


class SyncedSampler:
    """A `StreamingSampler` that draws on another engine. The trainer raises `policy_version`; the weights are handed
    over when something is to be drawn.

    `weights` gives the policy's, `scores` its log-probs of given completions; see `policy_weights`, `policy_scores`.
    `tolerance`: the largest mean |Δ| in nats. `share_device`: the engine sleeps while the trainer trains (not between
    two streams). `foreign`: the engine may hold other weights at the start than the trainer's.
    """

    def __init__(
        self,
        engine: WeightedEngine,
        weights: Callable[[], Weights],
        scores: Callable[[Sequence[Row]], Scores],
        tolerance: float,
        share_device: bool = False,
        foreign: bool = False,
    ) -> None:
        self.engine, self.weights, self.scores = engine, weights, scores
        self.tolerance, self.share_device = tolerance, share_device
        self.policy_version = engine.policy_version
        self.agreement: Agreement | None = None  # of the last check; None: to be checked
        self._probe: list[Row] = []
        self._before: tuple[Scores, Scores] | None = None  # (trainer's, engine's) when the engine last moved
        self._asleep = False
        self._foreign = foreign

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """As `Sampler.sample`, with the trainer's weights of now.

        Errors: StaleEngine.
        """
        if not requests:
            return []
        self._hand_over(requests)
        drawn = self.engine.sample(requests, settings, report)
        if self.share_device:
            self.engine.sleep()
            self._asleep = True
        return drawn

    def stream(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, limits: list[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """As `StreamingSampler.stream`, with the trainer's weights of when it begins.

        Errors: StaleEngine.
        """
        if requests:
            self._hand_over(requests)
            yield from self.engine.stream(requests, settings, limits)

    def _hand_over(self, requests: Sequence[SampleRequest]) -> None:
        if self._asleep:
            self.engine.wake_up()
        if self._asleep or self._foreign or self.engine.policy_version != self.policy_version:
            self.agreement = None
            self.engine.load_weights(self.weights(), self.policy_version)
            self._asleep = self._foreign = False
        if self.agreement is None:  # also at the start: the engine has read the same folder, or so it should
            self.agreement = self._check(requests)

    def _check(self, requests: Sequence[SampleRequest]) -> Agreement:
        if not self._probe:
            prompts = list(dict.fromkeys(request.prompt_ids for request in requests))[:PROBES]
            asked = [SampleRequest(ids, sample_seed("probe", i)) for i, ids in enumerate(prompts)]
            drawn = self.engine.sample(asked, SamplingSettings(max_tokens=PROBE_TOKENS))
            self._probe = [(ids, c.token_ids) for ids, c in zip(prompts, drawn, strict=True)]
        trainers, engines = self.scores(self._probe), self.engine.score(self._probe)
        found = agreement(trainers, engines, self.policy_version)
        if not found.mean <= self.tolerance:  # NaN too
            raise StaleEngine(
                f"at policy version {self.policy_version} the engine's log-probs differ from the trainer's by "
                f"{found.mean:.2g} nats on average (at most {found.largest:.2g}), more than {self.tolerance:.2g}: "
                "it holds other weights, or computes another model"
            )
        if self._before is None or self._before[1] != engines:
            self._before = trainers, engines
            return found
        moved = agreement(trainers, self._before[0], self.policy_version)
        # A step that moves less than a tenth of what the two differ by anyway may really leave the engine's bits.
        if moved.mean > found.mean / 10:
            raise StaleEngine(
                f"at policy version {self.policy_version} the trainer's log-probs have moved by {moved.mean:.2g} nats "
                "and the engine's not at all: the new weights did not arrive"
            )
        return found


def agreement(left: Scores, right: Scores, policy_version: int) -> Agreement:
    """How far two computations of the same log-probs are apart."""
    gaps = [abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return Agreement(policy_version, sum(gaps) / len(gaps), max(gaps))


def policy_weights(policy: PolicyModel) -> Weights:
    """The policy's weights as its checkpoint would name them, adapters merged in.

    A tied output layer is named as well: vLLM on a CPU keeps a packed copy of it, which it makes anew only when the
    layer's own name arrives. Without it every layer but the last is new.
    """
    from peft import PeftModel

    from rl.lora import merged_weights

    if isinstance(policy.model, PeftModel):
        return merged_weights(policy.model).items()
    return ((name, value.detach()) for name, value in policy.model.named_parameters(remove_duplicate=False))


@torch.no_grad()
def policy_scores(policy: PolicyModel, rows: Sequence[Row]) -> Scores:
    """The training forward's log-probs (nats, temperature 1) of given completions."""
    device = next(policy.parameters()).device
    packed = pack([TrainingRow(p, ids, (0.0,) * len(ids), 0.0, sample=i) for i, (p, ids) in enumerate(rows)], device)
    logprobs, _ = policy(packed, temperature=1.0)
    return [line[: len(ids)].tolist() for line, (_, ids) in zip(logprobs, rows, strict=True)]
