"""What an RL run needs to go on exactly where it was: weights, optimizer moments, the reference, the run's own state.

No random state is stored because none exists: problems, samples and shuffles are drawn with seeds derived from (root
seed, step, problem, sample). Tensors are safetensors, the rest is JSON. Only parameters that are trained are stored: a
LoRA run's base model is read again from where it came from.

Sharded parameters (FSDP2) are gathered to whole tensors first, so a checkpoint does not depend on how many processes
wrote it; every rank takes part in the gathering, rank 0 writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rl.runs import read_json, write_json

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Whole tensors by parameter name: `weights["lm_head.weight"]`, `moments["lm_head.weight/exp_avg"]`."""

    weights: Tensors
    moments: Tensors
    reference: Tensors | None  # only if it is no longer the starting model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, tied ones once."""
    return {name: p for name, p in model.named_parameters(remove_duplicate=True) if p.requires_grad}


def collect(
    model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None = None, *, keep: bool = True
) -> TrainingState:
    """The state as whole tensors on the CPU. Every rank must call it; where `keep` is false the tensors are dropped one
    by one as they come, so that only the rank that writes needs the memory for all of them."""
    parameters = trained_parameters(model)
    moments = {
        f"{name}/{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    old = None if reference is None else _whole(dict(reference.named_parameters()), keep)
    return TrainingState(_whole(parameters, keep), _whole(moments, keep), old)


def write_training_state(folder: Path, tensors: TrainingState, state: dict) -> None:
    """Write into `folder` (the caller makes it appear atomically)."""
    save_file(dict(tensors.weights), folder / "weights.safetensors")
    save_file(dict(tensors.moments), folder / "optimizer.safetensors")
    if tensors.reference is not None:
        save_file(dict(tensors.reference), folder / "reference.safetensors")
    write_json(folder / "state.json", state, "grpo.state")


def load_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, reference: nn.Module | None = None
) -> dict:
    """Restore what `write_training_state` wrote, bit for bit; returns the JSON state."""
    parameters = trained_parameters(model)
    _restore(parameters, load_file(folder / "weights.safetensors"), folder)
    if reference is not None and (folder / "reference.safetensors").exists():
        own = dict(reference.named_parameters(remove_duplicate=True))
        _restore(own, load_file(folder / "reference.safetensors"), folder)
    moments = load_file(folder / "optimizer.safetensors")
    for name, parameter in parameters.items():
        own = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        if own:
            optimizer.state[parameter] = {
                key: value if key == "step" else _like(value, parameter) for key, value in own.items()
            }
    return read_json(folder / "state.json")


def _restore(parameters: Mapping[str, nn.Parameter], tensors: Tensors, folder: Path) -> None:
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())[0]
        raise ValueError(f"{folder}: the checkpoint does not fit this model: tensor {odd} is in only one of them")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{folder}: the checkpoint does not fit this model: {name} has shape {tuple(tensors[name].shape)}, the "
                f"model's has {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(tensors[name], parameter))


def _whole(tensors: Tensors, keep: bool) -> dict[str, torch.Tensor]:
    """The values apart from their graphs, gathered where they are sharded."""
    found = {}
    for name, value in tensors.items():
        value = value.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            found[name] = value.cpu().contiguous()
    return found


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`value` where and as `parameter` is: on its device, sharded as it is."""
    if isinstance(parameter, DTensor):
        # Every rank has read the file, so each takes its part of it and nothing is sent.
        own = value.to(parameter.device)
        return distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device)
