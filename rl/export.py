"""From a policy in training to an ordinary Hugging Face folder: adapters merged in, sharded weights gathered."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rl.distributed import gathered
from rl.lora import merged_weights
from rl.policy import PolicyModel, save_model
from rl.ranks import Ranks

if TYPE_CHECKING:
    from peft import PeftModel


def export_model(policy: PolicyModel, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks) -> None:
    """Write the policy's model into `folder`; the weights in training stay as they are, bit for bit.

    Every rank must call it, since sharded weights are gathered; rank 0 writes.
    """
    with gathered(policy):
        if ranks.first:
            save_model(plain_model(policy.model), tokenizer, folder)
    ranks.wait()


def plain_model(model: torch.nn.Module) -> PreTrainedModel:
    """A model of the same class on the same weights, without whatever training put around them.

    It shares the weights with `model` (merged ones are new): made on the meta device, then given the tensors. Inside
    `gathered` only, if the model is sharded.
    """
    if isinstance(model, PreTrainedModel):
        base, weights = model, {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}
    else:
        wrapped = cast("PeftModel", model)
        base, weights = cast(PreTrainedModel, wrapped.get_base_model()), merged_weights(wrapped)
    with torch.device("meta"):
        plain = type(base)(copy.deepcopy(base.config))
    weights |= dict(base.named_buffers(remove_duplicate=False))
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()}, assign=True)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    return plain
