"""SimPO: the golden vectors, the trainer's loss equal to the pure one, and the same bytes after a failure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.guards import PairRow
from distill.sft import LoraSettings
from distill.training import trainer_arguments
from long2short import simpo
from long2short.pair_training import tokenize_pairs
from rl.faults import FaultRaised, reset_faults
from rl.policy import load_model, load_tokenizer
from rl.runs import latest_checkpoint, read_lines
from rl.tasks.tiny_models import make_model, make_tokenizer
from tests.pair_world import SETTINGS, make_pairs, products, sum_of_logprobs


def losses(chosen: list[float], rejected: list[float], tokens: tuple[list[int], list[int]], beta: float, gamma: float):
    return simpo.simpo_loss(
        torch.tensor(chosen), torch.tensor(rejected), torch.tensor(tokens[0]), torch.tensor(tokens[1]), beta, gamma
    ).tolist()


def test_the_golden_vectors():
    assert losses([-20], [-90], ([40], [120]), 2, 0.3) == pytest.approx([0.59814], abs=5e-6)
    assert losses([-20], [-90], ([40], [120]), 2.5, 1.375) == pytest.approx([1.13687], abs=5e-6)
    # Equal means and no margin: log 2, however long the sides are.
    assert losses([-20, -5], [-60, -50], ([40, 10], [120, 100]), 7, 0) == pytest.approx([math.log(2)] * 2)


@given(
    st.lists(
        st.tuples(st.floats(-200, 0), st.floats(-200, 0), st.integers(1, 99), st.integers(1, 99)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.5, 3),
    st.floats(0, 2),
)
def test_the_loss_equals_the_formula_and_falls_with_the_chosen_side(rows, beta, gamma):
    chosen, rejected, *tokens = (list(column) for column in zip(*rows, strict=True))
    found = losses(chosen, rejected, (tokens[0], tokens[1]), beta, gamma)
    by_hand = [math.log1p(math.exp(-(beta * (c / n - r / m) - gamma))) for c, r, n, m in rows]
    assert found == pytest.approx(by_hand, rel=1e-4, abs=1e-5)
    likelier = losses([value + 1 for value in chosen], rejected, (tokens[0], tokens[1]), beta, gamma)
    assert all(after <= before for after, before in zip(likelier, found, strict=True))


def arguments(folder: Path, batch_size: int) -> dict[str, Any]:
    return trainer_arguments(
        folder, steps=1, batch_size=batch_size, learning_rate=0.0, warmup_ratio=0.0, min_lr_ratio=0.1, weight_decay=0.0,
        save_every=0, seed=0,
    )  # fmt: skip


def test_the_trainers_loss_is_the_pure_loss_on_the_same_tensors(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    policy = make_model(32, 1, 2, tokenizer, seed=1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(4)  # means that differ by more than rounding
    rows = tokenize_pairs(tokenizer, make_pairs())
    trainer = simpo.make_trainer(policy, tokenizer, rows, range(len(rows)), arguments(tmp_path, len(rows)), 2.0, 0.3)
    assert trainer.ref_model is None
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    given_to: list[Any] = []
    pure = simpo.simpo_loss
    monkeypatch.setattr(
        simpo, "simpo_loss", lambda *tensors, **keys: given_to.append((tensors, keys)) or pure(*tensors, **keys)
    )
    loss = trainer.compute_loss(policy, batch)
    ((tensors, keys),) = given_to
    assert loss.item() == pure(*tensors, **keys).mean().item()
    assert keys == {"beta": 2.0, "gamma": 0.3}
    # ... and the tensors are those of a plain model, taken one answer at a time.
    for found, side in ((tensors[0], "chosen_ids"), (tensors[1], "rejected_ids")):
        by_hand = [sum_of_logprobs(policy, row.prompt_ids, getattr(row, side)) for row in rows]
        assert found.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert tensors[2].tolist() == [len(row.chosen_ids) for row in rows]
    assert tensors[3].tolist() == [len(row.rejected_ids) for row in rows]
    means = [[logp / n for logp, n in zip(tensors[i].tolist(), tensors[i + 2].tolist(), strict=True)] for i in (0, 1)]
    by_hand = [math.log1p(math.exp(-(2 * (c - r) - 0.3))) for c, r in zip(*means, strict=True)]
    assert loss.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert abs(loss.item() - math.log1p(math.exp(0.3))) > 0.01
    assert trainer._metrics["train"]["rewards/chosen"] == pytest.approx([2 * sum(means[0]) / len(rows)], rel=1e-5)
    # The gradient reaches the weights through the log-probs.
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in policy.parameters())


def test_padding_changes_no_loss(tmp_path):
    tokenizer = make_tokenizer()
    rows = [PairRow("a", (3, 5), (7, 1), (8, 9, 7, 1)), PairRow("b", (3, 5), (7, 8, 9, 1), (*[8] * 1500, 1))]
    policy = make_model(32, 1, 2, tokenizer, seed=1)
    trainer = simpo.make_trainer(policy, tokenizer, rows, [0, 1], arguments(tmp_path, 2), 2.0, 0.5)

    def loss(*places: int) -> float:
        return trainer.micro_batch_loss(
            policy, trainer.data_collator([trainer.train_dataset[i] for i in places])
        ).item()

    assert loss(0, 1) == pytest.approx((loss(0) + loss(1)) / 2, rel=1e-5)
    with pytest.raises(ValueError, match="no evaluation set"):
        trainer.compute_loss(policy, {}, return_outputs=True)


@pytest.fixture(scope="module")
def whole(tiny_model_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    simpo.train_simpo(folder, model=tiny_model_folder, pairs=make_pairs(), settings=SETTINGS, beta=2.0, gamma=0.3)
    return folder


def test_training_moves_towards_the_chosen_side(tiny_model_folder, whole):
    metrics = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"]
    for row in metrics:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)
    rows = tokenize_pairs(load_tokenizer(tiny_model_folder), make_pairs())
    assert metrics[-1]["tokens"] == 2 * sum(len(row.chosen_ids) + len(row.rejected_ids) for row in rows)
    assert (whole / "model/config.json").read_bytes() == (tiny_model_folder / "config.json").read_bytes()
    # The result is an ordinary model.
    row = rows[0]
    assert math.isfinite(sum_of_logprobs(load_model(whole / "model"), row.prompt_ids, row.chosen_ids))


@pytest.mark.parametrize(("site", "left"), [("simpo.checkpoint:2", 2), ("simpo.model:1", 3)])
def test_a_failed_run_goes_on_to_the_same_bytes(tiny_model_folder, whole, tmp_path, monkeypatch, site, left):
    arguments: dict[str, Any] = {"model": tiny_model_folder, "pairs": make_pairs(), "settings": SETTINGS, "beta": 2.0}
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        simpo.train_simpo(tmp_path, **arguments, gamma=0.3)
    monkeypatch.delenv("REASON_FAULT")
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == left
    with pytest.raises(ValueError, match="belongs to a run with other rows or settings"):
        simpo.train_simpo(tmp_path, **arguments, gamma=0.4)
    simpo.train_simpo(tmp_path, **arguments, gamma=0.3)
    assert products(tmp_path) == products(whole)


def test_adapters_in_micro_batches_and_from_a_checkpoint(tiny_model_folder, tmp_path, monkeypatch):
    given: dict[str, Any] = {"model": tiny_model_folder, "pairs": make_pairs(), "gamma": 0.3}
    settings = replace(SETTINGS, lora=LoraSettings(rank=4, alpha=8.0))
    simpo.train_simpo(tmp_path / "whole", settings=settings, **given)
    monkeypatch.setenv("REASON_FAULT", "simpo.checkpoint:2:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        simpo.train_simpo(tmp_path / "cut", settings=replace(settings, micro_batch_pairs=2), **given)
    monkeypatch.delenv("REASON_FAULT")
    (found,) = (tmp_path / "cut/checkpoints").iterdir()
    assert {path.name for path in found.rglob("*.safetensors")} == {"adapter_model.safetensors"}
    simpo.train_simpo(tmp_path / "cut", settings=replace(settings, micro_batch_pairs=2), **given)
    losses = [[row["loss"] for row in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_refusals(tiny_model_folder, tmp_path):
    arguments: dict[str, Any] = {"model": tiny_model_folder, "pairs": make_pairs(), "settings": SETTINGS}
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        simpo.train_simpo(tmp_path, **arguments, beta=0)
    with pytest.raises(ValueError, match="gamma must be 0 or more, got -1"):
        simpo.train_simpo(tmp_path, **arguments, gamma=-1)
