"""Models beside a stage's own: those of an RL run's evaluations, named STAGE@STEP. Kimi's length RL starts from one."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from recipes.console import PlainReport
from recipes.runner import StageFailed, plan_stages, run_recipe
from recipes.schema import RecipeError, load_recipe
from recipes.stages import COLLECTIVE, METHODS
from rl.faults import FaultRaised, reset_faults
from rl.runs import read_json

ROOT = Path(__file__).resolve().parents[1]
RECIPE = f"""
name: kept
seed: 2
problems: {{source: tiny, levels: [2], train: 20, dev: 4, test: 2}}
sampling: {{max_tokens: 24, batch_size: 32}}
stages:
  teacher:
    method: grpo
    model: {ROOT}/recipes/models/tiny-student
    steps: 5
    problems_per_step: 4
    group_size: 6
    learning_rate: 3.0e-4
    eval_every: 2
    eval_problems: 4
    save_every: 2
    keep_models: true
  start: {{method: select, candidates: [teacher@2, teacher@4, teacher], parent: teacher, rule: balance, samples: 1}}
  brief:
    method: length_rl
    model: start
    steps: 1
    problems_per_step: 2
    group_size: 2
    max_tokens: 12
    eval_every: 1
    length: {{weight: 0.3}}
  frontier: {{method: frontier, parent: teacher, samples: 1, arms: {{teacher: teacher, early: teacher@2}}}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "kept.yaml"
    path.write_text(RECIPE)
    return path


def run(path: Path, root: Path, targets: list[str] | None = None) -> dict[str, Path]:
    results = run_recipe(
        load_recipe(path), root=root, methods=METHODS, report=PlainReport(), targets=targets, collective=COLLECTIVE
    )
    return {result.name: result.folder for result in results}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_a_length_rl_starts_from_a_checkpoint_chosen_by_rule(recipe_file: Path, tmp_path: Path):
    folders = run(recipe_file, tmp_path / "runs")
    kept = digests(folders["teacher"] / "models")
    assert list(kept) == ["2/model.safetensors", "4/model.safetensors", "5/model.safetensors"]
    assert len(set(kept.values())) == 3 and kept["5/model.safetensors"] in digests(folders["teacher"]).values()
    chosen = read_json(folders["start"] / "summary.json")
    assert list(chosen["candidates"]) == ["teacher", "teacher@2", "teacher@4"]  # the file's keys are sorted
    source = {"teacher@2": "2", "teacher@4": "4", "teacher": "5"}[chosen["chosen"]]
    assert digests(folders["start"] / "model")["model.safetensors"] == kept[f"{source}/model.safetensors"]
    # The two arms are two models: their samples differ, and so do their addresses.
    pools = [read_json(folders[f"frontier.{arm}"] / "pool/pool.json") for arm in ("teacher", "early")]
    assert pools[0]["model"] != pools[1]["model"]
    manifest = read_json(folders["frontier.early"] / "manifest.json")
    assert manifest["inputs"]["model"].startswith("teacher@2 ")


def test_evaluations_have_the_recipes_limit_not_the_smaller_one_of_training(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file)
    assert recipe.stages["brief"].config.eval_max_tokens == 24
    longer = load_recipe(recipe_file, ["teacher.max_tokens=40"])
    assert longer.stages["teacher"].config.eval_max_tokens == 40
    assert load_recipe(recipe_file, ["brief.eval_max_tokens=30"]).stages["brief"].config.eval_max_tokens == 30
    # Without evaluations there is no such limit, and sampling.max_tokens changes no address.
    assert load_recipe(recipe_file, ["brief.eval_every=0"]).stages["brief"].config.eval_max_tokens is None
    # A limit read off a pool is at most the pool's.
    pooled = RECIPE.replace(
        "  brief:", "  pool: {method: sample, model: teacher, samples: 2, max_tokens: 96}\n  brief:"
    )
    recipe_file.write_text(pooled.replace("max_tokens: 12", "max_tokens: {percentile: 75, pool: pool}"))
    assert load_recipe(recipe_file).stages["brief"].config.eval_max_tokens == 96
    # What the stage evaluates at step 0 is its start, under the same limit and seed whatever it trains with.
    scores = []
    for limit in (12, 6):
        path = tmp_path / f"{limit}.yaml"
        path.write_text(RECIPE.replace("max_tokens: 12", f"max_tokens: {limit}"))
        scores.append(read_json(run(path, tmp_path / "runs", ["brief"])["brief"] / "summary.json")["dev"][0])
    assert scores[0] == scores[1] and scores[0]["mean_tokens"] > 6


@pytest.mark.parametrize("site", ["grpo.step:4", "grpo.model:1"])
def test_a_killed_run_keeps_the_same_models(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str
):
    whole = digests(run(recipe_file, tmp_path / "whole", ["teacher"])["teacher"])
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(StageFailed) as failed:
        run(recipe_file, tmp_path / "killed", ["teacher"])
    assert isinstance(failed.value.__cause__, FaultRaised)
    monkeypatch.delenv("REASON_FAULT")
    reset_faults()
    assert digests(run(recipe_file, tmp_path / "killed", ["teacher"])["teacher"]) == whole


def test_a_model_that_the_run_did_not_come_to_is_named(recipe_file: Path, tmp_path: Path):
    folder = run(recipe_file, tmp_path / "runs", ["teacher"])["teacher"]
    shutil.rmtree(folder / "models" / "4")  # as after an early stop
    with pytest.raises(StageFailed, match="stage teacher ended without the model teacher@4; it has 2, 5"):
        run(recipe_file, tmp_path / "runs", ["start"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("teacher@2, ", "teacher@3, ", "stage teacher has no model teacher@3; it has teacher@2, teacher@4, teacher@5"),
        ("keep_models: true", "keep_models: false", "stage teacher has no model teacher@2; name it teacher; further"),
        ("early: teacher@2", "early: start@2", "stage start has no model start@2; name it start"),
        ("eval_every: 2", "eval_every: 0", "keep_models: keeps the models of evaluations: set eval_every above 0"),
        ("early: teacher@2", "early: techer@2", "there is no stage 'techer'; did you mean teacher?"),
    ],
)
def test_what_does_not_exist_is_refused(recipe_file: Path, old: str, new: str, message: str):
    assert old in RECIPE
    recipe_file.write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)


def test_two_models_of_one_stage_have_two_addresses(recipe_file: Path, tmp_path: Path):
    def address(overrides: list[str]) -> str:
        plan = plan_stages(load_recipe(recipe_file, overrides), root=tmp_path)
        return next(planned.folder.hash for planned in plan if planned.stage.name == "brief")

    found = {address([f"brief.model={name}"]) for name in ("teacher", "teacher@2", "teacher@4")}
    assert len(found) == 3
