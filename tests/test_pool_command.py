"""`reason pool show, check, export, join`: what they print, what they write, and their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from recipes.pool_commands import FormatName
from rl.pool import Pool
from rl.pool_export import FORMATS, PARQUET_ROWS, export_pool, judged_samples, summarize_pool
from rl.pool_parts import part_folder
from rl.runs import RunLock
from rl.tasks import tiny
from rl.types import Completion, FinishReason
from tests import pool_world

ROOT = Path(__file__).resolve().parents[1]
# What `reason ... tiny` names, so that the command finds the pool's problems.
PROBLEMS = tiny.problems("test", 6, (2, 3, 4))


class Mixed(pool_world.ScriptedSampler):
    """Right where the seed is even; every fifth runs into the limit."""

    def complete(self, request):
        answers = {tuple(ord(c) for c in p.text + "\n"): p.answer for p in PROBLEMS}
        right = answers[request.prompt_ids]
        reason = FinishReason.STOP if request.seed % 5 else FinishReason.LENGTH
        answer = right if request.seed % 2 == 0 else f"{(int(right) + 1) % 100:02}"
        return Completion(f"so\u2028</think>{answer}", (5, 6, 1), (-0.1, -1e-17, 0.0), reason)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "pool"
    pool_world.fill(folder, samples=3, sampler=Mixed(), problems=PROBLEMS)
    return folder


def reason(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["pool", *map(str, arguments)])


def value_of(*arguments: object, exit_code: int = 0) -> dict:
    done = reason(*arguments, "--json")
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


def test_show_counts_what_is_there(pool: Path):
    shown = value_of("show", pool)
    drawn = list(Pool.open(pool).samples())
    verdicts = Pool.open(pool).verdicts("tiny-1")
    assert (shown["num_problems"], shown["fewest"], shown["most"], shown["num_samples"]) == (6, 3, 3, 18)
    assert shown["tokens"] == 54 and sum(shown["finish_reasons"].values()) == 18
    assert shown["finish_reasons"]["length"] == sum(c.finish_reason is FinishReason.LENGTH for _, _, c in drawn)
    assert shown["verifiers"]["tiny-1"]["right"] == sum(verdict.right for verdict in verdicts.values())
    assert shown["canonical_hash"] == Pool.open(pool).canonical_hash()
    assert shown["size"] == sum(path.stat().st_size for path in pool.iterdir())
    text = reason("show", pool).stdout
    assert "6 x 3, 18 in 5 shards" in text and "54, 3.0 on average" in text and shown["canonical_hash"] in text
    assert "% right, 0 undecided" in text and "address: max_tokens" in text


def test_an_empty_pool_can_be_shown(tmp_path: Path):
    Pool.open(tmp_path, pool_world.address())
    assert value_of("show", tmp_path)["verifiers"] == {}
    assert "none has judged all of it" in reason("show", tmp_path).stdout


def test_check_says_what_is_wrong_and_exits_with_3(pool: Path, tmp_path: Path):
    assert value_of("check", pool)["findings"] == []
    assert "nothing wrong" in reason("check", pool).stdout
    pool_world.fill(tmp_path / "pool", samples=3, sampler=Mixed(), problems=PROBLEMS)  # found by its stage's folder too
    shard = tmp_path / "pool" / "samples-00002.jsonl"
    shard.write_bytes(shard.read_bytes()[:-9])
    findings = value_of("check", tmp_path, exit_code=3)["findings"]
    assert [(one["damage"], one["file"]) for one in findings] == [
        ("changed", "samples-00002.jsonl"), ("unreadable", "samples-00002.jsonl"),
    ]  # fmt: skip
    done = reason("check", tmp_path)
    assert done.exit_code == 3 and "changed: samples-00002.jsonl" in done.stdout and "2 findings" in done.stdout
    assert reason("show", tmp_path).exit_code == 4  # damaged: it cannot be opened
    assert reason("check", tmp_path / "nowhere").exit_code == 2


def test_the_formats_of_the_command_are_those_that_there_are():
    assert {str(name) for name in FormatName} == set(FORMATS)


def test_messages_load_as_a_dataset_with_the_thought_kept(pool: Path, tmp_path: Path):
    from datasets import load_dataset

    file = tmp_path / "messages.jsonl"
    told = value_of("export", pool, "tiny", "--to", file, "--prompt-suffix", " Think.")
    assert told["rows"] == told["samples"] == 18
    loaded = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert list(loaded[0]) == ["messages", "problem", "sample", "correct", "num_tokens"]
    keys = [(row["problem"], row["sample"]) for row in loaded]
    assert keys == sorted(keys) and len(keys) == 18
    by_id = {problem.id: problem for problem in PROBLEMS}
    for row in loaded:
        user, assistant = row["messages"]
        problem = by_id[row["problem"]]
        assert user == {"role": "user", "content": problem.text + " Think."}
        assert assistant["role"] == "assistant" and assistant["content"].startswith("<think>so\u2028</think>")
        assert row["correct"] == assistant["content"].endswith(problem.answer)
        assert row["num_tokens"] == 3


def test_rows_and_parquet_hold_the_same_and_load(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from datasets import load_dataset

    monkeypatch.setattr("rl.pool_export.PARQUET_ROWS", 4)  # several row groups
    assert PARQUET_ROWS > 18
    found = {}
    for form, kind in (("rows", "json"), ("parquet", "parquet")):
        file = tmp_path / f"export.{form}"
        assert value_of("export", pool, "tiny", "--to", file, "--format", form)["rows"] == 18
        found[form] = load_dataset(kind, data_files=str(file), split="train", cache_dir=str(tmp_path / "c")).to_list()
    assert found["rows"] == found["parquet"]
    row = found["parquet"][0]
    assert row["token_ids"] == [5, 6, 1] and row["sampler_logprobs"] == [-0.1, -1e-17, 0.0]
    assert row["outcome"] in ("right", "wrong") and row["finish_reason"] in ("stop", "length")


def test_filters_leave_out_rows_and_a_verifier_must_have_judged(pool: Path, tmp_path: Path):
    right = value_of("export", pool, "tiny", "--to", tmp_path / "right", "--right-only", "--verifier", "tiny-1")["rows"]
    assert right == value_of("show", pool)["verifiers"]["tiny-1"]["right"] > 0
    assert all(json.loads(line)["correct"] for line in (tmp_path / "right").read_text().split("\n")[:-1])
    few = value_of("export", pool, "tiny", "--to", tmp_path / "few", "--count", 2)
    assert few["rows"] == 6 and few["samples"] == 18
    told = value_of("export", pool, "tiny", "--to", tmp_path / "x", "--verifier", "tiny-9", exit_code=2)
    assert "not been judged by tiny-9; its verifiers: tiny-1" in told["error"]
    assert "never overwritten" in value_of("export", pool, "tiny", "--to", tmp_path / "few", exit_code=2)["error"]
    other = value_of("export", pool, "tiny", "--to", tmp_path / "y", "--split", "dev", exit_code=2)
    assert "nothing to export" in other["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "right"]


def test_a_failed_export_leaves_nothing(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REASON_FAULT", "write.temp:1:enospc")
    with pytest.raises(OSError, match=r"the disk is full: [\d,]+ bytes"):
        export_pool(Pool.open(pool), PROBLEMS, tmp_path / "out", FORMATS["rows"])
    assert list(tmp_path.iterdir()) == []


def test_equal_pools_give_equal_files(pool: Path, tmp_path: Path):
    pool_world.fill(tmp_path / "b", samples=3, sampler=Mixed(), problems=PROBLEMS, shard_size=100)
    for name, folder in (("one", pool), ("two", tmp_path / "b")):
        export_pool(Pool.open(folder), PROBLEMS, tmp_path / name, FORMATS["messages"])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(list(judged_samples(Pool.open(pool), PROBLEMS))) == 18


def test_join_makes_one_pool_of_parts(pool: Path, tmp_path: Path):
    out = tmp_path / "out"
    parts = [part_folder(out, (i, 2)) for i in range(2)]
    for i, part in enumerate(parts):
        pool_world.fill(part, samples=3, sampler=Mixed(), problems=PROBLEMS, part=(i, 2))
    joined = value_of("join", out, *parts)
    assert joined["samples"] == 18 and joined["parts"] == 2 and joined["verifiers"] == ["tiny-1"]
    assert joined["canonical_hash"] == summarize_pool(Pool.open(pool)).canonical_hash
    assert "18 samples of 2 parts" in reason("join", out, *parts).stdout  # again: nothing is doubled
    with RunLock(out):
        assert "in use by process" in value_of("join", out, *parts, exit_code=4)["error"]


def test_the_help_needs_neither_torch_nor_datasets():
    code = (
        "import sys, cli\n"
        "from typer.testing import CliRunner\n"
        "assert 'export' in CliRunner().invoke(cli.app, ['pool', '--help']).output\n"
        "sys.exit(str([n for n in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if n in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"
