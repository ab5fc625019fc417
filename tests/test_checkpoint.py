"""A checkpoint gives back every bit, refuses another model by name, and stores what is trained and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl.checkpoint import collect, load_training_state, write_training_state


def model_of(width: int = 3, tied: bool = False) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(width, width), "two": torch.nn.Linear(width, width)})
    if tied:
        model["two"].weight = model["one"].weight
    return model


def optimizer_of(model: torch.nn.Module, make=torch.optim.AdamW) -> torch.optim.Optimizer:
    return make([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def step(model: torch.nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model["two"](model["one"](torch.ones(3)).sin()).square().sum().backward()
    optimizer.step()


def momentum(parameters, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


@pytest.mark.parametrize("make", [torch.optim.AdamW, momentum, torch.optim.SGD])
@pytest.mark.parametrize("tied", [False, True])
def test_resumed_bits_are_those_of_the_uninterrupted_run(make, tied: bool, tmp_path: Path):
    model = model_of(tied=tied)
    optimizer = optimizer_of(model, make)
    step(model, optimizer)
    write_training_state(tmp_path, collect(model, optimizer), {"step": 1, "anything": [1, "a", None]})
    step(model, optimizer)

    again = model_of(tied=tied)
    fresh = optimizer_of(again, make)
    assert load_training_state(tmp_path, again, fresh) == {"step": 1, "anything": [1, "a", None]}
    step(again, fresh)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    own, other = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert own.keys() == other.keys()
    assert all(torch.equal(own[i][key], other[i][key]) for i in own for key in own[i])


def test_frozen_parameters_are_not_stored_and_tied_ones_once(tmp_path: Path):
    model = model_of(tied=True)
    model["two"].bias.requires_grad_(False)
    optimizer = optimizer_of(model)
    step(model, optimizer)
    state = collect(model, optimizer)
    assert state.weights.keys() == {"one.weight", "one.bias"}
    assert state.moments.keys() == {
        f"one.{name}/{key}" for name in ("weight", "bias") for key in ("exp_avg", "exp_avg_sq", "step")
    }


def test_the_reference_is_stored_only_if_it_is_given(tmp_path: Path):
    model, reference = model_of(), model_of()
    for parameter in reference.parameters():
        parameter.data.add_(1.0)
    optimizer = optimizer_of(model)
    write_training_state(tmp_path, collect(model, optimizer), {})
    assert not (tmp_path / "reference.safetensors").exists()
    write_training_state(tmp_path, collect(model, optimizer, reference), {})
    other = model_of()
    load_training_state(tmp_path, model, optimizer, other)
    assert all(map(torch.equal, other.parameters(), reference.parameters()))


def test_who_does_not_write_keeps_nothing():
    model = model_of()
    optimizer = optimizer_of(model)
    step(model, optimizer)
    state = collect(model, optimizer, model, keep=False)
    assert (state.weights, state.moments, state.reference) == ({}, {}, {})


def test_another_model_is_refused_by_the_name_of_a_tensor(tmp_path: Path):
    model = model_of()
    write_training_state(tmp_path, collect(model, optimizer_of(model)), {})
    tied = model_of(tied=True)
    with pytest.raises(ValueError, match=r"does not fit this model: tensor two\.weight"):
        load_training_state(tmp_path, tied, optimizer_of(tied))
    wide = model_of(width=4)
    with pytest.raises(ValueError, match=r"one\.weight has shape \(3, 3\), the model's has \(4, 4\)"):
        load_training_state(tmp_path, wide, optimizer_of(wide))
    assert all(map(torch.equal, wide.parameters(), model_of(width=4).parameters()))
