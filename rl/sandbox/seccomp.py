"""Which system calls a job may make: two lists, compiled to the BPF programs that the kernel runs before each call.

Both are lists of what is allowed, so that a call that nobody thought of is refused. What is on no list, and every call
that is newer than these tables, answers ENOSYS as on a kernel that lacks it: libraries then take their older path
(`clone` for `clone3`), and io_uring, bpf, userfaultfd, perf_event_open, keyctl, memfd_create, ptrace, process_vm_*,
mount, unshare, setns, pidfd_*, sockets and System V IPC are simply not there. A call of the wrong instruction set
kills.

`namespaced_filter` is for a job that has namespaces of its own. `guarded_filter` is for one that has not: it also
keeps away what would reach files and processes of the host past Landlock (chmod, chown, utimes, xattr, truncate by
path, setsid, limits and priorities of others), and hands four kinds of calls to a guard process that decides on each
(`watched_calls`, see `rl.sandbox.guard`). Instructions and constants: linux/filter.h, linux/seccomp.h; numbers:
asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from rl.sandbox.base import SandboxUnavailable

# Call -> its number on x86_64 and on aarch64, -1 where there is none.
_FILES = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "close": (3, 57),
    "close_range": (436, 436), "lseek": (8, 62), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1),
    "newfstatat": (262, 79), "statx": (332, 291), "access": (21, -1), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, -1), "readlinkat": (267, 78), "getdents": (78, -1), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "fchdir": (81, 50), "umask": (95, 166), "dup": (32, 23), "dup2": (33, -1), "dup3": (292, 24),
    "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fadvise64": (221, 223), "copy_file_range": (326, 285), "sendfile": (40, 71), "splice": (275, 76), "tee": (276, 77),
    "statfs": (137, 43), "fstatfs": (138, 44), "pipe": (22, -1), "pipe2": (293, 59),
}  # fmt: skip
_OPEN = {"open": (2, -1), "openat": (257, 56)}
_CREATE = {
    "creat": (85, -1), "mkdir": (83, -1), "mkdirat": (258, 34), "link": (86, -1), "linkat": (265, 37),
    "symlink": (88, -1), "symlinkat": (266, 36),
}  # fmt: skip
_REMOVE = {
    "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276), "rmdir": (84, -1), "unlink": (87, -1),
    "unlinkat": (263, 35),
}  # fmt: skip
_MODE_AND_TIMES = {
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "utime": (132, -1), "utimes": (235, -1),
    "utimensat": (280, 88), "futimesat": (261, -1),
}  # fmt: skip
_ATTRIBUTES = {
    "truncate": (76, 45), "chown": (92, -1), "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54),
    "mknod": (133, -1), "mknodat": (259, 33),
}  # fmt: skip
_XATTR = {
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "getxattr": (191, 8), "lgetxattr": (192, 9),
    "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
}  # fmt: skip
_MEMORY = {
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "msync": (26, 227),
    "madvise": (28, 233), "brk": (12, 214), "mincore": (27, 232), "mlock": (149, 228), "munlock": (150, 229),
    "membarrier": (324, 283),
}  # fmt: skip
_THREADS = {
    "futex": (202, 98), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "set_tid_address": (218, 96),
    "rseq": (334, 293), "gettid": (186, 178), "arch_prctl": (158, -1), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "sched_getparam": (143, 121), "sched_getscheduler": (145, 120),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "sched_rr_get_interval": (148, 127),
    "getpriority": (140, 141), "getcpu": (309, 168), "execve": (59, 221), "exit": (60, 93), "exit_group": (231, 94),
    "wait4": (61, 260), "waitid": (247, 95),
}  # fmt: skip
_CLONE = {"clone": (56, 220)}
_FORK = {"fork": (57, -1), "vfork": (58, -1)}
_SIGNAL = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
_SESSION = {"setsid": (112, 157), "setpgid": (109, 154)}
_SIGNALS_OF_ITS_OWN = {
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, -1),
    "restart_syscall": (219, 128), "signalfd": (282, -1), "signalfd4": (289, 74),
}  # fmt: skip
_TIME = {
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "nanosleep": (35, 101),
    "gettimeofday": (96, 169), "time": (201, -1), "times": (100, 153), "alarm": (37, -1), "setitimer": (38, 103),
    "getitimer": (36, 102), "timer_create": (222, 107), "timer_settime": (223, 110), "timer_gettime": (224, 108),
    "timer_getoverrun": (225, 109), "timer_delete": (226, 111), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87),
}  # fmt: skip
_WAITING = {
    "poll": (7, -1), "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72), "epoll_create": (213, -1),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, -1), "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441), "eventfd": (284, -1), "eventfd2": (290, 19),
}  # fmt: skip
_IDENTITY = {
    "getpid": (39, 172), "getppid": (110, 173), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, -1), "getpgid": (121, 155), "getsid": (124, 156), "getrlimit": (97, 163), "setrlimit": (160, 164),
    "getrusage": (98, 165), "sysinfo": (99, 179), "uname": (63, 160), "getrandom": (318, 278),
}  # fmt: skip
_ON_SOCKETS = {  # of a `socketpair`, the only sockets there are
    "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211), "recvmsg": (47, 212), "shutdown": (48, 210),
    "getsockopt": (55, 209), "getsockname": (51, 204), "getpeername": (52, 205),
}  # fmt: skip
_WITH_CONDITIONS = {
    "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167), "prlimit64": (302, 261), "socketpair": (53, 199),
    "sched_setaffinity": (203, 122), "setpriority": (141, 140),
}  # fmt: skip

_ALWAYS = _FILES | _MEMORY | _THREADS | _SIGNALS_OF_ITS_OWN | _TIME | _WAITING | _IDENTITY | _ON_SOCKETS
_NUMBERS = (
    _ALWAYS
    | _OPEN
    | _CREATE
    | _REMOVE
    | _ATTRIBUTES
    | _MODE_AND_TIMES
    | _XATTR
    | _CLONE
    | _FORK
    | _SIGNAL
    | _SESSION
    | _WITH_CONDITIONS
)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*

ALLOW = 0x7FFF0000  # SECCOMP_RET_*
WATCH = 0x7FC00000
_KILL = 0x80000000


def _refuse(error: int) -> int:
    return 0x00050000 | error


_PRETEND = _refuse(0)


@dataclass(frozen=True, slots=True)
class Where:
    """`argument & mask == value`, on the lower 32 bits of an argument: the kernel reads no more of those named here."""

    argument: int
    value: int
    mask: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to the calls for which all conditions hold. The first rule that fits a call decides."""

    calls: Iterable[str]
    action: int
    where: tuple[Where, ...] = ()


_NAMESPACES = 0x7E020080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} and CLONE_NEWTIME
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 9, 36, 37, 38, 1030, 1032, 1034)  # no F_SETOWN, F_SETSIG, F_SETLEASE, F_SETPIPE_SZ
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FION*, FIO(N)CLEX; no TIOCSTI
_PRCTL = (1, 2, 3, 15, 16, 23, 39, 0x53564D41)  # death signal, names, looking; not PR_SET_DUMPABLE, PR_SET_PTRACER
_CREAT, _TRUNC, _TMPFILE, _ACCESS_MODE = 0o100, 0o1000, 0o20000000, 0o3

_COMMON = (
    Rule(_ALWAYS, ALLOW),
    Rule(_XATTR, _refuse(errno.EOPNOTSUPP)),  # what shutil.copystat takes for an answer
    Rule(_CLONE, ALLOW, (Where(0, 0, _NAMESPACES),)),
    *(Rule(["fcntl"], ALLOW, (Where(1, command),)) for command in _FCNTL),
    *(Rule(["ioctl"], ALLOW, (Where(1, request),)) for request in _IOCTL),
    Rule(["ioctl"], _refuse(errno.ENOTTY)),
    *(Rule(["prctl"], ALLOW, (Where(0, option),)) for option in _PRCTL),
    Rule(["prlimit64", "sched_setaffinity"], ALLOW, (Where(0, 0),)),  # its own, not another process's
    Rule(["setpriority"], ALLOW, (Where(0, 0), Where(1, 0))),
    # AF_UNIX and SOCK_STREAM: such a pair can only talk to itself, a datagram socket could send to any address.
    Rule(["socketpair"], ALLOW, (Where(0, 1), Where(1, 1, 0xF))),
)
_OPENING = [(call, 1 if call == "open" else 2) for call in _OPEN]  # which argument holds the flags
_NAMESPACED = (
    Rule({**_OPEN, **_CREATE, **_REMOVE, **_ATTRIBUTES, **_MODE_AND_TIMES, **_FORK, **_SIGNAL, **_SESSION}, ALLOW),
    *_COMMON,
    Rule(_NUMBERS, _refuse(errno.EPERM)),
)
_GUARDED = (
    # An unlinked file from the start would be invisible to the guard that counts them.
    *(Rule([call], _refuse(errno.EOPNOTSUPP), (Where(flags, _TMPFILE, _TMPFILE),)) for call, flags in _OPENING),
    # Nothing holds these to the scratch folder, so they succeed without effect: `shutil.copy` ends with a chmod.
    Rule(_MODE_AND_TIMES, _PRETEND),
    # Before ABI 3 Landlock takes this for reading, and it empties the file.
    *(Rule([call], _refuse(errno.EACCES), (Where(flags, _TRUNC, _TRUNC | _ACCESS_MODE),)) for call, flags in _OPENING),
    *(Rule([call], WATCH, (Where(flags, _CREAT, _CREAT),)) for call, flags in _OPENING),
    Rule(_OPEN, ALLOW),
    Rule(_CLONE, WATCH, (Where(0, 0, _NAMESPACES),)),
    Rule({**_CREATE, **_REMOVE, **_FORK, **_SIGNAL}, WATCH),
    *_COMMON,
    Rule(_NUMBERS, _refuse(errno.EPERM)),
)


def _column(machine: str) -> tuple[int, int]:
    if machine not in _ARCHITECTURES:
        raise SandboxUnavailable(f"there is no table of system calls for {machine}")
    return _ARCHITECTURES[machine]


def namespaced_filter(machine: str = platform.machine()) -> bytes:
    """The program for a job in namespaces of its own, as an array of `struct sock_filter` (8 bytes each).

    Errors: SandboxUnavailable on a machine that is neither x86_64 nor aarch64.
    """
    return _program(_NAMESPACED, *_column(machine))


def guarded_filter(machine: str = platform.machine()) -> bytes:
    """The program for a job that shares the namespaces of the host; it needs a listener for `watched_calls`."""
    return _program(_GUARDED, *_column(machine))


def watched_calls(machine: str = platform.machine()) -> dict[str, list[int]]:
    """What `guarded_filter` hands to the guard: kind of call -> numbers."""
    column, _ = _column(machine)
    kinds = {"start": _CLONE | _FORK, "signal": _SIGNAL, "create": _OPEN | _CREATE, "remove": _REMOVE}
    return {kind: [number[column] for number in calls.values() if number[column] >= 0] for kind, calls in kinds.items()}


# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6], on machines with the low half first.
_NR, _ARCH, _ARGS = 0, 4, 16
_LOAD, _AND, _RETURN = 0x20, 0x54, 0x06
_IF_EQUAL, _IF_GREATER, _IF_AT_LEAST = 0x15, 0x25, 0x35


def _step(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; `then` and `otherwise` say how many instructions a comparison skips."""
    return struct.pack("=HBBI", code, then, otherwise, value)


def _program(rules: Iterable[Rule], column: int, architecture: int) -> bytes:
    of_call: dict[int, list[Rule]] = {}
    for rule in rules:
        for call in rule.calls:
            if (number := _NUMBERS[call][column]) >= 0:
                of_call.setdefault(number, []).append(rule)
    plain = {number: found[0].action for number, found in of_call.items() if not found[0].where}
    steps = [
        _step(_LOAD, _ARCH),
        _step(_IF_EQUAL, architecture, then=1),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NR),
    ]
    for number in sorted(set(of_call) - set(plain)):
        block = [step for rule in of_call[number] for step in _when(rule)]
        steps += [_step(_IF_EQUAL, number, otherwise=len(block)), *block]
    for first, last, action in _ranges(plain):
        steps += [
            _step(_IF_AT_LEAST, first, then=1),
            _step(_RETURN, _refuse(errno.ENOSYS)),  # numbers ascend: it lies between two ranges
            _step(_IF_GREATER, last, then=1),
            _step(_RETURN, action),
        ]
    return b"".join([*steps, _step(_RETURN, _refuse(errno.ENOSYS))])


def _when(rule: Rule) -> list[bytes]:
    steps = [_step(_RETURN, rule.action)]
    for where in reversed(rule.where):
        skip = len(steps)
        steps = [
            _step(_LOAD, _ARGS + 8 * where.argument),
            _step(_AND, where.mask),
            _step(_IF_EQUAL, where.value, otherwise=skip),
            *steps,
        ]
    return steps


def _ranges(actions: dict[int, int]) -> Iterable[tuple[int, int, int]]:
    """Neighbouring numbers with one action: `{1: a, 2: a, 4: a}` -> (1, 2, a), (4, 4, a)."""
    first = last = None
    for number in sorted(actions):
        if first is None or last is None or number != last + 1 or actions[number] != actions[first]:
            if first is not None and last is not None:
                yield first, last, actions[first]
            first = number
        last = number
    if first is not None and last is not None:
        yield first, last, actions[first]
