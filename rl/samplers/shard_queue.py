"""One queue of shards over several replicas that may die. Standard library only.

The part of `rl.samplers.replicas` and `rl.samplers.ray_workers` that does not know what a replica is: who draws which
shard, what happens to a shard whose replica is lost, when to give up. One thread a replica: it brings the replica up,
hands it one shard after the other, and replaces it when it is lost. The shard in flight then goes to the front of the
queue, so a lost replica costs that shard's time and nothing else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rl.samplers.base import SampleRequest, SamplingSettings
from rl.types import Completion

MAX_LOSSES = 3  # replicas that one shard may cost before it is taken for the cause
# Finished shards a replica that may wait for the caller: memory is bounded, and nobody waits for a write.
READ_AHEAD = 2


class ReplicaLost(Exception):
    """A replica died, hung or said nonsense; the message says how, with what it last wrote."""


class ReplicasFailed(RuntimeError):
    """Shards are left that nobody can draw. Every shard that is done was handed over before this was raised."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a replica is given: one shard and how to draw it.

    Example: `Work((SampleRequest((3, 4), seed=7),), SamplingSettings(), policy_version=2)`
    """

    requests: tuple[SampleRequest, ...]
    settings: SamplingSettings
    policy_version: int  # stamped on the completions


class Replica(Protocol):
    """One engine somewhere else. Its thread calls all but `kill`."""

    def ready(self) -> None:
        """Wait until it can draw. Errors: ReplicaLost."""
        ...

    def draw(self, work: Work, progress: Callable[[int], None]) -> list[Completion]:
        """One completion a request, in order; `progress` is told how many have finished. Errors: ReplicaLost."""
        ...

    def kill(self) -> None:
        """Make it end soon, whatever it does; may be called from any thread, before `end`."""
        ...

    def end(self) -> None:
        """End it and let go of what it holds."""
        ...


@dataclass(slots=True, eq=False)
class _Run:
    """One call of `ShardQueue.draw`."""

    works: list[Work]
    finished: deque[tuple[int, list[Completion]]] = field(default_factory=deque)  # not yet taken by the caller
    counts: list[int] = field(default_factory=list)  # finished completions of each shard
    losses: list[int] = field(default_factory=list)  # replicas lost over each shard
    failure: str = ""


@dataclass(frozen=True, slots=True)
class _Task:
    run: _Run
    shard: int


class ShardQueue:
    """`count` replicas and the shards that wait for them.

    `start(number)` begins replica `number` (from 0) and returns at once. Replicas start when there is work for them. A
    number is started at most 1 + `restarts` times in the life of the queue.
    """

    def __init__(self, start: Callable[[int], Replica], count: int, restarts: int) -> None:
        if count < 1 or restarts < 0:
            raise ValueError(f"replicas need a count of at least 1 and restarts of at least 0, got {count}, {restarts}")
        self._start, self._count, self._restarts = start, count, restarts
        # The lock is reentrant: a garbage collection inside it may close the queue.
        self._changed = threading.Condition()
        self._todo: deque[_Task] = deque()
        self._in_flight: dict[int, _Task] = {}  # of each replica
        self._booting = 0
        self._live: set[Replica] = set()
        self._threads: list[threading.Thread] = []
        self._failure = ""

    def draw(
        self,
        shards: Sequence[Sequence[SampleRequest]],
        settings: SamplingSettings,
        policy_version: int,
        report: Callable[[int], None],
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index, completions) of each shard once, as they are done; see `ShardSampler.sample_shards`.

        `report` is called in the caller's thread, with numbers that never fall: what a lost replica had finished of
        its shard counts again only when it is drawn again.

        Errors: ReplicasFailed, after all that could be done was handed over.
        """
        works = [Work(tuple(shard), settings, policy_version) for shard in shards]
        run = _Run(works, counts=[0] * len(works), losses=[0] * len(works))
        told = taken = 0
        with self._changed:
            self._todo.extend(_Task(run, shard) for shard in range(len(works)))
            self._start_threads()
            self._changed.notify_all()
        try:
            while taken < len(works):
                with self._changed:
                    while not (run.finished or sum(run.counts) > told or self._stopped(run)):
                        self._changed.wait()
                    counted = sum(run.counts)
                    finished = run.finished.popleft() if run.finished else None
                    failure = self._stopped(run)
                    self._changed.notify_all()  # there is room for one more
                if counted > told:
                    told = counted
                    report(told)
                if finished is not None:
                    taken += 1
                    yield finished
                elif failure:
                    raise ReplicasFailed(
                        f"{failure}\n{taken} of {len(works)} shards are done, {len(works) - taken} left"
                    )
        finally:
            with self._changed:  # an abandoned run: what is in flight is drawn to its end and dropped
                self._todo = deque(task for task in self._todo if task.run is not run)
                run.failure = run.failure or "nobody waits for it"

    def close(self) -> None:
        """Make the replicas and their threads end; does not wait for them."""
        with self._changed:
            self._failure = self._failure or "the replicas were closed"
            for replica in self._live:
                replica.kill()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait until `close` has done its work."""
        for thread in self._threads:
            thread.join()

    def _start_threads(self) -> None:
        if not self._threads and not self._failure:
            self._threads = [
                threading.Thread(target=self._drive, args=(number,), name=f"replica-{number}", daemon=True)
                for number in range(self._count)
            ]
            for thread in self._threads:
                thread.start()

    def _stopped(self, run: _Run) -> str:
        """Why no shard of this run will be finished any more, or "" while one may."""
        failure = run.failure or self._failure
        return failure if not any(task.run is run for task in self._in_flight.values()) else ""

    def _drive(self, number: int) -> None:
        """The thread of one replica. It outlives what it starts: Linux ends a process with the thread that made it."""
        replica: Replica | None = None
        starts = 0
        try:
            while True:
                task: _Task | None = None
                try:
                    if replica is None:
                        if not self._wait_to_boot():
                            break
                        starts += 1
                        try:
                            replica = self._begin(number)
                            replica.ready()
                        finally:
                            self._booted()
                        continue
                    task = self._take(number)
                    if task is None:
                        break
                    completions = replica.draw(task.run.works[task.shard], lambda n, task=task: self._progress(task, n))
                    self._deliver(number, task, completions)
                except ReplicaLost as lost:
                    if replica is not None:
                        self._drop(replica)
                        replica = None
                    self._lost(number, starts, task, lost)
        finally:
            if replica is not None:
                self._drop(replica)
            with self._changed:  # there is a failure already, but for an error of ours: no caller may wait for ever
                self._failure = self._failure or f"the thread of replica {number} ended by an error, see its traceback"
                self._in_flight.pop(number, None)
                self._changed.notify_all()

    def _wait_to_boot(self) -> bool:
        """Wait for a shard that no replica on its way up will take; False when the queue is at its end."""
        with self._changed:
            while not self._failure and len(self._todo) <= self._booting:
                self._changed.wait()
            self._booting += not self._failure
            return not self._failure

    def _booted(self) -> None:
        with self._changed:
            self._booting -= 1
            self._changed.notify_all()

    def _begin(self, number: int) -> Replica:
        replica = self._start(number)
        with self._changed:
            self._live.add(replica)
            if self._failure:  # closed a moment ago
                replica.kill()
        return replica

    def _drop(self, replica: Replica) -> None:
        with self._changed:
            self._live.discard(replica)
        replica.end()

    def _take(self, number: int) -> _Task | None:
        """Wait for a shard; None when the queue is at its end."""
        with self._changed:
            while not self._failure:
                for place, task in enumerate(self._todo):
                    if not task.run.failure and len(task.run.finished) < READ_AHEAD * self._count:
                        del self._todo[place]
                        self._in_flight[number] = task
                        return task
                self._changed.wait()
            return None

    def _progress(self, task: _Task, finished: int) -> None:
        with self._changed:
            task.run.counts[task.shard] = finished
            self._changed.notify_all()

    def _deliver(self, number: int, task: _Task, completions: list[Completion]) -> None:
        with self._changed:
            del self._in_flight[number]
            task.run.counts[task.shard] = len(completions)
            task.run.finished.append((task.shard, completions))
            self._changed.notify_all()

    def _lost(self, number: int, starts: int, task: _Task | None, lost: ReplicaLost) -> None:
        """Put the shard back; give up on it, or on everything, where that was once too often."""
        with self._changed:
            self._in_flight.pop(number, None)
            if task is not None:
                run, shard = task.run, task.shard
                run.counts[shard] = 0
                run.losses[shard] += 1
                if run.losses[shard] < MAX_LOSSES and not run.failure:
                    self._todo.appendleft(task)
                else:
                    run.failure = run.failure or (
                        f"shard {shard} was given to {run.losses[shard]} replicas and each was lost over it; it holds "
                        f"{_named(run.works[shard].requests)}. The last one, replica {number}, {lost}"
                    )
            if starts > self._restarts:
                self._failure = self._failure or (
                    f"replica {number} was lost {starts} times, restarts={self._restarts} are used up. It {lost}"
                )
            self._changed.notify_all()


def _named(requests: Sequence[SampleRequest], most: int = 4) -> str:
    """Requests for a message: `2 requests: seed 7 with 31 prompt tokens, seed 8 with 31 prompt tokens`."""
    names = [f"seed {request.seed} with {len(request.context)} prompt tokens" for request in requests[:most]]
    more = [f"{len(requests) - most} more"] if len(requests) > most else []
    return f"{len(requests)} requests: {', '.join(names + more)}"
