"""The remote rung: a server with SandboxFusion's HTTP API (`POST /run_code`), as many users of code rewards run one.

What a job may reach there is the server's affair; SandboxFusion's own default (`isolation: none`) is no sandbox beyond
the container it runs in. The program gets the job's files, a new environment, and its stdin as bytes; stdout and stderr
come back as text, so bytes that are no UTF-8 are lost, and the process and file limits are the server's.

    RemoteSandbox("http://sandbox:8080").run(Job(("python", "main.py"), {"main.py": b"print(1)"}))
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from rl.sandbox import host
from rl.sandbox.base import Ended, Job, JobResult, SandboxUnavailable

_TRIES = 3  # for a server that does not answer the phone; a request that it took is never sent twice
_FIRST_PAUSE = 0.2  # seconds, doubled each time
_QUEUE_SECONDS = 60.0  # beyond the job's own time: a busy server lets requests wait
_ESCAPED = 6  # bytes of JSON for a byte of output, at most


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


class RemoteSandbox:
    """Errors: ValueError for an address that is no http(s) address, or holds a password: it would be shown."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise ValueError("a remote sandbox is named by an address such as http://host:8080, without a password")
        self._url = url.rstrip("/")
        # No proxy: the server is a neighbour. No redirect: programs go where they were sent.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)

    @property
    def name(self) -> str:
        return f"{self._url} (remote)"

    def run(self, job: Job) -> JobResult:
        host.check(job)
        if job.argv[0] != "python":
            raise ValueError(f"a remote sandbox runs Python programs, not {job.argv[0]!r}")
        if job.packages:
            raise SandboxUnavailable(f"{self.name} does not have the folders {', '.join(map(str, job.packages))}")
        began = time.monotonic()
        most = 2 * _ESCAPED * job.limits.output_bytes + (1 << 16)
        answer = self._post(_request(job), job.limits.wall_seconds + _QUEUE_SECONDS, most)
        seconds = time.monotonic() - began
        if len(answer) > most:
            return JobResult(Ended.OUTPUT_LIMIT, -1, 0, b"", b"", seconds)
        try:
            return _result(json.loads(answer), job.limits.output_bytes, seconds)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SandboxUnavailable(f"{self.name} gave an answer that is none: {answer[:100]!r}") from error

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        raise SandboxUnavailable(f"{self.name} runs programs to their end and keeps none to talk to")

    def _post(self, request: dict[str, Any], seconds: float, most: int) -> bytes:
        """The answer, up to one byte more than `most`."""
        body = json.dumps(request).encode()
        post = urllib.request.Request(
            f"{self._url}/run_code", body, {"Content-Type": "application/json"}, method="POST"
        )
        for attempt in range(_TRIES):
            try:
                with contextlib.closing(self._opener.open(post, timeout=seconds)) as answer:
                    return answer.read(most + 1)
            except urllib.error.HTTPError as error:
                with error:
                    raise SandboxUnavailable(f"{self.name} answered {error.code} {error.reason}") from error
            except urllib.error.URLError as error:
                if not isinstance(error.reason, ConnectionError) or attempt == _TRIES - 1:
                    raise SandboxUnavailable(f"{self.name} cannot be reached: {error.reason}") from error
            except (OSError, http.client.HTTPException) as error:
                raise SandboxUnavailable(f"{self.name} broke off: {error!r}") from error
            time.sleep(_FIRST_PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _request(job: Job) -> dict[str, Any]:
    stdin = next(name for name in map("stdin-{}".format, range(len(job.files) + 1)) if name not in job.files)
    arguments = ", ".join(map(ascii, job.argv[1:]))
    code = (
        "import os, sys\n"
        f"os.dup2(os.open({stdin!r}, os.O_RDONLY), 0)\n"
        f"os.remove({stdin!r})\n"
        "environment = {'PATH': os.environ.get('PATH', ''), 'LANG': 'C.UTF-8', 'PYTHONDONTWRITEBYTECODE': '1'}\n"
        f"os.execve(sys.executable, [sys.executable, {arguments}], environment)\n"
    )
    files = {**job.files, stdin: job.stdin}
    return {
        "language": "python",
        "code": code,
        "files": {name: base64.b64encode(content).decode() for name, content in files.items()},
        "compile_timeout": job.limits.wall_seconds,
        "run_timeout": job.limits.wall_seconds,
        "memory_limit_MB": math.ceil(job.limits.memory_bytes / 2**20),
    }


def _result(answer: Any, output_bytes: int, seconds: float) -> JobResult:
    """What the server's answer says. Errors: TypeError, KeyError, ValueError for an answer that is none."""
    result = answer["run_result"]
    if answer["status"] not in ("Success", "Failed") or result is None or result["status"] == "Error":
        raise SandboxUnavailable(f"the remote sandbox failed: {str(answer.get('message'))[:300]}")
    stdout, stderr = ((result.get(name) or "").encode(errors="surrogatepass") for name in ("stdout", "stderr"))
    outputs = stdout[:output_bytes], stderr[:output_bytes]
    if max(len(stdout), len(stderr)) > output_bytes:
        return JobResult(Ended.OUTPUT_LIMIT, -1, 0, *outputs, seconds)
    if result["status"] == "TimeLimitExceeded":
        return JobResult(Ended.TIMEOUT, -1, 0, *outputs, seconds)
    code = result["return_code"]
    if result["status"] != "Finished" or type(code) is not int:
        raise ValueError(f"{result['status']} with return code {code!r}")
    if code < 0:
        return JobResult(Ended.SIGNALED, -1, -code, *outputs, seconds)
    return JobResult(Ended.EXITED, code, 0, *outputs, seconds)
