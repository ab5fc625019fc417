"""Supervised fine-tuning on traces, through TRL's SFTTrainer.

Implements the distillation of DeepSeek-R1 (arXiv 2501.12948, section 2.4): token cross-entropy on the completion,
prompt masked, EOS trained, cosine to a tenth of the learning rate. The loss is the mean over the trained tokens of the
whole batch. Deviations: none in the method; `distill.training` and `distill.guards` list what of TRL's defaults is
replaced. R1's own settings are 2-3 epochs, batches of 64, learning rates from 1e-4 (1.5B) to 2e-5 (70B), 32,768
tokens.

Line: `reason distill RECIPE`, the stage with `method: sft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from distill.guards import Overflow, TokenRow, tokenize_row, within_length
from distill.traces import Trace
from distill.training import (
    Report,
    StageCallback,
    TrainerGuards,
    check_settings,
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
from rl.faults import fault
from rl.policy import load_tokenizer


class GuardedSFTTrainer(TrainerGuards, SFTTrainer):
    """TRL's trainer on rows that are already token ids and labels."""


def train(
    folder: Path,
    *,
    model: str | Path,
    traces: Sequence[Trace],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    max_length: int,
    seed: int,
    suffix: str = "",
    overflow: Overflow = "refuse",
    warmup_ratio: float = 0.03,
    min_lr_ratio: float = 0.1,
    weight_decay: float = 0.0,
    save_every: int = 100,
    report: Report = lambda step, total, metrics: None,
) -> dict[str, Any]:
    """Fine-tune `model` on `traces`; writes `folder/model`, `metrics.jsonl` and `summary.json`, returns the summary.

    `max_length` counts prompt, completion and EOS in the student's tokens. `save_every` is in steps, 0 for none. Killed
    and called again with the same arguments, it goes on from the last checkpoint and ends with the same bytes on CPU.

    Errors: ValueError for a row that the guards refuse; FloatingPointError for a loss that is not finite.
    Steps: 10 traces, 3 epochs, batches of 4 are ceil(30 / 4) = 8 steps.
    """
    settings = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "max_length": max_length,
        "warmup_ratio": warmup_ratio,
        "min_lr_ratio": min_lr_ratio,
        "weight_decay": weight_decay,
        "save_every": save_every,
    }
    check_settings(**settings)
    tokenizer = load_tokenizer(model)
    rows, num_dropped = within_length(tokenize_traces(tokenizer, traces, suffix), max_length, overflow)
    order = row_order(len(rows), epochs, seed)
    tokens = tokens_after_steps([len(row.completion_ids) for row in rows], order, batch_size)
    call = fingerprint([asdict(row) for row in rows], settings, seed)
    folder.mkdir(parents=True, exist_ok=True)
    clear_scratch(folder)
    del settings["epochs"], settings["max_length"]
    student = load_for_training(model, max_length)
    trainer = make_trainer(
        student,
        tokenizer,
        rows,
        order,
        SFTConfig(
            **trainer_arguments(folder, steps=len(tokens), seed=seed, **settings),
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )
    trainer.add_callback(StageCallback(folder, tokens, call, lambda: fault("sft.checkpoint"), report))
    run_trainer(trainer, folder, call)
    summary = {
        "rows": len(rows),
        "dropped": {"longer than max_length": num_dropped},
        "epochs": epochs,
        "steps": len(tokens),
        "tokens": tokens[-1],
        "longest_row": max(map(len, rows)),
        **last_losses(folder),
    }
    write_result(student, tokenizer, model, folder, summary, lambda: fault("sft.model"), "sft.model")
    return summary


def tokenize_traces(tokenizer: Any, traces: Sequence[Trace], suffix: str = "") -> list[TokenRow]:
    """Every trace as a guarded row, named by its place and problem."""
    return [
        tokenize_row(tokenizer, trace.question, trace.text, f"trace {index} (problem {trace.problem_id})", suffix)
        for index, trace in enumerate(traces)
    ]


def make_trainer(
    model: Any, tokenizer: Any, rows: Sequence[TokenRow], order: Sequence[int], arguments: SFTConfig
) -> GuardedSFTTrainer:
    """The trainer over `rows` in the given order. Its first batch must be our tokens, or TRL has changed under us."""
    columns = {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
    trainer = GuardedSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns).select(order, keep_in_memory=True),
        processing_class=tokenizer,
    )
    indices = order[: arguments.per_device_train_batch_size]
    prepared: Any = trainer.train_dataset
    batch = trainer.data_collator([prepared[place] for place in range(len(indices))])
    for place, index in enumerate(indices):
        real = batch["attention_mask"][place].bool()
        seen = (batch["input_ids"][place][real].tolist(), batch["labels"][place][real].tolist())
        if seen != (rows[index].input_ids, rows[index].labels):
            raise RuntimeError(f"{rows[index].name}: TRL would train on other tokens than the guards passed")
    return trainer
