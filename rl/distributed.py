"""One policy on several processes: adding up its gradients, sharding it, and sampling from a sharded one.

Two ways of holding the policy, one code path in the learner for both:

* replicated: each rank has all the weights; `sum_gradients` adds the gradients up after the last micro-batch.
* sharded: `shard` has applied FSDP2 (`torch.distributed.fsdp.fully_shard`), whose hooks gather the weights of one layer
  at a time and add up its gradients in the backward pass.

Gradients are summed, never averaged: the denominator of the loss is counted over all ranks before the forward pass.

The tests run two processes on CPU (gloo). On more than one GPU (NCCL) nothing here has run yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from rl.packing import pack
from rl.ranks import Ranks
from rl.rows import TrainingRow

if TYPE_CHECKING:
    from torch import nn

    from rl.policy import PolicyModel


def sum_gradients(policy: nn.Module, ranks: Ranks) -> None:
    """Add up the gradients of a replicated policy over the ranks; those of a sharded one are sums already.

    A rank whose share had no row has no gradient yet and takes part with zeros.
    """
    if ranks.world == 1 or is_sharded(policy):
        return
    sums = []
    for parameter in policy.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sums.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in sums:
        work.wait()


def clip_gradients(policy: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip to the global norm; returns the norm before, a plain scalar, the same on every rank."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def finite_gradients(policy: nn.Module, ranks: Ranks) -> bool:
    """Whether every gradient is finite on every rank."""
    grads = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return not ranks.any(not all(bool(torch.isfinite(grad).all()) for grad in own))


def is_sharded(policy: nn.Module) -> bool:
    return isinstance(policy, FSDPModule)


def shard(policy: PolicyModel) -> None:
    """Apply FSDP2 to every decoder layer and to the rest of the policy; its parameters are DTensors from here on.

    Make the optimizer afterwards. accelerate's FSDP plugin gives plain DDP on a CPU without a word, so torch's own call
    is used everywhere and the result is checked.

    Errors: ValueError for a model that does not say which of its modules are its layers.
    """
    device = next(policy.parameters()).device
    layers = _layers(policy)
    # The root is gathered again in the backward pass. Otherwise it would stay gathered after a forward pass that none
    # follows, and its parameters would not be those that the optimizer knows.
    for module in [*layers, policy]:
        unit = fully_shard(module, reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)  # the sum, not the mean ...
        unit.set_force_sum_reduction_for_comms(True)  # ... by an operation that gloo has too
    plain = [name for name, parameter in policy.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        raise RuntimeError(f"fully_shard left {plain[0]} unsharded")
    # FSDP2 takes for the root what runs forward first. Sampling calls the layers without the policy, so the policy runs
    # once before.
    with torch.no_grad():
        policy(pack([TrainingRow((0,), (0,), (0.0,), 0.0)], device), 1.0)


def _layers(policy: PolicyModel) -> list[nn.Module]:
    """The decoder layers, the units that transformers says must not be split."""
    unwrap = getattr(policy.model, "get_base_model", None)  # PEFT
    model = policy.model if unwrap is None else unwrap()
    kinds = set(model._no_split_modules or ())
    layers = [module for module in policy.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(f"{type(model).__name__}: its _no_split_modules name no layer; train it with shard: false")
    return layers


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """All weights of a sharded policy on every rank, for a while; nothing to do for a replicated one.

    Inside, the model and its layers run without any exchange, so the ranks may take different numbers of decoding
    steps. Every rank must enter and leave. The weights must fit on one device, without gradients and moments.
    """
    if not isinstance(policy, FSDPModule):
        yield
        return
    units = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    policy.set_reshard_after_forward(False)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        policy.set_reshard_after_forward(True)
        for unit in units:
            unit.reshard()
