"""What every stage may be told that samples from the policy which it trains: rollouts, optimizer, memory, evaluation.

Reinforcement learning (recipes/rl_keys.py) adds rewards and an objective, on-policy distillation
(recipes/on_policy_keys.py) a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Keys, NonNegative, Rate, Ref, SamplingKeys, Split

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Steps = tuple[Count, Count]
Weight = Annotated[float, Field(ge=0, le=100)]


class Correction(Keys):
    """Importance weights where the sampler's log-probs are not the trainer's."""

    kind: Literal["truncated", "icepop"]
    """truncated: min(trainer/sampler, high) (TIS). icepop: the ratio within [low, high], 0 outside."""
    low: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Lower bound, icepop only [0.5]."""
    high: Annotated[float, Field(ge=1)] | None = None
    """Upper bound [truncated: 2, icepop: 5]."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.low is not None and self.kind != "icepop":
            yield "low", f"has no effect with kind: {self.kind}; remove it"


class Draw(Keys):
    """Which problems a step draws."""

    order: Literal["shuffled", "curriculum", "prioritized"] = "shuffled"
    """shuffled: seeded epochs. curriculum: easy to hard, only hard from `switch_step` on. prioritized: by 1 - success
    rate."""
    switch_step: Count | None = None
    """The step from which on a curriculum draws only hard problems."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.05
    """prioritized: no problem is drawn with a weight below this."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.switch_step is not None) != (self.order == "curriculum"):
            yield "switch_step", "goes with order: curriculum, and that needs it"
        if self.switch_step == 1:
            yield "switch_step", "must be at least 2: step 1 is before the switch"
        if self.floor != type(self).model_fields["floor"].default and self.order != "prioritized":
            yield "floor", f"has no effect with order: {self.order}; remove it"


class Repetition(Keys):
    """A rollout that runs in a circle is stopped, with finish reason `repetition`."""

    max_period: Annotated[int, Field(ge=1, le=4096)] = 64
    """Longest block that counts as a repetition, in tokens."""
    min_repeats: Annotated[int, Field(ge=2, le=4096)] = 4
    """How many copies in a row."""
    min_tokens: Count = 128
    """How many tokens the copies must span."""
    penalty: Weight = 0.0
    """Taken off the reward of a completion that was stopped for it."""


class Lora(Keys):
    """Train low-rank adapters; the stage's model has them merged in."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scale of the adapters: alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the modules that get adapters."""


class PolicyKeys(SamplingKeys):
    """What every stage may be told that samples from the policy which it trains."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "model"

    model: Ref
    """Model to start from: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    steps: Count
    """Rollout steps."""
    problems_per_step: Count = 16
    """Problems sampled per step."""
    group_size: Annotated[int, Field(ge=2, le=4096)] = 16
    """Completions per problem."""

    learning_rate: Rate = 1e-6
    """Learning rate (constant after the warm-up)."""
    warmup_steps: NonNegative = 0
    """Steps over which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's two decay rates."""
    adam_epsilon: Positive = 1e-8
    """AdamW's epsilon (CISPO: 1e-15)."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this global norm."""
    updates_per_step: Count = 1
    """Optimizer updates per rollout step; divides problems_per_step."""
    reset_optimizer: bool = False
    """Forget the moments of AdamW at every step (Kimi k1.5: each iteration is a new problem)."""
    correction: Correction | None = None
    """Importance weights for a sampler that is not the trainer; recomputes the old log-probs."""

    draw: Draw | None = None
    """Which problems a step draws; null shuffles."""
    max_tokens_steps: Annotated[tuple[Steps, ...], Field(min_length=1)] | None = None
    """max_tokens as a schedule: [[1, 32768], [8200, 65536]]."""
    repetition: Repetition | None = None
    """Stop rollouts that run in a circle."""

    lora: Lora | None = None
    """Train adapters instead of all weights."""
    bf16: bool = False
    """Run the model in bf16 (autocast); weights and optimizer stay fp32."""
    fp32_head: bool = False
    """Compute the logits in fp32 also under bf16 (MiniMax-M1)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    shard: bool = False
    """Shard weights, gradients and moments over the processes (FSDP2) instead of replicating them."""
    micro_batch_tokens: Count = 16384
    """Tokens per forward and backward pass; never changes the result."""

    eval_every: NonNegative = 0
    """Evaluate on dev problems every this many steps; 0 never."""
    eval_problems: Count = 100
    """At most this many dev problems per evaluation."""
    eval_samples: Count = 2
    """Completions per problem in an evaluation."""
    eval_max_tokens: Count | None = None
    """Longest completion of an evaluation in tokens [the largest of sampling.max_tokens, max_tokens and that of the
    pool which max_tokens is read off]: a smaller limit in training must not look like a loss of accuracy."""
    save_every: Count = 10
    """Write a checkpoint every this many steps."""
    keep: Literal["last", "best", "balance"] = "last"
    """Which weights the stage hands on: of the last step, of the best evaluation, or of the one that balances accuracy
    and tokens best against the starting model (AES)."""
    keep_models: bool = False
    """Keep the model of every evaluation as well; another stage names that of step 20 as STAGE@20."""
    stop_at_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop once the accuracy of an evaluation on dev problems reaches this."""

    def splits(self) -> tuple[Split, ...]:
        return ("train", "dev") if self.eval_every else ("train",)

    def more_models(self) -> tuple[str, ...]:
        if not self.keep_models or not self.eval_every:
            return ()
        return tuple(map(str, sorted({*range(self.eval_every, self.steps + 1, self.eval_every), self.steps})))

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.problems_per_step % self.updates_per_step:
            yield (
                "updates_per_step",
                f"{self.updates_per_step} does not divide problems_per_step ({self.problems_per_step})",
            )
        if self.keep != "last" and not self.eval_every:
            yield "keep", f"{self.keep} needs evaluations: set eval_every above 0, or keep: last"
        if self.eval_max_tokens is not None and not self.eval_every:
            yield "eval_max_tokens", "has no effect without evaluations: set eval_every above 0, or remove it"
        if self.keep_models and not self.eval_every:
            yield "keep_models", "keeps the models of evaluations: set eval_every above 0"
        if self.stop_at_accuracy is not None and not self.eval_every:
            yield "stop_at_accuracy", "needs evaluations: set eval_every above 0"
        if self.eval_every > self.steps:
            yield "eval_every", f"{self.eval_every} is more than steps ({self.steps}): it would never evaluate"
        if self.top_p is not None and self.top_p != 1:
            yield "top_p", f"must be 1 for RL, not {self.top_p}: under top-p the sampled log-probs are not the policy's"
        steps = self.max_tokens_steps
        if steps is not None:
            starts = [start for start, _ in steps]
            if starts[0] != 1 or sorted(set(starts)) != starts:
                yield "max_tokens_steps", f"the steps must start at 1 and rise, not {starts}"
        if self.draw is not None and self.draw.switch_step is not None and self.draw.switch_step > self.steps:
            yield "draw.switch_step", f"{self.draw.switch_step} is after the last step ({self.steps})"

    def problems_with_limits(self) -> Iterator[tuple[str, str]]:
        """What is wrong once max_tokens is known: the stage's own or the recipe's."""
        if self.max_tokens_steps and max(tokens for _, tokens in self.max_tokens_steps) != self.max_tokens:
            yield "max_tokens_steps", f"its largest must be max_tokens ({self.max_tokens}), the bound of every rollout"
