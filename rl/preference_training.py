"""Training a preference model: a sequence classifier with one output, on pairs of answers, by the pairwise loss.

The helpfulness model of DeepSeek-R1 (arXiv 2501.12948, section 2.3.4 and its supplement): 66,000 pairs, loss
-log sigmoid(score of the better - score of the worse) (Bradley-Terry), batches of 256, learning rate 6e-6, one epoch,
at most 8,192 tokens. It reads the question and the final answer alone, never the thought, and so does
`rl.preference_model`, which scores with what is written here. Deviations: pairs of the dev and test splits of their
questions are held out, and their accuracy is reported; the learning rate rises over the first twentieth of the steps.
R1's safety model, trained on single labelled responses with their thoughts, is not made here.

Line: `reason run RECIPE`, the stage with `method: preference_model`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from rl.faults import fault
from rl.jsonl import read_rows
from rl.policy import load_tokenizer, pad_token_id, save_model
from rl.preference_model import conversation_ids
from rl.runs import append_line
from rl.tasks.base import split_of
from rl.tasks.extraction import final_part
from rl.types import Problem, TextPart

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIELDS = {"question": str, "chosen": str, "rejected": str}
Report = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two final answers to one question, the first of which is preferred.

    Example: `Preference("say 470", "470, my friend", "47")`
    """

    question: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class PreferenceSettings:
    """How a preference model is trained; the defaults are R1's."""

    epochs: int = 1
    batch_size: int = 256
    learning_rate: float = 6e-6
    max_length: int = 8_192  # tokens of question and answer in the chat template
    weight_decay: float = 0.0


def read_preferences(path: Path) -> list[Preference]:
    """Pairs from JSON lines with `question`, `chosen` and `rejected`; of a text with a thought the final answer counts.

    Errors: ValueError, with file and line, for a row that is no such pair, and for a file without one.
    """
    found = []
    for place, row in read_rows(path, FIELDS):
        chosen, rejected = (final_part(row[side]) or "" for side in ("chosen", "rejected"))
        if not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
            raise ValueError(f"{place}: chosen and rejected must be two different final answers")
        found.append(Preference(row["question"], chosen.strip(), rejected.strip()))
    if not found:
        raise ValueError(f"{path} holds no pairs: nothing to train on")
    return found


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Mean of -log sigmoid(chosen - rejected), two (B,) of scores.

    Example: scores 1 against 0 and 0 against 0: (log(1 + e^-1) + log 2) / 2 = (.3133 + .6931) / 2 = .5032.
    """
    return -logsigmoid(chosen - rejected).mean()


def train_preference_model(
    folder: Path,
    *,
    model: str | Path,
    preferences: Sequence[Preference],
    settings: PreferenceSettings,
    seed: int,
    report: Report = lambda step, total, metrics: None,
) -> dict[str, Any]:
    """Train a classifier that starts as the causal model `model`; writes `folder`/model and metrics.jsonl, returns a
    summary with the accuracy on held-out pairs (None where there is none).

    Errors: ValueError for a pair longer than `max_length`, and where no pair is left to train on; FloatingPointError
    for a loss that is not finite.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(model)
    rows = [_token_pair(tokenizer, pair, settings.max_length) for pair in preferences]
    held = [row for row, pair in zip(rows, preferences, strict=True) if _held_out(pair)]
    train = [row for row, pair in zip(rows, preferences, strict=True) if not _held_out(pair)]
    if not train:
        raise ValueError(f"of {len(rows)} pairs none is left to train on: those of dev and test questions are held out")
    pad = pad_token_id(tokenizer)
    scorer = AutoModelForSequenceClassification.from_pretrained(str(model), num_labels=1, dtype=torch.float32)
    scorer.config.pad_token_id = pad
    scorer.to("cuda" if torch.cuda.is_available() else "cpu").train()
    optimizer = torch.optim.AdamW(
        scorer.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / max(1, steps // 20)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    for step, batch in enumerate(_batches(train, settings, seed), 1):
        chosen, rejected = _scores(scorer, batch, pad)
        loss = pairwise_loss(chosen, rejected)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"step {step}: the loss is {loss.item()}; lower learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        metrics = {"loss": loss.item(), "accuracy": (chosen > rejected).float().mean().item()}
        append_line(folder / "metrics.jsonl", {"step": step, **metrics})
        report(step, steps, metrics)
    scorer.eval()
    fault("preference.model")
    save_model(scorer, tokenizer, folder / "model")
    return {
        "pairs": len(train),
        "held_out": len(held),
        "steps": steps,
        "held_out_accuracy": _accuracy(scorer, held, settings.batch_size, pad),
    }


TokenPair = tuple[list[int], list[int]]


def _held_out(pair: Preference) -> bool:
    return split_of(Problem("pair", (TextPart(pair.question),), answer="")) != "train"


def _token_pair(tokenizer: PreTrainedTokenizerBase, pair: Preference, max_length: int) -> TokenPair:
    ids = [conversation_ids(tokenizer, pair.question, answer) for answer in (pair.chosen, pair.rejected)]
    longest = max(map(len, ids))
    if longest > max_length:
        raise ValueError(
            f"a pair on {pair.question[:60]!r} has {longest} tokens, more than max_length ({max_length}): nothing is "
            "cut, raise max_length or leave the pair out"
        )
    return ids[0], ids[1]


def _batches(rows: Sequence[TokenPair], settings: PreferenceSettings, seed: int) -> Iterator[list[TokenPair]]:
    rng = random.Random(seed)
    for _ in range(settings.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(rows), settings.batch_size):
            yield [rows[i] for i in order[start : start + settings.batch_size]]


def _scores(scorer: PreTrainedModel, batch: Iterable[TokenPair], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of the chosen and of the rejected sides, two (B,), from one forward pass."""
    pairs = list(batch)
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=scorer.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=scorer.device)
    scores = scorer(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1)
    return scores[: len(pairs)], scores[len(pairs) :]


@torch.no_grad()
def _accuracy(scorer: PreTrainedModel, rows: Sequence[TokenPair], batch_size: int, pad: int) -> float | None:
    """The share of pairs whose better answer has the higher score."""
    right = 0
    for start in range(0, len(rows), batch_size):
        chosen, rejected = _scores(scorer, rows[start : start + batch_size], pad)
        right += int((chosen > rejected).sum())
    return right / len(rows) if rows else None
