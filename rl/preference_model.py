"""The preference model of DeepSeek-R1's second RL stage: a reward model that was trained on pairs.

R1 (2501.12948, second RL stage) adds to the rule rewards a reward model for helpfulness, trained on pairs, which scores
the final summary alone. `PreferenceModel` loads such a model, as `rl.preference_training` or TRL's `RewardTrainer`
writes it: a sequence classifier with one output. (R1's safety model, and both as a prompted judge: `rl.tasks.judge`.)
The paper uses them only in the last 400 of 1,700 steps, since a policy that is paid by one for longer learns to exploit
it (rl/general.py); the weight is the caller's.

It is asked about all groups of a step at once (rl/batch_rewards.py):

    reward = WeightedBatchReward("preference", PreferenceReward(PreferenceModel(folder)), 0.2)

Imported without torch; a `PreferenceModel` needs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rl.judging import JudgeFailed
from rl.samplers.chat import without_control_tokens
from rl.tasks.base import UndecidedLimit
from rl.tasks.extraction import final_part
from rl.types import RolloutGroup

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

LIMIT = UndecidedLimit()


@dataclass(frozen=True, slots=True)
class PreferenceReward:
    """The `BatchReward` of a preference model: its raw score of (question, summary after `</think>`).

    A completion without a summary gets the lowest score of its group: the model never saw such a thing, and not
    answering must not pay. One that is too long for the model has no score.

    Errors: JudgeFailed where more rollouts are too long than `limit` allows.
    """

    model: PreferenceModel
    limit: UndecidedLimit = LIMIT

    def __call__(self, groups: Sequence[RolloutGroup]) -> list[list[float | None]]:
        """(G, k) scores."""
        summaries = [[(final_part(r.completion.text) or "").strip() for r in group.rollouts] for group in groups]
        pairs = [
            (group.problem.text, summary)
            for group, row in zip(groups, summaries, strict=True)
            for summary in row
            if summary
        ]
        scores = self.model.score(pairs)
        too_long = sum(score is None for score in scores)
        if self.limit.exceeded(too_long, len(scores)):
            raise JudgeFailed(
                f"{too_long} of {len(scores)} summaries do not fit into the {self.model.max_tokens} tokens of the "
                f"preference model {self.model.name}, more than the {self.limit.share:.0%} that a run may lose"
            )
        found = iter(scores)
        return [_lowest_for_none([(next(found) if summary else math.nan) for summary in row]) for row in summaries]


def _lowest_for_none(scores: Sequence[float | None]) -> list[float | None]:
    """The scores of a group, its lowest in the place of NaN (no summary); None where there is none."""
    given = [score for score in scores if score is not None and not math.isnan(score)]
    return [min(given, default=None) if score is not None and math.isnan(score) else score for score in scores]


def conversation_ids(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> list[int]:
    """What a preference model reads, scored or trained: question and answer in the chat template. Control tokens that
    the texts spell are broken up."""
    user, assistant = (without_control_tokens(tokenizer, text) for text in (question, answer))
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written its own


class PreferenceModel:
    """A reward model: a sequence classifier with one output, from a Hugging Face folder or id."""

    def __init__(self, name: str | Path, *, max_tokens: int | None = None, batch_tokens: int = 16_384) -> None:
        """`max_tokens`: of question and summary in the chat template; None: as many as the model has positions for.
        `batch_tokens`: of one forward pass, padding included. On a GPU if there is one, there in bf16, else in fp32.

        Errors: ValueError, with the model's name, for another number of outputs than one, a head that is not in the
        files (it would be random), no chat template, or more tokens than positions. Only safetensors are read, and no
        code that comes with the model is run.
        """
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification

        from rl.policy import load_tokenizer

        self.name, self.batch_tokens = str(name), batch_tokens
        config = AutoConfig.from_pretrained(self.name, trust_remote_code=False)
        if config.num_labels != 1:
            labels = ", ".join(map(str, list((config.id2label or {}).values())[:5]))
            raise ValueError(f"{name} has {config.num_labels} outputs ({labels}), a preference model has one score")
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
        self.max_tokens = positions if max_tokens is None else max_tokens
        if not 0 < self.max_tokens <= positions:
            raise ValueError(f"{name} has {positions} positions, max_tokens is {max_tokens}")
        self.tokenizer = load_tokenizer(self.name)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{name} has no chat template, so nobody knows what its questions and answers look like")
        on_gpu = torch.cuda.is_available()
        self.model, loading = AutoModelForSequenceClassification.from_pretrained(
            self.name, dtype=torch.bfloat16 if on_gpu else torch.float32,
            use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
        if loading["missing_keys"]:
            raise ValueError(
                f"{name} is no preference model: its files lack {', '.join(sorted(loading['missing_keys']))}"
            )
        self.model = self.model.to("cuda" if on_gpu else "cpu").eval()
        # With a pad token of its own the model reads its score at the last token before the padding.
        self._own_pad = self.model.config.get_text_config().pad_token_id

    def token_ids(self, question: str, summary: str) -> list[int]:
        """The conversation in the chat template."""
        return conversation_ids(self.tokenizer, question, summary)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """One score for each (question, summary), in order; None for one that does not fit: nothing is ever cut off.

        Errors: FloatingPointError for a score that is not finite.
        """
        import torch

        rows = [self.token_ids(question, summary) for question, summary in pairs]
        scores: list[float | None] = [None] * len(rows)
        fitting = [i for i, row in enumerate(rows) if len(row) <= self.max_tokens]
        with torch.no_grad():
            for batch in self._batches(fitting, rows):
                for i, value in zip(batch, self._forward([rows[i] for i in batch]).tolist(), strict=True):
                    if not math.isfinite(value):
                        raise FloatingPointError(f"{self.name} gives {value} for an answer to {pairs[i][0][:60]!r}")
                    scores[i] = value
        return scores

    def _batches(self, indices: Sequence[int], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Rows of like lengths together, at most `batch_tokens` with their padding, one row at least."""
        batch: list[int] = []
        for i in sorted(indices, key=lambda i: -len(rows[i])):
            if batch and len(rows[batch[0]]) * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """(B,) scores in fp32."""
        import torch

        pad = self._own_pad
        if pad is None:
            # A model without a pad token reads the last token. The library looks for the last one that is not the pad
            # token, so any that ends no row will do.
            ends = {row[-1] for row in rows}
            pad = next(i for i in range(len(ends) + 1) if i not in ends)
            self.model.config.get_text_config().pad_token_id = pad
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.model.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.model.device)
        mask = (torch.arange(width, device=self.model.device) < lengths.unsqueeze(-1)).long()
        return self.model(input_ids=ids, attention_mask=mask).logits.float().squeeze(-1)
