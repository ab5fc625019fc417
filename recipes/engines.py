"""The one place where an engine is opened: by its name and settings, in this process or in several of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import yaml

from rl.samplers.vllm_settings import refuse_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rl.samplers.base import Sampler

Engine = Literal["transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine draws, and with what. Example: `EngineChoice("vllm", replicas=8, engine={"max_num_seqs": 64})`."""

    name: Engine = "transformers"
    batch_size: int = 256  # of the transformers sampler
    replicas: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)  # vLLM's own settings
    request: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What of it can change the bits of what is drawn, as JSON values; the number of replicas cannot."""
        if self.name == "transformers":
            return {"batch_size": self.batch_size}  # batch composition changes the bits of logits
        return {"engine": self.name, "vllm": {"engine": dict(self.engine), "request": dict(self.request)}}

    def shard_size(self, total: int) -> int:
        """How many of `total` samples one shard of a pool holds: 512, fewer where replicas would have nothing to do.

        Example: 10,000 samples on 8 replicas: 312, four shards for each of them; at least 32, at most 512.
        """
        return 512 if self.replicas == 1 else max(32, min(512, total // (4 * self.replicas)))

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """The factory of `rl.samplers.engines` and its arguments beside the model."""
        if self.name == "transformers":
            return "rl.samplers.engines:transformers_engine", {"batch_size": self.batch_size}
        return "rl.samplers.engines:vllm_engine", {"engine": dict(self.engine), "request": dict(self.request)}


def choose(name: str, batch_size: int, replicas: int, settings: Sequence[str]) -> EngineChoice:
    """The engine that a command line names; `settings` are `key=value` texts for vLLM, values as in YAML.

    Errors: ValueError for another engine, for settings that are not open or that no engine takes.
    """
    if name not in ("transformers", "vllm"):
        raise ValueError(f"--engine must be transformers or vllm, not {name[:40]!r}")
    given: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not (key and equals) or key in given:
            raise ValueError(f"--vllm {text[:60]}: write each as KEY=VALUE, with different keys")
        given[key] = yaml.safe_load(value)
    if given and name != "vllm":
        raise ValueError("--vllm: these settings are vLLM's; add --engine vllm")
    refuse_settings(given, {})
    return EngineChoice(name, batch_size, replicas, given)


@contextmanager
def open_engine(choice: EngineChoice, model: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sampler]:
    """A sampler on a model folder or hub id; what it holds is freed at the end of the block.

    With several replicas it is a `ShardSampler` too.
    """
    if choice.replicas > 1:
        from rl.samplers.replicas import EngineSpec, Replicas

        factory, arguments = choice.arguments()
        spec = EngineSpec(factory, {"model": model, **arguments})
        with Replicas(spec, choice.replicas, devices=_devices(choice)) as replicas:
            yield replicas
    elif choice.name == "vllm":
        from rl.samplers.vllm import VllmSampler

        sampler = VllmSampler(model, tokenizer, choice.engine, choice.request)
        try:
            yield sampler
        finally:
            sampler.close()
    else:
        from rl.policy import load_model
        from rl.samplers.transformers import TransformersSampler

        yield TransformersSampler(load_model(model), tokenizer, choice.batch_size)


def _devices(choice: EngineChoice) -> list[str] | None:
    """The GPUs of each replica as CUDA_VISIBLE_DEVICES has them; None where there is no GPU."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return divide_devices(names, choice.replicas, int(choice.engine.get("tensor_parallel_size", 1)))


def divide_devices(names: Sequence[str], replicas: int, per_replica: int) -> list[str]:
    """`divide_devices(["0", "1", "2", "3"], 2, 2) == ["0,1", "2,3"]`; ValueError if there are too few."""
    if len(names) < replicas * per_replica:
        raise ValueError(
            f"replicas: {replicas} engines of {per_replica} GPU{'s' if per_replica > 1 else ''} each need "
            f"{replicas * per_replica}, {len(names)} are visible: ask for {len(names) // per_replica}"
        )
    return [",".join(names[i * per_replica : (i + 1) * per_replica]) for i in range(replicas)]
