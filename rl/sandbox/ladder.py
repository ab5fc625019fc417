"""Which sandbox this process uses: the first of the ladder that holds against a real escape probe.

A server that `REASON_SANDBOX_URL` names, else bubblewrap, else Landlock. There is nothing below: where none of them
holds, `find_sandbox` says of each why not and what would help.

    sandbox = find_sandbox()          # probed once for each process
    sandbox.run(Job(("python", "main.py"), {"main.py": b"print(1)"}))
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rl.sandbox import probe
from rl.sandbox.base import Sandbox, SandboxUnavailable
from rl.sandbox.bubblewrap import Bubblewrap
from rl.sandbox.landlock import Landlock
from rl.sandbox.remote import RemoteSandbox

URL_VARIABLE = "REASON_SANDBOX_URL"
_RETRY_SECONDS = 30.0  # after the whole ladder failed: a server may come back
Probe = Callable[[Sandbox], list[probe.Check]]


@dataclass(frozen=True, slots=True)
class Rung:
    """A kind of sandbox: how to make one, what it has to pass, and what helps where it does not."""

    name: str
    make: Callable[[], Sandbox]
    quick: Probe
    full: Probe
    help: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Examined:
    """What became of a rung: usable if nothing is against it."""

    rung: str
    sandbox: Sandbox | None
    checks: tuple[probe.Check, ...]
    against: str  # why it is not used, "" if it may be
    help: str


def ladder() -> list[Rung]:
    """The rungs of this machine, best first."""
    rungs = [
        Rung("bubblewrap", Bubblewrap, probe.quick, probe.full, _help_with_namespaces),
        Rung("landlock", Landlock, probe.quick, probe.full, _help_with_landlock),
    ]
    if url := os.environ.get(URL_VARIABLE):
        # What holds a program there is the server's affair; we can see that it runs them.
        remote = Rung("remote", lambda: RemoteSandbox(url), probe.answers, probe.answers, _help_with_server)
        rungs.insert(0, remote)
    return rungs


def examine(rung: Rung, probing: Probe) -> Examined:
    """Make a sandbox and probe it; never raises for one that does not work."""
    try:
        sandbox = rung.make()
        checks = tuple(probing(sandbox))
    except (SandboxUnavailable, ValueError, OSError) as error:
        return Examined(rung.name, None, (), str(error), rung.help())
    broken = [f"{check.name} ({check.detail})" for check in checks if not check.held]
    if broken:
        return Examined(rung.name, None, checks, f"the escape probe got through: {', '.join(broken)}", rung.help())
    return Examined(rung.name, sandbox, checks, "", "")


_lock = threading.Lock()
_found: Sandbox | None = None
_failed: tuple[float, SandboxUnavailable] | None = None


def find_sandbox() -> Sandbox:
    """The best sandbox that works here; probed at the first call, some tenths of a second.

    Errors: SandboxUnavailable, with a line for each rung.
    """
    global _found, _failed
    with _lock:
        if _found is None:
            if _failed is not None and time.monotonic() - _failed[0] < _RETRY_SECONDS:
                raise _failed[1]
            try:
                _found = climb(ladder())
            except SandboxUnavailable as error:
                _failed = (time.monotonic(), error)
                raise
        return _found


def climb(rungs: Sequence[Rung]) -> Sandbox:
    """The first sandbox that holds. A warning says if a server was named and another one is used."""
    failed = []
    for rung in rungs:
        examined = examine(rung, rung.quick)
        if examined.sandbox is None:
            failed.append(examined)
            continue
        if failed and failed[0].rung == "remote":
            warnings.warn(f"{failed[0].against}; using {examined.sandbox.name} instead", RuntimeWarning)
        return examined.sandbox
    lines = [f"  {one.rung}: {one.against}. {one.help}" for one in failed]
    raise SandboxUnavailable("\n".join(["programs cannot be run here, there is no sandbox that holds:", *lines]))


def _help_with_server() -> str:
    return f"Is a SandboxFusion server running at the address in {URL_VARIABLE}?"


def _help_with_namespaces() -> str:
    """What is known to bar `bwrap`, as far as it shows."""
    advice = []
    if not any(os.access(Path(folder, "bwrap"), os.X_OK) for folder in os.get_exec_path()):
        advice.append("Install it: apt-get install bubblewrap, or dnf install bubblewrap.")
    if _setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
        advice.append(
            "AppArmor bars user namespaces (Ubuntu 23.10 and later): give bwrap a profile with `userns,`, or "
            "sysctl kernel.apparmor_restrict_unprivileged_userns=0."
        )
    if _setting("kernel/unprivileged_userns_clone") == "0":
        advice.append("User namespaces are off: sysctl kernel.unprivileged_userns_clone=1.")
    if _setting("user/max_user_namespaces") == "0":
        advice.append("User namespaces are off: sysctl user.max_user_namespaces=1000.")
    if any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")):
        advice.append(
            "A container's seccomp profile usually bars namespaces: run it with --security-opt seccomp=unconfined and "
            "--cap-add SYS_ADMIN."
        )
    return " ".join(advice) or "Try it by hand: bwrap --unshare-all --ro-bind / / true."


def _help_with_landlock() -> str:
    return (
        "It needs Linux 5.13 or later with landlock among the lsm= of the kernel's command line, and, for root, a "
        "Python that other users can reach (not below a home folder of mode 700)."
    )


def _setting(name: str) -> str:
    try:
        return Path("/proc/sys", name).read_text().strip()
    except OSError:
        return ""
