"""The on-policy distillation stage: the RL loop with a teacher in the place of rewards and a group's baseline."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from recipes.on_policy_keys import OnPolicy
from recipes.runner import StageContext
from recipes.stage_inputs import problems_of, settings_of, task_of

if TYPE_CHECKING:
    from distill.on_policy import Score
    from rl.learner import Learner
    from rl.objectives import Objective


def on_policy(context: StageContext) -> None:
    from distill.on_policy import PromptOf, TeacherRows, configured_stop_ids, require_same_tokens
    from recipes import policy_stage as build
    from recipes.rl_stage import collapse_of
    from rl.collect import Collector, RolloutSettings
    from rl.grpo import DevSet, train
    from rl.judging import shared
    from rl.policy import load_tokenizer
    from rl.rewards import WeightedReward, accuracy_reward

    stage: OnPolicy = context.stage
    name, teacher_name, ranks = context.model(stage.model), context.model(stage.teacher), context.ranks
    tokenizer, teacher_tokenizer = load_tokenizer(name), load_tokenizer(teacher_name)
    policy = build.policy_of(stage, name)
    require_same_tokens(tokenizer, teacher_tokenizer, configured_stop_ids(teacher_name, teacher_tokenizer))
    sampling = replace(settings_of(stage), stop_repetition=build.repetition_of(stage))
    learner = build.learner_of(stage, policy, objective_of(stage), sampling.temperature, ranks)
    score = _score_of(context, learner, name, teacher_name)
    task, suffix = shared(task_of(context.recipe), ranks), context.recipe.problems.prompt_suffix
    logged = (WeightedReward("accuracy", accuracy_reward, 1.0),)  # nothing is trained on it
    dev = problems_of(context, "dev", stage.eval_problems) if stage.eval_every else []
    with ExitStack() as held:
        collector = Collector(
            build.rollout_sampler(context.recipe.sampling.choice, name, tokenizer, learner, held),
            tokenizer,
            build.source_of(stage, problems_of(context, "train"), context.seed),
            task,
            logged,
            RolloutSettings(
                stage.problems_per_step, stage.group_size, sampling, build.limits_of(stage, sampling.max_tokens)
            ),
            seed=context.seed,
            suffix=suffix,
        )
        train(
            learner,
            collector,
            DevSet(dev, task, build.dev_settings(stage, sampling), suffix),
            tokenizer,
            build.schedule_of(stage),
            context.folder,
            seed=context.seed,
            rows_of=TeacherRows(
                score,
                PromptOf(teacher_tokenizer, suffix + stage.teacher_suffix, stage.teacher_system),
                stage.coefficient,
            ),
            prefer=build.prefer_of(stage),
            monitor=collapse_of(stage, tokenizer),
            ranks=ranks,
            report=build.step_report(context),
        )


def _score_of(context: StageContext, learner: Learner, name: str, teacher: str) -> Score:
    """What gives the teacher's log-probs: servers that rank 0 asks for all, the model under the adapters, or another
    model beside the student."""
    from distill.teacher_server import SharedScore, TeacherServers
    from rl.distributed import shard
    from rl.lora import WithoutAdapters
    from rl.policy import PolicyModel, load_model

    stage: OnPolicy = context.stage
    ranks, keys = context.ranks, stage.teacher_server
    if keys is not None:
        servers = None
        if ranks.first:
            servers = TeacherServers(
                keys.urls, teacher,
                served_as=keys.model, api_key_variable=keys.api_key_variable, connections=keys.connections,
            )  # fmt: skip
        return SharedScore(servers, ranks)
    if stage.lora is not None and teacher == name:
        return partial(learner.logprobs, WithoutAdapters(learner.policy))
    beside = PolicyModel(load_model(teacher))
    if stage.shard and ranks.world > 1:
        shard(beside)
    return partial(learner.logprobs, beside)


def objective_of(stage: OnPolicy) -> Objective:
    """The policy gradient of each token's advantage. The clip matters only where a step has several updates."""
    from recipes.policy_stage import correction_of
    from rl.objectives import Objective, TokenMean, token_log_ratio
    from rl.rules import Clip

    return Objective(token_log_ratio, Clip(0.2, 0.28), TokenMean(), correction=correction_of(stage))
