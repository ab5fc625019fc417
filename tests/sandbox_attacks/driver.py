"""Runs the attacks on one sandbox, beside good jobs, and prints what was seen of them as JSON. Standard library only.

`python driver.py RUNG [ATTACK ...]`, with the repository on PYTHONPATH; RUNG is a key of `RUNGS`. Everything that is
planted lies in a folder of its own and is looked at again when all is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import py_compile
import random
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attacks

from rl.sandbox.base import Job, Limits, Sandbox
from rl.sandbox.bubblewrap import Bubblewrap
from rl.sandbox.landlock import Landlock

RUNGS: dict[str, Callable[[], Sandbox]] = {
    "bubblewrap": Bubblewrap,
    "landlock": Landlock,
    "landlock-1": lambda: Landlock(abi=1),  # as on Linux 5.13
}
AT_ONCE = 4
GOOD_JOBS = 60
LIMITS = {
    "wall_seconds": 15.0, "cpu_seconds": 10, "memory_bytes": 192 * 2**20, "output_bytes": 1 << 16, "processes": 16,
    "file_bytes": 1 << 20,
}  # fmt: skip
SHORT = {"wall_seconds": 0.7}
# Attacks that go on until they are ended.
ENDLESS: dict[str, dict[str, Any]] = {
    "fork_bomb": SHORT, "thread_bomb": SHORT, "sleep": SHORT, "stop_itself": SHORT, "spin_unmoved": SHORT,
    "spin": {"wall_seconds": 10.0, "cpu_seconds": 1}, "flood_stdout": {}, "flood_stderr": {}, "flood_both_and_fork": {},
}  # fmt: skip


@contextlib.contextmanager
def planted_things(token: str) -> Iterator[tuple[dict[str, Any], Callable[[], list[str]]]]:
    """What attacks look for, and a function that says what has happened to it."""
    # In memory where there is such a folder: thousands of files on a busy disk take longer than all the rest.
    folder = Path(tempfile.mkdtemp(prefix="planted-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)
        stack.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = str(folder / "tmp")  # so that what is left there is ours
        (folder / "home").mkdir()
        (folder / "home" / ".netrc").write_text(token)
        (folder / "package").mkdir()
        (folder / "package" / "module.py").write_text(f"# {token}\n")
        (folder / "package" / "module.py").chmod(0o644)
        shutil.copy(attacks.__file__, folder / "package" / "attacks.py")
        py_compile.compile(str(folder / "package" / "attacks.py"))  # once, not in each job
        public = folder / "public"
        public.mkdir()
        for name in ("secret", "writable", "removable", "movable"):
            (public / name).write_text(token)
            (public / name).chmod(0o666)
        listeners = {
            "tcp": socket.create_server(("127.0.0.1", 0)),
            "udp": socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "unix": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "abstract": socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
            "abstract datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        }
        addresses = {
            "udp": ("127.0.0.1", 0), "unix": str(public / "socket"), "abstract": f"\0{token}",
            "abstract datagram": f"\0{token}-datagram",
        }  # fmt: skip
        for name, listener in listeners.items():
            stack.enter_context(listener)
            if name in addresses:
                listener.bind(addresses[name])
            if listener.type == socket.SOCK_STREAM:
                listener.listen(100)
            listener.setblocking(False)
        (public / "socket").chmod(0o777)
        public.chmod(0o777)
        victim = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(900)"])
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        os.environ["REASON_TOKEN"] = token
        os.set_inheritable(os.open(public / "secret", os.O_RDONLY), True)
        before = _state(public) | _state(folder / "package")

        def evidence() -> list[str]:
            after = _state(public) | _state(folder / "package")
            found = [f"{path} was changed" for path in before | after if before.get(path) != after.get(path)]
            found += ["the victim is dead"] if victim.poll() is not None else []
            for name, listener in listeners.items():
                with contextlib.suppress(BlockingIOError):
                    listener.accept() if listener.type == socket.SOCK_STREAM else listener.recv(100)
                    found.append(f"{name} was reached")
            return found + [f"left behind: {name}" for name in os.listdir(folder / "tmp")]

        yield {
            "token": token, "folder": str(public), "secret": str(public / "secret"), "home": str(folder / "home"),
            "writable": str(public / "writable"), "removable": str(public / "removable"),
            "movable": str(public / "movable"), "package_file": str(folder / "package" / "module.py"),
            "tcp": listeners["tcp"].getsockname()[1], "udp": listeners["udp"].getsockname()[1],
            "unix": str(public / "socket"), "victim": victim.pid, "other_job": "/job/other.txt",
            "processes": LIMITS["processes"], "memory": LIMITS["memory_bytes"], "file_bytes": LIMITS["file_bytes"],
        }, evidence  # fmt: skip


def _state(folder: Path) -> dict[str, Any]:
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(path)] = (content, status.st_mode, status.st_uid, status.st_nlink, os.listxattr(path))
        found[str(path)] += () if path.is_dir() else (status.st_mtime_ns,)
    return found


class Sampler:
    """How many processes and threads each attack has, as the machine sees it. An attack's name is in its command."""

    def __init__(self, token: str) -> None:
        self._token, self._stop, self.most = token.encode(), threading.Event(), {}
        self._older = set(os.listdir("/proc"))
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def now(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for pid in set(os.listdir("/proc")) - self._older:
            with contextlib.suppress(OSError):
                words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
                if self._token in words:
                    name = words[words.index(self._token) - 1].decode()
                    found[name] = found.get(name, 0) + len(os.listdir(f"/proc/{pid}/task"))
        return found

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            for name, count in self.now().items():
                self.most[name] = max(count, self.most.get(name, 0))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def left(self) -> dict[str, int]:
        """What is still there after two seconds."""
        deadline = time.monotonic() + 2
        while (found := self.now()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def main(rung: str, chosen: list[str]) -> dict[str, Any]:
    sandbox, token = RUNGS[rung](), secrets.token_hex(16)
    with planted_things(token) as (planted, evidence):
        package = (Path(planted["package_file"]).parent,)
        # Something that an attack could find of another job.
        program = b"import sys; print('ready', flush=True); sys.stdin.read()"
        other = sandbox.start(Job(("python", "main.py"), {"main.py": program, "other.txt": token.encode()}))
        assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == b"ready\n"
        found = list(Path(tempfile.gettempdir()).glob("reason-*/job/other.txt"))
        others = {"other_job": str(found[0])} if found else {}

        def run(name: str, number: int = 0) -> dict[str, Any]:
            limits = Limits(**(LIMITS | {"wall_seconds": 60.0} if name == "good" else LIMITS | ENDLESS.get(name, {})))
            stdin = json.dumps(planted | others | {"number": number}).encode()
            job = Job(("python", "-m", "attacks", name, token), {}, stdin, limits, package)
            result = sandbox.run(job)
            return {
                "name": name, "number": number, "ended": result.ended, "exit_code": result.exit_code,
                "signal": result.signal, "seconds": result.seconds, "wall_seconds": limits.wall_seconds,
                "reached": result.stdout[:500].decode(errors="replace"), "bytes": [
                    len(result.stdout), len(result.stderr)], "stderr": result.stderr[-500:].decode(errors="replace"),
                "token": token.encode() in result.stdout + result.stderr,
            }  # fmt: skip

        calm = [run("good", 0)["seconds"] for _ in range(3)]
        work = [(name, 0) for name in chosen or attacks.ATTACKS]
        work += [("good", number) for number in range(GOOD_JOBS)] if not chosen else []
        random.Random(1).shuffle(work)
        sampler = Sampler(token)
        began = time.monotonic()
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                results = list(pool.map(lambda one: run(*one), work))
        finally:
            sampler.stop()
        seconds = time.monotonic() - began
        still = other.poll() is None
        other.kill()
        for pipe in (other.stdin, other.stdout):
            pipe.close()
        return {
            "sandbox": sandbox.name, "user": os.getuid(), "calm": sorted(calm)[1], "seconds": seconds,
            "attacks": [result for result in results if result["name"] != "good"],
            "good": [result | {"expected": attacks.expected_of(result["number"])}
                     for result in results if result["name"] == "good"],
            "most": sampler.most, "left": sampler.left(), "other_job_lived": still, "evidence": evidence(),
            "endless": sorted(ENDLESS), "processes": LIMITS["processes"], "output_bytes": LIMITS["output_bytes"],
        }  # fmt: skip


def unprotected() -> dict[str, str]:
    """What the harmless attacks reach where nothing holds them."""
    found, token = {}, secrets.token_hex(16)
    with planted_things(token) as (planted, _):
        stdin = json.dumps(planted | {"other_job": planted["secret"]}).encode()
        for name in sorted(attacks.HARMLESS):
            command = [sys.executable, "-m", "attacks", name, token]
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(
                    command, cwd=folder, input=stdin, capture_output=True, close_fds=False, check=False,
                    env=os.environ | {"PYTHONPATH": str(Path(planted["package_file"]).parent)},
                )  # fmt: skip
            found[name] = done.stdout.decode()
    return found


if __name__ == "__main__":
    json.dump(unprotected() if sys.argv[1] == "none" else main(sys.argv[1], sys.argv[2:]), sys.stdout)
