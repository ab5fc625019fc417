"""Distillation on a teacher's stored logits: every token of a trace carries the teacher's distribution, not its choice.

The loss of a completion token is (1 − w) D_β(T‖S) + w (−log S(token)), with D_β the divergence over the teacher's k
likeliest tokens and one tail (distill/topk_logits.py), and w the weight of the plain cross-entropy; the mean over the
trained tokens of the whole batch, as in SFT. Defaults: forward KL alone, which Ministral 3 (arXiv 2601.08584) found
better than any mixture with cross-entropy; DistillKit's is w = .5. No factor T²: a loss at temperature 2 is about a
quarter of one at temperature 1.

Trainer, order of rows, micro-batches, packing, checkpoints, resume and guards are those of SFT (distill/sft.py,
distill/training.py). The loss is made inside the model's own forward, so that whatever wraps it (DDP, FSDP2, autocast)
sees every use of the parameters. Before every micro-batch its labels are compared with the tokens that the teacher
scored.

Line: `reason distill RECIPE`, a stage with `method: logit_distill`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig

from distill.divergence import CHUNK_TOKENS, OutputLayer, check_beta, chunked
from distill.guards import TokenRow
from distill.on_policy import require_same_tokens
from distill.sft import Forward, GuardedSFTTrainer, SftSettings, tokenize_traces, train_on_rows
from distill.sft_batches import Cut, MicroBatch, SftSteps, packed_inputs, without_labels
from distill.sft_loss import TrainedPositions, on_trained_positions
from distill.topk_logits import TeacherLogits, TopK, join, top_k_divergence, used_vocabulary
from distill.traces import Trace
from distill.training import Report
from rl.faults import fault
from rl.logprobs import LogitTransform
from rl.policy import PolicyModel, load_tokenizer
from rl.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (hidden states (M, H), output layer, targets (M,)) of the trained positions -> figures (M, n)
OfHidden = Callable[[torch.Tensor, OutputLayer, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LogitLoss:
    """What is taken of a token. Example: beta 0, ce_weight .25: .75 forward KL + .25 cross-entropy."""

    beta: float = 0.0  # 0 forward KL, 1 reverse KL, between them the generalised JSD
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        check_beta(self.beta)
        if not 0 <= self.ce_weight <= 1:
            raise ValueError(f"ce_weight = {self.ce_weight} is not within 0 and 1")

    def figures(self, teacher: TopK, logprobs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(M, 2): divergence and cross-entropy of M positions, in nats; `logprobs` (M, V), `targets` (M,)."""
        entropy = -logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return torch.stack([top_k_divergence(teacher, logprobs, self.beta), entropy], -1)

    def weigh(self, figures: torch.Tensor) -> torch.Tensor:
        """The loss of figures (..., 2): divergence .4 and cross-entropy 2, weight .25 -> .8."""
        return (1 - self.ce_weight) * figures[..., 0] + self.ce_weight * figures[..., 1]


def give_hidden_loss(model: PreTrainedModel, transform: LogitTransform) -> None:
    """Let `model(..., labels=..., of_hidden=f)` return f of the trained positions (distill/sft_loss.py).

    `transform` is what the model makes of its output layer's product (`rl.policy.PolicyModel.transform`).
    """

    def answer(of_hidden: OfHidden, at: TrainedPositions) -> torch.Tensor:
        return of_hidden(at.hidden, OutputLayer(at.weight, at.bias, transform), at.targets)

    on_trained_positions(model, "of_hidden", answer)


class LogitTrainer(GuardedSFTTrainer):
    """SFT's trainer with another loss. `places`: the row of the stored logits that each training row, by name, has."""

    def __init__(
        self, *args: Any, teacher: TeacherLogits, places: Mapping[str, int], loss: LogitLoss, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.places, self.loss = teacher, places, loss

    def inputs(self, batch: MicroBatch) -> dict[str, Any]:
        """What the model is given of a micro-batch, and what the teacher says of its trained tokens."""
        rows = [row for members in _by_prompt(batch.rows) for row in members]  # as packing lays them out
        inputs = self.inputs_of(rows, self.args.device)
        teacher = join([self.teacher[self.places[row.name]] for row in rows])
        targets = [token for row in rows for token in row.completion_ids]
        if not batch.trained:
            inputs, teacher, targets = without_labels(inputs), teacher[:0], []
        return {**inputs, "teacher": teacher.to(self.args.device), "targets": targets}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's part of the batch's loss, times the processes (DDP averages gradients over them)."""
        assert num_items_in_batch is not None
        teacher, wanted = inputs.pop("teacher"), inputs.pop("targets")

        def of_hidden(hidden: torch.Tensor, layer: OutputLayer, targets: torch.Tensor) -> torch.Tensor:
            if targets.tolist() != wanted:
                raise RuntimeError("TRL would train on other tokens than the teacher scored")
            facts = self.teacher.facts
            layer = OutputLayer(layer.weight, layer.bias, layer.transform, facts.vocab, facts.temperature)
            return chunked(
                hidden, layer, lambda logprobs, place: self.loss.figures(teacher[place], logprobs, targets[place]),
                CHUNK_TOKENS,
            )  # fmt: skip

        figures = model(**inputs, of_hidden=of_hidden)
        sums = self.accelerator.reduce(figures.detach().sum(0) / num_items_in_batch, reduction="sum")
        assert isinstance(sums, torch.Tensor)
        for name, value in zip(("divergence", "cross_entropy"), sums.tolist(), strict=True):
            self._metrics["train"][name].append(value)
        loss = self.loss.weigh(figures).sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _weigh_metrics(self, counts: Sequence[int]) -> None:
        """TRL averages over micro-batches; ours are parts of a mean over the batch."""
        for name in ("divergence", "cross_entropy"):
            values = self._metrics["train"][name]
            values[-len(counts) :] = [sum(values[-len(counts) :])]


def _by_prompt(rows: Sequence[TokenRow]) -> list[list[TokenRow]]:
    found: dict[tuple[int, ...], list[TokenRow]] = {}
    for row in rows:
        found.setdefault(row.prompt_ids, []).append(row)
    return list(found.values())


def require_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, stops: Sequence[int]
) -> None:
    """ValueError, by name and id, unless an id is the same token for both: a distribution has a place for every one.

    Example: a teacher with one token more is refused; for on-policy distillation it would do.
    """
    require_same_tokens(student, teacher, stops)
    known = set(student.get_vocab().values())
    for token, number in sorted(teacher.get_vocab().items(), key=lambda item: item[1]):
        if number not in known:
            raise ValueError(
                f"logits: the teacher's tokenizer is another one: id {number} is {token!r} for the teacher and nothing "
                "for the student, which has no place for its probability; add the token to the student, take a teacher "
                "of the same family, or distil from the traces (method: sft), which are text"
            )


def train(
    folder: Path,
    *,
    model: str | Path,
    traces: Sequence[Trace],
    logits: TeacherLogits,
    teacher_tokenizer: PreTrainedTokenizerBase,
    loss: LogitLoss,
    settings: SftSettings,
    ranks: Ranks = ALONE,
    report: Report = lambda step, total, metrics: None,
) -> dict[str, Any]:
    """Distil the logits of `traces` into `model`; arguments, files and resume as in `distill.sft.train`.

    metrics.jsonl has `divergence` and `cross_entropy`, nats per trained token, beside the loss.

    Errors: ValueError for a teacher with another tokenizer, a row that the guards refuse, or one whose tokens are not
    those that the teacher scored; FloatingPointError for a loss that is not finite.
    """
    tokenizer = load_tokenizer(model)
    require_same_vocabulary(tokenizer, teacher_tokenizer, logits.facts.stops)
    if used_vocabulary(tokenizer) != logits.facts.vocab:
        raise ValueError(
            f"logits: they are of {logits.facts.vocab} ids, the tokenizers have {used_vocabulary(tokenizer)}: the "
            "teacher's tokenizer was changed after it scored; run the teacher_logits stage again"
        )
    every = tokenize_traces(tokenizer, traces, settings.suffix)
    check_scored(every, logits)
    places = {row.name: place for place, row in enumerate(every)}

    def trainer(student: Any, rows: Any, order: Any, arguments: SFTConfig, cut: Cut) -> LogitTrainer:
        steps = SftSteps(rows, order, settings.batch_size, cut, ranks.rank, ranks.world)
        return make_trainer(student, tokenizer, steps, arguments, settings.forward, logits, places, loss)

    return train_on_rows(
        folder, model, tokenizer, every, settings, trainer,
        at_checkpoint=lambda: fault("logit_distill.checkpoint"), at_model=lambda: fault("logit_distill.model"),
        site="logit_distill.model", loss=(logits.facts, loss),
        facts={"teacher": logits.facts.teacher, "top_k": logits.facts.k}, ranks=ranks, report=report,
    )  # fmt: skip


def check_scored(rows: Sequence[TokenRow], logits: TeacherLogits) -> None:
    """ValueError unless row i has the very completion tokens that the teacher scored in row i."""
    if len(rows) != len(logits):
        raise ValueError(f"there are {len(rows)} traces, and {len(logits)} rows of logits")
    for place, row in enumerate(rows):
        if logits.token_ids(place) != row.completion_ids:
            raise ValueError(
                f"{row.name}: the student's tokens of this completion are not those that the teacher scored, though "
                "every id has the same name: their tokenizers split text differently; distil from the traces "
                "(method: sft), which are text"
            )


def make_trainer(
    model: Any,
    tokenizer: Any,
    steps: SftSteps,
    arguments: SFTConfig,
    forward: Forward,
    logits: TeacherLogits,
    places: Mapping[str, int],
    loss: LogitLoss,
) -> LogitTrainer:
    """The trainer over `steps`.

    Errors: ValueError for a model that is not computed as `rl.policy.PolicyModel` computes it, and for one with a
    load-balancing loss, which is not added here.
    """
    first = steps.rows[0]
    trainer = LogitTrainer(
        model=model,
        args=arguments,
        # TRL looks at a row before it starts; what is trained comes from `steps`.
        train_dataset=Dataset.from_dict({"input_ids": [first.input_ids], "labels": [first.labels]}),
        processing_class=tokenizer,
        steps=steps,
        inputs_of=packed_inputs if forward.packing else None,
        chunked_loss=True,
        teacher=logits,
        places=places,
        loss=loss,
    )
    if trainer.aux_loss_enabled:
        raise ValueError(f"{type(model).__name__} has a load-balancing loss, which logit_distill does not compute")
    # Compares the model's logits with what is made of its output layer here, and sets attention that reads packed rows.
    policy = PolicyModel(model)
    unwrap = getattr(model, "get_base_model", None)  # PEFT
    give_hidden_loss(model if unwrap is None else unwrap(), policy.transform)
    return trainer
