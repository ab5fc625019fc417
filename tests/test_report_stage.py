"""recipes/frontier_stage.py: what the page is told of a recipe's run, with arms that are named otherwise than the stage
that made them."""

from __future__ import annotations

import json
import re

import pytest

from recipes.console import PlainReport
from recipes.frontier_stage import recipe_hash
from recipes.runner import run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.runs import file_hash, read_json

RECIPE = """name: arms
problems: {source: tiny, levels: [2], train: 8, dev: 2, test: 4}
sampling: {max_tokens: 16}
stages:
  teacher:
    method: grpo
    model: %(model)s
    steps: 2
    problems_per_step: 2
    group_size: 2
    learning_rate: 1.0e-2
    eval_every: 1
    keep_models: true
  frontier:
    method: frontier
    parent: long
    samples: 2
    budgets: [4, 16]
    arms: {start: %(model)s, early: teacher@1, long: teacher}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model_folder):
    path = tmp_path_factory.mktemp("recipe") / "arms.yaml"
    path.write_text(RECIPE % {"model": tiny_model_folder})
    return load_recipe(path)


@pytest.fixture(scope="module")
def folders(recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    results = run_recipe(recipe, root=root, methods=METHODS, report=PlainReport(line=lambda text: None))
    return {result.name: result.folder for result in results}


@pytest.fixture(scope="module")
def page(folders):
    return (folders["frontier"] / "report.html").read_text(encoding="utf-8")


def provenance_of(page, arm):
    """Name -> value, of an arm's entry in the section."""
    (entry,) = re.findall(rf"<details><summary>{arm}</summary>(.*?)</details>", page)
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", entry))


def test_a_training_curve_is_of_the_arms_that_its_stage_made(page):
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [arm["name"] for arm in data["arms"]] == ["start", "early", "long"]
    assert [arm["family"] for arm in data["arms"]] == ["start", "grpo", "grpo"]
    lines = [line for panel in data["panels"] for line in panel["lines"]]
    assert {line["name"] for line in lines} == {"teacher"}
    assert all(line["arms"] == [1, 2] for line in lines)


def test_provenance_is_of_the_very_model(page, folders, recipe):
    start, early, long = (provenance_of(page, arm) for arm in ("start", "early", "long"))
    for shown, place in ((early, "models/1"), (long, "model")):
        assert shown["stage"] == folders["teacher"].name
        assert shown["method"] == "grpo"
        file = f"{place}/model.safetensors"
        weights = {name: value for name, value in shown.items() if name.endswith(".safetensors")}
        assert weights == {f"sha256 of {file}": file_hash(folders["teacher"] / file)}
    assert early["model of the arm"] == "teacher@1"
    assert "stage" not in start
    for shown in (start, early, long):
        assert shown["verifier"] == "tiny-1"
        assert shown["sha256 of the recipe"] == recipe_hash(recipe)
        pool = read_json(folders["frontier.long"] / "pool" / "pool.json")
        assert shown["fingerprint of the problems"] == pool["problems"]


def test_the_caption_names_the_limits_of_the_recipe(page):
    assert "The area under the curve in the table is over 2 limits: 4, 16 tokens." in page


def test_a_recipe_has_the_hash_of_what_it_means(recipe, tmp_path, tiny_model_folder):
    assert re.fullmatch(r"[0-9a-f]{64}", recipe_hash(recipe))
    other = tmp_path / "other.yaml"
    other.write_text("# said otherwise\n" + RECIPE % {"model": tiny_model_folder} + "    count: null\n")
    assert recipe_hash(load_recipe(other)) == recipe_hash(recipe)
    assert recipe_hash(load_recipe(other, ["frontier.samples=3"])) != recipe_hash(recipe)
