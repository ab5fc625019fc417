"""SimPO: preference optimisation without a reference model, on length-normalised log-probabilities.

Implements SimPO (arXiv 2405.14734, equation 6) on the pairs of `long2short.preference`:

    loss = -log sigmoid(beta / |chosen| log pi(chosen) - beta / |rejected| log pi(rejected) - gamma)

|y| counts the tokens of an answer with its EOS. gamma is the margin by which the chosen side's reward, beta times its
mean log-probability, must be ahead. The paper has beta 2 to 2.5, gamma a half of beta and learning rates of 3e-7 to
1e-6; for shortening, Sky-T1-Flash has beta 2 and gamma 0.3, and "Do NOT Think That Much for 2+3=?" (2412.21187) found
SimPO the best of its losses. Being normalised it presses on length through the pairs alone; nothing holds the model
near its start, so watch the accuracy. Without a reference it needs half of DPO's memory for weights, and one forward
pass of two.

Deviations: none. The loss is ours (TRL's SimPO is experimental); batches, log-probabilities and the optimizer's loop
are those of TRL's stable DPOTrainer, whose own loss and reference are left out.

Line: `reason long2short RECIPE`, the stage with `method: simpo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import DPOConfig

from distill.guards import IGNORED, PairRow
from distill.training import Report
from long2short.dpo import GuardedDPOTrainer
from long2short.pair_training import PairSettings, check_first_batch, dataset_of, train_on_pairs
from long2short.preference import PreferencePair
from rl.faults import fault


def simpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    beta: float,
    gamma: float,
) -> torch.Tensor:
    """The loss of each pair, (B,), from summed log-probabilities in nats (B,) and numbers of tokens (B,).

    Example: -20 over 40 tokens against -90 over 120. With beta 2, gamma 0.3: -log sigmoid(-1 + 1.5 - 0.3) = 0.59814;
    with beta 2.5, gamma 1.375: -log sigmoid(-0.75) = 1.13687.
    """
    return -logsigmoid(beta * (chosen_logps / chosen_tokens - rejected_logps / rejected_tokens) - gamma)


class SimPOTrainer(GuardedDPOTrainer):
    """DPO's trainer with another loss and no reference. Made by `make_trainer`, which gives it beta and gamma."""

    gamma: float

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # TRL loads no reference model only where it has the reference's log-probs computed before; SimPO has none.
        return dataset

    def micro_batch_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        """The mean loss of a micro-batch [all chosen, all rejected]; its figures go to the log."""
        completion = inputs["completion_mask"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"].masked_fill(completion == 0, IGNORED),
            use_cache=False,
            fused_lm_head=True,  # TRL's patch of the model: log-probs in chunks, 0 where the label is ignored
        )
        logps, tokens = outputs.log_probs.sum(-1).chunk(2), completion.sum(-1).chunk(2)
        rewards = [self.beta * (part / count).detach() for part, count in zip(logps, tokens, strict=True)]
        figures = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "logps/chosen": logps[0].detach(),
            "logps/rejected": logps[1].detach(),
        }
        for name, values in figures.items():
            gathered: Any = self.accelerator.gather(values)
            self._metrics["train"][name].append(gathered.mean().item())
        return simpo_loss(*logps, *tokens, beta=self.beta, gamma=self.gamma).mean()


def train_simpo(
    folder: Path,
    *,
    model: str | Path,
    pairs: Sequence[PreferencePair],
    settings: PairSettings,
    beta: float = 2.0,
    gamma: float = 1.0,
    report: Report = lambda step, total, metrics: None,
) -> dict[str, Any]:
    """Train `model` on `pairs`: `long2short.pair_training.train_on_pairs` with SimPO's trainer.

    Errors: ValueError for beta that is not above 0 and gamma below 0, and as there.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}: with 0 no pair moves the model")
    if not gamma >= 0:
        raise ValueError(f"gamma must be 0 or more, got {gamma}: it is how far the chosen side must be ahead")

    def make(
        policy: Any, tokenizer: Any, rows: Sequence[PairRow], order: Sequence[int], arguments: dict[str, Any]
    ) -> SimPOTrainer:
        return make_trainer(policy, tokenizer, rows, order, arguments, beta, gamma)

    return train_on_pairs(
        folder,
        model=model,
        pairs=pairs,
        settings=settings,
        make_trainer=make,
        loss=("simpo", beta, gamma),
        at_checkpoint=lambda: fault("simpo.checkpoint"),
        at_model=lambda: fault("simpo.model"),
        site="simpo.model",
        report=report,
    )


def make_trainer(
    model: Any,
    tokenizer: Any,
    rows: Sequence[PairRow],
    order: Sequence[int],
    arguments: dict[str, Any],
    beta: float,
    gamma: float,
) -> SimPOTrainer:
    """The trainer over `rows` in the given order, with `arguments` of `distill.training.trainer_arguments`."""
    trainer = SimPOTrainer(
        model=model,
        args=DPOConfig(**arguments, beta=beta, precompute_ref_log_probs=True),
        train_dataset=dataset_of(rows, order),
        processing_class=tokenizer,
    )
    trainer.gamma = gamma
    check_first_batch(trainer, rows, order)
    return trainer
