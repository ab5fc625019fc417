"""The one place where an engine is opened: by its name and settings, in this process, in several of their own, or on a
server (recipes/servers.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import yaml

from recipes.servers import ServerChoice
from rl.samplers.address import server_root
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
    server: ServerChoice | None = None  # `vllm serve` in place of an engine of our own

    def identity(self) -> dict[str, Any]:
        """What of it makes other samples, as JSON values. Neither the number of replicas nor a server's address does:
        they change which samples are drawn together, and with that the last bits of log-probs."""
        if self.name == "transformers":
            return {"batch_size": self.batch_size}
        vllm = {"engine": dict(self.engine), "request": dict(self.request)}
        return {"engine": self.name, "vllm": vllm} | ({} if self.server is None else {"server": True})

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


def choose(
    name: str, batch_size: int, replicas: int, settings: Sequence[str], server: str | None = None
) -> EngineChoice:
    """The engine that a command line names; `settings` are `key=value` texts for vLLM, values as in YAML, `server` is
    the URL of a vLLM server.

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
    if server is None:
        return EngineChoice(name, batch_size, replicas, given)
    for option, wrong in server_conflicts(name, replicas, given):
        raise ValueError(f"--server with --{option}: {wrong}")
    return EngineChoice(name, batch_size, server=ServerChoice((server_root(server),)))


def server_conflicts(name: str, replicas: int, engine: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong with it) of what does not go with a server.

    Example: `server_conflicts("vllm", 2, {})` yields `("replicas", "...")` alone.
    """
    if name != "vllm":
        yield "engine", f"the server is vLLM's, but the engine is {name}: write vllm"
    if replicas > 1:
        yield "replicas", "replicas are engines that the run starts; for several servers list their URLs in server.url"
    if engine:
        named = ", ".join(sorted(engine))
        yield "vllm", f"{named} would be set in an engine that the run starts: give it to vllm serve"


@contextmanager
def open_engine(choice: EngineChoice, model: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sampler]:
    """A sampler on a model folder or hub id; what it holds is freed at the end of the block.

    With several replicas it is a `ShardSampler` too, otherwise a `StreamingSampler`.

    Errors: ServerError (a RuntimeError) for a server that is not there; see `recipes.servers.open_servers`.
    """
    if choice.server is not None:
        from recipes.servers import open_servers
        from rl.policy import PolicyModel, load_model

        policy = PolicyModel(load_model(model))
        with open_servers(choice.server, model, tokenizer, policy, choice.request) as sampler:
            yield sampler
    elif choice.replicas > 1:
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
