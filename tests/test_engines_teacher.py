"""A teacher behind a real vLLM server on a CPU: its scores are those of the loaded teacher, and it teaches the same."""

from __future__ import annotations

import pytest

from distill.teacher_server import TeacherServers
from recipes.console import PlainReport
from recipes.runner import run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.learner import Learner, OptimSettings
from rl.objectives import dapo
from rl.policy import PolicyModel, load_model, load_tokenizer, save_model
from rl.rows import TrainingRow
from rl.runs import read_lines
from rl.samplers.base import SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.tasks.tiny_models import make_model, make_tokenizer
from tests.engine_world import MODEL, requests_for
from tests.test_engines_server import PATIENCE, url  # noqa: F401

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

RECIPE = """name: served
problems: {source: tiny, levels: [2, 3], train: 32, dev: 4, test: 4}
sampling: {max_tokens: 16}
stages:
  student: {method: on_policy, model: %s, teacher: %s, steps: 3, problems_per_step: 4%s}
"""


def test_scores_are_the_loaded_teachers(url):  # noqa: F811
    tokenizer, model = load_tokenizer(MODEL), load_model(MODEL)
    requests = requests_for(tokenizer, 8, samples=2)
    drawn = TransformersSampler(model, tokenizer).sample(requests, SamplingSettings(max_tokens=60))
    rows = [
        TrainingRow(request.prompt_ids, completion.token_ids, completion.sampler_logprobs, 0.0, "p", i)
        for i, (request, completion) in enumerate(zip(requests, drawn, strict=True))
    ]
    policy = PolicyModel(model)
    learner = Learner(policy, None, dapo(), OptimSettings(1e-3), 1.0)  # pyright: ignore[reportArgumentType]
    score = TeacherServers(url, MODEL, patience=PATIENCE)
    for found, expected in zip(score(rows), learner.logprobs(policy, rows), strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_it_teaches_what_a_loaded_teacher_does(url, tmp_path):  # noqa: F811
    tokenizer = make_tokenizer()
    save_model(make_model(32, 1, 2, tokenizer, seed=0), tokenizer, tmp_path / "student")
    found = []
    for keys in ("", ', teacher_server: {url: "%s"}' % url):  # noqa: UP031
        (tmp_path / "served.yaml").write_text(RECIPE % (tmp_path / "student", MODEL, keys))
        recipe = load_recipe(tmp_path / "served.yaml")
        (result,) = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
        found.append([line["reverse_kl"] for line in read_lines(result.folder / "metrics.jsonl")])
    assert found[1] == pytest.approx(found[0], rel=1e-3) and len(found[1]) == 3
