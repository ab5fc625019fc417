"""`sampling.server`: its keys, and recipes that are drawn on a server over HTTP, whose model is the tiny one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import cli
from recipes.console import PlainReport
from recipes.engines import EngineChoice, choose
from recipes.runner import StageFailed, run_recipe
from recipes.schema import RecipeError, load_recipe
from recipes.servers import Nccl, ServerChoice, serve_line
from recipes.stages import METHODS
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.pool import Pool
from rl.ranks import Ranks
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.openai import Patience
from rl.samplers.shared import FromFirst
from rl.samplers.synced import StaleEngine, policy_scores
from rl.samplers.transformers import TransformersSampler
from tests.test_vllm_server import Handler, Played

URL = "http://127.0.0.1:8000"
MODEL = Path(__file__).resolve().parents[1] / "recipes" / "models" / "tiny-base"


# --- keys and options -------------------------------------------------------------------------------------------------

RECIPE = """\
name: served
problems: {{source: tiny, train: 16, dev: 2, test: 2}}
sampling: {{max_tokens: 8, engine: {engine}{sampling}}}
stages:
{stages}
"""
POOL = "  pool: {{method: sample, model: {model}, samples: 2}}"


def load(folder: Path, model: object, sampling: str = "", stages: str = POOL, engine: str = "vllm") -> Any:
    path = folder / "served.yaml"
    path.write_text(RECIPE.format(engine=engine, sampling=sampling, stages=stages.format(model=model)))
    return load_recipe(path)


def test_a_recipe_names_servers(tmp_path, tiny_model_folder):
    one = load(tmp_path, tiny_model_folder, f", server: {{url: '{URL}/'}}")
    assert one.sampling.choice == EngineChoice("vllm", server=ServerChoice((URL,)))
    two = load(
        tmp_path, tiny_model_folder,
        f", vllm: {{request: {{min_p: 0.1}}}}, server: {{url: ['{URL}', 'https://gpu7:443'], api_key_variable: KEY, "
        "nccl: {port: 3000}, tolerance: 1e-4, connections: 8}",
    )  # fmt: skip
    servers = ServerChoice((URL, "https://gpu7:443"), "KEY", None, Nccl("127.0.0.1", 3000), 1e-4, 8)
    assert two.sampling.choice == EngineChoice("vllm", request={"min_p": 0.1}, server=servers)
    plain = load(tmp_path, tiny_model_folder)
    stage = one.stages["pool"]
    elsewhere = load(tmp_path, tiny_model_folder, ", server: {url: 'http://localhost:9'}")
    assert one.identity(stage) == elsewhere.identity(stage) != plain.identity(stage)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (", replicas: 2, server: {url: 'URL'}", "replicas: .*list their URLs in server.url"),
        (", vllm: {engine: {max_num_seqs: 8}}, server: {url: 'URL'}", "max_num_seqs .*give it to vllm serve"),
        (", vllm: {request: {seed: 8}}, server: {url: 'URL'}", "is set by the sampler"),
        (", server: {url: '127.0.0.1:8000'}", "url.* is http://host:port"),
        (", server: {url: 'URL/v1'}", "url.* its root, without /v1"),
        (", server: {url: []}", "at least one server"),
        (", server: {url: ['URL', 'URL/']}", "each once"),
        (", server: {url: 8000}", "url"),
        (", server: {url: 'http://gpu7:8000', folder: /shared}", "api_key_variable.* is not on this machine"),
        (", server: {url: 'http://gpu7:8000', api_key_variable: KEY}", "folder.* is not on this machine"),
        (", server: {url: 'URL', folder: /shared, nccl: {}}", "remove one of the two"),
        (", server: {url: 'URL', nccl: {port: 80}}", "port"),
        (", server: {url: 'URL', tolerance: 0}", "tolerance"),
        (", server: {}", "url"),
    ],
)
def test_what_is_wrong_with_the_keys_is_said_at_once(tmp_path, tiny_model_folder, sampling, message):
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, tiny_model_folder, sampling.replace("URL", URL))


def test_another_engine_does_not_draw_on_a_server(tmp_path, tiny_model_folder):
    with pytest.raises(RecipeError, match="the engine is transformers: write vllm"):
        load(tmp_path, tiny_model_folder, f", server: {{url: '{URL}'}}", engine="transformers")


def test_a_command_line_names_a_server():
    assert choose("vllm", 256, 1, (), URL) == EngineChoice("vllm", server=ServerChoice((URL,)))
    for arguments, message in (
        (("transformers", 256, 1, ()), "--server with --engine: .*write vllm"),
        (("vllm", 256, 2, ()), "--server with --replicas: "),
        (("vllm", 256, 1, ["max_num_seqs=8"]), "--server with --vllm: max_num_seqs"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(*arguments, URL)


def test_the_line_that_starts_a_server(tmp_path):
    choice = ServerChoice((URL,))
    line = "VLLM_SERVER_DEV_MODE=1 vllm serve org/name --host 127.0.0.1 --port 8000 --logprobs-mode processed_logprobs"
    assert serve_line(choice, URL, "org/name") == line
    folder = tmp_path / "a model"
    folder.mkdir()
    nccl = serve_line(ServerChoice((URL,), nccl=Nccl()), "http://localhost", str(folder))
    assert f"vllm serve '{folder}' --host localhost --port 8000" in nccl
    assert nccl.endswith("""--weight-transfer-config '{"backend": "nccl"}'""")


# --- a server with a model --------------------------------------------------------------------------------------------


class ServedHandler(Handler):
    server: Served  # pyright: ignore[reportIncompatibleVariableOverride]

    def play(self, body):
        if self.path == "/v1/completions" and "prompt_logprobs" in body:
            prompt = body["prompt"]
            with self.server.model_lock:
                (scores,) = policy_scores(self.server.policy, [(tuple(prompt[:1]), tuple(prompt[1:]))])
            given = [{str(token): {"logprob": score}} for token, score in zip(prompt[1:], scores, strict=True)]
            self.send({"choices": [{"prompt_logprobs": [None, *given]}]})
        elif self.path == "/v1/completions":
            settings = SamplingSettings(body["temperature"], body["top_p"], body["max_tokens"])
            with self.server.model_lock:
                (drawn,) = self.server.sampler.sample([SampleRequest(tuple(body["prompt"]), body["seed"])], settings)
            self.complete(body, list(drawn.token_ids), list(drawn.sampler_logprobs), str(drawn.finish_reason))
        else:
            if self.path == "/collective_rpc":
                self.server.take(Path(body["kwargs"]["weights_path"]))
            super().play(body)


class Served(Played):
    """A server of a real model, which begins with other weights than those of its folder."""

    def __init__(self, folder):
        tokenizer = load_tokenizer(folder)
        super().__init__(tokenizer.eos_token_id)
        self.RequestHandlerClass = ServedHandler
        self.model_lock, self.handed, self.drops = threading.Lock(), [], False
        self.policy = PolicyModel(load_model(folder))
        self.sampler = TransformersSampler(self.policy.model, tokenizer)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def take(self, folder):
        self.handed.append(folder.name)
        weights = {name: value for file in sorted(folder.iterdir()) for name, value in load_file(file).items()}
        if not self.drops:
            self.policy.model.load_state_dict(weights)


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    server = Served(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(tiny_model_folder) -> Iterator[Served]:
    with serving(tiny_model_folder) as server:
        yield server


STAGES = """\
  pool: {{method: sample, model: {model}, samples: 1}}
  race: {{method: race, model: {model}, samples: 2, count: 2, max_tokens: 60}}
  teacher:
    {{method: grpo, model: {model}, steps: 2, problems_per_step: 4, group_size: 4, learning_rate: 1e-3, max_tokens: 60}}
  after: {{method: sample, model: teacher, samples: 1}}
"""


def test_pools_races_and_rl_are_drawn_on_the_server(tmp_path):
    with serving(MODEL) as server:
        memory = tmp_path / "memory"
        memory.mkdir()
        keys = f", server: {{url: '{server.url}', folder: {memory}, tolerance: 1e-4, connections: 4}}"
        recipe = load(tmp_path, MODEL, keys, STAGES)
        results = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
        folders = {result.name: result.folder for result in results}
        # Each stage gives the server its weights, RL again after an update; no file of them is left.
        assert server.handed == [f"hand-over-{n}" for n in (0, 0, 0, 1, 0)]
        assert list(memory.iterdir()) == []
        lines = [json.loads(line) for line in (folders["teacher"] / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 2
        drawn = {name: [c for _, _, c in Pool.open(folders[name] / "pool").samples()] for name in ("pool", "after")}
        for name, model in (("pool", MODEL), ("after", folders["teacher"] / "model")):
            pool, policy = Pool.open(folders[name] / "pool"), PolicyModel(load_model(str(model)))
            assert len(pool) == 16 and pool.check() == ()
            for _, prompt_ids, completion in list(pool.in_order())[:8]:
                (expected,) = policy_scores(policy, [(prompt_ids, completion.token_ids)])
                assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-4)
        assert [c.sampler_logprobs for c in drawn["pool"]] != [c.sampler_logprobs for c in drawn["after"]]


def test_a_server_that_does_not_take_the_weights_ends_the_stage(tmp_path, tiny_model_folder, server):
    server.drops = True
    recipe = load(tmp_path, tiny_model_folder, f", server: {{url: '{server.url}'}}")
    with pytest.raises(StageFailed) as caught:
        run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    assert isinstance(caught.value.__cause__, StaleEngine)


def test_a_server_that_is_not_there_is_named_with_the_line_that_starts_one(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(Patience, "wait", lambda *_: 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["sample", tiny_model_folder, "tiny", "--out", tmp_path / "pool", "--count", 2, "--engine", "vllm"]
    arguments += ["--server", f"http://127.0.0.1:{port}"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    said = " ".join(done.output.split())
    assert done.exit_code == 4
    assert f"http://127.0.0.1:{port} cannot be reached" in said
    assert f"VLLM_SERVER_DEV_MODE=1 vllm serve {tiny_model_folder} --host 127.0.0.1 --port {port}" in said


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_the_first_rank_draws_for_all(tiny_model_folder):
    """Two ranks that are threads: the second has no sampler, both get what the first has drawn."""
    said, barrier = [None, None], threading.Barrier(2, timeout=60)

    class Talking(Ranks):
        def _exchange(self, value):
            said[self.rank] = json.loads(json.dumps(value))
            barrier.wait()
            heard = list(said)
            barrier.wait()
            return heard

    tokenizer, policy = load_tokenizer(tiny_model_folder), PolicyModel(load_model(tiny_model_folder))
    own = TransformersSampler(policy.model, tokenizer)
    requests, settings = [SampleRequest((3, 4), seed) for seed in range(3)], SamplingSettings(max_tokens=6)
    found: dict[int, list[Any]] = {}

    def draw(rank):
        sampler = FromFirst(None if rank else own, Talking(rank, 2), policy)
        sampler.policy_version = 5
        found[rank] = [sampler.sample(asked, settings) for asked in (requests, requests[:1])]

    threads = [threading.Thread(target=draw, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and [len(drawn) for drawn in found[0]] == [3, 1]
    assert found[0][0] == own.sample(requests, settings) and found[0][0][0].policy_version == 5
