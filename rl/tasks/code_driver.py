"""What runs inside the sandbox: plays programs on hidden inputs and reports what came out. Standard library only.

The text of this file goes into the sandbox with every job (`rl/tasks/code.py` sends it and reads its report); outside,
only `encode` and `decode` are used. It knows the inputs and never an expected value, so nothing in here has to be
trusted: a program that reads this process's memory finds nothing to copy, and one that forges a report or stops this
process has to name values that it was never told.

stdin, one JSON object: {"programs": [[text, ...], ...], "plays": [...], "seconds": of one test, "output_bytes": of one
test, "pause_seconds", "pause_bytes", "keep_going"}. The texts of a program are run one after the other in one
namespace. A play is a script in a fresh process, {"program": 0, "arguments": ["7"], "stdin": "3 4\\n"}, or a function
that one fresh process calls again and again, {"program": 0, "entry_point": "add", "calls": [[3, 4], ...]}.

stdout, JSON lines: {"ready": true} before any program has run, then {"ended", "code", "out", "error"} for each script
or call, `out` (what it printed, or the encoded value) and `error` (the end of stderr) in base64. The report stops after
the first that is not "done"; told to keep going, after one that took or wrote too much. It pauses when it gets long.
Whoever reads it asks for the rest again, or does not.
"""

from __future__ import annotations

import atexit
import binascii
import gc
import json
import os
import select
import sys
import time

TYPE_CHECKING = False  # as in `typing`, whose import would cost every job a third of its start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

MAX_DEPTH = 100  # of nested containers, both ways
_LONG = 1 << 1000  # JSON readers have trouble with longer whole numbers
_ERROR_TAIL = 600  # bytes of stderr that are kept


def encode(value: Any, depth: int = 0) -> Any:
    """A value of exactly the types None, bool, int, float, str, list, tuple, set, frozenset and dict as JSON values.

    `encode([1, (2.5, "a")]) == [1, {"tuple": [2.5, "a"]}]`, `encode({1: None}) == {"dict": [[1, None]]}`,
    `encode({"b", "a"}) == {"set": ["a", "b"]}`. Of any other type, a subclass too, it is `{"other": ...}`, which is
    equal to nothing. ValueError beyond `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise ValueError("the value is nested too deeply")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_LONG < value < _LONG else {"int": hex(value)}
    if kind is float:
        return value if value - value == 0 else {"float": repr(value)}
    if kind is list:
        return [encode(item, depth + 1) for item in value]
    if kind is tuple:
        return {"tuple": [encode(item, depth + 1) for item in value]}
    if kind is set or kind is frozenset:
        # Its own order is another one in every process, and the address of a pool depends on its problems' tests.
        return {"set": sorted((encode(item, depth + 1) for item in value), key=repr)}
    if kind is dict:
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    return {"other": kind.__name__}


def decode(encoded: Any, depth: int = 0) -> Any:
    """The value that `encode` was given (a frozenset comes back as a set); ValueError for anything else."""
    if depth > MAX_DEPTH:
        raise ValueError("the value is nested too deeply")
    if isinstance(encoded, list):
        return [decode(item, depth + 1) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    if len(encoded) == 1:
        ((kind, inner),) = encoded.items()
        if kind == "int" and isinstance(inner, str):
            return int(inner, 16)
        if kind == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if kind in ("tuple", "set") and isinstance(inner, list):
            items = [decode(item, depth + 1) for item in inner]
            return tuple(items) if kind == "tuple" else set(items)
        if kind == "dict" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
            return {decode(key, depth + 1): decode(item, depth + 1) for key, item in inner}
    raise ValueError(f"not an encoded value: {str(encoded)[:40]}")


class _Child:
    """A process that plays a program: what it is fed, what counts of its output, and the end of the rest."""

    def __init__(self, pid: int, stdin: tuple[int, bytes], out: int, error: int) -> None:
        self.pid, self.status = pid, -1  # the wait status, once it has ended
        (self._stdin, self._unread), self._out, self._error = stdin, out, error
        self.out, self.error, self.closed = bytearray(), b"", False
        os.set_blocking(self._stdin, False)
        os.set_blocking(error, False)
        self._poll = select.poll()
        self._poll.register(self._stdin, select.POLLOUT)
        self._poll.register(out, select.POLLIN)
        self._poll.register(error, select.POLLIN)

    def wait_for(self, enough: Callable[[], bool], deadline: float, limit: int) -> str:
        """Move bytes until there are enough or no more: "", else "timeout" or "output limit"."""
        while not enough() and not self.closed:
            if len(self.out) > limit:
                return "output limit"
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            events = self._poll.poll(1000 * min(left, 0.05))
            for descriptor, _ in events:
                self._move(descriptor)
            if not events and self.ended():  # something that it left behind may hold the pipes open
                self.closed = True
        return "output limit" if len(self.out) > limit and not enough() else ""

    def _move(self, descriptor: int) -> None:
        if descriptor == self._out:
            data = os.read(descriptor, 1 << 16)
            self.out += data
            self.closed = not data
        elif descriptor == self._error:
            data = self._read_error()
        else:
            try:
                self._unread = self._unread[os.write(descriptor, self._unread[: 1 << 16]) :]
            except OSError:  # it has closed its stdin
                self._unread = b""
            data = self._unread
        if not data:
            self._poll.unregister(descriptor)
            if descriptor == self._stdin:
                os.close(descriptor)
                self._stdin = -1

    def _read_error(self) -> bytes:
        try:
            data = os.read(self._error, 1 << 16)
        except BlockingIOError:
            return b""
        self.error = (self.error + data)[-_ERROR_TAIL:]
        return data

    def ended(self) -> bool:
        if self.status < 0:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else -1
        return self.status >= 0

    def finish(self, problem: str, deadline: float) -> str:
        """Wait for its end, kill it after the deadline or for a problem; how it ended, with `status` set."""
        while not problem and not self.ended():
            problem = "timeout" if time.monotonic() > deadline else ""
            time.sleep(0.0005)
        if self.status < 0:
            os.kill(self.pid, 9)
            self.status = os.waitpid(self.pid, 0)[1]
        for _ in range(16):
            if not self._read_error():
                break
        for descriptor in (self._stdin, self._out, self._error):
            if descriptor >= 0:
                os.close(descriptor)
        return problem or ("signaled" if os.WIFSIGNALED(self.status) else "exited")

    def result(self, ended: str, out: bytes) -> dict[str, Any]:
        code = os.waitstatus_to_exitcode(self.status) if self.status >= 0 else 0
        text = [binascii.b2a_base64(data, newline=False).decode() for data in (out, self.error)]
        return {"ended": ended, "code": code, "out": text[0], "error": text[1]}


def _fork(stdin: bytes, is_script: bool) -> _Child | None:
    """A new process, None in the new process itself.

    There, a script's stdout is the pipe that counts. For calls that pipe is descriptor 3, so that what a function
    prints is not taken for what it returns.
    """
    (in_read, in_write), (out_read, out_write), (error_read, error_write) = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(in_read, 0)
        os.dup2(out_write if is_script else error_write, 1)
        os.dup2(error_write, 2)
        os.dup2(out_write, 3)
        os.closerange(3 if is_script else 4, 256)
        return None
    for descriptor in (in_read, out_write, error_write):
        os.close(descriptor)
    return _Child(pid, (in_write, stdin), out_read, error_read)


def _load(program: list[str], name: str) -> dict[str, Any]:
    module = type(sys)(name)
    sys.modules[name] = module
    for text in program:
        exec(compile(text, f"{name}.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102  (in the sandbox)
    return module.__dict__


class NoSuchFunction(Exception):
    """The program does not define what it was asked for."""


def _function(namespace: dict[str, Any], entry_point: str) -> Callable[..., Any]:
    """The function of that name, or the method of a new `Solution` (the form of LeetCode)."""
    if entry_point in namespace:
        return namespace[entry_point]
    if hasattr(namespace.get("Solution"), entry_point):
        return getattr(namespace["Solution"](), entry_point)
    raise NoSuchFunction(entry_point)


def _leave(namespace: dict[str, Any]) -> NoReturn:
    """End this process as an interpreter ends, without the teardown of its modules, which takes longer than most tests:
    threads come to their end, handlers of atexit run, files that nobody has closed are closed."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    _flush(sys.stdout)
    namespace.clear()
    gc.collect()
    _flush(sys.__stdout__)
    os._exit(0)


def _flush(stream: Any) -> None:
    if not getattr(stream, "closed", True):
        stream.flush()


# In the new process, what a program raises goes through the frames below to the end of this file: the interpreter
# prints it and exits with 1, as after any script.


def _script(program: list[str], play: dict[str, Any], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    child = _fork(play["stdin"].encode("utf-8", "surrogateescape"), is_script=True)
    if child is None:
        sys.argv = ["main.py", *play["arguments"]]
        _leave(_load(program, "__main__"))
    deadline = time.monotonic() + request["seconds"]
    problem = child.wait_for(lambda: False, deadline, request["output_bytes"])
    ended = child.finish(problem, deadline)
    yield child.result("done" if ended == "exited" and child.status == 0 else ended, bytes(child.out))


def _calls(program: list[str], play: dict[str, Any], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    child = _fork(b"", is_script=False)
    if child is None:
        namespace = _load(program, "solution")
        for arguments in play["calls"]:
            value = _function(namespace, play["entry_point"])(*[decode(argument) for argument in arguments])
            line = json.dumps(encode(value)).encode() + b"\n"
            while line:
                line = line[os.write(3, line) :]
        os._exit(0)
    for number in range(len(play["calls"])):
        deadline = time.monotonic() + request["seconds"]
        problem = child.wait_for(lambda: b"\n" in child.out, deadline, request["output_bytes"])
        line, newline, rest = bytes(child.out).partition(b"\n")
        problem = "output limit" if len(line) > request["output_bytes"] else problem
        if problem or not newline:
            failure = child.result(child.finish(problem, deadline), b"")
            yield from [failure] * (len(play["calls"]) - number)  # no call after it has been made
            return
        child.out = bytearray(rest)
        yield child.result("done", line)
    child.finish("no more calls", 0)


def _say(value: dict[str, Any]) -> int:
    line = json.dumps(value).encode() + b"\n"
    length = len(line)
    while line:
        line = line[os.write(1, line) :]
    return length


def main() -> None:
    pieces = []
    while piece := os.read(0, 1 << 20):
        pieces.append(piece)
    request = json.loads(b"".join(pieces))
    if os.fork() == 0:  # a sandbox in which this fails is no fault of a program
        os._exit(0)
    os.wait()
    _say({"ready": True})
    gc.freeze()  # what is here now need not be looked at by the processes to come
    pause, said = time.monotonic() + request["pause_seconds"], 0
    for play in request["plays"]:
        program = request["programs"][play["program"]]
        for result in (_calls if "calls" in play else _script)(program, play, request):
            said += _say(result)
            enough = result["ended"] not in (["done", "exited", "signaled"] if request["keep_going"] else ["done"])
            if enough or said > request["pause_bytes"] or time.monotonic() > pause:
                return


if __name__ == "__main__":
    main()
