"""Cold start: worked solutions become traces; and problems that a stage makes, in a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.rewrite import rewrite_solutions, think_text, without_marks
from distill.traces import flaw, read_traces
from recipes.loader import RecipeError
from recipes.schema import Reference, file_reference, load_recipe
from rl.problems import BadProblems
from rl.rewards import FormatReward
from rl.tasks import integers
from rl.tasks.base import split_of
from rl.types import Completion, FinishReason, Problem, Rollout, TextPart

SOLUTION = "Ann sold 48/2 = <<48/2=24>>24 clips in May.\nAnn sold 48+24 = <<48+24=72>>72 clips."


def problem_in(split: str, answer: str = "72") -> Problem:
    texts = (f"How many clips in year {year}?" for year in range(100))
    return next(p for text in texts if split_of(p := Problem(text, (TextPart(text),), answer)) == split)


def test_the_arithmetic_of_the_docstrings():
    assert without_marks("48/2 = <<48/2=24>>24") == "48/2 = 24"
    assert without_marks("48/2 = <<48/2=24") is None
    assert think_text("1+1 = 2", "2", prefilled=True) == "1+1 = 2\n</think>\n\\boxed{2}"
    assert think_text("1+1 = 2", "2", prefilled=False) == "<think>\n1+1 = 2\n</think>\n\\boxed{2}"


@pytest.mark.parametrize("prefilled", [False, True])
def test_a_trace_is_right_and_has_the_form_that_rl_rewards(prefilled):
    problem = problem_in("train")
    selection = rewrite_solutions([(problem, SOLUTION)], count_tokens=len, prefilled=prefilled)
    (trace,) = selection.traces
    assert trace.text.removeprefix("<think>\n") == (
        "Ann sold 48/2 = 24 clips in May.\nAnn sold 48+24 = 72 clips.\n</think>\n\\boxed{72}"
    )
    assert (trace.num_tokens, trace.teacher) == (len(trace.text) + 1, "worked solutions")
    completion = Completion(trace.text, (1, 2), (0.0, 0.0), FinishReason.STOP)
    rollout = Rollout(completion, integers.judge(problem, completion))
    assert rollout.right
    assert FormatReward(prefilled)(rollout) == 1.0
    assert flaw(rollout, prefilled=prefilled) is None


def test_everything_that_is_no_trace_is_counted():
    train = problem_in("train")
    solved = [
        (train, SOLUTION),
        (train, ""),
        (problem_in("dev"), SOLUTION),
        (problem_in("test"), SOLUTION),
        (train, "2 = <<2"),
        (train, "it is</think>"),
        (train, "it is<|im_end|>"),
        (train, "1+71 = 72"),
    ]
    selection = rewrite_solutions(solved, count_tokens=len, prefilled=False, forbidden={"<|im_end|>"}, count=1)
    assert (selection.kept, selection.pool) == (1, 8)
    assert dict(selection.dropped) == {
        "not in the train split": 2, "special token in the text": 2, "broken calculator mark": 1,
        "no worked solution": 1, "over the count": 1,
    }  # fmt: skip


# --- problems made by a stage ----------------------------------------------------------------------------------------

RECIPE = """\
name: words
problems: {source: words, task: integers}
sampling: {max_tokens: 8}
stages:
  words: {method: word_problems, files: [./gsm8k.jsonl, $WORDS/mawps.jsonl], max_steps: 3}
  cold: {method: worked_solutions, problems: words, model: ./model}
  pool: {method: sample, model: ./model, count: 2, samples: 1}
  sft: {method: sft, model: ./model, traces: cold, max_length: 600}
  frontier: {method: frontier, parent: base, arms: {base: ./model}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe with its files: 20 rows like GSM8K's beside it, 2 like MAWPS's in the folder $WORDS."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data").mkdir()
    rows = [
        {"question": f"What is {n} + {n}?", "answer": f"{n}+{n} = <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(20)
    ]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"input": "Half of 3 ?", "target": 1.5}, {"input": "Twice 3 ?", "target": 6.0}]
    (tmp_path / "data" / "mawps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("WORDS", str(tmp_path / "data"))
    path = tmp_path / "words.yaml"
    path.write_text(RECIPE)
    return path


def test_a_stage_can_be_the_source_of_problems(recipe):
    loaded = load_recipe(recipe)
    source = Reference("stage", "words", "problems.source", "problems")
    assert loaded.problems_file is None
    for name in ("pool", "frontier.base"):
        assert source in loaded.stages[name].references()
    assert source not in loaded.stages["sft"].references()
    files = loaded.stages["words"].references()
    assert [read.path for read in files] == [recipe.parent / "gsm8k.jsonl", recipe.parent / "data" / "mawps.jsonl"]
    assert loaded.part("distill") == ["cold", "sft"]
    assert [stage.name for stage in loaded.with_needs(["pool"])] == ["words", "pool"]
    exact = load_recipe(recipe, ["problems.task=exact"])
    assert loaded.identity(loaded.stages["pool"]) != exact.identity(exact.stages["pool"])


def test_a_folder_that_is_not_set_is_no_fault_of_the_recipe(recipe, monkeypatch):
    monkeypatch.delenv("WORDS")
    assert load_recipe(recipe).stages["words"].references()[1].path is None
    assert file_reference("$WORDS/a.jsonl", Path("/recipes"), "files[0]") == Reference(
        "file", "$WORDS/a.jsonl", "files[0]", "file"
    )
    monkeypatch.setenv("WORDS", "/data")
    assert file_reference("$WORDS/a.jsonl", Path("/recipes"), "files[0]").path == Path("/data/a.jsonl")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("$WORDS/mawps", "$WORDS/mwps", 5, "stages.words.files[1]: there is no file $WORDS/mwps.jsonl (/"),
        ("./gsm8k", "./gsm", 5, "stages.words.files[0]: there is no file ./gsm.jsonl"),
        ("./gsm8k", "gsm8k", 5, "must be a path that starts with ./ ../ / or $NAME/, not 'gsm8k.jsonl'"),
        ("$WORDS/mawps", "$2/mawps", 5, "must be a path that starts with"),
        ("source: words", "source: word", 2, "must be tiny, puzzles, a stage, a hub id (org/name), or a path that"),
        ("source: words", "source: sft", 7, "stage sft is written later"),
        ("source: words", "source: cold", 7, "stage cold is of method worked_solutions, which makes no problems"),
        ("problems: words,", "problems: cold,", 6, "the stage names itself"),
        ("task: integers", "task: integer", 2, "must be exact or integers or math or code or"),
        ("source: words", "source: tiny", 2, "problems.task: the tiny world has its own judge"),
        ("./gsm8k.jsonl, $WORDS/mawps.jsonl", "", 5, "must not be empty"),
    ],
)  # fmt: skip
def test_what_is_refused(recipe, old, new, line, message):
    assert RECIPE.count(old) == 1
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert any(f"{recipe}:{line}: " in shown and message in shown for shown in str(caught.value).splitlines())


def test_import_gguf_takes_a_package_or_a_file(recipe):
    for keys in ("", ", package: some_model, file: ./gsm8k.jsonl"):
        recipe.write_text(RECIPE + f"  start: {{method: import_gguf{keys}}}\n")
        with pytest.raises(RecipeError, match=r"stages.start.package: give either package or file"):
            load_recipe(recipe)
    recipe.write_text(RECIPE + "  start: {method: import_gguf, file: ./gsm8k.jsonl}\n")
    assert load_recipe(recipe).stages["start"].references()[0].wants == "file"


def run(recipe: Path, runs: Path, targets: list[str]) -> dict[str, Path]:
    from recipes.console import PlainReport
    from recipes.runner import run_recipe
    from recipes.stages import METHODS

    loaded = load_recipe(recipe, [f"cold.model={runs.parent}/model"])
    results = run_recipe(loaded, root=runs, methods=METHODS, report=PlainReport(), targets=targets)
    return {result.name: result.folder for result in results}


def test_the_stages_run(recipe, tmp_path, tiny_model_folder):
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model").rmdir()
    (tmp_path / "model").symlink_to(tiny_model_folder)
    folders = run(recipe, tmp_path / "runs", ["cold", "pool"])
    summary = json.loads((folders["words"] / "summary.json").read_text())
    assert summary == {
        "rows": 22, "kept": 21, "dropped": {"answer is not a whole number": 1}, "steps": {"0": 1, "1": 20},
    }  # fmt: skip
    traces = read_traces(folders["cold"] / "traces.jsonl")
    assert 8 <= len(traces) <= 18
    assert traces[0].text.endswith("}") and "<<" not in traces[0].text
    pool = (folders["pool"] / "pool").glob("samples-*.jsonl")
    assert sum(path.read_text().count("\n") for path in pool) == 2


def test_a_missing_folder_stops_the_run_with_where_to_get_the_data(recipe, tmp_path, monkeypatch):
    from recipes.runner import StageFailed

    monkeypatch.delenv("WORDS")
    with pytest.raises(StageFailed, match=r"\$WORDS/mawps.jsonl: WORDS is not set: `export WORDS=FOLDER`") as caught:
        run(recipe, tmp_path / "runs", ["words"])
    assert isinstance(caught.value.__cause__, BadProblems)  # the command shows it as it is, with exit code 2
