"""What a sandbox takes and returns. Standard library only.

A sandbox runs a command over files that are given as bytes, without network, secrets or a way out, and returns what
came out of it. It never judges: a verdict is computed by the caller, from output that it captured itself, on inputs
that the program was not told beforehand. Whoever cannot get a sandbox gets `SandboxUnavailable`, never a plain process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol


class SandboxUnavailable(RuntimeError):
    """There is no sandbox here, or it could not be set up; says why and what would help. Becomes
    `JudgeFailure.INFRASTRUCTURE`: it says nothing of the program that was to run."""


class Ended(StrEnum):
    """How a job ended."""

    EXITED = "exited"  # by itself; `exit_code` says how
    SIGNALED = "signaled"  # by a signal that we did not send: a crash, or a limit that the kernel enforces
    TIMEOUT = "timeout"  # by us, after `Limits.wall_seconds`
    OUTPUT_LIMIT = "output limit"  # by us, when it had written more than `Limits.output_bytes`


@dataclass(frozen=True, slots=True)
class Limits:
    """What a job may use. All are enforced inside the sandbox, on the job and everything that it starts.

    Example: `Limits(wall_seconds=6, memory_bytes=256 * 2**20)`
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 512 * 2**20  # address space of each process
    output_bytes: int = 1 << 20  # stdout and stderr, each
    processes: int = 32  # processes and threads in all
    file_bytes: int = 16 * 2**20  # a file, and all of the scratch folder
    open_files: int = 64


@dataclass(frozen=True, slots=True)
class Job:
    """A command in a scratch folder that is its working directory and the only place it can write.

    `argv[0]` "python" is this Python interpreter with nothing but the standard library, unless `packages` says
    otherwise. The environment is made new: nothing of ours is in it.

    Example: `Job(("python", "main.py"), {"main.py": b"print(input())"}, stdin=b"hello\\n")` -> stdout b"hello\\n".
    """

    argv: tuple[str, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)  # plain names in the scratch folder -> content
    stdin: bytes = b""
    limits: Limits = Limits()
    packages: tuple[Path, ...] = ()  # trusted folders that are readable at their own path and on Python's path


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came out of a job.

    Example: `JobResult(Ended.EXITED, 0, 0, b"hello\\n", b"", 0.08)`
    """

    ended: Ended
    exit_code: int  # of EXITED, else -1
    signal: int  # of SIGNALED, else 0
    stdout: bytes  # at most `Limits.output_bytes`
    stderr: bytes
    seconds: float  # wall time, the start of the sandbox included


class Sandbox(Protocol):
    """One rung of the ladder. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """For people: "bubblewrap 0.8.0", "landlock", "http://host:8080 (remote)"."""
        ...

    def run(self, job: Job) -> JobResult:
        """Run a job to its end. Nothing that it started is left when this returns.

        Errors: SandboxUnavailable where the sandbox itself failed; ValueError for a job that cannot be asked for.
        """
        ...

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        """Start a job whose stdin and stdout are pipes to talk over (`job.stdin` must be empty; `wall_seconds` and
        `output_bytes` are not enforced; killing the process kills all of it). For `rl.workers.WorkerPool`.

        Errors: SandboxUnavailable, for a remote sandbox always.
        """
        ...
