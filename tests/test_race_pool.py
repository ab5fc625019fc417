"""Races into a pool: the selection of drawing all, resumed after a kill, through a recipe."""

import json

import pytest

from long2short.race_pool import race_into_pool
from long2short.shortest import select_shortest
from recipes.console import PlainReport
from recipes.runner import run_recipe
from recipes.schema import RecipeError, load_recipe
from recipes.stages import METHODS
from rl.policy import load_model, load_tokenizer
from rl.pool import Pool, pool_address
from rl.rollout import sample_groups
from rl.samplers.base import SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny
from rl.types import FinishReason

MODEL = "recipes/models/tiny-base"
SETTINGS = SamplingSettings(max_tokens=100)
PROBLEMS = tiny.problems("train", 8)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def sampler(tokenizer):
    return TransformersSampler(load_model(MODEL), tokenizer)


def racing_pool(folder, tokenizer, racing=True):
    return Pool.open(folder, pool_address("m", PROBLEMS, tokenizer, SETTINGS, 3, racing=racing))


def test_the_selection_is_that_of_drawing_all(tmp_path, sampler, tokenizer):
    whole = sample_groups(sampler, tokenizer, PROBLEMS, tiny.TASK, 8, SETTINGS, 3)
    expected = select_shortest(whole, teacher="t", samples=8)
    pool = racing_pool(tmp_path / "pool", tokenizer)
    raced = race_into_pool(pool, sampler, tokenizer, PROBLEMS, tiny.TASK, 8, SETTINGS, 3, teacher="t")
    assert len(expected.traces) >= 4 and raced.traces == expected.traces
    drawn = {(problem, i): completion for problem, i, completion in pool.samples()}
    assert len(drawn) == 64
    assert sum(c.num_tokens for c in drawn.values()) < sum(sum(group.num_tokens) for group in whole)
    assert any(c.finish_reason is FinishReason.ABORTED for c in drawn.values())


def test_what_was_raced_is_not_raced_again(tmp_path, sampler, tokenizer, monkeypatch):
    monkeypatch.setattr("long2short.race_pool.RACE_SAMPLES", 16)  # two problems at a time
    seen = []

    def killed(done, total):
        seen.append(done)
        if done >= 32:
            raise KeyboardInterrupt

    arguments = (sampler, tokenizer, PROBLEMS, tiny.TASK, 8, SETTINGS, 3)
    with pytest.raises(KeyboardInterrupt):
        race_into_pool(racing_pool(tmp_path / "pool", tokenizer), *arguments, progress=killed)
    there = len(racing_pool(tmp_path / "pool", tokenizer))
    assert there in (16, 32)
    begun = []
    resumed = race_into_pool(
        racing_pool(tmp_path / "pool", tokenizer), *arguments, progress=lambda done, total: begun.append(done)
    )
    assert begun[0] == there
    whole = race_into_pool(racing_pool(tmp_path / "other", tokenizer), *arguments)
    assert resumed == whole


def test_a_plain_pool_is_refused(tmp_path, sampler, tokenizer):
    pool = racing_pool(tmp_path / "pool", tokenizer, racing=False)
    with pytest.raises(ValueError, match="plain pool"):
        race_into_pool(pool, sampler, tokenizer, PROBLEMS, tiny.TASK, 8, SETTINGS, 3)


RECIPE = """\
name: raced
problems: {{source: tiny, train: 6, dev: 2, test: 2}}
sampling: {{max_tokens: 60}}
stages:
  raced: {{method: race, model: {model}, samples: 4}}
  brief: {{method: sft, model: {model}, traces: raced, epochs: 1, batch_size: 4, max_length: 128}}
"""


def test_a_recipe_races_and_trains_on_the_winners(tmp_path, request):
    model = request.config.rootpath / MODEL
    path = tmp_path / "raced.yaml"
    path.write_text(RECIPE.format(model=model))
    recipe = load_recipe(str(path))
    assert recipe.part("long2short") == ["raced", "brief"]
    run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    (folder,) = (tmp_path / "runs" / "raced").glob("raced-*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["kept"] >= 1
    assert sum(summary["dropped"].values()) + summary["kept"] == 24
    (tmp_path / "bad.yaml").write_text(RECIPE.format(model=model).replace("samples: 4", "samples: 1"))
    with pytest.raises(RecipeError, match="samples"):
        load_recipe(str(tmp_path / "bad.yaml"))
