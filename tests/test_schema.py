"""Recipes: defaults, references, overrides, and sixty ways to get one wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from recipes.loader import RecipeError
from recipes.methods import METHOD_KEYS
from recipes.schema import Recipe, Reference, json_schema, load_recipe, read_reference

Timed = Callable[[list[str]], tuple[float, subprocess.CompletedProcess[str]]]  # conftest.py's
ROOT = Path(__file__).resolve().parents[1]

GOOD = """\
name: small
seed: 7
problems: {source: tiny, levels: [2, 3], train: 40, dev: 8, test: 12}
sampling: {temperature: 0.9, max_tokens: 64}
stages:
  base: {method: pretrain, hidden: 32, layers: 1, heads: 2, steps: 5, styles: {guess: 1, plain: 2.5}}
  teacher:
    method: grpo
    model: base
    steps: 4
    learning_rate: 1e-5
    group_size: 8
  pool: {method: sample, model: teacher}
  traces: {method: traces, pool: pool, per_problem: 2}
  student: {method: sft, model: base, traces: traces, max_length: 128}
  brief: {method: shortest, pool: pool}
  brief_sft: {method: sft, model: teacher, traces: brief, max_length: 128}
  pairs: {method: pairs, pool: pool}
  dpo: {method: dpo, model: teacher, pairs: pairs, max_length: 128}
  merge-half: {method: merge, long: teacher, short: base, weight: 0.5}
  merged: {method: select, candidates: [merge-half, base], parent: teacher}
  squeezed: {method: length_rl, model: teacher, steps: 4, length: {weight: 0.3}, max_tokens: 32}
  score: {method: evaluate, model: student, temperature: 0.5}
  frontier:
    method: frontier
    parent: teacher
    arms: {base: base, teacher: teacher, best: merged}
"""


def write(folder: Path, text: str, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def good(tmp_path: Path) -> Recipe:
    return load_recipe(write(tmp_path, GOOD))


# --- what a good recipe gives ----------------------------------------------------------------------------------------


def test_defaults_are_filled_in(good: Recipe):
    teacher = good.stages["teacher"].config
    assert (good.name, good.seed) == ("small", 7)
    assert teacher.learning_rate == 1e-5
    assert (teacher.group_size, teacher.problems_per_step) == (8, 16)
    assert teacher.betas == (0.9, 0.95)
    assert (teacher.epsilon_low, teacher.epsilon_high) == (0.2, 0.28)
    assert (teacher.temperature, teacher.top_p, teacher.max_tokens) == (0.9, 1.0, 64)
    assert good.stages["squeezed"].config.max_tokens == 32
    assert good.stages["score"].config.temperature == 0.5
    assert good.stages["base"].config.levels == (2, 3)
    assert good.stages["brief"].config.samples == 8
    assert good.stages["dpo"].config.beta == 0.1


def test_a_frontier_expands_into_one_hidden_evaluation_per_arm(good: Recipe):
    hidden = [stage for stage in good.stages.values() if stage.hidden]
    assert [stage.name for stage in hidden] == ["frontier.base", "frontier.teacher", "frontier.best"]
    assert {stage.method for stage in hidden} == {"evaluate"}
    assert hidden[2].references() == [Reference("stage", "merged", "model", "model")]
    assert hidden[2].config.samples == 4
    assert hidden[2].config.temperature == 0.9
    assert list(good.stages)[-1] == "frontier"
    assert good.stages["frontier"].references()[2] == Reference("stage", "frontier.best", "arms.best", "evaluation")
    assert "frontier.base" not in good.stage_names()


def test_references_of_every_kind(good: Recipe):
    assert good.stages["base"].references() == []
    assert good.stages["student"].references() == [
        Reference("stage", "base", "model", "model"),
        Reference("stage", "traces", "traces", "traces"),
    ]
    assert [read.key for read in good.stages["merged"].references()] == ["candidates[0]", "candidates[1]", "parent"]
    folder = Path("/recipes")
    assert read_reference("./m/base", folder, "model", "model").path == Path("/recipes/m/base")
    assert read_reference("../base", folder, "model", "model").path == Path("/base")
    assert read_reference("/abs/base", folder, "model", "model").path == Path("/abs/base")
    assert read_reference("org/name", folder, "model", "model").kind == "hub"
    assert read_reference("name", folder, "model", "model").kind == "stage"


def test_a_model_folder_and_a_hub_id(tmp_path: Path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    text = GOOD.replace("model: base\n    steps", "model: ./m\n    steps").replace(
        "short: base", "short: org/short-cot"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.stages["teacher"].references() == [Reference("folder", "./m", "model", "model", tmp_path / "m")]
    assert recipe.stages["merge-half"].references()[1].kind == "hub"


def test_a_problem_file_is_read_by_every_stage_that_samples(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"question": "1+1", "answer": 2}\n')
    text = GOOD.replace("source: tiny, levels: [2, 3]", "source: ./p.jsonl").replace(
        "steps: 5,", "steps: 5, levels: [2],"
    )
    recipe = load_recipe(write(tmp_path, text))
    reads = {stage.name for stage in recipe.stages.values() if any(r.wants == "problems" for r in stage.references())}
    assert {"teacher", "pool", "merged", "squeezed", "score", "frontier.base"} <= reads
    assert reads.isdisjoint({"base", "traces", "student", "dpo"})
    assert recipe.stages["pool"].references()[1].path == tmp_path / "p.jsonl"


def test_parts_and_what_they_need(good: Recipe):
    assert good.part("rl") == ["teacher"]
    assert good.part("distill") == ["traces", "student"]
    assert good.part("long2short") == [
        "brief", "brief_sft", "pairs", "dpo", "merge-half", "merged", "squeezed", "frontier",
    ]  # fmt: skip
    assert [stage.name for stage in good.with_needs(["student"])] == ["base", "teacher", "pool", "traces", "student"]
    needed = [stage.name for stage in good.with_needs(["frontier"])]
    assert needed.index("frontier.best") < needed.index("frontier")
    assert "student" not in needed
    with pytest.raises(RecipeError, match="did you mean student"):
        good.stage("studnet")


def test_a_recipe_without_such_a_part_says_so(tmp_path: Path):
    text = GOOD.split("  teacher:")[0]
    with pytest.raises(RecipeError, match="recipe small has no rl stage"):
        load_recipe(write(tmp_path, text)).part("rl")


def test_identity_holds_what_changes_a_stage_and_nothing_else(tmp_path: Path):
    path = write(tmp_path, GOOD)
    before, after = load_recipe(path), load_recipe(path, ["problems.test=5", "score.samples=3"])
    same = {
        name for name in before.stages if before.identity(before.stages[name]) == after.identity(after.stages[name])
    }
    assert set(before.stages) - same == {"score", "frontier", "frontier.base", "frontier.teacher", "frontier.best"}
    other_seed = load_recipe(path, seed=8)
    assert other_seed.identity(other_seed.stages["pool"]) != before.identity(before.stages["pool"])
    assert "model" not in before.identity(before.stages["teacher"])["config"]
    json.dumps(before.identity(before.stages["frontier"]))


def test_comments_and_order_of_keys_do_not_change_identity(tmp_path: Path):
    first = load_recipe(write(tmp_path, GOOD))
    text = "# a comment\n" + GOOD.replace("method: grpo\n    model: base", "model: base\n    method: grpo  # core")
    second = load_recipe(write(tmp_path, text, "other.yaml"))
    assert [first.identity(s) for s in first.stages.values()] == [second.identity(s) for s in second.stages.values()]


def test_overrides(tmp_path: Path):
    path = write(tmp_path, GOOD)
    recipe = load_recipe(
        path,
        [
            "teacher.steps=2",
            "stages.teacher.betas=[0.8, 0.9]",
            "teacher.length.weight=0.25",
            "sampling.max_tokens=99",
            "problems.test=50",
            "seed=1",
            "score.model=base",
            "teacher.learning_rate=2e-4",
            'problems.prompt_suffix=" think"',
        ],
    )
    teacher = recipe.stages["teacher"].config
    assert (teacher.steps, teacher.betas, teacher.length.weight, teacher.learning_rate) == (2, (0.8, 0.9), 0.25, 2e-4)
    assert (teacher.max_tokens, recipe.problems.test, recipe.seed) == (99, 50, 1)
    assert recipe.stages["score"].references()[0].ref == "base"
    assert recipe.problems.prompt_suffix == " think"
    assert load_recipe(path, ["seed=1"], seed=5).seed == 5


def test_an_override_of_one_alias_leaves_the_other(tmp_path: Path):
    text = GOOD.replace("length: {weight: 0.3}", "length: &l {weight: 0.3}").replace(
        "  score:", "  again: {method: length_rl, model: teacher, steps: 4, length: *l}\n  score:"
    )
    recipe = load_recipe(write(tmp_path, text), ["again.length.weight=0.7"])
    assert recipe.stages["squeezed"].config.length.weight == 0.3
    assert recipe.stages["again"].config.length.weight == 0.7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teecher.steps=2", "there is no stage or key 'teecher'; did you mean teacher?"),
        (
            "teacher.stepz=2",
            "--set teacher.stepz=2: stages.teacher.stepz: unknown key of method grpo; did you mean steps?",
        ),
        (
            "teacher.steps=two",
            "--set teacher.steps=two: stages.teacher.steps: must be a whole number, not the text 'two'",
        ),
        ("teacher.steps=", "must be a whole number, not empty (null)"),
        ("teacher.steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("teacher..steps=3", "write it as key=value"),
        ("teacher=3", "teacher is a stage; name one of its keys"),
        ("teacher.steps.more=3", "stages.teacher.steps is 4, it has no keys"),
        ("teacher.lenght.weight=1", "--set teacher.lenght.weight=1: stages.teacher.lenght: unknown key"),
        ("stages.nobody.steps=3", "there is no such stage"),
        ("stages=3", "there is no such stage"),
        ("sampling.max_token=9", "unknown key; did you mean max_tokens?"),
        ("problems.test=.nan", "not a finite number"),
        ("seed=-1", "must be at least 0, not -1"),
        ("seed=[", "not valid YAML"),
        ("teacher.steps=!!int 3", "tags"),
        (
            "score.model=studen",
            "--set score.model=studen: stages.score.model: there is no stage 'studen'; did you mean student",
        ),
        ("teacher.steps=" + "1" * 20_000, "too long"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD), [override])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- what is refused -------------------------------------------------------------------------------------------------

# (what to replace in GOOD, with what, the line that is named, part of the message)
BAD = [
    ("group_size: 8", "group_sise: 8", 12, "group_sise: unknown key of method grpo; did you mean group_size?"),
    ("seed: 7", "sed: 7", 2, "sed: unknown key; did you mean seed?"),
    ("train: 40", "trian: 40", 3, "problems.trian: unknown key; did you mean train?"),
    ("plain: 2.5", "plane: 2.5", 6, "stages.base.styles.plane: unknown key; did you mean plain?"),
    ("length: {weight: 0.3}", "length: {weight: 0.3, wramup_steps: 1}", 22, "did you mean warmup_steps?"),
    ("method: grpo", "method: gpro", 8, "there is no method the text 'gpro'; did you mean grpo?"),
    ("method: grpo", "method: 5", 8, "there is no method 5; methods are pretrain"),
    ("    method: grpo\n", "", 7, "stages.teacher.method: required key is missing"),
    ("steps: 4\n    learning", "learning", 7, "stages.teacher.steps: required key is missing (Rollout steps)"),
    ("name: small\n", "", 1, "name: required key is missing"),
    ("problems: {source: tiny, levels: [2, 3], train: 40, dev: 8, test: 12}\n", "", 1, "problems: required key"),
    ("source: tiny, ", "", 3, "problems.source: required key"),
    ("group_size: 8", "group_size: '8'", 12, "must be a whole number, not the text '8'; remove the quotes"),
    ("group_size: 8", "group_size: 8.0", 12, "must be a whole number, not 8.0"),
    ("group_size: 8", "group_size: true", 12, "must be a whole number, not true"),
    ("group_size: 8", "group_size: null", 12, "must be a whole number, not empty"),
    ("group_size: 8", "group_size: [8]", 12, "must be a whole number, not a list"),
    ("group_size: 8", "group_size: 010", 12, "must be a whole number, not the text '010'"),
    ("group_size: 8", "group_size: 1", 12, "must be at least 2, not 1"),
    ("group_size: 8", "group_size: 8\n    mask_truncated: no", 13, "or false, not the text 'no'; write false"),
    ("group_size: 8", "group_size: 8\n    mask_truncated: 1", 13, "must be true or false, not 1"),
    ("learning_rate: 1e-5", "learning_rate: fast", 11, "must be a number, not the text 'fast'"),
    ("learning_rate: 1e-5", "learning_rate: -1e-5", 11, "must be above 0"),
    ("learning_rate: 1e-5", "learning_rate: .nan", 11, "not a finite number"),
    ("learning_rate: 1e-5", "learning_rate: .inf", 11, "not a finite number"),
    ("learning_rate: 1e-5", "learning_rate: 1e999", 11, "not a finite number"),
    ("learning_rate: 1e-5", "learning_rate: true", 11, "must be a number, not true"),
    ("learning_rate: 1e-5", "betas: [0.9]", 11, "the list is too short"),
    ("learning_rate: 1e-5", "betas: [0.9, 1.5]", 11, "stages.teacher.betas[1]: must be below 1"),
    ("learning_rate: 1e-5", "betas: 0.9", 11, "must be a list, not 0.9"),
    ("learning_rate: 1e-5", "keep: bst", 11, "must be last or best or balance, not the text 'bst'; did you mean best?"),
    ("learning_rate: 1e-5", "keep: best", 11, "best needs evaluations: set eval_every above 0"),
    ("learning_rate: 1e-5", "stop_at_accuracy: 0.9", 11, "needs evaluations"),
    ("learning_rate: 1e-5", "eval_every: 9", 11, "it would never evaluate"),
    ("learning_rate: 1e-5", "updates_per_step: 3", 11, "3 does not divide problems_per_step (16)"),
    ("learning_rate: 1e-5", "top_p: 0.9", 11, "must be 1 for RL"),
    ("max_tokens: 64}", "max_tokens: 64, top_p: 0.9}", 7, "sampling.top_p is 0.9, but RL needs 1"),
    ("learning_rate: 1e-5", "reward_format: 1.1", 11, "not below reward_accuracy"),
    ("length: {weight: 0.3}", "length: {weight: 1.8}", 22, "stages.squeezed.length.weight: must be below 2 x"),
    ("length: {weight: 0.3}", "length: {weight: 0.3, warmup_steps: 4}", 22, "would never start"),
    ("length: {weight: 0.3}", "length: {weight: 0.3, objective: kimmi}", 22, "must be one of kimi"),
    ("length: {weight: 0.3}", "length: 0.3", 22, "must be a mapping of keys, not 0.3"),
    (", length: {weight: 0.3}", "", 22, "stages.squeezed.length: required key"),
    ("weight: 0.5}", "weight: 1.5}", 20, "must be at most 1"),
    ("hidden: 32", "hidden: 33", 6, "not divisible by 2 x heads = 4"),
    ("hidden: 32, ", "", 6, "stages.base.hidden: required key is missing"),
    ("guess: 1, plain: 2.5", "guess: 0", 6, "all weights are 0"),
    ("model: base\n    steps", "model: bsae\n    steps", 9, "there is no stage 'bsae'; did you mean base?"),
    ("model: base\n    steps", "model: student\n    steps", 9, "stage student is written later (line 15)"),
    ("model: base\n    steps", "model: teacher\n    steps", 9, "the stage names itself"),
    ("model: base\n    steps", "model: ./nowhere\n    steps", 9, "there is no folder ./nowhere"),
    ("model: base\n    steps", "model: .\n    steps", 9, "there is no stage '.'"),
    ("model: base\n    steps", "model: ~/base\n    steps", 9, "neither a hub id"),
    ("model: base\n    steps", "model: a/b/c\n    steps", 9, "neither a hub id"),
    ("model: base\n    steps", "model: 5\n    steps", 9, "must be a text, not 5; put it in quotes"),
    ("model: student,", "model: traces,", 23, "stage traces is of method traces, which makes no model"),
    ("traces, pool: pool", "traces, pool: teacher", 14, "stage teacher is of method grpo, which makes no pool"),
    ("traces, pool: pool", "traces, pool: ./pool", 14, "must name a stage of this recipe"),
    ("traces: traces, max", "traces: pairs, max", 15, "stage pairs is written later"),
    ("traces: brief,", "traces: pool,", 17, "made_traces, mix (here: traces, brief)"),
    ("pairs: pairs,", "pairs: traces,", 19, "makes no pairs"),
    ("shortest, pool: pool", "shortest, pool: pool, samples: 9", 16, "9 is more than the 8 samples of stage pool"),
    ("sample, model: teacher", "sample, model: teacher, problems: test", 14, "train only on train problems"),
    ("sample, model: teacher", "sample, model: teacher, samples: 1", 18, "a pair takes 2"),
    ("sample, model: teacher", "sample, model: teacher, problems: tset", 13, "did you mean test?"),
    ("candidates: [merge-half, base]", "candidates: []", 21, "must not be empty"),
    ("candidates: [merge-half, base]", "candidates: [base, base]", 21, "names base more than once"),
    ("candidates: [merge-half, base]", "candidates: [merge-half, bas]", 21, "merged.candidates[1]: there is no stage"),
    ("candidates: [merge-half, base]", "candidates: base", 21, "must be a list, not the text 'base'"),
    ("parent: teacher\n", "parent: teachr\n", 26, "'teachr' is not one of the arms; did you mean teacher?"),
    ("best: merged", "best: mergd", 27, "stages.frontier.arms.best: there is no stage 'mergd'; did you mean merged?"),
    ("best: merged", "b t: merged", 27, "a name is letters, digits"),
    ("arms: {base: base, teacher: teacher, best: merged}", "arms: {}", 27, "must not be empty"),
    ("arms: {base", "compare: [[base, bast]]\n    arms: {base", 27, "compare: 'bast' is not one of the arms"),
    ("source: tiny", "source: tinny", 3, "starts with ./ ../ or /, not 'tinny'; did you mean tiny?"),
    ("source: tiny, levels: [2, 3]", "source: p.jsonl", 3, "did you mean ./p.jsonl?"),
    ("source: tiny, levels: [2, 3]", "source: ./p.jsonl", 3, "there is no file ./p.jsonl"),
    ("source: tiny", "source: ./p.jsonl", 3, "only the tiny world has levels"),
    ("levels: [2, 3]", "levels: []", 3, "must not be empty"),
    ("levels: [2, 3]", "levels: [2, x]", 3, "problems.levels[1]: must be a whole number"),
    ("name: small", "name: ../escape", 1, "a name is letters, digits"),
    ("name: small", "name: 5", 1, "must be a text, not 5; put it in quotes"),
    ("seed: 7", "seed: -1", 2, "must be at least 0, not -1"),
    ("seed: 7", "seed: 1e3", 2, "must be a whole number, not 1000.0"),
    ("temperature: 0.9", "temperature: 0", 4, "must be above 0"),
    ("  score: {", "  score one: {", 23, "a name is letters, digits"),
    ("  score: {", "  seed: {", 23, "cannot be the name of a stage"),
    ("score: {method: evaluate, model: student, temperature: 0.5}", "score: 5", 23, "must be a mapping of keys, not 5"),
    ("  score: {", "  base: {", 23, "duplicate key; first given on line 6"),
    ("  score: {", "\tscore: {", 23, "tab character"),
    ("  score: {", "  score: !!python/object:os.system {", 23, "tags"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "message"), BAD, ids=[f"{n}-{case[1][:24]}" for n, case in enumerate(BAD)]
)
def test_malformed_recipes(tmp_path: Path, old: str, new: str, line: int, message: str):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert message in text
    assert any(f"{path}:{line}: " in shown and message in shown for shown in text.splitlines())
    assert len(text.splitlines()) <= 11


def test_faults_of_several_stages_are_listed_together(tmp_path: Path):
    text = GOOD.replace("group_size: 8", "group_sise: 8").replace("weight: 0.5}", "weight: x}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert [fault.line for fault in caught.value.faults] == [12, 20]
    assert [fault.key for fault in caught.value.faults] == ["stages.teacher.group_sise", "stages.merge-half.weight"]


def test_a_recipe_of_no_stage(tmp_path: Path):
    head = GOOD.split("stages:")[0]
    for stages, message in (("stages: {}", "must not be empty"), ("stages:", "mapping"), ("stages: [a]", "mapping")):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write(tmp_path, head + stages + "\n"))


def test_the_files_that_a_recipe_name_can_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipes.schema.RECIPES_FOLDER", tmp_path)
    write(tmp_path, GOOD)
    assert load_recipe("small").name == "small"
    with pytest.raises(RecipeError, match=r"no recipe named 'smal'.*did you mean small"):
        load_recipe("smal")
    with pytest.raises(RecipeError, match="there is no such file"):
        load_recipe("./small")


def test_the_kimi_bound_is_the_paper_s_two_without_a_format_reward(tmp_path: Path):
    # accuracy 1, format f: the worst right answer has 1 - w/2, the best wrong one f; w < 2 (1 - f).
    path = write(tmp_path, GOOD)
    load_recipe(path, ["squeezed.length.weight=1.99", "squeezed.reward_format=0"])
    load_recipe(path, ["squeezed.length.weight=1.79"])
    with pytest.raises(RecipeError, match=r"must be below 2 x \(reward_accuracy - reward_format\) = 1\.8, not 1\.8"):
        load_recipe(path, ["squeezed.length.weight=1.8"])


def test_json_schema_describes_every_key():
    schema = json_schema()
    json.dumps(schema)
    definitions = {"RecipeFile": schema, **schema["$defs"]}
    assert {keys.__name__ for keys in METHOD_KEYS.values()} <= set(definitions)
    bare = [
        f"{name}.{key}"
        for name, definition in definitions.items()
        for key, value in definition["properties"].items()
        if "description" not in value and key != "method"
    ]
    assert bare == []
    assert all(definition["additionalProperties"] is False for definition in definitions.values())


def test_every_method_has_its_keys():
    assert all(get_args(keys.model_fields["method"].annotation) == (name,) for name, keys in METHOD_KEYS.items())


# --- through the command ---------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.parametrize(
    ("old", "new", "line"),
    [("group_size: 8", "group_sise: 8", 12), ("seed: 7", "seed: .nan", 2), ("model: student,", "model: studnt,", 23)],
)
def test_the_command_refuses_on_one_screen_in_a_second(
    tmp_path: Path,
    timed: Timed,
    libraries_seconds: float,
    old: str,
    new: str,
    line: int,
):
    path = write(tmp_path, GOOD.replace(old, new, 1))
    seconds, done = timed([str(ROOT / "cli.py"), "run", str(path)])
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{path}:{line}: " in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 25
    assert seconds <= max(1.0, 4 * libraries_seconds)
