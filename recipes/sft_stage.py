"""The stage of supervised fine-tuning: all processes of a run work on it together."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from recipes.runner import StageContext
from recipes.sft_keys import Sft, TrainOnTraces
from recipes.stage_inputs import loss_report

if TYPE_CHECKING:
    from distill.sft import LoraSettings, SftSettings
    from recipes.policy_keys import Lora


def sft(context: StageContext) -> None:
    from distill.sft import train
    from distill.traces import read_traces

    stage: Sft = context.stage
    settings = settings_on_traces(context)
    train(
        context.folder,
        model=context.model(stage.model),
        traces=read_traces(context.inputs[stage.traces] / "traces.jsonl"),
        settings=replace(
            settings, forward=replace(settings.forward, chunked_loss=stage.chunked_loss, shard=stage.shard)
        ),
        ranks=context.ranks,
        report=loss_report(context),
    )


def settings_on_traces(context: StageContext) -> SftSettings:
    """What the keys say that every training on traces has."""
    from distill.sft import Forward, SftSettings

    stage: TrainOnTraces = context.stage
    return SftSettings(
        epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        batch_size=stage.batch_size,
        max_length=stage.max_length,
        seed=context.seed,
        suffix=context.recipe.problems.prompt_suffix,
        overflow=stage.overflow,
        warmup_ratio=stage.warmup_ratio,
        min_lr_ratio=stage.min_lr_ratio,
        weight_decay=stage.weight_decay,
        save_every=stage.save_every,
        forward=Forward(
            micro_batch_tokens=stage.micro_batch_tokens,
            packing=stage.packing,
            gradient_checkpointing=stage.gradient_checkpointing,
            bf16=stage.bf16,
        ),
        lora=lora_settings(stage.lora),
    )


def lora_settings(keys: Lora | None) -> LoraSettings | None:
    from distill.sft import LoraSettings

    return None if keys is None else LoraSettings(keys.rank, keys.alpha, keys.targets)
