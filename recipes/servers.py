"""Sampling from `vllm serve`: the recipe's `sampling.server` becomes an engine here.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --port 8000 --logprobs-mode processed_logprobs

    sampling: {engine: vllm, server: {url: "http://127.0.0.1:8000"}}        # or: reason sample ... --server URL

The server is started by the user, with any model of the same shape: before anything is drawn it is given the weights
that the stage samples from, and both sides' log-probs are compared (rl/samplers/synced.py). One run at a time: a server
that another run has taken meanwhile is refused (rl/samplers/vllm_server.py).
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rl.policy import PolicyModel
    from rl.samplers.synced import SyncedSampler

MEMORY = Path("/dev/shm")  # files here are memory


@dataclass(frozen=True, slots=True)
class Nccl:
    """Weights go from GPU to GPU; server i joins the trainer at `address`:(`port` + i)."""

    address: str = "127.0.0.1"
    port: int = 29600


@dataclass(frozen=True, slots=True)
class ServerChoice:
    """The servers that draw. Example: `ServerChoice(("http://127.0.0.1:8000",))`; see `recipes.sampling_keys`."""

    urls: tuple[str, ...]
    api_key_variable: str | None = None
    folder: str | None = None
    nccl: Nccl | None = None
    tolerance: float = 5e-2
    connections: int = 128


def serve_line(choice: ServerChoice, url: str, model: str) -> str:
    """The line that starts a server for `url` and `model`.

    Example: for http://127.0.0.1:8000 and org/name: "VLLM_SERVER_DEV_MODE=1 vllm serve org/name --host 127.0.0.1 --port
    8000 --logprobs-mode processed_logprobs".
    """
    parts = urlsplit(url)
    where = str(Path(model).resolve()) if Path(model).is_dir() else model
    words = ["vllm", "serve", where, "--host", parts.hostname or "", "--port", str(parts.port or 8000)]
    words += ["--logprobs-mode", "processed_logprobs"]
    if choice.nccl is not None:
        words += ["--weight-transfer-config", '{"backend": "nccl"}']
    return "VLLM_SERVER_DEV_MODE=1 " + shlex.join(words)


@contextmanager
def open_servers(
    choice: ServerChoice,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    policy: PolicyModel,
    request: Mapping[str, Any],
) -> Iterator[SyncedSampler]:
    """A sampler on the servers with the weights of `policy`, which was loaded from `model`.

    Errors: ServerError for a server that is not there or does not fit, with the line that starts one that does;
    ValueError for a far server without a key; from the first draw on StaleEngine, where the weights did not arrive.
    """
    from rl.samplers.synced import SyncedSampler, policy_scores, policy_weights
    from rl.samplers.vllm_http import ServerError
    from rl.samplers.vllm_server import ServerEngine, file_hand_over, nccl_hand_over

    key = choice.api_key_variable
    with ExitStack() as held:
        if choice.nccl is not None:
            hand_over = nccl_hand_over(choice.urls, choice.nccl.port, address=choice.nccl.address, api_key_variable=key)
        else:
            folder = TemporaryDirectory(prefix="reason-weights-", dir=choice.folder or _memory())
            hand_over = file_hand_over(choice.urls, Path(held.enter_context(folder)), api_key_variable=key)
        try:
            engine = ServerEngine(
                choice.urls, tokenizer, hand_over,
                request=request, api_key_variable=key, connections=choice.connections, spread=choice.tolerance,
            )  # fmt: skip
        except ServerError as error:
            lines = "\n".join(f"    {serve_line(choice, url, model)}" for url in choice.urls)
            raise ServerError(f"{error}\nWhat fits is started with (sampling.server):\n{lines}") from error
        yield SyncedSampler(
            engine, partial(policy_weights, policy), partial(policy_scores, policy), choice.tolerance, foreign=True
        )


def _memory() -> Path | None:
    return MEMORY if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
