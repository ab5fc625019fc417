"""What each stage method may be told: one pydantic model per `method:` of a recipe.

Everything here is strict: an unknown key is an error, a text is never a number, a bool is never an int, NaN and
infinity do not exist. The docstring under a key is its description in the JSON schema (`reason recipes schema`). Checks
that need two keys of one stage are here as well; checks that need two stages, or the disk, are in recipes/schema.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from recipes.loader import likely

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
NonNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0, le=10)]
TopP = Annotated[float, Field(gt=0, le=1)]
Level = Annotated[int, Field(ge=1, le=16)]
Ref = Annotated[str, Field(min_length=1, max_length=1000)]
Split = Literal["train", "dev", "test"]
Overflow = Literal["refuse", "drop"]


class Keys(BaseModel):
    """Strict, frozen keys; `problems_with_keys` yields (key, message) for what only two keys together show."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from ()

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        found = list(self.problems_with_keys())
        if found:
            text = "; ".join(f"{key}: {message}" for key, message in found)
            raise PydanticCustomError("keys", "{text}", {"text": text, "found": found})
        return self


class StageKeys(Keys):
    """What every stage has in common: which of its keys name something to read, and what it makes.

    `REFERENCES` maps a key to what it must lead to; `MAKES` is what other stages can read from this one.
    """

    REFERENCES: ClassVar[dict[str, str]] = {}
    MAKES: ClassVar[str | None] = None
    method: Any

    def splits(self) -> tuple[Split, ...]:
        """The splits of the problem set that the stage reads, () if it reads none."""
        return ()


class SamplingKeys(StageKeys):
    """A stage that samples; the three keys default to the recipe's `sampling`."""

    temperature: Temperature | None = None
    """Softmax temperature of the sampler [sampling.temperature]."""
    top_p: TopP | None = None
    """Nucleus share of the sampler [sampling.top_p]."""
    max_tokens: Count | None = None
    """Longest completion in tokens, think and EOS included [sampling.max_tokens]."""


class Styles(Keys):
    """Weights of the styles in the base model's pre-training mixture; they need not sum to 1."""

    guess: Annotated[float, Field(ge=0)] = 0.0
    """Answers at once: shortest, often wrong."""
    plain: Annotated[float, Field(ge=0)] = 0.0
    """One recalled result a step: sometimes slips."""
    careful: Annotated[float, Field(ge=0)] = 0.0
    """Steps may be checked by working the digits: right and long."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.guess + self.plain + self.careful <= 0:
            yield "", "all weights are 0; give at least one of guess, plain, careful a weight above 0"


class Pretrain(StageKeys):
    """Train a tiny-world base model on demonstrations, from random weights or from `start`."""

    REFERENCES: ClassVar[dict[str, str]] = {"start": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["pretrain"]
    start: Ref | None = None
    """Model to go on from; null starts from random weights of the given size."""
    hidden: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Width of the model; required unless `start` is given."""
    layers: Annotated[int, Field(ge=1, le=128)] | None = None
    """Number of layers; required unless `start` is given."""
    heads: Annotated[int, Field(ge=1, le=128)] | None = None
    """Number of attention heads; required unless `start` is given."""
    steps: Count
    """Optimizer steps."""
    batch_size: Count = 256
    """Demonstrations per optimizer step."""
    learning_rate: Rate = 1e-3
    """Peak learning rate."""
    styles: Styles
    """Mixture of demonstration styles."""
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    """Difficulty levels of the demonstrations [problems.levels]."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        sizes = {"hidden": self.hidden, "layers": self.layers, "heads": self.heads}
        for key, value in sizes.items():
            if self.start is None and value is None:
                yield key, "required key is missing, because there is no `start` model to take the size from"
            if self.start is not None and value is not None:
                yield key, "the size comes from the `start` model; remove this key"
        if self.hidden and self.heads and self.hidden % (2 * self.heads):
            yield "hidden", f"{self.hidden} is not divisible by 2 x heads = {2 * self.heads} (rotary heads are even)"


class Length(Keys):
    """A length objective added to the reward of long2short RL."""

    objective: Literal["kimi"] = "kimi"
    """Kimi k1.5's length reward: 0.5 - (len - min) / (max - min) over the k samples of one prompt."""
    weight: Annotated[float, Field(ge=0, le=100)]
    """Weight of the length reward; 0 is the control."""
    warmup_steps: NonNegative = 0
    """Steps before the length reward is added."""
    min_spread: NonNegative = 0
    """Groups whose longest and shortest completion differ by fewer tokens than this get no length reward."""
    accuracy_floor: Share | None = None
    """In a step with a lower share of right completions there is no length reward."""


class Grpo(SamplingKeys):
    """GRPO with rule rewards: advantage r - group mean, clipped surrogate, token mean."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["grpo"]
    model: Ref
    """Model to start from: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    steps: Count
    """Rollout steps."""
    problems_per_step: Count = 16
    """Problems sampled per step."""
    group_size: Annotated[int, Field(ge=2, le=4096)] = 16
    """Completions per problem."""
    learning_rate: Rate = 1e-6
    """Learning rate (constant)."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's two decay rates."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    updates_per_step: Count = 1
    """Optimizer updates per rollout step; divides problems_per_step."""
    epsilon_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip of the probability ratio: 1 - epsilon_low."""
    epsilon_high: Annotated[float, Field(gt=0, le=100)] = 0.28
    """Upper clip of the probability ratio: 1 + epsilon_high."""
    normalize_std: bool = False
    """Divide advantages by the group's standard deviation (cancels the weight of a length reward)."""
    kl_coefficient: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Weight of the KL term against the starting model; 0 keeps no reference model."""
    reward_accuracy: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Reward of a right answer."""
    reward_format: Annotated[float, Field(ge=0, le=100)] = 0.1
    """Reward of the right format."""
    length: Length | None = None
    """Length objective added to the reward."""
    micro_batch_tokens: Count = 16384
    """Tokens (padding included) per forward and backward pass; never changes the result."""
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
        yield from self._problems_with_rewards()

    def _problems_with_rewards(self) -> Iterator[tuple[str, str]]:
        # A right answer must be worth more than any wrong one. The length reward lies in weight x [-0.5, 0.5] for right
        # answers and in weight x [-0.5, 0] for wrong ones; so the worst right answer has accuracy - weight / 2 and the
        # best wrong one has the format reward.
        margin = self.reward_accuracy - self.reward_format
        if margin <= 0:
            yield (
                "reward_format",
                f"{self.reward_format} is not below reward_accuracy ({self.reward_accuracy}): "
                "a wrong answer could be worth as much as a right one",
            )
        elif self.length is not None and self.length.weight >= 2 * margin:
            yield (
                "length.weight",
                f"must be below 2 x (reward_accuracy - reward_format) = {2 * margin:g}, not {self.length.weight:g}: "
                "a long right answer could be worth less than a wrong one",
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


class Sample(SamplingKeys):
    """Fill a pool: k completions of each problem, judged."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "pool"

    method: Literal["sample"]
    model: Ref
    """Model to sample from: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    problems: Split = "train"
    """Which split of the problems."""
    count: Count | None = None
    """At most this many problems; null takes all of the split."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    """Completions per problem."""

    def splits(self) -> tuple[Split, ...]:
        return (self.problems,)


class Traces(StageKeys):
    """Keep the correct, well-formed, untruncated completions of a pool as traces for SFT."""

    REFERENCES: ClassVar[dict[str, str]] = {"pool": "pool"}
    MAKES: ClassVar[str | None] = "traces"

    method: Literal["traces"]
    pool: Ref
    """The `sample` stage to read."""
    per_problem: Count = 4
    """At most this many traces per problem."""
    min_tokens: NonNegative = 0
    """Shorter completions are dropped and counted."""


class Shortest(StageKeys):
    """Shortest rejection sampling (Kimi k1.5): of n samples keep the shortest correct one."""

    REFERENCES: ClassVar[dict[str, str]] = {"pool": "pool"}
    MAKES: ClassVar[str | None] = "traces"

    method: Literal["shortest"]
    pool: Ref
    """The `sample` stage to read."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    """Choose among the first this many samples of each problem."""
    majority: bool = False
    """Drop a problem if one wrong answer was given more often than the right one: its shortest may be a lucky guess."""
    min_tokens: NonNegative = 0
    """Shorter completions are not chosen."""


class Sft(StageKeys):
    """Supervised fine-tuning on traces."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "traces": "traces"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["sft"]
    model: Ref
    """Model to fine-tune: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    traces: Ref
    """The `traces` or `shortest` stage to read."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 2
    """Passes over the traces."""
    learning_rate: Rate = 1e-5
    """Peak learning rate (cosine)."""
    batch_size: Count = 64
    """Traces per optimizer step."""
    max_length: Count
    """Longest prompt plus trace in tokens; never cut silently."""
    overflow: Overflow = "refuse"
    """What to do with a longer row: refuse the run, or drop and count it."""
    warmup_ratio: Share = 0.1
    """Share of the steps over which the learning rate rises."""
    min_lr_ratio: Share = 0.1
    """The learning rate ends at this share of its peak."""
    save_every: Count = 100
    """Write a checkpoint every this many optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay of AdamW."""


class Pairs(StageKeys):
    """Preference pairs (Kimi k1.5): chosen the shortest correct, rejected longer wrong and much longer correct ones."""

    REFERENCES: ClassVar[dict[str, str]] = {"pool": "pool"}
    MAKES: ClassVar[str | None] = "pairs"

    method: Literal["pairs"]
    pool: Ref
    """The `sample` stage to read."""
    min_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.5
    """A correct completion is rejected when it is at least this many times as long as the chosen one."""
    per_problem: Count = 4
    """At most this many pairs per problem."""


class Dpo(StageKeys):
    """Direct preference optimisation on pairs."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "pairs": "pairs"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["dpo"]
    model: Ref
    """Model to start from, also the reference model: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    pairs: Ref
    """The `pairs` stage to read."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Strength of the pull towards the reference model."""
    learning_rate: Rate = 1e-6
    """Peak learning rate."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Passes over the pairs."""
    batch_size: Count = 32
    """Pairs per optimizer step."""
    max_length: Count
    """Longest prompt plus completion in tokens; never cut silently."""
    overflow: Overflow = "refuse"
    """What to do with a longer row: refuse the run, or drop and count it."""
    save_every: Count = 100
    """Write a checkpoint every this many optimizer steps."""


class Merge(StageKeys):
    """Average the weights of a long-CoT and a short-CoT model."""

    REFERENCES: ClassVar[dict[str, str]] = {"long": "model", "short": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["merge"]
    long: Ref
    """The long-CoT model: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    short: Ref
    """The short-CoT model, a relative of the long one."""
    weight: Share
    """Share of the long model: 1 gives the long model, 0 the short one."""


class Select(SamplingKeys):
    """Choose among candidates on dev problems: the fewest tokens within a tolerance of the parent's accuracy."""

    REFERENCES: ClassVar[dict[str, str]] = {"candidates": "model", "parent": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["select"]
    candidates: Annotated[tuple[Ref, ...], Field(min_length=1, max_length=100)]
    """The models to choose among."""
    parent: Ref
    """The model whose accuracy is to be kept."""
    tolerance: Share = 0.02
    """How far below the parent's dev accuracy a candidate may be."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 2
    """Completions per problem."""
    count: Count | None = None
    """At most this many dev problems; null takes all."""

    def splits(self) -> tuple[Split, ...]:
        return ("dev",)

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        repeated = sorted({ref for ref in self.candidates if self.candidates.count(ref) > 1})
        if repeated:
            yield "candidates", f"names {repeated[0]} more than once"


class Evaluate(SamplingKeys):
    """Sample a model on problems and summarise accuracy and tokens."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "evaluation"

    method: Literal["evaluate"]
    model: Ref
    """Model to evaluate: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    problems: Split = "test"
    """Which split of the problems."""
    count: Count | None = None
    """At most this many problems; null takes all of the split."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 4
    """Completions per problem."""

    def splits(self) -> tuple[Split, ...]:
        return (self.problems,)


class Frontier(SamplingKeys):
    """Evaluate every arm on the same problems and compare them: one table, plot and page."""

    REFERENCES: ClassVar[dict[str, str]] = {"arms": "model"}
    MAKES: ClassVar[str | None] = "frontier"

    method: Literal["frontier"]
    arms: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")], Ref], Field(min_length=1)]
    """The models to compare, by the name they get in the table."""
    parent: str
    """The arm that differences are taken against."""
    compare: tuple[tuple[str, str], ...] = ()
    """Further pairs of arms to compare on the same problems, such as [distilled, rl]."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 4
    """Completions per problem."""
    problems: Split = "test"
    """Which split of the problems."""
    count: Count | None = None
    """At most this many problems; null takes all of the split."""

    def splits(self) -> tuple[Split, ...]:
        return (self.problems,)

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.parent not in self.arms:
            yield "parent", f"{self.parent!r} is not one of the arms{likely(self.parent, self.arms)}"
        for arm in sorted({arm for pair in self.compare for arm in pair} - self.arms.keys()):
            yield "compare", f"{arm!r} is not one of the arms{likely(arm, self.arms)}"


AnyStage = (
    Pretrain | Grpo | LengthRl | Sample | Traces | Shortest | Sft | Pairs | Dpo | Merge | Select | Evaluate | Frontier
)
METHOD_KEYS: dict[str, type[StageKeys]] = {
    "pretrain": Pretrain,
    "grpo": Grpo,
    "length_rl": LengthRl,
    "sample": Sample,
    "traces": Traces,
    "shortest": Shortest,
    "sft": Sft,
    "pairs": Pairs,
    "dpo": Dpo,
    "merge": Merge,
    "select": Select,
    "evaluate": Evaluate,
    "frontier": Frontier,
}
