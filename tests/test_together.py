"""A recipe on two processes: the first plans, locks, reports and writes; stages of collective methods run on both."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.runner import AnotherRankFailed, StageContext, StageFailed, StageResult, Status, run_recipe
from recipes.schema import load_recipe
from rl.ranks import end_process, start
from rl.runs import write_json

RECIPE = """
name: together
seed: 0
problems: {source: ./problems.jsonl, train: 40, dev: 20, test: 20}
stages:
  pool: {method: sample, model: ./base, samples: 4}
  traces: {method: traces, pool: pool}
  student: {method: sft, model: ./base, traces: traces, max_length: 64}
  teacher: {method: grpo, model: student, steps: 4}
  again: {method: sample, model: teacher, samples: 4}
"""


# --- the program of the processes -------------------------------------------------------------------------------------


class Log:
    """Keeps what was reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage_started(self, name: str, method: str, position: int, total: int, status: Status) -> None:
        self.lines.append(f"{name} started")

    def stage_progress(self, name: str, done: int, total: int, note: str) -> None:
        self.lines.append(f"{name} {done}/{total}")

    def stage_finished(self, result: StageResult, position: int, total: int) -> None:
        self.lines.append(f"{result.name} {result.status}")


def program(folder: Path, root: Path, failing: str) -> int:
    """Run the recipe with stages that only note who runs them; `failing` is "<stage> <rank>" of one that raises."""
    ran: list[str] = []
    log = Log()

    def stage(context: StageContext) -> None:
        ranks = context.ranks
        ran.append(f"{context.name} of {ranks.world}")
        if failing == f"{context.name} {ranks.rank}":
            raise ValueError("asked to fail")
        found = ranks.sum([context.seed, 1.0])
        if context.name == "teacher":
            assert context.model("student") == str(context.inputs["student"] / "model")
        context.progress(1, 1)
        if ranks.first:
            write_json(context.folder / "summary.json", found, "traces.write")
            write_json(context.folder / "model" / "config.json", found, "sft.model")

    with start() as ranks:
        code, message = 0, ""
        try:
            results = run_recipe(
                load_recipe(folder / "together.yaml"), root=root, report=log, ranks=ranks, collective={"grpo"},
                methods=dict.fromkeys(("sample", "traces", "sft", "grpo"), stage),
            )  # fmt: skip
            message = " ".join(result.name for result in results)
        except AnotherRankFailed:
            code = 4
        except StageFailed as failure:
            code, message = 4, str(failure)
        found = {"ran": ran, "log": log.lines, "message": message}
        (folder / f"rank {os.environ['RANK']}.json").write_text(json.dumps(found))
        if code:
            end_process(code)
    return code


if __name__ == "__main__":
    program(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "problems.jsonl").write_text('{"question": "1+1", "answer": 2}\n')
    (tmp_path / "together.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def launch(folder: Path, launch_two) -> Callable[..., tuple[list[int], list[dict], list[str]]]:
    """Two processes: exit codes, what each wrote down, what each printed on stderr."""

    def run(failing: str = "") -> tuple[list[int], list[dict], list[str]]:
        codes, errors = launch_two(__file__, folder, folder / "runs", failing)
        return codes, [json.loads((folder / f"rank {rank}.json").read_text()) for rank in range(2)], errors

    return run


def test_stages_run_alone_or_together_and_only_the_first_process_reports(folder: Path, launch):
    codes, (first, second), errors = launch()
    assert codes == [0, 0], errors
    names = ["pool", "traces", "student", "teacher", "again"]
    assert first["ran"] == ["pool of 1", "traces of 1", "student of 1", "teacher of 2", "again of 1"]
    assert second["ran"] == ["teacher of 2"]
    assert first["log"] == [line for name in names for line in (f"{name} started", f"{name} 1/1", f"{name} ran")]
    assert second["log"] == []
    assert (first["message"], second["message"]) == (" ".join(names), "")
    summaries = {path.parent.name[:-9]: json.loads(path.read_text()) for path in folder.glob("runs/*/*/summary.json")}
    assert {name: summary[1] for name, summary in summaries.items()} == dict.fromkeys(names, 1.0) | {"teacher": 2.0}


@pytest.mark.parametrize("failing", ["teacher 1", "student 0"])
def test_a_failure_on_one_process_ends_both_with_one_message(failing: str, folder: Path, launch):
    stage, rank = failing.split()
    codes, found, errors = launch(failing)
    assert codes == [4, 4], errors
    where = " on rank 1" if rank == "1" else ""
    assert found[int(rank)]["message"] == f"stage {stage} failed{where}: ValueError: asked to fail"
    assert found[1 - int(rank)]["message"] == ""
    assert [path.name[:-17] for path in folder.glob("runs/together/*.partial")] == [stage]
