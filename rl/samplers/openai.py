"""A chat (rl/samplers/chat.py) over an endpoint in OpenAI's form:

    chat = OpenAIChat("http://localhost:8000/v1", "Qwen/Qwen3-32B", max_tokens=2048)
    chat([ChatRequest("2+2=?", seed=1)])   # [Answer(value="4", failure=None, ...)]

`OpenAIChat` posts to `{base_url}/chat/completions`, as vLLM, SGLang, llama.cpp and the hosted services serve it, with
the standard library alone. Everything about the other side is bounded: the time of an exchange (also where bytes drip
in one by one), the size of a reply, the number of tries, what a Retry-After may ask for. No redirect is followed, since
it would carry the key to another place. The key is read from an environment variable when a request is made and stands
in no message, name or field. Proxies are those of the environment (HTTPS_PROXY, NO_PROXY), none for this machine.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

from rl.samplers.address import read_key
from rl.samplers.base import sample_seed
from rl.samplers.chat import ChatRequest
from rl.types import JudgeFailure
from rl.workers import Answer

if TYPE_CHECKING:
    pass

Watch = Callable[[socket.socket], None]

MAX_BODY = 4 << 20  # bytes; a longer reply is no reply
ENDED = ("stop", "eos_token")  # the finish reasons of a reply that the model itself ended


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a request may take: `tries` exchanges of at most `timeout` seconds each, with waits between them that
    double from `first_wait` up to `longest_wait`. A Retry-After is kept, but never beyond `longest_wait`.

    An exchange is tried again after HTTP 429 or 5xx and after a connection that broke, not after a timeout: the default
    gives a request up after 120 s of silence, or after 4 refusals and 1 + 2 + 4 s of waiting.
    """

    timeout: float = 120.0
    tries: int = 4
    first_wait: float = 1.0
    longest_wait: float = 30.0

    def __post_init__(self) -> None:
        if self.timeout <= 0 or self.tries < 1 or not 0 <= self.first_wait <= self.longest_wait:
            raise ValueError(f"timeout and waits must be positive and there must be at least one try: {self}")

    def wait(self, tried: int, retry_after: float | None, seed: int) -> float:
        """Seconds to wait after `tried` tries. The seed spreads those who were refused together over a half of it.

        Example: first_wait 1, longest_wait 30, tried 3: between 2 and 4 s; with a Retry-After of 60 always 30 s.
        """
        if retry_after is not None:
            return min(retry_after, self.longest_wait)
        spread = 0.5 + 0.5 * (sample_seed(seed, "wait", tried) / 2**64)
        return min(self.first_wait * 2 ** (tried - 1), self.longest_wait) * spread


class OpenAIChat:
    """A `Chat` over an endpoint, `workers` requests at a time."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        max_tokens: int = 2048,
        temperature: float = 0.0,
        api_key_variable: str | None = None,
        workers: int = 16,
        patience: Patience = Patience(),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """`base_url`: "http://localhost:8000/v1" (without a path, /v1 is meant). `api_key_variable`: the name of the
        environment variable that holds the key. `extra`: more fields of the request; None as a value takes one out.

        Errors: ValueError for a URL that is none or holds a password, and for a variable that is not set.
        """
        if workers < 1:
            raise ValueError(f"an endpoint needs at least 1 worker, got {workers}")
        self.url, self.workers, self.patience = _checked(base_url), workers, patience
        self.api_key_variable = api_key_variable
        read_key(api_key_variable)  # a missing key is an error of the recipe, not of the first request an hour later
        settings = {"temperature": temperature, "max_tokens": max_tokens} | dict(extra or {})
        self.name = f"{model} {json.dumps(settings, sort_keys=True)}"
        self._fields = {"model": model} | settings

    def __call__(self, requests: Sequence[ChatRequest]) -> list[Answer]:
        """One answer a request, in order. Where 8 requests in a row (or as many as there are workers, if those are
        more) have failed for good, the endpoint is taken to be down and the rest of this call fails at once, so that a
        dead endpoint costs the patience of a few requests and not that of all."""
        health = _Health(max(self.workers, 8))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="chat")
        try:
            return list(pool.map(partial(self._answer, health), requests))
        finally:
            health.stop.set()  # on Ctrl-C nobody tries again
            pool.shutdown(wait=False, cancel_futures=True)

    def _answer(self, health: _Health, request: ChatRequest) -> Answer:
        started = time.perf_counter()
        if health.given_up:
            return Answer(None, JudgeFailure.INFRASTRUCTURE, f"not asked: {health.given_up}", 0.0)
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": request.text}],
            "seed": request.seed % 2**31,  # servers read 32 bits, some of them signed
        }
        body = {name: value for name, value in (body | self._fields).items() if value is not None}
        tried, outcome = 0, _Outcome(reason="stopped", failure=JudgeFailure.INFRASTRUCTURE)
        while tried < self.patience.tries:
            if tried and health.stop.wait(self.patience.wait(tried, outcome.retry_after, request.seed)):
                break
            outcome = self._exchange(json.dumps(body).encode())
            tried += 1
            if not outcome.again:
                break
        reason = outcome.reason if tried < 2 or not outcome.reason else f"{outcome.reason} ({tried} tries)"
        health.count(outcome.failure, reason)
        return Answer(outcome.text, outcome.failure, reason, time.perf_counter() - started)

    def _exchange(self, body: bytes) -> _Outcome:
        """Ask once."""
        key = read_key(self.api_key_variable)
        headers = {"Content-Type": "application/json", "User-Agent": "reason"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.url, body, headers, method="POST")
        deadline = _Deadline(self.patience.timeout)
        late = f"the endpoint was not done in {self.patience.timeout:g} s"
        try:
            with deadline, _opener(self.url, deadline.watch).open(request, timeout=self.patience.timeout) as response:
                status, sent = response.status, response.headers
                data = _read(response)
        except (OSError, http.client.HTTPException) as error:
            if deadline.passed or _timed_out(error):
                return _Outcome(reason=late, failure=JudgeFailure.TIMEOUT)
            what = getattr(error, "reason", None) or str(error) or type(error).__name__
            reason = f"the endpoint cannot be reached or broke off: {_plain(str(what), key)}"
            return _Outcome(reason=reason, failure=JudgeFailure.INFRASTRUCTURE, again=True)
        if deadline.passed:  # the connection was cut, and what had come by then looked whole
            return _Outcome(reason=late, failure=JudgeFailure.TIMEOUT)
        if status == 200:
            return _reply(data)
        return _refusal(status, sent, data, key)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one exchange gave, and whether another may give more."""

    text: str | None = None
    reason: str = ""
    failure: JudgeFailure | None = None
    again: bool = False
    retry_after: float | None = None


class _Health:
    """What the requests of one call know of each other."""

    def __init__(self, limit: int) -> None:
        self.stop = threading.Event()
        self.given_up = ""
        self._limit, self._in_a_row = limit, 0
        self._lock = threading.Lock()

    def count(self, failure: JudgeFailure | None, reason: str) -> None:
        down = failure in (JudgeFailure.INFRASTRUCTURE, JudgeFailure.TIMEOUT)
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if down else 0
            if self._in_a_row >= self._limit:
                self.given_up = f"{self._in_a_row} requests in a row failed, the last: {reason}"


def _checked(base_url: str) -> str:
    """The address to post to. Its errors name the fault and not the URL, which may hold a password."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
        (parts.hostname or "").encode("idna")
    except ValueError:
        raise ValueError("the base URL of an endpoint cannot be read; write it as http://host:port/v1") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the base URL of an endpoint must begin with http:// or https:// and name a host")
    if "@" in parts.netloc:
        raise ValueError("the base URL of an endpoint must hold no user or password; name a variable for the key")
    if parts.query or parts.fragment or not base_url.isprintable() or " " in base_url:
        raise ValueError("the base URL of an endpoint must end with its path: no query, no fragment, no blanks")
    path = parts.path.rstrip("/") or "/v1"
    if path.endswith("/chat/completions"):
        raise ValueError("the base URL of an endpoint must end before /chat/completions, as in http://host:port/v1")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}/chat/completions"


def _reply(data: bytes | None) -> _Outcome:
    """The text of a chat completion."""
    if data is None:
        return _Outcome(reason=f"a reply of more than {MAX_BODY >> 20} MiB", failure=JudgeFailure.CRASH)
    try:
        choice = json.loads(data)["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return _Outcome(reason="the endpoint's reply is no chat completion", failure=JudgeFailure.CRASH)
    if finish not in ENDED or not isinstance(text, str):
        reason = f"the reply has no end or no text (finish reason {_plain(str(finish), '')})"
        return _Outcome(reason=reason, failure=JudgeFailure.CRASH)
    return _Outcome(text=text)


def _refusal(status: int, headers: Mapping[str, str], data: bytes | None, key: str) -> _Outcome:
    """What an answer other than HTTP 200 means."""
    again = status == 429 or status >= 500
    reason = f"the endpoint said HTTP {status}"
    if 300 <= status < 400:
        reason += f", a redirect to {_plain(headers.get('Location', ''), key)}; none is followed"
    elif data and status not in (401, 403):  # those may quote the key in part
        reason += f": {_plain(data.decode('utf-8', 'replace'), key)}"
    wait = _seconds(headers.get("Retry-After")) if again else None
    return _Outcome(reason=reason, failure=JudgeFailure.INFRASTRUCTURE, again=again, retry_after=wait)


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, in seconds or as a date, as seconds from now; None if it is neither."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            when = parsedate_to_datetime(retry_after)
        except ValueError:
            return None
        seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _plain(text: str, key: str) -> str:
    """The first 200 characters of what the other side said, on one line and without the key."""
    text = text.replace(key, "[key]") if key else text
    return "".join(c if c.isprintable() else " " for c in text[:200]).strip()


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)


def _read(response: http.client.HTTPResponse) -> bytes | None:
    """The body, None if it is longer than `MAX_BODY`.

    Errors: IncompleteRead for a body that ends before its length.
    """
    data = bytearray()
    while chunk := response.read1(1 << 16):
        data += chunk
        if len(data) > MAX_BODY:
            return None
    if response.length:
        raise http.client.IncompleteRead(bytes(data[:100]), response.length)
    return bytes(data)


class _Deadline:
    """Cuts a connection when its time is over, whatever the other side is doing.

    A socket's own timeout is a limit on silence: a server that sends a byte now and then would never meet it.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        with self._lock:
            self._socket = connected
        if self.passed:
            self._cut()

    def _cut(self) -> None:
        with self._lock:
            self.passed = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # the other side has closed it meanwhile
                    self._socket.shutdown(socket.SHUT_RDWR)


def _opener(url: str, watch: Watch) -> OpenerDirector:
    """What opens a connection that `watch` is told of: no cookies, no redirects, and every status is returned."""
    opener = OpenerDirector()
    here = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    opener.add_handler(ProxyHandler({} if here else None))
    opener.add_handler(_Handler(watch))
    return opener


class _Handler(HTTPHandler, HTTPSHandler):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, self._watch), req)  # pyright: ignore[reportArgumentType]

    def https_open(self, req: Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_TlsConnection, self._watch), req)  # pyright: ignore[reportArgumentType]


class _Connection(http.client.HTTPConnection):
    def __init__(self, watch: Watch, host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._watch = watch

    def connect(self) -> None:
        super().connect()
        self._watch(self.sock)


class _TlsConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS: in the order of its bases, `super()` above is `HTTPSConnection`."""
