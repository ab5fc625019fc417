"""Supervised fine-tuning on traces, through TRL's SFTTrainer.

Implements the distillation of DeepSeek-R1 (arXiv 2501.12948, section 2.4): token cross-entropy on the completion,
prompt masked, EOS trained, cosine to a tenth of the learning rate. The loss is the mean over the trained tokens of the
whole batch, however it is cut into micro-batches, packed, or divided over processes. Deviations: none in the method;
`distill.training` and `distill.guards` list what of TRL's defaults is replaced, `distill.sft_batches` why TRL neither
packs nor accumulates here. R1's own settings are 2-3 epochs, batches of 64, learning rates from 1e-4 (1.5B) to 2e-5
(70B), 32,768 tokens.

Line: `reason distill RECIPE`, the stage with `method: sft`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from distill.guards import TokenRow, tokenize_row, within_length
from distill.sft_batches import (
    Cut,
    InputsOf,
    MicroBatch,
    PackedCut,
    PaddedCut,
    RowCut,
    SftSteps,
    packed_inputs,
    sequence_of,
    sequences_of,
    whole_share,
    without_labels,
)
from distill.sft_loss import use_chunked_loss
from distill.traces import Trace
from distill.training import (
    Report,
    Schedule,
    StageCallback,
    TrainerGuards,
    clear_scratch,
    fingerprint,
    last_losses,
    load_for_training,
    row_order,
    run_trainer,
    tokens_after_steps,
    trainer_arguments,
    write_result,
)
from rl.export import plain_model
from rl.faults import fault
from rl.lora import add_lora
from rl.policy import PolicyModel, load_tokenizer
from rl.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Adapters of `rank`, scaled by alpha / rank, on the modules whose names end in one of `targets` (rl/lora.py)."""

    rank: int = 16
    alpha: float = 32.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


@dataclass(frozen=True, slots=True)
class Forward:
    """How the forward and backward passes of a step are run. But for `bf16` it changes memory, speed and rounding, so a
    checkpoint made with other values is gone on with."""

    micro_batch_tokens: int | None = None  # tokens at a time; None: max_length if packed, else a process's whole share
    packing: bool = False  # rows end to end, none seeing another, in place of padding
    chunked_loss: bool = False  # distill/sft_loss.py in place of TRL's fused output layer
    gradient_checkpointing: bool | None = None  # None: on a GPU only
    shard: bool = False  # FSDP2 over the processes
    bf16: bool | None = None  # autocast; None: on a GPU only

    def cut(self, max_length: int) -> Cut:
        """The function that cuts a step into micro-batches; ValueError for a budget that no longest row fits."""
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < max_length:
            raise ValueError(
                f"micro_batch_tokens = {self.micro_batch_tokens} is less than max_length = {max_length}: a row of that "
                "length would not fit; raise micro_batch_tokens or lower max_length"
            )
        if self.packing:
            return PackedCut(self.micro_batch_tokens or max_length)
        return whole_share if self.micro_batch_tokens is None else PaddedCut(self.micro_batch_tokens)


@dataclass(frozen=True, slots=True)
class SftSettings(Schedule):
    """How to train on rows, whatever the loss.

    `max_length` counts prompt, completion and EOS in the student's tokens; `batch_size` rows are an optimizer step over
    all processes. With `lora` only adapters train, and the model that is written has them merged in.
    Example: 10 rows, 3 epochs, batches of 4 are ceil(30 / 4) = 8 steps.
    """

    forward: Forward = Forward()
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)  # super() does not know a class with slots
        self.forward.cut(self.max_length)


class GuardedSFTTrainer(TrainerGuards, SFTTrainer):
    """TRL's trainer on rows that are already token ids and labels.

    A batch of its loader is a whole optimizer step: the micro-batches of this process. So the number of micro-batches
    may differ from step to step, and the loss's denominator is known before the first forward pass.
    """

    def __init__(self, *args: Any, steps: SftSteps, inputs_of: InputsOf | None, chunked_loss: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.steps = steps
        self.inputs_of: InputsOf = self._padded_inputs if inputs_of is None else inputs_of
        self.chunked_loss = chunked_loss

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[list[MicroBatch]]:
        """Not by accelerate, which would divide the steps over the processes."""
        return torch.utils.data.DataLoader(self.steps, batch_size=1, collate_fn=itemgetter(0))

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """What the model is given of a micro-batch."""
        inputs = self.inputs_of(batch.rows, self.args.device)
        return inputs if batch.trained else without_labels(inputs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The gradient of a whole optimizer step; returns this process's part of its loss, times the processes."""
        batches: list[MicroBatch] = inputs
        counts = [batch.num_trained for batch in batches]
        total = torch.tensor(sum(counts), device=self.args.device)
        self.current_gradient_accumulation_steps = len(batches)
        losses = []
        for place, batch in enumerate(batches, start=1):
            # Waiting for the last one would keep whole gradients of a sharded model on every process.
            waits = place < len(batches) and not self.is_fsdp_enabled
            with self.accelerator.no_sync(model) if waits else nullcontext():
                losses.append(super().training_step(model, self.inputs(batch), total))
        self._weigh_metrics(counts)
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: transformers would look for the tokens of a single batch."""
        return 0

    def _padded_inputs(self, rows: Sequence[TokenRow], device: torch.device) -> dict[str, Any]:
        return self.data_collator([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])

    def _weigh_metrics(self, counts: Sequence[int]) -> None:
        """TRL averages over micro-batches; we over tokens, so that no figure depends on the cut."""
        metrics = self._metrics["train"]
        if self.chunked_loss:
            metrics.pop("mean_token_accuracy", None)
        for name in ("entropy", "mean_token_accuracy"):
            if name in metrics and len(counts) > 1:
                values = metrics[name][-len(counts) :]
                mean = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
                metrics[name][-len(counts) :] = [mean]


# (student, rows, their order, arguments, how a step is cut) -> the trainer
MakeTrainer = Callable[[Any, Sequence[TokenRow], Sequence[int], SFTConfig, Cut], GuardedSFTTrainer]


def train(
    folder: Path,
    *,
    model: str | Path,
    traces: Sequence[Trace],
    settings: SftSettings,
    ranks: Ranks = ALONE,
    report: Report = lambda step, total, metrics: None,
) -> dict[str, Any]:
    """Fine-tune `model` on `traces`; writes `folder/model`, `metrics.jsonl` and `summary.json`, returns the summary.

    Killed and called again with the same arguments, it goes on from the last checkpoint, on any number of processes; on
    CPU and the same number it ends with the same bytes. Every one of `ranks` calls it; the first writes.

    Errors: ValueError for a row that the guards refuse; FloatingPointError for a loss that is not finite.
    """
    tokenizer = load_tokenizer(model)

    def trainer(student: Any, rows: Any, order: Any, arguments: SFTConfig, cut: Cut) -> GuardedSFTTrainer:
        return make_trainer(student, tokenizer, rows, order, arguments, settings.forward, cut, ranks)

    return train_on_rows(
        folder, model, tokenizer, tokenize_traces(tokenizer, traces, settings.suffix), settings, trainer,
        at_checkpoint=lambda: fault("sft.checkpoint"), at_model=lambda: fault("sft.model"), site="sft.model",
        ranks=ranks, report=report,
    )  # fmt: skip


def train_on_rows(
    folder: Path,
    model: str | Path,
    tokenizer: Any,
    rows: Sequence[TokenRow],
    settings: SftSettings,
    make_trainer: MakeTrainer,
    *,
    at_checkpoint: Callable[[], None],
    at_model: Callable[[], None],
    site: str,
    loss: Sequence[object] = (),
    facts: Mapping[str, object] | None = None,
    ranks: Ranks,
    report: Report,
) -> dict[str, Any]:
    """What every training on rows has around its trainer: order, arguments, checkpoints, the model and its summary.

    `loss` names the loss with its parameters, so that a checkpoint is only gone on with under the same; `facts` go into
    the summary; `at_checkpoint`, `at_model` and `site` are the method's fault points.
    """
    schedule = settings.numbers()
    cut = settings.forward.cut(settings.max_length)
    seed, forward, lora = settings.seed, settings.forward, settings.lora
    rows, num_dropped = within_length(rows, settings.max_length, settings.overflow)
    order = row_order(len(rows), settings.epochs, seed)
    tokens = tokens_after_steps([len(row.completion_ids) for row in rows], order, settings.batch_size)
    call = fingerprint([asdict(row) for row in rows], schedule, *loss, lora, forward.bf16, seed)
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder)
    del schedule["epochs"], schedule["max_length"]
    arguments = SFTConfig(
        **trainer_arguments(
            folder, steps=len(tokens), seed=seed, **schedule, bf16=forward.bf16,
            gradient_checkpointing=forward.gradient_checkpointing, shard=forward.shard, ranks=ranks,
        ),
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    ranks.wait()
    student = load_student(model, settings.max_length, lora, seed)
    trainer = make_trainer(student, rows, order, arguments, cut)
    trainer.add_callback(StageCallback(folder, tokens, call, at_checkpoint, report, ranks))
    run_trainer(trainer, folder, call, ranks)
    if trainer.is_fsdp_enabled:
        student = _gathered(trainer, partial(load_student, model, settings.max_length, lora, seed), ranks)
    summary = {
        "rows": len(rows),
        "dropped": {"longer than max_length": num_dropped},
        **(facts or {}),
        "epochs": settings.epochs,
        "steps": len(tokens),
        "tokens": tokens[-1],
        "longest_row": max(map(len, rows)),
        **last_losses(folder),
    }
    if ranks.first:
        plain = student if lora is None else plain_model(student)
        write_result(plain, tokenizer, model, folder, summary, at_model, site)
    ranks.wait()
    return summary


def load_student(model: str | Path, max_length: int, lora: LoraSettings | None, seed: int) -> PreTrainedModel:
    """The model to train, with adapters where asked: the same on every process and in a resumed run."""
    student = load_for_training(model, max_length)
    return student if lora is None else add_lora(student, lora.rank, lora.alpha, lora.targets, seed)


def tokenize_traces(tokenizer: Any, traces: Sequence[Trace], suffix: str = "") -> list[TokenRow]:
    """Every trace as a guarded row, named by its place and problem."""
    return [
        tokenize_row(tokenizer, trace.question, trace.text, f"trace {index} (problem {trace.problem_id})", suffix)
        for index, trace in enumerate(traces)
    ]


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TokenRow],
    order: Sequence[int],
    arguments: SFTConfig,
    forward: Forward | None = None,
    cut: Cut = whole_share,
    ranks: Ranks = ALONE,
) -> GuardedSFTTrainer:
    """The trainer over `rows` in the given order. Its first step must be our tokens, or TRL has changed under us.

    An optimizer step is `per_device_train_batch_size` rows over all of `ranks`, cut by `cut`. Arguments that accumulate
    over n batches make it n times as many rows, in micro-batches of `per_device_train_batch_size`.

    Errors: ValueError for a model that packed rows or the chunked loss would not compute as the model itself does.
    """
    forward = forward or Forward()
    batch_size = arguments.per_device_train_batch_size
    if arguments.gradient_accumulation_steps > 1:
        batch_size, cut = batch_size * arguments.gradient_accumulation_steps, RowCut(batch_size)
        arguments.gradient_accumulation_steps = 1  # of what the loader gives: whole steps
    steps = SftSteps(rows, order, batch_size, cut, ranks.rank, ranks.world)
    first = rows[0]
    trainer = GuardedSFTTrainer(
        model=model,
        args=arguments,
        # TRL looks at a row before it starts; what is trained comes from `steps`.
        train_dataset=Dataset.from_dict({"input_ids": [first.input_ids], "labels": [first.labels]}),
        processing_class=tokenizer,
        steps=steps,
        inputs_of=packed_inputs if forward.packing else None,
        chunked_loss=forward.chunked_loss,
    )
    if forward.packing or forward.chunked_loss:
        if trainer.aux_loss_enabled:
            raise ValueError(
                f"{type(model).__name__} has a load-balancing loss, which packing and chunked_loss do not compute: set "
                "both to false"
            )
        # Compares packed with plain log-probs, and sets attention that reads the layout of a packed line.
        policy = PolicyModel(model)
        if forward.chunked_loss:
            unwrap = getattr(model, "get_base_model", None)  # PEFT
            use_chunked_loss(model if unwrap is None else unwrap(), policy.transform)
    for batch in steps[0]:
        _check_tokens(batch, trainer.inputs(batch))
    return trainer


def _check_tokens(batch: MicroBatch, inputs: dict[str, Any]) -> None:
    seen = sequences_of(inputs)
    for row in batch.rows:
        wanted = sequence_of(row) if batch.trained else (row.input_ids[:-1], [-100] * (len(row) - 1))
        if wanted not in seen:
            raise RuntimeError(f"{row.name}: TRL would train on other tokens than the guards passed")
        seen.remove(wanted)
    if seen:
        raise RuntimeError(f"{batch.rows[0].name}: its micro-batch has {len(seen)} sequences that no row has")


def _gathered(trainer: GuardedSFTTrainer, load: Any, ranks: Ranks) -> PreTrainedModel:
    """The model with the weights of a sharded one: of use on the first process only."""
    weights = trainer.accelerator.get_state_dict(trainer.model)  # every process takes part
    student = load()
    if ranks.first:
        student.load_state_dict(weights)
    return student
