"""What the stages that train a policy share: its learner, its sampler, its problems, which model is kept.

Keys become functions and types here, and go no further. Used by recipes/rl_stage.py and recipes/on_policy_stage.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedTokenizerBase

from long2short.select import prefer_balanced
from recipes.engines import EngineChoice
from recipes.policy_keys import PolicyKeys
from recipes.runner import StageContext
from recipes.servers import open_servers
from rl.curriculum import Curriculum, Prioritized, ProblemSource, Shuffled
from rl.distributed import shard
from rl.grpo import Schedule
from rl.learner import Learner, OptimSettings
from rl.lora import WithoutAdapters, add_lora
from rl.mismatch import Correction, IcePop, TruncatedIS
from rl.objectives import Objective
from rl.policy import PolicyModel, load_model
from rl.ranks import Ranks
from rl.repetition import RepetitionRule
from rl.run_state import Prefer, prefer_accurate, prefer_last
from rl.samplers.base import Sampler, SamplingSettings
from rl.samplers.shared import FromFirst, SharedSampler
from rl.samplers.synced import TOLERANCE, SyncedSampler, policy_scores, policy_weights
from rl.samplers.transformers import TransformersSampler
from rl.schedules import StepSchedule, constant
from rl.types import Problem


def source_of(stage: PolicyKeys, problems: Sequence[Problem], seed: int) -> ProblemSource:
    """Where a stage's problems come from."""
    draw = stage.draw
    if draw is None or draw.order == "shuffled":
        return Shuffled(problems, seed)
    if draw.order == "prioritized":
        return Prioritized(problems, seed, draw.floor)
    assert draw.switch_step is not None
    return Curriculum(problems, seed, draw.switch_step)


def correction_of(stage: PolicyKeys) -> Correction | None:
    """How a sampler whose log-probs are not the trainer's is corrected, if at all."""
    if stage.correction is None:
        return None
    given = {key: getattr(stage.correction, key) for key in ("low", "high")}
    bounds = {key: value for key, value in given.items() if value is not None}
    if stage.correction.kind == "icepop":
        return IcePop(**bounds)
    return TruncatedIS(bounds.get("high", TruncatedIS().cap))


def limits_of(stage: PolicyKeys, max_tokens: int) -> StepSchedule:
    """The token limit of each step."""
    return constant(max_tokens) if stage.max_tokens_steps is None else StepSchedule(stage.max_tokens_steps)


def dev_settings(stage: PolicyKeys, sampling: SamplingSettings) -> SamplingSettings:
    """How the dev problems are sampled, if they are: as the rollouts are, up to a limit of their own."""
    return sampling if stage.eval_max_tokens is None else replace(sampling, max_tokens=stage.eval_max_tokens)


def schedule_of(stage: PolicyKeys) -> Schedule:
    """How long a stage trains, and how often it evaluates and saves."""
    return Schedule(
        stage.steps, stage.eval_every, stage.eval_samples, stage.save_every, stage.stop_at_accuracy, stage.keep_models
    )


def prefer_of(stage: PolicyKeys, best: Prefer = prefer_accurate) -> Prefer:
    """Which evaluated model a stage hands on; `best` is what `keep: best` means to it."""
    return {"last": prefer_last, "best": best, "balance": prefer_balanced}[stage.keep]


def step_report(context: StageContext) -> Callable[[int, int, Mapping[str, float]], None]:
    """Shows how far a stage is, with accuracy and tokens of the step."""

    def report(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        note = "no group is done yet"  # the first steps of partial rollouts
        if "accuracy" in metrics:
            note = f"accuracy {metrics['accuracy']:.2f}, {metrics['tokens_mean']:.0f} tokens"
        if "reverse_kl" in metrics:
            note += f", reverse KL {metrics['reverse_kl']:.3f}"
        if metrics.get("alarms"):
            note += f", {metrics['alarms']:.0f} alarms"
        context.progress(step, steps, note)

    return report


def rollout_sampler(
    choice: EngineChoice, name: str, tokenizer: PreTrainedTokenizerBase, learner: Learner, held: ExitStack
) -> Sampler:
    """What draws the rollouts of all ranks: each its share, or servers for all of them; `held` ends it."""
    policy, ranks = learner.policy, learner.ranks
    if choice.server is None:
        own = sampler_of(choice, name, tokenizer, policy, ranks, held)
        return SharedSampler(own, ranks, policy, learner.precision)
    servers = sampler_of(choice, name, tokenizer, policy, ranks, held) if ranks.first else None
    return FromFirst(servers, ranks, policy, learner.precision)


def sampler_of(
    choice: EngineChoice,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    policy: PolicyModel,
    ranks: Ranks,
    held: ExitStack,
) -> Sampler:
    """What draws the rollouts of one rank: the policy itself, or an engine beside it or servers that are handed its
    weights; `held` ends it."""
    if choice.server is not None:
        return held.enter_context(open_servers(choice.server, name, tokenizer, policy, choice.request))
    if choice.name == "transformers":
        return TransformersSampler(policy.model, tokenizer, choice.batch_size)
    from rl.samplers.vllm import VllmSampler

    given = dict(choice.engine)
    if ranks.world > 1:  # the engine of each rank lives in the process group that the launcher has made
        given.setdefault("distributed_executor_backend", "external_launcher")
    engine = VllmSampler(name, tokenizer, given, choice.request)

    def end(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or ranks.world == 1:  # after an error, taking leave of a rank that hangs would hang too
            engine.close()

    held.push(end)
    return SyncedSampler(
        engine,
        partial(policy_weights, policy),
        partial(policy_scores, policy),
        TOLERANCE[engine.dtype],
        share_device=bool(given.get("enable_sleep_mode")),
    )


def repetition_of(stage: PolicyKeys) -> RepetitionRule | None:
    """When a stage stops a rollout that runs in a circle, if ever."""
    if stage.repetition is None:
        return None
    return RepetitionRule(stage.repetition.max_period, stage.repetition.min_repeats, stage.repetition.min_tokens)


def policy_of(stage: PolicyKeys, name: str) -> PolicyModel:
    """The model as the keys want it: adapters, precision of the head, checkpointing."""
    model = load_model(name, to_train=True)
    if stage.lora is not None:
        model = add_lora(model, stage.lora.rank, stage.lora.alpha, stage.lora.targets)
    return PolicyModel(model, fp32_head=stage.fp32_head, gradient_checkpointing=stage.gradient_checkpointing)


def learner_of(
    stage: PolicyKeys,
    policy: PolicyModel,
    objective: Objective,
    temperature: float,
    ranks: Ranks,
    reference: PolicyModel | WithoutAdapters | None = None,
) -> Learner:
    """The policy, sharded where the keys say so, with its optimizer."""
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
        policy, optimizer, objective, optim, temperature,
        reference=reference, recompute_old=stage.correction is not None, ranks=ranks,
    )  # fmt: skip
