"""What a local sandbox gives a job of this machine: an interpreter, an environment, limits, a user.

Both rungs (`rl.sandbox.bubblewrap`, `rl.sandbox.landlock`) make their orders from it; nothing here starts a process.
"""

from __future__ import annotations

import itertools
import os
import resource
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rl.sandbox import inside
from rl.sandbox.base import Job, Limits, SandboxUnavailable


@dataclass(frozen=True, slots=True)
class Interpreter:
    """This Python and what it needs to run: no more of the machine is shown to a job."""

    executable: Path
    folders: tuple[Path, ...]  # its own libraries and the system's


@cache
def interpreter() -> Interpreter:
    """The Python that runs this, without its virtual environment."""
    executable = Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
    own = [Path(os.__file__).parent]
    for prefix in dict.fromkeys([sys.base_prefix, sys.base_exec_prefix]):
        own += [Path(prefix, name) for name in ("lib", "lib64")] if prefix != "/usr" else []
    folders: list[Path] = []
    for folder in [*_libraries(), *sorted(own)]:
        if folder.is_dir() and not any(folder.is_relative_to(other) for other in folders):
            folders.append(folder)
    return Interpreter(executable, tuple(folders))


def _libraries() -> list[Path]:
    """Where the system's shared libraries are. With multiarch (Debian, Ubuntu) that is no folder of programs too."""
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch and Path("/usr/lib", multiarch).is_dir():
        return [Path(path) for path in (f"/lib/{multiarch}", f"/usr/lib/{multiarch}", "/lib64", "/usr/lib/locale")]
    return [Path(path) for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")]


def check(job: Job) -> None:
    """Refuse a job that cannot be asked for. Errors: ValueError."""
    limits = job.limits
    if not job.argv or not all(job.argv) or any("\0" in word for word in job.argv):
        raise ValueError(f"a job needs a command of non-empty words without null characters, not {job.argv}")
    for name in job.files:
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > 255:
            raise ValueError(f"{name!r} is no plain file name")
    if (size := sum(map(len, job.files.values()))) > limits.file_bytes:
        raise ValueError(f"the job's files have {size} bytes, and its folder may hold {limits.file_bytes}")
    if len(job.files) >= inside.MOST_FILES:
        raise ValueError(f"{len(job.files)} files are more than the {inside.MOST_FILES} that the folder may hold")
    if limits.wall_seconds <= 0 or min(limits.cpu_seconds, limits.processes, limits.memory_bytes) < 1:
        raise ValueError(f"a job needs some time, memory and a process: {limits}")
    if limits.output_bytes < 0 or limits.file_bytes < 0 or limits.open_files < 4:
        raise ValueError(f"limits must not be negative, and a program opens 4 files at least: {limits}")
    for package in job.packages:
        usable = package.is_absolute() and os.pathsep not in str(package) and package.is_dir()
        if not usable or package.resolve() == Path("/"):
            raise ValueError(f"{package} is no absolute path of a folder that could be shown to a job")


_PAGE = 4096


def make_order(
    job: Job,
    scratch: str,
    user: int,
    processes: int | None,
    program: bytes,
    guarded: Sequence[Any] = (),
) -> inside.Order:
    """What the inner side is to do. `processes` is the kernel's limit for the user, None if a guard counts instead."""
    environment = {
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(map(str, job.packages)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",  # a numeric library starts a thread for each core, and they are counted
        "OPENBLAS_NUM_THREADS": "1",
    }
    return inside.Order(
        argv=[os.fsencode(word) for word in job.argv],
        environment=[os.fsencode(f"{name}={value}") for name, value in environment.items() if value],
        executable=os.fsencode(interpreter().executable),
        files=[[os.fsencode(name), bytes(content)] for name, content in job.files.items()],
        scratch=os.fsencode(scratch),
        # Beside the files that it is given, in whole pages.
        scratch_bytes=job.limits.file_bytes + _PAGE + sum(-len(c) // _PAGE * -_PAGE for c in job.files.values()),
        user=user,
        limits=_rlimits(job.limits, processes),
        program=program,
        guarded=[*guarded],
    )


def _rlimits(limits: Limits, processes: int | None) -> list[list[int]]:
    hard = [
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 1),  # 0 would still start a handler that core_pattern pipes to; 1 starts and writes none
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ]
    if processes is not None:
        hard.append((resource.RLIMIT_NPROC, processes))
    # SIGXCPU at the first limit, and SIGKILL a second later for whoever ignores it.
    return [[resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1], *([n, top, top] for n, top in hard)]


_FIRST_UNUSED, _LAST_UNUSED = 1_879_048_192, 2_147_483_647  # no distribution gives these out (systemd's table of users)
_drawn = itertools.count(int.from_bytes(os.urandom(4), "big"))


def unused_user() -> int:
    """A user that nobody is, another one for each job: the kernel counts processes by user. For root only.

    Errors: SandboxUnavailable in a container with too few users.
    """
    spans = []
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= _FIRST_UNUSED and first + count > _LAST_UNUSED:
            spans = [(_FIRST_UNUSED, _LAST_UNUSED + 1 - _FIRST_UNUSED)]
            break
        if count > 2_000:  # as in a container: its last users, but for the very last, `nobody`
            spans.append((first + count - 1_500, 1_000))
    if not spans:
        raise SandboxUnavailable("this user namespace has no user to spare for a job: /proc/self/uid_map is too small")
    first, count = spans[-1]
    return first + next(_drawn) % count
