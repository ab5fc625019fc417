"""Persistent worker processes that can be killed: for verifiers that hang, die or eat memory. Standard library only.

A Python thread cannot be stopped, and a C loop that holds the interpreter lock stops everything beside it, so whatever
may hang runs in a process of its own. A `WorkerPool` keeps some of them, gives each one request after the other, and
kills and replaces the one that outlasts its time. The process side is `rl.worker_main.serve`.

    pool = WorkerPool(python_worker("rl.tasks.math_worker"), workers=2, timeout=5.0)
    pool.ask([{"gold": "1/2", "answer": "0.5"}])   # [Answer(value=True, failure=None, ...)]

`ask` may be called from any thread; from asyncio as `await asyncio.to_thread(pool.ask, requests)`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.types import JudgeFailure

Spawn = Callable[[], "subprocess.Popen[bytes]"]  # a worker process with pipes for stdin and stdout

BOOT_SECONDS = 60.0
MAX_REPLY = 1 << 20  # bytes; a longer reply is no verdict
PIPELINE = 2  # requests in a worker's pipe: the next one is there when one is done, and no more wait behind a hang
MAX_BOOTS = 3  # tries to start one worker before it is given up


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request: a value, or a failure and why.

    Example: `Answer(True, None, "", .003)`, `Answer(None, JudgeFailure.TIMEOUT, "killed after 5 s", 5.02)`
    """

    value: Any
    failure: JudgeFailure | None
    reason: str
    seconds: float


def python_worker(module: str, *arguments: str) -> Spawn:
    """A worker that is a module of ours (or a file), run by this Python. It gets no variable but those Python needs."""
    command = [sys.executable, *([module] if module.endswith(".py") else ["-m", module]), *arguments]
    root = str(Path(__file__).resolve().parents[1])

    def spawn() -> subprocess.Popen[bytes]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL") if name in os.environ}
        path = os.pathsep.join([root, *filter(None, sys.path)])
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for us; we end the workers
        )

    return spawn


class _BootFailed(RuntimeError):
    pass


class _Worker:
    """One process and the lines to and from it."""

    def __init__(self, spawn: Spawn) -> None:
        try:
            self.process = spawn()
        except (OSError, RuntimeError) as error:  # no such program, no sandbox
            raise _BootFailed(f"cannot be started: {error}") from error
        assert self.process.stdin is not None and self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        os.set_blocking(self._in.fileno(), False)
        self._read, self._unsent = b"", b""
        try:
            greeting = self.line(time.monotonic() + BOOT_SECONDS)
        except BaseException:
            self.kill()
            raise
        if greeting is None or json.loads(greeting) != "ready":
            self.kill()
            raise _BootFailed(f"did not come up in {BOOT_SECONDS:.0f} s" if greeting is None else "said nonsense")

    def send(self, line: bytes) -> None:
        self._unsent += line

    def line(self, deadline: float) -> bytes | None:
        """The next line, None if there is none by then. Sends what is to be sent meanwhile.

        Errors: EOFError if the process is gone or its line too long.
        """
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            writers = [self._in] if self._unsent else []
            readable, writable, _ = select.select([self._out], writers, [], left)
            if writable:
                try:
                    self._unsent = self._unsent[os.write(self._in.fileno(), self._unsent) :]
                except BrokenPipeError:
                    raise EOFError from None
            if readable:
                data = os.read(self._out.fileno(), 1 << 16)
                if not data or len(self._read) > MAX_REPLY:
                    raise EOFError
                self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line

    def kill(self) -> int | None:
        """End the process and its pipes; its exit status."""
        with contextlib.suppress(OSError):
            self.process.kill()
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(10)
        return None


@dataclass(slots=True)
class _Request:
    number: int
    line: bytes
    future: Future[Answer]


class WorkerPool:
    """`workers` processes that answer requests (JSON values) one by one, in at most `timeout` seconds each.

    Processes start with the first request and end with `close`, with the pool, or with this process.
    """

    def __init__(self, spawn: Spawn, *, workers: int, timeout: float) -> None:
        if workers < 1 or timeout <= 0:
            raise ValueError(f"a pool needs at least 1 worker and a timeout above 0, got {workers} and {timeout}")
        self.workers, self.timeout = workers, timeout
        self._shared = _Shared(spawn, timeout)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._close = weakref.finalize(self, _Shared.close, self._shared)

    def ask(self, requests: Sequence[Any]) -> list[Answer]:
        """One answer a request, in order."""
        if not requests:
            return []
        self._start()
        return [future.result() for future in [self._shared.put(request) for request in requests]]

    def pids(self) -> list[int]:
        """The processes that are there now."""
        return self._shared.pids()

    def close(self) -> None:
        """End the processes. A pool that is asked again starts new ones."""
        with self._lock:
            self._shared.close()
            for thread in self._threads:
                thread.join()
            self._threads = []
            self._shared = _Shared(self._shared.spawn, self.timeout)
            self._close.detach()
            self._close = weakref.finalize(self, _Shared.close, self._shared)

    def _start(self) -> None:
        with self._lock:
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._shared.drive, name=f"judge-{i}", daemon=True)
                    for i in range(self.workers)
                ]
                for thread in self._threads:
                    thread.start()


class _Shared:
    """What the driving threads share; it does not know the pool, so that a forgotten pool can end."""

    def __init__(self, spawn: Spawn, timeout: float) -> None:
        self.spawn, self.timeout = spawn, timeout
        self._queue: queue.Queue[_Request | None] = queue.Queue()
        self._numbers = itertools.count()
        self._alive: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def put(self, request: Any) -> Future[Answer]:
        number = next(self._numbers)
        line = json.dumps([number, request]).encode() + b"\n"
        wanted = _Request(number, line, Future())
        self._queue.put(wanted)
        return wanted.future

    def pids(self) -> list[int]:
        with self._lock:
            return [worker.process.pid for worker in self._alive]

    def close(self) -> None:
        self._closed = True
        with self._lock:
            workers = list(self._alive)
        for worker in workers:  # their drivers see the end of the pipe
            with contextlib.suppress(OSError):
                worker.process.kill()
        self._queue.put(None)

    def drive(self) -> None:
        """One thread: a worker, the requests that it has, and a new worker when that one is gone."""
        worker: _Worker | None = None
        waiting: deque[_Request] = deque()
        while (request := self._next(waiting)) is not None:
            waiting.append(request)
            if worker is None:
                worker = self._boot(waiting)
            if worker is not None:
                worker = self._serve(worker, waiting)
        if worker is not None:
            self._drop(worker)
        while waiting:
            _answer(waiting.popleft(), JudgeFailure.INFRASTRUCTURE, "the pool was closed", 0.0)

    def _next(self, waiting: deque[_Request]) -> _Request | None:
        """The next request; None when the pool is closed."""
        if waiting:
            return waiting.popleft() if not self._closed else None
        request = self._queue.get()
        if request is None or self._closed:
            self._queue.put(None)  # for the other threads
            if request is not None:
                _answer(request, JudgeFailure.INFRASTRUCTURE, "the pool was closed", 0.0)
            return None
        return request

    def _boot(self, waiting: deque[_Request]) -> _Worker | None:
        """A new worker; None if there is none to be had: what waits is then given up."""
        reason = ""
        for _ in range(MAX_BOOTS):
            if self._closed:
                break
            try:
                worker = _Worker(self.spawn)
            except (_BootFailed, EOFError, ValueError) as error:
                reason = str(error) or "died while it started"
                continue
            with self._lock:
                self._alive.add(worker)
            return worker
        while waiting:
            _answer(waiting.popleft(), JudgeFailure.INFRASTRUCTURE, f"the worker {reason or 'was closed'}", 0.0)
        return None

    def _drop(self, worker: _Worker) -> int | None:
        with self._lock:
            self._alive.discard(worker)
        return worker.kill()

    def _serve(self, worker: _Worker, waiting: deque[_Request]) -> _Worker | None:
        """Let the worker answer what waits, and what comes meanwhile; None if it is gone."""
        sent: deque[_Request] = deque()
        started = time.monotonic()
        while True:
            while len(sent) + len(waiting) < PIPELINE:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    self._queue.put(None)
                    break
                waiting.append(more)
            while waiting:
                worker.send(waiting[0].line)
                sent.append(waiting.popleft())
            if not sent:
                return worker
            try:
                line = worker.line(started + self.timeout)
                now = time.monotonic()
                failure = None if line is not None else JudgeFailure.TIMEOUT
                if line is not None:
                    self._finish(sent[0], line, now - started)
                    sent.popleft()
            except (EOFError, ValueError):
                failure, now = JudgeFailure.CRASH, time.monotonic()
            if failure is None:
                started = now
                continue
            status = self._drop(worker)
            if failure is JudgeFailure.CRASH and now - started > self.timeout - 0.05:
                failure = JudgeFailure.TIMEOUT  # its own alarm was quicker than we were
            hung = sent.popleft()
            why = f"killed after {now - started:.1f} s" if failure is JudgeFailure.TIMEOUT else f"died ({status})"
            _answer(hung, failure, f"the verifier {why}", now - started)
            waiting.extendleft(reversed(sent))
            if waiting:  # `drive` only looks for more when nothing waits
                replacement = self._boot(waiting)
                if replacement is None:
                    return None
                worker, sent, started = replacement, deque(), time.monotonic()
                continue
            return self._boot(waiting) if not self._closed else None

    @staticmethod
    def _finish(request: _Request, line: bytes, seconds: float) -> None:
        number, error, value = json.loads(line)
        if number != request.number:
            raise ValueError("an answer to another request")
        if error:
            _answer(request, JudgeFailure.CRASH, str(error)[:200], seconds)
        else:
            request.future.set_result(Answer(value, None, "", seconds))


def _answer(request: _Request, failure: JudgeFailure, reason: str, seconds: float) -> None:
    request.future.set_result(Answer(None, failure, reason, seconds))
