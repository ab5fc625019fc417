"""Model cards and `reason export`: the card says how a model was made and what it measured, and goes along."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from huggingface_hub import HfApi

from long2short.frontier import Arm, frontier
from recipes import export_commands
from recipes.export_commands import export, push_to_hub
from recipes.model_card import NOT_MEASURED, model_card
from recipes.runner import StageContext, StageResult, Status, plan_stages, run_recipe
from recipes.schema import Recipe, load_recipe
from rl.evaluate import summarize
from rl.runs import CARD, model_hash, read_json, write_json
from rl.tasks import tiny
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

RECIPE = """
name: made
seed: 3
problems: {source: tiny, levels: [2], train: 10, dev: 5, test: 6}
stages:
  teacher: {method: grpo, model: org/base-1b, steps: 1, max_tokens: 64}
  brief: {method: merge, long: teacher, short: ./short, weight: 0.5}
  spare: {method: merge, long: teacher, short: ./short, weight: 0.25}
  pool: {method: sample, model: brief, samples: 2}
  frontier: {method: frontier, parent: long, samples: 2, arms: {long: teacher, brief: brief}}
"""


class Quiet:
    """A report that nobody reads."""

    def stage_started(self, name: str, method: str, position: int, total: int, status: Status) -> None: ...

    def stage_progress(self, name: str, done: int, total: int, note: str) -> None: ...

    def stage_finished(self, result: StageResult, position: int, total: int) -> None: ...


def make_model(context: StageContext) -> None:
    write_json(context.folder / "model" / "config.json", context.name, "sft.model")


def nothing(context: StageContext) -> None:
    write_json(context.folder / "summary.json", {}, "traces.summary")


def arm(name: str, tokens: int) -> Arm:
    rollout = Rollout(
        Completion("1</think>2", tuple(range(tokens)), (0.0,) * tokens, FinishReason.STOP), Verdict(Outcome.RIGHT)
    )
    groups = tuple(RolloutGroup(Problem(f"p{i}", (TextPart("1+1"),), "2"), (1,), (rollout,) * 2) for i in range(6))
    return Arm(name, groups, summarize(groups, tiny.TASK))


def compare(context: StageContext) -> None:
    found = frontier([arm("long", 40), arm("brief", 10)], "long")
    write_json(context.folder / "frontier.json", found.to_json(), "frontier.table")


METHODS = {"grpo": make_model, "merge": make_model, "sample": nothing, "evaluate": nothing, "frontier": compare}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text("{}")
    path = tmp_path / "made.yaml"
    path.write_text(RECIPE)
    return load_recipe(path)


def run(recipe: Recipe, root: Path, targets: list[str] | None = None) -> dict[str, Path]:
    results = run_recipe(recipe, root=root, methods=METHODS, report=Quiet(), targets=targets)
    return {result.name: result.folder for result in results}


def front_matter(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_every_model_comes_with_its_card(recipe: Recipe, tmp_path: Path):
    folders = run(recipe, tmp_path / "runs")
    card = (folders["teacher"] / "model" / CARD).read_text()
    assert front_matter(card)["base_model"] == ["org/base-1b"]
    assert front_matter(card)["tags"] == ["reason", "reasoning", "grpo"]
    for part in ("# made/teacher", "| seed | 3 |", "steps: 1", NOT_MEASURED, "at most 64 tokens", "| `model` |"):
        assert part in card
    brief = (folders["brief"] / "model" / CARD).read_text()
    assert "base_model" not in front_matter(brief)  # its parents have no name on the hub
    assert f"| `long` | `teacher` | {folders['teacher'].name.removeprefix('teacher-')} |" in brief
    assert not (folders["pool"] / "model").exists()
    assert f"model/{CARD}" in read_json(folders["brief"] / "manifest.json")["files"]  # whole or not there


def test_a_card_is_no_part_of_the_model(recipe: Recipe, tmp_path: Path):
    folder = run(recipe, tmp_path / "runs", ["brief"])["brief"] / "model"
    before = model_hash(folder)
    (folder / CARD).write_text("another text")
    assert model_hash(folder) == before
    (folder / "config.json").write_text("{}")
    assert model_hash(folder) != before


def test_export_adds_what_the_frontier_measured(recipe: Recipe, tmp_path: Path):
    root = tmp_path / "runs"
    folders = run(recipe, root)
    measured = export(recipe, "brief", tmp_path / "out", root)
    assert [(one.stage, one.arm, one.parent) for one in measured] == [("frontier", "brief", "long")]
    card = (tmp_path / "out" / CARD).read_text()
    assert "6 problems of the test split x 2 samples, temperature 1.0" in card and NOT_MEASURED not in card
    assert "* Only 6 problems: with fewer than 100 the intervals are rough." in card
    assert "| tokens mean, 95% interval | 10.0 [10.0, 10.0] | 40.0 [40.0, 40.0] |" in card
    assert model_hash(tmp_path / "out") == model_hash(folders["brief"] / "model")
    assert export(recipe, "spare", tmp_path / "spare", root) == []  # an arm of no frontier
    assert NOT_MEASURED in (tmp_path / "spare" / CARD).read_text()


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(recipe: Recipe, tmp_path: Path):
    root, out = tmp_path / "runs", tmp_path / "out"
    with pytest.raises(ValueError, match="stage brief is not finished in .*reason run made brief"):
        export(recipe, "brief", out, root)
    with pytest.raises(ValueError, match="stage pool is of method sample, which makes no model"):
        export(recipe, "pool", out, root)
    with pytest.raises(ValueError, match="no stage 'brif'"):
        export(recipe, "brif", out, root)
    assert not out.exists()
    run(recipe, root, ["brief"])
    out.mkdir()
    with pytest.raises(ValueError, match="exists; name a folder that does not"):
        export(recipe, "brief", out, root)


class Hub:
    """What of huggingface_hub's HfApi is used, remembering what it was asked."""

    asked: tuple[object, ...] = ()
    error: OSError | None = None

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
        if Hub.error is not None:
            raise Hub.error
        Hub.asked = (name, private, exist_ok)
        return f"https://hub.example/{name}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Hub.asked += (repo_id, sorted(path.name for path in folder_path.iterdir()), commit_message)


def test_a_push_takes_the_folder_and_says_what_to_do_when_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    folder = tmp_path / "brief"
    folder.mkdir()
    (folder / CARD).write_text("card")
    assert push_to_hub(folder, "me/brief", True) == "https://hub.example/me/brief"
    assert Hub.asked == ("me/brief", True, True, "me/brief", [CARD], "Upload brief with its card")
    monkeypatch.setattr(Hub, "error", ConnectionError("no route"))
    with pytest.raises(RuntimeError, match="me/brief was not pushed: no route.*hf upload me/brief"):
        push_to_hub(folder, "me/brief", False)


def test_a_hub_that_cannot_be_reached_is_no_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With the real client: its errors of connection are not OSErrors in every version."""
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token="none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(RuntimeError, match="me/brief was not pushed: .*after `hf auth login`: hf upload me/brief"):
        push_to_hub(tmp_path, "me/brief", False)


def test_a_repository_that_cannot_be_is_refused_before_anything_is_copied(recipe: Recipe, tmp_path: Path):
    run(recipe, tmp_path / "runs")

    def command(push: str | None, private: bool) -> None:
        export_commands.export_command(
            str(recipe.path), "brief", tmp_path / "out", runs=tmp_path / "runs", push=push, private=private,
            overrides=None, seed=None, as_json=False,
        )  # fmt: skip

    with pytest.raises(ValueError, match="--push-to-hub a b: "):
        command("a b", False)
    with pytest.raises(typer.BadParameter, match="--private goes with --push-to-hub"):
        command(None, True)
    assert not (tmp_path / "out").exists()


def test_a_card_names_no_folder_of_a_machine(tmp_path: Path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "config.json").write_text("{}")
    path = tmp_path / "made.yaml"
    path.write_text(RECIPE.replace("./short", str(tmp_path / "short")))
    recipe = load_recipe(path)
    (planned,) = [one for one in plan_stages(recipe, root=tmp_path) if one.stage.name == "brief"]
    card = model_card(recipe, planned.stage, planned.inputs)
    assert str(tmp_path) not in card and "short: short" in card and "| `short` | `short` |" in card


def test_the_command_prints_where_the_model_is(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(recipe, tmp_path / "runs")
    export_commands.export_command(
        str(recipe.path), "brief", tmp_path / "out", runs=tmp_path / "runs", push=None, private=False,
        overrides=None, seed=None, as_json=False,
    )  # fmt: skip
    assert "measured by frontier" in capsys.readouterr().out


def test_a_card_of_the_shipped_recipe_is_whole(tmp_path: Path):
    recipe = load_recipe("tiny")
    for planned in plan_stages(recipe, root=tmp_path):
        if planned.stage.makes == "model":
            card = model_card(recipe, planned.stage, planned.inputs)
            assert front_matter(card)["library_name"] == "transformers" and card.count("\n## ") == 4
