"""DPO through TRL: the formulas by hand over whole answers, and the same bytes after a failure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import DPOConfig

from distill.guards import PairRow
from distill.sft import LoraSettings
from distill.training import row_order, trainer_arguments
from long2short import dpo
from long2short.pair_training import tokenize_pairs
from rl.faults import FaultRaised, reset_faults
from rl.policy import load_model, load_tokenizer
from rl.runs import latest_checkpoint, read_json, read_lines
from rl.tasks.tiny_models import make_model, make_tokenizer
from tests.pair_world import SETTINGS, make_pairs, products, sum_of_logprobs


@pytest.fixture(scope="module")
def base(tiny_model_folder) -> Path:
    return tiny_model_folder


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    dpo.train_dpo(folder, model=base, pairs=make_pairs(), settings=SETTINGS)
    return folder


def dpo_loss(beta: float, chosen_margin: float, rejected_margin: float) -> float:
    return -math.log(1 / (1 + math.exp(-beta * (chosen_margin - rejected_margin))))


def test_the_golden_values():
    assert dpo_loss(0.1, 2, -1) == pytest.approx(0.554355, abs=1e-6)
    assert dpo_loss(5, 2 / 40, -1 / 120) == pytest.approx(0.55791, abs=5e-6)


@pytest.mark.parametrize(("loss_type", "beta"), [("sigmoid", 0.1), ("sigmoid_norm", 5.0)])
def test_trls_loss_on_our_rows_is_the_formula(base, tmp_path, loss_type, beta):
    """The policy differs from the reference. Length-normalised, each side's margin is divided by its own tokens."""
    tokenizer = make_tokenizer()
    policy, reference = make_model(32, 1, 2, tokenizer, seed=1), load_model(base)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(4)  # margins of several nats, so that the loss is far from log 2
    rows = tokenize_pairs(tokenizer, make_pairs())
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_length=None, beta=beta, loss_type=[loss_type],
        per_device_train_batch_size=len(rows), bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to="none", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = dpo.make_trainer(policy, reference, tokenizer, rows, range(len(rows)), arguments)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    loss = trainer.compute_loss(policy, batch).item()

    def margin(prompt_ids, ids) -> float:
        found = sum_of_logprobs(policy, prompt_ids, ids) - sum_of_logprobs(reference, prompt_ids, ids)
        return found / (len(ids) if loss_type == "sigmoid_norm" else 1)

    margins = [[margin(row.prompt_ids, ids) for ids in (row.chosen_ids, row.rejected_ids)] for row in rows]
    by_hand = sum(dpo_loss(beta, chosen, rejected) for chosen, rejected in margins) / len(rows)
    assert abs(by_hand - math.log(2)) > 0.1
    assert loss == pytest.approx(by_hand, rel=1e-5)
    # Cutting the last token off the rejected side, its EOS, is another loss: the test would see it.
    torn = [margin(row.prompt_ids, row.rejected_ids[:-1]) for row in rows]
    without = sum(dpo_loss(beta, m[0], t) for m, t in zip(margins, torn, strict=True)) / len(rows)
    assert loss != pytest.approx(without, rel=1e-4)


def test_answers_longer_than_trls_default_are_whole(base, tmp_path):
    """1,024 is where TRL 1.16 cuts by default."""
    tokenizer = load_tokenizer(base)
    row = PairRow("pair 0", (3, 5), (7, 1), (*[8] * 1500, 1))
    arguments = DPOConfig(
        **trainer_arguments(
            tmp_path, steps=1, batch_size=1, learning_rate=0.0, warmup_ratio=0.0, min_lr_ratio=0.1, weight_decay=0.0,
            save_every=0, seed=0,
        )
    )  # fmt: skip
    trainer = dpo.make_trainer(load_model(base), load_model(base), tokenizer, [row], [0], arguments)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["completion_mask"].sum(-1).tolist() == [2, 1501]
    # The same trainer with the default limit is found out by its first batch.
    arguments.max_length = 1024
    with pytest.raises(RuntimeError, match="pair 0: TRL would train on other tokens"):
        dpo.make_trainer(load_model(base), load_model(base), tokenizer, [row], [0], arguments)


def test_training_moves_from_log_two_towards_the_chosen_side(base, whole):
    metrics = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    # The reference is the start: before the first step both sides have margin 0.
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["rewards/margins"] > 0.01
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert (whole / "model/config.json").read_bytes() == (base / "config.json").read_bytes()
    summary = read_json(whole / "summary.json")
    rows = tokenize_pairs(load_tokenizer(base), make_pairs())
    assert summary["tokens"] == metrics[-1]["tokens"] == 2 * sum(len(r.chosen_ids) + len(r.rejected_ids) for r in rows)


@pytest.mark.parametrize(("site", "left"), [("dpo.checkpoint:1", 0), ("dpo.checkpoint:2", 2), ("dpo.model:1", 3)])
def test_a_failed_run_goes_on_to_the_same_bytes(base, whole, tmp_path, monkeypatch, site, left):
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        dpo.train_dpo(tmp_path, model=base, pairs=make_pairs(), settings=SETTINGS)
    monkeypatch.delenv("REASON_FAULT")
    found = latest_checkpoint(tmp_path)
    assert (found[0] if found else 0) == left
    dpo.train_dpo(tmp_path, model=base, pairs=make_pairs(), settings=SETTINGS)
    assert products(tmp_path) == products(whole)


def test_a_normalised_run_trains_and_is_not_gone_on_with_as_another_loss(base, whole, tmp_path):
    arguments: dict[str, Any] = {"model": base, "pairs": make_pairs(), "settings": SETTINGS, "beta": 5.0}
    summary = dpo.train_dpo(tmp_path, **arguments, loss="sigmoid_norm")
    assert summary["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["last_loss"] < summary["first_loss"]
    assert products(tmp_path) != products(whole)
    with pytest.raises(ValueError, match="belongs to a run with other rows or settings"):
        dpo.train_dpo(tmp_path, **arguments)


def test_guards_hold_for_the_rejected_side(base, tmp_path):
    pairs = make_pairs()
    with pytest.raises(ValueError, match=r"rows are longer than max_length = 60: pair \d"):
        dpo.train_dpo(tmp_path, model=base, pairs=pairs, settings=replace(SETTINGS, max_length=60))
    rows = tokenize_pairs(load_tokenizer(base), pairs)
    limit = sorted(map(len, rows))[2]
    summary = dpo.train_dpo(
        tmp_path, model=base, pairs=pairs, settings=replace(SETTINGS, max_length=limit, epochs=1, overflow="drop")
    )
    assert summary["rows"] == sum(len(row) <= limit for row in rows)
    assert summary["rows"] + summary["dropped"]["longer than max_length"] == 6
    with pytest.raises(ValueError, match="beta must be above 0"):
        dpo.train_dpo(tmp_path, model=base, pairs=pairs, settings=SETTINGS, beta=0)


def test_batches_follow_the_order(base, tmp_path):
    seen: list[tuple[int, int]] = []
    dpo.train_dpo(
        tmp_path, model=base, pairs=make_pairs(), settings=replace(SETTINGS, save_every=0),
        report=lambda step, total, metrics: seen.append((step, int(metrics["tokens"]))),
    )  # fmt: skip
    rows = tokenize_pairs(load_tokenizer(base), make_pairs())
    order = row_order(6, 2, seed=5)
    expected = [sum(len(rows[i].chosen_ids) + len(rows[i].rejected_ids) for i in order[:end]) for end in (4, 8, 12)]
    assert seen == list(zip([1, 2, 3], expected, strict=True))


# --- how a step is run ------------------------------------------------------------------------------------------------

LORA = LoraSettings(rank=4, alpha=8.0)


def figures(folder: Path) -> list[list[float]]:
    return [[row["loss"], row["grad_norm"]] for row in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("pairs", "lora"), [(1, None), (2, None), (2, LORA)])
def test_micro_batches_change_nothing(base, tmp_path, pairs, lora):
    """7 pairs twice in batches of 4 are 4 steps; the last has 2 pairs."""
    given: dict[str, Any] = {"model": base, "pairs": make_pairs(7)}
    settings = replace(SETTINGS, save_every=0, lora=lora)
    dpo.train_dpo(tmp_path / "whole", settings=settings, **given)
    dpo.train_dpo(tmp_path / "cut", settings=replace(settings, micro_batch_pairs=pairs), **given)
    assert len(figures(tmp_path / "cut")) == 4
    for found, expected in zip(figures(tmp_path / "cut"), figures(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_unequal_micro_batches_weigh_by_their_pairs(base, tmp_path):
    """A mean of the means of 2 pairs and of 1 would weigh that one double."""
    given: dict[str, Any] = {"model": base, "pairs": make_pairs(5)}
    settings = replace(SETTINGS, epochs=3, batch_size=6, save_every=0, learning_rate=1e-2)
    dpo.train_dpo(tmp_path / "whole", settings=settings, **given)
    dpo.train_dpo(tmp_path / "cut", settings=replace(settings, micro_batch_pairs=2), **given)
    assert len(figures(tmp_path / "whole")) == 3  # 6, 6 and 3 pairs; the last in micro-batches of 2 and 1
    for found, expected in zip(figures(tmp_path / "cut"), figures(tmp_path / "whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="micro_batch_pairs = 4 does not divide batch_size = 6"):
        dpo.train_dpo(tmp_path / "no", settings=replace(settings, micro_batch_pairs=4), **given)


def test_adapters_are_measured_against_the_model_without_them(base, tmp_path, monkeypatch):
    """As against a loaded copy of the start; a checkpoint holds one set of adapters, the result has them merged in."""
    given: dict[str, Any] = {"model": base, "pairs": make_pairs()}
    settings = replace(SETTINGS, lora=LORA, micro_batch_pairs=2, gradient_checkpointing=True)
    make, loaded = dpo.make_trainer, load_model(base)
    monkeypatch.setattr(dpo, "make_trainer", lambda policy, _, *rest: make(policy, loaded, *rest))
    dpo.train_dpo(tmp_path / "loaded", settings=settings, **given)
    monkeypatch.undo()
    dpo.train_dpo(tmp_path / "whole", settings=replace(settings, save_every=0), **given)
    monkeypatch.setenv("REASON_FAULT", "dpo.checkpoint:2:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        dpo.train_dpo(tmp_path / "cut", settings=settings, **given)
    monkeypatch.delenv("REASON_FAULT")
    found = latest_checkpoint(tmp_path / "cut")
    assert found is not None and found[0] == 2
    assert {path.name for path in found[1].rglob("*.safetensors")} == {"adapter_model.safetensors"}
    dpo.train_dpo(tmp_path / "cut", settings=settings, **given)
    for name in ("loaded", "cut"):
        for got, expected in zip(figures(tmp_path / name), figures(tmp_path / "whole"), strict=True):
            assert got == pytest.approx(expected, rel=1e-4)
    assert figures(tmp_path / "whole")[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert figures(tmp_path / "whole")[-1][0] < math.log(2) - 1e-3
    merged, start = load_model(tmp_path / "cut/model"), load_model(base)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in start.named_parameters()}
