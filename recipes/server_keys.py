"""The keys that name vLLM servers: those that sample, and those that score for a teacher."""

from __future__ import annotations

from collections.abc import Iterator

from recipes.keys import Keys
from rl.samplers.address import KEY_OR_TUNNEL, Address, server_root


class AddressKeys(Keys):
    """One server or several, all with the same key."""

    url: str | list[str]
    """The address of the server, such as http://127.0.0.1:8000, or a list of several."""
    api_key_variable: str | None = None
    """The environment variable that holds the key; wanted for a server that is not on this machine."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Their roots. Errors: ValueError for what is no URL of a server."""
        return tuple(server_root(url) for url in ([self.url] if isinstance(self.url, str) else self.url))

    def far(self) -> list[str]:
        """Those that are not on this machine; none where one cannot be read, which is said already."""
        try:
            return [url for url in self.urls if not Address(url, self.api_key_variable).local]
        except ValueError:
            return []

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        try:
            if not self.urls or len(set(self.urls)) < len(self.urls):
                yield "url", "name at least one server, and each once"
        except ValueError as error:
            yield "url", str(error)
        if self.api_key_variable is None:
            for url in self.far():
                yield "api_key_variable", f"{url} is not on this machine: {KEY_OR_TUNNEL}"
