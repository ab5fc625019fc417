"""The long2short stages: typed keys become flat arguments of one function each. Nothing is decided here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from recipes.engines import open_engine
from recipes.long2short_keys import Dpo, Pairs, Race, Select, Simpo
from recipes.runner import StageContext
from recipes.sft_stage import lora_settings
from recipes.stage_inputs import (
    loss_report,
    model_fingerprint,
    pool_groups,
    problems_of,
    settings_of,
    task_of,
    thinks_by_template,
)
from rl.runs import write_json

if TYPE_CHECKING:
    from long2short.pair_training import PairSettings
    from rl.samplers.base import StreamingSampler


def race(context: StageContext) -> None:
    from distill.traces import write_traces
    from long2short.race_pool import race_into_pool
    from rl.policy import load_tokenizer
    from rl.pool import Pool, pool_address
    from rl.prompts import prefills_think

    stage: Race = context.stage
    name, suffix, settings = context.model(stage.model), context.recipe.problems.prompt_suffix, settings_of(stage)
    engine = replace(context.recipe.sampling.choice, replicas=1)  # samples of one problem race on one engine
    tokenizer, problems = load_tokenizer(name), problems_of(context, "train", stage.count)
    address = pool_address(
        model_fingerprint(name), problems, tokenizer, settings, context.seed, suffix, racing=True, native=engine.request
    )
    with open_engine(engine, name, tokenizer) as sampler:
        selection = race_into_pool(
            Pool.open(context.folder / "pool", address), cast("StreamingSampler", sampler), tokenizer, problems,
            task_of(context.recipe), stage.samples, settings, context.seed, suffix,
            teacher=stage.model, min_tokens=stage.min_tokens,
            prefilled=prefills_think(tokenizer), forbidden=frozenset(tokenizer.all_special_tokens),
            progress=lambda done, total: context.progress(done, total, "completions"),
        )  # fmt: skip
    write_traces(context.folder / "traces.jsonl", selection.traces)
    write_json(context.folder / "summary.json", selection.summary(), "traces.summary")


def pairs(context: StageContext) -> None:
    from long2short.pair_selection import select_pairs
    from long2short.preference import PairRules, write_pairs

    stage: Pairs = context.stage
    prefilled, forbidden = thinks_by_template(context, stage.pool)
    selection = select_pairs(
        pool_groups(context, stage.pool),
        PairRules(
            stage.min_ratio, stage.per_problem, stage.silc, stage.min_tokens, stage.min_right, prefilled, forbidden
        ),
        balance_bins=stage.balance_bins,
        balance_min=stage.balance_min or 1,
        seed=context.seed,
    )
    write_pairs(context.folder / "pairs.jsonl", selection.pairs)
    write_json(context.folder / "summary.json", selection.summary(stage.max_length), "pairs.summary")


def dpo(context: StageContext) -> None:
    from long2short.dpo import train_dpo
    from long2short.preference import read_pairs

    stage: Dpo = context.stage
    train_dpo(
        context.folder,
        model=context.model(stage.model),
        pairs=read_pairs(context.inputs[stage.pairs] / "pairs.jsonl"),
        settings=_pair_settings(context),
        beta=stage.beta,
        loss=stage.loss,
        report=loss_report(context),
    )


def simpo(context: StageContext) -> None:
    from long2short.preference import read_pairs
    from long2short.simpo import train_simpo

    stage: Simpo = context.stage
    train_simpo(
        context.folder,
        model=context.model(stage.model),
        pairs=read_pairs(context.inputs[stage.pairs] / "pairs.jsonl"),
        settings=_pair_settings(context),
        beta=stage.beta,
        gamma=stage.gamma,
        report=loss_report(context),
    )


def _pair_settings(context: StageContext) -> PairSettings:
    from long2short.pair_training import PairSettings

    stage: Dpo | Simpo = context.stage
    return PairSettings(
        epochs=stage.epochs,
        learning_rate=stage.learning_rate,
        batch_size=stage.batch_size,
        max_length=stage.max_length,
        seed=context.seed,
        suffix=context.recipe.problems.prompt_suffix,
        overflow=stage.overflow,
        save_every=stage.save_every,
        micro_batch_pairs=stage.micro_batch_pairs,
        gradient_checkpointing=stage.gradient_checkpointing,
        bf16=stage.bf16,
        lora=lora_settings(stage.lora),
    )


def select(context: StageContext) -> None:
    from long2short.select import Briefest, balanced, select_model

    stage: Select = context.stage
    select_model(
        {ref: context.model(ref) for ref in stage.candidates},
        context.model(stage.parent),
        problems_of(context, "dev", stage.count),
        task_of(context.recipe),
        context.folder,
        samples=stage.samples,
        settings=settings_of(stage),
        rule=balanced if stage.rule == "balance" else Briefest(stage.tolerance),
        seed=context.seed,
        suffix=context.recipe.problems.prompt_suffix,
        open_sampler=partial(open_engine, context.recipe.sampling.choice),
        progress=context.progress,
    )
