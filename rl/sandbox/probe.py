"""Is a sandbox one? Programs that try to get out of it, run in it; whatever is reached is reported.

A sandbox that is believed and does not hold is worse than none: a `bwrap` on PATH that is a wrapper without effect, a
container that lets namespaces be made and not be used, a kernel that does not count processes by namespace. So
`rl.sandbox.ladder` takes a rung only after `quick` held, and `reason doctor` shows the whole of `full`.

    [check.name for check in quick(Bubblewrap()) if not check.held]   # []
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.sandbox.attempts import ATTEMPTS
from rl.sandbox.base import Ended, Job, JobResult, Limits, Sandbox, SandboxUnavailable

_LIMITS = Limits(
    wall_seconds=10, cpu_seconds=5, memory_bytes=256 * 2**20, output_bytes=1 << 16, processes=8, file_bytes=1 << 20
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a sandbox has to do.

    Example: `Check("network", False, "reached TCP")`
    """

    name: str
    held: bool
    detail: str


def answers(sandbox: Sandbox) -> list[Check]:
    """Whether it runs programs at all: files, stdin, both outputs and the exit code. Errors: SandboxUnavailable."""
    mark = secrets.token_hex(8)
    program = (
        b"import sys\nfrom helper import MARK\nprint(input() + MARK)\n"
        b"print(sys.argv[1:], file=sys.stderr)\nraise SystemExit(3)\n"
    )
    files = {"main.py": program, "helper.py": f"MARK = {mark!r}".encode()}
    result = sandbox.run(Job(("python", "main.py", "a b"), files, b"say \n", _LIMITS))
    held = (result.ended, result.exit_code, result.stdout.split(), result.stderr.split(b"\n")[0]) == (
        Ended.EXITED, 3, [b"say", mark.encode()], b"['a b']",
    )  # fmt: skip
    return [Check("runs programs", held, "" if held else f"a program that prints and exits with 3 gave {result}")]


def quick(sandbox: Sandbox) -> list[Check]:
    """`answers`, and every attempt of `rl.sandbox.attempts`: two runs, some tenths of a second.

    Errors: SandboxUnavailable.
    """
    with _plant() as (planted, evidence):
        program = Path(__file__).with_name("attempts.py").read_bytes()
        job = Job(("python", "attempts.py"), {"attempts.py": program}, json.dumps(planted).encode(), _LIMITS)
        result = sandbox.run(job)
        seen = evidence()
    try:
        reached: dict[str, str] = json.loads(result.stdout)
    except ValueError:
        raise SandboxUnavailable(f"the escape probe did not come to its end: {_told(result)}") from None
    checks = answers(sandbox)
    for attempt in ATTEMPTS:
        found = reached.get(attempt.__name__, "was not tried")
        checks.append(Check(attempt.__name__.replace("_", " "), not found, found and f"reached {found}"))
    checks.append(Check("nothing seen from outside", not seen, seen))
    return checks


@contextlib.contextmanager
def _plant() -> Iterator[tuple[dict[str, Any], Any]]:
    """Things to be found, and a function that looks whether they were."""
    secret = secrets.token_hex(16)
    victim = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as listener,
        _abstract_listener(secret) as abstract,
    ):
        os.chmod(folder, 0o777)
        (Path(folder) / "secret").write_text(secret)
        (Path(folder) / "secret").chmod(0o644)
        os.environ["REASON_PROBE_SECRET"] = secret

        def evidence() -> str:
            found = [name for name in os.listdir(folder) if name != "secret"]
            found += ["a process was killed"] if victim.poll() is not None else []
            for one in (listener, abstract):
                one.settimeout(0)
                with contextlib.suppress(BlockingIOError):
                    one.accept()[0].close()
                    found.append("a connection")
            return ", ".join(found)

        try:
            yield {
                "secret": secret, "file": f"{folder}/secret", "folder": folder, "port": listener.getsockname()[1],
                "victim": victim.pid, "processes": _LIMITS.processes, "memory": _LIMITS.memory_bytes,
                "file_bytes": _LIMITS.file_bytes,
            }, evidence  # fmt: skip
        finally:
            del os.environ["REASON_PROBE_SECRET"]
            victim.kill()
            victim.communicate()


def _abstract_listener(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen()
    return listener


def full(sandbox: Sandbox) -> list[Check]:
    """`quick`, and what takes longer: limits of time, output, processor and folder, and what is left behind.

    Errors: SandboxUnavailable.
    """
    return [*quick(sandbox), *(check(sandbox) for check in _LONGER)]


def _run(sandbox: Sandbox, program: str, *arguments: str, **limits: Any) -> JobResult:
    chosen = {"wall_seconds": 10.0, "file_bytes": _LIMITS.file_bytes, "output_bytes": _LIMITS.output_bytes} | limits
    return sandbox.run(Job(("python", "main.py", *arguments), {"main.py": program.encode()}, b"", Limits(**chosen)))


def _told(result: JobResult) -> str:
    said = (result.stderr or result.stdout).decode(errors="replace").strip().rpartition("\n")[2][-100:]
    return f"{result.ended} (exit code {result.exit_code}, signal {result.signal}) after {result.seconds:.1f} s {said}"


def _wall(sandbox: Sandbox) -> Check:
    result = _run(sandbox, "import time; time.sleep(60)", wall_seconds=0.5)
    return Check("wall clock", result.ended is Ended.TIMEOUT and result.seconds < 5, _told(result))


def _processor(sandbox: Sandbox) -> Check:
    result = _run(sandbox, "while True: pass", cpu_seconds=1, wall_seconds=20.0)
    return Check("processor time", result.ended is Ended.SIGNALED, _told(result))


def _flood(sandbox: Sandbox) -> Check:
    result = _run(sandbox, "while True: print('x' * 65536)")
    return Check("output", result.ended is Ended.OUTPUT_LIMIT, _told(result))


def _many_files(sandbox: Sandbox) -> Check:
    program = "import os\nfor n in range(20_000):\n    os.close(os.open(str(n), os.O_CREAT | os.O_WRONLY))"
    result = _run(sandbox, program)
    held = result.ended is Ended.EXITED and b"No space left" in result.stderr
    return Check("number of files", held, _told(result))


def _full_folder(sandbox: Sandbox) -> Check:
    """Files that are small enough one by one: the folder is full in time, or the job is ended for it."""
    program = (
        "import time\n"
        "for n in range(40):\n"
        "    with open(str(n), 'wb') as file:\n"
        f"        file.write(bytes({_LIMITS.file_bytes // 4}))\n"
        "    time.sleep(0.01)"
    )
    result = _run(sandbox, program)
    held = result.ended is Ended.SIGNALED or b"No space left" in result.stderr
    return Check("size of the folder", held, _told(result))


def _left_behind(sandbox: Sandbox) -> Check:
    """A child that outlives its parent must not outlive the job."""
    mark = secrets.token_hex(16)
    program = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]])\n"
        "print('started')"
    )
    result = _run(sandbox, program, mark)
    left = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if mark in _command_of(pid)]
    started = result.stdout == b"started\n"
    return Check("nothing left behind", started and not left, f"process {left[0]} is left" if left else _told(result))


_LONGER = (_wall, _processor, _flood, _many_files, _full_folder, _left_behind)


def _command_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text(errors="replace")
    except OSError:
        return ""
