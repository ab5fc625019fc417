"""Replicas on several machines: the same queue as `rl.samplers.replicas`, with a Ray actor a replica.

    ray.init(address="auto")                       # or RAY_ADDRESS; without either Ray starts on this machine alone
    spec = EngineSpec("rl.samplers.engines:vllm_engine", {"model": "/shared/r1/model"})
    with RayReplicas(spec, 16, num_gpus=1) as replicas:
        for index, completions in replicas.sample_shards(shards, settings):
            ...

Ray places the actors and gives each its GPUs; it makes nothing else: `rl.samplers.shard_queue` hands out the shards,
redoes those of dead actors and replaces them, and shards and completions travel as the JSON lines of
`rl.samplers.replica_main`. Every node needs this package and the model under the same names. Plain `ray` is enough.
Ray ends the actors when the process that made them ends.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from rl.samplers.replica_main import EngineSpec, draw, dump_completion, dump_work, load, load_completion, load_work
from rl.samplers.replicas import BOOT_SECONDS, SHARD_SECONDS, QueuedReplicas, check_limits
from rl.samplers.shard_queue import ReplicaLost, Work
from rl.types import Completion

LOOK_SECONDS = 0.5  # between two questions to an actor how far it is


class RayReplicas(QueuedReplicas):
    """A `ShardSampler` and `Sampler` over `count` Ray actors, each with an engine of its own.

    `restarts`, `shard_seconds`, `boot_seconds`, `shard_size`: as for `Replicas`; waiting for a free node is a part of
    `boot_seconds`.
    `environment` is set in every actor before its engine is made. `num_cpus` and `num_gpus` are what Ray sets aside for
    each; it sets CUDA_VISIBLE_DEVICES and, to `num_cpus`, OMP_NUM_THREADS by itself.

    Errors: ImportError, with what to install, if Ray is not there.
    """

    def __init__(
        self,
        spec: EngineSpec,
        count: int,
        restarts: int = 3,
        shard_seconds: float = SHARD_SECONDS,
        boot_seconds: float = BOOT_SECONDS,
        environment: Mapping[str, str] | None = None,
        num_cpus: float = 1,
        num_gpus: float = 0,
        shard_size: int | None = None,
    ) -> None:
        check_limits(shard_seconds, boot_seconds)
        ray = _ray()
        if not ray.is_initialized():
            ray.init()
        # Two threads: one draws, one says how far it is. The queue restarts, so Ray does not.
        actor = ray.remote(_Engine).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_concurrency=2, max_restarts=0, scheduling_strategy="SPREAD"
        )
        given = dict(environment or {})

        def start(number: int) -> _Actor:
            return _Actor(ray, actor.remote(spec.factory, dict(spec.arguments), given), shard_seconds, boot_seconds)

        super().__init__(start, count, restarts, shard_size)


def _ray() -> Any:
    try:
        return import_module("ray")
    except ModuleNotFoundError as error:
        raise ImportError('replicas on several machines need Ray: pip install "reason[ray]"') from error


class _Engine:
    """The actor: one engine on some node."""

    def __init__(self, factory: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self._sampler = EngineSpec(factory, arguments).build()
        self._signs, self._finished = 0, 0

    def ready(self) -> None:
        """Answers once the engine is there."""

    def draw(self, work: bytes) -> list[bytes]:
        """A work line in, a completion line a request out."""
        self._finished = 0
        return [dump_completion(completion) for completion in draw(self._sampler, load_work(work), self._report)]

    def progress(self) -> tuple[int, int]:
        """(signs of life, finished completions of this shard)"""
        return self._signs, self._finished

    def _report(self, finished: int) -> None:
        self._signs, self._finished = self._signs + 1, finished


class _Actor:
    """The caller's side of one actor: a `Replica`."""

    def __init__(self, ray: Any, handle: Any, shard_seconds: float, boot_seconds: float) -> None:
        self._ray, self._handle, self._shard_seconds, self._boot_seconds = ray, handle, shard_seconds, boot_seconds

    def ready(self) -> None:
        try:
            self._ray.get(self._handle.ready.remote(), timeout=self._boot_seconds)
        except self._ray.exceptions.GetTimeoutError as error:
            raise ReplicaLost(f"was not ready in {self._boot_seconds:g} s (boot_seconds) and was ended") from error
        except self._ray.exceptions.RayError as error:
            raise ReplicaLost(f"failed: {error}") from error

    def draw(self, work: Work, progress: Callable[[int], None]) -> list[Completion]:
        lines = self._result(self._handle.draw.remote(dump_work(work)), progress)
        return [load_completion(load(line)) for line in lines]

    def kill(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._handle)

    def end(self) -> None:
        self.kill()

    def _result(self, result: Any, progress: Callable[[int], None]) -> Any:
        """Wait for a result as long as the actor gives signs of life. Errors: ReplicaLost."""
        asked = self._handle.progress.remote()
        seen, since = 0, time.monotonic()
        try:
            while True:
                if self._ray.wait([result], timeout=LOOK_SECONDS)[0]:
                    return self._ray.get(result)
                if self._ray.wait([asked], timeout=0)[0]:
                    signs, finished = self._ray.get(asked)
                    asked = self._handle.progress.remote()
                    if signs != seen:
                        seen, since = signs, time.monotonic()
                        progress(finished)
                if time.monotonic() - since > self._shard_seconds:
                    raise ReplicaLost(
                        f"gave no sign of life for {self._shard_seconds:g} s (shard_seconds) and was ended"
                    )
        except self._ray.exceptions.RayError as error:
            raise ReplicaLost(f"failed: {error}") from error
