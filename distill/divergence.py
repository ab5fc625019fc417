"""How far a student's next-token distribution is from its teacher's: forward KL, reverse KL and what lies between.

Implements the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, section 3):

    D_β(T‖S) = β KL(T‖M) + (1 − β) KL(S‖M),    M = β T + (1 − β) S

At β = 0 and β = 1 this formula is 0 for any T and S; there it stands, as in the paper's limit and in TRL, for the
forward KL(T‖S) and the reverse KL(S‖T). Everything behind the output layer's product is fp32. There is no factor T².

No more than `chunk_tokens` positions of logits are held at a time, and backward makes them again (`chunked`). The
vocabulary is cut to the ids that the tokenizer uses: what pads an output layer (Qwen2.5: 151,936 rows for 151,669 ids)
has no meaning that two models share. Parity with TRL's `DistillationTrainer`: tests/test_divergence.py.

Line: `reason distill RECIPE`, a stage with `method: logit_distill` (distill/topk_distill.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from rl.logprobs import PLAIN, LogitTransform

CHUNK_TOKENS = 512  # about five copies of a chunk's logits live at once


def divergence(teacher: torch.Tensor, student: torch.Tensor, beta: float = 0.0) -> torch.Tensor:
    """D_β(T‖S) in nats of log-probs (..., V), (...,); gradients flow into both. The teacher's may hold −∞.

    Example: T (.7, .3), S (.5, .5): β 0 gives .0822829, β 1 .0871767, β .5 .0210059.

    Errors: ValueError for a β outside [0, 1].
    """
    check_beta(beta)
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def check_beta(beta: float) -> None:
    """ValueError for a β that is not within [0, 1]."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta = {beta} is not within 0 (forward KL) and 1 (reverse KL)")


def _kl(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """KL(left‖right) of log-probs; what has no probability on the left adds nothing."""
    gap = torch.where(left == -math.inf, 0.0, left - right)
    return (left.exp() * gap).sum(-1)


def token_mean(values: torch.Tensor, mask: torch.Tensor, count: float | None = None) -> torch.Tensor:
    """The sum of `values` where `mask` is not 0, over `count` tokens; None: over those of the mask, at least one.

    Pass the count of the whole batch where a batch is cut up: a mean of means would weigh short rows more.
    Example: values (1, 3, 9), mask (1, 1, 0): 2; with count 4: 1.
    """
    trained = mask != 0
    total = torch.where(trained, values, 0.0).sum()
    return total / (trained.sum().clamp(min=1) if count is None else count)


@dataclass(frozen=True, slots=True)
class OutputLayer:
    """A model's last layer, cut to the vocabulary that is compared."""

    weight: torch.Tensor  # (≥ V, H)
    bias: torch.Tensor | None = None  # (≥ V,)
    transform: LogitTransform = PLAIN
    vocab: int | None = None  # V; None: all rows
    temperature: float = 1.0

    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probs (M, V) in fp32 nats of hidden states (M, H).

        Example: logits (0, log 3, 9) with vocab 2: (log .25, log .75).

        Errors: ValueError for a vocabulary that the layer has not.
        """
        if self.vocab is not None and self.vocab > len(self.weight):
            raise ValueError(
                f"the output layer has {len(self.weight)} rows, the tokenizer {self.vocab} ids: resize the model's "
                "embeddings to its tokenizer"
            )
        # Cut before the product: a row that pads the layer must not even be computed.
        weight, bias = self.weight[: self.vocab], None if self.bias is None else self.bias[: self.vocab]
        logits = linear(hidden.to(weight.dtype), weight, bias).float()
        logits = logits * self.transform.scale
        if self.transform.softcap is not None:
            logits = (logits / self.transform.softcap).tanh() * self.transform.softcap
        return (logits / self.temperature).log_softmax(-1)


def chunked(
    hidden: torch.Tensor,
    layer: OutputLayer,
    figures: Callable[[torch.Tensor, slice], torch.Tensor],
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """`figures` of the log-probs of every position: (m, V) and their place in M -> (m, ...); together (M, ...).

    Hidden states (M, H). Without a gradient to make nothing is kept; otherwise each chunk is computed again.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}; at least one position must go through the output layer")

    def of_chunk(states: torch.Tensor, place: slice) -> torch.Tensor:
        return figures(layer.logprobs(states), place)

    found = []
    for start in range(0, max(len(hidden), 1), chunk_tokens):  # once for nothing: the gradient must have its path
        place = slice(start, start + chunk_tokens)
        if torch.is_grad_enabled():
            values = checkpoint(of_chunk, hidden[place], place, use_reentrant=False, preserve_rng_state=False)
        else:
            values = of_chunk(hidden[place], place)
        assert isinstance(values, torch.Tensor)
        found.append(values)
    return torch.cat(found)


def hidden_divergence(
    student_hidden: torch.Tensor,
    student: OutputLayer,
    teacher_hidden: torch.Tensor,
    teacher: OutputLayer,
    beta: float = 0.0,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """D_β(T‖S) at M positions from the hidden states (M, H) of both models, whose widths may differ: (M,) in nats.

    The gradient flows into the student alone. Errors: ValueError for vocabularies of two sizes.
    """
    sizes = [layer.vocab or len(layer.weight) for layer in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the student's logits are of {sizes[0]} ids, the teacher's of {sizes[1]}: give both layers the vocabulary "
            "that their tokenizers share (vocab)"
        )

    def of_logprobs(logprobs: torch.Tensor, place: slice) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher.logprobs(teacher_hidden[place])
        return divergence(wanted, logprobs, beta)

    return chunked(student_hidden, student, of_logprobs, chunk_tokens)
