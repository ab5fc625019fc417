"""How a process of its own makes its sampler: the factories that `rl.samplers.replicas` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.policy import load_model, load_tokenizer
from rl.samplers.transformers import TransformersSampler
from rl.samplers.vllm import VllmSampler


def transformers_engine(model: str, batch_size: int = 256) -> TransformersSampler:
    """The transformers sampler on a model folder or hub id."""
    return TransformersSampler(load_model(model), load_tokenizer(model), batch_size)


def vllm_engine(
    model: str, engine: Mapping[str, Any] | None = None, request: Mapping[str, Any] | None = None
) -> VllmSampler:
    """The vLLM sampler on a model folder or hub id; `engine` and `request` as `VllmSampler` takes them."""
    return VllmSampler(model, load_tokenizer(model), engine, request)
