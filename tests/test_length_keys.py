"""`length:` in a recipe: typed keys per objective, and what they become."""

from typing import get_args

import pytest

from long2short.length_catalog import CATALOG, parameters
from long2short.length_filter import Gfpo, brevity, token_efficiency
from long2short.length_limits import Cosine, SoftOverlong, ThinkPrune
from long2short.length_memory import DifficultyTargets
from long2short.length_objectives import Kimi
from long2short.length_reward import DualWeight, LengthReward, MinSpread, ThinkTokens, Warmup, any_right, total_tokens
from recipes.console import PlainReport
from recipes.length_keys import OF_GFPO, PARAMETERS, Length, ObjectiveName
from recipes.loader import RecipeError
from recipes.rl_stage import advantage_of, shape_of
from recipes.runner import StageFailed, run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.advantages import mean_baseline
from rl.collect import no_shaping
from rl.policy import load_tokenizer
from rl.runs import read_lines
from rl.schedules import StepSchedule

RECIPE = """name: brief
problems: {source: tiny, levels: [2], train: 24, dev: 4, test: 4}
sampling: {max_tokens: 24}
stages:
  pool: {method: sample, model: %s, count: 8, samples: 4}
  brief:
    method: length_rl
    model: %s
    steps: 3
    problems_per_step: 4
    group_size: 4
    learning_rate: 1.0e-3
    collapse: null
    length: {%s}
"""
# The smallest keys of each objective.
NEEDED = {"laser": ", target: 9", "thinkprune": ", limits: [[1, 20], [3, 9]]", "soft-overlong": ", buffer: 4"}


def recipe_of(tmp_path, model, length, more=""):
    path = tmp_path / "brief.yaml"
    text = RECIPE % (model, model, length)
    path.write_text(text + "".join(f"    {line}\n" for line in more.splitlines()))
    return load_recipe(path)


def stage_of(tmp_path, model, length, more=""):
    return recipe_of(tmp_path, model, length, more).stages["brief"].config


def test_every_objective_has_a_name_and_every_parameter_a_key():
    assert set(get_args(ObjectiveName)) == {*CATALOG, "gfpo"}
    assert set(PARAMETERS) == {key for name in CATALOG for key in parameters(name)} | set(OF_GFPO)


def test_old_recipes_read_as_before(tmp_path, tiny_model_folder):
    stage = stage_of(tmp_path, tiny_model_folder, "weight: 0.3, min_spread: 4")
    shape = shape_of(stage, load_tokenizer(tiny_model_folder))
    assert shape == LengthReward(Kimi(), 0.3, Warmup(), (MinSpread(4),), None, None, total_tokens)


def test_keys_become_what_they_name(tmp_path, tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)

    def shape(length, more=""):
        found = shape_of(stage_of(tmp_path, tiny_model_folder, length, more), tokenizer)
        assert isinstance(found, LengthReward)
        return found

    found = shape(
        "objective: laser-d, weight: 0.5, every: 7, warmup_steps: 1, ramp_steps: 1, gate: any-right, scope: think"
    )
    assert (found.memory, found.warmup, found.gates) == (DifficultyTargets(7), Warmup(1, 1), (any_right,))
    assert found.scope == ThinkTokens(tokenizer)
    assert shape("objective: cosine, weight: 1.0").objective == Cosine(24)
    assert shape("objective: cosine, weight: 1.0, max_tokens: 20").objective == Cosine(20)
    assert shape("objective: soft-overlong, weight: 0.5, buffer: 4").objective == SoftOverlong(24, 4)
    found = shape("objective: thinkprune, weight: 1.0, limits: [[1, 20], [3, 9]]")
    assert found.objective == ThinkPrune(StepSchedule(((1, 20), (3, 9))))
    found = shape("weight: 0.0, target_accuracy: 0.6, max_weight: 1.0, weight_rate: 2.0")
    assert found.weight == DualWeight(0.0, 1.0, 2.0, target=0.6)
    found = shape("weight: 0.1, target_drop: 0.02, max_weight: 1.0", "eval_every: 1")
    assert found.weight == DualWeight(0.1, 1.0, drop=0.02, from_dev=True)


def test_gfpo_is_a_filter_of_advantages(tmp_path, tiny_model_folder):
    stage = stage_of(tmp_path, tiny_model_folder, "objective: gfpo, keep: 2")
    assert shape_of(stage, load_tokenizer(tiny_model_folder)) is no_shaping
    assert advantage_of(stage, ()) == Gfpo(mean_baseline, 2, brevity)
    stage = stage_of(tmp_path, tiny_model_folder, "objective: gfpo, keep: 3, prefer: efficient")
    assert advantage_of(stage, ()) == Gfpo(mean_baseline, 3, token_efficiency)


REFUSED = [
    ("objective: kimi, weight: 0.3, alpha: 0.1", "", "length.alpha: has no effect with objective: kimi, which has no"),
    ("objective: hapo, weight: 0.3, target: 9", "", "length.target: has no effect with objective: hapo, which reads"),
    ("objective: laser, weight: 0.3", "", "length.target: required key is missing: objective laser needs it"),
    ("objective: gfpo", "", "length.keep: required key is missing: objective gfpo needs it"),
    ("objective: gfpo, keep: 2, weight: 0.1", "", "length.weight: has no effect with objective: gfpo"),
    ("objective: gfpo, keep: 2, gate: any-right", "", "length.gate: has no effect with objective: gfpo"),
    ("objective: gfpo, keep: 5", "", r"length.keep: must be from 2 to group_size \(4\), not 5"),
    ("objective: kimi", "", "length.weight: required key is missing"),
    ("objective: kimmi, weight: 0.1", "", "cannot be the text .kimmi.; did you mean kimi\\? It must be one of kimi"),
    ("objective: thinkprune, weight: 1.0, limits: [[2, 9]]", "", "length.limits: the steps must start at 1"),
    ("objective: soft-overlong, weight: 0.1, buffer: 24", "", r"length.buffer: 24 is not below max_tokens \(24\)"),
    ("objective: dast, weight: 1.2", "", r"length.weight: must be below 1.25 x \(reward_accuracy - reward_"),
    ("weight: 0.1, target_accuracy: 0.9", "", "length.max_weight: required key is missing"),
    ("objective: lcpo-max, weight: 1.1", "", "length.weight: must be at most 1 x reward_accuracy = 1, not 1.1"),
    ("objective: toggle, weight: 0.5, max_weight: 1.5, target_accuracy: 0.9", "", "length.max_weight: must be at most"),
    ("objective: thinkprune, weight: 0.7, limits: [[1, 9]]", "reward_accuracy: 0.6", "length.weight: must be at most"),
    ("objective: laser, weight: 0.5, target: 9", "reward_language: {weight: 1.0}",
     r"reward_language.weight: 1 is not below reward_accuracy - reward_format = 0.9: a wrong answer in the right"),
    ("objective: laser, weight: 0.5, target: 9", "reward_language: {weight: 0.5}\nreward_format: 0.5",
     r"reward_language.weight: 0.5 is not below reward_accuracy - reward_format = 0.5"),
    ("objective: kimi, weight: 0.1", "reward_language: {weight: 1.0}", r"reward_language.weight: 1 is not below"),
    ("objective: kimi, weight: 0.9", "reward_language: {weight: 0.5}",
     r"length.weight: must be below 2 x \(reward_accuracy - reward_format - reward_language.weight\) = 0.8, not 0.9"),
    ("weight: 0.1, max_weight: 0.9", "", "length.max_weight: steers the weight towards a target"),
    ("weight: 0.1, max_weight: 1.9, target_accuracy: 0.9", "", "length.max_weight: must be below 2 x"),
    ("weight: 0.5, max_weight: 0.4, target_accuracy: 0.9", "", r"length.weight: 0.5 is above max_weight \(0.4\)"),
    ("weight: 0.1, max_weight: 0.4, target_accuracy: 0.9, target_drop: 0.1", "", "length.target_drop: says the same"),
    ("weight: 0.1, max_weight: 0.4, target_drop: 0.1", "", "length.target_drop: needs evaluations on dev problems"),
    ("weight: 0.1, max_weight: 0.4, target_accuracy: 0.9, accuracy_of: dev", "", "length.accuracy_of: needs eval"),
    ("weight: 0.1, max_weight: 0.4, target_drop: 0.1, accuracy_of: rollouts", "", "length.accuracy_of: target_drop"),
    ("weight: 0.1, ramp_steps: 2", "advantage: gdpo", "length.ramp_steps: cannot be used with advantage: gdpo"),
    ("weight: 0.1, warmup_steps: 3", "", "would never start"),
    ("weight: 0.1, reference: pool", "", "length.reference: has no effect with objective: kimi, which remembers noth"),
    ("objective: hapo, weight: 0.1, reference: nowhere", "", "length.reference: there is no stage 'nowhere'"),
]  # fmt: skip


@pytest.mark.parametrize(("length", "more", "message"), REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path, tiny_model_folder, length, more, message):
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path, tiny_model_folder, length, more)


@pytest.mark.parametrize(
    "length",
    [
        "objective: lcpo-max, weight: 1.0", "objective: lcpo-max-code, weight: 1.0", "objective: toggle, weight: 1.0",
        "objective: thinkprune, weight: 1.0, limits: [[1, 20]]", "objective: cosine, weight: 1.0",
    ],
)  # fmt: skip
def test_the_papers_own_weights_of_the_rules_with_a_limit_are_taken(tmp_path, tiny_model_folder, length):
    assert stage_of(tmp_path, tiny_model_folder, length).length.weight == 1


@pytest.mark.parametrize("name", get_args(ObjectiveName))
def test_every_objective_is_read(tmp_path, tiny_model_folder, name):
    weight = "keep: 2" if name == "gfpo" else "weight: 1.0e-4"
    keys = stage_of(tmp_path, tiny_model_folder, f"objective: {name}, {weight}{NEEDED.get(name, '')}").length
    assert isinstance(keys, Length) and keys.objective == name


def lines_with(folder, model, suffix):
    """The metrics of a stage of lcpo-exact in a recipe with this suffix."""
    folder.mkdir()
    path = folder / "stated.yaml"
    text = RECIPE % (model, model, "objective: lcpo-exact, weight: 1.0e-3")
    path.write_text(text.replace("levels: [2],", f'levels: [2], prompt_suffix: "{suffix}",'))
    *_, result = run_recipe(load_recipe(path), root=folder / "runs", methods=METHODS, report=PlainReport())
    return read_lines(result.folder / "metrics.jsonl")


def test_a_budget_in_the_suffix_is_read_and_another_one_is_refused_before_anything_is_sampled(
    tmp_path, tiny_model_folder
):
    lines = lines_with(tmp_path / "stated", tiny_model_folder, " Think for 12 tokens.")
    assert len(lines) == 3 and all(-12 <= line["length_value"] < 0 for line in lines)
    for name, suffix, message in (
        ("none", "", r"length.target: not given, and problem \S+ states no budget: set length.target, or end its text"),
        ("most", " Think for maximum 12 tokens.", 'states "Think for maximum 12 tokens.", which lcpo-max reads: take'),
    ):
        with pytest.raises(StageFailed, match=message):
            lines_with(tmp_path / name, tiny_model_folder, suffix)
        assert not list((tmp_path / name).rglob("metrics.jsonl"))


def test_a_stage_runs_with_a_memory_of_a_pool(tmp_path, tiny_model_folder):
    recipe = recipe_of(tmp_path, tiny_model_folder, "objective: o1-pruner, weight: 0.1, reference: pool")
    pool, result = run_recipe(recipe, root=tmp_path / "runs", methods=METHODS, report=PlainReport())
    lines = read_lines(result.folder / "metrics.jsonl")
    assert [line["length_weight"] for line in lines] == [0.1] * 3
    assert any(line["length_value"] != 0 for line in lines)
    assert (pool.folder / "pool" / "pool.json").is_file()
