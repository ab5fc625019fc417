"""The inner side of the Landlock rung: it starts the job, and stays beside it as its guard. Standard library only.

Without namespaces three things are not bounded by the kernel: the processes of a user who has others as well, whom a
signal reaches, and what a folder holds in all. So the filter hands the calls that start processes, send signals, and
make or remove files to the guard (seccomp user notification, linux/seccomp.h), which answers each one. The guard also
looks at the size of the scratch folder some fifty times a second and ends a job that outgrew it; this bound alone is
not exact, a job may pass it by what it writes between two looks.

The job is a process group that nothing can leave, since its filter has no setsid and no setpgid. When its first process
has ended, or nobody reads the status lines any more, the guard kills the group, collects every process of it, removes
the scratch folder, and leaves.
"""

from __future__ import annotations

import _socket
import errno
import fcntl
import os
import select
import stat
import sys
import time

from rl.sandbox import inside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_SET_CHILD_SUBREAPER = 36  # prctl
_NEW_LISTENER = 8  # SECCOMP_FILTER_FLAG_NEW_LISTENER
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # SECCOMP_IOCTL_NOTIF_RECV, _SEND, SECCOMP_USER_NOTIF_FLAG_*
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _PATH_BENEATH = 444, 445, 446, 1  # landlock
_NEW_MOUNTS = 0x20000  # unshare
_READ_ONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18  # mount
_START_SECONDS = 0.05  # by then a process that may be started is there to be counted
_DEEPEST = 64  # folders within folders


def main(packed: int, status: int) -> NoReturn:
    """Set the job up, guard it, clean up. The two descriptors are those of `inside.main`."""
    os.set_inheritable(status, False)
    try:
        order = inside.Order.read(packed)
        processes, calls, ruleset, allowed, rights_to_read, rights_to_write, covered, shown = order.guarded
        os.umask(0o022)
        if covered:
            uncover(covered, shown)
        folder = os.path.join(order.scratch, b"reason-" + os.urandom(8).hex().encode())
        python, scratch = os.path.join(folder, b"python"), os.path.join(folder, b"job")
        os.mkdir(folder)
    except (OSError, ValueError) as error:
        inside.give_up(status, error)
    try:
        os.mkdir(python)
        inside.lay_python(python, order.executable)
        os.mkdir(scratch, 0o700)
        if order.user:
            os.chown(scratch, order.user, order.user)
        inside.call("prctl", _SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        ours, theirs = _socket.socketpair()
        told, report = os.pipe()

        def confine() -> None:
            os.setpgid(0, 0)
            inside.drop_user(order.user)
            inside.write_files(scratch, order.files)
            inside.no_new_privileges()
            restrict(ruleset, [*allowed, [python, rights_to_read], [scratch, rights_to_write]])
            listener = inside.set_filter(order.program, _NEW_LISTENER).to_bytes(4, sys.byteorder)
            theirs.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, listener)])

        job = os.fork()
        if job == 0:
            inside.become(order, python, scratch, report, confine)
        theirs.close()
        os.close(report)
        _, ancillary, _, _ = ours.recvmsg(1, _socket.CMSG_SPACE(4))
    except (OSError, ValueError) as error:
        remove(folder)
        inside.give_up(status, error)
    if not inside.begin(told, status):
        os.waitpid(job, 0)
        remove(folder)
        os._exit(1)
    listener = int.from_bytes(ancillary[0][2], sys.byteorder)
    os.closerange(0, 3)  # the job's alone
    try:
        guard = Guard(job, listener, {kind.decode(): numbers for kind, numbers in calls}, scratch, processes, order)
        ended = guard.watch(status)
    except OSError as error:
        end(job)
        remove(folder)
        inside.give_up(status, error)
    end(job)
    remove(folder)
    inside.say(status, "exit", ended)
    inside.leave(ended)


class Guard:
    """Answers what a job asks, and looks after its folder."""

    def __init__(
        self,
        job: int,  # its first process and its process group
        listener: int,
        calls: dict[str, list[int]],  # as of `rl.sandbox.seccomp.watched_calls`
        scratch: bytes,
        processes: int,
        order: inside.Order,
    ) -> None:
        self._job, self._listener, self._scratch, self._processes = job, listener, scratch, processes
        answers: dict[str, Callable[[int, int], int]] = {
            "start": self._start, "signal": self._signal, "create": self._create, "remove": self._remove,
        }  # fmt: skip
        self._answers = {number: answers[kind] for kind, numbers in calls.items() for number in numbers}
        self._counted = 1  # processes and threads: as last counted, and those that came since
        self._starting: dict[int, float] = {}  # thread that may start another -> since when
        self._removed = False
        self._most_bytes = order.scratch_bytes
        self._files, self._look_at, self._look_for_create_at = len(order.files), 0.0, 0.0
        if job not in self._members():
            raise OSError("the job does not show in /proc, so its processes cannot be counted")

    def watch(self, status: int) -> int:
        """Until the first process has ended; its wait status.

        SIGKILL's if the job outgrew its folder, or nobody listens on the status descriptor any more.
        """
        poller = select.poll()
        poller.register(status, 0)  # asks for nothing and is told when the other end is closed
        poller.register(self._listener, select.POLLIN)
        poller.register(os.pidfd_open(self._job), select.POLLIN)
        while True:
            if time.monotonic() >= self._look_at and self._look() > self._most_bytes:
                return inside.SIGKILL
            for descriptor, event in poller.poll(1 + int(1000 * max(0.0, self._look_at - time.monotonic()))):
                if descriptor == status:
                    return inside.SIGKILL
                if descriptor == self._listener and event & select.POLLIN:
                    self._answer()
                elif descriptor == self._listener:
                    poller.unregister(descriptor)  # nobody is left who could ask
            if (ended := inside.reap(self._job)) is not None:
                return ended

    def _answer(self) -> None:
        # struct seccomp_notif: u64 id; u32 pid; u32 flags; int nr; u32 arch; u64 instruction_pointer; u64 args[6]
        request = bytearray(80)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, request)
        except OSError:  # it has died meanwhile
            return
        asker, number = _unsigned(request[8:12]), _unsigned(request[16:20])
        first = int.from_bytes(request[32:36], sys.byteorder, signed=True)
        error = self._answers[number](asker, first)
        # struct seccomp_notif_resp: u64 id; s64 val; s32 error; u32 flags
        reply = request[:8] + bytes(8) + (-error).to_bytes(4, sys.byteorder, signed=True)
        try:
            fcntl.ioctl(self._listener, _SEND, bytes(reply + (0 if error else _CONTINUE).to_bytes(4, sys.byteorder)))
        except OSError:
            self._starting.pop(asker, None)

    def _start(self, asker: int, _: int) -> int:
        if self._starting.pop(asker, None) is not None:
            self._counted += 1  # what it was allowed before has been done
        now = time.monotonic()
        if self._counted + len(self._starting) >= self._processes:
            self._starting = {thread: at for thread, at in self._starting.items() if now - at < _START_SECONDS}
            self._counted = sum(len(_listing(f"/proc/{process}/task")) for process in self._members())
            if self._counted + len(self._starting) >= self._processes:
                return errno.EAGAIN
        self._starting[asker] = now
        return 0

    def _signal(self, _: int, target: int) -> int:
        if target in (0, -self._job):
            return 0
        return 0 if target > 0 and _group(target) == self._job else errno.EPERM

    def _create(self, _: int, __: int) -> int:
        if self._files >= inside.MOST_FILES or time.monotonic() >= self._look_for_create_at:
            size = self._look()
            if self._files >= inside.MOST_FILES or size >= self._most_bytes:
                return errno.ENOSPC
        self._files += 1
        return 0

    def _remove(self, _: int, __: int) -> int:
        self._removed = True
        return 0

    def _members(self) -> list[int]:
        return [int(name) for name in _listing("/proc") if name.isdigit() and _group(int(name)) == self._job]

    def _look(self) -> float:
        """How many bytes the scratch folder holds."""
        began = time.monotonic()
        self._files, size = self._contents()
        now = time.monotonic()
        self._look_at = now + max(0.02, 20 * (now - began))
        self._look_for_create_at = now + max(0.002, 4 * (now - began))
        return size

    def _contents(self) -> tuple[int, float]:
        """How many files and bytes the scratch folder holds; infinitely many bytes if that cannot be seen."""
        files, size = 0, 0.0
        folders = [(self._scratch, 0)]
        while folders:
            folder, depth = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        files += 1
                        size += 512 * entry.stat(follow_symlinks=False).st_blocks
                        if entry.is_dir(follow_symlinks=False):
                            folders.append((os.path.join(folder, entry.name), depth + 1))
            except FileNotFoundError:  # gone while we looked
                continue
            except OSError:
                return files, float("inf")
            if depth > _DEEPEST:
                return files, float("inf")
        return files, size + (self._unnamed_bytes() if self._removed else 0)

    def _unnamed_bytes(self) -> int:
        """In files that were removed and are still open."""
        found = {}
        for process in self._members():
            for descriptor in _listing(f"/proc/{process}/fd"):
                try:
                    status = os.stat(f"/proc/{process}/fd/{descriptor}")
                except OSError:
                    continue
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    found[status.st_dev, status.st_ino] = 512 * status.st_blocks
        return sum(found.values())


def end(job: int) -> None:
    """Kill whatever is left. Nothing new starts meanwhile: nobody gives an answer, and a signal stops a fork."""
    try:
        os.killpg(job, inside.SIGKILL)
        while True:
            os.waitpid(-1, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _unsigned(data: bytes | bytearray) -> int:
    return int.from_bytes(data, sys.byteorder)


def _listing(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _group(process: int) -> int:
    try:
        return os.getpgid(process)
    except OSError:
        return -1


def restrict(ruleset: bytes, allowed: list[list[bytes | int]]) -> None:
    """Confine this process to paths with their rights. `ruleset` is a `struct landlock_ruleset_attr`."""
    rules = inside.call("syscall", _CREATE_RULESET, ruleset, len(ruleset), 0)
    for path, rights in allowed:
        assert isinstance(path, bytes) and isinstance(rights, int)
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = rights.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        inside.call("syscall", _ADD_RULE, rules, _PATH_BENEATH, rule, 0)
        os.close(place)
    inside.call("syscall", _RESTRICT_SELF, rules, 0)
    os.close(rules)


def uncover(covered: list[bytes], shown: list[bytes]) -> None:
    """Show what lies below folders that the job's user must not enter (root's home), and nothing else of them.

    In a mount namespace of its own, for root: an empty folder is laid over each one, and `shown` into it.
    """
    inside.call("unshare", _NEW_MOUNTS)
    inside.call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    for folder in covered:
        opened = [(path, os.open(path, os.O_PATH)) for path in shown if path.startswith(folder + b"/")]
        inside.call("mount", b"tmpfs", folder, b"tmpfs", _NOSUID | _NODEV, b"mode=755,size=1m")
        for path, place in opened:
            if stat.S_ISDIR(os.fstat(place).st_mode):
                os.makedirs(path, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
            inside.call("mount", b"/proc/self/fd/%d" % place, path, None, _BIND | _RECURSIVE, None)
            inside.call("mount", None, path, None, _REMOUNT | _BIND | _READ_ONLY | _NOSUID | _NODEV, None)
            os.close(place)


def remove(folder: bytes) -> None:
    """Delete a folder of any depth whose owner has been unfriendly: what lies deep is moved up first."""
    os.chmod(folder, 0o700)
    mark, moved = os.urandom(8).hex().encode(), 0
    while names := os.listdir(folder):
        for path in [os.path.join(folder, name) for name in names]:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in [os.path.join(path, name) for name in os.listdir(path)]:
                if stat.S_ISDIR(os.lstat(inner).st_mode):
                    os.chmod(inner, 0o700)
                    moved += 1
                    os.rename(inner, os.path.join(folder, b"%b-%d" % (mark, moved)))
                else:
                    os.unlink(inner)
            os.rmdir(path)
    os.rmdir(folder)
