"""The search for a merge's weight: the rounds, what they draw, the choice, a kill in the middle, through a recipe."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
from safetensors.torch import load_file

from long2short.merge_rules import Rule, merge_tensor, slerp, task_arithmetic
from long2short.merge_search import Halving, ProblemScore, search_merges
from recipes.console import PlainReport
from recipes.runner import run_recipe
from recipes.schema import RecipeError, load_recipe
from recipes.stages import METHODS
from rl.faults import FaultRaised, reset_faults
from rl.runs import read_json, read_lines
from rl.tasks import tiny
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Rollout, RolloutGroup, Verdict

PROBLEMS = tiny.problems("dev", 40)
# name -> (share of right answers, tokens)
MODELS = {
    "parent": (0.9, 60),
    "0.2": (0.4, 20),
    "0.4": (0.8, 30),
    "0.5": (0.9, 45),
    "0.6": (0.9, 50),
    "0.8": (0.9, 58),
}
GRID = [name for name in MODELS if name != "parent"]


def make_group(problem, outcomes, tokens, reason=FinishReason.STOP):
    def verdict(outcome):
        return Verdict(outcome, failure=JudgeFailure.CRASH if outcome is Outcome.UNDECIDED else None)

    completion = Completion("", tuple(range(tokens)), (0.0,) * tokens, reason)
    return RolloutGroup(problem, (1,), tuple(Rollout(completion, verdict(outcome)) for outcome in outcomes))


class World:
    """Models that exist as long as a file does, and what was done with them."""

    def __init__(self, folder):
        self.folder, self.made, self.drawn = folder, [], []

    def make(self, name, path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        (path / "name").write_text(name)
        self.made.append(name)
        return {"weight": float(name)}

    def draw(self, model, problems):
        name = "parent" if model == "parent" else (self.folder / ".candidate/name").read_text()
        self.drawn.append((name, len(problems)))
        share, tokens = MODELS[name]
        right = [problem.id for problem in PROBLEMS if PROBLEMS.index(problem) % 10 < share * 10]
        return [make_group(p, [Outcome.RIGHT if p.id in right else Outcome.WRONG] * 2, tokens) for p in problems]

    def search(self, **changes):
        options = {"halving": Halving(10, 2, 2), "tolerance": 0.05} | changes
        candidates = {name: partial(self.make, name) for name in GRID}
        return search_merges(candidates, "parent", PROBLEMS, self.folder, draw=self.draw, **options)


def test_the_rounds():
    assert Halving(20, 2, 2).rounds(9, 200) == [(20, 5), (40, 3), (80, 2), (200, 2)]
    assert Halving(20, 3, 1).rounds(9, 200) == [(20, 3), (60, 1), (200, 1)]
    assert Halving(20, 2, 3).rounds(3, 200) == [(200, 3)]  # nothing to halve
    assert Halving(20, 2, 2).rounds(9, 20) == [(20, 2)]  # no more problems
    assert Halving(20, 2, 1).rounds(9, 50) == [(20, 5), (40, 3), (50, 1)]  # problems end before candidates do


def test_a_search(tmp_path):
    world = World(tmp_path)
    seen = []
    chosen = world.search(progress=lambda done, total, note: seen.append((done, total)))
    assert chosen.name == "0.5" and chosen.reason.startswith(
        "fewest tokens (45.0) of the 1 of 2 within 0.05"
    )  # 45 tokens at the parent's accuracy; 0.4 has fewer and is .1 below
    # Five on 10 problems, three on the next 10, two on the rest; nothing twice, and the winner made once more.
    first = [(name, 10) for name in ["parent", *GRID]]
    assert world.drawn[:6] == first and world.drawn[6] == ("parent", 10)
    summary = read_json(tmp_path / "summary.json")
    kept = [entry["kept"] for entry in summary["rounds"]]
    # A standard error of 10 problems is .118, of 20 .077. With a tolerance so much narrower none qualifies, so the most
    # accurate goes on; with a wider one 0.4 does.
    assert kept == [["0.5", "0.4", "0.6"], ["0.5", "0.4"], ["0.5", "0.4"]] and summary["order"] == ["0.5", "0.4"]
    assert [entry["problems"] for entry in summary["rounds"]] == [10, 20, 40]
    assert summary["rounds"][0]["tolerances"] == pytest.approx([0.05 - 0.1179, 0.05 + 0.1179], abs=1e-4)
    assert summary["rounds"][-1]["tolerances"] == [0.05]
    assert world.made == [*GRID, "0.5", "0.4", "0.6", "0.5", "0.4", "0.5", "0.4"]
    assert sum(number for _, number in world.drawn) == 40 + 2 * 10 + 20 + 2 * 40
    assert summary["chosen"] == "0.5" and summary["model"] == {"weight": 0.5}
    assert set(summary["points"]) == {"parent", "0.4", "0.5"}
    assert summary["points"]["0.5"]["tokens"] == {"value": 45.0, "low": 45.0, "high": 45.0}
    accuracy = summary["points"]["0.5"]["accuracy"]
    assert accuracy["value"] == pytest.approx(0.9) and accuracy["low"] < 0.9 < accuracy["high"]
    # .9 at 60, .9 at 45, .8 at 30: the parent is dominated by the winner, the two finalists are not.
    marks = {name: point["frontier"] for name, point in summary["points"].items()}
    assert marks == {"parent": False, "0.5": True, "0.4": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "models", "scores.jsonl", "summary.json"]
    assert (tmp_path / "model/name").read_text() == "0.5"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["2"]
    assert (tmp_path / "models/2/name").read_text() == "0.4"
    assert seen[-1] == (13, 13) and seen == sorted(seen)  # 6 + 4 + 3 scorings


@pytest.mark.parametrize("site", ["search.score:1", "search.score:4", "search.score:8", "search.summary:1"])
def test_a_killed_search_draws_nothing_twice(tmp_path, monkeypatch, site):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    World(tmp_path / "a").search()
    world = World(tmp_path / "b")
    monkeypatch.setenv("REASON_FAULT", f"{site}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        world.search()
    monkeypatch.delenv("REASON_FAULT")
    lost = len(world.drawn)
    with (tmp_path / "b/scores.jsonl").open("a") as file:
        file.write('{"candidate": "0.8", "prob')  # torn off by the kill
    assert world.search().name == "0.5"
    assert (tmp_path / "b/summary.json").read_bytes() == (tmp_path / "a/summary.json").read_bytes()
    again = sum(number for _, number in world.drawn)
    in_vain = world.drawn[lost - 1][1] if site.startswith("search.score") else 0  # drawn and not yet written
    assert again == 160 + in_vain
    lines = read_lines(tmp_path / "b/scores.jsonl")
    assert len({(line["candidate"], line["problem"]) for line in lines}) == len(lines) == 160


def test_undecided_truncated_and_aborted_samples():
    problem = PROBLEMS[0]
    group = make_group(
        problem, [Outcome.RIGHT, Outcome.UNDECIDED, Outcome.WRONG, Outcome.RIGHT], 7, FinishReason.LENGTH
    )
    assert ProblemScore.of(group) == ProblemScore(problem.id, 2 / 3, 7.0, 1.0)
    assert ProblemScore.of(make_group(problem, [Outcome.UNDECIDED], 7)).accuracy is None
    with pytest.raises(ValueError, match="aborted"):
        ProblemScore.of(make_group(problem, [Outcome.WRONG], 7, FinishReason.ABORTED))


def test_what_cannot_be_searched(tmp_path):
    world = World(tmp_path)
    with pytest.raises(ValueError, match="needs candidates and problems"):
        search_merges({}, "parent", PROBLEMS, tmp_path, draw=world.draw, halving=Halving(5), tolerance=0)
    world.draw = lambda model, problems: [make_group(problem, [Outcome.UNDECIDED], 7) for problem in problems]
    with pytest.raises(ValueError, match="the parent: the judge decided none of its 10 problems"):
        world.search()


# --- through a recipe -------------------------------------------------------------------------------------------------

RECIPE = """\
name: searched
problems: {source: tiny, train: 6, dev: 6, test: 2}
sampling: {max_tokens: 24}
stages:
  searched:
    method: merge_search
    long: MODELS/tiny-base
    short: MODELS/tiny-short
    rule: slerp
    grid: [0.25, {default: 0.5, mlp: 0.75}, 1]
    first: 2
    keep: 2
    samples: 1
  merged:
    method: merge
    long: searched
    short: MODELS/tiny-short
    base: MODELS/tiny-base
    rule: ties
    density: 0.5
    weights: {default: 0.5, layers.0-1.mlp: 0.25}
  second: {method: merge, long: searched@2, short: merged, weight: 1.0}
  dare:
    method: merge_search
    long: MODELS/tiny-base
    short: MODELS/tiny-short
    base: MODELS/tiny-base
    rule: dare
    grid: [0.5]
    scales: [0.5, 1.0]
    densities: [0.9, 0.5]
    first: 2
    keep: 3
    samples: 1
  task:
    method: merge
    long: MODELS/tiny-base
    short: MODELS/tiny-short
    base: dare@3
    rule: task_arithmetic
    weight: 0.5
"""


@pytest.fixture
def recipe_file(tmp_path, request):
    path = tmp_path / "searched.yaml"
    path.write_text(RECIPE.replace("MODELS", str(request.config.rootpath / "recipes/models")))
    return path


def test_a_recipe_searches_and_merges(recipe_file, tmp_path, request):
    recipe = load_recipe(recipe_file)
    assert recipe.part("long2short") == ["searched", "merged", "second", "dare", "task"]
    results = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    folder = {result.name: result.folder for result in results}
    summary = json.loads((folder["searched"] / "summary.json").read_text())
    assert set(summary["rounds"][0]["candidates"]) == {"0.25", "0.5 mlp 0.75", "1"}
    shares = {"0.25": (0.25, 0.25), "0.5 mlp 0.75": (0.5, 0.75), "1": (1.0, 1.0)}[summary["chosen"]]
    models = request.config.rootpath / "recipes/models"
    long, short = (load_file(models / name / "model.safetensors") for name in ("tiny-base", "tiny-short"))
    made = load_file(folder["searched"] / "model/model.safetensors")
    for name, tensor in made.items():
        expected = merge_tensor(Rule(slerp), (long[name], short[name]), shares["mlp" in name], name)
        assert tensor.equal(expected), name
    merged = json.loads((folder["merged"] / "summary.json").read_text())
    assert merged["weights"] == {"layers.0-1.mlp": 0.25} and merged["like"] == "long"
    assert (merged["rule"], merged["scale"], merged["density"]) == ("ties", 1.0, 0.5)
    # `searched@2` is the other finalist: weight 1 of it is it, bit for bit.
    second = load_file(folder["searched"] / "models/2/model.safetensors")
    copied = load_file(folder["second"] / "model/model.safetensors")
    assert all(tensor.equal(second[name]) for name, tensor in copied.items())
    assert not all(tensor.equal(made[name]) for name, tensor in copied.items())
    # Every scale with every density; three of the four are kept.
    found = json.loads((folder["dare"] / "summary.json").read_text())
    names = [f"0.5 scale {scale} density {density}" for scale in ("0.5", "1") for density in ("0.9", "0.5")]
    assert set(found["rounds"][0]["candidates"]) == set(names) and len(found["order"]) == 3
    assert sorted(path.name for path in (folder["dare"] / "models").iterdir()) == ["2", "3"]
    third = load_file(folder["dare"] / "models/3/model.safetensors")
    summed = load_file(folder["task"] / "model/model.safetensors")
    for name, tensor in summed.items():
        parents = (long[name], short[name], third[name])
        assert tensor.equal(merge_tensor(task_arithmetic(1.0), parents, 0.5, name)), name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rule: slerp", "rule: slerb", "did you mean slerp?"),
        ("rule: slerp", "rule: ties", "base: required with rule: ties"),
        ("rule: slerp", "rule: slerp\n    densities: [0.5]", "densities: has no effect with rule: slerp; remove it"),
        ("rule: slerp", "rule: slerp\n    normalize: false", "normalize: has no effect with rule: slerp"),
        ("grid: [0.25,", "grid: [1.0,", "grid: has 1.0 more than once"),
        ("grid: [0.25,", "grid: [{default: 1}, ", "grid: has 1.0 more than once"),
        ("grid: [0.25,", "grid: [{mlp: 0.5}, {mlp: 0.5},", "grid: has {'mlp': 0.5} more than once"),
        ("rule: slerp", "rule: slerp\n    scales: [0.5, 0.5]", "scales: has 0.5 more than once"),
        (
            "rule: slerp",
            "rule: ties\n    densities: [0.5]\n    base: MODELS/tiny-short",
            "grid: changes nothing: the short model is the base",
        ),
        ("long: searched@2", "long: searched@3", "has no model searched@3; it has searched@2"),
        ("long: searched@2", "long: searched@", "has no model searched@; it has searched@2"),
        ("short: merged", "short: merged@2", "has no model merged@2; name it merged"),
        ("grid: [0.25,", "grid: [{mlp: 0.5},", "grid: needs default"),
        ("grid: [0.25,", "grid: [1.25,", "grid[0]: must be at most 1.0, not 1.25"),
        ("grid: [0.25,", "grid: [{default: 2},", "must be at most 1.0, not 2"),
        ("density: 0.5", "scale: 0.5", "density: required with rule: ties"),
        ("density: 0.5", "density: 0", "must be above 0.0, not 0"),
        ("weights: {default: 0.5,", "weights: {", "weights: needs default"),
        ("weights: {default: 0.5,", "weights: {default: 0.5, 'a..b': 0.1,", "'a..b' is no pattern"),
        ("weights: {", "weight: 0.5\n    weights: {", "give either weight or weights"),
        ("weights: {default: 0.5, layers.0-1.mlp: 0.25}", "scale: 1.0", "give either weight or weights"),
        ("base: MODELS", "like: base\n    base: MODELS", "like"),
    ],
)
def test_keys_that_do_not_go_together(recipe_file, old, new, message):
    text = recipe_file.read_text()
    old, new = (part.replace("MODELS", text.split("long: ")[1].split("/tiny-base")[0]) for part in (old, new))
    assert old in text
    recipe_file.write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file)
    assert message in str(caught.value)
