"""What a sandbox promises to whoever runs jobs in it; how the ladder chooses one, and refuses what is none."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.sandbox import guard, host, inside, ladder, landlock, launch, probe, seccomp
from rl.sandbox.base import Ended, Job, JobResult, Limits, Sandbox, SandboxUnavailable
from rl.sandbox.bubblewrap import Bubblewrap
from rl.sandbox.landlock import Landlock
from rl.sandbox.remote import RemoteSandbox
from rl.workers import WorkerPool

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[1]
HELLO = Job(("python", "main.py"), {"main.py": b"print(input())"}, stdin=b"hello\n")


def available(make: Callable[[], Sandbox]) -> bool:
    try:
        make()
    except SandboxUnavailable:
        return False
    return True


def rung(make: type[Bubblewrap] | type[Landlock]) -> Any:
    missing = pytest.mark.skipif(not available(make), reason=f"{make.__name__} is not there; the other rung is tested")
    return pytest.param(make, marks=missing, id=make.__name__.lower())


@pytest.fixture(params=[rung(Bubblewrap), rung(Landlock)])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return request.param()


def program(text: str, *arguments: str, **rest: Any) -> Job:
    return Job(("python", "main.py", *arguments), {"main.py": text.encode()}, **rest)


def commands() -> Iterator[tuple[int, str]]:
    """(pid, command line) of all processes."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            yield int(pid), Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def gone(mark: str, seconds: float = 5.0) -> bool:
    """Whether no process has a word in its command line, now or soon."""
    deadline = time.monotonic() + seconds
    while any(mark in command for _, command in commands()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# What a job gets and gives


def test_the_worked_example(sandbox: Sandbox):
    result = sandbox.run(HELLO)
    assert (result.ended, result.exit_code, result.signal) == (Ended.EXITED, 0, 0)
    assert (result.stdout, result.stderr) == (b"hello\n", b"")
    assert 0 < result.seconds < 20


def test_stdout_stderr_and_the_exit_code_come_back(sandbox: Sandbox):
    result = sandbox.run(program("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"))
    assert (result.ended, result.exit_code, result.stdout, result.stderr) == (Ended.EXITED, 7, b"out\n", b"err\n")


def test_bytes_that_are_no_text_pass_unchanged(sandbox: Sandbox):
    blob = bytes(range(256)) * 300
    text = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read() + open('blob', 'rb').read())"
    result = sandbox.run(Job(("python", "main.py"), {"main.py": text.encode(), "blob": blob}, stdin=blob))
    assert result.stdout == 2 * blob


def test_the_scratch_folder_is_new_holds_the_files_and_can_be_written(sandbox: Sandbox):
    text = "import os; print(sorted(os.listdir()), os.environ['HOME'] == os.getcwd()); open('new', 'w').write('x')"
    for _ in range(2):
        result = sandbox.run(Job(("python", "main.py"), {"main.py": text.encode(), "b c": b"", "ä": b"1"}))
        assert result.stdout.decode() == "['b c', 'main.py', 'ä'] True\n"


def test_ordinary_work_with_files_succeeds(sandbox: Sandbox):
    text = (
        "import os, shutil, tempfile\n"
        "with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory() as d:\n"
        "    file.write(b'x')\n"
        "    shutil.copy2('main.py', d)\n"
        "    os.replace(d + '/main.py', d + '/other')\n"
        "    shutil.copytree(d, 'tree')\n"
        "print(os.listdir('tree'))\n"
    )
    assert sandbox.run(program(text)).stdout == b"['other']\n"


def test_the_environment_is_made_new(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = sandbox.run(program("import os; print(*sorted(os.environ))"))
    wanted = {"HOME", "LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PYTHONDONTWRITEBYTECODE", "TMPDIR"}
    assert set(result.stdout.decode().split()) == wanted


def test_python_is_this_one_with_the_standard_library_alone(sandbox: Sandbox):
    text = "import sys, sqlite3, ssl, ctypes, zlib\nprint(sys.version)\nimport pytest"
    result = sandbox.run(program(text))
    assert result.stdout.decode() == f"{sys.version}\n"
    assert b"ModuleNotFoundError: No module named 'pytest'" in result.stderr


def test_packages_are_on_the_path_and_cannot_be_changed(sandbox: Sandbox, tmp_path: Path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "gift.py").write_text("VALUE = 41")
    text = "import gift\nprint(gift.VALUE, gift.__file__)\nopen(gift.__file__, 'a')"
    result = sandbox.run(program(text, packages=(tmp_path / "given",)))
    assert result.stdout.decode() == f"41 {tmp_path}/given/gift.py\n"
    assert b"Error" in result.stderr
    assert (tmp_path / "given" / "gift.py").read_text() == "VALUE = 41"


def test_other_ways_to_call_python(sandbox: Sandbox):
    assert sandbox.run(Job(("python", "-c", "import sys; print(sys.argv)", "a b"))).stdout == b"['-c', 'a b']\n"
    assert sandbox.run(Job(("python", "-m", "base64", "-t"))).exit_code == 0
    child = "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', 'print(5)']))"
    assert sandbox.run(program(child)).stdout == b"b'5\\n'\n"


def test_a_program_need_not_read_its_stdin(sandbox: Sandbox):
    result = sandbox.run(program("print(1)", stdin=bytes(1 << 20)))
    assert (result.ended, result.stdout) == (Ended.EXITED, b"1\n")


# How a job ends


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("import os; os.abort()", signal.SIGABRT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", signal.SIGKILL),
        ("import ctypes; ctypes.string_at(0)", signal.SIGSEGV),
    ],
)
def test_a_signal_is_told_from_an_exit_code(sandbox: Sandbox, text: str, number: int):
    result = sandbox.run(program(text))
    assert (result.ended, result.exit_code, result.signal) == (Ended.SIGNALED, -1, number)
    result = sandbox.run(program(f"import sys; sys.exit({128 + number})"))
    assert (result.ended, result.exit_code, result.signal) == (Ended.EXITED, 128 + number, 0)


def test_wall_time(sandbox: Sandbox):
    result = sandbox.run(program("print('begun', flush=True)\nimport time; time.sleep(60)", limits=Limits(0.5)))
    assert (result.ended, result.exit_code, result.stdout) == (Ended.TIMEOUT, -1, b"begun\n")
    assert result.seconds < 10


def test_memory(sandbox: Sandbox):
    text = "import sys\ntaken = bytearray(int(sys.argv[1]) << 20)\nprint(len(taken) >> 20)"
    limits = Limits(memory_bytes=200 << 20)
    assert sandbox.run(program(text, "50", limits=limits)).stdout == b"50\n"
    result = sandbox.run(program(text, "250", limits=limits))
    assert result.exit_code == 1 and b"MemoryError" in result.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_kept_up_to_its_limit(sandbox: Sandbox, stream: str):
    text = f"import sys\nsys.{stream}.write('x' * int(sys.argv[1]))"
    just = sandbox.run(program(text, "1000", limits=Limits(output_bytes=1000)))
    assert (just.ended, getattr(just, stream)) == (Ended.EXITED, b"x" * 1000)
    more = sandbox.run(program(text, "1001", limits=Limits(output_bytes=1000)))
    assert (more.ended, more.exit_code, getattr(more, stream)) == (Ended.OUTPUT_LIMIT, -1, b"x" * 1000)


def test_a_job_ends_with_its_first_process(sandbox: Sandbox):
    mark = f"mark-{os.urandom(8).hex()}"
    text = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]])\n"
        "print('done')"
    )
    result = sandbox.run(program(text, mark))
    assert (result.ended, result.stdout) == (Ended.EXITED, b"done\n")
    assert result.seconds < 20
    assert gone(mark, seconds=0)


def test_a_burst_of_children_one_after_the_other_is_within_the_limit(sandbox: Sandbox):
    text = (
        "import os\n"
        "for n in range(100):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os._exit(n)\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == n\n"
        "print('all')"
    )
    assert sandbox.run(program(text, limits=Limits(processes=3))).stdout == b"all\n"


def test_a_folder_holds_one_file_of_the_largest_size_beside_what_was_given(sandbox: Sandbox):
    text = (
        "import time\n"
        "for n in range(100):\n"
        "    open(f'big-{n}', 'wb').write(bytes(100_000))\n"
        "    print(n, flush=True)\n"
        "    time.sleep(0.05)"
    )
    files = {"main.py": text.encode()} | {f"small-{n}": b"x" for n in range(500)}
    result = sandbox.run(Job(("python", "main.py"), files, limits=Limits(file_bytes=100_000)))
    assert result.stdout.startswith(b"0\n")
    assert len(result.stdout.split()) < 10
    assert b"No space left" in result.stderr or result.signal == signal.SIGKILL


def test_limits_below_ours_need_no_lifting(sandbox: Sandbox):
    text = (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (3, 3))\n"
        "import sys\nfrom rl.sandbox.base import Job\n"
        f"from {type(sandbox).__module__} import {type(sandbox).__name__} as Rung\n"
        "limit = 'import resource; print(resource.getrlimit(resource.RLIMIT_CPU))'\n"
        "print(Rung().run(Job(('python', '-c', limit))).stdout.decode())"
    )
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}, capture_output=True)
    assert done.stdout == b"(3, 3)\n\n", done.stderr


def test_exactly_as_many_processes_as_allowed(sandbox: Sandbox):
    text = (
        "import os, sys, time\n"
        "try:\n"
        "    for n in range(20):\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(60)\n"
        "except BlockingIOError:\n"
        "    print(n + 1)"
    )
    assert sandbox.run(program(text, limits=Limits(processes=6))).stdout == b"6\n"


# Jobs that cannot be asked for


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (Job(()), "needs a command"),
        (Job(("python", "")), "needs a command"),
        (Job(("python", "a\0b")), "null"),
        (Job(("python",), {"a/b": b""}), "no plain file name"),
        (Job(("python",), {"..": b""}), "no plain file name"),
        (Job(("python",), {"": b""}), "no plain file name"),
        (Job(("python",), {"x" * 256: b""}), "no plain file name"),
        (Job(("python",), {"big": bytes(101)}, limits=Limits(file_bytes=100)), "101 bytes"),
        (Job(("python",), {str(n): b"" for n in range(1000)}), "1000 files"),
        (Job(("python",), limits=Limits(wall_seconds=0)), "some time"),
        (Job(("python",), limits=Limits(processes=0)), "some time, memory and a process"),
        (Job(("python",), limits=Limits(output_bytes=-1)), "negative"),
        (Job(("python",), packages=(Path("relative"),)), "no absolute path"),
        (Job(("python",), packages=(Path("/nowhere/at/all"),)), "no absolute path"),
        (Job(("python",), packages=(Path("/"),)), "no absolute path"),
        (Job(("python",), packages=(Path("/tmp:/usr"),)), "no absolute path"),
        (Job(("no-such-program",)), "No such file"),
        (Job(("./main.py",), {"main.py": b""}), "Permission denied"),
    ],
)
def test_a_job_that_cannot_be_asked_for_is_a_value_error(sandbox: Sandbox, job: Job, why: str):
    with pytest.raises(ValueError, match=why):
        sandbox.run(job)
    with pytest.raises(ValueError, match=why):
        sandbox.start(job)


def test_a_started_job_takes_no_stdin_beforehand(sandbox: Sandbox):
    with pytest.raises(ValueError, match="over the pipe"):
        sandbox.start(HELLO)


# Jobs to talk to

ECHO = "import sys\nfor line in sys.stdin:\n    print(line.upper(), end='', flush=True)"


def close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def say(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    return process.stdout.readline()


def test_a_started_job_answers_until_its_stdin_ends(sandbox: Sandbox):
    process = sandbox.start(program(ECHO))
    assert [say(process, b"one\n"), say(process, b"two\n")] == [b"ONE\n", b"TWO\n"]
    close(process)
    assert process.wait(10) == 0


def test_killing_a_started_job_kills_all_of_it(sandbox: Sandbox):
    mark = f"mark-{os.urandom(8).hex()}"
    text = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', sys.argv[1]])\n"
        "print('up', flush=True)\nsys.stdin.read()"
    )
    process = sandbox.start(program(text, mark))
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert not gone(mark, seconds=0)
    process.kill()
    assert process.wait(10) != 0
    assert gone(mark, seconds=0)
    close(process)


def test_a_started_job_outlives_the_thread_that_started_it(sandbox: Sandbox):
    with ThreadPoolExecutor(1) as pool:
        process = pool.submit(sandbox.start, program(ECHO)).result()
    time.sleep(0.2)  # a signal for the death of that thread would have come by now
    assert say(process, b"still there\n") == b"STILL THERE\n"
    process.kill()
    process.wait(10)
    close(process)


def test_nothing_outlives_the_process_that_runs_the_jobs(sandbox: Sandbox):
    mark = f"mark-{os.urandom(8).hex()}"
    text = (
        "import sys\n"
        "from rl.sandbox.base import Job\n"
        f"from {type(sandbox).__module__} import {type(sandbox).__name__} as Rung\n"
        "sleep = 'import time; print(1, flush=True); time.sleep(60)'\n"
        "started = Rung().start(Job(('python', '-c', sleep, sys.argv[1])))\n"
        "started.stdout.readline()\n"
        "print('up', flush=True)\n"
        "Rung().run(Job(('python', '-c', sleep, sys.argv[1])))"
    )
    command = [sys.executable, "-c", text, mark]
    runner = subprocess.Popen(
        command, env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}, stdout=subprocess.PIPE
    )
    assert runner.stdout is not None and runner.stdout.readline() == b"up\n"
    deadline = time.monotonic() + 20
    while sum(mark in command for _, command in commands()) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)  # the runner, what it started, what it runs
    runner.kill()
    runner.wait()
    runner.stdout.close()
    assert gone(mark)


def test_a_worker_pool_on_a_sandbox(sandbox: Sandbox):
    text = "import time\nfrom rl.worker_main import serve\nserve(lambda n: 2 * n if n else time.sleep(60), seconds=30)"
    job = program(text, packages=(ROOT,))
    pool = WorkerPool(lambda: sandbox.start(job), workers=2, timeout=1.0)
    answers = pool.ask([1, 2, 0, 4])
    pool.close()
    assert [answer.value for answer in answers] == [2, 4, None, 8]
    assert answers[2].failure == "timeout"


def test_eight_threads_at_once(sandbox: Sandbox):
    def run(number: int) -> bytes:
        return sandbox.run(program("import sys; print(int(input()) ** 2)", stdin=b"%d\n" % number)).stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(40))) == [b"%d\n" % number**2 for number in range(40)]


# Sandboxes that are none


class Unprotected:
    """Runs a job as it is: what a sandbox that does not hold would be."""

    name = "unprotected"

    def run(self, job: Job) -> JobResult:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in job.files.items():
                (Path(folder) / name).write_bytes(content)
            command = [sys.executable, *job.argv[1:]]
            done = subprocess.run(command, input=job.stdin, cwd=folder, capture_output=True, check=False)
            return JobResult(Ended.EXITED, done.returncode, 0, done.stdout, done.stderr, 0.1)

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        raise AssertionError("nothing is started by the probe")


def test_the_quick_probe_finds_that_a_sandbox_holds(sandbox: Sandbox):
    checks = probe.quick(sandbox)
    assert [check for check in checks if not check.held] == []
    assert len(checks) == 13
    assert "REASON_PROBE_SECRET" not in os.environ


def test_the_whole_probe_finds_that_a_sandbox_holds(sandbox: Sandbox):
    checks = probe.full(sandbox)
    assert [check for check in checks if not check.held] == []
    assert len({check.name for check in checks}) == len(checks) == 19
    (processor,) = [check.detail for check in checks if check.name == "processor time"]
    assert f"signal {signal.SIGXCPU:d})" in processor


def test_the_quick_probe_finds_a_sandbox_that_is_none():
    broken = {check.name: check.detail for check in probe.quick(Unprotected()) if not check.held}
    always = {"environment", "files", "writing", "network", "processes", "memory", "forks", "big file"}
    assert always <= set(broken)
    assert broken["environment"] == "reached REASON_PROBE_SECRET"
    assert "TCP" in broken["network"] and "kill" in broken["processes"]
    assert "a connection" in broken["nothing seen from outside"]
    assert "a process was killed" in broken["nothing seen from outside"]


def test_a_sandbox_that_answers_wrongly_does_not_answer():
    class Wrong(Unprotected):
        def run(self, job: Job) -> JobResult:
            return JobResult(Ended.EXITED, 0, 0, b"say\n", b"", 0.1)

    (check,) = probe.answers(Wrong())
    assert not check.held and "exits with 3" in check.detail
    with pytest.raises(SandboxUnavailable, match="did not come to its end"):
        probe.quick(Wrong())


def fake(folder: Path, text: str) -> str:
    path = folder / "bwrap"
    path.write_text(f"#!{sys.executable} -S\nimport os, sys, time\n{text}\n")
    path.chmod(0o755)
    return str(path)


RUN_AS_IT_IS = "words = sys.argv[sys.argv.index('--') + 1 :]\nos.execv(words[0], words)"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (RUN_AS_IT_IS.replace("sys.argv.index('--') + 1", "[w.startswith('/') and 'python' in w for w in sys.argv]"
                              ".index(True)"), "did not start|could not be set up"),
        (RUN_AS_IT_IS, "could not be set up|did not start"),
        ("sys.exit('bwrap: No permissions to create new namespace')", "No permissions to create new namespace"),
        ("sys.exit('bwrap: Creating new namespace failed: Resource temporarily unavailable')", "temporarily"),
        ("sys.exit(0)", "exit status 0"),
        ("os.kill(os.getpid(), 9)", "exit status -9"),
        ("os.write(int(sys.argv[-1]), b'failed of itself\\n')", "of itself"),
        ("os.write(int(sys.argv[-1]), b'ready\\n')", "died while its job ran"),
    ],
)  # fmt: skip
def test_a_bwrap_that_does_not_work_gives_no_verdict_and_runs_nothing(tmp_path: Path, text: str, why: str):
    mark = tmp_path / "ran"
    broken = Bubblewrap(fake(tmp_path, text))
    job = program(f"open({str(mark)!r}, 'w')")
    with pytest.raises(SandboxUnavailable, match=why):
        broken.run(job)
    with contextlib.suppress(SandboxUnavailable):  # the one that says "ready" is believed to have started it
        process = broken.start(job)
        process.kill()
        close(process)
    assert not mark.exists()


@pytest.mark.skipif(not available(Bubblewrap), reason="half of bubblewrap needs the whole")
@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ("[*words[:1], '--ro-bind', '/etc', '/etc', *words[1:]]", "files (reached /etc/passwd)"),
        ("[*words[:1], '--ro-bind', '/proc', '/proc', *words[1:]]", "processes (reached /proc/"),
        ("[*words[:1], '--bind', '/tmp', '/tmp', *words[1:]]", "writing (reached /tmp"),
        ("[word for word in words if word not in ('--unshare-pid', '--as-pid-1')]", "no process namespace of its own"),
        ("[{'CAP_SYS_ADMIN': 'CAP_KILL'}.get(word, word) for word in words]", "mount: Operation not permitted"),
    ],
)
def test_a_bwrap_that_does_half_of_its_work_is_refused(tmp_path: Path, changed: str, broken: str):
    real = shutil.which("bwrap")
    text = f"words = sys.argv\nwords = {changed}\nos.execv({real!r}, [{real!r}, *words[1:]])"
    half = ladder.Rung("half", lambda: Bubblewrap(fake(tmp_path, text)), probe.quick, probe.full, lambda: "")
    examined = ladder.examine(half, probe.quick)
    assert examined.sandbox is None
    assert broken in examined.against


def rung_of(make: Callable[[], Sandbox], name: str = "bubblewrap", help: str = "Try harder.") -> ladder.Rung:  # noqa: A002
    return ladder.Rung(name, make, probe.answers, probe.full, lambda: help)


def test_a_bwrap_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "START_SECONDS", 0.3)
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.3)
    hanging = Bubblewrap(fake(tmp_path, "time.sleep(60)"))
    for attempt in (hanging.run, hanging.start):
        with pytest.raises(SandboxUnavailable, match=r"not ready in 0 s|did not start"):
            attempt(program("print(1)"))


def test_a_missing_bwrap_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="no bwrap on PATH"):
        Bubblewrap()
    with pytest.raises(SandboxUnavailable, match="did not start"):
        Bubblewrap(str(tmp_path / "gone")).run(HELLO)


@pytest.mark.skipif(not available(Landlock), reason="Landlock is not there; the other rung is tested")
def test_landlock_needs_a_temporary_folder_that_its_user_can_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only for root does a job run as another user than the one whose folder it is."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if os.geteuid() == 0:
        with pytest.raises(SandboxUnavailable, match="lies where other users may not go"):
            Landlock().run(HELLO)
    else:
        assert Landlock().run(HELLO).stdout == b"hello\n"
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_a_table_of_calls_has_no_local_sandbox():
    with pytest.raises(SandboxUnavailable, match="riscv64"):
        seccomp.namespaced_filter("riscv64")


# The ladder


def unavailable() -> Sandbox:
    raise SandboxUnavailable("it is not there")


def test_the_first_rung_that_holds_is_taken():
    class Other(Unprotected):
        name = "other"

    found = ladder.climb([rung_of(unavailable), rung_of(Unprotected, "one"), rung_of(Other, "two")])
    assert found.name == "unprotected"


def test_a_rung_that_the_probe_gets_through_is_refused_and_the_message_says_all():
    through = ladder.Rung("leaky", Unprotected, probe.quick, probe.full, lambda: "Mend it.")
    with pytest.raises(SandboxUnavailable) as refused:
        ladder.climb([rung_of(unavailable, "first"), through])
    first, second, third = str(refused.value).splitlines()
    assert first == "programs cannot be run here, there is no sandbox that holds:"
    assert second == "  first: it is not there. Try harder."
    assert third.startswith("  leaky: the escape probe got through: environment (reached REASON_PROBE_SECRET), files (")
    assert third.endswith(". Mend it.")


def test_the_sandbox_of_this_process_is_found_once(monkeypatch: pytest.MonkeyPatch):
    made = []

    def make() -> Sandbox:
        made.append(1)
        return Unprotected()

    monkeypatch.setattr(ladder, "_found", None)
    monkeypatch.setattr(ladder, "ladder", lambda: [rung_of(make)])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ladder.find_sandbox(), range(4)))
    assert len(made) == 1 and all(one is found[0] for one in found)


def test_this_machine_has_a_sandbox_that_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ladder.URL_VARIABLE, raising=False)
    monkeypatch.setattr(ladder, "_found", None)
    assert ladder.find_sandbox().run(HELLO).stdout == b"hello\n"


def test_a_failure_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch):
    tried = []

    def make() -> Sandbox:
        tried.append(1)
        raise SandboxUnavailable("it is not there")

    monkeypatch.setattr(ladder, "_found", None)
    monkeypatch.setattr(ladder, "_failed", None)
    monkeypatch.setattr(ladder, "ladder", lambda: [rung_of(make)])
    for _ in range(3):
        with pytest.raises(SandboxUnavailable, match="it is not there"):
            ladder.find_sandbox()
    assert len(tried) == 1
    monkeypatch.setattr(ladder, "_RETRY_SECONDS", 0.0)
    with pytest.raises(SandboxUnavailable):
        ladder.find_sandbox()
    assert len(tried) == 2


def test_the_ladder_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ladder.URL_VARIABLE, raising=False)
    assert [one.name for one in ladder.ladder()] == ["bubblewrap", "landlock"]
    assert all(one.help() for one in ladder.ladder())
    monkeypatch.setenv(ladder.URL_VARIABLE, "http://127.0.0.1:9")
    assert [one.name for one in ladder.ladder()] == ["remote", "bubblewrap", "landlock"]


def test_help_names_the_package_where_bwrap_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(ladder.URL_VARIABLE, raising=False)
    examined = ladder.examine(ladder.ladder()[0], probe.quick)
    assert examined.against == "there is no bwrap on PATH"
    assert "apt-get install bubblewrap" in examined.help


# The remote rung


class Server:
    """A stand-in for SandboxFusion: it runs the code that it gets, or answers what it is told to."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes]] = self.really
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/run_code"
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                status, body = outer.answer(request)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:1/run_code")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @staticmethod
    def really(request: dict[str, Any]) -> tuple[int, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in request["files"].items():
                (Path(folder) / name).write_bytes(base64.b64decode(content))
            (Path(folder) / "tmpcode.py").write_text(request["code"])
            command = [sys.executable, "tmpcode.py"]
            try:
                done = subprocess.run(
                    command, cwd=folder, capture_output=True, timeout=request["run_timeout"], check=False
                )
            except subprocess.TimeoutExpired:
                return 200, ran("TimeLimitExceeded", None)
        return 200, ran("Finished", done.returncode, done.stdout.decode(), done.stderr.decode())


def ran(status: str, code: int | None, stdout: str = "", stderr: str = "") -> bytes:
    result = {"status": status, "return_code": code, "stdout": stdout, "stderr": stderr, "execution_time": 0.1}
    overall = "SandboxError" if status == "Error" else "Success" if code == 0 else "Failed"
    return json.dumps({"status": overall, "message": stderr, "compile_result": None, "run_result": result}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def test_a_remote_sandbox_runs_the_job_as_it_is(server: Server):
    remote = RemoteSandbox(server.url + "/")
    assert remote.name == f"{server.url} (remote)"
    assert all(check.held for check in probe.answers(remote))
    text = "import os, sys; print(sys.argv[1:], sys.stdin.buffer.read(), sorted(os.listdir()), sorted(os.environ))"
    job = Job(("python", "main.py", "it's"), {"main.py": text.encode(), "data": b"\xff"}, stdin=b"\xff\0\n")
    result = remote.run(job)
    arguments, rest = result.stdout.decode().split("] ", 1)
    assert arguments == '["it\'s"'
    assert rest.startswith(r"b'\xff\x00\n' ['data', 'main.py', 'tmpcode.py'] ")
    assert "HOME" not in rest
    request = server.requests[-1]
    assert (request["language"], request["run_timeout"], request["memory_limit_MB"]) == ("python", 10.0, 512)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (ran("Finished", 0, "x"), JobResult(Ended.EXITED, 0, 0, b"x", b"", 0)),
        (ran("Finished", 3, "x", "y"), JobResult(Ended.EXITED, 3, 0, b"x", b"y", 0)),
        (ran("Finished", -9), JobResult(Ended.SIGNALED, -1, 9, b"", b"", 0)),
        (ran("TimeLimitExceeded", None, "x"), JobResult(Ended.TIMEOUT, -1, 0, b"x", b"", 0)),
        (ran("Finished", 0, "x" * 101), JobResult(Ended.OUTPUT_LIMIT, -1, 0, b"x" * 100, b"", 0)),
        (ran("Finished", 0, "", "x" * 101), JobResult(Ended.OUTPUT_LIMIT, -1, 0, b"", b"x" * 100, 0)),
        (ran("Finished", 0, "x" * 100_000), JobResult(Ended.OUTPUT_LIMIT, -1, 0, b"", b"", 0)),
    ],
)
def test_what_a_remote_answer_means(server: Server, answer: bytes, result: JobResult):
    server.answer = lambda request: (200, answer)
    found = RemoteSandbox(server.url).run(program("", limits=Limits(output_bytes=100)))
    assert (found.ended, found.exit_code, found.signal, found.stdout, found.stderr) == (
        result.ended, result.exit_code, result.signal, result.stdout, result.stderr,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, ran("Error", None, "", "no container"), "no container"),
        (200, b"<html>", "an answer that is none"),
        (200, b"[]", "an answer that is none"),
        (200, b"{}", "an answer that is none"),
        (200, b'{"status": "Success", "run_result": null}', "failed"),
        (200, ran("Finished", None), "an answer that is none"),
        (200, ran("Odd", 0), "an answer that is none"),
        (200, b"[" * 5_000, "an answer that is none"),
        (500, b"", "answered 500"),
        (422, b"", "answered 422"),
        (302, b"", "answered 302"),
    ],
)
def test_a_remote_failure_is_no_verdict(server: Server, status: int, body: bytes, why: str):
    server.answer = lambda request: (status, body)
    with pytest.raises(SandboxUnavailable, match=why):
        RemoteSandbox(server.url).run(HELLO)
    assert len(server.requests) == 1  # a request that was taken is never sent twice


def test_a_dead_server_is_tried_again_and_then_unavailable(server: Server, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr("rl.sandbox.remote.time.sleep", pauses.append)
    server.close()
    with pytest.raises(SandboxUnavailable, match="cannot be reached"):
        RemoteSandbox(server.url).run(HELLO)
    assert pauses == [0.2, 0.4]


def test_a_server_that_says_nothing_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rl.sandbox.remote._QUEUE_SECONDS", 0.0)
    silent = threading.Event()
    server.answer = lambda request: (200 + silent.wait(10), b"")
    with pytest.raises(SandboxUnavailable, match="timed out|broke off"):
        RemoteSandbox(server.url).run(program("", limits=Limits(wall_seconds=0.2)))
    silent.set()


def test_what_a_remote_sandbox_cannot_do(server: Server, tmp_path: Path):
    remote = RemoteSandbox(server.url)
    with pytest.raises(SandboxUnavailable, match="keeps none to talk to"):
        remote.start(program(ECHO))
    with pytest.raises(SandboxUnavailable, match="does not have the folders"):
        remote.run(program("", packages=(tmp_path,)))
    with pytest.raises(ValueError, match="runs Python"):
        remote.run(Job(("ls",)))
    for url in ("sandbox:8080", "ftp://host", "http://", "http://user:password@host"):
        with pytest.raises(ValueError, match="without a password"):
            RemoteSandbox(url)


def test_a_named_server_comes_first_and_its_absence_is_told(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ladder.URL_VARIABLE, server.url)
    rungs = ladder.ladder()
    assert ladder.climb(rungs).name == f"{server.url} (remote)"
    server.answer = lambda request: (503, b"")
    with pytest.warns(RuntimeWarning, match="answered 503 .*; using unprotected instead"):
        assert ladder.climb([rungs[0], rung_of(Unprotected)]).name == "unprotected"


# The parts


def decide(program: bytes, number: int, *arguments: int, architecture: int = 0xC000003E) -> int:
    """What the kernel would answer, by an interpreter of the few instructions that are used."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *[a & (2**64 - 1) for a in (*arguments, *[0] * 6)][:6])
    steps = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, then, otherwise, value = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}[code]
            at += then if holds else otherwise


ALLOWED, WATCHED, KILLED, ABSENT, PERM = 0x7FFF0000, 0x7FC00000, 0x80000000, 0x50000 | 38, 0x50000 | 1


@pytest.mark.parametrize(
    ("number", "arguments", "namespaced", "guarded"),
    [
        (0, (), ALLOWED, ALLOWED),  # read
        (59, (), ALLOWED, ALLOWED),  # execve
        (257, (0, 0, 0o2), ALLOWED, ALLOWED),  # openat to read and write
        (257, (0, 0, 0o102), ALLOWED, WATCHED),  # O_CREAT
        (257, (0, 0, 0o20200002), ALLOWED, 0x50000 | 95),  # O_TMPFILE
        (257, (0, 0, 0o1000), ALLOWED, 0x50000 | 13),  # O_RDONLY | O_TRUNC
        (257, (0, 0, 0o1002), ALLOWED, ALLOWED),  # O_RDWR | O_TRUNC
        (56, (17,), ALLOWED, WATCHED),  # clone, as fork does
        (56, (0x10000000 | 17,), PERM, PERM),  # CLONE_NEWUSER
        (57, (), ALLOWED, WATCHED),  # fork
        (435, (), ABSENT, ABSENT),  # clone3
        (62, (1, 9), ALLOWED, WATCHED),  # kill
        (112, (), ALLOWED, PERM),  # setsid
        (76, (), ALLOWED, PERM),  # truncate
        (90, (), ALLOWED, 0x50000),  # chmod
        (16, (0, 0x5401), ALLOWED, ALLOWED),  # TCGETS
        (16, (0, 0x5412), 0x50000 | 25, 0x50000 | 25),  # TIOCSTI
        (16, (0, 0x100005412), 0x50000 | 25, 0x50000 | 25),  # the kernel reads the lower half
        (72, (3, 2), ALLOWED, ALLOWED),  # F_SETFD
        (72, (3, 8), PERM, PERM),  # F_SETOWN
        (302, (0,), ALLOWED, ALLOWED),  # prlimit64 of its own
        (302, (1,), PERM, PERM),
        (53, (1, 1), ALLOWED, ALLOWED),  # socketpair, AF_UNIX, SOCK_STREAM
        (53, (1, 0x80001), ALLOWED, ALLOWED),  # SOCK_CLOEXEC too
        (53, (1, 2), PERM, PERM),  # SOCK_DGRAM
        (157, (4, 0), PERM, PERM),  # PR_SET_DUMPABLE
        (157, (15, 0), ALLOWED, ALLOWED),  # PR_SET_NAME
        *((n, (), ABSENT, ABSENT) for n in (41, 42, 49, 101, 165, 272, 298, 310, 321, 323, 250, 319, 425, 304, 434)),
        (9999, (), ABSENT, ABSENT),
        (0x40000000, (), ABSENT, ABSENT),  # x32
        (0xFFFFFFFF, (), ABSENT, ABSENT),
    ],
)
def test_what_the_filters_decide(number: int, arguments: tuple[int, ...], namespaced: int, guarded: int):
    assert decide(seccomp.namespaced_filter("x86_64"), number, *arguments) == namespaced
    assert decide(seccomp.guarded_filter("x86_64"), number, *arguments) == guarded


def test_the_filters_of_the_other_architecture():
    arm = 0xC00000B7
    for make in (seccomp.namespaced_filter, seccomp.guarded_filter):
        assert decide(make("aarch64"), 63, architecture=arm) == ALLOWED  # read
        assert decide(make("aarch64"), 198, 1, 1, architecture=arm) == ABSENT  # socket
        assert decide(make("aarch64"), 0, architecture=0xC000003E) == KILLED
        assert decide(make("x86_64"), 0, architecture=arm) == KILLED
        assert decide(make("x86_64"), 20, architecture=0x40000003) == KILLED  # i386


@given(st.integers(0, 2**32 - 1))
def test_a_guarded_job_may_do_nothing_that_a_namespaced_one_may_not(number: int):
    number %= 520  # all that there are, and some more
    namespaced = decide(seccomp.namespaced_filter("x86_64"), number)
    if decide(seccomp.guarded_filter("x86_64"), number) in (ALLOWED, WATCHED):
        assert namespaced == ALLOWED


values = st.recursive(
    st.integers(-(2**70), 2**70) | st.binary(max_size=20), lambda inner: st.lists(inner, max_size=4), max_leaves=10
)


@given(values)
def test_what_is_packed_is_unpacked(value: Any):
    assert inside.unpack(inside.pack(value)) == value


def test_the_packed_example():
    assert inside.pack([b"ab", 7]) == b"l2:abi7ee"


def test_a_folder_of_any_depth_and_mode_is_removed(tmp_path: Path):
    folder = tmp_path / "scratch"
    (folder / "closed" / "inner").mkdir(parents=True)
    (folder / "closed" / "inner" / "file").write_text("x")
    (folder / "link").symlink_to(tmp_path)
    (folder / "closed" / "inner").chmod(0)
    (folder / "closed").chmod(0)
    start = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(300):
            os.mkdir("d" * 50)
            os.chdir("d" * 50)
    finally:
        os.chdir(start)
    guard.remove(os.fsencode(folder))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_others_may_not_enter_are_found(tmp_path: Path):
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    before = landlock.closed_above(home / "inner" / "python")  # pytest's own folders are closed
    home.chmod(0o700)
    assert landlock.closed_above(home / "inner" / "python") == (before or home)
    assert landlock.closed_above(Path("/usr/bin/env")) is None


def test_an_unused_user_is_nobody_and_another_one_each_time(monkeypatch: pytest.MonkeyPatch):
    users = [host.unused_user() for _ in range(100)]
    assert len(set(users)) == 100
    assert all(user >= 60_000 for user in users)
    for table, users in (("0 0 65536\n", range(64036, 65036)), ("0 100000 5000\n", range(3500, 4500))):
        monkeypatch.setattr(Path, "read_text", lambda self, table=table: table)
        assert all(host.unused_user() in users for _ in range(50))
    monkeypatch.setattr(Path, "read_text", lambda self: "0 1000 1\n")
    with pytest.raises(SandboxUnavailable, match="no user to spare"):
        host.unused_user()
