"""A vLLM server over HTTP: its address, one connection to it, and what may go wrong with both.

Standard library alone. A server of ours, on this machine or in our own network: no proxy of the environment is used, no
redirect is followed, and the only limit on an exchange is how long it may be silent. The key is read from an
environment variable when it is used, and stands in no message.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rl.samplers.address import KEY_OR_TUNNEL, Address, server_root
from rl.samplers.base import StaleEngine
from rl.samplers.openai import Patience

Result = TypeVar("Result")

PATIENCE = Patience(timeout=600.0)  # of silence: a long completion says nothing before it ends
CONNECT_SECONDS = 30.0
# What a generation config may add to a request: here, only what the caller names.
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class ServerError(RuntimeError):
    """A vLLM server is gone, refuses, or says what it should not; the message names its URL."""


class Broken(ServerError):
    """The connection failed or the server had no room: worth another try."""


class Missing(ServerError):
    """The server has no such endpoint."""


@dataclass(slots=True)
class Server(Address):
    """A server's address and what it has said of itself."""

    patience: Patience
    model: str = ""
    max_model_len: int = 0
    weight_version: str | None = None  # what it should say; None: it keeps none
    guarded: bool = False  # it has refused an order without a key

    def order(self, path: str, body: Mapping[str, Any] | None = None, method: str = "POST") -> dict[str, Any]:
        """Change something in the server. Asked once: an order that was cut off may have been carried out.

        Errors: ServerError; also for a far server that would take the order from anyone.
        """
        if not self.local and not self.guarded:
            self._require_a_guard()
        with contextlib.closing(Line(self, greet=False)) as line:
            try:
                return line.ask(method, path, body)
            except Missing as error:
                raise Missing(f"{error}: start the server with VLLM_SERVER_DEV_MODE=1") from error

    def try_order(self, path: str) -> None:
        with contextlib.suppress(Missing):
            self.order(path)

    def _require_a_guard(self) -> None:
        with contextlib.closing(Line(self, greet=False)) as line:
            status = line.status("/is_sleeping")
        if status not in (401, 403):
            raise ServerError(
                f"{self.url} answers /is_sleeping without a key (HTTP {status}), so whoever reaches it may change "
                "its weights; vLLM's --api-key covers /v1 alone. Let it listen on 127.0.0.1, and reach it by an SSH "
                "tunnel or a proxy that wants the key for every path"
            )
        self.guarded = True


@dataclass(slots=True)
class Drawn:
    """What a server has drawn for one request; `finish`: vLLM's word for how it ended, "" while it goes on."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""

    def add(self, reply: Any, url: str) -> None:
        """Take in a completion, or a chunk of one."""
        try:
            (choice,) = reply["choices"]
            ids = choice["token_ids"]
            logprobs = choice["logprobs"]["token_logprobs"] if ids else []
            if len(ids) != len(logprobs) or None in logprobs:
                raise ValueError("log-probs are missing")
            finish = choice["finish_reason"] or ""
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"{url}: no completion with token ids and log-probs (vLLM 0.26 to 0.32 gives them): {shown(reply)}"
            ) from error
        self.ids += ids
        self.logprobs += logprobs
        self.finish = finish


class Line:
    """One connection to a server, opened when it is needed and used by one thread; another may cut it.

    It greets: a server that does not say the version of the weights it was given is not drawn from.
    """

    def __init__(self, server: Server, greet: bool = True) -> None:
        self.server, self.greet = server, greet
        self._http: http.client.HTTPConnection | None = None
        self._cut = False

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server replies with; an empty reply is {}."""
        with self._hearing(path):
            return self._object(path, self._send(method, path, body).read())

    def status(self, path: str) -> int:
        """The HTTP status of a GET without a key."""
        with self._hearing(path):
            connected = self._open()
            connected.request("GET", urlsplit(self.server.url).path + path)
            response = connected.getresponse()
            response.read()
            return response.status

    def draw(self, body: Mapping[str, Any], left: Callable[[], int] | None) -> Drawn:
        """Draw one completion; with `left`, the new tokens that it may have from now on."""
        drawn, path = Drawn(), "/v1/completions"
        body = {"model": self.server.model} | dict(body)
        if left is None:
            drawn.add(self.ask("POST", path, body), self.server.url)
            return drawn
        if left() < 1:
            return Drawn(finish="abort")
        with self._hearing(path):
            response = self._send("POST", path, body)
            for line in response:
                if not line.endswith(b"\n"):  # torn, and so the last
                    break
                if not line.startswith(b"data: {"):
                    continue
                drawn.add(self._object(path, line[6:]), self.server.url)
                if drawn.finish:
                    response.read()  # the end of the stream: the connection serves again
                    return drawn
                if len(drawn.ids) >= left():
                    self.close()  # which makes the server drop the request
                    drawn.finish = "abort"
                    return drawn
        self.close()
        raise Broken(f"{self.server.url}: the stream of tokens ended before the completion")

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def cut(self) -> None:
        """End whatever the line is doing, for good."""
        self._cut = True
        connected = None if self._http is None else self._http.sock
        if connected is not None:
            with contextlib.suppress(OSError):  # the other side has closed it meanwhile
                connected.shutdown(socket.SHUT_RDWR)

    def _open(self) -> http.client.HTTPConnection:
        parts, timeout = urlsplit(self.server.url), self.server.patience.timeout
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._http = kind(parts.hostname or "", parts.port, timeout=min(timeout, CONNECT_SECONDS))
        self._http.connect()
        self._http.sock.settimeout(timeout)
        if self._cut:  # between `cut` and here it could not see the socket
            raise ConnectionAbortedError("cut while it was opened")
        return self._http

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        """The reply, if it is HTTP 200, with its body still to be read."""
        if self._http is None:
            self._open()
            if self.greet and self.server.weight_version is not None:
                told = self._object("/weight_info", self._exchange("GET", "/weight_info", None).read())
                if told != {"weight_version": self.server.weight_version}:
                    raise StaleEngine(
                        f"{self.server.url} says {told} where it was given weights of version "
                        f"{self.server.weight_version!r}: it was restarted, or somebody else has changed them"
                    )
        return self._exchange(method, path, body)

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None) -> http.client.HTTPResponse:
        assert self._http is not None
        headers = {"Content-Type": "application/json"}
        if key := self.server.key():
            headers["Authorization"] = f"Bearer {key}"
        prefix = urlsplit(self.server.url).path
        self._http.request(method, prefix + path, None if body is None else json.dumps(body).encode(), headers)
        response = self._http.getresponse()
        if response.status == 200:
            return response
        what = f"{self.server.url}{path}: HTTP {response.status}"
        if response.status in (401, 403):  # what they say may quote the key
            self.close()
            variable = self.server.api_key_variable
            raise ServerError(
                f"{what}: " + (f"the key in {variable} is not the server's" if variable else "name api_key_variable")
            )
        said = shown(response.read())
        self.close()
        if response.status in (404, 405) and not said.startswith('{"error"'):  # vLLM's own 404 is about the model
            raise Missing(what)
        raise (Broken if response.status == 429 or response.status >= 500 else ServerError)(f"{what}: {said}")

    def _object(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(data or b"{}")
        except ValueError as error:
            raise ServerError(f"{self.server.url}{path}: the reply is not JSON: {shown(data)}") from error
        if not isinstance(reply, dict):
            raise ServerError(f"{self.server.url}{path}: the reply is no JSON object: {shown(data)}")
        return reply

    @contextlib.contextmanager
    def _hearing(self, path: str) -> Iterator[None]:
        """Turns what may happen to a connection into our errors; it is closed then."""
        try:
            yield
        except TimeoutError as error:
            self.close()
            raise ServerError(
                f"{self.server.url}{path}: no word in {self.server.patience.timeout:g} s; give it more (patience), or "
                "fewer connections"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            self.close()
            what = str(error) or type(error).__name__
            raise Broken(f"{self.server.url} cannot be reached or broke off: {what}") from error
        except (ServerError, StaleEngine):
            self.close()
            raise


def open_servers(urls: str | Sequence[str], api_key_variable: str | None, patience: Patience) -> list[Server]:
    given = [urls] if isinstance(urls, str) else list(urls)
    servers = [Server(server_root(url), api_key_variable, patience) for url in given]
    if not servers or len({server.url for server in servers}) < len(servers):
        raise ValueError(f"one URL a server and at least one, got {given}")
    for server in servers:
        server.key()  # a missing key is an error of the start, not of the first request
        if not server.local and api_key_variable is None:
            raise ValueError(f"{server.url} is not on this machine: {KEY_OR_TUNNEL}")
    return servers


def again(work: Callable[[], Result], patience: Patience, seed: int = 0, stop: threading.Event | None = None) -> Result:
    """Do it, once more after a connection broke, and as often as `patience` has tries."""
    stop = stop or threading.Event()
    tried = 0
    while True:
        try:
            if stop.is_set():
                raise ServerError("stopped")  # nobody waits for it any more
            return work()
        except Broken as error:
            tried += 1
            if tried >= patience.tries:
                raise ServerError(f"{error} ({tried} tries)") from error
            stop.wait(patience.wait(tried, None, seed))


def shown(said: Any) -> str:
    """The first 200 characters of what a server said, on one line."""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else json.dumps(said)
    return "".join(c if c.isprintable() else " " for c in text[:200]).strip()
