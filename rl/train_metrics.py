"""What an RL step reports: about the rollouts, the update, the dev problems. Apart from the loop, so that it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from rl.evaluate import count_words
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
    choose from. `signal_share`: groups whose total rewards differ.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    decided = [rollout for rollout in rollouts if rollout.verdict.decided]
    lengths = np.array([rollout.num_tokens for rollout in rollouts])
    words = [sum(count_words(r.completion.text, task.reflection_words).values()) for r in rollouts]
    return {
        "reward": float(np.mean([rollout.reward for rollout in decided])) if decided else float("nan"),
        "accuracy": float(np.mean([rollout.right for rollout in decided])) if decided else float("nan"),
        "undecided": 1 - len(decided) / len(rollouts),
        **{f"reward_{name}": value for name, value in mean_parts(list(groups)).items()},
        "tokens_mean": float(lengths.mean()),
        "tokens_median": float(np.median(lengths)),
        "tokens_p95": float(np.percentile(lengths, 95)),
        "truncated": float(np.mean([r.completion.finish_reason is FinishReason.LENGTH for r in rollouts])),
        "spread_tokens": float(np.mean([max(group.num_tokens) - min(group.num_tokens) for group in groups])),
        "signal_share": float(np.mean([max(group.rewards) > min(group.rewards) for group in groups])),
        "reflection_words": float(np.mean(words)),
    }


@dataclass(slots=True)
class UpdateMetrics:
    """Sums over the micro-batches of a step, turned into means per trained token at its end."""

    loss: float = 0.0
    tokens: float = 0.0
    entropy: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)

    def add(
        self, loss: torch.Tensor, sums: dict[str, torch.Tensor], entropies: torch.Tensor, mask: torch.Tensor
    ) -> None:
        self.loss += loss.item()
        self.tokens += mask.sum().item()
        self.entropy += torch.where(mask > 0, entropies, 0.0).sum().item()
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()

    def add_update(self, grad_norm: torch.Tensor) -> None:
        self.grad_norms.append(grad_norm.item())

    def means(self) -> dict[str, float]:
        """Empty when no row had signal, so that nothing is reported as zero that was not measured."""
        if not self.grad_norms:
            return {}
        names = {"clipped": "clip_share", "ratio_error": "ratio_error", "kl": "kl"}
        return {
            "loss": self.loss / len(self.grad_norms),
            "entropy": self.entropy / self.tokens,
            "grad_norm": float(np.mean(self.grad_norms)),
            "trained_tokens": self.tokens,
            **{names[name]: value / self.tokens for name, value in self.sums.items()},
        }
