"""What the escape probe runs inside a sandbox: it tries to get out, and says how far it got. Standard library only.

Run as a program it reads what was planted (JSON on stdin, see `rl.sandbox.probe`) and prints a JSON object: the name
of each attempt and what it reached, "" if that is nothing. All attempts are harmless where nothing holds them back, so
that the probe may meet a sandbox that is none, and a test may see that it tells the two apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

Planted = dict[str, Any]


def environment(planted: Planted) -> str:
    """Read the caller's environment, a secret in it."""
    return " ".join(name for name, value in os.environ.items() if planted["secret"] in value)


def files(planted: Planted) -> str:
    """Read a file that lies outside, and what every machine has."""
    return " ".join(filter(_readable, [planted["file"], "/etc/passwd", "/proc/1/environ", "/proc/self/mounts"]))


def _readable(path: str) -> bool:
    try:
        if os.path.isdir(path):
            return bool(os.listdir(path))
        with open(path, "rb") as file:
            return bool(file.read(1))
    except OSError:
        return False


def writing(planted: Planted) -> str:
    """Write into folders that everybody may write to."""
    written = []
    for folder in (planted["folder"], "/tmp", "/dev/shm"):
        path = os.path.join(folder, f"written-{planted['secret']}")
        try:
            with open(path, "x") as file:
                file.write("out")
        except OSError:
            continue
        written.append(folder)
        os.remove(path)
    return " ".join(written)


def network(planted: Planted) -> str:
    """Reach listeners on loopback and in the abstract name space."""
    reached = []
    for kind, family, address in (
        ("TCP", socket.AF_INET, ("127.0.0.1", planted["port"])),
        ("abstract", socket.AF_UNIX, "\0" + planted["secret"]),
    ):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as attempt:
                attempt.settimeout(0.3)
                attempt.connect(address)
            reached.append(kind)
        except OSError:
            continue
    return " ".join(reached)


def processes(planted: Planted) -> str:
    """Signal a process of the caller, look at it, change its limits."""
    reached = []
    with contextlib.suppress(OSError):
        os.kill(planted["victim"], signal.SIGKILL)
        reached.append("kill")
    reached += [path for name in ("environ", "stat") if _readable(path := f"/proc/{planted['victim']}/{name}")]
    return " ".join(reached)


def privileges(planted: Planted) -> str:
    """Be root, or become it."""
    with contextlib.suppress(OSError):
        os.setuid(0)
    return f"user {os.getuid()}" if 0 in (os.getuid(), os.geteuid()) else ""


def system_calls(planted: Planted) -> str:
    """Get at parts of the kernel that a program needs not: user namespaces, tracing, keys, io_uring, bpf."""
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = {"x86_64": (101, 250, 425, 321), "aarch64": (117, 219, 425, 280)}[os.uname().machine]
    reached = [] if libc.unshare(0x10000000) else ["user namespace"]
    buffer = ctypes.create_string_buffer(256)
    # PTRACE_TRACEME; KEYCTL_GET_KEYRING_ID of the session; io_uring_setup; BPF_MAP_CREATE of a small array.
    buffer[0:16] = b"".join(word.to_bytes(4, sys.byteorder) for word in (2, 4, 4, 1))
    for name, number, arguments in (
        ("ptrace", numbers[0], (0, 0, 0, 0)),
        ("keyctl", numbers[1], (0, -3, 0)),
        ("io_uring", numbers[2], (1, ctypes.create_string_buffer(256))),
        ("bpf", numbers[3], (0, buffer, 16)),
    ):
        if libc.syscall(number, *arguments) >= 0:
            reached.append(name)
    return " ".join(reached)


def descriptors(planted: Planted) -> str:
    """Find an open file that was not meant for this program."""
    found = []
    for descriptor in range(3, 256):
        try:
            os.fstat(descriptor)
            found.append(str(descriptor))
        except OSError:
            continue
    return " ".join(found)


def memory(planted: Planted) -> str:
    """Take twice the memory that is allowed."""
    try:
        taken = bytearray(2 * planted["memory"])
    except MemoryError:
        return ""
    return f"{len(taken)} bytes"


def big_file(planted: Planted) -> str:
    """Write a file larger than is allowed."""
    written = 0
    with open("big", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while written <= planted["file_bytes"]:
            written += file.write(bytes(1 << 16))
    os.remove("big")
    return f"{written} bytes" if written > planted["file_bytes"] else ""


def forks(planted: Planted) -> str:
    """Have more processes than are allowed. There must be some, or no program could start another."""
    children = []
    with contextlib.suppress(OSError):
        for _ in range(planted["processes"] + 4):
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
            children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not children:
        return "no process could be started at all"
    return f"{len(children) + 1} processes" if len(children) >= planted["processes"] else ""


ATTEMPTS: tuple[Callable[[Planted], str], ...] = (
    environment, files, writing, network, processes, privileges, descriptors, memory, forks, big_file, system_calls,
)  # fmt: skip


def main() -> None:
    planted = json.load(sys.stdin)
    json.dump({attempt.__name__: attempt(planted) for attempt in ATTEMPTS}, sys.stdout)


if __name__ == "__main__":
    main()
