"""Every task through the recipe's door: problems are read, completions judged, and verdict files say by whom."""

import json
from pathlib import Path

import pytest

from recipes import tasks
from recipes.console import PlainReport
from recipes.loader import RecipeError
from recipes.problem_keys import Problems, source_kind
from recipes.runner import StageFailed, run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.problems import BadProblems, read_problems
from rl.tasks.code_tests import StdinTests, dump_tests
from rl.workers import Answer

pytestmark = pytest.mark.sandbox

RECIPE = """name: judged
problems: {%s}
sampling: {max_tokens: 8}
stages:
%s  scores: {method: evaluate, model: %s, problems: test, samples: 1}
"""


@pytest.fixture(autouse=True)
def _tasks_are_opened_anew():
    tasks._opened.cache_clear()
    yield
    tasks._opened.cache_clear()


def rows(folder, *made):
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def run(folder, model, problems, stages=""):
    path = folder / "judged.yaml"
    path.write_text(RECIPE % (problems, stages, model))
    results = run_recipe(load_recipe(path), root=folder / "runs", methods=METHODS, report=PlainReport())
    return results[-1].folder


def verifier(folder):
    (path,) = (folder / "pool").glob("verdicts-*-00000.jsonl")
    return path.name.removeprefix("verdicts-").removesuffix("-00000.jsonl")


TESTS = json.loads(dump_tests(StdinTests((("1 2\n", "3\n"), ("5 5\n", "10\n")))))
PROBLEM_ROWS = {
    "math": ([{"problem": f"{n}+x?", "solution": rf"\boxed{{x+{n}}}"} for n in range(12)], "math-1"),
    "integers": ([{"question": f"{n}+1?", "answer": n + 1} for n in range(12)], "integers-1"),
    "constraints": (
        [{"question": f"Say {n}.", "constraints": [{"check": "no_comma"}]} for n in range(12)],
        "constraints-1",
    ),
    "code": ([{"question": f"Add ({n}).", "answer": "print(3)", "spec": TESTS} for n in range(12)], "code-1"),
}


@pytest.mark.parametrize("task", PROBLEM_ROWS)
def test_problems_of_a_file_are_judged_by_their_task(tmp_path, tiny_model_folder, task):
    made, version = PROBLEM_ROWS[task]
    rows(tmp_path, *made)
    folder = run(tmp_path, tiny_model_folder, f"source: ./p.jsonl, task: {task}")
    assert verifier(folder) == version
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["undecided"] == 0 and summary["num_problems"] >= 1
    (line,) = (folder / "pool" / "judging.jsonl").read_text().splitlines()
    assert json.loads(line)["verifier"] == version


def test_columns_and_a_fallback(tmp_path, tiny_model_folder):
    rows(tmp_path, *[{"prompt": f"{n}+1?", "gold": str(n + 1)} for n in range(12)])
    problems = "source: ./p.jsonl, task: math, fallback: number, columns: {question: prompt, answer: gold}"
    assert verifier(run(tmp_path, tiny_model_folder, problems)) == "math-1-number"


def test_a_reference_that_cannot_be_read_ends_the_stage_by_its_line(tmp_path, tiny_model_folder):
    rows(tmp_path, *[{"question": f"{n}?", "answer": r"\frac{1}{"} for n in range(12)])
    with pytest.raises(StageFailed, match="cannot be read as mathematics"):
        run(tmp_path, tiny_model_folder, "source: ./p.jsonl, task: math")


def test_a_model_judges(tmp_path, tiny_model_folder, monkeypatch):
    chats = []

    class Chat:
        name = "scripted"

        def __init__(self, url, model, **options):
            chats.append((url, model, options))

        def __call__(self, requests):
            return [Answer('{"analysis": "", "correctness": "incorrect"}', None, "", 0.1) for _ in requests]

    monkeypatch.setattr("rl.samplers.openai.OpenAIChat", Chat)
    rows(tmp_path, *[{"question": f"{n}?", "answer": "a"} for n in range(12)])
    judge = "judge: {url: 'http://127.0.0.1:9/v1', model: m, orders: 1}"
    folder = run(tmp_path, tiny_model_folder, f"source: ./p.jsonl, task: judge, max_undecided: 1.0, {judge}")
    assert verifier(folder).startswith("judge-1-")
    assert chats == [("http://127.0.0.1:9/v1", "m", {"api_key_variable": None, "workers": 8})]


def test_puzzles_are_made_and_scored_in_the_sandbox(tmp_path, tiny_model_folder):
    problems = "source: puzzles, puzzles: {sets: [mini_sudoku, knights_knaves]}, test: 6"
    folder = run(tmp_path, tiny_model_folder, problems)
    assert verifier(folder).startswith("puzzles")
    assert json.loads((folder / "summary.json").read_text())["num_problems"] == 6


def test_tests_are_made_and_then_judge(tmp_path, tiny_model_folder):
    """Kimi's test generation as a stage: what is kept is the problem set of the stages after it."""
    add = "print(sum(map(int, input().split())))"
    generator = "import random, sys\nrandom.seed(sys.argv[1])\nprint(random.randrange(99), random.randrange(99))"
    programs = [f"{add}  # {n}" for n in range(3)]
    good = [
        {"id": f"add-{n}", "statement": f"Add two numbers ({n}).", "submissions": programs, "generator": generator}
        for n in range(8)
    ]
    bad = {"id": "none", "statement": "No generator.", "submissions": programs}
    (tmp_path / "contest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*good, bad]))
    rules = "inputs: 6, submissions: 3, agree: 2, valid: 4, passing: 3"
    stage = f"  made: {{method: make_tests, file: ./contest.jsonl, {rules}}}\n"
    folder = run(tmp_path, tiny_model_folder, "source: made, task: code", stage)
    assert verifier(folder) == "code-1"
    (made,) = (tmp_path / "runs" / "judged").glob("made-*/problems.jsonl")
    assert len(read_problems(made)) == 8
    summary = json.loads((made.parent / "summary.json").read_text())
    assert summary["dropped"] == {"no generator": 1} and summary["kept"] == 8


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("source: tiny, task: math", "problems.task: the tiny world has its own judge; remove this key"),
        ("source: ./p.jsonl, task: maths", "problems.task: must be .* did you mean math?"),
        ("source: ./p.jsonl, fallback: number", "problems.fallback: has no effect with task: exact"),
        ("source: ./p.jsonl, task: judge", "problems.judge: goes with task: judge"),
        ("source: puzzles", "problems.puzzles: goes with source: puzzles"),
        ("source: puzzles, puzzles: {sets: [survo]}", r"problems.puzzles.sets\[0\]: .*survo"),
        ("source: puzzles, puzzles: {sets: [mini_sudokus]}", "did you mean mini_sudoku"),
        ("source: $NOWHERE, task: math", r"must be a path that starts with ./ ../ / or \$NAME/"),
        ("source: ./q.jsonl", "problems.source: there is no file ./q.jsonl"),
        ("source: ./p.jsonl, columns: {question: q}", "answer: required, unless solution names a column"),
        ("source: ./p.jsonl, max_undecided: 2", "problems.max_undecided: must be at most 1"),
    ],
)
def test_what_is_refused(tmp_path, tiny_model_folder, section, message):
    rows(tmp_path, {"question": "q", "answer": 1})
    path = tmp_path / "judged.yaml"
    path.write_text(RECIPE % (section, "", tiny_model_folder))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_file_in_a_folder_of_the_environment(tmp_path, tiny_model_folder, monkeypatch):
    rows(tmp_path, *[{"question": f"{n}?", "answer": n} for n in range(12)])
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    assert verifier(run(tmp_path, tiny_model_folder, "source: $MY_DATA/p.jsonl")) == "exact-1"
    monkeypatch.delenv("MY_DATA")
    path = tmp_path / "judged.yaml"
    assert load_recipe(path).problems_file is None
    with pytest.raises(StageFailed) as failed:
        run_recipe(load_recipe(path), root=tmp_path / "other", methods=METHODS, report=PlainReport())
    assert isinstance(failed.value.__cause__, BadProblems) and "export MY_DATA=FOLDER" in str(failed.value)


def test_kinds_of_sources():
    kinds = {
        "tiny": "made", "puzzles": "made", "./p.jsonl": "file", "$DATA/p.jsonl": "file", "/p.parquet": "file",
        "openai/gsm8k/main:train": "hub", "words": "stage",
    }  # fmt: skip
    assert {source: source_kind(source) for source in kinds} == kinds


def test_one_section_opens_one_task(tmp_path):
    section = Problems.model_validate({"source": "./p.jsonl", "task": "math", "max_undecided": 0.5})
    again = Problems.model_validate({"source": "./p.jsonl", "task": "math", "max_undecided": 0.5})
    assert tasks.open_task(section) is tasks.open_task(again)
    assert tasks.open_task(section).limit.share == 0.5
    with pytest.raises(ValueError, match="there is no task 'maths'.*did you mean math"):
        tasks.section_for("p.jsonl", "maths")
    assert tasks.section_for("p.jsonl").source == "./p.jsonl"
    assert tasks.section_for(str(Path("/x/p.jsonl"))).source == "/x/p.jsonl"
