"""The runner: kill it anywhere, run it again, and the folders are those of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest

from recipes.loader import RecipeError
from recipes.runner import (
    EXECUTION_KEYS,
    StageContext,
    StageFailed,
    StageFunction,
    StageResult,
    Status,
    plan_stages,
    run_recipe,
)
from recipes.schema import Recipe, load_recipe
from rl.runs import (
    DamagedFolder,
    RunLock,
    RunLocked,
    append_line,
    file_hash,
    latest_checkpoint,
    latest_folder,
    read_json,
    read_lines,
    rewind_lines,
    save_checkpoint,
    write_file,
    write_json,
)

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """
name: fake
seed: 0
problems: {source: ./problems.jsonl, train: 40, dev: 20, test: 20}
stages:
  teacher: {method: grpo, model: ./base, steps: 4, eval_every: 2, save_every: 1}
  pool: {method: sample, model: teacher, samples: 4}
  traces: {method: traces, pool: pool}
  student: {method: sft, model: ./base, traces: traces, max_length: 64}
  merged: {method: merge, long: teacher, short: ./base, weight: 0.5}
  frontier: {method: frontier, parent: teacher, arms: {base: ./base, teacher: teacher, student: student}}
"""
STAGES = ["teacher", "pool", "traces", "student", "merged"]
STAGES += ["frontier.base", "frontier.teacher", "frontier.student", "frontier"]


# --- stage functions that are quick and write like the real ones ------------------------------------------------------


def write_total(total: int, folder: Path) -> None:
    write_json(folder / "state.json", total, "grpo.state")


def grpo(context: StageContext) -> None:
    """Draws a number a step and sums it; goes on from its last checkpoint."""
    total, step = 0, 0
    if found := latest_checkpoint(context.folder):
        step, checkpoint = found
        total = read_json(checkpoint / "state.json")
    rewind_lines(context.folder / "metrics.jsonl", step)
    while step < context.stage.steps:
        step += 1
        total += random.Random(f"{context.seed}/{step}").randrange(1000)
        append_line(context.folder / "metrics.jsonl", {"step": step, "total": total})
        save_checkpoint(context.folder, step, partial(write_total, total))
        context.progress(step, context.stage.steps)
    write_json(context.folder / "model" / "config.json", total, "grpo.model")


def sample(context: StageContext) -> None:
    for shard in range(3):
        path = context.folder / "pool" / f"samples-{shard:05d}.jsonl"
        if not path.exists():
            text = f"{context.seed} {shard} {Path(context.model(context.stage.model)).name}\n"
            write_file(path, text, "pool.shard")


def copy_inputs(context: StageContext) -> None:
    """Writes what it reads: the manifests' hashes of all inputs."""
    seen = {name: read_json(folder / "manifest.json")["files"] for name, folder in context.inputs.items()}
    write_json(context.folder / "summary.json", [context.seed, seen], "traces.write")
    write_json(context.folder / "model" / "config.json", context.name, "sft.model")


METHODS = {
    "grpo": grpo,
    "sample": sample,
    "evaluate": sample,
    "traces": copy_inputs,
    "sft": copy_inputs,
    "merge": copy_inputs,
    "frontier": copy_inputs,
}


class Log:
    """A report that keeps what it was told, and prints it."""

    def __init__(self) -> None:
        self.started: list[tuple[str, Status]] = []
        self.steps: list[tuple[str, int, int]] = []
        self.finished: list[tuple[str, Status]] = []

    def stage_started(self, name: str, method: str, position: int, total: int, status: Status) -> None:
        self.started.append((name, status))
        print("started", name, status, flush=True)  # noqa: T201, read by the parent of a killed child

    def stage_progress(self, name: str, done: int, total: int, note: str) -> None:
        self.steps.append((name, done, total))
        print("step", name, done, flush=True)  # noqa: T201

    def stage_finished(self, result: StageResult, position: int, total: int) -> None:
        self.finished.append((result.name, result.status))


def run(
    recipe: Recipe,
    root: Path,
    targets: Sequence[str] | None = None,
    verify: bool = False,
    methods: Mapping[str, StageFunction] = METHODS,
) -> tuple[list[StageResult], Log]:
    log = Log()
    results = run_recipe(recipe, root=root, methods={**METHODS, **methods}, report=log, targets=targets, verify=verify)
    assert [(result.name, result.status) for result in results] == log.finished
    return results, log


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return make_recipe(tmp_path / "project")


def make_recipe(folder: Path, text: str = RECIPE) -> Path:
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    (folder / "base" / "model.safetensors").write_bytes(b"weights")
    (folder / "problems.jsonl").write_text('{"question": "1+1", "answer": 2}\n')
    (folder / "fake.yaml").write_text(text)
    return folder / "fake.yaml"


def run_child(recipe: Path, root: Path, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, str(recipe), str(root)],
        env=child_environment(fault),
        capture_output=True,
        text=True,
        timeout=120,
    )


def child_environment(fault: str | None) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "REASON_FAULT"}
    environment["PYTHONPATH"] = str(ROOT)
    return environment | ({"REASON_FAULT": fault} if fault else {})


def contents(root: Path) -> dict[str, object]:
    """Every file below a folder of runs with its hash; of a manifest, all but the time it took."""
    found: dict[str, object] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        if path.name == "manifest.json":
            found[name] = {key: value for key, value in read_json(path).items() if key != "seconds"}
        else:
            found[name] = file_hash(path)
    return found


def finished_stages(root: Path) -> set[str]:
    """Names of the stages whose manifest is there, renamed or not."""
    return {read_json(path)["stage"] for path in (root / "fake").glob("*/manifest.json")}


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = make_recipe(folder / "project")
    done = run_child(recipe, folder / "runs")
    assert done.returncode == 0, done.stderr
    return recipe, contents(folder / "runs")


@pytest.mark.parametrize(
    "place",
    [
        "stage.start:1",
        "stage.start:7",
        "stage.end:4",
        "run.manifest:1",
        "run.rename:2",
        "run.latest:3",
        "write.temp:3",
        "write.rename:9",
        "checkpoint.write:3",
        "checkpoint.commit:3",
        "checkpoint.prune:3",
        "pool.shard:2",
    ],
)
def test_a_killed_run_goes_on_and_ends_byte_identical(
    place: str, undisturbed: tuple[Path, dict[str, object]], tmp_path: Path
):
    recipe, expected = undisturbed
    first = run_child(recipe, tmp_path, fault=f"{place}:kill")
    assert first.returncode == -signal.SIGKILL, first.stderr
    before = finished_stages(tmp_path)
    second = run_child(recipe, tmp_path)
    assert second.returncode == 0, second.stderr
    assert contents(tmp_path) == expected
    # Nothing finished was started again; of the steps of the unfinished stage, one checkpoint interval at most.
    started = {line.split()[1] for line in second.stdout.splitlines() if line.startswith("started")}
    assert started == set(STAGES) - before
    steps = [line for out in (first.stdout, second.stdout) for line in out.splitlines() if line.startswith("step")]
    assert len(steps) - len(set(steps)) <= 1


def test_a_run_killed_again_and_again_ends_byte_identical(undisturbed: tuple[Path, dict[str, object]], tmp_path: Path):
    recipe, expected = undisturbed
    places = [
        "checkpoint.commit:2",
        "write.temp:2",
        "run.rename:2",
        "pool.shard:3",
        "run.manifest:2",
        "run.latest:1",
        "stage.start:2",
        "write.rename:4",
    ]
    done = [run_child(recipe, tmp_path, fault=f"{place}:kill").returncode for place in places]
    assert done == [-signal.SIGKILL] * len(places)
    assert run_child(recipe, tmp_path).returncode == 0
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("place", ["write.temp:6:enospc", "run.manifest:2:eio", "pool.shard:2:enospc"])
def test_a_full_disk_names_stage_and_file_and_the_run_goes_on_when_there_is_space(
    place: str, undisturbed: tuple[Path, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe, expected = undisturbed
    monkeypatch.setenv("REASON_FAULT", place)
    with pytest.raises(StageFailed, match=r"stage \w+ failed: OSError: .* bytes were written; .*" + str(tmp_path)):
        run(load_recipe(recipe), tmp_path)
    assert list(tmp_path.rglob(".*.tmp")) == []
    monkeypatch.delenv("REASON_FAULT")
    run(load_recipe(recipe), tmp_path)
    assert contents(tmp_path) == expected


# --- what runs, what is reused ----------------------------------------------------------------------------------------


def test_everything_runs_once_in_order_and_is_then_reused(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file)
    results, log = run(recipe, tmp_path / "runs")
    assert log.started == [(name, Status.RAN) for name in STAGES]
    assert [name for name, _ in log.finished] == STAGES
    assert [step for step in log.steps if step[0] == "teacher"] == [("teacher", n, 4) for n in (1, 2, 3, 4)]
    again, log = run(recipe, tmp_path / "runs", verify=True)
    assert log.started == []
    assert {result.status for result in again} == {Status.REUSED}
    assert [(r.folder, r.seconds) for r in again] == [(r.folder, r.seconds) for r in results]
    for result in results:
        manifest = read_json(result.folder / "manifest.json")
        assert manifest["seconds"] == result.seconds >= 0
        assert latest_folder(tmp_path / "runs" / "fake", result.name) == result.folder
        assert not (result.folder / "checkpoints").exists()


def test_targets_run_with_what_they_need_and_nothing_else(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file)
    _, log = run(recipe, tmp_path, targets=["traces"])
    assert [name for name, _ in log.started] == ["teacher", "pool", "traces"]
    _, log = run(recipe, tmp_path, targets=["merged", "student"])
    assert [name for name, _ in log.started] == ["student", "merged"]
    with pytest.raises(RecipeError, match="did you mean merged"):
        run(recipe, tmp_path, targets=["mergd"])


def test_a_stage_gets_all_it_reads_directly_or_not(recipe_file: Path, tmp_path: Path):
    seen: dict[str, StageContext] = {}

    def keep(context: StageContext) -> None:
        seen[context.name] = context
        copy_inputs(context)

    run(load_recipe(recipe_file), tmp_path, methods={"merge": keep, "frontier": keep, "sft": keep})
    assert set(seen["merged"].inputs) == {"teacher"}
    assert set(seen["frontier"].inputs) == set(STAGES) - {"merged", "frontier"}
    assert all((folder / "manifest.json").is_file() for folder in seen["frontier"].inputs.values())
    student = seen["student"]
    assert student.folder.name.endswith(".partial")
    assert student.model("./base") == str(recipe_file.parent / "base")
    assert student.model("org/name-7b") == "org/name-7b"
    assert seen["merged"].model("teacher") == str(seen["merged"].inputs["teacher"] / "model")
    assert student.problems_file == recipe_file.parent / "problems.jsonl"
    assert student.stage.max_length == 64


def test_seeds_differ_by_stage_and_by_root_seed_and_are_stable(recipe_file: Path, tmp_path: Path):
    seeds: dict[tuple[int, str], int] = {}

    def keep(context: StageContext) -> None:
        seeds[context.recipe.seed, context.name] = context.seed

    for seed in (0, 1):
        run(load_recipe(recipe_file, seed=seed), tmp_path, methods=dict.fromkeys(METHODS, keep))
    assert len(set(seeds.values())) == len(seeds) == 2 * len(STAGES)
    # The first 4 bytes of sha256("0/teacher"), halved.
    assert seeds[0, "teacher"] == 1060373291
    assert all(0 <= seed < 2**31 for seed in seeds.values())


def test_a_failing_stage_is_named_and_its_work_is_kept(recipe_file: Path, tmp_path: Path):
    def broken(context: StageContext) -> None:
        write_file(context.folder / "half.txt", "half", "traces.write")
        raise ZeroDivisionError("no samples")

    recipe = load_recipe(recipe_file)
    with pytest.raises(StageFailed, match="stage traces failed: ZeroDivisionError: no samples") as caught:
        run(recipe, tmp_path, methods={"traces": broken})
    assert caught.value.stage == "traces" and isinstance(caught.value.__cause__, ZeroDivisionError)
    assert finished_stages(tmp_path) == {"teacher", "pool"}
    _, log = run(recipe, tmp_path)
    assert log.started[0] == ("traces", Status.RESUMED)
    assert log.started[1:] == [(name, Status.RAN) for name in STAGES[3:]]


def test_an_interrupt_passes_through_and_drops_the_lock(recipe_file: Path, tmp_path: Path):
    def interrupted(context: StageContext) -> None:
        raise KeyboardInterrupt

    recipe = load_recipe(recipe_file)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, methods={"merge": interrupted})
    with RunLock(tmp_path / "fake"):
        pass
    _, log = run(recipe, tmp_path, targets=["merged"])
    assert log.started == [("merged", Status.RESUMED)]


def test_a_second_run_is_refused_and_told_who_runs(recipe_file: Path, tmp_path: Path):
    command = [sys.executable, __file__, str(recipe_file), str(tmp_path)]
    child = subprocess.Popen(command, env=child_environment("stage.end:1:hang"), stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"started teacher ran\n"
        with pytest.raises(RunLocked, match=f"in use by process {child.pid} on "):
            run(load_recipe(recipe_file), tmp_path)
    finally:
        child.kill()
        child.communicate(timeout=60)
    _, log = run(load_recipe(recipe_file), tmp_path)
    assert [name for name, _ in log.finished] == STAGES


def test_a_reused_folder_that_was_changed_is_found_when_asked(recipe_file: Path, tmp_path: Path):
    recipe = load_recipe(recipe_file)
    results, _ = run(recipe, tmp_path, targets=["teacher"])
    (results[0].folder / "model" / "config.json").write_text("changed")
    run(recipe, tmp_path, targets=["teacher"])
    with pytest.raises(DamagedFolder, match=r"model/config\.json has changed"):
        run(recipe, tmp_path, targets=["teacher"], verify=True)


def test_a_method_without_a_function_is_refused_before_anything_runs(recipe_file: Path, tmp_path: Path):
    methods = {name: function for name, function in METHODS.items() if name != "merge"}
    with pytest.raises(ValueError, match="no stage function for method merge"):
        run_recipe(load_recipe(recipe_file), root=tmp_path / "runs", methods=methods, report=Log())
    assert not (tmp_path / "runs").exists()


# --- addresses --------------------------------------------------------------------------------------------------------


def addresses(recipe: Recipe) -> dict[str, str]:
    return {planned.stage.name: planned.folder.hash for planned in plan_stages(recipe, root=Path("runs"))}


def changed(recipe_file: Path, *overrides: str, seed: int | None = None) -> set[str]:
    """Which stages have another address under these overrides."""
    before, after = addresses(load_recipe(recipe_file)), addresses(load_recipe(recipe_file, overrides, seed))
    return {name for name in before if before[name] != after[name]}


READ_TEACHER = {"teacher", "pool", "traces", "student", "merged", "frontier.teacher", "frontier.student", "frontier"}


def test_addresses_are_distinct_and_stable(recipe_file: Path):
    found = addresses(load_recipe(recipe_file))
    assert list(found) == STAGES
    assert len(set(found.values())) == len(STAGES)
    assert addresses(load_recipe(recipe_file)) == found


def test_order_comments_spelling_of_numbers_and_place_do_not_count(recipe_file: Path, tmp_path: Path):
    other = RECIPE.replace("steps: 4, eval_every: 2", "eval_every: 0x2 # often\n   , learning_rate: 0.000001, steps: 4")
    other = "# a comment\n" + other.replace("0x2", "2").replace("save_every: 1", "save_every: 1, weight_decay: 0.0")
    moved = make_recipe(tmp_path / "elsewhere" / "deep", other)
    assert addresses(load_recipe(moved)) == addresses(load_recipe(recipe_file))


def test_a_change_recomputes_what_reads_it_and_nothing_else(recipe_file: Path):
    assert changed(recipe_file) == set()
    assert changed(recipe_file, "teacher.learning_rate=1e-5") == READ_TEACHER
    assert changed(recipe_file, "merged.weight=0.25") == {"merged"}
    assert changed(recipe_file, "student.epochs=3") == {"student", "frontier.student", "frontier"}
    assert changed(recipe_file, "frontier.parent=base") == {"frontier"}
    assert changed(recipe_file, "teacher.micro_batch_tokens=64") == set()
    assert changed(recipe_file, seed=1) == set(STAGES)


def test_problems_count_only_where_a_stage_reads_that_split(recipe_file: Path):
    arms = {"frontier.base", "frontier.teacher", "frontier.student", "frontier"}
    assert changed(recipe_file, "problems.test=10") == arms
    assert changed(recipe_file, "problems.dev=10") == READ_TEACHER  # teacher: eval_every is 2
    assert changed(recipe_file, "problems.prompt_suffix=Think.") == set(STAGES)


def test_sampling_counts_only_where_a_stage_samples_and_does_not_say_otherwise(recipe_file: Path):
    text = RECIPE.replace("samples: 4", "samples: 4, temperature: 0.7").replace("steps: 4", "steps: 4, temperature: 1")
    recipe_file.write_text(text)
    arms = {"frontier.base", "frontier.teacher", "frontier.student", "frontier"}
    assert changed(recipe_file, "sampling.temperature=0.8") == arms


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "new.json"])
def test_another_byte_in_a_model_folder_recomputes_its_readers(name: str, recipe_file: Path):
    before = addresses(load_recipe(recipe_file))
    (recipe_file.parent / "base" / name).write_text("other")
    after = addresses(load_recipe(recipe_file))
    assert all(before[stage] != after[stage] for stage in STAGES)


def test_another_byte_in_the_problem_file_recomputes_its_readers(recipe_file: Path):
    before = addresses(load_recipe(recipe_file))
    (recipe_file.parent / "problems.jsonl").write_text('{"question": "1+1", "answer": 3}\n')
    after = addresses(load_recipe(recipe_file))
    assert all(before[stage] != after[stage] for stage in STAGES)


# Another valid value for the keys where neither half of it nor one more is one.
OTHER = {
    "keep_models": "true",
    "problems": "dev",
    "keep": "best",
    "overflow": "drop",
    "parent": "base",
    "compare": "[[student, base]]",
    "betas": "[0.8, 0.9]",
    "count": 3,
}
OTHER |= {"mask_truncated": "true", "majority": "true", "stop_at_accuracy": 0.5, "length.weight": 0.3}
OTHER |= {
    "preset": "gspo",
    "template": "r1-zero",
    "loss": "sapo",
    "ratio": "sequence-mean",
    "aggregation": "sequences",
    "dual_clip": 3.0,
    "delta": 4.0,
    "tau": 0.1,
    "off_policy_mask": 0.1,
    "correction": "{kind: truncated}",
    "advantage": "std",
    "kl": "{coefficient: 0.1}",
    "soft_overlong": 4,
    "draw": "{order: prioritized}",
    "max_tokens_steps": "[[1, 8], [2, 256]]",
    "partial": "{budget: 8}",
    "repetition": "{min_tokens: 8}",
    "lora": "{rank: 4}",
    "reward_language": "{target: en}",
    "reward_repetition": "{weight: 0.1}",
    "reward_models": "[{kind: preference, model: org/rm, weight: 1.0}]",
    "general": "{prompts: ./problems.jsonl}",
}
OTHER |= dict.fromkeys(("reset_optimizer", "bf16", "fp32_head", "gradient_checkpointing", "shard"), "true")
OTHER |= dict.fromkeys(("packing", "chunked_loss"), "true") | {"micro_batch_tokens": 8192}
OTHER |= {
    "budgets": "[8, 16]",
    "rule": "slerp",
    "weights": "{default: 0.25}",
    "density": 0.25,
    "normalize": "false",
    "like": "short",
    "filters": "{format: true}",
    "licences": "{made: ours}",
    "judge": "{kind: preference, model: org/rm}",
}
OTHER |= dict.fromkeys(("per_level", "per_source"), "3")
# What a key needs beside it, before and after it is changed.
TIES = ("rule=ties", "base=./base", "density=0.5")
BESIDE = {
    "weights": ("weight=null", "weights={default: 0.5}"),
    **dict.fromkeys(("scale", "density", "normalize"), TIES),
    "ratio_cap": ("loss=cispo",),
    "keep_models": ("eval_every=1",),
    "general": ("reward_models=[{kind: preference, model: org/rm, weight: 1.0}]",),
    "judge": ("keep=judge", "judge={kind: preference, model: org/rm}"),
    "tau": ("loss=mirror-descent", "aggregation=sequence-sums", "tau=0.2"),
}

VALUES_OF = {("traces", "keep"): "stratified", ("traces", "judge"): "{kind: preference, model: org/other}"}


def another(key: str, value: object) -> object:
    if key in OTHER:
        return OTHER[key]
    assert isinstance(value, int | float), f"OTHER needs a value for {key}"
    return value + 1 if isinstance(value, int) else value / 2 or 0.25


@pytest.mark.parametrize("name", ["teacher", "pool", "traces", "student", "merged", "frontier"])
def test_every_key_of_a_stage_counts_but_those_of_execution(name: str, recipe_file: Path):
    config = load_recipe(recipe_file).stages[name].config
    keys = set(type(config).model_fields) - {"method", *config.REFERENCES}
    keys -= {"teacher": {"length", "top_p"}, "pool": {"problems"}}.get(name, set())  # RL has one top_p, pools one split
    keys |= {"length.weight"} if name == "teacher" else set()
    for key in sorted(keys):
        beside = [f"{name}.{other}" for other in BESIDE.get(key, ())]
        before = addresses(load_recipe(recipe_file, beside))
        value = VALUES_OF.get((name, key)) or another(key, getattr(config, key, None))
        change = f"{name}.{key}={value}"
        after = addresses(load_recipe(recipe_file, [*beside, change]))
        hit = {stage for stage in before if before[stage] != after[stage]}
        assert (name in hit) == (key not in EXECUTION_KEYS), key


def test_the_manifest_says_what_made_the_folder(recipe_file: Path, tmp_path: Path):
    results, _ = run(load_recipe(recipe_file), tmp_path, targets=["pool"])
    teacher, pool = results
    manifest = json.loads((pool.folder / "manifest.json").read_text())
    assert manifest["method"] == "sample"
    assert manifest["inputs"]["model"] == f"teacher {teacher.folder.name.rpartition('-')[2]}"
    assert manifest["inputs"]["problems.source"].startswith("./problems.jsonl ")
    assert manifest["config"]["seed"] == 0 and manifest["config"]["config"]["samples"] == 4
    assert manifest["config"]["config"]["temperature"] == 1.0  # filled in from `sampling`
    assert sorted(manifest["files"]) == [f"pool/samples-{shard:05d}.jsonl" for shard in range(3)]
    assert str(tmp_path) not in json.dumps(manifest)


def test_progress_lines_of_a_resumed_stage_have_no_step_twice(recipe_file: Path, tmp_path: Path):
    assert run_child(recipe_file, tmp_path, fault="checkpoint.write:4:kill").returncode == -signal.SIGKILL
    run(load_recipe(recipe_file), tmp_path, targets=["teacher"])
    folder = latest_folder(tmp_path / "fake", "teacher")
    assert folder is not None
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4]


if __name__ == "__main__":  # the child of the kill tests
    run_recipe(load_recipe(sys.argv[1]), root=Path(sys.argv[2]), methods=METHODS, report=Log())
