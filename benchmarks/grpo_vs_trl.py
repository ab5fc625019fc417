"""Seconds a GRPO step: our loop and TRL's GRPOTrainer, alternating in one process on the same work.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/grpo_vs_trl.py
    ... --longer            completions about four times as long
    ... --steps 12          measured steps of each, in blocks of two after one that does not count
    ... --trl-batch 64      TRL's micro-batch, instead of trying which is the fastest
    ... --json              the figures once more as a line of JSON

A step is a whole one: 16 problems, 16 completions each, judged, one AdamW step on all of them. Both start from the same
weights, see the same problems in the same order, are rewarded by the same function and have the same objective (DAPO's
clip and token mean, advantage r - mean, no KL); at lr 1e-6 the policy, and so the work, stays what it is. That rewards
and lengths of both agree within noise is asserted.

TRL runs at its best on the CPU: fp32, no gradient checkpointing, one generation a step for all 256 completions, the
cache on, nothing logged or saved, the micro-batch that trains fastest. Our loop leaves rows without advantage out of
the forward pass, which changes no result; the line "every row" shows what it costs without that.

The longer completions come from the same model with the EOS row of its (untied) head made small. None of them is right
then, so they are rewarded for an even number of tokens: every group has signal, no row is skipped, and the two lines of
ours differ by noise alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as the `reason` command has it; before torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl.advantages import mean_baseline
from rl.learner import Learner, OptimSettings
from rl.objectives import dapo
from rl.policy import PolicyModel, eos_token_id, load_model, load_tokenizer, save_model
from rl.prompts import render_text
from rl.rewards import RewardFunction, WeightedReward, accuracy_reward, score
from rl.rollout import sample_groups
from rl.rows import group_advantages, training_rows
from rl.samplers.base import SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.train_metrics import UpdateMetrics, rollout_metrics
from rl.types import Completion, FinishReason, Problem, Rollout

BASE = Path(__file__).parents[1] / "recipes" / "models" / "tiny-base"
PROBLEMS, SAMPLES = 16, 16
STATUS = Path("/proc/self/status")
BLOCK = 3  # steps of one trainer before it is the other's turn; the first of them does not count
TRL_BATCHES = (64, 128, 256)
OPTIMIZER = OptimSettings(learning_rate=1e-6, micro_batch_tokens=4096)  # the tokens as in recipes/tiny.yaml


@dataclass(frozen=True, slots=True)
class Setting:
    """What both trainers are given."""

    model: Path
    max_tokens: int
    reward: RewardFunction


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a trainer: seconds, and the lengths (tokens) and rewards of its completions."""

    rollout: float
    train: float
    lengths: tuple[int, ...]
    rewards: tuple[float, ...]

    @property
    def total(self) -> float:
        return self.rollout + self.train


def even_length(rollout: Rollout) -> float:
    """A reward that every group differs in: 1 for an even number of tokens."""
    return float(rollout.num_tokens % 2 == 0)


def make_longer(folder: Path) -> Path:
    """The base model with less will to end: its head untied, and the row that scores EOS scaled by 0.1."""
    model, tokenizer = load_model(BASE), load_tokenizer(BASE)
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with torch.no_grad():
        head.weight[eos_token_id(tokenizer)] *= 0.1
    save_model(model, tokenizer, folder)
    return folder


class Ours:
    """Our loop, one step at a time: what `rl.grpo.train` does between two log lines."""

    def __init__(self, setting: Setting, every_row: bool = False) -> None:
        self.setting, self.every_row = setting, every_row
        self.tokenizer = load_tokenizer(setting.model)
        model = load_model(setting.model, to_train=True)
        self.sampler = TransformersSampler(model, self.tokenizer, PROBLEMS * SAMPLES)
        optimizer = torch.optim.AdamW(
            model.parameters(), OPTIMIZER.learning_rate, OPTIMIZER.betas, OPTIMIZER.epsilon, OPTIMIZER.weight_decay
        )
        self.learner = Learner(PolicyModel(model), optimizer, dapo(), OPTIMIZER, temperature=1.0)

    def step(self, problems: Sequence[Problem], number: int) -> Step:
        started = time.perf_counter()
        settings = SamplingSettings(max_tokens=self.setting.max_tokens)
        groups = sample_groups(self.sampler, self.tokenizer, problems, tiny.TASK, SAMPLES, settings, number)
        groups = [score(group, (WeightedReward("reward", self.setting.reward, 1.0),)) for group in groups]
        sampled = time.perf_counter()
        metrics = UpdateMetrics()
        rows, lengths = training_rows(groups, group_advantages(groups, mean_baseline), self.every_row)
        self.learner.begin_step(number)
        self.learner.update(rows, lengths, metrics)
        _ = rollout_metrics(groups, tiny.TASK) | metrics.means()
        trained = time.perf_counter()
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        return Step(
            sampled - started, trained - sampled,
            tuple(r.num_tokens for r in rollouts), tuple(r.reward for r in rollouts),
        )  # fmt: skip


class Theirs(GRPOTrainer):
    """TRL's trainer as it is; its rollouts (generation and rewards) are timed."""

    rollout_seconds = 0.0

    def _generate_and_score_completions(self, inputs):
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        self.rollout_seconds = time.perf_counter() - started
        return output


class Clock(TrainerCallback):
    """Turns each of TRL's steps into a `Step`, and hands over to `turn` after every block."""

    def __init__(self, turn: Callable[[int], None]) -> None:
        self.turn, self.steps = turn, []
        self.trainer: Theirs | None = None
        self.judged: list[tuple[int, float]] = []  # (tokens, reward) of the completions of this step

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        total, rollout = time.perf_counter() - self.started, self.trainer.rollout_seconds
        lengths, rewards = zip(*self.judged, strict=True)
        self.steps.append(Step(rollout, total - rollout, lengths, rewards))
        self.judged = []
        if state.global_step % BLOCK == 0:
            self.turn(state.global_step)
        self.started = time.perf_counter()


def trl_config(setting: Setting, batch: int, steps: int, output: str) -> dict[str, Any]:
    return {
        "output_dir": output, "max_steps": steps,
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": PROBLEMS * SAMPLES // batch,
        "steps_per_generation": PROBLEMS * SAMPLES // batch, "num_generations": SAMPLES, "num_iterations": 1,
        "max_completion_length": setting.max_tokens, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        "loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "scale_rewards": "none",
        "optim": "adamw_torch_fused", "learning_rate": OPTIMIZER.learning_rate, "lr_scheduler_type": "constant",
        "adam_beta1": OPTIMIZER.betas[0], "adam_beta2": OPTIMIZER.betas[1], "adam_epsilon": OPTIMIZER.epsilon,
        "weight_decay": OPTIMIZER.weight_decay, "max_grad_norm": OPTIMIZER.max_grad_norm,
        "bf16": False, "gradient_checkpointing": False, "use_vllm": False, "use_cpu": not torch.cuda.is_available(),
        "shuffle_dataset": False, "dataloader_num_workers": 0, "report_to": "none", "logging_steps": 10**9,
        "disable_tqdm": True, "save_strategy": "no", "log_completions": False,
    }  # fmt: skip


def run_theirs(
    setting: Setting, problems: Sequence[Problem], batch: int, steps: int, turn: Callable[[int], None]
) -> list[Step]:
    """`steps` steps of TRL over `problems`, with `turn(steps so far)` after every block."""
    tokenizer = load_tokenizer(setting.model)
    clock = Clock(turn)

    def reward(
        completions: list[str], completion_ids: list[list[int]], index: list[int], **_: Any
    ) -> list[float | None]:
        for text, ids, number in zip(completions, completion_ids, index, strict=True):
            ended = FinishReason.STOP if ids[-1] == tokenizer.eos_token_id else FinishReason.LENGTH
            completion = Completion(text, tuple(ids), (0.0,) * len(ids), ended)
            judged = Rollout(completion, tiny.judge(problems[number], completion))
            clock.judged.append((len(ids), setting.reward(judged)))
        return [value for _, value in clock.judged]

    rows = [{"prompt": render_text(tokenizer, problem), "index": i} for i, problem in enumerate(problems)]
    with tempfile.TemporaryDirectory() as output:
        clock.trainer = Theirs(
            model=load_model(setting.model, to_train=True), processing_class=tokenizer, reward_funcs=reward,
            args=GRPOConfig(**trl_config(setting, batch, steps, output)), train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
        )  # fmt: skip
        clock.trainer.remove_callback(PrinterCallback)
        clock.trainer.train()
    return clock.steps


def fastest_batch(setting: Setting, problems: Sequence[Problem]) -> int:
    """The micro-batch with which TRL trains fastest; the rollouts are the same for all of them."""
    seconds = {}
    for batch in TRL_BATCHES:
        steps = run_theirs(setting, problems, batch, 2, lambda step: None)
        seconds[batch] = min(step.train for step in steps)
    print("TRL's train seconds by micro-batch: " + ", ".join(f"{b}: {s:.2f}" for b, s in seconds.items()), flush=True)
    return min(seconds, key=lambda batch: seconds[batch])


def alternate(setting: Setting, problems: Sequence[Problem], batch: int, steps: int) -> dict[str, list[Step]]:
    """All steps of all three, in blocks: TRL's, then those of ours on the same problems."""
    ours = {"ours": Ours(setting), "ours, every row": Ours(setting, every_row=True)}
    found: dict[str, list[Step]] = {name: [] for name in ours}

    def turn(done: int) -> None:
        for name, trainer in ours.items():
            for number in range(done - BLOCK, done):
                found[name].append(trainer.step(problems[number * PROBLEMS : (number + 1) * PROBLEMS], number + 1))
        print(f"  {done} of {steps} steps", file=sys.stderr, flush=True)

    return {**found, "TRL": run_theirs(setting, problems, batch, steps, turn)}


def peak_memory(who: str, asked: argparse.Namespace, batch: int) -> float | None:
    """MiB that two steps of a trainer add, at their peak, to a process of its own with all libraries loaded.

    None where the system does not say (it is read from Linux's /proc).
    """
    if not STATUS.exists():
        return None
    command = [sys.executable, __file__, "--memory-of", who, "--trl-batch", str(batch)]
    done = subprocess.run(command + ["--longer"] * asked.longer, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def measure_memory(who: str, setting: Setting, batch: int) -> float:
    """What `peak_memory` runs in its process."""
    problems = tiny.problems("train", 2 * PROBLEMS)
    before = resident("VmRSS")
    if who == "TRL":
        run_theirs(setting, problems, batch, 2, lambda step: None)
    else:
        ours = Ours(setting)
        for number in range(2):
            ours.step(problems[number * PROBLEMS : (number + 1) * PROBLEMS], number + 1)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """MiB of resident memory, now (VmRSS) or at the highest (VmHWM).

    Not `getrusage`: a child's maximum there begins with what its parent had.
    """
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[which].split()[0]) / 1024


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over the measured steps (seconds), means over their completions."""

    rollout_seconds: float
    train_seconds: float
    step_seconds: float
    tokens_per_second: float  # completion tokens over the seconds of the whole step
    tokens: float  # a completion
    reward: float
    peak_mib: float | None


def figures(steps: Sequence[Step], peak_mib: float | None) -> Figures:
    return Figures(
        median(step.rollout for step in steps),
        median(step.train for step in steps),
        median(step.total for step in steps),
        median(sum(step.lengths) / step.total for step in steps),
        fmean(length for step in steps for length in step.lengths),
        fmean(reward for step in steps for reward in step.rewards),
        peak_mib,
    )


def compare_means(what: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Print the difference of two means; AssertionError if it is more than four standard errors.

    The error is that of independent completions. Both have the same problems, so the true one is smaller.
    """
    error = (variance(ours) / len(ours) + variance(theirs) / len(theirs)) ** 0.5
    difference = fmean(ours) - fmean(theirs)
    print(f"{what}: ours - TRL {difference:+.4f}, standard error {error:.4f}")
    assert abs(difference) <= 4 * error, f"the two do not do the same work: mean {what} differs beyond noise"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, help="measured steps of each; rounded up to whole blocks [12, longer: 4]")
    parser.add_argument("--longer", action="store_true", help="completions about four times as long")
    parser.add_argument("--trl-batch", type=int, help=f"TRL's micro-batch [the fastest of {TRL_BATCHES}]")
    parser.add_argument("--json", action="store_true", help="the figures as a line of JSON too")
    parser.add_argument("--memory-of", choices=("ours", "TRL"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(BASE, 160, accuracy_reward)
        if asked.longer:
            setting = Setting(make_longer(Path(folder) / "tiny-base-longer"), 480, even_length)
        if asked.memory_of:
            print(measure_memory(asked.memory_of, setting, asked.trl_batch))
        else:
            compare(setting, asked)


def compare(setting: Setting, asked: argparse.Namespace) -> None:
    blocks = -(-(asked.steps or (4 if asked.longer else 12)) // (BLOCK - 1))
    problems = tiny.problems("train", blocks * BLOCK * PROBLEMS)
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")), platform.python_version())
    print(f"{os.cpu_count()} cores of {processor()}, {torch.get_num_threads()} threads, fp32, {setting.model.name}")
    batch = asked.trl_batch or fastest_batch(setting, problems)
    shown = trl_config(setting, batch, blocks * BLOCK, "-")
    print("TRL: " + ", ".join(f"{key}={value}" for key, value in shown.items() if key != "output_dir"))
    print(f"{PROBLEMS} problems x {SAMPLES} completions of at most {setting.max_tokens} tokens a step")

    found = alternate(setting, problems, batch, blocks * BLOCK)
    measured = {name: [s for i, s in enumerate(steps) if i % BLOCK] for name, steps in found.items()}
    peaks = {who: peak_memory(who, asked, batch) for who in ("ours", "TRL")}
    table = {name: figures(steps, peaks.get(name)) for name, steps in measured.items()}
    print(f"\n{'':16}{'rollout':>9}{'train':>9}{'step':>9}{'tokens/s':>10}{'tokens':>8}{'reward':>8}{'memory':>11}")
    for name, row in table.items():
        memory = f"{row.peak_mib:7.0f} MiB" if row.peak_mib is not None else ""
        print(
            f"{name:16}{row.rollout_seconds:7.2f} s{row.train_seconds:7.2f} s{row.step_seconds:7.2f} s"
            f"{row.tokens_per_second:10.0f}{row.tokens:8.1f}{row.reward:8.3f}{memory:>11}"
        )
    print(f"\nmedians over {len(measured['TRL'])} steps each; tokens/s over the whole step; memory: added at the peak")
    for what, values in (("tokens", "lengths"), ("reward", "rewards")):
        ours, theirs = ([v for step in measured[name] for v in getattr(step, values)] for name in ("ours", "TRL"))
        compare_means(what, ours, theirs)
    for part in ("rollout_seconds", "train_seconds"):
        print(f"{part.split('_')[0]}: {getattr(table['TRL'], part) / getattr(table['ours'], part):.2f} x")
    seconds = {name: row.step_seconds for name, row in table.items()}
    print(f"every row: {seconds['TRL'] / seconds['ours, every row']:.2f} x")
    if asked.json:
        print(json.dumps({name: asdict(row) for name, row in table.items()}))
    print(f"ratio: {seconds['TRL'] / seconds['ours']:.2f}")


def processor() -> str:
    """The CPU's name as Linux gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
