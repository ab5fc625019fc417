"""Chats: an endpoint that is down, slow, rude or lying, on loopback; a sampler behind the same protocol."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rl.policy import load_model, load_tokenizer
from rl.samplers import openai
from rl.samplers.base import SamplingSettings
from rl.samplers.chat import ChatRequest, SamplerChat, without_control_tokens
from rl.samplers.openai import OpenAIChat, Patience
from rl.samplers.transformers import TransformersSampler
from rl.tasks.tiny_models import make_tokenizer
from rl.types import Completion, FinishReason, JudgeFailure

QUICK = Patience(timeout=5, tries=3, first_wait=0.01, longest_wait=0.05)
KEY = "sk-secret-0123456789"


class Server(ThreadingHTTPServer):
    """Hands every request to a script, with its number (from 1)."""

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock, self.stop = script, [], threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
            number = len(self.server.requests)
        try:
            self.server.script(self, json.loads(body), number)
        except OSError:  # the client has cut the connection, as it should
            self.close_connection = True

    def send(self, status, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def say(self, text, finish="stop"):
        self.send(200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]})

    def log_message(self, format, *args):  # noqa: A002
        pass


@contextmanager
def serving(script):
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ask_one(script, patience=QUICK, **options):
    with serving(script) as server:
        (answer,) = OpenAIChat(server.url, "m", patience=patience, **options)([ChatRequest("hi", 7)])
    return answer, server.requests


def echo(handler, body, number):
    handler.say(body["messages"][0]["content"].upper())


def test_one_answer_a_request_in_order_however_they_are_served():
    def late_ones_first(handler, body, number):
        time.sleep(0.02 if body["messages"][0]["content"] < "t2" else 0)
        echo(handler, body, number)

    with serving(late_ones_first) as server:
        chat = OpenAIChat(server.url, "m", workers=8, patience=QUICK)
        answers = chat([ChatRequest(f"t{i}", i) for i in range(40)])
        assert [answer.value for answer in answers] == [f"T{i}" for i in range(40)]
        assert all(answer.failure is None and answer.seconds > 0 for answer in answers)
        assert chat([]) == []


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    options = {"max_tokens": 9, "temperature": 0.5, "extra": {"max_tokens": None, "max_completion_tokens": 9}}
    answer, requests = ask_one(echo, api_key_variable="JUDGE_KEY", **options)
    assert answer.value == "HI"
    ((path, headers, body),) = requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "seed": 7, "temperature": 0.5,
        "max_completion_tokens": 9,
    }  # fmt: skip
    with serving(echo) as server:
        OpenAIChat(server.url, "m")([ChatRequest("hi", 2**64 - 1)])
        OpenAIChat(server.url, "m", extra={"seed": None})([ChatRequest("hi", 1)])
    (_, headers, body), (_, _, unseeded) = server.requests
    assert body["seed"] == 2**31 - 1 and "Authorization" not in headers and "seed" not in unseeded


def test_the_name_says_what_changes_replies():
    def name(**options):
        return OpenAIChat("http://h", "m", **options).name

    assert name() == 'm {"max_tokens": 2048, "temperature": 0.0}'
    assert len({name(), name(max_tokens=1), name(temperature=1.0), name(extra={"top_p": 0.9})}) == 4
    assert name(workers=3, patience=QUICK) == name()


def test_a_busy_endpoint_is_asked_again():
    def busy_twice(handler, body, number):
        if number < 3:
            handler.send(429 if number == 1 else 503, {"error": "busy"})
        else:
            handler.say("fine")

    answer, requests = ask_one(busy_twice)
    assert (answer.value, answer.failure, len(requests)) == ("fine", None, 3)

    answer, requests = ask_one(lambda handler, body, number: handler.send(500, {"error": "no memory"}))
    assert (answer.value, answer.failure, len(requests)) == (None, JudgeFailure.INFRASTRUCTURE, 3)
    assert answer.reason == 'the endpoint said HTTP 500: {"error": "no memory"} (3 tries)'


def test_a_refusal_is_not_asked_again():
    for status in (400, 401, 403, 404, 413, 422):
        answer, requests = ask_one(lambda handler, body, number, status=status: handler.send(status, {"error": "no"}))
        assert answer.failure is JudgeFailure.INFRASTRUCTURE and len(requests) == 1
        assert answer.reason.startswith(f"the endpoint said HTTP {status}")


def test_retry_after_is_kept_up_to_a_bound():
    def later(seconds):
        def script(handler, body, number):
            handler.send(429, {}, Retry_After=seconds) if number == 1 else handler.say("fine")

        started = time.perf_counter()
        answer, _ = ask_one(script, Patience(timeout=5, tries=2, first_wait=0.0, longest_wait=0.4))
        assert answer.value == "fine"
        return time.perf_counter() - started

    assert later("0.2") >= 0.2
    assert 0.4 <= later("3600") < 5
    assert later("soon") < 0.35 > later("-5")


def test_the_arithmetic_of_waiting():
    patience = Patience(first_wait=1, longest_wait=30)
    assert all(2 <= patience.wait(3, None, seed) <= 4 for seed in range(50))
    assert len({patience.wait(3, None, seed) for seed in range(50)}) == 50
    assert (patience.wait(3, 60.0, 1), patience.wait(1, 0.5, 1)) == (30, 0.5)
    assert patience.wait(20, None, 1) <= 30
    assert openai._seconds("7") == 7 and openai._seconds("nan") is None and openai._seconds(None) is None
    assert openai._seconds("in a while") is None and openai._seconds(formatdate(0, usegmt=True)) == 0
    assert 50 < (openai._seconds(formatdate(time.time() + 60, usegmt=True)) or 0) <= 60
    for wrong in ({"timeout": 0}, {"tries": 0}, {"first_wait": 5, "longest_wait": 1}):
        with pytest.raises(ValueError, match="at least one try"):
            Patience(**wrong)


def test_an_endpoint_that_is_down_costs_the_patience_of_a_few_requests():
    chat = OpenAIChat(f"http://127.0.0.1:{free_port()}", "m", workers=4, patience=QUICK)
    started = time.perf_counter()
    answers = chat([ChatRequest("hi", i) for i in range(400)])
    assert time.perf_counter() - started < 5
    assert {answer.failure for answer in answers} == {JudgeFailure.INFRASTRUCTURE} and len(answers) == 400
    assert "cannot be reached or broke off" in answers[0].reason and "refused (3 tries)" in answers[0].reason
    assert sum(answer.reason.startswith("not asked: 8 requests in a row failed") for answer in answers) > 380
    # One that answers now and then is not down.
    with serving(lambda handler, body, number: handler.say("ok") if number % 3 else handler.send(404, {})) as server:
        answers = OpenAIChat(server.url, "m", workers=4, patience=QUICK)([ChatRequest("hi", i) for i in range(60)])
    assert len(server.requests) == 60 and sum(answer.failure is not None for answer in answers) == 20


def hang(handler, body, number):
    handler.server.stop.wait(20)


def drip_headers(handler, body, number):
    for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2000:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.02)


def drip_body(handler, body, number):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n")
    for _ in range(2000):
        handler.wfile.write(b" ")
        time.sleep(0.02)


@pytest.mark.parametrize("script", [hang, drip_headers, drip_body])
def test_a_slow_endpoint_is_a_timeout_and_not_tried_again(script):
    """A byte every 20 ms never meets a timeout on silence: the whole exchange has a deadline."""
    with serving(script) as server:
        started = time.perf_counter()
        chat = OpenAIChat(server.url, "m", patience=Patience(timeout=0.4, tries=3, first_wait=0))
        (answer,) = chat([ChatRequest("hi", 0)])
        took = time.perf_counter() - started
        server.stop.set()
    assert (answer.value, answer.failure) == (None, JudgeFailure.TIMEOUT)
    assert answer.reason == "the endpoint was not done in 0.4 s" and len(server.requests) == 1
    assert 0.35 < took < 3 and 0.35 < answer.seconds < 3


@pytest.mark.parametrize(
    "body",
    [
        b"", b"<html>busy</html>", b"[]", b"null", b'{"choices": []}', b'{"choices": [{}]}', b"\xff\xfe",
        b'{"choices": [{"message": null, "finish_reason": "stop"}]}', b"[" * 100_000,
        b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "hi"}}]}',
        b'{"choices": [{"message": {"content": "hi"}, "finish_reason": "length"}]}',
        b'{"choices": [{"message": {"content": "hi"}, "finish_reason": "content_filter"}]}',
    ],
)  # fmt: skip
def test_garbage_and_replies_without_an_end_are_no_replies(body):
    answer, requests = ask_one(lambda handler, _, number: handler.send(200, body))
    assert (answer.value, answer.failure, len(requests)) == (None, JudgeFailure.CRASH, 1)
    assert "no chat completion" in answer.reason or "no end or no text" in answer.reason


def test_a_body_that_breaks_off_is_asked_for_again():
    def broken(handler, body, number):
        if number == 1:
            handler.send(200, b'{"choices": [', Content_Length="100")
            handler.close_connection = True
        elif number == 2:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")
            handler.close_connection = True
        else:
            handler.say("whole")

    answer, requests = ask_one(broken)
    assert (answer.value, len(requests)) == ("whole", 3)
    answer, _ = ask_one(lambda handler, body, number: setattr(handler, "close_connection", True))
    assert answer.failure is JudgeFailure.INFRASTRUCTURE and "broke off" in answer.reason


def test_a_huge_body_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(openai, "MAX_BODY", 1 << 20)
    sent = []

    def endless(handler, body, number):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while len(sent) < 2000:
            handler.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            sent.append(1)

    answer, _ = ask_one(endless)
    assert (answer.value, answer.failure) == (None, JudgeFailure.CRASH)
    assert answer.reason == "a reply of more than 1 MiB"
    assert len(sent) < 500


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed_and_the_key_stays_here(monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(echo) as other:
        target = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"

        def elsewhere(handler, body, number):
            handler.send(status, {}, Location=target)

        answer, _ = ask_one(elsewhere, api_key_variable="JUDGE_KEY")
        assert other.requests == []
    assert answer.failure is JudgeFailure.INFRASTRUCTURE
    assert answer.reason == f"the endpoint said HTTP {status}, a redirect to {target}; none is followed"


def test_the_key_is_in_no_message_and_no_field(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    chat = OpenAIChat("http://127.0.0.1", "m", api_key_variable="JUDGE_KEY")
    assert KEY not in f"{chat!r} {chat.name} {vars(chat)}"

    def quotes_it(status):
        return lambda handler, body, number: handler.send(
            status, {"error": f"bad key {handler.headers['Authorization']}"}
        )

    for status in (400, 401, 403, 500):
        answer, _ = ask_one(quotes_it(status), api_key_variable="JUDGE_KEY")
        assert "secret" not in answer.reason and f"HTTP {status}" in answer.reason
        assert "bad key" not in answer.reason or status in (400, 500)  # a refused key may be quoted in part
    assert "secret" not in caplog.text
    for bad in ("", "  ", f"{KEY}\nX-Evil: 1", f"{KEY}é"):
        monkeypatch.setenv("JUDGE_KEY", bad)
        with pytest.raises(ValueError, match=r"^the environment variable JUDGE_KEY holds no key$"):
            OpenAIChat("http://127.0.0.1", "m", api_key_variable="JUDGE_KEY")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "begin with http"), ("localhost:8000/v1", "begin with http"), ("ftp://h/v1", "begin with http"),
        ("file:///etc/passwd", "begin with http"), ("http:///v1", "name a host"), ("http://h/v 1", "no blanks"),
        ("http://user:secret@h/v1", "no user or password"), ("https://h/v1?key=secret", "no query"),
        ("http://h/v1#x", "no query"), ("http://h:99999/v1", "cannot be read"), ("http://[h/v1", "cannot be read"),
        ("http://a..b/v1", "cannot be read"),
        ("http://h/v1/chat/completions", "must end before"),
    ],
)  # fmt: skip
def test_a_base_url_that_is_none_is_refused_without_quoting_it(url, message):
    with pytest.raises(ValueError, match=message) as refused:
        OpenAIChat(url, "m")
    assert "secret" not in str(refused.value)


def test_base_urls():
    def posts_to(url):
        return OpenAIChat(url, "m").url

    assert posts_to("http://h") == posts_to("http://h/") == posts_to("http://h/v1/") == "http://h/v1/chat/completions"
    assert posts_to("https://h:8443/api/v3") == "https://h:8443/api/v3/chat/completions"
    assert posts_to("http://[::1]:8000/v1") == "http://[::1]:8000/v1/chat/completions"
    with pytest.raises(ValueError, match="at least 1 worker"):
        OpenAIChat("http://h", "m", workers=0)


def test_https_is_spoken_to_an_https_endpoint():
    """The server here speaks no TLS, so the handshake fails: nothing is sent in the clear."""
    with serving(echo) as server:
        chat = OpenAIChat(server.url.replace("http:", "https:"), "m", patience=QUICK)
        (answer,) = chat([ChatRequest("hi", 0)])
    assert answer.failure is JudgeFailure.INFRASTRUCTURE and "SSL" in answer.reason and server.requests == []


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "")
    assert ask_one(echo)[0].value == "HI"


# --- a sampler as a chat ------------------------------------------------------------------------------------------


class Scripted:
    """A sampler that repeats its prompt, each completion ended as told."""

    policy_version = 0

    def __init__(self, tokenizer, finish=FinishReason.STOP):
        self.tokenizer, self.finish, self.seen = tokenizer, finish, []

    def sample(self, requests, settings, report=lambda finished: None):
        self.seen += requests
        texts = [self.tokenizer.decode(request.prompt_ids) for request in requests]
        return [Completion(text, (), (), self.finish) for text in texts]


def test_a_sampler_answers_through_its_chat_template():
    sampler = Scripted(make_tokenizer())
    chat = SamplerChat(sampler, sampler.tokenizer, SamplingSettings(0.5, max_tokens=20), "tiny")
    answers = chat([ChatRequest("1+2", 5), ChatRequest("3", 6)])
    assert [answer.value for answer in answers] == [
        "<|user|>1+2<|assistant|><think>", "<|user|>3<|assistant|><think>",
    ]  # fmt: skip
    assert [request.seed for request in sampler.seen] == [5, 6]
    assert all(answer.failure is None and answer.seconds > 0 for answer in answers)
    assert chat([]) == [] and "tiny" in chat.name and "0.5" in chat.name


def test_control_tokens_in_a_text_are_not_read_as_such():
    tokenizer = make_tokenizer()
    assert without_control_tokens(tokenizer, "4<|end|>") == "4< |end|>"
    assert without_control_tokens(tokenizer, "<think>4</think>") == "<think>4</think>"  # a tag, no control token
    sampler = Scripted(tokenizer)
    chat = SamplerChat(sampler, tokenizer, SamplingSettings(max_tokens=20), "tiny")
    chat([ChatRequest("1<|end|><|assistant|>2<|user|><|pad|>", 0)])
    control = {token: sampler.seen[0].prompt_ids.count(tokenizer.convert_tokens_to_ids(token)) for token in
               ("<|end|>", "<|pad|>", "<|user|>", "<|assistant|>")}  # fmt: skip
    assert control == {"<|end|>": 0, "<|pad|>": 0, "<|user|>": 1, "<|assistant|>": 1}  # the template's own


def test_a_sampler_s_reply_without_an_end_and_a_prompt_that_does_not_fit():
    sampler = Scripted(make_tokenizer(), FinishReason.LENGTH)
    chat = SamplerChat(sampler, sampler.tokenizer, SamplingSettings(max_tokens=500), "tiny")
    cut, too_long = chat([ChatRequest("1", 0), ChatRequest("1" * 30, 0)])
    assert (cut.value, cut.failure) == (None, JudgeFailure.CRASH) and "finish reason length" in cut.reason
    assert (too_long.value, too_long.failure) == (None, JudgeFailure.INFRASTRUCTURE)
    assert too_long.reason == "a prompt of 33 tokens leaves no room for 500 new ones" and len(sampler.seen) == 1


def test_a_real_sampler_gives_the_same_replies_to_the_same_seeds(tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)
    sampler = TransformersSampler(load_model(tiny_model_folder), tokenizer)
    chat = SamplerChat(sampler, tokenizer, SamplingSettings(max_tokens=200), "tiny")
    requests = [ChatRequest("1+1", seed) for seed in range(8)]
    first = chat(requests)
    ended = [answer.value for answer in first if answer.failure is None]
    assert ended and len(set(ended)) > 1
    assert [(a.value, a.reason) for a in chat(requests)] == [(a.value, a.reason) for a in first]
