"""SFT against a loop in plain torch: same rows, same order, same losses; packed or padded, on one process or on two.

The file is also the program of the two processes.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import sft
from distill.guards import IGNORED, TokenRow
from distill.sft import Forward, LoraSettings, SftSettings
from distill.sft_batches import sequences_of
from distill.traces import Trace, read_traces, write_traces
from distill.training import row_order, trainer_arguments
from rl.attention import attention_layout
from rl.faults import FaultRaised, reset_faults
from rl.lora import add_lora
from rl.policy import load_model, load_tokenizer, save_model
from rl.ranks import ALONE, Ranks, start
from rl.runs import latest_checkpoint, read_lines
from rl.tasks import tiny
from rl.tasks.tiny_models import make_model, make_tokenizer

# 10 rows, 8 epochs, batches of 4: 20 steps.
SETTINGS = SftSettings(
    epochs=8, learning_rate=3e-3, batch_size=4, max_length=104, seed=5, warmup_ratio=0.2, save_every=0
)
LORA = LoraSettings(rank=4, alpha=8.0)
FORWARDS = {
    "at once": Forward(),
    "padded": Forward(micro_batch_tokens=110),
    "packed": Forward(micro_batch_tokens=128, packing=True),
    "chunked": Forward(micro_batch_tokens=110, chunked_loss=True),
    "packed, chunked, checkpointed": Forward(packing=True, chunked_loss=True, gradient_checkpointing=True),
}


def reference_losses(
    base: Path, rows: list[TokenRow], settings: SftSettings, adapt: Callable[[Any], Any] = lambda model: model
) -> list[float]:
    """What SFT computes, row by row: cross-entropy of the completion with its EOS, a mean over the step's tokens."""
    model = adapt(load_model(base, to_train=True))
    order, size = row_order(len(rows), settings.epochs, settings.seed), settings.batch_size
    steps = math.ceil(len(order) / size)
    warmup = math.ceil(settings.warmup_ratio * steps)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for step in range(steps):
        batch = [rows[i] for i in order[step * size : (step + 1) * size]]
        count, loss = sum(len(row.completion_ids) for row in batch), 0.0
        for row in batch:
            ids = torch.tensor([row.prompt_ids + row.completion_ids])
            logprobs = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            part = -logprobs.gather(-1, torch.tensor(row.completion_ids)[:, None]).sum() / count
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps - warmup)))
        rate = (step + 1) / warmup if step < warmup else 0.1 + 0.9 * cosine
        optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = make_tokenizer()
    save_model(make_model(32, 2, 2, tokenizer, seed=0), tokenizer, folder)
    return folder


def make_traces(count: int = 10) -> list[Trace]:
    """Rows of 20 to 100 tokens."""
    rng = random.Random(0)
    found = tiny.problems("train", count, (2, 3))
    return [Trace(p.id, p.text, tiny.demonstrate(p, "careful", rng), 1, "t") for p in found]


@pytest.fixture(scope="module")
def rows(base) -> list[TokenRow]:
    return sft.tokenize_traces(load_tokenizer(base), make_traces())


@pytest.fixture(scope="module")
def wanted(base, rows) -> list[float]:
    return reference_losses(base, rows, SETTINGS)


def losses_of(folder: Path, base: Path, **changes: Any) -> list[float]:
    sft.train(folder, model=base, traces=make_traces(), settings=replace(SETTINGS, **changes))
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl")]


# --- twenty steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
def test_twenty_steps_have_the_losses_of_the_reference(base, wanted, tmp_path, forward):
    losses = losses_of(tmp_path, base, forward=forward)
    assert len(losses) == 20
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert losses[-1] < losses[0] - 0.3


def test_adapters_have_the_losses_of_the_reference_and_end_merged(base, rows, tmp_path):
    wanted = reference_losses(base, rows, SETTINGS, lambda model: add_lora(model, 4, 8.0, seed=5))
    forward = Forward(micro_batch_tokens=128, packing=True, chunked_loss=True, gradient_checkpointing=True)
    assert losses_of(tmp_path, base, lora=LORA, forward=forward) == pytest.approx(wanted, abs=1e-5)
    start, end = (dict(load_model(path).named_parameters()) for path in (base, tmp_path / "model"))
    moved = {name.split(".")[-2] for name in start if not torch.equal(start[name], end[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert start.keys() == end.keys()


SHIFTED = property(lambda row: [IGNORED] * (len(row.prompt_ids) + 1) + list(row.completion_ids)[1:])
NO_EOS = property(lambda row: [IGNORED] * len(row.prompt_ids) + list(row.completion_ids)[:-1] + [IGNORED])
DEFECTS = {
    "shifted mask": {"labels": SHIFTED},
    "untrained EOS": {"labels": NO_EOS},
    "overflow cut": {
        "labels": property(lambda row: ([IGNORED] * len(row.prompt_ids) + list(row.completion_ids))[:40]),
        "input_ids": property(lambda row: [*row.prompt_ids, *row.completion_ids][:40]),
    },
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_makes_the_comparison_fail(base, wanted, tmp_path, monkeypatch, defect):
    for name, value in DEFECTS[defect].items():
        monkeypatch.setattr(TokenRow, name, value)
    monkeypatch.setattr(sft, "_check_tokens", lambda batch, inputs: None)  # the comparison must not need it
    losses = losses_of(tmp_path, base)
    assert abs(losses[0] - wanted[0]) > 1e-3
    assert losses != pytest.approx(wanted, abs=1e-5)


# --- packed against unpacked, token by token --------------------------------------------------------------------------


def trainer_of(folder: Path, base: Path, rows: list[TokenRow], forward: Forward, model: Any = None) -> Any:
    from trl import SFTConfig

    arguments = trainer_arguments(
        folder, steps=1, batch_size=len(rows), learning_rate=0.0, warmup_ratio=0.0, min_lr_ratio=0.1, weight_decay=0.0,
        save_every=0, seed=0,
    )  # fmt: skip
    return sft.make_trainer(
        model or load_model(base, to_train=True), load_tokenizer(base), rows, range(len(rows)),
        SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}), forward, forward.cut(104),
    )  # fmt: skip


def token_logprobs(trainer: Any) -> dict[tuple[int, ...], list[float]]:
    """The log-prob of every trained token of the first step, by the row's ids."""
    found = {}
    for batch in trainer.steps[0]:
        inputs = trainer.inputs(batch)
        with torch.no_grad():
            output = trainer.model(**inputs, fused_lm_head=True)
        values = output.log_probs[output.label_mask].tolist()
        for ids, labels in sequences_of(inputs):
            trained = sum(label != IGNORED for label in labels)
            found[(*ids, labels[-1])], values = values[:trained], values[trained:]
    return found


@pytest.mark.parametrize("chunked", [False, True])
def test_every_trained_token_has_one_logprob_packed_padded_and_alone(base, rows, tmp_path, chunked):
    forward = Forward(chunked_loss=chunked)
    packed = trainer_of(tmp_path, base, rows, replace(forward, packing=True, micro_batch_tokens=400))
    assert [len(batch.rows) for batch in packed.steps[0]] != [1] * len(rows)
    found = token_logprobs(packed)
    padded = token_logprobs(trainer_of(tmp_path, base, rows, forward))
    model = load_model(base)
    assert found.keys() == padded.keys() == {row.prompt_ids + row.completion_ids for row in rows}
    for row in rows:
        ids = row.prompt_ids + row.completion_ids
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        alone = [logprobs[place - 1, ids[place]].item() for place in range(len(row.prompt_ids), len(ids))]
        assert found[ids] == pytest.approx(alone, abs=1e-5)
        assert padded[ids] == pytest.approx(alone, abs=1e-5)


def test_rows_that_see_each_other_are_refused_before_training(base, rows, tmp_path, monkeypatch):
    from rl import packing
    from rl.attention import PackedSequence

    def crossing(sequences, device):
        end = max(sequence.completion.stop for sequence in sequences)
        return attention_layout([PackedSequence(range(1), range(1, end))], device)

    monkeypatch.setattr(packing, "attention_layout", crossing)
    with pytest.raises(ValueError, match="packed log-probs differ from the model's own"):
        trainer_of(tmp_path, base, rows, Forward(packing=True))


def test_positions_that_do_not_restart_are_found_out(base, rows, tmp_path):
    trainer = trainer_of(tmp_path, base, rows, Forward(packing=True))
    (batch, *_) = [batch for batch in trainer.steps[0] if len(batch.rows) > 1]
    inputs = trainer.inputs(batch)
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
    with pytest.raises(RuntimeError, match="TRL would train on other tokens than the guards passed"):
        sft._check_tokens(batch, inputs)


def test_a_model_with_a_load_balancing_loss_is_refused(base, rows, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=128, router_aux_loss_coef=0.01,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has a load-balancing loss"):
        trainer_of(tmp_path, base, rows, Forward(packing=True), MixtralForCausalLM(config))


# --- resume -----------------------------------------------------------------------------------------------------------


def test_adapters_go_on_from_a_checkpoint_to_the_same_bytes(base, tmp_path, monkeypatch):
    settings = replace(SETTINGS, epochs=2, save_every=2, lora=LORA, forward=Forward(packing=True, chunked_loss=True))
    given: dict[str, Any] = {"model": base, "traces": make_traces()}
    sft.train(tmp_path / "whole", settings=settings, **given)
    monkeypatch.setenv("REASON_FAULT", "sft.checkpoint:2:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        sft.train(tmp_path / "cut", settings=settings, **given)
    monkeypatch.delenv("REASON_FAULT")
    found = latest_checkpoint(tmp_path / "cut")
    assert found is not None and found[0] == 2
    assert not (found[1] / "model.safetensors").exists()  # adapters alone
    shutil.copytree(tmp_path / "cut", tmp_path / "padded")
    sft.train(tmp_path / "cut", settings=settings, **given)
    for name in ("metrics.jsonl", "summary.json", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # How the forward pass runs may change under a checkpoint: then only rounding differs.
    sft.train(tmp_path / "padded", settings=replace(settings, forward=Forward()), **given)
    losses = [[row["loss"] for row in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "padded")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA])
def test_gathered_weights_make_the_student_that_is_written(base, rows, tmp_path, lora):
    """What the first process does with the weights of a sharded model; here they are whole already."""
    student = sft.load_student(base, 104, lora, 5)
    trainer = trainer_of(tmp_path, base, rows, Forward(chunked_loss=True), student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1
    found = dict(sft._gathered(trainer, lambda: sft.load_student(base, 104, lora, 5), ALONE).named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in student.named_parameters())


# --- two processes ----------------------------------------------------------------------------------------------------

# 7 rows once, in batches of 3: of the last one, a single row, the second process has none.
SHARED = replace(SETTINGS, epochs=1, batch_size=3, save_every=1)
TOGETHER = {
    "at once": SHARED,
    "packed": replace(SHARED, forward=Forward(micro_batch_tokens=110, packing=True, chunked_loss=True)),
    "adapters": replace(SHARED, lora=LORA, forward=Forward(micro_batch_tokens=110, gradient_checkpointing=True)),
}


class StoppedError(RuntimeError):
    """A run ends here, on every process."""


def stop_after_two(step: int, total: int, metrics: Any) -> None:
    if step == 3:
        raise StoppedError


def train_shared(folder: Path, base: Path, traces: list[Trace], name: str, ranks: Ranks, **more: Any) -> None:
    sft.train(folder, model=base, traces=traces, settings=TOGETHER[name], ranks=ranks, **more)


def train_stopped(folder: Path, base: Path, traces: list[Trace], name: str, ranks: Ranks) -> None:
    with pytest.raises(StoppedError):
        train_shared(folder, base, traces, name, ranks, report=stop_after_two)


def program(folder: Path) -> None:
    base, traces = folder / "base", read_traces(folder / "traces.jsonl")
    with start() as ranks:
        for name in TOGETHER:
            train_shared(folder / f"two {name}", base, traces, name, ranks)
        train_stopped(folder / "two stopped", base, traces, "packed", ranks)
        train_shared(folder / "one stopped", base, traces, "packed", ranks)
        refused = ""
        if ranks.first:
            try:
                train_shared(folder / "alone", base, traces, "at once", ALONE)
            except ValueError as error:
                refused = str(error)
            (folder / "refused.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    program(Path(sys.argv[1]))


def shared_losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def together(base, tmp_path_factory, launch_two) -> Path:
    """What two processes left, with one process's own runs beside it."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(base, folder / "base")
    traces = make_traces(7)
    write_traces(folder / "traces.jsonl", traces)
    for name in TOGETHER:
        train_shared(folder / f"one {name}", base, traces, name, ALONE)
    train_stopped(folder / "one stopped", base, traces, "packed", ALONE)
    codes, errors = launch_two(__file__, folder, flags=("-W", "error", "-W", "ignore:TRL currently supports vLLM"))
    assert codes == [0, 0], errors
    return folder


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_have_the_losses_and_weights_of_one(together, name):
    one, two = together / f"one {name}", together / f"two {name}"
    assert len(shared_losses(one)) == 3
    assert shared_losses(two) == pytest.approx(shared_losses(one), abs=1e-5)
    weights = [dict(load_model(path / "model").named_parameters()) for path in (one, two)]
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-4
    metrics = [read_lines(path / "metrics.jsonl") for path in (one, two)]
    for left, right in zip(*metrics, strict=True):
        assert right == pytest.approx(left, abs=1e-4)


def test_a_checkpoint_of_two_processes_is_gone_on_with_by_one_and_back(together):
    wanted = shared_losses(together / "one packed")
    found = latest_checkpoint(together / "two stopped")
    assert found is not None and found[0] == 2
    steps: list[int] = []
    train_shared(
        together / "two stopped", together / "base", read_traces(together / "traces.jsonl"), "packed", ALONE,
        report=lambda step, total, metrics: steps.append(step),
    )  # fmt: skip
    assert steps == [3]
    assert shared_losses(together / "two stopped") == pytest.approx(wanted, abs=1e-5)
    assert shared_losses(together / "one stopped") == pytest.approx(wanted, abs=1e-5)  # two went on from one's


def test_a_stage_of_one_process_is_refused_under_a_launcher(together):
    assert json.loads((together / "refused.json").read_text()) == (
        "this stage trains on 1 process, but a launcher started 2: run the recipe up to this stage without a launcher, "
        "then launch the rest"
    )


def test_sharding_is_fsdp2_on_gpus_and_refused_elsewhere(tmp_path):
    from distill.training import sharding_arguments

    given: dict[str, Any] = {
        "steps": 1, "batch_size": 1, "learning_rate": 0.0, "warmup_ratio": 0.0, "min_lr_ratio": 0.1,
        "weight_decay": 0.0, "save_every": 0, "seed": 0,
    }  # fmt: skip
    assert "fsdp" not in trainer_arguments(tmp_path, **given, shard=True)  # one process has nothing to share
    found = sharding_arguments(checkpointing=True)
    assert found["fsdp_config"] == {
        "version": 2, "state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": True,
    }  # fmt: skip
