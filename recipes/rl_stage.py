"""The RL stage: its keys become functions and types here, and go no further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from long2short.length_filter import Gfpo, brevity, token_efficiency
from long2short.length_reward import (
    AnswerTokens,
    DualWeight,
    LengthReward,
    ThinkTokens,
    Warmup,
    total_tokens,
)
from recipes.length_keys import gates_of
from recipes.on_policy_keys import OnPolicy
from recipes.policy_stage import (
    correction_of,
    dev_settings,
    learner_of,
    limits_of,
    policy_of,
    prefer_of,
    repetition_of,
    rollout_sampler,
    schedule_of,
    source_of,
    step_report,
)
from recipes.r1_stages import with_prompts
from recipes.rl_keys import Grpo, LengthRl
from recipes.runner import StageContext
from recipes.stage_inputs import pool_groups
from rl import advantages, kl, objectives
from rl.advantages import AdvantageRule
from rl.batch_rewards import WeightedBatchReward, only, shared_reward
from rl.collapse import CollapseLimits, CollapseMonitor, ThoughtReader
from rl.collect import Collector, RolloutSettings, Shape, no_shaping
from rl.general import is_general, with_general
from rl.grpo import DevSet, train
from rl.judging import shared
from rl.language import NATURAL, Languages
from rl.lora import WithoutAdapters
from rl.objectives import Objective
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.preference_model import PreferenceModel, PreferenceReward
from rl.prompts import TEMPLATES, give_template, prefills_think
from rl.repetition import NgramPenalty, RepetitionPenalty
from rl.rewards import FormatReward, SoftOverlong, WeightedReward, accuracy_reward, language_consistency
from rl.rules import Cispo, Clip, MirrorDescent, Rule, Sapo
from rl.run_state import PreferBrief, prefer_accurate
from rl.samplers.base import SamplingSettings
from rl.samplers.openai import OpenAIChat
from rl.tasks.base import Task
from rl.tasks.judge import helpfulness, safety
from rl.types import Problem, RolloutGroup

RATIOS = {
    "token": objectives.token_log_ratio,
    "sequence": objectives.sequence_log_ratio,
    "sequence-mean": objectives.sequence_mean_log_ratio,
}
ESTIMATORS = {"k2": kl.k2, "k3": kl.k3, "k3-corrected": kl.k3_corrected}


def objective_of(stage: Grpo) -> Objective:
    """The objective that a stage's keys name."""
    assert stage.max_tokens is not None
    rules: dict[str, Rule] = {
        "clip": Clip(stage.epsilon_low, stage.epsilon_high, stage.dual_clip, stage.delta),
        "cispo": Cispo(stage.ratio_cap),
        "sapo": Sapo(),
        "mirror-descent": MirrorDescent(stage.tau or 0.0),
    }
    aggregations = {
        "tokens": objectives.TokenMean(),
        "sequences": objectives.SequenceMean(),
        "sequence-sums": objectives.SequenceSum(),
        "constant": objectives.Constant(stage.max_tokens),
    }
    in_loss = stage.kl is not None and stage.kl.estimator != "k1"
    return Objective(
        ratio=objectives.sequence_log_ratio if stage.loss == "mirror-descent" else RATIOS[stage.ratio],
        rule=rules[stage.loss],
        aggregation=aggregations[stage.aggregation],
        mask=None if stage.off_policy_mask is None else objectives.OffPolicyMask(stage.off_policy_mask),
        correction=correction_of(stage),
        kl=kl.KLTerm(ESTIMATORS[stage.kl.estimator], stage.kl.coefficient) if stage.kl and in_loss else None,
    )


def advantage_of(stage: Grpo, rewards: Sequence[WeightedReward]) -> AdvantageRule:
    """The advantage rule that a stage's keys name."""
    rule = _rule_of(stage, rewards)
    if stage.length is None or stage.length.keep is None:
        return rule
    return Gfpo(rule, stage.length.keep, token_efficiency if stage.length.prefer == "efficient" else brevity)


def _rule_of(stage: Grpo, rewards: Sequence[WeightedReward]) -> AdvantageRule:
    rest = 1.0 if stage.length is None or stage.length.weight is None else stage.length.weight
    rules: dict[str, AdvantageRule] = {
        "mean": advantages.mean_baseline,
        "std": advantages.StdNormalized(ddof=1),
        "std-population": advantages.StdNormalized(ddof=0),
        "batch-std": advantages.batch_std,
        "leave-one-out": advantages.leave_one_out,
        "gdpo": advantages.Gdpo(tuple((reward.name, reward.weight) for reward in rewards), rest),
    }
    if stage.advantage == "log-partition":
        assert stage.tau is not None
        return advantages.LogPartition(stage.tau)
    return rules[stage.advantage]


def rewards_of(
    stage: Grpo, tokenizer: PreTrainedTokenizerBase, languages: Languages = NATURAL
) -> tuple[WeightedReward, ...]:
    """The rule rewards of a stage. The format is that of the tokenizer's template, the languages are the task's."""
    assert stage.max_tokens is not None
    answer_tags = tokenizer.chat_template == TEMPLATES["r1-zero"]
    found = [
        WeightedReward("accuracy", accuracy_reward, stage.reward_accuracy),
        WeightedReward("format", FormatReward(prefills_think(tokenizer), answer_tags), stage.reward_format),
    ]
    if stage.reward_language is not None:
        target = None if stage.reward_language.target == "question" else stage.reward_language.target
        consistency = language_consistency(target, languages)
        found.append(WeightedReward("language", consistency, stage.reward_language.weight))
    if stage.reward_repetition is not None:
        penalty = NgramPenalty(stage.reward_repetition.ngram)
        found.append(WeightedReward("ngrams", penalty, stage.reward_repetition.weight))
    if stage.soft_overlong is not None:
        found.append(WeightedReward("overlong", SoftOverlong(stage.max_tokens, stage.soft_overlong), 1.0))
    if stage.repetition is not None and stage.repetition.penalty > 0:
        found.append(WeightedReward("repetition", RepetitionPenalty(), stage.repetition.penalty))
    return tuple(found)


def model_rewards_of(stage: Grpo, context: StageContext) -> list[WeightedBatchReward]:
    """The rewards of a stage that models give, divided over the ranks."""
    found = []
    for keys in stage.reward_models:
        if keys.kind == "preference":
            reward = PreferenceReward(PreferenceModel(context.model(keys.model)))
        else:
            assert keys.url is not None
            chat = OpenAIChat(keys.url, keys.model, api_key_variable=keys.key_variable)
            reward = {"helpfulness": helpfulness, "safety": safety}[keys.kind](chat)
        if stage.general is not None:
            reward = only(reward, is_general)
        found.append(WeightedBatchReward(keys.kind, shared_reward(reward, context.ranks), keys.weight))
    return found


def shape_of(
    stage: Grpo,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem] = (),
    suffix: str = "",
    reference: Sequence[RolloutGroup] = (),
) -> Shape:
    """The length reward of a stage, or none; what it remembers starts with the `reference` groups.

    `problems` and `suffix` are what is asked. Errors: ValueError for one that lacks a budget which is to be read there.
    """
    keys = stage.length
    if keys is None or keys.weight is None:
        return no_shaping
    assert stage.max_tokens is not None
    weight: float | DualWeight = keys.weight
    if keys.steered:
        assert keys.max_weight is not None
        weight = DualWeight(
            keys.weight, keys.max_weight, keys.weight_rate or 1.0,
            keys.target_accuracy, keys.target_drop or 0.0, keys.steered_by_dev,
        )  # fmt: skip
    chosen = keys.chosen(stage.max_tokens)
    shape = LengthReward(
        chosen.objective,
        weight,
        Warmup(keys.warmup_steps, keys.ramp_steps),
        gates_of(keys),
        keys.accuracy_floor,
        chosen.memory,
        {"total": total_tokens, "think": ThinkTokens(tokenizer), "answer": AnswerTokens(tokenizer)}[keys.scope],
        suffix,
    )
    shape.require_budgets(problems)
    for group in reference:
        shape.lengths_of(group, 0)
    return shape


def reference_groups(context: StageContext) -> list[RolloutGroup]:
    """The samples that a length objective's memory starts with, if the stage names a pool."""
    keys = context.stage.length
    return [] if keys is None or keys.reference is None else pool_groups(context, keys.reference)


def collapse_of(stage: Grpo | OnPolicy, tokenizer: PreTrainedTokenizerBase) -> CollapseMonitor | None:
    """What watches a length RL or on-policy stage, unless its keys say that nothing does."""
    keys = stage.collapse if isinstance(stage, LengthRl | OnPolicy) else None
    if keys is None:
        return None
    by_success = (isinstance(stage, Grpo) and stage.dynamic_rounds > 0) or (
        stage.draw is not None and stage.draw.order != "shuffled"
    )
    limits = CollapseLimits(
        window=keys.window,
        accuracy_floor=keys.accuracy_floor,
        accuracy_margin=keys.accuracy_margin,
        batches_compare=not by_success,
        empty_think=keys.empty_think,
        guess_rate=keys.guess_rate,
        guess_tokens=keys.guess_tokens,
        spread=keys.spread,
        entropy=keys.entropy,
    )

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    reader = ThoughtReader(prefills_think(tokenizer), count_tokens)
    return CollapseMonitor(limits, reader, stop=keys.action == "stop")


def run_rl(
    context: StageContext,
    train_problems: Sequence[Problem],
    dev_problems: Sequence[Problem],
    task: Task,
    sampling: SamplingSettings,
    facts: Mapping[str, object],
) -> None:
    """Run an RL stage: build what its keys name, then train. `facts` go into summary.json."""
    stage: Grpo = context.stage
    sampling = replace(sampling, stop_repetition=repetition_of(stage))
    name, ranks = context.model(stage.model), context.ranks
    task = shared(task if stage.general is None else with_general(task), ranks)
    tokenizer = load_tokenizer(name)
    give_template(tokenizer, stage.template)
    policy = policy_of(stage, name)
    reference = None
    if stage.kl is not None:
        reference = WithoutAdapters(policy) if stage.lora is not None else PolicyModel(load_model(name))
    learner = learner_of(stage, policy, objective_of(stage), sampling.temperature, ranks, reference)
    rewards = rewards_of(stage, tokenizer, task.languages)
    suffix = context.recipe.problems.prompt_suffix
    held = ExitStack()
    collector = Collector(
        rollout_sampler(context.recipe.sampling.choice, name, tokenizer, learner, held),
        tokenizer,
        with_prompts(context, source_of(stage, train_problems, context.seed)),
        task,
        rewards,
        RolloutSettings(
            stage.problems_per_step, stage.group_size, sampling, limits_of(stage, sampling.max_tokens),
            stage.dynamic_rounds,
            None if stage.partial is None else stage.partial.budget,
            stage.partial is None or stage.partial.train_old_segments,
        ),
        seed=context.seed,
        batch_rewards=model_rewards_of(stage, context),
        shape=shape_of(stage, tokenizer, train_problems, suffix, reference_groups(context)),
        suffix=suffix,
    )  # fmt: skip

    with held:
        train(
            learner,
            collector,
            DevSet(dev_problems, task, dev_settings(stage, sampling), suffix),
            tokenizer,
            schedule_of(stage),
            context.folder,
            seed=context.seed,
            advantage_rule=advantage_of(stage, rewards),
            kl_reward=stage.kl.coefficient if stage.kl is not None and stage.kl.estimator == "k1" else 0.0,
            refresh_every=stage.kl.refresh_every if stage.kl is not None else 0,
            mask_truncated=stage.mask_truncated,
            prefer=prefer_of(stage, PreferBrief(stage.tolerance) if isinstance(stage, LengthRl) else prefer_accurate),
            monitor=collapse_of(stage, tokenizer),
            facts=facts,
            ranks=ranks,
            report=step_report(context),
        )
