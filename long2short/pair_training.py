"""What DPO and SimPO share: pairs become guarded rows, rows a trainer's batches, a run a model and its figures.

A loss brings its own trainer (`MakeTrainer`); everything around it is the same, so that arms differ in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer

from distill.guards import PairRow, tokenize_pair, within_length
from distill.sft import LoraSettings, load_student
from distill.training import (
    Report,
    Schedule,
    StageCallback,
    clear_scratch,
    fingerprint,
    last_losses,
    row_order,
    run_trainer,
    tokens_after_steps,
    trainer_arguments,
    write_result,
)
from long2short.preference import PreferencePair
from rl.export import plain_model
from rl.policy import load_tokenizer

# (policy, tokenizer, rows, order, the arguments that every trainer gets) -> the trainer
MakeTrainer = Callable[[Any, Any, Sequence[PairRow], Sequence[int], dict[str, Any]], Trainer]


@dataclass(frozen=True, slots=True)
class PairSettings(Schedule):
    """How to train on pairs, whatever the loss.

    `max_length` counts the prompt with the longer side and its EOS; a batch of `batch_size` pairs is twice as many
    sequences. Example: 6 pairs, 2 epochs, batches of 4 are 3 steps.
    """

    warmup_ratio: float = 0.1
    # How a step is run; but for `bf16` these change memory, speed and rounding alone.
    micro_batch_pairs: int | None = None  # pairs at a time; None: the whole batch at once
    gradient_checkpointing: bool | None = None  # None: on a GPU only
    bf16: bool | None = None  # autocast; None: on a GPU only
    lora: LoraSettings | None = None

    def __post_init__(self) -> None:
        Schedule.__post_init__(self)  # super() does not know a class with slots
        self.batches()

    def batches(self) -> dict[str, int]:
        """The arguments that make a step of micro-batches: batch_size 32, micro_batch_pairs 4 are 8 of 4 pairs.

        Errors: ValueError for micro-batches that do not divide a batch.
        """
        pairs = self.batch_size if self.micro_batch_pairs is None else self.micro_batch_pairs
        if pairs < 1 or self.batch_size % pairs:
            raise ValueError(f"micro_batch_pairs = {pairs} does not divide batch_size = {self.batch_size}")
        return {"per_device_train_batch_size": pairs, "gradient_accumulation_steps": self.batch_size // pairs}


def train_on_pairs(
    folder: Path,
    *,
    model: str | Path,
    pairs: Sequence[PreferencePair],
    settings: PairSettings,
    make_trainer: MakeTrainer,
    loss: Sequence[object],
    at_checkpoint: Callable[[], None],
    at_model: Callable[[], None],
    site: str,
    report: Report,
) -> dict[str, Any]:
    """Train `model` on `pairs`; writes `folder/model`, `metrics.jsonl` and `summary.json`, returns the summary.

    `loss` names the loss with its parameters, so that a checkpoint is only gone on with under the same.
    `at_checkpoint`, `at_model` and `site` are the method's fault points. Killed and called again with the same
    arguments, it goes on from the last checkpoint and ends with the same bytes on CPU.

    Errors: ValueError for a row that the guards refuse; FloatingPointError for a loss that is not finite.
    """
    schedule, seed, lora = settings.numbers(), settings.seed, settings.lora
    tokenizer = load_tokenizer(model)
    rows, num_dropped = within_length(
        tokenize_pairs(tokenizer, pairs, settings.suffix), settings.max_length, settings.overflow
    )
    order = row_order(len(rows), settings.epochs, seed)
    lengths = [len(row.chosen_ids) + len(row.rejected_ids) for row in rows]
    tokens = tokens_after_steps(lengths, order, settings.batch_size)
    call = fingerprint([asdict(row) for row in rows], schedule, *loss, lora, settings.bf16, seed)
    folder.mkdir(parents=True, exist_ok=True)
    clear_scratch(folder)
    del schedule["epochs"], schedule["max_length"]
    policy = load_student(model, settings.max_length, lora, seed)
    arguments = trainer_arguments(
        folder, steps=len(tokens), seed=seed, **schedule, bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
    ) | settings.batches()  # fmt: skip
    trainer = make_trainer(policy, tokenizer, rows, order, arguments)
    trainer.add_callback(StageCallback(folder, tokens, call, at_checkpoint, report))
    run_trainer(trainer, folder, call)
    summary = {
        "rows": len(rows),
        "dropped": {"longer than max_length": num_dropped},
        "epochs": settings.epochs,
        "steps": len(tokens),
        "tokens": tokens[-1],
        "longest_row": max(map(len, rows)),
        **last_losses(folder),
    }
    plain = policy if lora is None else plain_model(policy)
    write_result(plain, tokenizer, model, folder, summary, at_model, site)
    return summary


def tokenize_pairs(tokenizer: Any, pairs: Sequence[PreferencePair], suffix: str = "") -> list[PairRow]:
    """Every pair as a guarded row, named by its place and problem."""
    return [
        tokenize_pair(
            tokenizer, pair.question, pair.chosen, pair.rejected, f"pair {index} (problem {pair.problem_id})", suffix
        )
        for index, pair in enumerate(pairs)
    ]


def dataset_of(rows: Sequence[PairRow], order: Sequence[int]) -> Dataset:
    """The columns that TRL's collator reads, in the given order."""
    columns = {
        "prompt_ids": [list(row.prompt_ids) for row in rows],
        "chosen_ids": [list(row.chosen_ids) for row in rows],
        "rejected_ids": [list(row.rejected_ids) for row in rows],
    }
    return Dataset.from_dict(columns).select(order, keep_in_memory=True)


def check_first_batch(trainer: Any, rows: Sequence[PairRow], order: Sequence[int]) -> None:
    """RuntimeError unless the trainer's first batch is our tokens: TRL has changed under us otherwise."""
    indices = order[: trainer.args.per_device_train_batch_size]
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(len(indices))])
    sides = [(rows[i].name, rows[i].prompt_ids, rows[i].chosen_ids) for i in indices]
    sides += [(rows[i].name, rows[i].prompt_ids, rows[i].rejected_ids) for i in indices]
    for place, (name, prompt_ids, completion_ids) in enumerate(sides):
        real = batch["attention_mask"][place].bool()
        trained = batch["completion_mask"][place].bool()
        seen = (batch["input_ids"][place][real].tolist(), batch["input_ids"][place][trained].tolist())
        if seen != ([*prompt_ids, *completion_ids], list(completion_ids)):
            raise RuntimeError(f"{name}: TRL would train on other tokens than the guards passed")
