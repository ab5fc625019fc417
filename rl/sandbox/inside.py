"""The inner side of a sandbox: what runs between the program that builds it and the job. Standard library only.

`Order` says what to do and comes over a descriptor, so that no file of a job ever lies where another could change it.
`main` runs as process 1 of the namespaces that bubblewrap made: it bounds the scratch folder, gives up its user and its
capabilities, writes the job's files, starts the job under its limits and its system call filter, waits, and says on the
status descriptor how it went. The kernel ends all other processes of a process namespace with process 1, so nothing
outlives it. `rl.sandbox.guard` does the same without namespaces.

Lines on the status descriptor: `ready` when the job has begun, `exit <wait status>` when it has ended, or instead
`failed <why>` if there is no sandbox and `refused <errno>` if there is no such command. The descriptor is a lifeline
too: when nobody reads it any more, the job ends.

This file and `guard` run once for each job. They import little, since imports take most of the time of a start.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import sys

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than all of the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

MOST_FILES = 1_000  # in the scratch folder, folders included
_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVS = 1, 38  # prctl
_SECCOMP_CALL = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER = 1
_READ_ONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32  # mount
_PYTHON = b"/python"  # a folder in memory that `rl.sandbox.bubblewrap` makes
_SIGPIPE, _SIGXFSZ, SIGKILL = 13, 25, 9

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> int:
    """A function of libc. Errors: OSError, with the function's name."""
    result = getattr(libc, name)(*arguments)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


class Order:
    """What to run, and how."""

    def __init__(
        self,
        argv: list[bytes],
        environment: list[bytes],  # NAME=value
        executable: bytes,  # what `python` is
        files: list[list[bytes]],  # name, content
        scratch: bytes,  # the folder to work in; for `guard`, where to make it
        scratch_bytes: int,  # what that folder may hold
        user: int,  # to become this user; 0: stay the one that it is
        limits: list[list[int]],  # resource, soft, hard
        program: bytes,  # its system call filter
        guarded: list[Any],  # what `rl.sandbox.guard` needs beside
    ) -> None:
        self.argv, self.environment, self.executable = argv, environment, executable
        self.files, self.scratch, self.scratch_bytes = files, scratch, scratch_bytes
        self.user, self.limits, self.program, self.guarded = user, limits, program, guarded

    def pack(self) -> bytes:
        return pack([
            self.argv, self.environment, self.executable, self.files, self.scratch, self.scratch_bytes, self.user,
            self.limits, self.program, self.guarded,
        ])  # fmt: skip

    @classmethod
    def read(cls, descriptor: int) -> Order:
        with open(descriptor, "rb") as packed:
            packed.seek(0)
            return cls(*unpack(packed.read()))


def pack(value: Any) -> bytes:
    """Integers, byte strings and lists of them as bytes: `pack([b"ab", 7]) == b"l2:abi7ee"` (bencode)."""
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, bytes):
        return b"%d:%b" % (len(value), value)
    return b"l%be" % b"".join([pack(item) for item in value])


def unpack(data: bytes) -> Any:
    """The value that `pack` made `data` from."""
    return _unpack(data, 0)[0]


def _unpack(data: bytes, at: int) -> tuple[Any, int]:
    if data[at : at + 1] == b"i":
        end = data.index(b"e", at)
        return int(data[at + 1 : end]), end + 1
    if data[at : at + 1] != b"l":
        colon = data.index(b":", at)
        end = colon + 1 + int(data[at:colon])
        return data[colon + 1 : end], end
    items, at = [], at + 1
    while data[at : at + 1] != b"e":
        item, at = _unpack(data, at)
        items.append(item)
    return items, at + 1


def say(status: int, *words: object) -> None:
    """One line on the status descriptor; nothing if nobody reads it any more."""
    line = " ".join([str(word) for word in words]).replace("\n", " ")[:1000]
    try:  # noqa: SIM105, contextlib takes a millisecond to import
        os.write(status, line.encode() + b"\n")
    except OSError:
        pass


def give_up(status: int, error: BaseException) -> NoReturn:
    say(status, "failed", error)
    os._exit(1)


def drop_user(user: int) -> None:
    """Become an ordinary user for good, without any group but its own."""
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    # In a user namespace of its own a process keeps its capabilities when it is no root.
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())


def write_files(folder: bytes, files: list[list[bytes]]) -> None:
    for name, content in files:
        with open(os.path.join(folder, name), "xb") as file:
            file.write(content)


def lay_python(folder: bytes, executable: bytes) -> None:
    """An empty virtual environment: an interpreter that finds its standard library, and no package beside it."""
    os.mkdir(os.path.join(folder, b"bin"))
    with open(os.path.join(folder, b"pyvenv.cfg"), "xb") as file:
        file.write(b"home = %b\ninclude-system-site-packages = false\n" % os.path.dirname(executable))
    for name in (b"python", b"python3"):
        os.symlink(executable, os.path.join(folder, b"bin", name))


def no_new_privileges() -> None:
    call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def set_filter(program: bytes, flags: int = 0) -> int:
    """From here on the kernel asks `program` before each system call; a descriptor if `flags` ask for a listener."""
    steps = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.addressof(steps).to_bytes(8, sys.byteorder)
    header = (len(program) // 8).to_bytes(2, sys.byteorder) + bytes(6) + pointer  # struct sock_fprog
    return call("syscall", _SECCOMP_CALL[os.uname().machine], _SET_MODE_FILTER, flags, header)


def become(order: Order, python: bytes, scratch: bytes, report: int, confine: Callable[[], object]) -> NoReturn:
    """Turn this process into the job, or say on `report`, which is closed when it has become it, why it could not."""
    try:
        confine()
        call("prctl", _SET_DEATH_SIGNAL, SIGKILL, 0, 0, 0)  # with its parent, whatever that dies of
        os.chdir(scratch)
        os.umask(0o022)
        for number in (_SIGPIPE, _SIGXFSZ):  # this Python ignores them, its job need not
            libc.signal(number, None)
        os.closerange(3, report)
        os.closerange(report + 1, 1 << 16)
        environment = dict([entry.split(b"=", 1) for entry in order.environment])
        environment |= {b"PATH": os.path.join(python, b"bin"), b"HOME": scratch, b"TMPDIR": scratch}
        for number, soft, hard in order.limits:
            mine = resource.getrlimit(number)[1]  # what lies below needs no lifting
            hard = hard if mine == resource.RLIM_INFINITY else min(hard, mine)
            resource.setrlimit(number, (min(soft, hard), hard))
        say(report, "going")
    except (OSError, ValueError, MemoryError) as error:
        give_up(report, error)
    try:
        os.execvpe(order.argv[0], order.argv, environment)
    except OSError as error:
        say(report, "refused", error.errno)
        os._exit(127)


def begin(told: int, status: int) -> bool:
    """Pass on how the job began: `ready`, or what it said instead."""
    with open(told, "rb") as report:
        said = report.read()
    if said == b"going\n":  # and then it became the job
        say(status, "ready")
        return True
    os.write(status, said or b"failed it was ended before it began\n")
    return False


def wait_for(child: int, status: int) -> int:
    """Reap until `child` has ended, and return its wait status; SIGKILL's when nobody listens any more."""
    poller = select.poll()
    poller.register(status, 0)  # asks for nothing and is told when the other end is closed
    poller.register(os.pidfd_open(child), select.POLLIN)
    while True:
        hung_up = any(ready == status for ready, _ in poller.poll(100))  # now and then: orphans are to be reaped
        ended = reap(child)
        if ended is not None:
            return ended
        if hung_up:
            return SIGKILL


def reap(child: int) -> int | None:
    """Collect all processes that have ended; the wait status of `child` if it is among them."""
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            if found[0] == child:
                return found[1]
    except ChildProcessError:
        pass
    return None


def leave(ended: int) -> NoReturn:
    """End as the job ended, as a shell would say it."""
    code = os.waitstatus_to_exitcode(ended)
    os._exit(code if code >= 0 else 128 - code)


def main(packed: int, status: int) -> NoReturn:
    """Process 1 of a process namespace."""
    os.set_inheritable(status, False)
    try:
        if os.getpid() != 1:
            raise OSError("the command ran in no process namespace of its own")
        order = Order.read(packed)
        options = f"size={order.scratch_bytes},nr_inodes={MOST_FILES + 1}".encode()
        call("mount", None, order.scratch, None, _REMOUNT | _NOSUID | _NODEV | _NOEXEC, options)
        lay_python(_PYTHON, order.executable)
        call("mount", None, _PYTHON, None, _REMOUNT | _READ_ONLY | _NOSUID | _NODEV, None)
        if order.user:
            os.chown(order.scratch, order.user, order.user)
        no_new_privileges()
        drop_user(order.user)
        call("prctl", _SET_DEATH_SIGNAL, SIGKILL, 0, 0, 0)  # a change of user takes it away
        write_files(order.scratch, order.files)
        told, report = os.pipe()
        child = os.fork()
        if child == 0:
            become(order, _PYTHON, order.scratch, report, lambda: set_filter(order.program))
        os.close(report)
    except (OSError, ValueError) as error:
        give_up(status, error)
    os.closerange(0, 3)  # the job's alone
    if not begin(told, status):
        os._exit(1)
    ended = wait_for(child, status)
    say(status, "exit", ended)
    leave(ended)
