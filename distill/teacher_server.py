"""A teacher behind vLLM servers: the log-probs of a student's tokens, asked for over HTTP.

For on-policy distillation (distill/on_policy.py) from a teacher that does not fit beside the student. The servers are
started by the user and hold the teacher; nothing is drawn from them and no weights are handed over:

    vllm serve TEACHER --host 127.0.0.1 --port 8000

(The CPU build has no `vllm serve`: `python -m vllm.entrypoints.openai.api_server --model TEACHER` is the same.)
Token ids go in (`/v1/completions` with `prompt_logprobs`), so both models must have the same tokens; vLLM gives the
log-probs at temperature 1 whatever the request says. A request whose connection breaks is asked again. A server that
serves a model of another name, or says another version of its weights than at the start, is refused.

Line: `reason distill RECIPE`, a stage with `method: on_policy` and `teacher_server: {url: "http://127.0.0.1:8000"}`.
Window: vLLM 0.26 to 0.32; tried with 0.32.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distill.on_policy import Score
from rl.ranks import Ranks
from rl.rows import TrainingRow
from rl.samplers.openai import Patience
from rl.samplers.vllm_http import NEUTRAL, PATIENCE, Line, Missing, Server, ServerError, again, open_servers, shown

HIGHEST = 1e-3  # nats; a log-prob is above 0 by rounding alone


class TeacherServers:
    """The teacher `name` (a hub id or a folder) on one or more servers: a `distill.on_policy.Score`.

    `served_as`: what the servers call it, where that is not its name. At most `connections` requests are under way on
    each server. `api_key_variable`: the name of the environment variable that holds the key.

    Errors: ServerError for a server that is not there or serves another model; ValueError for a URL that is not
    allowed.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        name: str,
        *,
        served_as: str | None = None,
        api_key_variable: str | None = None,
        patience: Patience = PATIENCE,
        connections: int = 32,
    ) -> None:
        if connections < 1:
            raise ValueError(f"a server needs at least 1 connection, got {connections}")
        self.patience, self.connections = patience, connections
        self.servers = open_servers(urls, api_key_variable, patience)
        for server in self.servers:
            _introduce(server, name, served_as)

    def __call__(self, rows: Sequence[TrainingRow]) -> list[tuple[float, ...]]:
        """Log-probs (nats, at temperature 1) of every row's completion tokens, in the order of `rows`.

        Errors: ServerError; StaleEngine for a server that was restarted; ValueError for a row that is longer than the
        server's context.
        """
        count = min(self.connections * len(self.servers), len(rows))
        if not count:
            return []
        stop = threading.Event()

        def work(first: int) -> list[tuple[float, ...]]:
            server = self.servers[first % len(self.servers)]
            with contextlib.closing(Line(server)) as line:
                return [self._score(server, line, row, stop) for row in rows[first::count]]

        found: list[tuple[float, ...]] = [()] * len(rows)
        with ThreadPoolExecutor(count, thread_name_prefix="teacher") as pool:
            parts = [pool.submit(work, first) for first in range(count)]
            try:
                for first, part in enumerate(parts):
                    found[first::count] = part.result()
            finally:
                stop.set()  # after an error the others end with the request that they are at
        return found

    def _score(self, server: Server, line: Line, row: TrainingRow, stop: threading.Event) -> tuple[float, ...]:
        length = len(row.prompt_ids) + row.num_tokens
        if length >= server.max_model_len:  # vLLM draws one token behind it
            raise ValueError(
                f"row {row.name} has {length} tokens and the teacher must draw one more, but {server.url} has a "
                f"--max-model-len of {server.max_model_len}: raise it, or lower max_tokens"
            )
        body = NEUTRAL | {"model": server.model, "prompt": [*row.prompt_ids, *row.token_ids], "max_tokens": 1}
        body |= {"temperature": 1.0, "top_p": 1.0, "prompt_logprobs": 0}
        reply = again(partial(line.ask, "POST", "/v1/completions", body), self.patience, stop=stop)
        try:
            given = reply["choices"][0]["prompt_logprobs"][len(row.prompt_ids) :]
            found = tuple(
                float(scores[str(token)]["logprob"]) for scores, token in zip(given, row.token_ids, strict=True)
            )
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(
                f"{server.url}: its reply holds no prompt_logprobs of the tokens sent: {shown(reply)}"
            ) from error
        if max(found) > HIGHEST:
            raise ServerError(
                f"{server.url}: {max(found):.3g} is no log-prob: start it without --logprobs-mode raw_logits or "
                "processed_logits"
            )
        return found


@dataclass(frozen=True, slots=True)
class SharedScore:
    """A `Score` that rank 0 asks for all ranks; `score` is None on the others. Collective."""

    score: Score | None
    ranks: Ranks

    def __call__(self, rows: Sequence[TrainingRow]) -> list[tuple[float, ...]]:
        """The same on every rank."""
        own = [] if self.score is None else self.score(rows)
        return own if self.ranks.world == 1 else [tuple(values) for values in self.ranks.from_first(own)]


def _introduce(server: Server, name: str, served_as: str | None) -> None:
    """Ask a server for its model, which must be the teacher."""
    with contextlib.closing(Line(server, greet=False)) as line:
        listed = again(partial(line.ask, "GET", "/v1/models"), server.patience)
        try:
            models = [(model["id"], model.get("root"), int(model["max_model_len"])) for model in listed["data"]]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"{server.url}/v1/models names no models with a max_model_len: {shown(listed)}"
            ) from error
        wanted = {served_as} if served_as is not None else {name, _resolved(name)}
        found = [(number, length) for number, root, length in models if wanted & {number, root, _resolved(root)}]
        if not found:
            raise ServerError(
                f"{server.url} serves {', '.join(number for number, _, _ in models)}, not the teacher "
                f"{served_as or name}: start it with the teacher, or name what it is called there "
                "(teacher_server.model)"
            )
        server.model, server.max_model_len = found[0]
        with contextlib.suppress(Missing):
            version = again(partial(line.ask, "GET", "/weight_info"), server.patience).get("weight_version")
            server.weight_version = version


def _resolved(name: object) -> str | None:
    """A folder by its one absolute path, whatever else as it is."""
    return str(Path(name).resolve()) if isinstance(name, str) and Path(name).is_dir() else None
