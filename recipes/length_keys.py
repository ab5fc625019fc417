"""The keys of `length:` in an RL stage: a length objective, its parameters, and what stands around it.

    length: {objective: kimi, weight: 0.3, min_spread: 4, gate: any-right}
    length: {objective: laser-d, weight: 0.5, every: 10, warmup_steps: 20, ramp_steps: 20}
    length: {objective: arora-zanette, weight: 0.0, target_drop: 0.02, max_weight: 0.8}

A parameter that the chosen objective does not read is refused by name. The objectives, with the formulas and the
papers' weights, are in long2short/length_objectives.py and long2short/length_limits.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from recipes.keys import Count, Keys, NonNegative, Ref, Share

if TYPE_CHECKING:
    from long2short.length_catalog import Chosen
    from long2short.length_reward import Gate

ObjectiveName = Literal[
    "kimi", "lcpo-exact", "lcpo-max", "lcpo-max-code", "o1-pruner", "thinkprune", "shorter-better", "arora-zanette",
    "dast", "alp", "laser", "laser-d", "laser-de", "hapo", "gfpo", "lc-r1", "cosine", "soft-overlong", "dler", "toggle",
    "prime-linear",
]  # fmt: skip
Weight = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0, le=1_000_000)]

GFPO = "gfpo"
OF_GFPO = ("keep", "prefer")  # GFPO is a filter of completions, not a reward
AROUND = ("warmup_steps", "ramp_steps", "gate", "min_spread", "accuracy_floor", "scope", "reference")
OF_DUAL = ("target_accuracy", "target_drop", "max_weight", "weight_rate", "accuracy_of")
WHOLE_LIMIT = "max_tokens"  # taken from the stage where it is not given
UNBOUNDED = 10**9  # stands for it where no stage is known


class Length(Keys):
    """A length objective added to the reward of long2short RL."""

    objective: ObjectiveName = "kimi"
    """Which rule. kimi: 0.5 - (len - min) / (max - min) over the k samples of one prompt; `reason preview` has all."""
    weight: Weight | None = None
    """Weight of the length reward; 0 is the control. Required, but for gfpo, which has none."""
    scope: Literal["total", "think", "answer"] = "total"
    """Which tokens count: all, those up to </think>, or those after it."""
    warmup_steps: NonNegative = 0
    """Steps before the length reward is added."""
    ramp_steps: NonNegative = 0
    """Steps after the warm-up over which it rises to its weight; 0: at once, as Kimi does."""
    gate: Literal["none", "any-right"] = "none"
    """any-right: a group without a right completion gets no length reward."""
    min_spread: NonNegative = 0
    """Groups whose longest and shortest completion differ by fewer tokens than this get no length reward."""
    accuracy_floor: Share | None = None
    """In a step with a lower share of right completions there is no length reward."""
    reference: Ref | None = None
    """o1-pruner, toggle, hapo, laser-d, laser-de: a pool stage of the starting model, whose lengths they start from;
    null: those of the run's own first groups."""

    target_accuracy: Share | None = None
    """Steer the weight so that the accuracy comes down to this and stays: up above it, down below it."""
    target_drop: Share | None = None
    """The same, with the target this far below the starting model's accuracy on dev problems."""
    accuracy_of: Literal["rollouts", "dev"] | None = None
    """Which accuracy steers: of each step's rollouts, or of each evaluation [rollouts; dev with target_drop]."""
    max_weight: Annotated[float, Field(gt=0, le=100)] | None = None
    """With a target: the largest weight; required."""
    weight_rate: Positive | None = None
    """With a target: a step moves the weight by this x max_weight x (accuracy - target) [1]."""

    target: Count | None = None
    """lcpo-exact, lcpo-max, lcpo-max-code: wanted tokens [what question or prompt_suffix state: "Think for 512 tokens."
    for lcpo-exact, "Think for maximum 512 tokens." for the others]. laser: the target; required."""
    alpha: Positive | None = None
    """lcpo-max, lcpo-max-code: price of a token beyond the target [0.0003]."""
    delta: Share | None = None
    """lcpo-max: worth of a right answer exactly at the target [0.5]."""
    limits: Annotated[tuple[tuple[Count, Count], ...], Field(min_length=1)] | None = None
    """thinkprune: the limit as a schedule, [[1, 4000], [100, 3000], [200, 2000]]; required."""
    max_tokens: Count | None = None
    """dast, cosine, soft-overlong: the longest length [max_tokens of the stage]."""
    buffer: Count | None = None
    """soft-overlong: tokens before max_tokens in which the value falls from 0 to -1; required."""
    exceed: Annotated[float, Field(ge=-100, le=0)] | None = None
    """cosine: reward of an answer that is longer than max_tokens or ran out of tokens [-10]."""
    floor: Annotated[float, Field(ge=-1, le=0)] | None = None
    """hapo: the lowest value of a right answer [-0.7]."""
    factor: Share | None = None
    """dler: what a right answer that ran out of tokens keeps of its reward [0.1]."""
    accuracy: Share | None = None
    """toggle: the share of right completions from which on a budget holds [0.5]."""
    period: Count | None = None
    """toggle: steps with a budget, then as many without one [10]."""
    percentile: Annotated[float, Field(ge=0, le=100)] | None = None
    """toggle: the budget as a percentile of the right lengths when the problem is first seen [50]."""
    every: Count | None = None
    """laser-d, laser-de: steps between estimates of the targets [20]."""
    keep: Count | None = None
    """gfpo: completions of a group that are learnt from; required."""
    prefer: Literal["shortest", "efficient"] | None = None
    """gfpo: keep the shortest, or those with the most reward a token [shortest]."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        from long2short.length_catalog import remembers, required

        known = reads(self.objective)
        for key in PARAMETERS:
            if getattr(self, key) is not None and key not in known:
                rest = f", which reads {', '.join(known)}" if known else ", which has no parameters"
                yield key, f"has no effect with objective: {self.objective}{rest}; remove it"
        needed = ["keep"] if self.objective == GFPO else [key for key in required(self.objective) if key != WHOLE_LIMIT]
        for key in needed:
            if getattr(self, key) is None:
                yield key, f"required key is missing: objective {self.objective} needs it"
        if self.limits is not None and (
            self.limits[0][0] != 1 or sorted(dict(self.limits)) != [s for s, _ in self.limits]
        ):
            yield "limits", f"the steps must start at 1 and rise, not {[step for step, _ in self.limits]}"
        if self.objective == GFPO:
            for key in ("weight", *AROUND, *OF_DUAL):
                if getattr(self, key) != type(self).model_fields[key].default:
                    yield key, "has no effect with objective: gfpo, which keeps completions and adds nothing; remove it"
            return
        if self.weight is None:
            yield "weight", "required key is missing (Weight of the length reward; 0 is the control)"
        if self.reference is not None and not remembers(self.objective):
            yield "reference", f"has no effect with objective: {self.objective}, which remembers nothing; remove it"
        yield from self._problems_with_target()

    def _problems_with_target(self) -> Iterator[tuple[str, str]]:
        if not self.steered:
            for key in OF_DUAL[2:]:
                if getattr(self, key) is not None:
                    yield key, "steers the weight towards a target: give target_accuracy or target_drop, or remove it"
            return
        if self.target_accuracy is not None and self.target_drop is not None:
            yield "target_drop", "says the same as target_accuracy; give one of them"
        if self.target_drop is not None and self.accuracy_of == "rollouts":
            yield "accuracy_of", "target_drop compares evaluations on dev problems; write dev, or target_accuracy"
        if self.max_weight is None:
            yield "max_weight", "required key is missing: the bound of the weight that is steered"
        elif self.weight is not None and self.weight > self.max_weight:
            yield "weight", f"{self.weight:g} is above max_weight ({self.max_weight:g})"

    @property
    def steered(self) -> bool:
        """Whether the weight follows the accuracy."""
        return self.target_accuracy is not None or self.target_drop is not None

    @property
    def steered_by_dev(self) -> bool:
        return self.target_drop is not None or self.accuracy_of == "dev"

    @property
    def largest_weight(self) -> float:
        """The largest weight that the stage can come to; 0 for gfpo."""
        return (self.max_weight if self.steered else self.weight) or 0.0

    def problems_with_weight(
        self, accuracy: float, form: float, language: float, advantage: str
    ) -> Iterator[tuple[str, str]]:
        """What is wrong with the weight beside the rewards of accuracy, format and language.

        A strict bound holds for what a right answer earns more than a wrong one at the least; a weak one for accuracy
        alone: it only says that what the rule takes from a right answer is no more than it earns for being right.
        """
        objective = None if self.objective == GFPO else self.chosen(UNBOUNDED).objective
        bound, weak = (None, None) if objective is None else (objective.bound(), objective.weak_bound())
        key, margin = "length.max_weight" if self.steered else "length.weight", accuracy - form - language
        if bound is not None and margin <= 0:  # first: an infinite bound has no product with it
            yield (
                "reward_language.weight",
                f"{language:g} is not below reward_accuracy - reward_format = {accuracy - form:g}: a wrong answer in "
                "the right language could be worth as much as a right one, whatever the weight of the length reward",
            )
        elif bound is not None and self.largest_weight >= bound * margin:
            less = "reward_format" + (" - reward_language.weight" if language else "")
            yield (
                key,
                f"must be below {bound:.3g} x (reward_accuracy - {less}) = {bound * margin:.3g}, "
                f"not {self.largest_weight:g}: a long right answer could be worth less than a wrong one",
            )
        elif bound is None and weak is not None and self.largest_weight > weak * accuracy:
            yield (
                key,
                f"must be at most {weak:.3g} x reward_accuracy = {weak * accuracy:.3g}, not {self.largest_weight:g}: a "
                "right answer beyond the limit would be worth less than a wrong one",
            )
        if advantage == "gdpo" and (self.steered or self.ramp_steps):
            key = "ramp_steps" if self.ramp_steps else "max_weight"
            yield f"length.{key}", "cannot be used with advantage: gdpo, which takes the scale of each reward away"

    def problems_with_limit(self, max_tokens: int) -> Iterator[tuple[str, str]]:
        """What is wrong once the stage's max_tokens is known."""
        limit = self.max_tokens or max_tokens
        if self.buffer is not None and self.buffer >= limit:
            yield "length.buffer", f"{self.buffer} is not below max_tokens ({limit})"

    def problems_with_stage(self, eval_every: int, group_size: int) -> Iterator[tuple[str, str]]:
        """What is wrong with the keys beside those of their stage."""
        if self.steered and self.steered_by_dev and not eval_every:
            key = "target_drop" if self.target_drop is not None else "accuracy_of"
            yield f"length.{key}", "needs evaluations on dev problems: set eval_every above 0"
        if self.keep is not None and not 2 <= self.keep <= group_size:
            yield "length.keep", f"must be from 2 to group_size ({group_size}), not {self.keep}"

    def chosen(self, max_tokens: int) -> Chosen:
        """The objective that the keys name; `max_tokens` is the stage's."""
        from long2short.length_catalog import make
        from rl.schedules import StepSchedule

        known = reads(self.objective)
        given: dict[str, Any] = {key: getattr(self, key) for key in known if getattr(self, key) is not None}
        if WHOLE_LIMIT in known:
            given.setdefault(WHOLE_LIMIT, max_tokens)
        if self.limits is not None:
            given["limits"] = StepSchedule(self.limits)
        return make(self.objective, **given)


def reads(name: str) -> tuple[str, ...]:
    """The parameters that an objective reads: `reads("hapo") == ("floor",)`."""
    from long2short.length_catalog import parameters  # 40 ms that most recipes need not wait

    return OF_GFPO if name == GFPO else tuple(parameters(name))


def gates_of(keys: Length) -> tuple[Gate, ...]:
    """Which groups get a length reward."""
    from long2short.length_reward import MinSpread, any_right

    found: list[Gate] = [any_right] if keys.gate == "any-right" else []
    return (*found, MinSpread(keys.min_spread)) if keys.min_spread else tuple(found)


PARAMETERS = tuple(
    key for key in Length.model_fields if key not in ("objective", "weight", *AROUND, *OF_DUAL)
)  # fmt: skip
