"""Direct preference optimisation on length, through TRL's DPOTrainer.

Implements DPO (arXiv 2305.18290, equation 7) on the pairs of Kimi k1.5 (`long2short.preference`):

    loss = -log sigmoid(beta [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)])

with log-probabilities summed over the whole answer and its EOS, and the starting model as the reference. Kimi does not
print beta or the learning rate; 0.1 and 5e-7 are usual for models of billions of parameters. Deviations: none in the
loss. TRL 1.16 would tokenise the pairs again and cut both sides at 1024 tokens, which removes the end of the long
rejected answer; here it is given the token ids that passed `distill.guards`, and its first batch is compared with them.

Line: `reason long2short RECIPE`, the stage with `method: dpo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from distill.guards import Overflow, PairRow, tokenize_pair, within_length
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
from long2short.preference import PreferencePair
from rl.faults import fault
from rl.policy import load_tokenizer


class GuardedDPOTrainer(TrainerGuards, DPOTrainer):
    """TRL's trainer on pairs that are already token ids: prompt_ids, chosen_ids, rejected_ids."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # DPOTrainer has no skip_prepare_dataset: it would look for text, and tokenise it its own way.
        return dataset


def train_dpo(
    folder: Path,
    *,
    model: str | Path,
    pairs: Sequence[PreferencePair],
    epochs: int,
    learning_rate: float,
    batch_size: int,
    max_length: int,
    seed: int,
    beta: float = 0.1,
    suffix: str = "",
    overflow: Overflow = "refuse",
    warmup_ratio: float = 0.1,
    min_lr_ratio: float = 0.1,
    weight_decay: float = 0.0,
    save_every: int = 100,
    report: Report = lambda step, total, metrics: None,
) -> dict[str, Any]:
    """Train `model` against itself on `pairs`; writes `folder/model`, `metrics.jsonl` and `summary.json`, returned too.

    `max_length` counts the prompt with the longer side and its EOS. A batch of `batch_size` pairs is 2 x `batch_size`
    sequences, through the policy and the reference. Killed and called again with the same arguments, it goes on from
    the last checkpoint and ends with the same bytes on CPU. Errors: as `distill.sft.train`.

    Example: beta 0.1 and margins 2 (chosen) and -1 (rejected) give the loss -log sigmoid(0.3) = 0.554355.
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
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}: with 0 no pair moves the model")
    tokenizer = load_tokenizer(model)
    rows, num_dropped = within_length(tokenize_pairs(tokenizer, pairs, suffix), max_length, overflow)
    order = row_order(len(rows), epochs, seed)
    lengths = [len(row.chosen_ids) + len(row.rejected_ids) for row in rows]
    tokens = tokens_after_steps(lengths, order, batch_size)
    call = fingerprint([asdict(row) for row in rows], settings, beta, seed)
    folder.mkdir(parents=True, exist_ok=True)
    clear_scratch(folder)
    del settings["epochs"], settings["max_length"]
    policy = load_for_training(model, max_length)
    trainer = make_trainer(
        policy,
        load_for_training(model, max_length),
        tokenizer,
        rows,
        order,
        DPOConfig(
            **trainer_arguments(folder, steps=len(tokens), seed=seed, **settings), beta=beta, loss_type=["sigmoid"]
        ),
    )
    trainer.add_callback(StageCallback(folder, tokens, call, lambda: fault("dpo.checkpoint"), report))
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
    write_result(policy, tokenizer, model, folder, summary, lambda: fault("dpo.model"), "dpo.model")
    return summary


def tokenize_pairs(tokenizer: Any, pairs: Sequence[PreferencePair], suffix: str = "") -> list[PairRow]:
    """Every pair as a guarded row, named by its place and problem."""
    return [
        tokenize_pair(
            tokenizer, pair.question, pair.chosen, pair.rejected, f"pair {index} (problem {pair.problem_id})", suffix
        )
        for index, pair in enumerate(pairs)
    ]


def make_trainer(
    model: Any, reference: Any, tokenizer: Any, rows: Sequence[PairRow], order: Sequence[int], arguments: DPOConfig
) -> GuardedDPOTrainer:
    """The trainer over `rows` in the given order. Its first batch must be our tokens, or TRL has changed under us.

    The reference is passed in: left to itself, TRL loads one from the path in the config, whatever lies there by then.
    """
    columns = {
        "prompt_ids": [list(row.prompt_ids) for row in rows],
        "chosen_ids": [list(row.chosen_ids) for row in rows],
        "rejected_ids": [list(row.rejected_ids) for row in rows],
    }
    trainer = GuardedDPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=Dataset.from_dict(columns).select(order, keep_in_memory=True),
        processing_class=tokenizer,
    )
    indices = order[: arguments.per_device_train_batch_size]
    prepared: Any = trainer.train_dataset
    batch = trainer.data_collator([prepared[place] for place in range(len(indices))])
    sides = [(rows[i].name, rows[i].prompt_ids, rows[i].chosen_ids) for i in indices]
    sides += [(rows[i].name, rows[i].prompt_ids, rows[i].rejected_ids) for i in indices]
    for place, (name, prompt_ids, completion_ids) in enumerate(sides):
        real = batch["attention_mask"][place].bool()
        trained = batch["completion_mask"][place].bool()
        seen = (batch["input_ids"][place][real].tolist(), batch["input_ids"][place][trained].tolist())
        if seen != ([*prompt_ids, *completion_ids], list(completion_ids)):
            raise RuntimeError(f"{name}: TRL would train on other tokens than the guards passed")
    return trainer
