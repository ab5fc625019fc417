"""How completions are sampled: the recipe's `sampling` section, and the engine that it names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from recipes.engines import EngineChoice, server_conflicts
from recipes.keys import Count, Keys, Temperature, TopP
from recipes.server_keys import AddressKeys
from recipes.servers import Nccl, ServerChoice
from rl.samplers.vllm_settings import closed_settings


class VllmKeys(Keys):
    """vLLM's own settings, passed on as they are."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """Arguments of its `LLM`, such as max_num_seqs, gpu_memory_utilization, tensor_parallel_size."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Fields of its `SamplingParams`, such as min_p or thinking_token_budget."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from closed_settings(self.engine, self.request)


class NcclKeys(Keys):
    """New weights from GPU to GPU, through vLLM's own transfer. Not run yet: it wants two GPUs."""

    address: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """The trainer's machine, as the servers reach it; a network of your own, for nothing is encrypted."""
    port: Annotated[int, Field(ge=1024, le=65000)] = 29600
    """The first of the ports at which the trainer waits, one a server."""


class ServerKeys(AddressKeys):
    """vLLM servers that you started (`vllm serve`); one run uses them at a time."""

    folder: str | None = None
    """Where new weights are put for the servers to read: a folder that both sides see [/dev/shm]."""
    nccl: NcclKeys | None = None
    """Hand new weights over from GPU to GPU instead (not run yet)."""
    tolerance: Annotated[float, Field(gt=0, le=1)] = 5e-2
    """How far the server's log-probs may be from the trainer's, in nats on average: bf16 needs 5e-2, fp32 1e-4."""
    connections: Annotated[int, Field(ge=1, le=4096)] = 128
    """Requests under way on each server at most."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_keys()
        if self.folder is None and self.nccl is None:
            for url in self.far():
                yield "folder", f"{url} is not on this machine: name a folder that it sees too, or nccl"
        if self.folder is not None and self.nccl is not None:
            yield "folder", "with nccl no weights go through files: remove one of the two"

    @property
    def choice(self) -> ServerChoice:
        nccl = None if self.nccl is None else Nccl(self.nccl.address, self.nccl.port)
        return ServerChoice(
            self.urls, self.api_key_variable, self.folder, nccl, self.tolerance, self.connections,
        )  # fmt: skip


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
    server: ServerKeys | None = None
    """vLLM servers that draw, instead of an engine that the run starts."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.server is not None:
            yield from server_conflicts(self.engine, self.replicas, self.vllm.engine)
        elif self.engine != "vllm" and self.vllm != VllmKeys():
            yield "vllm", "these settings are vLLM's, but sampling.engine is transformers: write engine: vllm"

    @property
    def choice(self) -> EngineChoice:
        """The engine, for the functions that open one."""
        server = None if self.server is None else self.server.choice
        return EngineChoice(self.engine, self.batch_size, self.replicas, self.vllm.engine, self.vllm.request, server)
