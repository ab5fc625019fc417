"""On-policy distillation from a teacher behind vLLM servers, played by a script; the real one is marked `engines`."""

from __future__ import annotations

import json
import math
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.on_policy import configured_stop_ids
from distill.teacher_server import SharedScore, TeacherServers
from recipes.console import PlainReport
from recipes.loader import RecipeError
from recipes.runner import StageFailed, run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.policy import load_model, load_tokenizer, save_model
from rl.ranks import ALONE
from rl.rows import TrainingRow
from rl.runs import read_lines
from rl.samplers.base import StaleEngine
from rl.samplers.openai import Patience
from rl.samplers.vllm_http import ServerError
from rl.tasks.tiny_models import make_model, make_tokenizer
from tests.test_vllm_server import Handler, Played

QUICK = Patience(timeout=5, tries=3, first_wait=0.01, longest_wait=0.05)


class Teaching(Handler):
    """Scores with the model of a folder, as vLLM does."""

    server: Teacher  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        if self.path == "/v1/models":
            named = {"id": self.server.served_as, "root": str(self.server.folder), "max_model_len": 64}
            self.send({"data": [named]})
        else:
            super().do_GET()

    def play(self, body):
        assert self.path == "/v1/completions" and body["model"] == self.server.served_as
        assert (body["temperature"], body["prompt_logprobs"], body["max_tokens"]) == (1.0, 0, 1)
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            logprobs = self.server.model(ids).logits[0].log_softmax(-1)
        given: list[Any] = [None]
        for t, token in enumerate(body["prompt"][1:]):
            given.append({str(token): {"logprob": logprobs[t, token].item(), "rank": 1, "decoded_token": "?"}})
        self.send({"choices": [{"text": "", "prompt_logprobs": given}]})


class Teacher(Played):
    """A server with the model of a folder, served under a name."""

    def __init__(self, folder, served_as):
        super().__init__(eos=0)
        self.RequestHandlerClass = Teaching
        self.folder, self.served_as, self.model = folder, served_as, load_model(folder)


@contextmanager
def teaching(folder, served_as="teacher"):
    server = Teacher(folder, served_as)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    tokenizer = make_tokenizer()
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_model(make_model(hidden=32, layers=1, heads=2, tokenizer=tokenizer, seed=7), tokenizer, folder)
    return folder


@pytest.fixture
def server(teacher_folder):
    with teaching(teacher_folder) as server:
        yield server


def scores_of(server, folder, **options):
    return TeacherServers(server.url, str(folder), patience=QUICK, **options)


def rows_for(count):
    return [TrainingRow((3, 4 + i % 5), (5, 6 + i % 3, *range(7, 7 + i % 4)), (), 0.0, "p", i) for i in range(count)]


def own_scores(folder, rows):
    model, found = load_model(folder), []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(logprobs.gather(-1, torch.tensor(row.token_ids).unsqueeze(-1)).squeeze(-1).tolist())
    return found


def test_scores_are_the_teachers_in_order_however_they_come(server, teacher_folder):
    server.script = lambda handler, path, body, number: time.sleep(0.02 * (number % 3 == 0))
    score = scores_of(server, teacher_folder, connections=4)
    rows = rows_for(23)
    for found, expected in zip(score(rows), own_scores(teacher_folder, rows), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    assert score([]) == []
    assert SharedScore(score, ALONE)(rows[:2]) == score(rows[:2])


def test_several_servers_share_the_rows(teacher_folder):
    with teaching(teacher_folder) as one, teaching(teacher_folder) as two:
        score = TeacherServers((one.url, two.url), str(teacher_folder), patience=QUICK, connections=2)
        rows = rows_for(9)
        for found, expected in zip(score(rows), own_scores(teacher_folder, rows), strict=True):
            assert found == pytest.approx(expected, abs=1e-6)
        assert len(one.posts) + len(two.posts) == 9 and min(len(one.posts), len(two.posts)) >= 4


def test_a_broken_connection_is_asked_again_and_a_dead_server_named(server, teacher_folder):
    server.script = lambda handler, path, body, number: handler.drop() if number in (1, 4) else False
    assert len(scores_of(server, teacher_folder, connections=2)(rows_for(6))) == 6
    server.script = lambda handler, path, body, number: handler.drop()
    with pytest.raises(ServerError, match=r"cannot be reached or broke off: .*\(3 tries\)"):
        scores_of(server, teacher_folder, connections=2)(rows_for(6))


def test_a_server_with_another_model_is_refused(server, teacher_folder, tiny_model_folder):
    with pytest.raises(ServerError, match=r"serves teacher, not the teacher .*untrained: start it with the teacher"):
        scores_of(server, tiny_model_folder)
    with pytest.raises(ServerError, match="serves teacher, not the teacher other"):
        scores_of(server, teacher_folder, served_as="other")
    assert scores_of(server, tiny_model_folder, served_as="teacher").servers[0].model == "teacher"
    assert scores_of(server, str(teacher_folder) + "/").servers[0].max_model_len == 64  # one folder, however written


def test_a_restarted_server_is_found_out(server, teacher_folder):
    score = scores_of(server, teacher_folder)
    assert score(rows_for(1))
    server.version = "another"
    with pytest.raises(StaleEngine, match="it was restarted, or somebody else has changed them"):
        score(rows_for(1))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"choices": []}, "holds no prompt_logprobs of the tokens sent"),
        ({"choices": [{"prompt_logprobs": [None, {"4": {"logprob": -1}}]}]}, "holds no prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": [None, {}, {"9": {"logprob": -1}}, {}]}]}, "holds no prompt_logprobs"),
        (
            {"choices": [{"prompt_logprobs": [None, {}, {"5": {"logprob": 2.5}}, {"6": {"logprob": -1.0}}]}]},
            r"2\.5 is no log-prob: start it without --logprobs-mode raw_logits",
        ),
    ],
)
def test_replies_that_are_none(server, teacher_folder, reply, message):
    server.script = lambda handler, path, body, number: handler.send(reply) or True
    with pytest.raises(ServerError, match=message):
        scores_of(server, teacher_folder)([TrainingRow((3, 4), (5, 6), (), 0.0, "p")])


def test_a_row_that_is_longer_than_the_servers_context(server, teacher_folder):
    rows = [TrainingRow((3,), tuple(range(3, 11)) * 8, (), 0.0, "long", 2)]
    with pytest.raises(ValueError, match=r"row long\[2\] has 65 tokens and the teacher must draw one more.*of 64"):
        scores_of(server, teacher_folder)(rows)
    with pytest.raises(ValueError, match="at least 1 connection, got 0"):
        scores_of(server, teacher_folder, connections=0)


def test_stop_ids_without_weights(teacher_folder, tmp_path):
    tokenizer = load_tokenizer(teacher_folder)
    assert configured_stop_ids(str(teacher_folder), tokenizer) == (tokenizer.eos_token_id,)
    save_model(make_model(32, 1, 2, make_tokenizer(), seed=0), tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokenizer.eos_token_id]}))
    assert configured_stop_ids(str(tmp_path), tokenizer) == tuple(dict.fromkeys((2, tokenizer.eos_token_id)))
    (tmp_path / "generation_config.json").unlink()
    assert tokenizer.eos_token_id in configured_stop_ids(str(tmp_path), tokenizer)


# --- in a recipe ------------------------------------------------------------------------------------------------------

RECIPE = """name: served
problems: {source: tiny, levels: [2, 3], train: 32, dev: 4, test: 4}
sampling: {max_tokens: 12}
stages:
  student: {method: on_policy, model: %s, teacher: %s, steps: %d, problems_per_step: 4, learning_rate: 3.0e-3%s}
"""


def recipe_of(folder: Path, student, teacher, keys="", steps=3):
    folder.mkdir(exist_ok=True)
    path = folder / "served.yaml"
    path.write_text(RECIPE % (student, teacher, steps, keys))
    return load_recipe(path)


def trained(recipe, root):
    (result,) = run_recipe(recipe, root=root, methods=METHODS, report=PlainReport())
    return read_lines(result.folder / "metrics.jsonl")


def test_a_served_teacher_teaches_what_a_loaded_one_does(tmp_path, tiny_model_folder, teacher_folder, server):
    loaded = trained(recipe_of(tmp_path / "a", tiny_model_folder, teacher_folder), tmp_path / "loaded")
    keys = ', teacher_server: {url: "%s"}' % server.url  # noqa: UP031
    served = trained(recipe_of(tmp_path / "b", tiny_model_folder, teacher_folder, keys), tmp_path / "served")
    assert len(server.posts) == 3 * 4 * 4
    for name in ("reverse_kl", "loss", "grad_norm"):
        assert [line[name] for line in served] == pytest.approx([line[name] for line in loaded], rel=1e-3, abs=1e-5)


def test_a_server_that_is_gone_ends_the_stage_by_name(tmp_path, tiny_model_folder, teacher_folder):
    with teaching(teacher_folder) as server:
        url = server.url
    recipe = recipe_of(tmp_path, tiny_model_folder, teacher_folder, ', teacher_server: {url: "%s"}' % url)  # noqa: UP031
    with pytest.raises(StageFailed, match=f"{url} cannot be reached"):
        trained(recipe, tmp_path / "runs")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ', temperature: 0.6, teacher_server: {url: "http://127.0.0.1:1"}',
            r"teacher_server: a server scores at temperature 1, and the student would sample at 0\.6",
        ),
        (', teacher_server: {url: "http://127.0.0.1:1/v1"}', "is its root, without /v1"),
        (', teacher_server: {url: "http://gpu7:8000"}', "gpu7:8000 is not on this machine: whoever reaches it"),
        (", teacher_server: {url: []}", "name at least one server"),
    ],
)
def test_what_a_stage_may_not_be_told(tmp_path, tiny_model_folder, teacher_folder, keys, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, tiny_model_folder, teacher_folder, keys)


def test_what_is_watched_stops_the_student(tmp_path, tiny_model_folder, teacher_folder):
    """Random models have no thoughts worth the name: with a limit of 0 the first window is an alarm."""
    keys = ", collapse: {window: 2, empty_think: 0.0, accuracy_margin: null}"
    lines = trained(recipe_of(tmp_path, tiny_model_folder, teacher_folder, keys, steps=4), tmp_path / "runs")
    assert len(lines) == 2 and lines[-1]["alarms"] >= 1 and not math.isnan(lines[-1]["reverse_kl"])
