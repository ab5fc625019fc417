"""GRPO: reinforcement learning from rule rewards, with the group's mean as the baseline.

Implements group-relative policy optimisation (DeepSeekMath, 2402.03300, section 4.1; DeepSeek-R1, 2501.12948) in the
form that is now common ground. Deviations from the paper:

1. The advantage is r − group mean; dividing by the group's standard deviation is an option (see rl/advantages.py).
2. The clip has two sides, ε_low and ε_high (DAPO, 2503.14476, section 3.1).
3. The loss is a token mean over the whole optimizer batch, not a mean of per-sequence means (DAPO, section 3.3).
4. No KL by default; when on, the ratio-corrected k3 (DeepSeek-V3.2, 2512.02556) against the starting model.
5. The sampler's own log-probs are the old policy's: nothing is recomputed before the update.

Run it: `reason rl tiny`, or any recipe with a `method: grpo` stage.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.advantages import AdvantageRule, mean_baseline
from rl.batching import TrainingRow, collate, micro_batches, training_rows
from rl.checkpoint import load_training_state, save_training_state
from rl.faults import fault
from rl.objectives import KLEstimator, clipped_surrogate, k3_corrected, kl_penalty
from rl.policy import pad_token_id, save_model, token_logprobs
from rl.rewards import WeightedReward, score
from rl.rollout import sample_groups
from rl.runs import append_line, latest_checkpoint, rewind_lines, save_checkpoint, write_json
from rl.samplers.base import SamplingSettings, sample_seed
from rl.samplers.transformers import TransformersSampler
from rl.tasks.base import Task
from rl.train_metrics import DevScore, UpdateMetrics, dev_score, rollout_metrics
from rl.types import Problem, RolloutGroup

Shape = Callable[[list[RolloutGroup], int], list[RolloutGroup]]
Prefer = Callable[[DevScore, DevScore | None, DevScore], bool]
Report = Callable[[int, int, dict[str, float]], None]


def no_shaping(groups: list[RolloutGroup], step: int) -> list[RolloutGroup]:
    """Plain RL: the rule rewards as they are."""
    return groups


def prefer_last(candidate: DevScore, incumbent: DevScore | None, start: DevScore) -> bool:
    """Keep the last model, whatever its score."""
    return True


def prefer_accurate(candidate: DevScore, incumbent: DevScore | None, start: DevScore) -> bool:
    """Keep the most accurate model on dev problems; the earlier one of equals."""
    return incumbent is None or candidate.accuracy > incumbent.accuracy


@dataclass(frozen=True, slots=True)
class PreferBrief:
    """Keep the model with the fewest tokens among those whose dev accuracy is at least the start's less `tolerance`;
    while none qualifies, the most accurate one. The rule by which long2short RL chooses its checkpoint."""

    tolerance: float

    def __call__(self, candidate: DevScore, incumbent: DevScore | None, start: DevScore) -> bool:
        if incumbent is None:
            return True
        floor = start.accuracy - self.tolerance
        if (candidate.accuracy >= floor) != (incumbent.accuracy >= floor):
            return candidate.accuracy >= floor
        if candidate.accuracy >= floor:
            return candidate.mean_tokens < incumbent.mean_tokens
        return candidate.accuracy > incumbent.accuracy


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """AdamW and the clipped surrogate."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    updates_per_step: int = 1  # optimizer steps a rollout batch is split into; 1 is fully on-policy
    epsilon_low: float = 0.2
    epsilon_high: float = 0.28
    micro_batch_tokens: int = 16_384  # padded tokens a forward pass holds; changes memory and speed, not the result


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, how often."""

    steps: int
    problems_per_step: int
    group_size: int
    eval_every: int = 0  # 0: never
    eval_samples: int = 2
    save_every: int = 10
    stop_at_accuracy: float | None = None  # end early once dev accuracy reaches this, to keep spread in the policy


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    dev_problems: Sequence[Problem],
    task: Task,
    rewards: tuple[WeightedReward, ...],
    sampling: SamplingSettings,
    schedule: Schedule,
    optim: OptimSettings,
    folder: Path,
    *,
    seed: int,
    shape: Shape = no_shaping,
    advantage_rule: AdvantageRule = mean_baseline,
    prefer: Prefer = prefer_last,
    ref_model: PreTrainedModel | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = k3_corrected,
    prompt_suffix: str = "",
    batch_size: int = 256,
    report: Report = lambda step, steps, metrics: None,
) -> None:
    """Train `model` in place and write `folder`/model, metrics.jsonl and summary.json.

    Checkpoints lie in `folder`/checkpoints; called again on the same folder it goes on from the newest complete one and
    gives the bits that the uninterrupted run would have given. `prefer` decides, on dev problems only, which evaluated
    model is kept. `shape` sees the step's scored groups before advantages are taken: the length reward plugs in here.
    """
    if sampling.top_p != 1:
        raise ValueError(f"RL needs top_p = 1, got {sampling.top_p}: truncated sampling biases the importance ratio")
    if kl_coefficient > 0 and ref_model is None:
        raise ValueError(f"kl_coefficient = {kl_coefficient} needs a reference model")
    sampler = TransformersSampler(model, tokenizer, batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.learning_rate, betas=optim.betas, weight_decay=optim.weight_decay
    )
    run = _Run(folder, model, tokenizer, optimizer, prefer)
    run.resume()

    def evaluate(step: int) -> DevScore:
        groups = sample_groups(
            sampler,
            tokenizer,
            dev_problems,
            task,
            schedule.eval_samples,
            sampling,
            sample_seed(seed, "dev"),
            prompt_suffix,
        )
        return dev_score(step, groups)

    if run.step == 0 and schedule.eval_every:
        run.consider(evaluate(0))
    while run.step < schedule.steps and not run.good_enough(schedule.stop_at_accuracy):
        step = run.step + 1
        fault("grpo.step")
        started = time.perf_counter()
        chosen = draw_problems(problems, step, schedule.problems_per_step, seed)
        groups = sample_groups(
            sampler,
            tokenizer,
            chosen,
            task,
            schedule.group_size,
            sampling,
            sample_seed(seed, "train", step),
            prompt_suffix,
        )
        sampled = time.perf_counter()
        groups = shape([score(group, rewards) for group in groups], step)
        update = UpdateMetrics()
        for minibatch in split_groups(groups, optim.updates_per_step, sample_seed(seed, "split", step)):
            rows = training_rows(minibatch, advantage_rule, keep_constant=kl_coefficient > 0)
            update_policy(
                model, optimizer, rows, decided_tokens(minibatch), optim, sampling.temperature, pad_token_id(tokenizer),
                update, ref_model, kl_coefficient, kl_estimator,
            )  # fmt: skip
            sampler.policy_version += 1
        run.step = step
        metrics = rollout_metrics(groups, task) | update.means()
        metrics |= speeds(groups, sampled - started, time.perf_counter() - sampled)
        if schedule.eval_every and (step % schedule.eval_every == 0 or step == schedule.steps):
            metrics |= run.consider(evaluate(step)).metrics()
        run.log(metrics)
        report(step, schedule.steps, metrics)
        if step % schedule.save_every == 0:
            run.save()
    run.finish()


def draw_problems(problems: Sequence[Problem], step: int, count: int, seed: int) -> list[Problem]:
    """The problems of a step (from 1): epochs of a seeded shuffle, cut into consecutive pieces, nothing skipped.

    A function of its arguments alone, so a resumed run sees exactly the problems it would have seen.
    """
    chosen = []
    for position in range((step - 1) * count, step * count):
        epoch, index = divmod(position, len(problems))
        order = list(range(len(problems)))
        random.Random(sample_seed(seed, "epoch", epoch)).shuffle(order)
        chosen.append(problems[order[index]])
    return chosen


def split_groups(groups: list[RolloutGroup], parts: int, seed: int) -> list[list[RolloutGroup]]:
    """Groups in seeded random order, cut into `parts` of equal size: one optimizer step each."""
    if parts == 1:
        return [groups]
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    return [[groups[i] for i in order[part::parts]] for part in range(parts)]


def decided_tokens(groups: Sequence[RolloutGroup]) -> int:
    """The loss's denominator: completion tokens of all decided rollouts, with or without signal. Rows without signal
    may then be left out of the forward pass without changing the loss."""
    return sum(r.num_tokens for group in groups for r in group.rollouts if r.verdict.decided)


def update_policy(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[TrainingRow],
    num_tokens: int,
    optim: OptimSettings,
    temperature: float,
    pad_id: int,
    metrics: UpdateMetrics,
    ref_model: PreTrainedModel | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: KLEstimator = k3_corrected,
) -> None:
    """One optimizer step on `rows`, accumulated over micro-batches; `num_tokens` is the denominator of the loss.

    A loss or gradient that is not finite raises before the weights are touched. No rows: no step.
    """
    if not rows:
        return
    for chunk in micro_batches(rows, optim.micro_batch_tokens):
        batch = collate(chunk, pad_id, model.device)
        policy_logprobs, entropies = token_logprobs(
            model, batch.input_ids, batch.attention_mask, batch.num_completion, temperature
        )
        loss, sums = clipped_surrogate(
            policy_logprobs, batch.sampler_logprobs, batch.advantages, batch.completion_mask,
            epsilon_low=optim.epsilon_low, epsilon_high=optim.epsilon_high, denominator=num_tokens,
        )  # fmt: skip
        if ref_model is not None and kl_coefficient > 0:
            with torch.no_grad():
                ref_logprobs, _ = token_logprobs(
                    ref_model, batch.input_ids, batch.attention_mask, batch.num_completion, temperature
                )
            kl = kl_penalty(
                kl_estimator, policy_logprobs, ref_logprobs, batch.sampler_logprobs, batch.completion_mask,
                denominator=num_tokens,
            )  # fmt: skip
            loss = loss + kl_coefficient * kl
            sums["kl"] = kl.detach() * num_tokens
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()}; the weights are those before this step")
        loss.backward()
        metrics.add(loss, sums, entropies, batch.completion_mask)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
    if not torch.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient norm is {grad_norm.item()}; the weights are those before this step")
    fault("grpo.update")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    metrics.add_update(grad_norm)


def speeds(groups: Sequence[RolloutGroup], rollout_seconds: float, train_seconds: float) -> dict[str, float]:
    """Tokens a second of the two halves of a step."""
    tokens = sum(sum(group.num_tokens) for group in groups)
    return {
        "rollout_tokens_per_second": tokens / rollout_seconds,
        "train_tokens_per_second": tokens / train_seconds,
        "step_seconds": rollout_seconds + train_seconds,
    }


class _Run:
    """The state of one training run and where it lies on disk."""

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.AdamW,
        prefer: Prefer,
    ) -> None:
        self.folder, self.model, self.tokenizer, self.optimizer, self.prefer = (
            folder,
            model,
            tokenizer,
            optimizer,
            prefer,
        )
        self.step = 0
        self.scores: list[DevScore] = []
        self.kept: DevScore | None = None
        self.metrics_path = folder / "metrics.jsonl"

    def resume(self) -> None:
        """Go back to the newest complete checkpoint, if there is one; later lines of metrics.jsonl are dropped."""
        found = latest_checkpoint(self.folder)
        shutil.rmtree(self.folder / "best", ignore_errors=True)  # of a later step than the checkpoint, or torn
        if found is None:
            self.metrics_path.unlink(missing_ok=True)
            return
        _, path = found
        state = load_training_state(path, self.model, self.optimizer)
        self.step = state["step"]
        self.scores = [DevScore(**score) for score in state["scores"]]
        self.kept = DevScore(**state["kept"]) if state["kept"] else None
        if (path / "best").exists():
            shutil.copytree(path / "best", self.folder / "best")
        rewind_lines(self.metrics_path, self.step)

    def consider(self, score: DevScore) -> DevScore:
        """Record a dev score; keep the model if the rule prefers it to the one kept so far."""
        self.scores.append(score)
        if self.prefer(score, self.kept, self.scores[0]):
            self.kept = score
            shutil.rmtree(self.folder / "best", ignore_errors=True)
            save_model(self.model, self.tokenizer, self.folder / "best")
        return score

    def good_enough(self, accuracy: float | None) -> bool:
        return accuracy is not None and bool(self.scores) and self.scores[-1].accuracy >= accuracy

    def log(self, metrics: dict[str, float]) -> None:
        append_line(self.metrics_path, {"step": self.step, **metrics})

    def save(self) -> None:
        def write(path: Path) -> None:
            state = {
                "step": self.step,
                "scores": [score.as_dict() for score in self.scores],
                "kept": self.kept.as_dict() if self.kept else None,
            }
            save_training_state(path, self.model, self.optimizer, state)
            if (self.folder / "best").exists():
                shutil.copytree(self.folder / "best", path / "best")

        save_checkpoint(self.folder, self.step, write)

    def finish(self) -> None:
        """Write the kept model (the last one if nothing was evaluated) and the summary."""
        fault("grpo.model")
        model_folder = self.folder / "model"
        shutil.rmtree(model_folder, ignore_errors=True)
        if (self.folder / "best").exists():
            (self.folder / "best").rename(model_folder)
        else:
            save_model(self.model, self.tokenizer, model_folder)
        summary = {
            "steps": self.step,
            "kept_step": self.kept.step if self.kept else self.step,
            "dev": [score.as_dict() for score in self.scores],
        }
        write_json(self.folder / "summary.json", summary, "grpo.summary")
