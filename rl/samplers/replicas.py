"""Replicas: N engines, a process each, and one queue of shards. Standard library only.

vLLM wants a process an engine, a Python process uses one core of a CPU well, and an engine that dies must not take the
run with it. So each engine lives in a process of its own (`rl.samplers.replica_main`) and the caller keeps the queue:

    spec = EngineSpec("rl.samplers.engines:vllm_engine", {"model": "runs/r1/rl/model"})
    with Replicas(spec, 4, devices=["0", "1", "2", "3"], logs=folder) as replicas:
        for index, completions in replicas.sample_shards(shards, settings):
            ...

A replica that is killed, crashes or hangs loses the shard it has in flight and nothing else: the shard goes to the
front of the queue and the replica is replaced. Requests carry their seeds, so who draws a shard changes nothing, for
engines that are functions of their requests; one whose rounding depends on the batch gives the same for the same shard.

The processes start with the first shard. They end with `close`, with the object, and with the process that made them,
however that ends: their stdin ends, and on Linux the kernel kills them.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.replica_main import EngineSpec, dump, dump_work, load, load_completion
from rl.samplers.shard_queue import Replica, ReplicaLost, ReplicasFailed, ShardQueue, Work
from rl.types import Completion

__all__ = ["EngineSpec", "QueuedReplicas", "Replicas", "ReplicasFailed", "replica_environment"]

# Both limits must be beyond what is rightly silent. Starting: weights of 140 GB at 0.2 GB/s take 12 minutes, compiling
# takes some more. Drawing: an engine may tell nothing until a completion ends; 32,768 tokens at 20 a second take 27
# minutes, and the first shard may compile too. One whose `report` is called at every step can be held to a minute.
BOOT_SECONDS = 1800.0
SHARD_SECONDS = 1800.0
LOOK_SECONDS = 1.0  # between two looks whether a silent replica is still there
LAST_WORDS_SECONDS = 1.0  # for a replica that is to be ended to write where it is, or to end by itself
END_SECONDS = 30.0  # for the system to end a killed process
TAIL_BYTES = 4000  # of a lost replica's stderr in the message

# What a replica gets of the environment. Not all of it: a launcher's RANK, WORLD_SIZE and MASTER_ADDR would make the
# engine wait for the trainer's other ranks, and keys for judges and trackers are none of its business.
KEPT = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "CC", "CXX", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "MAX_JOBS", "PYTHONHASHSEED", "PYTHONWARNINGS",
)  # fmt: skip
KEPT_PREFIXES = (
    "CUDA", "NVIDIA_", "NCCL_", "CUBLAS_", "HIP_", "ROCR_", "ROCM_", "LD_", "DYLD_", "XDG_", "HF_", "HUGGINGFACE_",
    "TRANSFORMERS_", "SAFETENSORS_", "TOKENIZERS_", "TORCH", "PYTORCH_", "TRITON_", "VLLM_", "FLASHINFER_",
    "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "MALLOC_",
)  # fmt: skip


def replica_environment(
    environment: Mapping[str, str], count: int, device: str | None = None, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of one of `count` replicas.

    From `environment`, this process's, it takes what engines read: paths and proxies (`KEPT`), and the variables of
    CUDA, NCCL, the Hugging Face libraries, torch, vLLM, OpenMP and the loader (`KEPT_PREFIXES`). `device` becomes
    CUDA_VISIBLE_DEVICES. Without a device and with no OMP_NUM_THREADS around, each replica gets its share of the cores:
    N replicas with a thread a core each would be in each other's way. What is `given` comes last and wins.

    Example: on 8 cores, `replica_environment({"HF_HOME": "/h", "RANK": "0"}, 4)` has HF_HOME "/h", OMP_NUM_THREADS "2"
    and no RANK; with `device="3"` it has CUDA_VISIBLE_DEVICES "3" and no OMP_NUM_THREADS.
    """
    kept = {k: v for k, v in environment.items() if k in KEPT or k.startswith(KEPT_PREFIXES)}
    root = str(Path(__file__).resolve().parents[2])
    kept["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
    if device is not None:
        kept["CUDA_VISIBLE_DEVICES"] = device
    else:
        kept.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))
    return kept | dict(given or {})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_limits(shard_seconds: float, boot_seconds: float) -> None:
    if shard_seconds <= 0 or boot_seconds <= 0:
        raise ValueError(f"shard_seconds and boot_seconds must be above 0, got {shard_seconds} and {boot_seconds}")


class QueuedReplicas:
    """A `ShardSampler` and `Sampler` over replicas of any kind: `start(number)` begins replica `number`.

    `restarts`: how often the place of one replica may be filled anew, in all. `shard_size`: how `sample` cuts its
    requests; None: into one part a replica, the fewest batches. With a given size the batches do not depend on `count`.
    """

    def __init__(self, start: Callable[[int], Replica], count: int, restarts: int, shard_size: int | None) -> None:
        if shard_size is not None and shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}")
        self.policy_version = 0
        self._start, self._count, self._restarts, self._shard_size = start, count, restarts, shard_size
        self._open()

    def sample_shards(
        self,
        shards: Sequence[Sequence[SampleRequest]],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the shard, its completions in order), each once, in the order in which they are done.

        `report` is told how many completions of all shards have finished; the number never falls.

        Errors: ReplicasFailed, when a replica was lost once more than `restarts`, or one shard has cost three. Shards
        that are in flight elsewhere are finished and handed over first.
        """
        yield from self._queue.draw(shards, settings, self.policy_version, report)

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """One completion a request, in order. Errors: ReplicasFailed."""
        size = self._shard_size or max(1, -(-len(requests) // self._count))
        shards = [requests[start : start + size] for start in range(0, len(requests), size)]
        drawn = dict(self.sample_shards(shards, settings, report))
        return [completion for shard in range(len(shards)) for completion in drawn[shard]]

    def close(self) -> None:
        """End the replicas. Asked again, new ones start, with their restarts unused."""
        self._finalize()
        self._queue.join()
        self._open()

    def _open(self) -> None:
        self._queue = ShardQueue(self._start, self._count, self._restarts)
        self._finalize = weakref.finalize(self, ShardQueue.close, self._queue)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Replicas(QueuedReplicas):
    """`count` processes of one engine on this machine.

    `restarts`, `shard_size`: see `QueuedReplicas`. `shard_seconds`: a replica that gives no sign of life for so long
    while it draws is taken for hung. Signs of life are each call of `report` by its sampler (also one that tells the
    number of before) and each completion; a thread that says "alive" would say it too while the engine is stuck.
    `boot_seconds`: the time to make the engine.
    `environment`: variables for every replica, see `replica_environment`. `devices`: replica i gets
    CUDA_VISIBLE_DEVICES = devices[i]. `logs`: a folder for `replica-<i>.log`, what replica i writes to stdout and
    stderr; None: a temporary one.
    """

    def __init__(
        self,
        spec: EngineSpec,
        count: int,
        restarts: int = 3,
        shard_seconds: float = SHARD_SECONDS,
        boot_seconds: float = BOOT_SECONDS,
        environment: Mapping[str, str] | None = None,
        devices: Sequence[str] | None = None,
        logs: Path | None = None,
        shard_size: int | None = None,
    ) -> None:
        check_limits(shard_seconds, boot_seconds)
        if devices is not None and len(devices) != count:
            raise ValueError(f"devices names {len(devices)} devices for {count} replicas: give one a replica")
        if logs is None:
            logs = Path(tempfile.mkdtemp(prefix="reason-replicas-"))
            weakref.finalize(self, shutil.rmtree, logs, ignore_errors=True)
        logs.mkdir(parents=True, exist_ok=True)
        processes: dict[int, _Process] = {}

        def start(number: int) -> _Process:  # does not know this object, so that a forgotten one can end
            device = devices[number] if devices is not None else None
            variables = replica_environment(os.environ, count, device, environment)
            processes[number] = _Process(spec, variables, logs / f"replica-{number}.log", shard_seconds, boot_seconds)
            return processes[number]

        self._processes = processes
        super().__init__(start, count, restarts, shard_size)

    def pids(self) -> list[int]:
        """The processes that are there now."""
        return [process.pid for process in list(self._processes.values()) if not process.ended]


class _Process:
    """One process and the lines to and from it: a `Replica`."""

    def __init__(
        self, spec: EngineSpec, environment: Mapping[str, str], log: Path, shard_seconds: float, boot_seconds: float
    ) -> None:
        """Errors: ReplicaLost, if the system starts no process."""
        self._log, self._shard_seconds, self._boot_seconds = log, shard_seconds, boot_seconds
        self._read, self._looked, self._unsent = bytearray(), 0, memoryview(dump([spec.factory, dict(spec.arguments)]))
        self.ended, self._ending = False, threading.RLock()
        try:
            with log.open("ab") as stderr:
                self._log_start = stderr.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "rl.samplers.replica_main"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    env=dict(environment),
                    start_new_session=True,  # Ctrl-C is for us, and the engine's own processes end with it
                )
        except OSError as error:
            raise ReplicaLost(f"could not be started: {error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        self.pid = self._process.pid

    def ready(self) -> None:
        if self._value(self._boot_seconds, "was not ready in", "boot_seconds") != "ready":
            raise self._lost("said something else before it was ready")

    def draw(self, work: Work, progress: Callable[[int], None]) -> list[Completion]:
        completions: list[Completion] = []
        self._unsent = memoryview(dump_work(work))
        while len(completions) < len(work.requests):
            value = self._value(self._shard_seconds, "gave no sign of life for", "shard_seconds")
            try:
                if isinstance(value, int):
                    progress(value)
                else:
                    completions.append(load_completion(value))
            except (TypeError, ValueError) as error:
                raise self._lost(f"said something that is no completion: {error}") from error
        return completions

    def kill(self) -> None:
        """End it with the processes that it started."""
        with self._ending:
            if not self.ended:  # not reaped: its number is not another's
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """End it, reap it, close its pipes; again does nothing."""
        with self._ending:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver's call, it cannot be ended
                self._process.wait(END_SECONDS)
            self.ended = True
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()

    def _value(self, seconds: float, what: str, key: str) -> Any:
        """The value of the next line; sends what is to be sent meanwhile. Errors: ReplicaLost, also after `seconds`."""
        deadline = time.monotonic() + seconds
        while (line := self._line()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._hung(f"{what} {seconds:g} s ({key}) and was ended")
            writers = [self._in] if self._unsent else []
            readable, writable, _ = select.select([self._out], writers, [], min(left, LOOK_SECONDS))
            if writable:
                try:
                    self._unsent = self._unsent[os.write(self._in.fileno(), self._unsent) :]
                except BrokenPipeError:
                    self._unsent = memoryview(b"")  # its last words are still to be read
            if readable:
                data = os.read(self._out.fileno(), 1 << 20)
                if not data:
                    self._wait_for_exit()
                    raise self._lost("died")
                self._read += data
            elif not writable and self._exited():
                raise self._lost("died")
        try:
            return load(line)
        except (ValueError, RecursionError) as error:
            raise self._lost(f"said something that is not JSON: {error}") from error

    def _line(self) -> bytes | None:
        end = self._read.find(b"\n", self._looked)
        if end < 0:
            self._looked = len(self._read)
            return None
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        self._looked = 0
        return line

    def _exited(self) -> bool:
        """Whether it is dead though its pipe is open, in the hands of a process that the engine forked. Not reaped."""
        if not hasattr(os, "waitid"):
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _hung(self, how: str) -> ReplicaLost:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)  # it writes where its threads are
        self._wait_for_exit()
        return self._lost(how)

    def _wait_for_exit(self) -> None:
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while not self._exited() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _lost(self, how: str) -> ReplicaLost:
        """End it; how it was lost, with its exit status and the end of what it wrote."""
        self.end()
        status = self._process.returncode
        if status is None:
            said = f"process {self.pid} does not end"
        else:
            said = f"exit status {status}" if status >= 0 else f"signal {-status}, {signal.strsignal(-status)}"
        written = ""
        with contextlib.suppress(OSError), self._log.open("rb") as file:  # a temporary one goes with a forgotten object
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, size - TAIL_BYTES))
            written = file.read().decode("utf-8", "replace").strip()
        return ReplicaLost(f"{how} ({said}). " + (f"It wrote last:\n{written}" if written else "It wrote nothing."))
