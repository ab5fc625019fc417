"""The RL stage: its keys become functions and types here, and go no further."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from long2short.length_objectives import LengthReward, kimi_length_rewards
from recipes.engines import EngineChoice
from recipes.rl_keys import Grpo, LengthRl
from recipes.runner import StageContext
from rl import advantages, kl, objectives
from rl.advantages import AdvantageRule
from rl.batch_rewards import WeightedBatchReward, shared_reward
from rl.collect import Collector, RolloutSettings, Shape, no_shaping
from rl.curriculum import Curriculum, Prioritized, ProblemSource, Shuffled
from rl.distributed import shard
from rl.grpo import DevSet, Schedule, train
from rl.judging import shared
from rl.learner import Learner, OptimSettings
from rl.lora import WithoutAdapters, add_lora
from rl.mismatch import Correction, IcePop, TruncatedIS
from rl.objectives import Objective
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.preference_model import PreferenceModel, PreferenceReward
from rl.prompts import TEMPLATES, give_template, prefills_think
from rl.ranks import Ranks
from rl.repetition import NgramPenalty, RepetitionPenalty, RepetitionRule
from rl.rewards import FormatReward, SoftOverlong, WeightedReward, accuracy_reward, language_consistency
from rl.rules import Cispo, Clip, MirrorDescent, Rule, Sapo
from rl.run_state import Prefer, PreferBrief, prefer_accurate, prefer_last
from rl.samplers.base import Sampler, SamplingSettings
from rl.samplers.openai import OpenAIChat
from rl.samplers.shared import SharedSampler
from rl.samplers.synced import TOLERANCE, SyncedSampler, policy_scores, policy_weights
from rl.samplers.transformers import TransformersSampler
from rl.schedules import StepSchedule, constant
from rl.tasks.base import Task
from rl.tasks.judge import helpfulness, safety
from rl.types import Problem

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
    correction: Correction | None = None
    if stage.correction is not None:
        given = {key: getattr(stage.correction, key) for key in ("low", "high")}
        bounds = {key: value for key, value in given.items() if value is not None}
        if stage.correction.kind == "icepop":
            correction = IcePop(**bounds)
        else:
            correction = TruncatedIS(bounds.get("high", TruncatedIS().cap))
    in_loss = stage.kl is not None and stage.kl.estimator != "k1"
    return Objective(
        ratio=objectives.sequence_log_ratio if stage.loss == "mirror-descent" else RATIOS[stage.ratio],
        rule=rules[stage.loss],
        aggregation=aggregations[stage.aggregation],
        mask=None if stage.off_policy_mask is None else objectives.OffPolicyMask(stage.off_policy_mask),
        correction=correction,
        kl=kl.KLTerm(ESTIMATORS[stage.kl.estimator], stage.kl.coefficient) if stage.kl and in_loss else None,
    )


def advantage_of(stage: Grpo, rewards: Sequence[WeightedReward]) -> AdvantageRule:
    """The advantage rule that a stage's keys name."""
    rest = stage.length.weight if stage.length is not None else 1.0
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


def rewards_of(stage: Grpo, tokenizer: PreTrainedTokenizerBase) -> tuple[WeightedReward, ...]:
    """The rule rewards of a stage. The format is that of the tokenizer's template."""
    assert stage.max_tokens is not None
    answer_tags = tokenizer.chat_template == TEMPLATES["r1-zero"]
    found = [
        WeightedReward("accuracy", accuracy_reward, stage.reward_accuracy),
        WeightedReward("format", FormatReward(prefills_think(tokenizer), answer_tags), stage.reward_format),
    ]
    if stage.reward_language is not None:
        target = None if stage.reward_language.target == "question" else stage.reward_language.target
        found.append(WeightedReward("language", language_consistency(target), stage.reward_language.weight))
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
        found.append(WeightedBatchReward(keys.kind, shared_reward(reward, context.ranks), keys.weight))
    return found


def source_of(stage: Grpo, problems: Sequence[Problem], seed: int) -> ProblemSource:
    """Where a stage's problems come from."""
    draw = stage.draw
    if draw is None or draw.order == "shuffled":
        return Shuffled(problems, seed)
    if draw.order == "prioritized":
        return Prioritized(problems, seed, draw.floor)
    assert draw.switch_step is not None
    return Curriculum(problems, seed, draw.switch_step)


def shape_of(stage: Grpo) -> Shape:
    """The length reward of a stage, or none."""
    if stage.length is None:
        return no_shaping
    return LengthReward(
        partial(kimi_length_rewards, min_spread=stage.length.min_spread),
        stage.length.weight,
        stage.length.warmup_steps,
        stage.length.accuracy_floor,
    )


def prefer_of(stage: Grpo) -> Prefer:
    """Which evaluated model a stage hands on."""
    if stage.keep == "last":
        return prefer_last
    return PreferBrief(stage.tolerance) if isinstance(stage, LengthRl) else prefer_accurate


def run_rl(
    context: StageContext,
    train_problems: Sequence[Problem],
    dev_problems: Sequence[Problem],
    task: Task,
    sampling: SamplingSettings,
) -> None:
    """Run an RL stage: build what its keys name, then train."""
    stage: Grpo = context.stage
    sampling = replace(sampling, stop_repetition=repetition_of(stage))
    name, ranks = context.model(stage.model), context.ranks
    task = shared(task, ranks)
    tokenizer = load_tokenizer(name)
    give_template(tokenizer, stage.template)
    learner = _learner(stage, name, sampling, ranks)
    rewards = rewards_of(stage, tokenizer)
    suffix = context.recipe.problems.prompt_suffix
    limits = constant(sampling.max_tokens) if stage.max_tokens_steps is None else StepSchedule(stage.max_tokens_steps)
    held = ExitStack()
    collector = Collector(
        SharedSampler(
            _sampler(context.recipe.sampling.choice, name, tokenizer, learner.policy, ranks, held),
            ranks, learner.policy, learner.precision,
        ),
        tokenizer,
        source_of(stage, train_problems, context.seed),
        task,
        rewards,
        RolloutSettings(
            stage.problems_per_step, stage.group_size, sampling, limits, stage.dynamic_rounds,
            None if stage.partial is None else stage.partial.budget,
            stage.partial is None or stage.partial.train_old_segments,
        ),
        seed=context.seed,
        batch_rewards=model_rewards_of(stage, context),
        shape=shape_of(stage),
        suffix=suffix,
    )  # fmt: skip

    def report(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        note = "no group is done yet"  # the first steps of partial rollouts
        if "accuracy" in metrics:
            note = f"accuracy {metrics['accuracy']:.2f}, {metrics['tokens_mean']:.0f} tokens"
        context.progress(step, steps, note)

    with held:
        train(
            learner,
            collector,
            DevSet(dev_problems, task, sampling, suffix),
            tokenizer,
            Schedule(stage.steps, stage.eval_every, stage.eval_samples, stage.save_every, stage.stop_at_accuracy),
            context.folder,
            seed=context.seed,
            advantage_rule=advantage_of(stage, rewards),
            kl_reward=stage.kl.coefficient if stage.kl is not None and stage.kl.estimator == "k1" else 0.0,
            refresh_every=stage.kl.refresh_every if stage.kl is not None else 0,
            mask_truncated=stage.mask_truncated,
            prefer=prefer_of(stage),
            ranks=ranks,
            report=report,
        )


def _sampler(
    choice: EngineChoice,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    policy: PolicyModel,
    ranks: Ranks,
    held: ExitStack,
) -> Sampler:
    """What draws the rollouts: the policy itself, or an engine beside it that is handed its weights; `held` ends it."""
    if choice.name == "transformers":
        return TransformersSampler(policy.model, tokenizer, choice.batch_size)
    from rl.samplers.vllm import VllmSampler

    given = dict(choice.engine)
    if ranks.world > 1:  # the engine of each rank lives in the process group that the launcher has made
        given.setdefault("distributed_executor_backend", "external_launcher")
    engine = VllmSampler(name, tokenizer, given, choice.request)
    if ranks.world == 1:  # with others, its end would end the launcher's process group, which the ranks still need
        held.callback(engine.close)
    return SyncedSampler(
        engine,
        partial(policy_weights, policy),
        partial(policy_scores, policy),
        TOLERANCE[engine.dtype],
        share_device=bool(given.get("enable_sleep_mode")),
    )


def repetition_of(stage: Grpo) -> RepetitionRule | None:
    """When a stage stops a rollout that runs in a circle, if ever."""
    if stage.repetition is None:
        return None
    return RepetitionRule(stage.repetition.max_period, stage.repetition.min_repeats, stage.repetition.min_tokens)


def _learner(stage: Grpo, name: str, sampling: SamplingSettings, ranks: Ranks) -> Learner:
    """The policy as the keys want it (adapters, checkpointing, shards), its optimizer and its reference."""
    model = load_model(name, to_train=True)
    if stage.lora is not None:
        model = add_lora(model, stage.lora.rank, stage.lora.alpha, stage.lora.targets)
    policy = PolicyModel(model, fp32_head=stage.fp32_head, gradient_checkpointing=stage.gradient_checkpointing)
    reference = None
    if stage.kl is not None:
        reference = WithoutAdapters(policy) if stage.lora is not None else PolicyModel(load_model(name))
    if stage.shard and ranks.world > 1:
        shard(policy)
        if isinstance(reference, PolicyModel):
            shard(reference)
    optim = OptimSettings(
        stage.learning_rate, stage.weight_decay, stage.betas, stage.adam_epsilon, stage.warmup_steps,
        stage.max_grad_norm, stage.updates_per_step, stage.reset_optimizer, stage.micro_batch_tokens, stage.bf16,
    )  # fmt: skip
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=optim.learning_rate, betas=optim.betas, eps=optim.epsilon, weight_decay=optim.weight_decay
    )
    return Learner(
        policy, optimizer, objective_of(stage), optim, sampling.temperature,
        reference=reference, recompute_old=stage.correction is not None, ranks=ranks,
    )  # fmt: skip
