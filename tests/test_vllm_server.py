"""Servers of vLLM, played by a script on loopback: order, broken connections, cut streams, weights, keys.

The real one is in tests/test_engines_server.py.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rl.repetition import RepetitionRule
from rl.samplers import vllm_http
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.openai import Patience
from rl.samplers.synced import StaleEngine, SyncedSampler
from rl.samplers.vllm import engine_seed
from rl.samplers.vllm_http import ServerError, open_servers
from rl.samplers.vllm_server import ServerEngine, _TransferClient, file_hand_over
from rl.tasks.tiny_models import make_tokenizer
from rl.types import FinishReason

QUICK = Patience(timeout=5, tries=3, first_wait=0.01, longest_wait=0.05)
KEY = "sk-secret-0123456789"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class Played(ThreadingHTTPServer):
    """A vLLM server whose model counts: from the last token of the prompt upwards, `seed % 7 + 1` tokens and then EOS.

    Token t has log-prob -weights - t / 10. `script(handler, path, body, number)` may answer the number-th POST (from
    1, those of the start not counted) itself and return True.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, eos):
        super().__init__(("127.0.0.1", 0), Handler)
        self.eos, self.weights, self.version, self.raw = eos, 0.0, "default", False
        self.script: Callable[..., object] = lambda handler, path, body, number: False
        self.posts, self.gets, self.connections, self.lock = [], [], 0, threading.Lock()
        self.keys, self.model_len = [], 512
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), OSError):  # one is a client that has cut the connection, as it should
            super().handle_error(request, client_address)

    def completion(self, body):
        """(ids, finish reason)"""
        count = body["seed"] % 7 + 1
        ids = [body["prompt"][-1] + 1 + i for i in range(count)] + [self.eos]
        return (ids, "stop") if len(ids) <= body["max_tokens"] else (ids[: body["max_tokens"]], "length")


class Handler(BaseHTTPRequestHandler):
    server: Played  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def do_GET(self):
        self.server.gets.append(self.path)
        if self.path == "/v1/models":
            self.send({"data": [{"id": "played", "max_model_len": self.server.model_len}]})
        elif self.path == "/weight_info" and self.server.version is not None:
            self.send({"weight_version": self.server.version})
        elif self.path == "/get_world_size":
            self.send({"world_size": 1})
        elif self.path == "/is_sleeping":
            self.send({"is_sleeping": False})
        else:
            self.send({"detail": "Not Found"}, 404)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or "{}")
        if "allowed_token_ids" in body:
            token = body["allowed_token_ids"][0]
            return self.complete(body, [token], [-0.1 if self.server.raw else -0.0], "length")
        with self.server.lock:
            self.server.posts.append((self.path, body))
            self.server.keys.append(self.headers.get("Authorization"))
            number = len(self.server.posts)
        try:
            if not self.server.script(self, self.path, body, number):
                self.play(body)
        except OSError:  # the client has cut the connection, as it should
            self.close_connection = True
        return None

    def play(self, body):
        server = self.server
        if self.path == "/v1/completions" and "prompt_logprobs" in body:
            given = [None, *({str(t): {"logprob": -server.weights - t / 10}} for t in body["prompt"][1:])]
            self.send({"choices": [{"prompt_logprobs": given}]})
        elif self.path == "/v1/completions":
            ids, finish = server.completion(body)
            self.complete(body, ids, [-server.weights - t / 10 for t in ids], finish)
        elif self.path == "/collective_rpc":
            self.send({"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.send({"success": True})
        elif self.path == "/update_weight_version" and server.version is not None:
            server.version = body["new_version"]
            self.send({"success": True})
        else:
            self.send({"detail": "Not Found"}, 404)

    def complete(self, body, ids, logprobs, finish):
        if not body.get("stream"):
            self.send({"choices": [self.choice(ids, logprobs, finish)]})
            return
        self.start_stream()
        for t, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
            self.chunk(self.choice([token], [logprob], finish if t + 1 == len(ids) else None))
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def start_stream(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, choice):
        data = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def choice(self, ids, logprobs, finish):
        return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish, "text": "?"}

    def send(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def drop(self):
        """Break the connection before a word is said."""
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True
        return True

    def log_message(self, format, *args):  # noqa: A002
        pass


@contextmanager
def playing(tokenizer):
    server = Played(tokenizer.eos_token_id)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(tokenizer):
    with playing(tokenizer) as server:
        yield server


def no_hand_over(weights, policy_version):
    raise AssertionError("nothing was to be handed over")


def engine_of(server, tokenizer, hand_over=no_hand_over, **options) -> Any:
    return ServerEngine(server.url, tokenizer, hand_over, patience=options.pop("patience", QUICK), **options)


def asked(count):
    return [SampleRequest((3, 4 + i % 5), seed=i) for i in range(count)]


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_one_completion_a_request_in_order_however_they_end(server, tokenizer):
    server.script = lambda handler, path, body, number: time.sleep(0.03 * (body["seed"] % 3 == 0))
    engine, seen = engine_of(server, tokenizer, connections=8), []
    drawn = engine.sample(asked(40), SamplingSettings(max_tokens=6), seen.append)
    assert seen == list(range(1, 41))
    for request, completion in zip(asked(40), drawn, strict=True):
        last, count = request.prompt_ids[-1], request.seed % 7 + 1
        ids = [*range(last + 1, last + 1 + count), tokenizer.eos_token_id]
        ended = len(ids) <= 6
        assert completion.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert list(completion.token_ids) == ids[:6]
        assert completion.sampler_logprobs == tuple(-t / 10 for t in ids[:6])
        assert completion.text == tokenizer.decode(ids[:-1] if ended else ids[:6])
        assert completion.policy_version == 0
    assert engine.sample([], SamplingSettings()) == []
    first, _ = next(engine.stream(asked(4), SamplingSettings(max_tokens=6)))
    assert first != 0  # request 0 was made to wait


def test_what_is_sent(server, tokenizer):
    engine = engine_of(server, tokenizer, request={"min_p": 0.1})
    settings = SamplingSettings(0.6, 0.9, 8, RepetitionRule(max_period=4, min_repeats=3, min_tokens=7))
    engine.sample([SampleRequest((3, 4), 2**64 - 1, prefix=(5, 6))], settings)
    ((path, body),) = server.posts
    assert path == "/v1/completions"
    assert body == {
        "model": "played", "prompt": [3, 4, 5, 6], "temperature": 0.6, "top_p": 0.9, "max_tokens": 6, "min_p": 0.1,
        "seed": engine_seed(SampleRequest((3, 4), 2**64 - 1, prefix=(5, 6))), "logprobs": 0, "stream": False,
        "stop_token_ids": [tokenizer.eos_token_id], "return_token_ids": True, "return_tokens_as_token_ids": True,
        "skip_special_tokens": False, "top_k": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 3, "min_count": 3},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"vllm\.request\.seed is set by the sampler"):
        engine_of(server, tokenizer, request={"seed": 1})
    engine.request = {"stream": True}
    with pytest.raises(ValueError, match=r"request\.stream is set by the sampler itself"):
        engine.sample(asked(1), SamplingSettings())
    with pytest.raises(ValueError, match="more than the server's --max-model-len of 512"):
        engine.sample(asked(1), SamplingSettings(max_tokens=511))
    with pytest.raises(ValueError, match="min_tokens must be at most max_period x min_repeats"):
        engine.sample(asked(1), SamplingSettings(stop_repetition=RepetitionRule(2, 2, 9)))
    assert len(server.posts) == 1  # nothing more was asked


def test_a_broken_connection_is_tried_again_with_the_same_seed(server, tokenizer):
    engine = engine_of(server, tokenizer, connections=4)
    whole = engine.sample(asked(12), SamplingSettings(max_tokens=9))
    server.posts.clear()
    server.script = lambda handler, path, body, number: number % 3 == 0 and handler.drop()
    assert engine.sample(asked(12), SamplingSettings(max_tokens=9)) == whole
    seeds = [body["seed"] for _, body in server.posts]
    assert set(seeds) == set(range(12)) and len(seeds) > 12
    server.posts.clear()
    busy = {"error": {"message": "too many requests"}}
    server.script = lambda handler, path, body, number: number == 1 and (handler.send(busy, 503) or True)
    assert engine.sample(asked(3), SamplingSettings(max_tokens=9)) == whole[:3]


def test_a_stream_that_breaks_off_is_drawn_from_its_beginning(server, tokenizer):
    def tear(handler, path, body, number):
        if number > 1:
            return False
        handler.start_stream()
        handler.chunk(handler.choice([9], [-1.0], None))
        handler.wfile.write(b'20\r\ndata: {"choices": [{')
        return handler.drop()

    engine = engine_of(server, tokenizer)
    whole = engine.sample(asked(1), SamplingSettings(max_tokens=9))
    server.posts.clear()
    server.script = tear
    assert list(engine.stream(asked(1), SamplingSettings(max_tokens=9), [9])) == [(0, whole[0])]
    assert len(server.posts) == 2


def test_limits_cut_streams(server, tokenizer):
    goes_on = threading.Event()

    def wait_in_the_middle(handler, path, body, number):
        if body["seed"] != 6:
            return False
        handler.start_stream()
        for t in range(8):
            assert t != 3 or goes_on.wait(5)
            handler.chunk(handler.choice([10 + t], [-0.5], None))
            time.sleep(0.01)
        return True

    server.script = wait_in_the_middle
    engine = engine_of(server, tokenizer)
    requests, limits = asked(7), [20] * 7
    limits[0], limits[5] = 0, 2
    found = {}
    for index, completion in engine.stream(requests, SamplingSettings(max_tokens=20), limits):
        found[index] = completion
        if len(found) == 6:
            limits[6] = 1
            goes_on.set()
    assert sorted(found) == list(range(7)) and list(found)[-1] == 6
    ended = [found[i].finish_reason for i in range(7)]
    stop, aborted = FinishReason.STOP, FinishReason.ABORTED
    assert ended == [aborted, stop, stop, stop, stop, aborted, aborted]
    assert found[0].num_tokens == 0 and found[5].token_ids == (10 - 5, 11 - 5)
    drawn = found[6].num_tokens  # what it had, and the token that was under way: 3 and 1 at most
    assert 1 <= drawn <= 4 and found[6].token_ids == tuple(range(10, 10 + drawn))
    assert found[6].sampler_logprobs == (-0.5,) * drawn
    assert 0 not in [body["seed"] for _, body in server.posts]  # never asked for


def test_a_stream_left_early_closes_its_connections(server, tokenizer):
    let_go = threading.Event()
    server.script = lambda handler, path, body, number: body["seed"] > 0 and let_go.wait(5) and False
    engine = engine_of(server, tokenizer, connections=3)
    stream = engine.stream(asked(20), SamplingSettings(max_tokens=9))
    assert next(stream)[0] == 0
    with pytest.raises(RuntimeError, match="already drawing"):
        engine.sample(asked(1), SamplingSettings())
    with pytest.raises(RuntimeError, match="weights cannot change"):
        engine.load_weights([], 1)
    started = time.perf_counter()
    stream.close()
    assert time.perf_counter() - started < 2  # not the 5 s of the server
    let_go.set()
    assert len(server.posts) <= 5  # those that were under way
    assert len(engine.sample(asked(20), SamplingSettings(max_tokens=9))) == 20


def test_several_servers_share_the_requests(tokenizer):
    with playing(tokenizer) as one, playing(tokenizer) as two:
        for server in (one, two):
            server.script = lambda handler, path, body, number: time.sleep(0.01)
        engine = ServerEngine([one.url, two.url], tokenizer, no_hand_over, connections=2, patience=QUICK)
        drawn = engine.sample(asked(30), SamplingSettings(max_tokens=9))
        assert [c.num_tokens for c in drawn] == [i % 7 + 2 for i in range(30)]
        assert len(one.posts) + len(two.posts) == 30 and min(len(one.posts), len(two.posts)) >= 5


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_server_that_is_gone_is_named(server, tokenizer):
    engine = engine_of(server, tokenizer)
    server.script = lambda handler, path, body, number: handler.drop()
    with pytest.raises(ServerError, match=rf"{server.url} cannot be reached or broke off: .* \(3 tries\)"):
        engine.sample(asked(5), SamplingSettings(max_tokens=9))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=rf"{nowhere} cannot be reached .*refused \(3 tries\)"):
        ServerEngine(nowhere, tokenizer, no_hand_over, patience=QUICK)


def test_a_silent_server_is_not_asked_again(server, tokenizer):
    let_go = threading.Event()
    engine = engine_of(server, tokenizer, patience=Patience(timeout=0.2, tries=3, first_wait=0, longest_wait=0))
    server.script = lambda handler, path, body, number: let_go.wait(5) and False
    with pytest.raises(ServerError, match=r"/v1/completions: no word in 0\.2 s; give it more \(patience\)"):
        engine.sample(asked(1), SamplingSettings(max_tokens=9))
    let_go.set()
    assert len(server.posts) == 1


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (400, {"error": {"message": "no such field"}}, r"/v1/completions: HTTP 400: .*no such field"),
        (200, {"choices": []}, r"no completion with token ids and log-probs \(vLLM 0\.26 to 0\.32"),
        (200, {"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0, None]}}]}, "no completion with"),
        (200, [1], "the reply is no JSON object"),
        (401, {"error": "Unauthorized"}, "HTTP 401: name api_key_variable"),
    ],
)
def test_replies_that_are_none(server, tokenizer, status, reply, message):
    engine = engine_of(server, tokenizer)
    server.script = lambda handler, path, body, number: handler.send(reply, status) or True
    with pytest.raises(ServerError, match=message):
        engine.sample(asked(1), SamplingSettings(max_tokens=9))
    assert len(server.posts) == 1


def test_log_probs_of_another_distribution_are_refused_at_the_start(server, tokenizer):
    server.raw = True
    with pytest.raises(ServerError, match="start it with --logprobs-mode processed_logprobs"):
        engine_of(server, tokenizer)


def test_a_generation_config_that_cuts_completions_is_named(server, tokenizer):
    def cut(handler, path, body, number):
        handler.complete(body, [5], [-1.0], "length")
        return True

    engine = engine_of(server, tokenizer)
    server.script = cut
    with pytest.raises(ServerError, match=r"after 1 of 9 tokens: .*max_new_tokens"):
        engine.sample(asked(1), SamplingSettings(max_tokens=9))


def test_repetitions_are_cut_where_the_rule_says(server, tokenizer):
    def loop(handler, path, body, number):
        handler.complete(body, [7] * 12, [-0.1] * 12, "repetition")
        return True

    engine = engine_of(server, tokenizer)
    server.script = loop
    settings = SamplingSettings(
        max_tokens=20, stop_repetition=RepetitionRule(max_period=4, min_repeats=3, min_tokens=7)
    )
    (drawn,) = engine.sample(asked(1), settings)
    assert drawn.finish_reason is FinishReason.REPETITION and drawn.num_tokens == 7
    server.script = lambda handler, path, body, number: handler.complete(body, [7], [-0.1], "abort") or True
    (drawn,) = engine.sample(asked(1), settings)
    assert drawn.finish_reason is FinishReason.ABORTED and drawn.token_ids == (7,)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_files_are_handed_over(server, tokenizer, tmp_path):
    embedding = torch.arange(6.0).reshape(2, 3)
    weights = {"embed": embedding, "head": embedding, "turned": embedding.T, "norm": torch.ones(2)}
    engine = engine_of(server, tokenizer, file_hand_over(server.url, tmp_path, patience=QUICK, shard_bytes=32))
    (tmp_path / "hand-over-7").mkdir()
    (tmp_path / "hand-over-7" / "weights-00009.safetensors").write_bytes(b"of a run that was killed")
    for version in (3, 7):
        engine.load_weights(weights.items(), version)
    assert [path.name for path in tmp_path.iterdir()] == ["hand-over-7"]
    files = sorted((tmp_path / "hand-over-7").iterdir())
    assert [f.name for f in files] == [f"weights-{i:05}.safetensors" for i in range(3)]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    posts = server.posts[-3:]
    where = {"weights_path": str(tmp_path / "hand-over-7")}
    assert posts[0] == ("/collective_rpc", {"method": "reload_weights", "kwargs": where})
    assert posts[1:] == [("/reset_prefix_cache", {}), ("/update_weight_version", {"new_version": server.version})]
    assert server.version.startswith("7 of ") and engine.policy_version == 7
    assert engine.sample(asked(1), SamplingSettings(max_tokens=9))[0].policy_version == 7
    with pytest.raises(ValueError, match="no weights at all"):
        engine.load_weights([], 8)
    with pytest.raises(RuntimeError, match="stopped halfway: load them again"):
        engine.sample(asked(1), SamplingSettings(max_tokens=9))


def test_a_cache_that_is_not_dropped_and_a_server_without_dev_mode(server, tokenizer, tmp_path):
    weights = [("norm", torch.ones(2))]
    hand_over = file_hand_over(server.url, tmp_path, patience=QUICK)
    kept = {"success": False}
    server.script = lambda handler, path, body, number: "cache" in path and (handler.send(kept) or True)
    with pytest.raises(ServerError, match="did not drop its cached prefixes"):
        hand_over(weights, 1)
    server.script = lambda handler, path, body, number: handler.send({"detail": "Not Found"}, 404) or True
    with pytest.raises(ServerError, match="/collective_rpc: HTTP 404: start the server with VLLM_SERVER_DEV_MODE=1"):
        hand_over(weights, 1)
    engine = engine_of(server, tokenizer)
    engine.sleep()  # nothing to sleep with: nothing happens
    engine.wake_up()
    engine.close()
    server.posts.clear()
    server.script = lambda handler, path, body, number: handler.drop()
    with pytest.raises(ServerError, match="broke off"):
        hand_over(weights, 1)
    assert len(server.posts) == 1  # an order is given once: it may have been carried out


def test_a_restarted_server_is_found_out(server, tokenizer):
    def take(weights, policy_version):
        server.weights = float(policy_version)

    engine = engine_of(server, tokenizer, take)
    engine.load_weights([], 4)
    assert engine.sample(asked(2), SamplingSettings(max_tokens=9))[0].sampler_logprobs[0] == pytest.approx(-4.5)

    def restart(handler, path, body, number):
        server.weights, server.version = 0.0, "default"
        return handler.drop()

    server.script = restart
    with pytest.raises(StaleEngine, match=r"says \{'weight_version': 'default'\} where it was given .* '4 of "):
        engine.sample(asked(1), SamplingSettings(max_tokens=9))
    server.script = lambda handler, path, body, number: False
    with pytest.raises(StaleEngine, match="was restarted"):
        engine.score([((3, 4), (5,))])
    engine.load_weights([], 5)
    assert engine.sample(asked(1), SamplingSettings(max_tokens=9))[0].policy_version == 5


def test_a_server_that_another_run_has_taken_is_found_out(server, tokenizer):
    mine, others = (engine_of(server, tokenizer, lambda weights, policy_version: None) for _ in range(2))
    mine.load_weights([], 4)
    others.load_weights([], 4)
    with pytest.raises(StaleEngine, match="somebody else has changed them"):
        mine.sample(asked(1), SamplingSettings(max_tokens=9))
    assert others.sample(asked(1), SamplingSettings(max_tokens=9))[0].policy_version == 4


def test_a_server_that_keeps_no_version_is_told_none(server, tokenizer):
    server.version = None
    engine = engine_of(server, tokenizer, lambda weights, policy_version: None)
    engine.load_weights([], 4)
    assert engine.sample(asked(1), SamplingSettings(max_tokens=9))[0].policy_version == 4
    assert [path for path, _ in server.posts] == ["/v1/completions"]


def test_scores_are_every_servers(tokenizer):
    rows = [((3, 4), (5, 6)), ((3,), (7,))]
    with playing(tokenizer) as one, playing(tokenizer) as two:
        moves = [one, two]

        def hand_over(weights, policy_version):
            for server in moves:
                server.weights = policy_version / 100

        engine = ServerEngine([one.url, two.url], tokenizer, hand_over, patience=QUICK)
        assert engine.score(rows) == [[-0.5, -0.6], [-0.7]]
        engine.load_weights([], 1)
        assert engine.score(rows) == [pytest.approx([-0.51, -0.61]), pytest.approx([-0.71])]
        moves.remove(two)
        engine.load_weights([], 2)
        with pytest.raises(StaleEngine, match=f"{two.url} did not get the new weights"):
            engine.score(rows)
        engine.load_weights([], 50)
        with pytest.raises(StaleEngine, match=r"differ by 0\.49 nats on average .* more than 0\.05"):
            engine.score(rows)
        one.script = lambda handler, path, body, number: handler.send({"choices": [{}]}) or True
        with pytest.raises(ServerError, match="holds no prompt_logprobs"):
            engine.score(rows)


def test_a_skipped_hand_over_is_stale(server, tokenizer):
    truth = [0.0]

    def scores(rows):
        return [[-truth[0] - t / 10 for t in ids] for _, ids in rows]

    def take(weights, policy_version):
        server.weights = truth[0]

    engine = engine_of(server, tokenizer, take)
    sampler = SyncedSampler(engine, list, scores, tolerance=1e-4)
    sampler.sample(asked(3), SamplingSettings(max_tokens=9))
    truth[0], sampler.policy_version = 0.5, 1
    assert {c.policy_version for c in sampler.sample(asked(3), SamplingSettings(max_tokens=9))} == {1}
    engine.hand_over = lambda weights, policy_version: None
    truth[0], sampler.policy_version = 0.6, 2
    with pytest.raises(StaleEngine, match="holds other weights"):
        sampler.sample(asked(3), SamplingSettings(max_tokens=9))


def test_what_vllms_weight_transfer_is_told(server):
    (there,) = open_servers(server.url, None, QUICK)
    client = _TransferClient(there)
    server.script = lambda handler, path, body, number: handler.send({"message": "done"}) or True
    client.init_weight_transfer_engine({"rank_offset": 1})
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update()
    client.finish_weight_update("3")
    assert server.posts == [
        ("/init_weight_transfer_engine", {"init_info": {"rank_offset": 1}}),
        ("/start_weight_update", {}),
        ("/update_weights", {"update_info": {"names": ["a"]}}),
        ("/finish_weight_update", {}),
        ("/finish_weight_update", {"weight_version": "3"}),
    ]
    assert there.order("/get_world_size", method="GET") == {"world_size": 1}


# --- who may change weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://10.0.0.7:8000", r"http://10\.0\.0\.7:8000 is not on this machine: .*api_key_variable"),
        ("https://gpu.example", "is not on this machine"),
        ("http://0.0.0.0:8000", "is not on this machine"),
        ("ftp://127.0.0.1", "is http://host:port"),
        ("http://me:secret@127.0.0.1", "without user, query or blanks"),
        ("http://127.0.0.1:8000/?a=1", "without user, query or blanks"),
        ("http://127.0.0.1:99999", "cannot be read"),
        ("http://127.0.0.1:8000/v1", "its root, without /v1"),
    ],
)
def test_urls_that_are_refused(url, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        file_hand_over(url, tmp_path)
    assert "secret" not in str(caught.value)


def test_urls_that_are_taken():
    taken = ["http://127.0.0.1:8000/", "http://localhost", "http://[::1]:8000", "http://127.0.0.1:9000/second"]
    assert [s.url for s in open_servers(taken, None, QUICK)] == [taken[0][:-1], *taken[1:]]
    for wrong in ([], ["http://localhost:1", "http://localhost:1/"]):
        with pytest.raises(ValueError, match="one URL a server and at least one"):
            open_servers(wrong, None, QUICK)


def test_keys(server, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="variable SERVER_KEY holds no key"):
        engine_of(server, tokenizer, api_key_variable="SERVER_KEY")
    monkeypatch.setenv("SERVER_KEY", KEY)
    engine = engine_of(server, tokenizer, api_key_variable="SERVER_KEY")
    engine.sample(asked(1), SamplingSettings(max_tokens=9))
    assert server.keys == [f"Bearer {KEY}"]
    server.script = lambda handler, path, body, number: handler.send({"error": f"not {KEY[:9]}"}, 401) or True
    with pytest.raises(ServerError, match="HTTP 401: the key in SERVER_KEY is not the server's$"):
        engine.sample(asked(1), SamplingSettings(max_tokens=9))


def test_a_far_server_must_refuse_orders_without_a_key(server, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    monkeypatch.setattr(vllm_http.Server, "local", False)
    hand_over = file_hand_over(server.url, tmp_path, api_key_variable="SERVER_KEY", patience=QUICK)
    with pytest.raises(ServerError, match=r"answers /is_sleeping without a key \(HTTP 200\)"):
        hand_over([("norm", torch.ones(2))], 1)
    assert server.posts == []  # nothing was ordered

    def guarded(handler):
        handler.send({}, 401 if handler.headers.get("Authorization") is None else 200)

    monkeypatch.setattr(Handler, "do_GET", guarded)
    for version in (1, 2):
        hand_over([("norm", torch.ones(2))], version)
    assert server.keys == [f"Bearer {KEY}"] * 4
