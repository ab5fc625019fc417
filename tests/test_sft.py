"""SFT through TRL: our tokens, our loss, and the same bytes after a kill."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import sft
from distill.guards import TokenRow, tokenize_row
from distill.sft import SftSettings
from distill.traces import Trace
from distill.training import Schedule, row_order, tokens_after_steps
from rl.faults import FaultRaised, reset_faults
from rl.policy import load_model, load_tokenizer, save_model
from rl.runs import folder_hash, latest_checkpoint, read_lines
from rl.tasks import tiny
from rl.tasks.tiny_models import make_model, make_tokenizer

# 10 rows, 3 epochs, batches of 4: 8 steps, the last one of 2 rows; checkpoints at 3, 6 and the end.
SETTINGS = SftSettings(epochs=3, learning_rate=1e-2, batch_size=4, max_length=128, seed=5, save_every=3)
ROOT = Path(sft.__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = make_tokenizer()
    save_model(make_model(32, 1, 2, tokenizer, seed=0), tokenizer, folder)
    return folder


def make_traces(count: int = 10) -> list[Trace]:
    rng = random.Random(0)
    found = tiny.problems("train", count, (2, 3))
    return [Trace(p.id, p.text, tiny.demonstrate(p, "careful", rng), 1, "t") for p in found]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """One run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    sft.train(folder, model=base, traces=make_traces(), settings=SETTINGS)
    return folder


def products(folder: Path) -> dict[str, str]:
    return {name: value for name, value in folder_hash(folder).items() if not name.startswith("checkpoints/")}


def test_the_run_writes_model_metrics_and_summary(base, whole):
    assert set(products(whole)) == {"metrics.jsonl", "summary.json", *(f"model/{name}" for name in folder_hash(base))}
    metrics = read_lines(whole / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 9))
    summary = json.loads((whole / "summary.json").read_text())
    lengths = [len(load_tokenizer(base)(trace.text)["input_ids"]) + 1 for trace in make_traces()]
    assert summary["tokens"] == metrics[-1]["tokens"] == 3 * sum(lengths)
    assert (summary["rows"], summary["steps"], summary["dropped"]) == (10, 8, {"longer than max_length": 0})
    assert summary["last_loss"] < summary["first_loss"] - 0.2
    assert not (whole / ".trainer").exists()


def test_the_config_is_the_starts_own(base, whole):
    # transformers' Trainer leaves use_cache off, with which every later rollout would be quadratic.
    assert json.loads((whole / "model/config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert folder_hash(whole / "model")["tokenizer.json"] == folder_hash(base)["tokenizer.json"]


def test_the_first_loss_is_the_token_mean_over_the_completions(base, whole):
    model, tokenizer = load_model(base), load_tokenizer(base)
    batch = [make_traces()[index] for index in row_order(10, 3, seed=5)[:4]]
    total, count = 0.0, 0
    for trace in batch:
        row = tokenize_row(tokenizer, trace.question, trace.text, "row")
        with torch.no_grad():
            logprobs = model(torch.tensor([row.input_ids])).logits[0, :-1].log_softmax(-1)
        for position, token in enumerate(row.completion_ids):  # EOS included, prompt left out
            total -= logprobs[len(row.prompt_ids) - 1 + position, token].item()
            count += 1
    assert read_lines(whole / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_learning_rate_rises_then_falls_to_its_tenth(base, tmp_path):
    sft.train(tmp_path, model=base, traces=make_traces(), settings=replace(SETTINGS, save_every=0, warmup_ratio=0.25))
    rates = [row["lr"] for row in read_lines(tmp_path / "metrics.jsonl")]
    cosine = [1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 6))) for step in range(1, 7)]
    assert rates == pytest.approx([0.5e-2, 1e-2, *cosine])
    assert rates[-1] == pytest.approx(1e-3)
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("site", "left"),
    [("sft.checkpoint:1", 0), ("sft.checkpoint:2", 3), ("checkpoint.commit:3", 6), ("sft.model:1", 8)],
)
def test_a_failed_run_goes_on_to_the_same_bytes(base, whole, tmp_path, monkeypatch, site, left):
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        sft.train(tmp_path, model=base, traces=make_traces(), settings=SETTINGS)
    monkeypatch.delenv("REASON_FAULT")
    found = latest_checkpoint(tmp_path)
    assert (found[0] if found else 0) == left
    steps: list[int] = []
    sft.train(
        tmp_path,
        model=base,
        traces=make_traces(),
        settings=SETTINGS,
        report=lambda step, total, metrics: steps.append(step),
    )
    assert steps == list(range(left + 1, 9))
    assert products(tmp_path) == products(whole)


def test_a_damaged_checkpoint_is_passed_over(base, whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (found,) = (tmp_path / "checkpoints").iterdir()
    content = bytearray((found / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (found / "model.safetensors").write_bytes(content)
    steps: list[int] = []
    sft.train(
        tmp_path,
        model=base,
        traces=make_traces(),
        settings=SETTINGS,
        report=lambda step, total, metrics: steps.append(step),
    )
    assert steps == list(range(1, 9))
    assert products(tmp_path) == products(whole)


def test_a_checkpoint_of_another_run_is_refused_and_holds_no_pickled_arguments(base, whole, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    (found,) = (tmp_path / "checkpoints").iterdir()
    assert not (found / "training_args.bin").exists()
    with pytest.raises(ValueError, match="belongs to a run with other rows or settings"):
        sft.train(tmp_path, model=base, traces=make_traces(9), settings=SETTINGS)


def test_kill_9_then_the_same_call(base, whole, tmp_path):
    script = f"""
from distill.sft import Forward, SftSettings, train
from distill.traces import read_traces
from pathlib import Path
train(Path({str(tmp_path / "out")!r}), model={str(base)!r}, traces=read_traces(Path({str(tmp_path / "t")!r})),
          settings={SETTINGS!r})
"""
    from distill.traces import write_traces

    write_traces(tmp_path / "t", make_traces())
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", script]
    killed = subprocess.run(
        command, env=environment | {"REASON_FAULT": "sft.checkpoint:2:kill"}, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    found = latest_checkpoint(tmp_path / "out")
    assert found is not None
    assert found[0] == 3
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == ""
    assert products(tmp_path / "out") == products(whole)


def test_a_long_row_stops_the_run_or_is_counted(base, tmp_path):
    traces = make_traces()
    with pytest.raises(ValueError, match="rows are longer than max_length = 60: trace"):
        sft.train(tmp_path, model=base, traces=traces, settings=replace(SETTINGS, max_length=60))
    assert list(tmp_path.iterdir()) == []
    summary = sft.train(
        tmp_path, model=base, traces=traces, settings=replace(SETTINGS, max_length=60, epochs=1, overflow="drop")
    )
    assert summary["rows"] + summary["dropped"]["longer than max_length"] == 10
    assert 0 < summary["rows"] < 10
    assert summary["longest_row"] <= 60


def test_rows_longer_than_trls_default_are_whole_and_a_trl_that_cuts_is_found_out(base, tmp_path, monkeypatch):
    """1,024 is where TRL 1.16 cuts by default."""
    from trl import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [TokenRow("row 0", (3, 5), (*[8] * 1500, 1))]
    common = sft.trainer_arguments(
        tmp_path, steps=1, batch_size=1, learning_rate=0.0, warmup_ratio=0.0, min_lr_ratio=0.1, weight_decay=0.0,
        save_every=0, seed=0,
    )  # fmt: skip
    given: tuple[dict[str, Any], ...] = ({"dataset_kwargs": {"skip_prepare_dataset": True}}, {"max_length": 1024})
    for changes in given:
        trainer = sft.make_trainer(load_model(base), load_tokenizer(base), rows, [0], SFTConfig(**(common | changes)))
        batch = trainer.inputs(trainer.steps[0][0])
        assert ((batch["labels"] != -100).sum(-1).tolist(), batch["input_ids"].shape[1]) == ([1501], 1503)
    whole = DataCollatorForLanguageModeling.torch_call

    def cutting(self, examples):
        return {name: values[:, :1024] for name, values in whole(self, examples).items()}

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", cutting)
    arguments = SFTConfig(**common, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(RuntimeError, match="row 0: TRL would train on other tokens than the guards passed"):
        sft.make_trainer(load_model(base), load_tokenizer(base), rows, [0], arguments)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(base, tmp_path):
    tokenizer, model = load_tokenizer(base), load_model(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    save_model(model, tokenizer, tmp_path / "start")
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        sft.train(tmp_path / "out", model=tmp_path / "start", traces=make_traces(), settings=SETTINGS)
    assert not (tmp_path / "out/model").exists()


def test_settings_that_cannot_train_are_named(base, tmp_path):
    for name, value in {"epochs": 0, "batch_size": 0, "learning_rate": -1.0, "max_length": 0}.items():
        with pytest.raises(ValueError, match=name):
            sft.train(tmp_path, model=base, traces=make_traces(), settings=replace(SETTINGS, **{name: value}))
    with pytest.raises(ValueError, match="min_lr_ratio"):
        sft.train(tmp_path, model=base, traces=make_traces(), settings=replace(SETTINGS, min_lr_ratio=math.nan))
    with pytest.raises(ValueError, match="more than the 512 positions"):
        sft.train(tmp_path, model=base, traces=make_traces(), settings=replace(SETTINGS, max_length=513))
    Schedule(
        epochs=1,
        batch_size=1,
        max_length=1,
        seed=0,
        learning_rate=0,
        weight_decay=0,
        save_every=0,
        warmup_ratio=0,
        min_lr_ratio=1,
    )


def test_rows_come_in_a_seeded_order_epoch_by_epoch():
    order = row_order(10, 3, seed=0)
    assert [sorted(order[start : start + 10]) for start in (0, 10, 20)] == [list(range(10))] * 3
    assert order[:10] != order[10:20]
    assert row_order(10, 2, seed=0) == order[:20]
    assert row_order(10, 3, seed=1) != order
    assert tokens_after_steps([5, 7, 9], [2, 0, 1], batch_size=2) == [14, 21]
