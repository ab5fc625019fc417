"""The first rung: bubblewrap (`bwrap`), which gives a job namespaces of its own.

The job sees a read-only root that holds this interpreter, the system's libraries, a few devices, the trusted packages,
and a scratch folder in memory; no /etc, no /proc, no home, no network, no other process. Nothing that a job could
write is ever bound, and its files come as bytes: bubblewrap before 0.12 follows symbolic links below bound folders
(CVE-2026-87766). On top of that lie an unused user, no capabilities, resource limits and the system call filter of
`rl.sandbox.seccomp`, all set by `rl.sandbox.inside` as process 1.

Called by root, bubblewrap makes the namespaces as root and the inner side becomes a user that nobody is, another one
for each job: the kernel does not bound the processes of user 0. Called by anybody else, it makes a user namespace,
which counts processes for itself.

    Bubblewrap().run(Job(("python", "main.py"), {"main.py": b"print(1)"}))
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from rl.sandbox import host, launch, seccomp
from rl.sandbox.base import Job, JobResult, SandboxUnavailable
from rl.sandbox.inside import Order

_SCRATCH = "/job"
_INNER = "/inner"  # where our own folder is shown, for the inner side
_MAIN = f"import sys; sys.path.append({_INNER!r}); import inside; inside.main(*map(int, sys.argv[1:]))"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class Bubblewrap:
    """Errors: SandboxUnavailable where there is no `bwrap`. Whether it works is for `rl.sandbox.probe` to say."""

    def __init__(self, program: str | None = None) -> None:
        found = program or shutil.which("bwrap")
        if found is None:
            raise SandboxUnavailable("there is no bwrap on PATH")
        self._program = found
        self._filter = seccomp.namespaced_filter()

    @property
    def name(self) -> str:
        return _version(self._program)

    def run(self, job: Job) -> JobResult:
        host.check(job)
        return launch.run(self._command(job), self._order(job), job)

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        host.check(job)
        if job.stdin:
            raise ValueError("a job that is talked to gets its stdin over the pipe")
        return launch.start(self._command(job), self._order(job), job)

    def _order(self, job: Job) -> Order:
        user = host.unused_user() if os.geteuid() == 0 else 0
        return host.make_order(job, _SCRATCH, user, job.limits.processes + 1, self._filter)  # 1: the inner side

    def _command(self, job: Job) -> list[str]:
        python = host.interpreter()
        shown = [*python.folders, python.executable]
        words = [self._program, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        words += ["--unshare-cgroup-try", "--hostname", "sandbox", "--as-pid-1"]
        words += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]  # to bound the scratch folder; given up after it
        if os.geteuid() == 0:
            for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_CHOWN"):
                words += ["--cap-add", capability]
        else:
            words += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        for folder in _above([*shown, *job.packages, Path(_DEVICES[0])]):  # else they are made with mode 0700
            words += ["--perms", "0755", "--dir", str(folder)]
        for path in shown:
            words += ["--ro-bind", str(path), str(path)]
        for package in job.packages:
            words += ["--ro-bind", str(package.resolve()), str(package)]
        for device in _DEVICES:
            words += ["--dev-bind", device, device]
        words += ["--tmpfs", "/python"]  # for `inside.lay_python`
        words += ["--ro-bind", str(Path(__file__).resolve().parent), _INNER]
        words += ["--perms", "0700", "--tmpfs", _SCRATCH]
        words += ["--remount-ro", "/", "--chdir", "/", "--"]
        return [*words, str(python.executable), "-I", "-S", "-c", _MAIN]


@cache
def _version(program: str) -> str:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxUnavailable(f"{program} --version failed: {error}") from error
    return said.decode(errors="replace").strip()[:60]


def _above(paths: Iterable[Path]) -> list[Path]:
    """The folders that lead to paths, outer ones first: /a/b and /a/c -> /a."""
    return sorted({parent for path in paths for parent in path.parents} - {Path("/")})
