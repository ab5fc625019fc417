"""What an RL stage may be told: the keys of `method: grpo` and `method: length_rl`.

The keys name one choice for each slot of a policy-gradient method: how the ratio is taken, how it is clipped or
weighted, what is averaged over, which baseline, which KL. `preset:` fills them in as a paper has them
(recipes/presets.py); a key that is written beside a preset wins over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, Keys, NonNegative, Rate, Ref, SamplingKeys, Share, Split
from recipes.presets import PresetName
from recipes.problem_keys import Url, Variable
from rl.language import LANGUAGES

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=100)]
Steps = tuple[Count, Count]

# Which keys only one loss, one advantage or one correction reads: written beside another one they are a mistake.
OF_LOSS = {
    "epsilon_low": ("clip",),
    "epsilon_high": ("clip",),
    "dual_clip": ("clip",),
    "delta": ("clip",),
    "ratio_cap": ("cispo",),
    "ratio": ("clip", "cispo", "sapo"),
    "tau": ("mirror-descent",),
}


class Length(Keys):
    """A length objective added to the reward of long2short RL."""

    objective: Literal["kimi"] = "kimi"
    """Kimi k1.5's length reward: 0.5 - (len - min) / (max - min) over the k samples of one prompt."""
    weight: Weight
    """Weight of the length reward; 0 is the control."""
    warmup_steps: NonNegative = 0
    """Steps before the length reward is added."""
    min_spread: NonNegative = 0
    """Groups whose longest and shortest completion differ by fewer tokens than this get no length reward."""
    accuracy_floor: Share | None = None
    """In a step with a lower share of right completions there is no length reward."""


class Kl(Keys):
    """A KL term towards a reference model, which starts as the starting model."""

    coefficient: Annotated[float, Field(gt=0, le=100)]
    """Weight of the term."""
    estimator: Literal["k1", "k2", "k3", "k3-corrected"] = "k3-corrected"
    """k1 goes into the reward; k2, k3 and k3-corrected (times the ratio) into the loss."""
    refresh_every: NonNegative = 0
    """The reference becomes the policy every this many optimizer updates (R1: 400); 0 never."""


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


class RewardLanguage(Keys):
    """Share of the thought's words that are in the target language (R1, RL stage 1); abstains on short thoughts."""

    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Weight of the share."""
    target: str = "question"
    """The language of the question, or an ISO 639-1 code such as en."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.target != "question" and self.target not in LANGUAGES:
            yield (
                "target",
                f"{self.target[:40]!r} is neither question nor a known language ({', '.join(sorted(LANGUAGES))})",
            )


class RewardRepetition(Keys):
    """Minus the share of n-grams of tokens that occurred before in the completion."""

    weight: Annotated[float, Field(gt=0, le=100)]
    """Weight of the share."""
    ngram: Annotated[int, Field(ge=2, le=1000)] = 40
    """Tokens of an n-gram. Below 20 long thoughts pay for being long."""


class RewardModel(Keys):
    """A model's score of every completion, added to the rule rewards (R1, second RL stage)."""

    kind: Literal["preference", "helpfulness", "safety"]
    """preference: a reward model with one output, on the summary. helpfulness and safety: a judging model behind an
    endpoint, on the summary and on the whole response."""
    weight: Annotated[float, Field(gt=0, le=100)]
    """Weight of the score."""
    model: Ref
    """preference: a folder (./ ../ /) or a hub id of a sequence classifier; otherwise the model's name at the url."""
    url: Url | None = None
    """helpfulness, safety: base URL of an OpenAI-compatible endpoint."""
    key_variable: Variable | None = None
    """Environment variable that holds the endpoint's key."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.url is None) != (self.kind == "preference"):
            yield "url", "helpfulness and safety need it, preference does not take it"


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


class Partial(Keys):
    """Partial rollouts (Kimi k1.5, section 2.6): a completion that is not done goes on in the next step."""

    budget: Count
    """Tokens a completion may grow by in one step."""
    train_old_segments: bool = True
    """Whether tokens drawn by an earlier policy are in the loss."""


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


class Grpo(SamplingKeys):
    """GRPO and its relatives, with rule rewards."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["grpo"]
    preset: PresetName | None = None
    """Fill in the keys as a paper has them; keys written beside it win."""
    model: Ref
    """Model to start from: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    steps: Count
    """Rollout steps."""
    problems_per_step: Count = 16
    """Problems sampled per step."""
    group_size: Annotated[int, Field(ge=2, le=4096)] = 16
    """Completions per problem."""
    template: Literal["r1-zero"] | None = None
    """Prompt template for a model that has none of its own; it is saved with the model."""

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

    loss: Literal["clip", "cispo", "sapo", "mirror-descent"] = "clip"
    """clip: PPO's clip. cispo: clipped weight. sapo: soft gate. mirror-descent: Kimi k1.5's surrogate."""
    ratio: Literal["token", "sequence", "sequence-mean"] = "token"
    """Probability ratio per token, of the whole completion (R1), or its geometric mean per token (GSPO).
    mirror-descent always takes that of the whole completion."""
    aggregation: Literal["tokens", "sequences", "sequence-sums", "constant"] = "tokens"
    """Mean over the batch's tokens (DAPO), over completions of their token means (GRPO) or of their sums, or divided by
    completions x max_tokens (Dr.GRPO)."""
    epsilon_low: Annotated[float, Field(gt=0, le=100)] = 0.2
    """Lower clip of the ratio: 1 - epsilon_low; from 1 on there is none."""
    epsilon_high: Annotated[float, Field(gt=0, le=100)] = 0.28
    """Upper clip of the ratio: 1 + epsilon_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of a negative advantage: this times its size."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """Bound on the unclipped ratio (two-sided clip)."""
    ratio_cap: Annotated[float, Field(gt=1)] = 5.0
    """cispo: the absolute cap of the ratio."""
    tau: Annotated[float, Field(ge=0)] | None = None
    """mirror-descent: weight of the squared log-ratio; required."""
    off_policy_mask: Positive | None = None
    """Leave out completions with a negative advantage whose mean log-ratio sampler/policy is above this (nats)."""
    correction: Correction | None = None
    """Importance weights for a sampler that is not the trainer; recomputes the old log-probs."""
    advantage: Literal["mean", "std", "std-population", "batch-std", "leave-one-out", "gdpo", "log-partition"] = "mean"
    """Reward minus group mean, also divided by the group's or the batch's deviation; minus the mean of the others; each
    reward normalised by itself; Kimi's exact log Z."""
    kl: Kl | None = None
    """KL term; null keeps no reference model."""

    reward_accuracy: Weight = 1.0
    """Reward of a right answer."""
    reward_format: Weight = 0.1
    """Reward of the right format."""
    reward_language: RewardLanguage | None = None
    """Reward of a thought in the target language."""
    reward_repetition: RewardRepetition | None = None
    """Penalty for n-grams that repeat."""
    reward_models: Annotated[tuple[RewardModel, ...], Field(max_length=8)] = ()
    """Rewards from models."""
    length: Length | None = None
    """Length objective added to the reward."""
    soft_overlong: Count | None = None
    """Tokens before max_tokens in which the reward falls linearly by up to 1 (DAPO)."""
    mask_truncated: bool = False
    """Leave completions that ran into max_tokens out of the loss (DAPO's overlong filtering)."""

    draw: Draw | None = None
    """Which problems a step draws; null shuffles."""
    dynamic_rounds: Annotated[int, Field(ge=0, le=64)] = 0
    """Sample further problems, in at most so many rounds, until the batch is full of groups with signal; 0 off."""
    max_tokens_steps: Annotated[tuple[Steps, ...], Field(min_length=1)] | None = None
    """max_tokens as a schedule: [[1, 32768], [8200, 65536]]."""
    partial: Partial | None = None
    """Partial rollouts."""
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
    save_every: Count = 10
    """Write a checkpoint every this many steps."""
    keep: Literal["last", "best"] = "last"
    """Which weights the stage hands on: of the last step, or of the best evaluation."""
    stop_at_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop once the accuracy of an evaluation on dev problems reaches this."""

    def splits(self) -> tuple[Split, ...]:
        return ("train", "dev") if self.eval_every else ("train",)

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.problems_per_step % self.updates_per_step:
            yield (
                "updates_per_step",
                f"{self.updates_per_step} does not divide problems_per_step ({self.problems_per_step})",
            )
        if self.keep == "best" and not self.eval_every:
            yield "keep", "best needs evaluations: set eval_every above 0, or keep: last"
        if self.stop_at_accuracy is not None and not self.eval_every:
            yield "stop_at_accuracy", "needs evaluations: set eval_every above 0"
        if self.eval_every > self.steps:
            yield "eval_every", f"{self.eval_every} is more than steps ({self.steps}): it would never evaluate"
        if self.top_p is not None and self.top_p != 1:
            yield "top_p", f"must be 1 for RL, not {self.top_p}: under top-p the sampled log-probs are not the policy's"
        yield from self._problems_with_objective()
        yield from self._problems_with_sampling()
        yield from self._problems_with_rewards()

    def _problems_with_objective(self) -> Iterator[tuple[str, str]]:
        for key, losses in OF_LOSS.items():
            if self.loss not in losses and getattr(self, key) != type(self).model_fields[key].default:
                yield key, f"has no effect with loss: {self.loss}; remove it"
        if self.loss == "mirror-descent":
            if self.tau is None:
                yield "tau", "required key is missing: the weight of the squared log-ratio (Kimi prints none; try 0.01)"
            if self.aggregation != "sequence-sums":
                yield "aggregation", "mirror-descent sums over a completion: give aggregation: sequence-sums"
        if self.advantage == "log-partition" and not self.tau:
            yield "advantage", "log-partition takes its tau, above 0, from loss: mirror-descent"
        if self.delta is not None and self.delta <= 1 + self.epsilon_high:
            yield "delta", f"must be above 1 + epsilon_high = {1 + self.epsilon_high:g}, not {self.delta:g}"
        if self.ratio == "sequence" and self.aggregation != "sequences":
            yield "ratio", "with one ratio for the whole completion each completion is one term: aggregation: sequences"
        if self.advantage == "gdpo" and self.kl is not None and self.kl.estimator == "k1":
            yield "kl.estimator", "k1 is added to the reward, whose scale gdpo takes away; use k2, k3 or k3-corrected"
        if self.lora is not None and self.kl is not None and self.kl.refresh_every:
            yield "kl.refresh_every", "cannot be used with lora: the reference is the model without its adapters"
        if self.dual_clip is not None and self.delta is not None:
            yield "delta", "bounds the same thing as dual_clip; give one of them"

    def _problems_with_sampling(self) -> Iterator[tuple[str, str]]:
        steps = self.max_tokens_steps
        if steps is not None:
            starts = [start for start, _ in steps]
            if starts[0] != 1 or sorted(set(starts)) != starts:
                yield "max_tokens_steps", f"the steps must start at 1 and rise, not {starts}"
        if steps is not None and self.soft_overlong is not None:
            yield "soft_overlong", "cannot be used with max_tokens_steps: the limit it is measured from would move"
        if self.partial is not None and self.dynamic_rounds:
            yield "dynamic_rounds", "cannot be used with partial: a group that is not done has no reward yet"
        if self.dynamic_rounds and self.length is not None and self.length.accuracy_floor is not None:
            yield "length.accuracy_floor", "cannot be used with dynamic_rounds: a round is not the step's accuracy"
        if self.draw is not None and self.draw.switch_step is not None and self.draw.switch_step > self.steps:
            yield "draw.switch_step", f"{self.draw.switch_step} is after the last step ({self.steps})"

    def problems_with_limits(self) -> Iterator[tuple[str, str]]:
        """What is wrong once max_tokens is known: the stage's own or the recipe's."""
        assert self.max_tokens is not None
        if self.max_tokens_steps and max(tokens for _, tokens in self.max_tokens_steps) != self.max_tokens:
            yield "max_tokens_steps", f"its largest must be max_tokens ({self.max_tokens}), the bound of every rollout"
        if self.soft_overlong is not None and self.soft_overlong >= self.max_tokens:
            yield "soft_overlong", f"{self.soft_overlong} is not below max_tokens ({self.max_tokens})"
        if self.partial is not None and self.partial.budget >= self.max_tokens:
            yield "partial.budget", f"{self.partial.budget} is not below max_tokens ({self.max_tokens}); remove partial"

    def _problems_with_rewards(self) -> Iterator[tuple[str, str]]:
        # A right answer must be worth more than any wrong one. The length reward lies in weight x [-0.5, 0.5] for right
        # answers and in weight x [-0.5, 0] for wrong ones; so the worst right answer has accuracy - weight / 2 and the
        # best wrong one has the format reward (and the language reward; R1's own weights, 1 + 1 + 1, give that up, so
        # it counts only where a length reward makes it worse).
        margin = self.reward_accuracy - self.reward_format
        language = 0.0 if self.reward_language is None else self.reward_language.weight
        if margin < 0 or (margin == 0 and self.length is not None):
            yield (
                "reward_format",
                f"{self.reward_format} is not below reward_accuracy ({self.reward_accuracy}): "
                "a wrong answer could be worth as much as a right one",
            )
        elif self.length is not None and self.length.weight >= 2 * (margin - language):
            less = "reward_format" if not language else "reward_format - reward_language.weight"
            yield (
                "length.weight",
                f"must be below 2 x (reward_accuracy - {less}) = {2 * (margin - language):g}, "
                f"not {self.length.weight:g}: a long right answer could be worth less than a wrong one",
            )
        if self.length is not None and self.length.warmup_steps >= self.steps:
            yield (
                "length.warmup_steps",
                f"{self.length.warmup_steps} is not below steps ({self.steps}): the length reward would never start",
            )


class LengthRl(Grpo):
    """long2short RL: GRPO from a given model, with a length objective and a smaller token budget."""

    method: Literal["length_rl"]  # pyright: ignore[reportIncompatibleVariableOverride]
    length: Length  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    """Length objective added to the reward."""
    tolerance: Share = 0.02
    """With keep: best, how far below the starting model's dev accuracy the kept one may be; the briefest is kept."""
