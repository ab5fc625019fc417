"""How completions are sampled: the recipe's `sampling` section, and the engine that it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from recipes.engines import EngineChoice
from recipes.keys import Count, Keys, Temperature, TopP
from rl.samplers.vllm_settings import closed_settings


class VllmKeys(Keys):
    """vLLM's own settings, passed on as they are."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its `LLM`, such as max_num_seqs, gpu_memory_utilization, tensor_parallel_size."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Fields of its `SamplingParams`, such as min_p or thinking_token_budget."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from closed_settings(self.engine, self.request)


class Sampling(Keys):
    """How completions are sampled, unless a stage says otherwise."""

    temperature: Temperature = 1.0
    """Softmax temperature."""
    top_p: TopP = 1.0
    """Nucleus share; RL needs 1."""
    max_tokens: Count = 256
    """Longest completion in tokens, think and EOS included."""
    batch_size: Count = 256
    """Completions generated at once by the transformers sampler; vLLM has `vllm.engine.max_num_seqs`."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What draws the completions."""
    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Engines side by side, one process each, where a pool is filled; on GPUs one per GPU. RL has one per rank."""
    vllm: VllmKeys = VllmKeys()
    """vLLM's own settings."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.engine != "vllm" and self.vllm != VllmKeys():
            yield "vllm", "these settings are vLLM's, but sampling.engine is transformers: write engine: vllm"

    @property
    def choice(self) -> EngineChoice:
        """The engine, for the functions that open one."""
        return EngineChoice(self.engine, self.batch_size, self.replicas, self.vllm.engine, self.vllm.request)
