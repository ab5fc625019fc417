"""`reason curate` and `reason rescore` as a user runs them."""

import json
import re

import pytest
from typer.testing import CliRunner

from cli import app

ROWS = [
    {"question": "Tom has 3 boxes of 4 pens. How many pens does Tom have in all his boxes?", "answer": "12"},
    {"question": "Tom has 3 boxes of 4 pens. How many pens does Tom have in all the boxes?", "answer": "12"},
    {"question": "Which is a prime? (A) 4 (B) 5 (C) 6 (D) 8", "answer": "B"},
    {"question": "Prove that the square root of 2 is irrational.", "answer": "proof"},
    {"question": "A train runs 60 miles in 1.5 hours. What is its speed in miles per hour on this trip?", "answer": 40},
    {"question": "1+1", "answer": "2"},
]


def reason(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def problems(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[4]) + "\n")
    return path


def test_curate_says_what_left_and_why(problems, tmp_path):
    done = reason("curate", problems, "--out", "kept", "--against", "test.jsonl", "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert (value["read"], value["kept"]) == (6, 2)
    assert value["reasons"] == {"multiple choice": 1, "proof": 1, "evaluation leak": 1, "near duplicate": 1}
    kept = [json.loads(line) for line in (tmp_path / "kept" / "problems.jsonl").read_text().splitlines()]
    assert [row["question"] for row in kept] == [ROWS[0]["question"], "1+1"]
    gone = [json.loads(line) for line in (tmp_path / "kept" / "dropped.jsonl").read_text().splitlines()]
    assert {row["reason"]: bool(row["evidence"]) for row in gone} == dict.fromkeys(value["reasons"], True)
    assert "multiple choice" in (tmp_path / "kept" / "report.md").read_text()
    again = reason("curate", problems, "--out", "kept")
    assert again.exit_code == 2 and "finished curation" in again.stderr
    more = reason("curate", problems, "--out", "more", "--keep-forms", "--keep-duplicates")
    assert "6 of 6 problems kept" in more.stdout


def test_curate_with_a_model_measures_difficulty_and_guesses(problems, tiny_model_folder, tmp_path):
    options = ["--samples", 2, "--guesses", 2, "--max-tokens", 8]
    done = reason("curate", problems, "--out", "kept", "--model", tiny_model_folder, *options, "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert [step["name"] for step in value["steps"]] == ["form", "near duplicate", "difficulty", "guess"]
    rows = [json.loads(line) for line in (tmp_path / "kept" / "problems.jsonl").read_text().splitlines()]
    assert all("pass_rate" in row for row in rows)
    assert (tmp_path / "kept" / "samples" / "pool.json").is_file()
    both = reason("curate", problems, "--out", "x", "--model", tiny_model_folder, "--pool", "kept/samples")
    assert both.exit_code == 2


def test_rescore_and_audit_a_pool(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(4)))
    drawn = reason("sample", tiny_model_folder, path, "--out", "pool", "--samples", 2, "--max-tokens", 8)
    assert drawn.exit_code == 0, drawn.output
    samples = {file.name: file.read_bytes() for file in (tmp_path / "pool").glob("samples-*")}
    done = reason("rescore", "pool", path, "--task", "integers", "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert (value["before"], value["after"], value["samples"], value["sampled"]) == ("exact-1", "integers-1", 8, 0)
    assert {file.name: file.read_bytes() for file in (tmp_path / "pool").glob("samples-*")} == samples
    shown = reason("rescore", "pool", path, "--task", "math", "--before", "exact-1")
    assert "8 samples, none drawn: exact-1 calls" in shown.stdout
    audited = reason("rescore", "pool", path, "--task", "math", "--second", "math-verify")
    assert re.search(r"math-1 and math-verify-0.9.0 agree on [\d.]+% of 8 samples", audited.stdout), audited.output
    assert "nobody has looked yet" in audited.stdout
    for arguments, message in (
        (["rescore", "pool", path, "--task", "maths"], "did you mean math"),
        (["rescore", "nowhere", path], "holds no pool"),
    ):
        refused = reason(*arguments)
        assert refused.exit_code == 2
        assert message in " ".join(refused.stderr.split())
