"""`vllm serve`, really started on a CPU: what it draws, streams that are cut, weights handed over by files."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from recipes.console import PlainReport
from recipes.runner import run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.pool import Pool
from rl.repetition import RepetitionRule
from rl.samplers.base import SamplingSettings
from rl.samplers.openai import Patience
from rl.samplers.synced import StaleEngine, SyncedSampler, agreement, policy_scores, policy_weights
from rl.samplers.vllm_http import Line, ServerError, open_servers
from rl.samplers.vllm_server import ServerEngine, file_hand_over, nccl_hand_over
from rl.types import FinishReason
from tests.engine_world import MODEL, requests_for, trainer_distribution

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

START_SECONDS = 240
PATIENCE = Patience(timeout=120)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server in a process group of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` itself looks for a package named vllm, which the CPU build's is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--logprobs-mode", "processed_logprobs", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(2**28), "--disable-uvicorn-access-log"]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=os.environ | quiet, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        (there,) = open_servers(url, None, Patience(timeout=10, tries=1))
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                Line(there).status("/health")
                break
            except ServerError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # the whole group is gone, as it should be
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)


@pytest.fixture
def engine(url, tokenizer, tmp_path):
    """The server with the weights of the model's folder, however the test before left it."""
    engine = ServerEngine(url, tokenizer, file_hand_over(url, tmp_path, patience=PATIENCE), patience=PATIENCE)
    engine.load_weights(policy_weights(PolicyModel(load_model(MODEL))), 0)
    return engine


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.9), (0.01, 1.0)])
def test_tokens_and_log_probs_are_the_trainers(engine, tokenizer, temperature, top_p):
    model = load_model(MODEL)
    requests = requests_for(tokenizer, 8, samples=2)
    drawn = engine.sample(requests, SamplingSettings(temperature, top_p, 60))
    for request, completion in zip(requests, drawn, strict=True):
        expected = trainer_distribution(model, request, completion, temperature, top_p)
        ids = torch.tensor(completion.token_ids)
        given = expected.gather(-1, ids.unsqueeze(-1)).squeeze(-1).tolist()
        assert completion.sampler_logprobs == pytest.approx(given, abs=1e-4 / min(temperature, 1.0))
        ended = completion.token_ids[-1] == tokenizer.eos_token_id
        assert ended == (completion.finish_reason is FinishReason.STOP) and completion.policy_version == 0
        assert completion.text == tokenizer.decode(completion.token_ids[:-1] if ended else completion.token_ids)
        if temperature < 0.1:  # nearly greedy: the tokens are the trainer's own
            assert torch.equal(expected.argmax(-1), ids)
    seen = {completion.token_ids for completion in drawn}
    assert len(seen) > 8 or temperature < 1  # the samples of a prompt have seeds of their own


def test_streams_are_cut_and_the_rest_is_what_it_was(engine, tokenizer):
    requests, settings = requests_for(tokenizer, 4, samples=2), SamplingSettings(max_tokens=60)
    whole = engine.sample(requests, settings)
    limits = [5, 0, 60, 60, 60, 60, 60, 60]
    found = dict(engine.stream(requests, settings, limits))
    assert sorted(found) == list(range(8))
    assert found[1].num_tokens == 0 and found[0].num_tokens == 5
    assert found[0].finish_reason is found[1].finish_reason is FinishReason.ABORTED
    for index, completion in found.items():
        assert whole[index].token_ids[: completion.num_tokens] == completion.token_ids
    stream = engine.stream(requests, settings)
    next(stream)
    stream.close()
    assert [c.token_ids for c in engine.sample(requests, settings)] == [c.token_ids for c in whole]


def test_settings_reach_the_server(engine, tokenizer):
    engine.request = {"allowed_token_ids": [7, tokenizer.eos_token_id]}
    rule = RepetitionRule(max_period=1, min_repeats=4, min_tokens=4)
    drawn = engine.sample(requests_for(tokenizer, 8), SamplingSettings(max_tokens=40, stop_repetition=rule))
    assert {token for c in drawn for token in c.token_ids} <= {7, tokenizer.eos_token_id}
    looped = [c for c in drawn if c.finish_reason is FinishReason.REPETITION]
    assert all(c.token_ids == (7, 7, 7, 7) for c in looped)
    engine.request = {"allowed_token_ids": [10**6]}
    with pytest.raises(ServerError, match=r"/v1/completions: HTTP 400: .*vocab"):
        engine.sample(requests_for(tokenizer, 1), SamplingSettings(max_tokens=4))


def test_sleeping_does_no_harm_without_sleep_mode(engine, tokenizer):
    requests, settings = requests_for(tokenizer, 2), SamplingSettings(max_tokens=20)
    before = engine.sample(requests, settings)
    engine.sleep()
    engine.wake_up()
    assert engine.sample(requests, settings) == before


# --- weights ----------------------------------------------------------------------------------------------------------


def moved(policy, size):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn_like(parameter))


@pytest.fixture
def synced(engine):
    policy = PolicyModel(load_model(MODEL, to_train=True))
    sampler = SyncedSampler(
        engine, lambda: policy_weights(policy), lambda rows: policy_scores(policy, rows), tolerance=1e-4
    )
    return sampler, policy


def test_weights_are_handed_over_and_carry_their_version(synced, tokenizer, tmp_path):
    sampler, policy = synced
    requests, settings = requests_for(tokenizer, 6), SamplingSettings(max_tokens=60)
    before = sampler.sample(requests, settings)
    assert sampler.agreement.policy_version == 0 and sampler.agreement.mean < 1e-5
    for version in (1, 2):
        moved(policy, 3e-3)
        sampler.policy_version = version
        after = sampler.sample(requests, settings)
        assert {c.policy_version for c in after} == {version}
        assert sampler.agreement.policy_version == version and sampler.agreement.mean < 1e-5
        rows = [(r.prompt_ids, c.token_ids) for r, c in zip(requests, after, strict=True)]
        drawn = agreement([list(c.sampler_logprobs) for c in after], policy_scores(policy, rows), version)
        assert drawn.mean <= 1e-4 and drawn.largest <= 1e-2
        assert [path.name for path in tmp_path.iterdir()] == [f"hand-over-{version}"]
    assert [c.sampler_logprobs for c in after] != [c.sampler_logprobs for c in before]
    (server,) = sampler.engine.servers
    assert server.order("/weight_info", method="GET")["weight_version"].startswith("2 of ")


@pytest.mark.parametrize(("size", "message"), [(1e-2, "holds other weights"), (1e-6, "did not arrive")])
def test_a_skipped_hand_over_is_caught_at_once(synced, tokenizer, size, message):
    sampler, policy = synced
    requests, settings = requests_for(tokenizer, 6), SamplingSettings(max_tokens=20)
    sampler.sample(requests, settings)
    sampler.engine.hand_over = lambda weights, version: None
    moved(policy, size)
    sampler.policy_version = 1
    for _ in range(2):  # and again, for whoever catches it
        with pytest.raises(StaleEngine, match=message):
            sampler.sample(requests, settings)


def test_weights_that_others_change_are_found_out(engine, tokenizer):
    (server,) = engine.servers
    server.order("/update_weight_version", {"new_version": "another's"})
    with pytest.raises(StaleEngine, match="another's"):
        engine.sample(requests_for(tokenizer, 1), SamplingSettings(max_tokens=4))


RECIPE = """\
name: served
problems: {{source: tiny, train: 16, dev: 2, test: 2}}
sampling: {{max_tokens: 60, engine: vllm, server: {{url: "{url}", tolerance: 1e-4}}}}
stages:
  teacher: {{method: grpo, model: {model}, steps: 2, problems_per_step: 4, group_size: 4, learning_rate: 1e-3}}
  pool: {{method: sample, model: teacher, samples: 2}}
"""


def test_a_recipe_is_drawn_on_the_server(url, tmp_path):
    path = tmp_path / "served.yaml"
    path.write_text(RECIPE.format(url=url, model=MODEL))
    results = run_recipe(load_recipe(path), root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    teacher, folder = (result.folder for result in results)
    assert len((teacher / "metrics.jsonl").read_text().splitlines()) == 2
    pool, policy = Pool.open(folder / "pool"), PolicyModel(load_model(str(teacher / "model")))
    assert len(pool) == 32 and pool.check() == ()
    for _, prompt_ids, completion in pool.in_order():
        (expected,) = policy_scores(policy, [(prompt_ids, completion.token_ids)])
        assert completion.sampler_logprobs == pytest.approx(expected, abs=1e-4)


class Recorder:
    """In place of vLLM's trainer side, which needs two GPUs."""

    def __init__(self, info, client, source):
        self.info, self.client, self.source, self.sent = info, client, source, []

    def send_weights(self):
        assert self.source is not None
        told = [(meta.name, meta.dtype, meta.shape) for meta in self.source.metadata()]
        assert told == [(name, value.dtype, tuple(value.shape)) for name, value in self.source]
        self.sent.append(told)


def test_what_vllms_trainer_side_is_given(url, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine  # pyright: ignore[reportMissingImports]

    made = []

    def trainer_init(info, *, client, source):
        made.append(Recorder(info, client, source))
        return made[-1]

    monkeypatch.setattr(nccl_engine.NCCLTrainerWeightTransferEngine, "trainer_init", trainer_init)
    hand_over = nccl_hand_over(url, 29600, patience=PATIENCE)
    for version in (1, 2):
        hand_over(((name, torch.ones(2, version)) for name in ("a", "b")), version)
    (engine,) = made  # one group, formed once
    info = engine.info
    assert (info.master_address, info.master_port, info.world_size, info.rank) == ("127.0.0.1", 29600, 2, 0)
    assert engine.sent == [[("a", torch.float32, (2, v)), ("b", torch.float32, (2, v))] for v in (1, 2)]
    assert engine.source is None and isinstance(engine.client, nccl_engine.VLLMWeightSyncClient)
