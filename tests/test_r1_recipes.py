"""R1's pipeline: the tiny recipe runs two steps of every stage to its frontier; the real one has the same form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.loader import RecipeError
from recipes.schema import load_recipe
from rl.runs import read_json, read_lines

ROOT = Path(__file__).parent.parent
SMALL = (
    "problems.train=24", "problems.dev=8", "problems.test=8", "sampling.max_tokens=64", "base.steps=2",
    "base.batch_size=8", "worked.count=16", "cold.epochs=1", "pool.count=24", "pool.samples=4", "general.count=12",
    "sft.epochs=1", "preference.count=60", "final.general.from_share=0.5", "final.general.share=0.5",
    "frontier.samples=1",
    *(f"{stage}.{key}" for stage in ("rl-1", "final", "zero") for key in (
        "steps=2", "eval_every=2", "problems_per_step=4", "group_size=4", "eval_problems=4", "eval_samples=1",
    )),
)  # fmt: skip


@pytest.mark.timeout(300)
def test_r1_tiny_runs_end_to_end(tmp_path):
    """From a grown base of two steps nothing is right, so the traces come from the worked solutions: the same code."""
    sets = [part for pair in (*SMALL, "mix.parts.reasoning.traces=worked") for part in ("--set", pair)]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "run", "r1-tiny", *sets, "--runs", str(tmp_path), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    result = json.loads(ran.stdout)
    assert {row["name"] for row in result["frontiers"]["frontier"]["rows"]} == {
        "base", "cold", "rl-1", "sft", "final", "zero",
    }  # fmt: skip

    def folder(stage):
        return tmp_path / "r1-tiny" / (tmp_path / "r1-tiny" / f"{stage}.latest").read_text().strip()

    before, after = read_lines(folder("final") / "metrics.jsonl")
    assert "general" not in before and after["general"] == 0.5
    assert "reward_preference" in after and "reward_language" in after
    assert read_json(folder("preference") / "summary.json")["held_out"] > 0
    rows = read_lines(folder("mix") / "traces.jsonl")
    assert {row["text"].startswith("</think>") for row in rows} == {True, False}, "rows with a thought and without"


def test_the_stages_are_those_of_the_paper_in_their_order():
    tiny, real = load_recipe("r1-tiny"), load_recipe("r1-pipeline")
    order = ["cold", "rl-1", "pool", "traces", "mix", "sft", "final"]
    for recipe in (tiny, real):
        names = recipe.stage_names()
        assert [name for name in names if name in order] == order
        stages = {name: recipe.stages[name].config for name in order}
        assert stages["rl-1"].reward_language is not None and stages["pool"].model == "rl-1"
        assert stages["sft"].model == stages["cold"].model != "rl-1", "the base, not the RL model"
        general = stages["final"].general
        assert general is not None and stages["final"].model == "sft"
    assert real.stages["final"].config.general.from_share == pytest.approx(1300 / 1700, abs=1e-3)


RECIPE = """\
name: general
problems: {source: tiny, notations: both, train: 8, dev: 4, test: 4}
sampling: {max_tokens: 24}
stages:
  prompts: {method: made_traces, kind: general, count: 8}
  preference: {method: preference_model, model: ./base, pairs: tiny, count: 50}
  final:
    {method: grpo, model: ./base, steps: 4, reward_models: [{kind: preference, model: preference, weight: 1.0}],
     general: {prompts: prompts}}
"""


def test_what_is_wrong_with_general_prompts_is_said_before_anything_runs(tmp_path, tiny_model_folder):
    (tmp_path / "base").symlink_to(tiny_model_folder)
    path = tmp_path / "general.yaml"

    def load(*changes):
        path.write_text(RECIPE)
        return load_recipe(path, changes)

    reads = {read.key: read.ref for read in load().stages["final"].references()}
    assert reads == {"model": "./base", "general.prompts": "prompts", "reward_models[0].model": "preference"}
    for change, message in {
        "final.general.prompts=preference": "general.prompts: stage preference is of method preference_model",
        "final.general.prompts=./none.jsonl": "there is no file ./none.jsonl",
        "final.reward_models=[]": "nothing would pay for them: give reward_models as well",
        "final.general.share=0.01": "0.01 of 16 problems_per_step is less than one",
        "preference.count=null": "goes with pairs: tiny, and that needs it",
        "problems.notations=three": "notations",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load(change)
        assert message in str(caught.value), change
