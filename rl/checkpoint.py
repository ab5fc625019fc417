"""What an RL run needs to go on exactly where it was: weights, optimizer moments, step, the best model so far.

No random state is stored because none exists: problems, samples and shuffles are drawn with seeds derived from (root
seed, step, problem, sample). Weights and moments are safetensors, the rest is JSON.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rl.runs import read_json, write_json


def named_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, tied ones once."""
    return dict(model.named_parameters(remove_duplicate=True))


def save_training_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, state: dict) -> None:
    """Write weights, AdamW moments and a JSON state into `folder` (the caller makes it appear atomically)."""
    weights = {name: parameter.detach().contiguous() for name, parameter in named_parameters(model).items()}
    moments = {}
    for name, parameter in named_parameters(model).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}/{key}"] = value.detach().contiguous()
    save_file(weights, folder / "weights.safetensors")
    save_file(moments, folder / "optimizer.safetensors")
    write_json(folder / "state.json", state, "grpo.state")


def load_training_state(folder: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW) -> dict:
    """Restore what `save_training_state` wrote, bit for bit; returns the JSON state."""
    weights = load_file(folder / "weights.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    parameters = named_parameters(model)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())[0]
        raise ValueError(f"{folder}: the checkpoint does not fit this model: tensor {odd} is in only one of them")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, parameter in parameters.items():
        own = {key.rpartition("/")[2]: value for key, value in moments.items() if key.rpartition("/")[0] == name}
        if own:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
            }
    return read_json(folder / "state.json")
