"""What an RL step reports: about the rollouts, the update, the dev problems. Apart from the loop, so that it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from rl.evaluate import count_words
from rl.general import is_general
from rl.judging import judging_figures
from rl.mismatch import Mismatch
from rl.ranks import ALONE, Ranks
from rl.rewards import mean_parts
from rl.tasks.base import Task
from rl.types import FinishReason, RolloutGroup


@dataclass(frozen=True, slots=True)
class DevScore:
    """Accuracy and length on the dev problems after `step` updates."""

    step: int
    accuracy: float
    mean_tokens: float
    truncated: float  # share of completions that ran into the token limit

    def as_dict(self) -> dict:
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        return {"dev_accuracy": self.accuracy, "dev_tokens": self.mean_tokens, "dev_truncated": self.truncated}


def dev_score(step: int, groups: Sequence[RolloutGroup]) -> DevScore:
    """Means over problems of means over samples; undecided verdicts are left out."""
    decided = [[r for r in group.rollouts if r.verdict.decided] for group in groups]
    decided = [rollouts for rollouts in decided if rollouts]
    if not decided:
        raise ValueError("no dev completion has a verdict: the judge failed on all of them")
    rollouts = [r for group in groups for r in group.rollouts]
    return DevScore(
        step=step,
        accuracy=float(np.mean([np.mean([r.right for r in rollouts]) for rollouts in decided])),
        mean_tokens=float(np.mean([r.num_tokens for r in rollouts])),
        truncated=float(np.mean([r.completion.finish_reason is FinishReason.LENGTH for r in rollouts])),
    )


def rollout_metrics(groups: Sequence[RolloutGroup], task: Task) -> dict[str, float]:
    """Reward, accuracy, lengths, truncation and reflection words of one step's rollouts.

    `spread_tokens` is the mean over groups of (longest − shortest): once it is near zero a length reward has nothing to
    choose from. `signal_share`: groups whose total rewards differ. `general`, where there are any: the share of groups
    of general prompts, which accuracy leaves out. {} without groups.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:  # partial rollouts: nothing has closed yet
        return {}
    decided = [rollout for rollout in rollouts if rollout.verdict.decided]
    general = sum(is_general(group.problem) for group in groups)
    graded = [r for group in groups if not is_general(group.problem) for r in group.rollouts if r.verdict.decided]
    lengths = np.array([rollout.num_tokens for rollout in rollouts])
    words = [sum(count_words(r.completion.text, task.reflection_words).values()) for r in rollouts]
    return {
        "reward": float(np.mean([rollout.reward for rollout in decided])) if decided else float("nan"),
        "accuracy": float(np.mean([rollout.right for rollout in graded])) if graded else float("nan"),
        **({"general": general / len(groups)} if general else {}),
        "undecided": 1 - len(decided) / len(rollouts),
        **judging_figures(rollout.verdict for rollout in rollouts),
        **task.figures(),
        **{f"reward_{name}": value for name, value in mean_parts(list(groups)).items()},
        "tokens_mean": float(lengths.mean()),
        "tokens_median": float(np.median(lengths)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "truncated": float(np.mean([r.completion.finish_reason is FinishReason.LENGTH for r in rollouts])),
        "repetition": float(np.mean([r.completion.finish_reason is FinishReason.REPETITION for r in rollouts])),
        "spread_tokens": float(np.mean([max(group.num_tokens) - min(group.num_tokens) for group in groups])),
        "signal_share": float(np.mean([max(group.rewards) > min(group.rewards) for group in groups])),
        "reflection_words": float(np.mean(words)),
    }


class UpdateMetrics:
    """Sums over the micro-batches of a step, kept on the device, turned into means per trained token at its end."""

    def __init__(self) -> None:
        self.mismatch = Mismatch()
        self._sums: dict[str, torch.Tensor] = {}
        self._grad_norms: list[torch.Tensor] = []

    def add(
        self, loss: torch.Tensor, sums: Mapping[str, torch.Tensor], entropies: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """One micro-batch: its share of the loss, the objective's sums, (B, T) entropies and mask."""
        own = {
            "loss": loss.detach(),
            "trained_tokens": (mask > 0).sum(),
            "entropy": torch.where(mask > 0, entropies, 0.0).sum(),
            **sums,
        }
        for name, value in own.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    @property
    def num_updates(self) -> int:
        return len(self._grad_norms)

    def add_update(self, grad_norm: torch.Tensor) -> None:
        self._grad_norms.append(grad_norm.detach())

    def means(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Over all ranks. Empty when no row had signal, so that nothing is reported as zero that was not measured."""
        if not self._grad_norms:
            return {}
        names = ranks.names(self._sums)
        totals = ranks.sum([float(self._sums[name]) if name in self._sums else 0.0 for name in names])
        found = dict(zip(names, totals, strict=True))
        loss, tokens = found.pop("loss"), found.pop("trained_tokens")
        return {
            "loss": loss / len(self._grad_norms),
            "grad_norm": float(np.mean([float(norm) for norm in self._grad_norms])),
            "trained_tokens": tokens,
            **{name: value / tokens for name, value in found.items()},
            **self.mismatch.means(ranks),
        }
