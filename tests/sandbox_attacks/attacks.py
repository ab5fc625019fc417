"""Programs that try to get out of a sandbox, to take more than they may, or to outlive it. Standard library only.

`python -m attacks NAME TOKEN` reads what was planted (JSON on stdin) and prints what NAME reached, nothing if nothing.
The docstring of each attack says how its success would be seen; where it can only be seen from outside, `driver.py`
looks for it there. An attack in `HARMLESS` may be run without a sandbox, where it has to succeed on every machine.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# asyncio, socket and subprocess are imported where they are used: two of three attacks start without them.

Planted = dict[str, Any]
ATTACKS: dict[str, Callable[[Planted], str]] = {}
HARMLESS: set[str] = set()

LIBC = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"


def attack(function: Callable[[Planted], str]) -> Callable[[Planted], str]:
    ATTACKS[function.__name__] = function
    return function


def harmless(function: Callable[[Planted], str]) -> Callable[[Planted], str]:
    HARMLESS.add(function.__name__)
    return function


def call(x86: int, aarch64: int, *arguments: Any) -> int:
    """A system call by its numbers; -1 where this machine has none."""
    number = x86 if X86 else aarch64
    return LIBC.syscall(number, *arguments) if number >= 0 else -1


def which(**attempts: Callable[[], Any]) -> str:
    """The names of the attempts that raised no OSError and gave neither -1, None nor an empty value."""
    reached = []
    for name, attempt in attempts.items():
        with contextlib.suppress(OSError, MemoryError, ValueError):
            found = attempt()
            if found not in (-1, None, b"", "", [], False):
                reached.append(name)
    return " ".join(reached)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


# Resources


@attack
def fork_bomb(planted: Planted) -> str:
    """More of its processes at once than allowed, seen from outside; or a machine that does not come back."""
    while True:
        with contextlib.suppress(OSError):
            os.fork()


@harmless
@attack
def count_processes(planted: Planted) -> str:
    """More processes at once than allowed."""
    children = []
    with contextlib.suppress(OSError):
        while len(children) < planted["processes"] + 10:
            child = os.fork()
            if child == 0:
                time.sleep(60)
            children.append(child)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return f"{len(children) + 1} processes" if len(children) >= planted["processes"] else ""


@harmless
@attack
def count_threads(planted: Planted) -> str:
    """More threads at once than allowed."""
    threading.stack_size(65536)
    stop, started = threading.Event(), 0
    with contextlib.suppress(RuntimeError):
        while started < planted["processes"] + 10:
            threading.Thread(target=stop.wait, daemon=True).start()
            started += 1
    stop.set()
    return f"{started + 1} threads" if started >= planted["processes"] else ""


@attack
def thread_bomb(planted: Planted) -> str:
    """As `fork_bomb`, with threads that start threads."""
    threading.stack_size(65536)

    def more() -> None:
        while True:
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=more).start()

    more()
    return ""


@attack
def zombies(planted: Planted) -> str:
    """More dead children than allowed processes, none of them waited for."""
    dead = 0
    with contextlib.suppress(OSError):
        while dead < 1000:
            if os.fork() == 0:
                os._exit(0)
            dead += 1
    return f"{dead} zombies" if dead > planted["processes"] else ""


@harmless
@attack
def memory_bomb(planted: Planted) -> str:
    """More memory in one process than allowed, really used."""
    taken = []
    with contextlib.suppress(MemoryError):
        while len(taken) << 20 <= planted["memory"]:
            taken.append(b"x" * (1 << 20))
    return f"{len(taken)} MiB" if len(taken) << 20 > planted["memory"] else ""


@attack
def spin(planted: Planted) -> str:
    """Runs longer than its processor time."""
    while True:
        pass


@attack
def spin_unmoved(planted: Planted) -> str:
    """As `spin`, deaf to every signal that a program can be deaf to."""
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    while True:
        pass


@attack
def sleep(planted: Planted) -> str:
    """Runs longer than its wall time."""
    time.sleep(600)
    return "woke up"


@attack
def stop_itself(planted: Planted) -> str:
    """Stopped, it cannot end, and neither may whoever waits for it hang."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return ""


@attack
def flood_stdout(planted: Planted) -> str:
    """More output than may be kept."""
    while True:
        os.write(1, bytes(1 << 16))


@attack
def flood_stderr(planted: Planted) -> str:
    """More errors than may be kept."""
    while True:
        os.write(2, bytes(1 << 16))


@attack
def flood_both_and_fork(planted: Planted) -> str:
    """As the floods, from several processes."""
    for _ in range(4):
        with contextlib.suppress(OSError):
            os.fork()
    while True:
        os.write(1, bytes(1 << 12))
        os.write(2, bytes(1 << 12))


def _make_many(make: Callable[[str], Any]) -> str:
    made = 0
    with contextlib.suppress(OSError):
        while made < 2_000:
            make(f"n{made}")
            made += 1
    return f"{made} of them" if made > 1_500 else ""


@harmless
@attack
def many_files(planted: Planted) -> str:
    """More files than the folder may hold."""
    return _make_many(lambda name: os.close(os.open(name, os.O_CREAT | os.O_WRONLY)))


@harmless
@attack
def many_folders(planted: Planted) -> str:
    """More folders than the folder may hold."""
    return _make_many(os.mkdir)


@harmless
@attack
def many_links(planted: Planted) -> str:
    """More symbolic links than the folder may hold."""
    return _make_many(lambda name: os.symlink("nowhere", name))


@harmless
@attack
def many_pipes_on_disk(planted: Planted) -> str:
    """More named pipes than the folder may hold."""
    return _make_many(os.mkfifo)


@attack
def deep_folders(planted: Planted) -> str:
    """A folder so deep that what cleans up fails: its scratch folder is left, seen from outside."""
    with contextlib.suppress(OSError):
        for _ in range(1_500):
            os.mkdir("d" * 100)
            os.chdir("d" * 100)
    return ""


@attack
def unfriendly_folders(planted: Planted) -> str:
    """Folders that nobody may enter and names that are hard to handle: its scratch folder is left, seen outside."""
    for name in ("line\nbreak", "n" * 255, "-rf", "ünïcode", "'\"; $(true)"):
        with contextlib.suppress(OSError):
            os.makedirs(f"{name}/inner")
            os.mkdir(f"{name}/closed", 0)
            os.close(os.open(f"{name}/inner/file", os.O_CREAT, 0))
    return ""


@harmless
@attack
def big_file(planted: Planted) -> str:
    """A larger file than allowed."""
    written = 0
    with open("big", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while written <= planted["file_bytes"]:
            written += file.write(bytes(1 << 16))
    return f"{written} bytes" if written > planted["file_bytes"] else ""


@harmless
@attack
def sparse_file(planted: Planted) -> str:
    """A file that claims a size beyond the allowed one."""
    with open("sparse", "wb") as file:
        return which(ftruncate=lambda: os.ftruncate(file.fileno(), 1 << 40) is None)


@harmless
@attack
def allocated_file(planted: Planted) -> str:
    """A file that is given its blocks at once."""
    with open("allocated", "wb") as file:
        return which(fallocate=lambda: os.posix_fallocate(file.fileno(), 0, 2 * planted["file_bytes"]) is None)


@harmless
@attack
def files_that_fit(planted: Planted) -> str:
    """Many files of a size that is allowed, several times more than the folder may hold."""
    written = 0
    with contextlib.suppress(OSError):
        for number in range(60):
            with open(f"part-{number}", "wb", buffering=0) as file:
                for _ in range(planted["file_bytes"] >> 16):
                    written += file.write(bytes(1 << 16))
                    if written > 8 * planted["file_bytes"]:
                        return f"{written} bytes"
    return ""


@attack
def unlinked_files(planted: Planted) -> str:
    """As `files_that_fit`, with files that no folder shows, much more than an open file for each could hold."""
    written, kept = 0, []
    with contextlib.suppress(OSError):
        for number in range(400):
            kept.append(os.open(f"part-{number}", os.O_CREAT | os.O_RDWR))
            os.remove(f"part-{number}")
            for _ in range((planted["file_bytes"] >> 16) - 1):
                written += os.write(kept[-1], bytes(1 << 16))
            time.sleep(0.01)
    return f"{written} bytes" if written > 20 * planted["file_bytes"] else ""


@attack
def core_dump(planted: Planted) -> str:
    """A core file in its folder, or a larger limit for one; a crash is all that may be seen."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
        return "a limit for core files"
    child = os.fork()
    if child == 0:
        os.abort()
    os.waitpid(child, 0)
    return " ".join(name for name in os.listdir() if name.startswith("core"))


@attack
def raise_limits(planted: Planted) -> str:
    """Any limit set higher than it was."""
    raised = []
    for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK", "MSGQUEUE"):
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None or resource.getrlimit(number)[1] == resource.RLIM_INFINITY:
            continue
        with contextlib.suppress(OSError, ValueError):
            top = resource.getrlimit(number)[1] + 1
            resource.setrlimit(number, (top, top))
            raised.append(name)
    return " ".join(raised)


@harmless
@attack
def shared_memory(planted: Planted) -> str:
    """System V and POSIX memory that outlives the process."""
    segment = call(29, 194, 0, 4096, 0o1600)
    if segment >= 0:
        LIBC.shmctl(segment, 0, None)
    return which(shm=lambda: segment + 1, file=lambda: os.open("/dev/shm/" + planted["token"], os.O_CREAT | os.O_RDWR))


@attack
def message_queue(planted: Planted) -> str:
    """Queues of the kernel, which outlive the process."""
    queue = call(68, 186, 0, 0o1600)
    if queue >= 0:
        LIBC.msgctl(queue, 0, None)
    return which(
        sysv=lambda: queue + 1, posix=lambda: call(240, 180, b"q" + planted["token"].encode(), 0o102, 0o600, 0)
    )


@harmless
@attack
def large_pipe(planted: Planted) -> str:
    """Kernel memory in a pipe, beyond its usual size."""
    ends = os.pipe()
    return which(pipe=lambda: fcntl.fcntl(ends[1], 1031, 1 << 20))


# Files


@harmless
@attack
def read_secret(planted: Planted) -> str:
    """The content of a file that everybody may read, outside."""
    return which(read=lambda: read(planted["secret"]), list=lambda: os.listdir(planted["folder"]))


@harmless
@attack
def read_machine(planted: Planted) -> str:
    """Anything of /etc, of a home, of the temporary folder."""
    paths = ["/etc/passwd", "/etc/hosts", "/etc/ld.so.cache", "/var/log/dpkg.log", "/usr/share/doc", "/usr/bin/env"]
    found = [path for path in paths if which(any=lambda path=path: os.path.isfile(path) and read(path))]
    return " ".join(
        [*found, *(path for path in ("/etc", "/var/tmp", "/home") if which(any=lambda path=path: os.listdir(path)))]
    )


@harmless
@attack
def read_home(planted: Planted) -> str:
    """The list of the caller's home, or of all homes."""
    return which(home=lambda: os.listdir(planted["home"]), homes=lambda: os.listdir("/home"))


@harmless
@attack
def read_upwards(planted: Planted) -> str:
    """A secret by way of .., from the scratch folder."""
    up = "/".join([".."] * 30)
    return which(secret=lambda: read(up + planted["secret"]), passwd=lambda: read(up + "/etc/passwd"))


@harmless
@attack
def symlink_out(planted: Planted) -> str:
    """A secret through a symbolic link."""
    os.symlink(planted["secret"], "link")
    os.symlink(planted["folder"], "folder")
    return which(file=lambda: read("link"), folder=lambda: os.listdir("folder"))


@harmless
@attack
def hard_link_out(planted: Planted) -> str:
    """A secret through a hard link, or by moving it here."""
    return which(
        link=lambda: os.link(planted["secret"], "link") or read("link"),
        rename=lambda: os.rename(planted["movable"], "moved") or True,
    )


@attack
def files_of_another_job(planted: Planted) -> str:
    """The file of a job that runs at the same time."""
    around = os.path.dirname(os.path.dirname(os.getcwd()))
    return which(
        known=lambda: read(planted["other_job"]),
        around=lambda: [name for name in os.listdir(around) if name.startswith("reason-")],
    )


@harmless
@attack
def proc_root(planted: Planted) -> str:
    """The root of another process."""
    pid = planted["victim"]
    return which(
        init=lambda: os.listdir("/proc/1/root"),
        victim=lambda: os.listdir(f"/proc/{pid}/root"),
        cwd=lambda: os.listdir(f"/proc/{pid}/cwd"),
        descriptors=lambda: os.listdir(f"/proc/{pid}/fd"),
    )


@harmless
@attack
def proc_environ(planted: Planted) -> str:
    """The environment of another process, or that its own began with."""
    paths = {name: f"/proc/{name}/environ" for name in ("1", "self", str(planted["victim"]), str(os.getppid()))}
    return " ".join(name for name, path in paths.items() if which(read=lambda path=path: read(path)))


@harmless
@attack
def proc_memory(planted: Planted) -> str:
    """The memory of another process, or where it lies."""
    return which(
        open=lambda: os.open(f"/proc/{planted['victim']}/mem", os.O_RDONLY),
        maps=lambda: read(f"/proc/{planted['victim']}/maps"),
        parent=lambda: read(f"/proc/{os.getppid()}/maps"),
    )


@attack
def proc_settings(planted: Planted) -> str:
    """A setting of the kernel opened for writing."""
    paths = ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/self/oom_score_adj", "/sys/kernel/uevent")
    return " ".join(path for path in paths if which(open=lambda path=path: os.open(path, os.O_WRONLY)))


@harmless
@attack
def write_outside(planted: Planted) -> str:
    """A new file in a folder that everybody may write to; seen from outside as well."""
    path = os.path.join(planted["folder"], "new")
    return which(
        file=lambda: os.open(path, os.O_CREAT | os.O_WRONLY),
        folder=lambda: os.mkdir(path + "-folder") is None,
        append=lambda: os.open(planted["writable"], os.O_WRONLY | os.O_APPEND),
    )


@harmless
@attack
def empty_a_file_outside(planted: Planted) -> str:
    """A file outside that is shorter than before; seen from outside as well."""
    for attempt in (
        lambda: os.truncate(planted["writable"], 0),
        lambda: os.open(planted["writable"], os.O_RDONLY | os.O_TRUNC),
        lambda: os.open(planted["writable"], os.O_WRONLY | os.O_TRUNC),
    ):
        with contextlib.suppress(OSError):
            attempt()
            return "emptied it"
    return ""


@harmless
@attack
def empty_the_library(planted: Planted) -> str:
    """A file that may be read, opened in the way that empties it (Landlock before ABI 3); seen from outside."""
    return which(package=lambda: os.open(planted["package_file"], os.O_RDONLY | os.O_TRUNC))


@harmless
@attack
def change_attributes_outside(planted: Planted) -> str:
    """Mode, times, owner or extended attributes of a file of the caller; seen from outside as well."""
    path = planted["writable"]
    return which(
        mode=lambda: os.chmod(path, 0o777) or os.stat(path).st_mode & 0o777 == 0o777,  # it may be pretended
        times=lambda: os.utime(path, (1, 1)) or os.stat(path).st_mtime == 1,
        owner=lambda: os.chown(path, os.getuid(), os.getgid()) is None,
        extended=lambda: os.setxattr(path, "user.reached", b"1") is None,
    )


@harmless
@attack
def remove_outside(planted: Planted) -> str:
    """A file outside that is gone; seen from outside as well."""
    return which(remove=lambda: os.remove(planted["removable"]) is None)


@attack
def write_interpreter(planted: Planted) -> str:
    """The interpreter, its library, the packages or the root changed."""
    library = os.path.dirname(os.__file__)
    places = (os.path.realpath(sys.executable), library + "/os.py", planted["package_file"])
    new = (library, os.path.dirname(os.path.realpath(sys.executable)), "/", "/usr/lib", "/dev", "/tmp", "/python")
    opened = [path for path in places if which(open=lambda path=path: os.open(path, os.O_WRONLY | os.O_APPEND))]
    made = [path for path in new if which(make=lambda path=path: os.open(f"{path}/new", os.O_CREAT | os.O_WRONLY))]
    return " ".join(opened + made)


@attack
def file_by_handle(planted: Planted) -> str:
    """A file opened by its number, past all folders."""
    handle = ctypes.create_string_buffer(8 + 128)
    handle[0:4] = (128).to_bytes(4, sys.byteorder)
    mount = ctypes.c_int()
    return which(
        name=lambda: call(303, 264, -100, b"/", handle, ctypes.byref(mount), 0),
        open=lambda: call(304, 265, -100, handle, os.O_RDONLY),
    )


@attack
def devices(planted: Planted) -> str:
    """A device of the machine, or a terminal."""
    paths = ("/dev/kvm", "/dev/mem", "/dev/vda", "/dev/sda", "/dev/fuse", "/dev/ptmx", "/dev/tty", "/dev/kmsg")
    found = [path for path in paths if which(open=lambda path=path: os.open(path, os.O_RDONLY))]
    return " ".join([*found, which(mknod=lambda: os.mknod("disk", 0o60600, os.makedev(254, 0)) is None)]).strip()


@attack
def push_into_terminal(planted: Planted) -> str:
    """Characters pushed into a terminal (TIOCSTI), as if its user had typed them; or a terminal at all."""
    return which(
        **{f"descriptor{n}": lambda n=n: fcntl.ioctl(n, 0x5412, b"x") for n in range(3)},
        terminal=lambda: os.open("/dev/tty", os.O_RDWR),
        pair=lambda: os.openpty(),
        session=lambda: fcntl.ioctl(0, 0x540E, 0) == 0,
    )


@attack
def run_a_file(planted: Planted) -> str:
    """A program of its own, from its folder."""
    import subprocess

    with open(os.path.realpath(sys.executable), "rb") as source, open("copy", "wb") as copy:
        copy.write(source.read())
    with contextlib.suppress(OSError):
        os.chmod("copy", 0o755)
    return which(run=lambda: subprocess.run(["./copy", "-c", "pass"], check=False).returncode == 0)


@harmless
@attack
def run_from_memory(planted: Planted) -> str:
    """A program that lies in no folder (memfd_create)."""
    return which(memory=lambda: os.memfd_create("program"))


@attack
def programs_of_the_machine(planted: Planted) -> str:
    """A shell, or anything else to run."""
    programs = ("/bin/sh", "/usr/bin/env", "/bin/mount", "/usr/bin/newuidmap", "/usr/lib/openssh/ssh-keysign")
    return " ".join(path for path in programs if which(run=lambda path=path: _runs(path)))


def _runs(path: str) -> bool:
    import subprocess

    return subprocess.run([path], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode != 127


# What comes with a process


@harmless
@attack
def environment(planted: Planted) -> str:
    """The caller's secret in a variable; or any variable but those a program needs."""
    needed = ("PATH", "HOME", "TMPDIR", "LANG", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return " ".join(
        name for name, value in os.environ.items()
        if planted["token"] in value or (name not in needed and not name.startswith("PYTHON"))
    )  # fmt: skip


@harmless
@attack
def inherited_descriptors(planted: Planted) -> str:
    """A file that is open already, beyond stdin, stdout and stderr."""
    return " ".join(str(n) for n in range(3, 1024) if which(open=lambda n=n: os.fstat(n)))


@attack
def write_to_descriptors(planted: Planted) -> str:
    """A forged word on whatever is open: its result is another one than it should be."""
    return " ".join(str(n) for n in range(3, 1024) if which(write=lambda n=n: os.write(n, b"ready\nexit 0\n")))


@attack
def exit_without_a_word(planted: Planted) -> str:
    """Success pretended by ending at once: there must be no output."""
    os._exit(0)


@attack
def work_at_exit(planted: Planted) -> str:
    """Processes that begin when the program ends, and go on; seen from outside."""

    @atexit.register
    def go_on() -> None:
        for _ in range(3):
            if os.fork() == 0:
                time.sleep(60)

    return ""


@attack
def outlive(planted: Planted) -> str:
    """A daemon: two forks and a session of its own. Seen from outside when the job has ended."""
    if os.fork() == 0:
        with contextlib.suppress(OSError):
            os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
    os.wait()
    return ""


@attack
def outlive_in_groups(planted: Planted) -> str:
    """As `outlive`, with many process groups, so that killing one is not enough."""
    with contextlib.suppress(OSError):
        for _ in range(10):
            if os.fork() == 0:
                with contextlib.suppress(OSError):
                    os.setpgid(0, 0)
                time.sleep(60)
    return ""


@attack
def hold_the_output(planted: Planted) -> str:
    """A child that keeps stdout open: whoever reads to its end would wait."""
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)


@attack
def end_the_guard(planted: Planted) -> str:
    """Whatever watches the job is ended or stopped: there would be no result, or a child would be left."""
    if os.fork() == 0:
        time.sleep(60)
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.kill(os.getppid(), number)
    os._exit(0)


# Network


def _connect(family: int, kind: int, address: Any) -> bool:
    import socket

    with socket.socket(family, kind) as attempt:
        attempt.settimeout(0.3)
        attempt.connect(address)
        attempt.send(b"reached")
    return True


@harmless
@attack
def tcp(planted: Planted) -> str:
    """A connection to a listener of the caller; seen there as well."""
    import socket

    return which(connect=lambda: _connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", planted["tcp"])))


@harmless
@attack
def udp(planted: Planted) -> str:
    """A datagram that arrives at a listener of the caller; seen only there."""
    import socket

    return which(send=lambda: _connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", planted["udp"])))


@attack
def ipv6(planted: Planted) -> str:
    """As `tcp`, by IPv6."""
    import socket

    return which(connect=lambda: _connect(socket.AF_INET6, socket.SOCK_STREAM, ("::1", planted["tcp"])))


@attack
def listen(planted: Planted) -> str:
    """A port of the machine, open to all."""
    import socket

    return which(listen=lambda: socket.create_server(("", 0)))


@attack
def outward(planted: Planted) -> str:
    """A connection to a machine elsewhere (an address for examples, and the services of clouds)."""
    import socket

    hosts = {"example": "192.0.2.1", "metadata": "169.254.169.254", "resolver": "1.1.1.1"}
    return " ".join(
        name for name, host in hosts.items()
        if which(connect=lambda host=host: _connect(socket.AF_INET, socket.SOCK_STREAM, (host, 53)))
    )  # fmt: skip


@harmless
@attack
def unix_socket(planted: Planted) -> str:
    """A connection to a socket in a folder; seen there as well."""
    import socket

    return which(connect=lambda: _connect(socket.AF_UNIX, socket.SOCK_STREAM, planted["unix"]))


@harmless
@attack
def abstract_socket(planted: Planted) -> str:
    """A connection to a socket without a folder; seen there as well."""
    import socket

    return which(connect=lambda: _connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + planted["token"]))


@harmless
@attack
def pair_to_abstract(planted: Planted) -> str:
    """A datagram from one of a pair of sockets, which are allowed, to another address."""
    import socket

    def send() -> int:
        one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        return one.sendto(b"reached", "\0" + planted["token"] + "-datagram")

    def send_from_stream() -> int:
        one, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return one.sendto(b"reached", "\0" + planted["token"] + "-datagram")

    return which(datagram=send, stream=send_from_stream)


@attack
def names(planted: Planted) -> str:
    """An address for a name."""
    import socket

    return which(resolve=lambda: socket.getaddrinfo("example.com", 80))


@harmless
@attack
def kernel_sockets(planted: Planted) -> str:
    """The network's set-up (netlink), packets (raw), the kernel's ciphers, a virtual machine's host."""
    import socket

    return which(
        netlink=lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
        raw=lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
        packet=lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
        ciphers=lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET, 0),
        host=lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    )


# Other processes


@attack
def kill_all(planted: Planted) -> str:
    """A process of the caller, not of this job, that is dead; seen from outside."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.kill(-1, number)
    return ""


@harmless
@attack
def kill_victim(planted: Planted) -> str:
    """A process of the caller signalled, each way there is; seen from outside."""
    victim, quiet = planted["victim"], signal.SIGWINCH
    info = ctypes.create_string_buffer(128)
    return which(
        kill=lambda: os.kill(victim, quiet) is None,
        tgkill=lambda: call(234, 131, victim, victim, int(quiet)) + 1,
        tkill=lambda: call(200, 130, victim, int(quiet)) + 1,
        queue=lambda: call(129, 138, victim, int(quiet), info) + 1,
        pidfd=lambda: signal.pidfd_send_signal(os.pidfd_open(victim), quiet) is None,
    )


@harmless
@attack
def signal_by_descriptor(planted: Planted) -> str:
    """A descriptor that signals its owner, and says that a process of the caller owns it."""
    reader, writer = os.pipe()
    owner = (1).to_bytes(4, sys.byteorder) + planted["victim"].to_bytes(4, sys.byteorder)
    del writer
    return which(
        own=lambda: fcntl.fcntl(reader, 8, planted["victim"]) + 1,
        own_ex=lambda: fcntl.fcntl(reader, 15, owner),
        ioctl=lambda: fcntl.ioctl(reader, 0x8901, planted["victim"].to_bytes(4, sys.byteorder)),
    )


@harmless
@attack
def limits_of_victim(planted: Planted) -> str:
    """Limits, priority or processors of a process of the caller."""
    victim = planted["victim"]
    return which(
        limit=lambda: resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0)),
        nice=lambda: os.setpriority(os.PRIO_PROCESS, victim, 5) is None,
        processors=lambda: os.sched_setaffinity(victim, os.sched_getaffinity(0)) is None,
        ionice=lambda: call(251, 30, 1, victim, (3 << 13)) + 1,
    )


@attack
def trace_victim(planted: Planted) -> str:
    """A process of the caller traced, stopped or read."""
    victim = planted["victim"]
    local, remote = ctypes.create_string_buffer(16), ctypes.create_string_buffer(16)
    return which(
        attach=lambda: call(101, 117, 16, victim, 0, 0) + 1,
        seize=lambda: call(101, 117, 0x4206, victim, 0, 0) + 1,
        read=lambda: call(310, 270, victim, local, 1, remote, 1, 0) + 1,
        descriptor=lambda: call(438, 438, os.pidfd_open(victim), 0, 0),
    )


@harmless
@attack
def trace_family(planted: Planted) -> str:
    """Its own parent or child traced: what watches a job could be made to err."""
    one = os.fork()
    if one == 0:
        os._exit(int(call(101, 117, 0, 0, 0, 0) == 0))  # PTRACE_TRACEME
    other = os.fork()
    if other == 0:
        time.sleep(60)
    reached = which(
        parent=lambda: os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]),
        child=lambda: call(101, 117, 0x4206, other, 0, 0) + 1,
    )
    os.kill(other, signal.SIGKILL)
    return reached


# The kernel


@attack
def user_namespace(planted: Planted) -> str:
    """A user namespace, in which it would be root; with three calls."""
    arguments = ctypes.create_string_buffer(88)  # struct clone_args: flags first
    arguments[0:8] = (0x10000000).to_bytes(8, sys.byteorder)
    arguments[32:40] = (17).to_bytes(8, sys.byteorder)

    def by(x86: int, aarch64: int, *rest: Any) -> int:
        child = call(x86, aarch64, *rest)
        if child == 0:
            os._exit(0)
        return child

    return which(
        unshare=lambda: LIBC.unshare(0x10000000) + 1,
        clone=lambda: by(56, 220, 0x10000000 | 17, 0, 0, 0, 0),
        clone3=lambda: by(435, 435, arguments, 88),
    )


@attack
def other_namespaces(planted: Planted) -> str:
    """A mount, network, process, IPC or host name space of its own, or those of another process."""
    flags = {"mount": 0x20000, "network": 0x40000000, "process": 0x20000000, "ipc": 0x8000000, "name": 0x4000000}
    entered = which(enter=lambda: LIBC.setns(os.open("/proc/1/ns/mnt", os.O_RDONLY), 0) + 1)
    return " ".join([entered, *(name for name, flag in flags.items() if LIBC.unshare(flag) == 0)]).strip()


@attack
def mounts(planted: Planted) -> str:
    """Anything mounted, remounted, unmounted, or another root."""
    here = os.getcwd().encode()
    return which(
        tmpfs=lambda: LIBC.mount(b"none", here, b"tmpfs", 0, None) + 1,
        proc=lambda: LIBC.mount(b"proc", here, b"proc", 0, None) + 1,
        bind=lambda: LIBC.mount(b"/", here, None, 4096, None) + 1,
        remount=lambda: LIBC.mount(None, here, None, 32, b"size=1g") + 1,
        unmount=lambda: LIBC.umount2(here, 2) + 1,
        new=lambda: call(430, 430, b"tmpfs", 0) + 1,
        tree=lambda: call(428, 428, -100, b"/", 1) + 1,
        chroot=lambda: os.chroot(".") is None,
        pivot=lambda: call(155, 41, here, here) + 1,
    )


@attack
def io_uring(planted: Planted) -> str:
    """System calls by way of a ring, which no filter sees."""
    return which(ring=lambda: call(425, 425, 4, ctypes.create_string_buffer(120)) + 1)


@attack
def kernel_programs(planted: Planted) -> str:
    """Programs and probes in the kernel: bpf, perf events, user faults."""
    array = ctypes.create_string_buffer(b"".join(n.to_bytes(4, sys.byteorder) for n in (2, 4, 4, 1)), 64)
    event = ctypes.create_string_buffer(128)
    event[4:8] = (128).to_bytes(4, sys.byteorder)
    return which(
        bpf=lambda: call(321, 280, 0, array, 64) + 1,
        perf=lambda: call(298, 241, event, 0, -1, -1, 0) + 1,
        faults=lambda: call(323, 282, 1) + 1,
    )


@attack
def keys(planted: Planted) -> str:
    """The keys of a session, which are the caller's."""
    return which(
        ring=lambda: call(250, 219, 0, -3, 0) + 1,
        add=lambda: call(248, 217, b"user", b"reached", b"x", 1, -2) + 1,
    )


@attack
def become_root(planted: Planted) -> str:
    """Another user, another group, a capability."""
    header, wanted = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    return which(
        user=lambda: os.setuid(0) is None,
        group=lambda: os.setgid(0) is None,
        groups=lambda: os.setgroups([0]) is None,
        capabilities=lambda: LIBC.capset(header, wanted) + 1,
        already=lambda: 0 in (os.getuid(), os.geteuid(), os.getgid()),
    )


@attack
def run_the_machine(planted: Planted) -> str:
    """The machine's name, clock, swap, accounts or log, or its end."""
    return which(
        name=lambda: LIBC.sethostname(b"reached", 7) + 1,
        clock=lambda: LIBC.settimeofday(ctypes.create_string_buffer(16), None) + 1,
        swap=lambda: LIBC.swapon(b"/nowhere", 0) + 1,
        account=lambda: LIBC.acct(None) + 1,
        log=lambda: LIBC.klogctl(3, ctypes.create_string_buffer(64), 64) + 1,
        modules=lambda: call(313, 273, 0, b"", 0) + 1,
        restart=lambda: call(246, 104, 0, 0, 0, 0) + 1,
    )


@attack
def other_instruction_set(planted: Planted) -> str:
    """A system call by its number of another instruction set, which a filter may read as a harmless one."""
    if not X86:
        return ""
    reached = which(x32=lambda: LIBC.syscall(0x40000000 | 39) + 1)
    child = os.fork()
    if child == 0:
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid of i386); int 0x80; ret
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        os._exit(0 if ctypes.CFUNCTYPE(ctypes.c_int)(address)() > 0 else 1)
    i386 = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return " ".join([reached, "i386" if i386 else ""]).strip()


@attack
def loosen_itself(planted: Planted) -> str:
    """The filter off, or this process open to a tracer."""
    return which(
        strict=lambda: LIBC.prctl(22, 0, 0, 0, 0) + 1,
        tracer=lambda: LIBC.prctl(0x59616D61, -1, 0, 0, 0) + 1,
        privileges=lambda: LIBC.prctl(38, 0, 0, 0, 0) + 1,
        ambient=lambda: LIBC.prctl(47, 2, 21, 0, 0) + 1,
        bits=lambda: LIBC.prctl(28, 0, 0, 0, 0) + 1,
    )


# Programs that have to work


def good(planted: Planted) -> str:
    """One of some ordinary programs: `number` in what was planted says which, its result is `expected_of` that."""
    number = planted["number"]
    kinds = (_arithmetic, _child, _threads, _files, _event_loop, _own_signals)
    return str(kinds[number % len(kinds)](number))


def expected_of(number: int) -> str:
    return str(sum(range(number + 100)))


def _arithmetic(number: int) -> int:
    return sum(range(number + 100))


def _child(number: int) -> int:
    import subprocess

    program = f"print(sum(range({number} + 100)))"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)


def _threads(number: int) -> int:
    found: list[int] = []
    threads = [threading.Thread(target=lambda n=n: found.append(n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(range(number + 100)) + sum(found) - 6


def _files(number: int) -> int:
    os.mkdir("folder")
    with open("folder/numbers", "w") as file:
        file.write(json.dumps(list(range(number + 100))))
    os.rename("folder/numbers", "numbers")
    with open("numbers") as file:
        found = sum(json.load(file))
    os.remove("numbers")
    os.rmdir("folder")
    return found


def _event_loop(number: int) -> int:
    import asyncio

    async def add() -> int:
        await asyncio.sleep(0.01)
        return sum(range(number + 100))

    return asyncio.run(add())


def _own_signals(number: int) -> int:
    """Ends a child of its own that would not end, as a test runner does."""
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    child.kill()
    return sum(range(number + 100)) if child.wait() == -signal.SIGKILL else -1


def main() -> None:
    planted = json.load(sys.stdin)
    attempt = good if sys.argv[1] == "good" else ATTACKS[sys.argv[1]]
    sys.stdout.write(attempt(planted))


if __name__ == "__main__":
    main()
