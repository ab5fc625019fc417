"""The conversation with a local sandbox: launch it, hand its order over, read what comes back, end it.

A rung makes an order and a command line that builds the sandbox. `run` gives stdin and takes stdout beside stderr, all
bounded in size and in time; the status lines of `rl.sandbox.inside` come on a pipe of their own. A launch that never
says `ready` is `SandboxUnavailable`, whatever the job would have done. Processes are started without a fork of this
one, which may have threads and much memory.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import subprocess
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from rl.sandbox.base import Ended, Job, JobResult, SandboxUnavailable
from rl.sandbox.inside import Order

START_SECONDS = 20.0  # for building the sandbox; a busy machine takes some tenths
STOP_SECONDS = 5.0  # for taking it down
_CHUNK = 1 << 16


class Started(subprocess.Popen[bytes]):
    """The outermost process of a sandbox. Killing or forgetting it, or the death of this process, ends all of it."""

    hang_up: weakref.finalize  # closes our end of the status pipe, on which the inner side listens for that

    def kill(self) -> None:
        """End everything in the sandbox, and return when it is gone."""
        self.hang_up()
        try:
            self.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            super().kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(STOP_SECONDS)

    def terminate(self) -> None:
        self.kill()

    def close_pipes(self) -> None:
        for pipe in (self.stdin, self.stdout, self.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass(slots=True)
class _Launch:
    job: Job
    process: Started
    status: int  # descriptor to read status lines from
    lines: bytes = b""

    def read_status(self) -> bool:
        """Read the status lines that are there; False at their end."""
        data = os.read(self.status, _CHUNK)
        self.lines += data
        return bool(data)

    def word(self, word: str) -> str | None:
        """The rest of the status line that begins with a word, None if there is none."""
        for line in self.lines.decode(errors="replace").splitlines():
            first, _, rest = line.partition(" ")
            if first == word:
                return rest
        return None

    def check(self, stderr: bytes) -> None:
        """Errors: SandboxUnavailable if the sandbox failed or has no Python, ValueError if it has no such command."""
        if (why := self.word("failed")) is not None:
            raise SandboxUnavailable(f"the sandbox could not be set up: {why}")
        if (number := self.word("refused")) is not None:
            message = f"the command {self.job.argv[0]} cannot be run in the sandbox: {os.strerror(int(number))}"
            raise SandboxUnavailable(message) if self.job.argv[0] == "python" else ValueError(message)
        if self.word("ready") is None:
            said = stderr.decode(errors="replace").strip()[-300:] or f"exit status {self.process.poll()}"
            raise SandboxUnavailable(f"the sandbox did not start: {said}")


def _launch(command: Sequence[str], order: Order, job: Job, stderr: int) -> _Launch:
    packed = os.memfd_create("order")
    status, theirs = os.pipe()
    try:
        with open(packed, "wb", closefd=False) as file:
            file.write(order.pack())
        process = Started(
            [*command, str(packed), str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            pass_fds=(packed, theirs),
            env={},
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us; we end it
        )
    except OSError as error:
        os.close(status)
        raise SandboxUnavailable(f"the sandbox did not start: {error}") from error
    finally:
        os.close(packed)
        os.close(theirs)
    process.hang_up = weakref.finalize(process, os.close, status)
    return _Launch(job, process, status)


def start(command: Sequence[str], order: Order, job: Job) -> Started:
    """Launch, and return once the job runs. Errors: as `_Launch.check`."""
    launch = _launch(command, order, job, subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    poller = select.poll()
    poller.register(launch.status, select.POLLIN)
    try:
        while launch.word("ready") is None and (left := deadline - time.monotonic()) > 0:
            if poller.poll(math.ceil(1000 * left)) and not launch.read_status():
                break
        launch.check(b"")
    except BaseException:
        launch.process.kill()
        launch.process.close_pipes()
        raise
    return launch.process


def run(command: Sequence[str], order: Order, job: Job) -> JobResult:
    """Launch, give stdin, take what comes, end it in time. Errors: as `_Launch.check`."""
    began = time.monotonic()
    launch = _launch(command, order, job, subprocess.PIPE)
    try:
        conversation = _Conversation(launch)
        stopped = conversation.hold(began)
        if stopped is None:
            conversation.take_the_rest()
            stopped = conversation.flooded()
    finally:
        launch.process.kill()
        launch.process.close_pipes()
    if launch.process.poll() is None:
        raise SandboxUnavailable("a sandbox could not be stopped")
    stdout, stderr = conversation.outputs()
    launch.check(stderr)
    seconds = time.monotonic() - began
    if stopped is not None:
        return JobResult(stopped, -1, 0, stdout, stderr, seconds)
    if (status := launch.word("exit")) is None:
        raise SandboxUnavailable(f"the sandbox died while its job ran (exit status {launch.process.poll()})")
    code = os.waitstatus_to_exitcode(int(status))
    if code < 0:
        return JobResult(Ended.SIGNALED, -1, -code, stdout, stderr, seconds)
    return JobResult(Ended.EXITED, code, 0, stdout, stderr, seconds)


class _Conversation:
    """What goes to a process and what comes from it."""

    def __init__(self, launch: _Launch) -> None:
        process = launch.process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        self._launch, self._limits, self._stdin = launch, launch.job.limits, process.stdin
        self._unsent = memoryview(launch.job.stdin)
        self._read = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        for descriptor in (*self._read, process.stdin.fileno(), launch.status):
            os.set_blocking(descriptor, False)

    def hold(self, began: float) -> Ended | None:
        """Talk until the process has left, which is None, or until it has to be stopped.

        Errors: SandboxUnavailable if it is not ready in `START_SECONDS`.
        """
        left = os.pidfd_open(self._launch.process.pid)
        try:
            return self._hold(began, left)
        finally:
            os.close(left)

    def _hold(self, began: float, left: int) -> Ended | None:
        poller = select.poll()
        for descriptor in (*self._read, self._launch.status, left):
            poller.register(descriptor, select.POLLIN)
        poller.register(self._stdin.fileno(), select.POLLOUT)
        ready, deadline = False, began + START_SECONDS
        while (seconds := deadline - time.monotonic()) > 0:
            for descriptor, _ in poller.poll(math.ceil(seconds * 1000)):
                if descriptor == left:
                    return None
                if descriptor == self._launch.status:
                    if not self._launch.read_status():
                        poller.unregister(descriptor)
                    elif not ready and self._launch.word("ready") is not None:
                        # The program's time begins here: a busy machine's start is not its fault.
                        ready, deadline = True, time.monotonic() + self._limits.wall_seconds
                elif descriptor in self._read:
                    if not self._take(descriptor):
                        poller.unregister(descriptor)
                    if (flooded := self.flooded()) is not None:
                        return flooded
                elif not self._give():
                    poller.unregister(descriptor)
                    with contextlib.suppress(OSError):
                        self._stdin.close()
        if not ready:
            raise SandboxUnavailable(f"the sandbox was not ready in {START_SECONDS:.0f} s")
        return Ended.TIMEOUT

    def _give(self) -> bool:
        """Send some of stdin; False when nothing is left to send, or nobody to read it."""
        try:
            self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent[:_CHUNK]) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return bool(self._unsent)

    def _take(self, descriptor: int) -> bool:
        """Read some output; False at its end."""
        data = os.read(descriptor, _CHUNK)
        self._read[descriptor] += data
        return bool(data)

    def take_the_rest(self) -> None:
        """What an ended process left in its pipes, as far as it may be kept."""
        with contextlib.suppress(BlockingIOError):
            while self._launch.read_status():
                pass
        for descriptor in self._read:
            with contextlib.suppress(BlockingIOError):
                while self.flooded() is None and self._take(descriptor):
                    pass

    def flooded(self) -> Ended | None:
        over = any(len(output) > self._limits.output_bytes for output in self._read.values())
        return Ended.OUTPUT_LIMIT if over else None

    def outputs(self) -> tuple[bytes, bytes]:
        stdout, stderr = (bytes(output[: self._limits.output_bytes]) for output in self._read.values())
        return stdout, stderr
