"""GRPO and its relatives: reinforcement learning from rule rewards, with the group as the baseline.

Implements group-relative policy optimisation (DeepSeekMath, 2402.03300, section 4.1; DeepSeek-R1, 2501.12948) as a loop
of five lines: collect judged groups, take advantages, update, evaluate, save. What the methods differ in is passed in:
the objective (rl/objectives.py), the advantage rule (rl/advantages.py), the source of problems (rl/curriculum.py), the
way rollouts are collected (rl/collect.py).

Deviations of the defaults from the paper:

1. The advantage is r − group mean; dividing by the group's standard deviation is an option (see rl/advantages.py).
2. The clip has two sides, ε_low and ε_high (DAPO, 2503.14476, section 3.1).
3. The loss is a token mean over the whole optimizer batch, not a mean of per-sequence means (DAPO, section 3.3).
4. No KL by default.
5. The sampler's own log-probs are the old policy's: nothing is recomputed before the update unless the sampler is
   another engine.

Run it: `reason rl tiny`, or any recipe with a `method: grpo` stage.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from rl.advantages import AdvantageRule, mean_baseline
from rl.collapse import CollapseMonitor
from rl.collect import Collector
from rl.faults import fault
from rl.learner import Learner
from rl.ranks import ALONE, Ranks
from rl.refusal import require_finite
from rl.rollout import sample_groups
from rl.rows import BaselineRows, RowsOf
from rl.run_state import Prefer, RunState, prefer_last
from rl.samplers.base import SamplingSettings, sample_seed
from rl.tasks.base import Task
from rl.train_metrics import DevScore, UpdateMetrics, dev_score, rollout_metrics
from rl.types import Problem, RolloutGroup

Report = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long, how often."""

    steps: int
    eval_every: int = 0  # 0: never
    eval_samples: int = 2
    save_every: int = 10
    stop_at_accuracy: float | None = None  # end early once dev accuracy reaches this, to keep spread in the policy
    keep_models: bool = False  # those of all evaluations, in models/<step>


@dataclass(frozen=True, slots=True)
class DevSet:
    """The dev problems and how they are sampled: what checkpoints are chosen by."""

    problems: Sequence[Problem]
    task: Task
    sampling: SamplingSettings
    prompt_suffix: str = ""


def train(
    learner: Learner,
    collector: Collector,
    dev: DevSet,
    tokenizer: PreTrainedTokenizerBase,
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
    advantage_rule: AdvantageRule = mean_baseline,
    kl_reward: float = 0.0,
    refresh_every: int = 0,
    mask_truncated: bool = False,
    rows_of: RowsOf | None = None,
    prefer: Prefer = prefer_last,
    monitor: CollapseMonitor | None = None,
    facts: Mapping[str, object] = MappingProxyType({}),
    ranks: Ranks = ALONE,
    report: Report = lambda step, steps, metrics: None,
) -> None:
    """Train the learner's policy in place and write `folder`/model, metrics.jsonl and summary.json.

    Checkpoints lie in `folder`/checkpoints; called again on the same folder it goes on from the newest complete one and
    gives the bits that the uninterrupted run would have given. `prefer` decides, on dev problems only, which evaluated
    model is kept. `kl_reward` is the coefficient of a KL penalty in the reward (k1), `refresh_every` the
    optimizer updates after which the reference becomes the policy, at the end of their step (0: never).

    `rows_of` takes the place of `advantage_rule` and `mask_truncated` where advantages do not come from rewards. A
    `monitor` sees every step's rollouts and every evaluation; an alarm may end the run before the step's update, and
    then the last model that was well is kept. `facts` are written into summary.json.

    Errors: StepRefused if something is not finite; the groups concerned are then in `folder`/refused-step-<n>.jsonl and
    the weights those before the update.
    """
    rows_of = rows_of or BaselineRows(advantage_rule, learner.objective.needs_all_rows, mask_truncated)
    snapshots = monitor is not None and monitor.stop and not schedule.eval_every
    run = RunState(
        folder, learner, collector, tokenizer, prefer, ranks, monitor, schedule.save_every if snapshots else 0,
        schedule.keep_models,
    )  # fmt: skip
    run.resume()

    def evaluate(step: int) -> DevScore:
        groups = sample_groups(
            collector.sampler, tokenizer, dev.problems, dev.task, schedule.eval_samples, dev.sampling,
            sample_seed(seed, "dev"), dev.prompt_suffix,
        )  # fmt: skip
        return dev_score(step, groups)

    if run.step == 0 and schedule.eval_every:
        run.consider(evaluate(0))
    while run.step < schedule.steps and not run.stopped and not run.good_enough(schedule.stop_at_accuracy):
        step = run.step + 1
        fault("grpo.step")
        started = time.perf_counter()
        update = UpdateMetrics()
        version = collector.sampler.policy_version
        learner.begin_step(step)
        with run.refusals(step) as groups:
            collected = collector.step(step, groups)
            require_finite(groups)
            collected |= run.watch(step, groups)
            sampled = time.perf_counter()
            groups[:] = learner.penalized(groups, kl_reward)
            updates = 0 if run.stopped else learner.optim.updates_per_step
            batches, figures = rows_of(groups, split(len(groups), updates, sample_seed(seed, "split", step)))
            for rows, lengths in learner.with_old_logprobs(batches):
                if learner.update(rows, lengths, update):
                    collector.sampler.policy_version += 1
        run.step = step
        if refresh_every and collector.sampler.policy_version // refresh_every > version // refresh_every:
            learner.refresh_reference()
        metrics = rollout_metrics(groups, dev.task) | collected | figures | update.means(ranks)
        metrics |= speeds(groups, sampled - started, time.perf_counter() - sampled)
        if schedule.eval_every and not run.stopped and (step % schedule.eval_every == 0 or step == schedule.steps):
            metrics |= run.consider(evaluate(step)).metrics()
        run.log(metrics, groups)
        report(step, schedule.steps, metrics)
        if step % schedule.save_every == 0:
            run.save()
    run.finish(facts)


def split(count: int, parts: int, seed: int) -> list[list[int]]:
    """The indices 0 … count − 1 in seeded random order, cut into `parts`: one optimizer step each."""
    order = list(range(count))
    if parts > 1:
        random.Random(seed).shuffle(order)
    return [order[part::parts] for part in range(parts)]


def speeds(groups: Sequence[RolloutGroup], rollout_seconds: float, train_seconds: float) -> dict[str, float]:
    """Tokens a second of the two halves of a step."""
    tokens = sum(sum(group.num_tokens) for group in groups)
    return {
        "rollout_tokens_per_second": tokens / rollout_seconds,
        "train_tokens_per_second": tokens / train_seconds,
        "step_seconds": rollout_seconds + train_seconds,
    }
