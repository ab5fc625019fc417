"""Every shipped recipe is checked; `tiny` runs end to end, small; a killed run goes on; the trainer learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.schema import load_recipe, shipped_recipes

ROOT = Path(__file__).parent.parent
SMALL = (
    "problems.train=24", "problems.dev=8", "problems.test=10", "sampling.max_tokens=96",
    "teacher.steps=2", "teacher.eval_every=1", "teacher.problems_per_step=4", "teacher.group_size=4",
    "student-rl.steps=2", "student-rl.eval_every=1", "student-rl.problems_per_step=4", "student-rl.group_size=4",
    "brief.steps=2", "brief.eval_every=1", "brief.problems_per_step=4", "brief.group_size=4",
    "control.steps=2", "control.problems_per_step=4", "control.group_size=4",
    "pool.count=24", "student.epochs=1", "shortest.epochs=1",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_is_valid(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def reason(*arguments: str, runs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *arguments, "--runs", str(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def sets(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.mark.timeout(300)
def test_tiny_runs_end_to_end_and_is_reused(tmp_path):
    """Two steps of every RL stage, every other stage whole: the same code paths as `make demo`."""
    first = reason("run", "tiny", *sets(*SMALL), "--json", runs=tmp_path)
    assert first.returncode == 0, first.stderr[-2000:]
    result = json.loads(first.stdout)
    methods = {stage["method"] for stage in result["stages"]}
    assert {"grpo", "sample", "traces", "sft", "merge", "select", "shortest", "pairs", "dpo", "length_rl"} <= methods
    arms = {row["name"] for row in result["frontiers"]["frontier"]["rows"]}
    assert {"base", "teacher", "student", "student-rl", "merge-50", "shortest", "dpo", "brief", "control"} <= arms
    folder = next(Path(tmp_path / "tiny").glob("frontier-*"))
    assert {"frontier.json", "frontier.png", "report.html", "manifest.json"} <= {p.name for p in folder.iterdir()}

    again = reason("frontier", "tiny", *sets(*SMALL), "--json", runs=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    changed = reason("run", "tiny", *sets(*SMALL, "brief.length.weight=0.1"), "--json", runs=tmp_path)
    assert changed.returncode == 0, changed.stderr[-2000:]
    ran = {stage["name"] for stage in json.loads(changed.stdout)["stages"] if stage["status"] != "reused"}
    assert ran == {"brief", "frontier.brief", "frontier"}


@pytest.mark.timeout(120)
def test_tiny_base_makes_three_model_folders(tmp_path):
    steps = ("base.steps=2", "short.steps=2", "student.steps=2", "problems.dev=4", "sampling.max_tokens=24")
    made = reason("run", "tiny-base", *sets(*steps), "--json", runs=tmp_path)
    assert made.returncode == 0, made.stderr[-2000:]
    for name in ("base", "short", "student"):
        folder = tmp_path / "tiny-base" / (tmp_path / "tiny-base" / f"{name}.latest").read_text().strip() / "model"
        shipped = ROOT / "recipes" / "models" / f"tiny-{name}"
        assert {p.name for p in folder.iterdir()} == {p.name for p in shipped.iterdir()} | {"README.md"}  # its card
        assert (folder / "config.json").read_text() == (shipped / "config.json").read_text()
        assert (folder / "tokenizer.json").read_text() == (shipped / "tokenizer.json").read_text()


def test_the_shipped_models_are_small():
    sizes = {
        folder.name: sum(p.stat().st_size for p in folder.iterdir()) / 2**20
        for folder in (ROOT / "recipes" / "models").iterdir()
    }
    assert sorted(sizes) == ["tiny-base", "tiny-short", "tiny-student"]
    assert max(sizes.values()) <= 3 and sum(sizes.values()) <= 8


RESUME = """\
name: resume
problems: {source: tiny, levels: [2], train: 8, dev: 4, test: 4}
sampling: {max_tokens: 24}
stages:
  teacher: {method: grpo, model: %(model)s, steps: 3, problems_per_step: 2, group_size: 2, save_every: 1}
  brief:
    method: length_rl
    model: teacher
    steps: 6
    problems_per_step: 2
    group_size: 2
    save_every: 2
    length: {weight: 0.3}
  scores: {method: evaluate, model: brief, samples: 2}
"""


@pytest.mark.timeout(300)
def test_a_run_killed_in_its_rl_stage_goes_on_and_ends_in_the_same_bits(tmp_path, tiny_model_folder):
    recipe = tmp_path / "resume.yaml"
    recipe.write_text(RESUME % {"model": tiny_model_folder})
    whole = reason("run", str(recipe), "--json", runs=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]

    killed = reason("run", str(recipe), "--json", runs=tmp_path / "cut", REASON_FAULT="grpo.step:8:kill")
    assert killed.returncode == -signal.SIGKILL
    teacher = next((tmp_path / "cut" / "resume").glob("teacher-*"))
    finished = teacher.stat().st_mtime_ns
    resumed = reason("run", str(recipe), "--json", runs=tmp_path / "cut")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    status = {stage["name"]: stage["status"] for stage in json.loads(resumed.stdout)["stages"]}
    assert status == {"teacher": "reused", "brief": "resumed", "scores": "ran"}
    assert teacher.stat().st_mtime_ns == finished

    def files(runs: str, pattern: str) -> bytes:
        return next((tmp_path / runs / "resume").glob(pattern)).read_bytes()

    for pattern in ("brief-*/model/model.safetensors", "scores-*/summary.json", "scores-*/pool/samples-*.jsonl"):
        assert files("whole", pattern) == files("cut", pattern), pattern
    steps = [json.loads(line)["step"] for line in files("cut", "brief-*/metrics.jsonl").splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.timeout(300)
def test_the_trainer_learns_and_again_after_a_resume(tmp_path, monkeypatch, train_rl):
    """From the shipped base, 14 steps of 8 x 12: accuracy rises by far more than its noise (about .03 for the mean of
    four steps of 96 samples), in one run that is interrupted in the middle."""
    from rl.faults import FaultRaised, reset_faults
    from rl.learner import OptimSettings
    from rl.runs import read_lines

    base = ROOT / "recipes" / "models" / "tiny-base"

    def run():
        train_rl(
            base, tmp_path, 14, per_step=8, group=12, max_tokens=128, train_problems=200, save_every=4,
            optim=OptimSettings(learning_rate=5e-4), seed=0,
        )  # fmt: skip

    monkeypatch.setenv("REASON_FAULT", "grpo.step:11:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        run()
    monkeypatch.delenv("REASON_FAULT")
    run()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 15))
    early = sum(line["accuracy"] for line in lines[:4]) / 4
    late = sum(line["accuracy"] for line in lines[-4:]) / 4
    assert late > early + 0.10
    assert lines[-1]["tokens_mean"] > lines[0]["tokens_mean"]
