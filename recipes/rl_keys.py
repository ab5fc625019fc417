"""What an RL stage may be told: the keys of `method: grpo` and `method: length_rl`.

The keys name one choice for each slot of a policy-gradient method: how the ratio is taken, how it is clipped or
weighted, what is averaged over, which baseline, which KL. `preset:` fills them in as a paper has them
(recipes/presets.py); a key that is written beside a preset wins over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from recipes.keys import MAPPING, PLAIN, Count, Keys, NonNegative, Ref, Share, plain_or_mapping
from recipes.length_keys import Length
from recipes.policy_keys import PolicyKeys, Positive, Weight
from recipes.presets import PresetName
from recipes.problem_keys import Url, Variable, is_path
from rl.language import LANGUAGES

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


class Kl(Keys):
    """A KL term towards a reference model, which starts as the starting model."""

    coefficient: Annotated[float, Field(gt=0, le=100)]
    """Weight of the term."""
    estimator: Literal["k1", "k2", "k3", "k3-corrected"] = "k3-corrected"
    """k1 goes into the reward; k2, k3 and k3-corrected (times the ratio) into the loss."""
    refresh_every: NonNegative = 0
    """The reference becomes the policy every this many optimizer updates (R1: 400); 0 never."""


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
    """preference: a stage, a folder (./ ../ /) or a hub id of a sequence classifier; otherwise the model's name at the
    url."""
    url: Url | None = None
    """helpfulness, safety: base URL of an OpenAI-compatible endpoint."""
    key_variable: Variable | None = None
    """Environment variable that holds the endpoint's key."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.url is None) != (self.kind == "preference"):
            yield "url", "helpfulness and safety need it, preference does not take it"


class General(Keys):
    """General prompts among the problems of the last steps; the reward models then score them alone (R1, second RL
    stage)."""

    prompts: Ref
    """A stage that makes traces, whose questions are the prompts, or a JSONL file of questions (./ ../ / or
    $NAME/...)."""
    from_share: Annotated[float, Field(ge=0, lt=1)] = 0.75
    """Share of the steps before the first one with general prompts (R1: 1,300 of 1,700)."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the prompts of such a step that are general."""


class Partial(Keys):
    """Partial rollouts (Kimi k1.5, section 2.6): a completion that is not done goes on in the next step."""

    budget: Count
    """Tokens a completion may grow by in one step."""
    train_old_segments: bool = True
    """Whether tokens drawn by an earlier policy are in the loss."""


class Grpo(PolicyKeys):
    """GRPO and its relatives, with rule rewards."""

    method: Literal["grpo"]
    preset: PresetName | None = None
    """Fill in the keys as a paper has them; keys written beside it win."""
    template: Literal["r1-zero"] | None = None
    """Prompt template for a model that has none of its own; it is saved with the model."""

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
    general: General | None = None
    """General prompts, which no verifier judges, in the last steps."""
    length: Length | None = None
    """Length objective added to the reward."""
    soft_overlong: Count | None = None
    """Tokens before max_tokens in which the reward falls linearly by up to 1 (DAPO)."""
    mask_truncated: bool = False
    """Leave completions that ran into max_tokens out of the loss (DAPO's overlong filtering)."""

    dynamic_rounds: Annotated[int, Field(ge=0, le=64)] = 0
    """Sample further problems, in at most so many rounds, until the batch is full of groups with signal; 0 off."""
    partial: Partial | None = None
    """Partial rollouts."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_keys()
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
        if self.max_tokens_steps is not None and self.soft_overlong is not None:
            yield "soft_overlong", "cannot be used with max_tokens_steps: the limit it is measured from would move"
        if self.general is not None and not self.reward_models:
            yield "general", "nothing would pay for them: give reward_models as well"
        if self.general is not None and self.problems_per_step * self.general.share < 1:
            yield (
                "general.share",
                f"{self.general.share} of {self.problems_per_step} problems_per_step is less than one",
            )
        if self.partial is not None and self.dynamic_rounds:
            yield "dynamic_rounds", "cannot be used with partial: a group that is not done has no reward yet"
        if self.dynamic_rounds and self.length is not None and self.length.accuracy_floor is not None:
            yield "length.accuracy_floor", "cannot be used with dynamic_rounds: a round is not the step's accuracy"
        if self.length is not None:
            yield from self.length.problems_with_stage(self.eval_every, self.group_size)

    def problems_with_limits(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_limits()
        assert self.max_tokens is not None
        if self.soft_overlong is not None and self.soft_overlong >= self.max_tokens:
            yield "soft_overlong", f"{self.soft_overlong} is not below max_tokens ({self.max_tokens})"
        if self.length is not None:
            yield from self.length.problems_with_limit(self.max_tokens)
        if self.partial is not None and self.partial.budget >= self.max_tokens:
            yield "partial.budget", f"{self.partial.budget} is not below max_tokens ({self.max_tokens}); remove partial"

    def nested_references(self) -> Iterator[tuple[str, str, str]]:
        if self.length is not None and self.length.reference is not None:
            yield "length.reference", self.length.reference, "pool"
        if self.general is not None:
            ref = self.general.prompts
            yield "general.prompts", ref, "file" if is_path(ref) or ref.startswith("$") else "traces"
        for index, reward in enumerate(self.reward_models):
            if reward.kind == "preference":
                yield f"reward_models[{index}].model", reward.model, "preference model"

    def _problems_with_rewards(self) -> Iterator[tuple[str, str]]:
        # A right answer must be worth more than any wrong one, where the length objective has a bound for its weight:
        # Kimi's lies in weight x [-0.5, 0.5] for right answers and in weight x [-0.5, 0] for wrong ones, so the worst
        # right answer has accuracy - weight / 2 and the best wrong one has the format reward (and the language reward;
        # R1's own weights, 1 + 1 + 1, give that up, so it counts only where a length reward makes it worse).
        margin = self.reward_accuracy - self.reward_format
        language = 0.0 if self.reward_language is None else self.reward_language.weight
        if margin < 0 or (margin == 0 and self.length is not None):
            yield (
                "reward_format",
                f"{self.reward_format} is not below reward_accuracy ({self.reward_accuracy}): "
                "a wrong answer could be worth as much as a right one",
            )
        elif self.length is not None:
            yield from self.length.problems_with_weight(
                self.reward_accuracy, self.reward_format, language, self.advantage
            )
        if self.length is not None and self.length.warmup_steps >= self.steps:
            yield (
                "length.warmup_steps",
                f"{self.length.warmup_steps} is not below steps ({self.steps}): the length reward would never start",
            )


class FromPool(Keys):
    """A token limit that is read off a pool: a percentile of the lengths of its right completions."""

    percentile: Annotated[float, Field(gt=0, le=100)]
    """Share of the right completions, in percent, that fit into the limit."""
    pool: Ref
    """The `sample` stage to read; its samples are of the model that is to be shortened."""


TokenLimit = Annotated[
    Annotated[Count, Tag(PLAIN)] | Annotated[FromPool, Tag(MAPPING)], Discriminator(plain_or_mapping)
]


class Collapse(Keys):
    """What is watched so that a length squeeze does not end in guessing; each figure over the last steps, null: not."""

    action: Literal["stop", "warn"] = "stop"
    """stop: the stage ends with the last model that was well. warn: it only says so."""
    window: Count = 5
    """Steps over which a figure is averaged."""
    accuracy_floor: Share | None = None
    """Lowest accuracy of a window's batches, and of an evaluation."""
    accuracy_margin: Share | None = 0.2
    """How far it may fall below that of the first window, or of the starting model's evaluation, but never to less than
    half of it. Batches are not compared where draw or dynamic_rounds choose problems by success."""
    empty_think: Share | None = 0.5
    """Highest share of completions without a thought. Neither this nor guess_rate is held against a model that writes
    no think tags in the first window, under a template that opens none; a warning says so."""
    guess_rate: Share | None = 0.5
    """Highest share of completions that end by themselves after a thought of fewer than guess_tokens tokens."""
    guess_tokens: Count = 8
    """An answer after a shorter thought is a guess; so is a shorter completion that never closes its thought."""
    spread: Annotated[float, Field(ge=0)] | None = 1.0
    """Tokens between the longest and the shortest completion of a problem below which there is a warning."""
    entropy: Annotated[float, Field(ge=0)] | None = None
    """Nats per token below which there is a warning."""


class LengthRl(Grpo):
    """long2short RL: GRPO from a given model, with a length objective and a smaller token budget (Kimi k1.5, 2.4)."""

    method: Literal["length_rl"]  # pyright: ignore[reportIncompatibleVariableOverride]
    max_tokens: TokenLimit | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Longest completion in tokens, or {percentile: 75, pool: STAGE}: as long as that share of right ones is
    [sampling.max_tokens]."""
    length: Length  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    """Length objective added to the reward."""
    tolerance: Share = 0.02
    """With keep: best, how far below the starting model's dev accuracy the kept one may be; the briefest is kept."""
    collapse: Collapse | None = Collapse()
    """What is watched, and what happens when it shows; null watches nothing."""

    def nested_references(self) -> Iterator[tuple[str, str, str]]:
        yield from super().nested_references()
        if isinstance(self.max_tokens, FromPool):
            yield "max_tokens.pool", self.max_tokens.pool, "pool"

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_keys()
        if isinstance(self.max_tokens, FromPool) and self.max_tokens_steps is not None:
            yield "max_tokens_steps", "cannot be used with max_tokens from a pool, which is not known yet"

    def problems_with_limits(self) -> Iterator[tuple[str, str]]:
        if not isinstance(self.max_tokens, FromPool):  # else they are looked for when the stage runs
            yield from super().problems_with_limits()
