"""Checks that take a model: two steps with and without accumulation, the sampler's log-probs against the trainer's.

Transformers and TRL have scaled the loss of accumulated micro-batches wrongly more than once (by 0.5 to 4), and an
engine may compute another model than the trainer does. Both show before the first real step, on rows of unequal length:

* `accumulation`: two steps in one batch each, and again row by row. Loss and gradient norm agree to 1e-4; AdamW would
  hide a wrong scale, so the gradients are looked at and not the weights;
* `sampler_trainer`: completions drawn at step 0 have the same log-probs from the sampler and from the training forward;
* `packing`: a row has the same log-probs in a packed batch as alone, so no attention crosses from row to row.

Line: `reason preflight RECIPE --weights`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.guards import TokenRow
from distill.preflight_subjects import Defect, TrainingSubject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rl.samplers.synced import Row, Scores

TOLERANCE = 1e-4  # relative, of loss and gradient norm in fp32; bf16 on a GPU is held to 3e-2
HALF_TOLERANCE = 3e-2
STEPS = 2
BATCH = 4
PROBES, PROBE_TOKENS = 4, 16


def accumulation(subject: TrainingSubject) -> Iterator[Defect]:
    """Loss and gradient norm of two steps are the same in one micro-batch and row by row."""
    whole, split = subject.steps(subject.batch), subject.steps(1)
    names = ("loss", "gradient norm")
    for step, (one, many) in enumerate(zip(whole, split, strict=True), start=1):
        for name, expected, found in zip(names, one, many, strict=True):
            if not abs(found - expected) <= subject.relative * max(abs(expected), 1e-12):  # NaN too
                yield Defect(
                    "accumulation",
                    f"{subject.where}, step {step}",
                    f"the {name} is {expected:.6g} in one batch of {subject.batch}, but {found:.6g} "
                    f"({found / expected if expected else 0:.3g} times) in micro-batches of one row",
                    "divide by the trained tokens of the whole optimizer step, not by each micro-batch's",
                )
                return


def sampler_trainer(subject: TrainingSubject) -> Iterator[Defect]:
    """At step 0 the sampler's log-probs of what it drew are the trainer's."""
    from rl.samplers.synced import agreement

    rows, drawn = subject.drawn()
    found = agreement(subject.scores(rows), drawn, 0)
    if not found.mean <= subject.tolerance:
        yield Defect(
            "sampler-differs",
            f"{subject.where}, log-probs at step 0",
            f"sampler and trainer differ by {found.mean:.2g} nats a token on average (at most {found.largest:.2g}), "
            f"where rounding explains {subject.tolerance:.2g}",
            "give the engine the trainer's weights, temperature, dtype and attention",
        )


def packing(subject: TrainingSubject) -> Iterator[Defect]:
    """Packed with others, a row's log-probs are those it has alone."""
    from rl.samplers.synced import agreement

    rows, _ = subject.drawn()
    together, alone = subject.scores(rows), [subject.scores([row])[0] for row in rows]
    found = agreement(together, alone, 0)
    if not found.mean <= subject.tolerance:
        yield Defect(
            "packing-leaks",
            f"{subject.where}, packed rows",
            f"log-probs move by {found.mean:.2g} nats a token (at most {found.largest:.2g}) when rows share a pack",
            "use an attention that knows the borders of the rows, or switch packing off",
        )


TRAINING_CHECKS: tuple[Callable[[TrainingSubject], Iterator[Defect]], ...] = (accumulation, sampler_trainer, packing)


# --- a real model -----------------------------------------------------------------------------------------------------


def training_subject(
    where: str, model: str | Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow]
) -> TrainingSubject:
    """The subject of a model folder: our SFT trainer, the transformers sampler and the packed training forward.

    `rows`: any number from 1 on; eight are trained on, repeated or cut so that no two of a batch need be as long.

    Errors: ValueError where there is no row, or where the model is none that `rl.policy.PolicyModel` can score.
    """
    import torch

    from rl.policy import PolicyModel, load_model
    from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
    from rl.samplers.synced import TOLERANCE as NATS
    from rl.samplers.synced import policy_scores
    from rl.samplers.transformers import TransformersSampler

    if not rows:
        raise ValueError(f"{where}: there is no row to try the model on")
    loaded = load_model(model)
    sampler = TransformersSampler(loaded, tokenizer)  # pyright: ignore[reportArgumentType]
    policy = PolicyModel(loaded)
    half = torch.cuda.is_available()

    def drawn() -> tuple[Sequence[Row], Scores]:
        prompts = list(dict.fromkeys(row.prompt_ids for row in rows))[:PROBES]
        requests = [SampleRequest(ids, sample_seed("preflight", i)) for i, ids in enumerate(prompts)]
        done = sampler.sample(requests, SamplingSettings(max_tokens=PROBE_TOKENS))
        return (
            [(ids, one.token_ids) for ids, one in zip(prompts, done, strict=True)],
            [list(one.sampler_logprobs) for one in done],
        )

    return TrainingSubject(
        where,
        lambda micro: sft_steps(model, tokenizer, rows, micro),
        BATCH,
        drawn,
        lambda asked: policy_scores(policy, asked),
        NATS[loaded.dtype],
        HALF_TOLERANCE if half else TOLERANCE,
    )


def sft_steps(
    model: str | Path, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenRow], micro: int
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of two steps of four rows of our SFT trainer, `micro` rows to a micro-batch."""
    from transformers import PrinterCallback
    from trl import SFTConfig

    from distill.sft import make_trainer
    from distill.training import load_for_training, trainer_arguments

    chosen = [rows[i % len(rows)] for i in range(STEPS * BATCH)]
    with tempfile.TemporaryDirectory(prefix="reason-") as scratch:
        arguments = trainer_arguments(
            Path(scratch), steps=STEPS, batch_size=micro, learning_rate=1e-4, warmup_ratio=0.0, min_lr_ratio=1.0,
            weight_decay=0.0, save_every=0, seed=0,
        )  # fmt: skip
        arguments |= {"gradient_accumulation_steps": BATCH // micro, "dataset_kwargs": {"skip_prepare_dataset": True}}
        student = load_for_training(model, max(map(len, chosen)))
        trainer = make_trainer(student, tokenizer, chosen, range(len(chosen)), SFTConfig(**arguments))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [(float(entry["loss"]), float(entry["grad_norm"])) for entry in logs]
