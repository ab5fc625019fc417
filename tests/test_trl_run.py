"""A whole training run against TRL's GRPOTrainer: the same rollouts, the same optimizer steps, the same weights.

TRL runs as it is, with its own data loader, tokenisation, advantages, gradient accumulation, loss, clipping and
optimizer; only the completions are drawn by our sampler (from TRL's model, so that they are on-policy), and kept. Our
learner then trains a fresh copy of the model on what was kept. The two changes of the weights must agree.

One case cannot be compared, because the two differ on purpose: dapo with several optimizer batches a generation. TRL
divides each of them by their mean number of tokens, we by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.nn.utils import parameters_to_vector
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from rl.advantages import AdvantageRule, StdNormalized, mean_baseline
from rl.learner import Learner, OptimSettings
from rl.objectives import Objective, dapo, grpo
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.prompts import render_text
from rl.rows import group_advantages, training_rows
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.transformers import TransformersSampler
from rl.tasks.tiny import problems
from rl.train_metrics import UpdateMetrics
from rl.types import Outcome, Problem, Rollout, RolloutGroup, Verdict

GROUP_SIZE = 4
UPDATE_ROWS = 16  # completions in an optimizer step: two of TRL's micro-batches
MICRO_ROWS = 8
STEPS = 3
SETTINGS = SamplingSettings(temperature=0.8, max_tokens=24)


@dataclass(frozen=True, slots=True)
class Case:
    """One run of three optimizer steps. A generation serves `passes` of them as a whole, or `parts` of them cut up."""

    objective: Objective
    trl: dict[str, Any]  # what TRL calls it
    rule: AdvantageRule
    make_optimizer: Callable[..., torch.optim.Optimizer]
    learning_rate: float
    max_grad_norm: float
    passes: int = 1
    parts: int = 1


def adamw(parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)


SGD = {"optim": "sgd"}
ADAMW = {"optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-4, "weight_decay": 0.0}
DAPO = {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "scale_rewards": "none"}
GRPO = {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "scale_rewards": "group"}

CASES = {
    "dapo, sgd": Case(dapo(), DAPO | SGD, mean_baseline, torch.optim.SGD, 1e-2, 1e9),
    "dapo, sgd, clipped gradient": Case(dapo(), DAPO | SGD, mean_baseline, torch.optim.SGD, 1e-2, 0.05),
    "dapo, adamw, three passes": Case(dapo(), DAPO | ADAMW, mean_baseline, adamw, 1e-2, 1.0, passes=3),
    "grpo, sgd, three parts": Case(grpo(), GRPO | SGD, StdNormalized(), torch.optim.SGD, 1e-2, 1.0, parts=3),
    "grpo, adamw, three parts": Case(grpo(), GRPO | ADAMW, StdNormalized(), adamw, 1e-2, 1.0, parts=3),
    "grpo, adamw": Case(grpo(), GRPO | ADAMW, StdNormalized(), adamw, 1e-2, 1.0),
}  # fmt: skip


def reward_of(question: str, token_ids: Sequence[int]) -> float:
    """A made reward; all completions of a question that ends in 5 get the same, so their group has no signal."""
    return 0.5 if question.endswith("5") else len(set(token_ids)) / 8


def rewards_of(question: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """The same as TRL wants it."""
    return [reward_of(text, ids) for text, ids in zip(question, completion_ids, strict=True)]


class RecordingTrainer(GRPOTrainer):
    """TRL's trainer with completions from our sampler, kept in `generations`, one list of groups each.

    `asked`: the problems in the order of the data set, which TRL walks through unshuffled.
    """

    asked: list[Problem]
    generations: list[list[RolloutGroup]]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        assert isinstance(self.model, PreTrainedModel)
        before = sum(map(len, self.generations))
        requests = [SampleRequest(tuple(ids), sample_seed("trl", before, i)) for i, ids in enumerate(prompt_ids)]
        completions = TransformersSampler(self.model, self._tokenizer).sample(requests, SETTINGS)
        groups = []
        for start in range(0, len(requests), num_generations):
            problem = self.asked[before + len(groups)]
            drawn = completions[start : start + num_generations]
            rollouts = tuple(Rollout(c, Verdict(Outcome.RIGHT), reward_of(problem.text, c.token_ids)) for c in drawn)
            groups.append(RolloutGroup(problem, requests[start].prompt_ids, rollouts))
        self.generations.append(groups)
        return [list(completion.token_ids) for completion in completions], None


def train_theirs(case: Case, folder: Path, output: Path) -> RecordingTrainer:
    """Three optimizer steps of TRL from the weights in `folder`."""
    tokenizer = load_tokenizer(folder)
    asked = problems("train", STEPS * UPDATE_ROWS // GROUP_SIZE)
    config = GRPOConfig(
        output_dir=str(output), max_steps=STEPS, beta=0.0, num_generations=GROUP_SIZE,
        per_device_train_batch_size=MICRO_ROWS, gradient_accumulation_steps=UPDATE_ROWS // MICRO_ROWS,
        steps_per_generation=case.parts * UPDATE_ROWS // MICRO_ROWS, num_iterations=case.passes,
        learning_rate=case.learning_rate, lr_scheduler_type="constant", max_grad_norm=case.max_grad_norm,
        temperature=SETTINGS.temperature, top_k=0, max_completion_length=SETTINGS.max_tokens, shuffle_dataset=False,
        use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no", **case.trl,
    )  # fmt: skip
    trainer = RecordingTrainer(
        model=load_model(folder, to_train=True), args=config, processing_class=tokenizer, reward_funcs=rewards_of,
        train_dataset=Dataset.from_list([{"prompt": render_text(tokenizer, p), "question": p.text} for p in asked]),
    )  # fmt: skip
    trainer.asked, trainer.generations = asked, []
    trainer.train()
    return trainer


def train_ours(case: Case, folder: Path, generations: list[list[RolloutGroup]]) -> tuple[Learner, list[dict]]:
    """The optimizer steps on the recorded groups, from the same weights, and the metrics of each."""
    model = load_model(folder, to_train=True)
    optim = OptimSettings(case.learning_rate, max_grad_norm=case.max_grad_norm, micro_batch_tokens=256)
    optimizer = case.make_optimizer(model.parameters(), lr=case.learning_rate)
    learner = Learner(PolicyModel(model), optimizer, case.objective, optim, SETTINGS.temperature)
    found = []
    for groups in generations:
        learner.begin_step(len(found) + 1)
        advantages = group_advantages(groups, case.rule)
        size = len(groups) // case.parts
        parts = [slice(start, start + size) for start in range(0, len(groups), size)]
        for part in parts * case.passes:
            metrics = UpdateMetrics()
            learner.update(*training_rows(groups[part], advantages[part]), metrics)
            found.append(metrics.means())
    return learner, found


def weights_of(model: torch.nn.Module | None) -> torch.Tensor:
    assert model is not None
    return parameters_to_vector(model.parameters()).detach().double()


@pytest.mark.parametrize("name", CASES)
def test_three_steps_change_the_weights_as_trl_does(name, tiny_model_folder, tmp_path, monkeypatch):
    # TRL shuffles the rows of a generation before it cuts them; in order, its parts are whole groups, as ours are.
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda rows: rows)
    case = CASES[name]
    theirs = train_theirs(case, tiny_model_folder, tmp_path)
    ours, metrics = train_ours(case, tiny_model_folder, theirs.generations)

    logged = [line for line in theirs.state.log_history if "loss" in line]
    assert len(logged) == len(metrics) == STEPS
    grad_norms = [line["grad_norm"] for line in logged]
    assert [line["grad_norm"] for line in metrics] == pytest.approx(grad_norms, rel=1e-4)
    assert (max(grad_norms) > case.max_grad_norm) == (name == "dapo, sgd, clipped gradient")
    if case.make_optimizer is adamw and case.passes * case.parts > 1:  # the ratios have moved, some beyond the clip
        assert logged[-1]["clip_ratio/region_mean"] > 0.05 and metrics[-1]["clip_share"] > 0.05

    start = weights_of(load_model(tiny_model_folder, to_train=True))
    their_change, our_change = weights_of(theirs.model) - start, weights_of(ours.policy) - start
    assert their_change.norm() > 0
    # 6e-6 is the most that was measured; a denominator or a clip that is off gives 1e-2 and more.
    assert (our_change - their_change).norm() <= 1e-4 * their_change.norm()
