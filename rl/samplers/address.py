"""Where a vLLM server is, and the key it wants: what a recipe's keys know of one. Nothing is opened."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

KEY_OR_TUNNEL = (
    "whoever reaches it could change its weights. Give it a key and name its variable (api_key_variable), or reach it "
    "by an SSH tunnel as http://127.0.0.1:port"
)


@dataclass(slots=True)
class Address:
    """The root of a server, and which environment variable holds its key."""

    url: str  # without a slash at its end
    api_key_variable: str | None

    @property
    def local(self) -> bool:
        host = urlsplit(self.url).hostname or ""
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(host).is_loopback
        return host == "localhost"

    def key(self) -> str:
        """Read anew whenever it is used, and kept nowhere."""
        return read_key(self.api_key_variable)


def read_key(variable: str | None) -> str:
    """The key that an environment variable holds, "" without one. Errors: ValueError for what can be no key."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {variable} holds no key")
    return key


def server_root(url: str) -> str:
    """The server's root: `server_root("http://gpu7:8000/") == "http://gpu7:8000"`.

    Errors: ValueError for what is no such URL; it does not repeat the URL, which may hold a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("the URL of a vLLM server cannot be read; write it as http://host:port") from None
    wrong = "@" in parts.netloc or parts.query or parts.fragment or not url.isprintable() or " " in url
    if parts.scheme not in ("http", "https") or not parts.hostname or wrong:
        raise ValueError("the URL of a vLLM server is http://host:port or https://…, without user, query or blanks")
    if parts.path.rstrip("/").endswith("/v1"):
        raise ValueError("the URL of a vLLM server is its root, without /v1: its weights are loaded from there")
    return url.rstrip("/")
