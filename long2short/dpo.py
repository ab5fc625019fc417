"""Direct preference optimisation on length, through TRL's DPOTrainer.

Implements, on the pairs of `long2short.preference` and with the starting model as the reference,

* DPO (arXiv 2305.18290, equation 7), `loss="sigmoid"`: with m(y) = log pi(y) - log ref(y), summed over the whole answer
  and its EOS,

      loss = -log sigmoid(beta [m(chosen) - m(rejected)])

  Kimi (arXiv 2501.12599) trains with it and does not print beta or the learning rate; 0.1 and 5e-7 are usual for models
  of billions of parameters. A long rejected answer has a large sum, so its length is itself a way to win: that
  shortens, and can shorten too far.
* Length-normalised DPO (Tülu 3, arXiv 2411.15124), `loss="sigmoid_norm"`: m(y) is divided by the tokens of y, so that
  nothing is won by length but what the pairs say. A mean is smaller than a sum: Tülu has beta 5.

Deviations: none in the losses. TRL 1.16 would tokenise the pairs again and cut both sides at 1024 tokens, which removes
the end of the long rejected answer; here it is given the token ids that passed `distill.guards`, and its first batch is
compared with them. Its `rewards/*` metrics are beta times the sums under both losses.

Line: `reason long2short RECIPE`, the stage with `method: dpo`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from trl import DPOConfig, DPOTrainer

from distill.guards import PairRow
from distill.training import Report, TrainerGuards, load_for_training
from long2short.pair_training import PairSettings, check_first_batch, dataset_of, train_on_pairs
from long2short.preference import PreferencePair
from rl.faults import fault

Loss = Literal["sigmoid", "sigmoid_norm"]  # TRL's names


class GuardedDPOTrainer(TrainerGuards, DPOTrainer):
    """TRL's trainer on pairs that are already token ids: prompt_ids, chosen_ids, rejected_ids."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        if "ref" in getattr(model, "peft_config", {}):
            # TRL's frozen copy of the adapters, which start at zero: it would stand in every checkpoint for nothing.
            model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # DPOTrainer has no skip_prepare_dataset: it would look for text, and tokenise it its own way.
        return dataset

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """A micro-batch's part of its batch's mean, times the micro-batches, by which transformers divides."""
        if return_outputs:
            raise ValueError("there is no evaluation set here, so the loss comes without outputs")
        loss = self.micro_batch_loss(model, inputs)
        size = self.args.per_device_train_batch_size
        batch = size * self.args.gradient_accumulation_steps
        pairs = min(batch, len(self.train_dataset) - self.state.global_step * batch)  # the last batch may be smaller
        return loss * (len(inputs["input_ids"]) // 2 * math.ceil(pairs / size) / pairs)

    def micro_batch_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """The mean loss of a micro-batch [all chosen, all rejected]; its figures go to the log."""
        return super().compute_loss(model, inputs)


def train_dpo(
    folder: Path,
    *,
    model: str | Path,
    pairs: Sequence[PreferencePair],
    settings: PairSettings,
    beta: float = 0.1,
    loss: Loss = "sigmoid",
    report: Report = lambda step, total, metrics: None,
) -> dict[str, Any]:
    """Train `model` against itself on `pairs`: `long2short.pair_training.train_on_pairs` with DPO's trainer.

    Examples: beta 0.1 and margins 2 (chosen) and -1 (rejected) give the loss -log sigmoid(0.3) = 0.554355;
    "sigmoid_norm" with beta 5, margins 2 over 40 tokens and -1 over 120: -log sigmoid(5 (0.05 + 0.00833)) = 0.55791.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}: with 0 no pair moves the model")

    def make(
        policy: Any, tokenizer: Any, rows: Sequence[PairRow], order: Sequence[int], arguments: dict[str, Any]
    ) -> GuardedDPOTrainer:
        # Without its adapters the policy is the reference, and no second copy of the weights is needed.
        reference = load_for_training(model, settings.max_length) if settings.lora is None else None
        config = DPOConfig(**arguments, beta=beta, loss_type=[loss])
        return make_trainer(policy, reference, tokenizer, rows, order, config)

    return train_on_pairs(
        folder,
        model=model,
        pairs=pairs,
        settings=settings,
        make_trainer=make,
        loss=(loss, beta),
        at_checkpoint=lambda: fault("dpo.checkpoint"),
        at_model=lambda: fault("dpo.model"),
        site="dpo.model",
        report=report,
    )


def make_trainer(
    model: Any, reference: Any, tokenizer: Any, rows: Sequence[PairRow], order: Sequence[int], arguments: DPOConfig
) -> GuardedDPOTrainer:
    """The trainer over `rows` in the given order. Its first batch must be our tokens, or TRL has changed under us.

    The reference is passed in: left to itself, TRL loads one from the path in the config, whatever lies there by then.
    None for adapters: the reference is the model without them.
    """
    trainer = GuardedDPOTrainer(
        model=model,
        ref_model=reference,
        args=arguments,
        train_dataset=dataset_of(rows, order),
        processing_class=tokenizer,
    )
    check_first_batch(trainer, rows, order)
    return trainer
