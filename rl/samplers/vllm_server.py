"""Sampling from `vllm serve`: one or more servers that hold the policy, spoken to over HTTP.

    CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --port 8000 \\
        --logprobs-mode processed_logprobs

    url = "http://127.0.0.1:8000"
    engine = ServerEngine(url, tokenizer, file_hand_over(url, Path("/dev/shm/policy")))
    sampler = SyncedSampler(engine, weights, scores, tolerance=5e-2)

(The CPU build has no `vllm serve`: `python -m vllm.entrypoints.openai.api_server --model MODEL` is the same.)
In a recipe it is `sampling: {engine: vllm, server: {url: "http://127.0.0.1:8000"}}`, see recipes/servers.py.

For an engine on other GPUs or another machine than the trainer's; one that shares the trainer's process is
`rl.samplers.vllm`, which needs no transfer at all. Token ids go in and come out (`/v1/completions` with a list of ids
and `return_token_ids`), log-probs are those of the processed distribution, and a server that was started without
`--logprobs-mode processed_logprobs` is refused. What a model's generation config would add to a request (top_k,
repetition_penalty, …) is set to nothing, so that the distribution is the settings' own. As in `rl.samplers.vllm`, a
seed gives the same tokens only in the same batch.

Requests carry their seeds, so one whose connection breaks is simply asked again: nothing is lost or drawn twice. Each
new connection first asks for the version of the weights (vLLM 0.32 keeps one; ours has a part that no other run has),
so a server that was restarted meanwhile, and holds the weights of its folder again, or that another run has taken, is
found out (`StaleEngine`).

New weights arrive by a function `(weights, policy_version) -> None`. Two are given: `file_hand_over` and
`nccl_hand_over`. CUDA IPC is not: over HTTP vLLM would have to unpickle what it is sent.

Whoever reaches the endpoints that change weights owns the server, and vLLM's `--api-key` does not cover them (it
guards /v1 and the like). So a server is either on this machine, or it needs a key and must refuse such a request
without one, which a proxy in front of it can do (over https: plain http shows the key). An SSH tunnel makes a far
server one on this machine.

Window: vLLM 0.26 to 0.32; tried with 0.32.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from rl.runs import write_file
from rl.samplers.base import SampleRequest, SamplingSettings, StaleEngine, gather
from rl.samplers.openai import Patience
from rl.samplers.synced import Row, Scores, Weights, agreement
from rl.samplers.vllm import ENDS, engine_seed, first_repeat, repetition_sizes
from rl.samplers.vllm_http import (
    NEUTRAL,
    PATIENCE,
    Drawn,
    Line,
    Missing,
    Server,
    ServerError,
    again,
    open_servers,
    shown,
)
from rl.samplers.vllm_settings import refuse_settings
from rl.types import Completion, FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HandOver = Callable[[Weights, int], None]  # (weights, policy_version): afterwards every server holds them

SHARD_BYTES = 2**30  # of the files of a hand-over, so of what lies in memory twice


class ServerEngine:
    """A `StreamingSampler` and `WeightedEngine` on one or more vLLM servers (`urls`) that hold the same model.

    `hand_over` puts new weights into all of them. `request`: more fields of the request, native (min_p, …). At most
    `connections` requests are under way on each server. `api_key_variable`: the name of the environment variable that
    holds the key. `spread`: how far (mean |Δ| in nats) the servers' log-probs of the same tokens may lie apart.

    Errors: ServerError for a server that is not there or whose log-probs are not the processed distribution's;
    ValueError for a URL or a setting that is not allowed.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        hand_over: HandOver,
        *,
        request: Mapping[str, Any] | None = None,
        api_key_variable: str | None = None,
        patience: Patience = PATIENCE,
        connections: int = 128,
        spread: float = 5e-2,
    ) -> None:
        if connections < 1:
            raise ValueError(f"a server needs at least 1 connection, got {connections}")
        self.tokenizer, self.hand_over, self.connections, self.spread = tokenizer, hand_over, connections, spread
        self.request = dict(request or {})
        refuse_settings({}, self.request)
        self.policy_version = 0
        self.servers = open_servers(urls, api_key_variable, patience)
        self.patience = patience
        for server in self.servers:
            _introduce(server, tokenizer)
        self.max_model_len = min(server.max_model_len for server in self.servers)
        self._owner = secrets.token_hex(4)
        self._busy = False
        self._whole = True  # no hand-over has stopped halfway
        self._scored: tuple[int, list[Row], list[Scores]] | None = None  # the last version, rows, each server's scores

    # --- drawing ------------------------------------------------------------------------------------------------------

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """One completion a request, in order; `report` is told whenever one has finished."""
        return gather(self.stream(requests, settings), len(requests), report)

    def stream(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, limits: list[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they end; see `StreamingSampler`. With `limits` the tokens come one by one, which
        costs the server more; a request is cut by closing its connection. Left early, all are closed.

        Errors: ValueError for a prompt that leaves no room in the model's length; ServerError; StaleEngine.
        """
        if self._busy:
            raise RuntimeError("these vLLM servers are already drawing: finish or close the other stream first")
        if not self._whole:
            raise RuntimeError("the last hand-over of weights stopped halfway: load them again before drawing")
        bodies = [self.request_body(request, settings, streamed=limits is not None) for request in requests]
        if not bodies:
            return
        self._busy = True
        count = min(self.connections * len(self.servers), len(bodies))
        lines = [Line(self.servers[i % len(self.servers)]) for i in range(count)]
        free: SimpleQueue[Line] = SimpleQueue()
        for line in lines:
            free.put(line)
        stop = threading.Event()
        pool = ThreadPoolExecutor(count, thread_name_prefix="vllm")

        def draw(index: int) -> Drawn:
            line = free.get()
            try:
                left = None if limits is None else partial(limits.__getitem__, index)
                work = partial(line.draw, bodies[index], left)
                return again(work, self.patience, bodies[index]["seed"], stop)
            finally:
                free.put(line)

        try:
            asked = {pool.submit(draw, index): index for index in range(len(bodies))}
            for future in as_completed(asked):
                yield asked[future], self._ended(future.result(), requests[asked[future]], settings)
        finally:
            stop.set()
            for line in lines:
                line.cut()
            pool.shutdown(cancel_futures=True)
            for line in lines:
                line.close()
            self._busy = False

    def request_body(
        self, request: SampleRequest, settings: SamplingSettings, streamed: bool = False
    ) -> dict[str, Any]:
        """The fields of a `/v1/completions` request, without the model's name.

        Example: settings with max_tokens 8, a prompt (3, 4) and a prefix (5, 6): prompt [3, 4, 5, 6], max_tokens 6.

        Errors: ValueError for a context that leaves no room in the model's length, or a field that is ours to set.
        """
        budget = request.budget(settings)
        if len(request.context) + budget > self.max_model_len:
            raise ValueError(
                f"a context of {len(request.context)} tokens and {budget} new ones are more than the server's "
                f"--max-model-len of {self.max_model_len}: raise it, or lower max_tokens"
            )
        ours: dict[str, Any] = {
            "prompt": list(request.context),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": budget,
            "seed": engine_seed(request),
            "logprobs": 0,  # of the drawn token alone
            "stop_token_ids": [self.tokenizer.eos_token_id],  # and those of the server's generation config
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # spares the server a lookup a token
            "skip_special_tokens": False,
            "stream": streamed,
        }
        if settings.stop_repetition is not None:
            ours["repetition_detection"] = repetition_sizes(settings.stop_repetition)
        if taken := sorted(ours.keys() & self.request.keys()):
            raise ValueError(f"request.{taken[0]} is set by the sampler itself; remove it")
        return NEUTRAL | self.request | ours

    def _ended(self, drawn: Drawn, request: SampleRequest, settings: SamplingSettings) -> Completion:
        reason = ENDS.get(drawn.finish, FinishReason.ABORTED)  # abort: somebody's doing, not the model's
        count = len(drawn.ids)
        if reason is FinishReason.LENGTH and count < request.budget(settings):
            raise ServerError(
                f"a server ended a completion after {count} of {request.budget(settings)} tokens: its model's "
                "generation config sets max_new_tokens. Start it with --override-generation-config "
                "'{\"max_new_tokens\": null}', or lower max_tokens"
            )
        if reason is FinishReason.REPETITION and settings.stop_repetition is not None:
            count = first_repeat(drawn.ids, settings.stop_repetition)
        ids, logprobs = drawn.ids[:count], drawn.logprobs[:count]
        text = self.tokenizer.decode(ids[:-1] if reason is FinishReason.STOP else ids, skip_special_tokens=False)
        assert isinstance(text, str)
        return Completion(text, tuple(ids), tuple(logprobs), reason, self.policy_version)

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Weights, policy_version: int) -> None:
        """Hand other weights over; from then on every completion carries `policy_version`, and so do the servers where
        they keep a version (vLLM 0.32).

        Errors: RuntimeError if requests are running: their completions would be of two policies.
        """
        if self._busy:
            raise RuntimeError("the servers are drawing: their weights cannot change now")
        self._whole = False
        self.hand_over(weights, policy_version)
        for server in self.servers:
            if server.weight_version is not None:
                version = f"{policy_version} of {self._owner}"
                server.order("/update_weight_version", {"new_version": version})
                server.weight_version = version
        self.policy_version, self._whole = policy_version, True

    def score(self, rows: Sequence[Row]) -> Scores:
        """The log-probs (nats, at temperature 1) of given completions: for (prompt ids, token ids) rows, one list of
        the completion's length each. Every server scores them; the first one's numbers are given.

        Errors: StaleEngine where one server's weights are not the others'.
        """
        # One after the other: in a batch of one, unmoved weights give the same bits, by which staleness is told.
        scores = [self._score(server, rows) for server in self.servers]
        for server, found in zip(self.servers[1:], scores[1:], strict=True):
            apart = agreement(scores[0], found, self.policy_version)
            if not apart.mean <= self.spread:
                raise StaleEngine(
                    f"{server.url} and {self.servers[0].url} differ by {apart.mean:.2g} nats on average on the same "
                    f"tokens, more than {self.spread:.2g}: one of them holds other weights"
                )
        before = self._scored
        if before is not None and before[0] != self.policy_version and before[1] == list(rows):
            stayed = [now == then for now, then in zip(scores, before[2], strict=True)]
            if any(stayed) and not all(stayed):
                which = self.servers[stayed.index(True)].url
                raise StaleEngine(f"{which} did not get the new weights: another server's log-probs moved, its did not")
        self._scored = self.policy_version, list(rows), scores
        return scores[0]

    def _score(self, server: Server, rows: Sequence[Row]) -> Scores:
        with contextlib.closing(Line(server)) as line:
            found = []
            for prompt, ids in rows:
                body = NEUTRAL | {"model": server.model, "prompt": [*prompt, *ids], "temperature": 1.0, "top_p": 1.0}
                body |= {"max_tokens": 1, "prompt_logprobs": 0}
                reply = again(partial(line.ask, "POST", "/v1/completions", body), self.patience)
                try:
                    given = reply["choices"][0]["prompt_logprobs"]
                    found.append([given[len(prompt) + t][str(token)]["logprob"] for t, token in enumerate(ids)])
                except (LookupError, TypeError) as error:
                    raise ServerError(f"{server.url}: its reply holds no prompt_logprobs of the tokens sent") from error
            return found

    def sleep(self) -> None:
        """Free the servers' device memory, weights and all; needs `--enable-sleep-mode`. Nothing happens on a CPU, nor
        on a server without VLLM_SERVER_DEV_MODE."""
        for server in self.servers:
            server.try_order("/sleep?level=2")

    def wake_up(self) -> None:
        """Take the memory back; the weights must be loaded after it."""
        for server in self.servers:
            server.try_order("/wake_up")

    def close(self) -> None:
        """Nothing is held between two calls; the servers are not ours to end."""


# --- the two hand-overs -----------------------------------------------------------------------------------------------


def file_hand_over(
    urls: str | Sequence[str],
    folder: Path,
    *,
    api_key_variable: str | None = None,
    patience: Patience = PATIENCE,
    shard_bytes: int = SHARD_BYTES,
) -> HandOver:
    """Through safetensors files in a folder that trainer and servers see under one path: memory (/dev/shm) on one
    machine, a shared file system between several. The servers load them in place and drop their cached prefixes.

    Version 7 lies in `folder/hand-over-7/weights-00000.safetensors`, …; the versions before it are removed once every
    server has it. Servers need VLLM_SERVER_DEV_MODE=1; on any device, a CPU too.

    Errors: ServerError for a server that did not load them.
    """
    servers = open_servers(urls, api_key_variable, patience)

    def hand_over(weights: Weights, policy_version: int) -> None:
        written = folder.resolve() / f"hand-over-{policy_version}"
        shutil.rmtree(written, ignore_errors=True)  # of a run that was killed
        _write_shards(written, weights, shard_bytes)
        for server in servers:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(written)}}
            server.order("/collective_rpc", body)
            if not server.order("/reset_prefix_cache").get("success", True):
                raise ServerError(f"{server.url} did not drop its cached prefixes, which belong to the old weights")
        for older in folder.glob("hand-over-*"):
            if older.name != written.name:
                shutil.rmtree(older, ignore_errors=True)

    return hand_over


def nccl_hand_over(
    urls: str | Sequence[str],
    port: int,
    *,
    address: str = "127.0.0.1",
    api_key_variable: str | None = None,
    patience: Patience = PATIENCE,
) -> HandOver:
    """From GPU to GPU through vLLM's own weight transfer (0.32). Untested until two GPUs are seen.

    The trainer is rank 0 of one NCCL group a server, and waits for that of server i at `address`:(`port` + i), an
    address of the trainer's machine that the servers reach. The group is formed at the first hand-over. Two GPUs:

        CUDA_VISIBLE_DEVICES=1 VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --host 127.0.0.1 --port 8000 \\
            --logprobs-mode processed_logprobs --weight-transfer-config '{"backend": "nccl"}'
        CUDA_VISIBLE_DEVICES=0 python train.py    # ... nccl_hand_over("http://127.0.0.1:8000", port=29600)

    What NCCL itself sends is neither encrypted nor authenticated: give it an address of a network of your own.
    """
    servers = open_servers(urls, api_key_variable, patience)
    engines: list[Any] = []

    def hand_over(weights: Weights, policy_version: int) -> None:
        from vllm.distributed.weight_transfer import nccl_engine  # pyright: ignore[reportMissingImports]

        source: Any = _HeldWeights([(name, tensor.detach()) for name, tensor in weights])
        for index, server in enumerate(servers):
            if index == len(engines):
                world = server.order("/get_world_size", method="GET")["world_size"] + 1
                info = nccl_engine.NCCLTrainerInitInfo(address, port + index, world, rank=0)
                client = _TransferClient(server)
                engines.append(
                    nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
                )
            engines[index].source = source
            engines[index].send_weights()
            if not server.order("/reset_prefix_cache").get("success", True):
                raise ServerError(f"{server.url} did not drop its cached prefixes, which belong to the old weights")
            engines[index].source = None  # holds no weights between two hand-overs

    return hand_over


def _write_shards(folder: Path, weights: Weights, shard_bytes: int) -> None:
    """Files of at most `shard_bytes`, but for a tensor that is larger by itself."""
    from safetensors.torch import save

    shard: dict[str, torch.Tensor] = {}
    number = held = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > shard_bytes:
            write_file(folder / f"weights-{number:05}.safetensors", save(shard), "handover.weights")
            shard, number, held = {}, number + 1, 0
        # A copy each: safetensors takes no two names for one piece of memory, and a tied layer must have both.
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held += size
    if not shard:
        raise ValueError("a hand-over of no weights at all")
    write_file(folder / f"weights-{number:05}.safetensors", save(shard), "handover.weights")


@dataclass(frozen=True, slots=True)
class _HeldWeights:
    """vLLM's `WeightSource` over the weights of one hand-over."""

    pairs: list[tuple[str, torch.Tensor]]

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta  # pyright: ignore[reportMissingImports]

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.pairs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.pairs)


@dataclass(frozen=True, slots=True)
class _TransferClient:
    """vLLM's `VLLMWeightSyncClient` with a key, which its own has not."""

    server: Server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.order("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.server.order("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self.server.order("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.order(
            "/finish_weight_update", None if weight_version is None else {"weight_version": weight_version}
        )


def _introduce(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ask a server for its model, and make sure of its log-probs."""
    with contextlib.closing(Line(server)) as line:
        ask = partial(again, patience=server.patience)
        listed = ask(partial(line.ask, "GET", "/v1/models"))
        try:
            server.model, server.max_model_len = listed["data"][0]["id"], int(listed["data"][0]["max_model_len"])
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"{server.url}/v1/models names no model with a max_model_len: {shown(listed)}") from error
        with contextlib.suppress(Missing):
            server.weight_version = ask(partial(line.ask, "GET", "/weight_info")).get("weight_version")
        eos = tokenizer.eos_token_id
        assert isinstance(eos, int)
        # Of one allowed token, the processed distribution's log-prob is 0. The model's own would be as well, if it
        # were sure of the token; it cannot be of two.
        for token in (eos, 0 if eos else 1):
            body = NEUTRAL | {"prompt": [eos], "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": 0}
            body |= {"allowed_token_ids": [token], "return_token_ids": True}
            drawn = ask(partial(line.draw, body, None))
            if drawn.ids != [token] or abs(drawn.logprobs[0]) > 1e-4:
                raise ServerError(
                    f"{server.url}: the log-probs are not those of the processed distribution (of the only token "
                    f"that was allowed: {drawn.logprobs}, not 0): start it with --logprobs-mode processed_logprobs"
                )
