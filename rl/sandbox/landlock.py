"""The second rung: Landlock and a system call filter, where namespaces are barred (AppArmor, a container's profile).

The kernel (5.13 and later) confines the job to reading this interpreter, the system's libraries and the trusted
packages, and to writing in its scratch folder. `rl.sandbox.seccomp.guarded_filter` takes away all sockets and whatever
would act on files and processes past Landlock; a guard process (`rl.sandbox.guard`) counts processes and files, decides
on signals, and ends the job. Limits and, for root, the change to an unused user are as in the first rung. It needs no
right at all when it is called by an ordinary user.

What it holds less well than namespaces: a job may ask whether a path that it names exists and how large it is (`stat`),
though never read or list it, and the bound of the scratch folder as a whole is looked at rather than enforced.

Newer kernels add to it: rename across folders (ABI 2), truncation (3), TCP (4), devices (5), abstract sockets and
signals (6). What they add here the filter holds as well, so that the rung does not depend on them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path

from rl.sandbox import host, launch, seccomp
from rl.sandbox.base import Job, JobResult, SandboxUnavailable
from rl.sandbox.inside import Order

_CREATE_RULESET, _ASK_VERSION = 444, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8  # LANDLOCK_ACCESS_FS_*
_MAKE = sum(1 << bit for bit in (4, 5, 7, 8, 10, 12))  # remove folders and files; make folders, files, pipes, links
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # how many there are; as many in later ones
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_MAIN = (
    f"import sys; sys.path.append({str(Path(__file__).resolve().parents[2])!r}); "
    "from rl.sandbox import guard; guard.main(*map(int, sys.argv[1:]))"
)


def supported_abi() -> int:
    """Which Landlock the kernel has. Errors: SandboxUnavailable where it has none, or must not use it."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION)
    if version > 0:
        return version
    why = {errno.ENOSYS: "the kernel has no Landlock (5.13 or later has)", errno.EOPNOTSUPP: "Landlock is switched off"}
    raise SandboxUnavailable(why.get(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}"))


class Landlock:
    """`abi`: use no more than this version of Landlock has.

    Errors: SandboxUnavailable where the kernel has no Landlock.
    """

    def __init__(self, abi: int = 99) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable("Landlock is a part of Linux")
        self._abi = min(abi, supported_abi())
        self._filter = seccomp.guarded_filter()

    @property
    def name(self) -> str:
        return f"Landlock (ABI {self._abi})"

    def run(self, job: Job) -> JobResult:
        host.check(job)
        return launch.run(self._command, self._order(job), job)

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        host.check(job)
        if job.stdin:
            raise ValueError("a job that is talked to gets its stdin over the pipe")
        return launch.start(self._command, self._order(job), job)

    @cached_property
    def _command(self) -> list[str]:
        return [str(host.interpreter().executable), "-I", "-S", "-c", _MAIN]

    def _order(self, job: Job) -> Order:
        root = os.geteuid() == 0
        scratch = Path(tempfile.gettempdir()).resolve()
        python = host.interpreter()
        shown = [*python.folders, python.executable, *(package.resolve() for package in job.packages)]
        covered = sorted({folder for path in shown if (folder := closed_above(path)) is not None}) if root else []
        if root and closed_above(scratch / "job") is not None:
            raise SandboxUnavailable(f"the folder for temporary files, {scratch}, lies where other users may not go")
        allowed = [(path, _READ_FILE | _READ_DIR) for path in shown]
        allowed += [(path, _READ_FILE | _EXECUTE) for path in self._executable]
        allowed += [(Path("/dev/null"), _READ_FILE | _WRITE_FILE | self._handled & _TRUNCATE)]
        allowed += [(Path("/dev", name), _READ_FILE) for name in ("zero", "full", "random", "urandom")]
        guarded = [
            job.limits.processes,
            [[kind.encode(), numbers] for kind, numbers in seccomp.watched_calls().items()],
            self._ruleset,
            [[os.fsencode(path), rights if path.is_dir() else rights & _ON_FILES] for path, rights in allowed],
            _READ_FILE | _READ_DIR,
            (_READ_FILE | _READ_DIR | _WRITE_FILE | _MAKE | _REFER | _TRUNCATE) & self._handled,
            [os.fsencode(path) for path in covered],
            [os.fsencode(path) for path in shown],
        ]
        user = host.unused_user() if root else 0
        # The kernel's limit would count all processes of an ordinary user, so the guard counts the job's instead.
        return host.make_order(job, str(scratch), user, job.limits.processes if root else None, self._filter, guarded)

    @cached_property
    def _handled(self) -> int:
        return (1 << _RIGHTS_OF_ABI.get(self._abi, 16)) - 1

    @cached_property
    def _ruleset(self) -> bytes:
        """`struct landlock_ruleset_attr`: what is refused where no rule allows it, as far as this ABI knows it."""
        tcp, scopes = (3 if self._abi >= 4 else 0), (3 if self._abi >= 6 else 0)
        return struct.pack("=QQQ", self._handled, tcp, scopes)[: 24 if self._abi >= 6 else 16 if self._abi >= 4 else 8]

    @cached_property
    def _executable(self) -> list[Path]:
        python = host.interpreter().executable
        return [python, _loader(python)]


def closed_above(path: Path) -> Path | None:
    """The outermost folder on the way to a path that only its owner may pass, None if there is none."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def _loader(program: Path) -> Path:
    """The dynamic loader that a program names (its PT_INTERP), or the program if it is static. 64-bit ELF."""
    with program.open("rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            raise SandboxUnavailable(f"{program} is no 64-bit ELF program")
        offset, (size, count) = struct.unpack_from("=Q", head, 32)[0], struct.unpack_from("=HH", head, 54)
        for number in range(count):
            file.seek(offset + number * size)
            kind, _, start, _, _, length = struct.unpack("=IIQQQQ", file.read(40))
            if kind == 3:
                file.seek(start)
                return Path(os.fsdecode(file.read(length).rstrip(b"\0"))).resolve()
    return program
