"""Low-rank adapters through PEFT: only they train, the weights of the model they sit in are the reference.

LoRA (2106.09685, section 4.1): W + (alpha / rank) B A with A drawn at random and B zero, so that training starts from
the model itself. No dropout. The output layer never gets an adapter: its weight is multiplied with chunk by chunk
(rl/logprobs.py), and it is often the embedding as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

    from rl.packing import PackedBatch
    from rl.policy import PolicyModel


def add_lora(
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    targets: Literal["all-linear"] | Sequence[str] = "all-linear",
    seed: int = 0,
) -> PreTrainedModel:
    """The model with adapters in place, every other parameter frozen: a `PeftModel`, which stands in for the model that
    it wraps. `model` is changed, not copied.

    `targets` are the ends of module names ("q_proj"); "all-linear" is every linear layer but the output layer. A is
    drawn from `seed` alone, so that all ranks and every resumed run start from the same adapters.

    Errors: ValueError if the output layer is among the targets, or if they name no module.
    """
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    named = [name for name, module in model.named_modules() if module is head]
    if targets != "all-linear" and any(name.split(".")[-1] in targets for name in named):
        raise ValueError(f"lora.targets: {named[0]} is the output layer, which cannot have an adapter; take it out")
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # PEFT divides by the rank and takes any number
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        # A new module is in training mode: then checkpointing would take the sampler's cache away.
        return cast(PreTrainedModel, get_peft_model(model, config).eval())


@dataclass(frozen=True, slots=True)
class WithoutAdapters:
    """The model under a policy's adapters, called as the policy is: the reference of a KL term, with no second copy of
    the weights. It cannot be refreshed."""

    policy: PolicyModel

    @torch.no_grad()
    def __call__(self, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies as `PolicyModel.forward` returns them; through the policy, as FSDP2 wants it."""
        with cast("PeftModel", self.policy.model).disable_adapter():
            return self.policy(batch, temperature)


def merged_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of the plain model with the adapters added in, by the plain model's names; `model` stays as it is.

    Merging in place and taking the adapters out again would change the last bits of the weights in training.
    Example: W 2 × 2 of zeros, A ((1, 0)), B ((0), (3)), alpha 2, rank 1: the merged W is ((0, 0), (6, 0)).
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in base.named_parameters(remove_duplicate=False)
        if ".lora_" not in name
    }
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    delta = cast(Any, module).get_delta_weight(adapter)
                    weights[f"{name}.weight"] = weights[f"{name}.weight"] + delta
    return weights
