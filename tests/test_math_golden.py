"""The golden sets of the math task: verdicts written before any verifier was run on them (golden/README.md)."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rl.tasks.mathematics import math_judge
from rl.types import Completion, FinishReason, Problem, TextPart

FILES = [Path(__file__).parent / "golden" / name for name in ("math.jsonl", "math-held-out.jsonl")]
ROWS = [json.loads(line) for path in FILES for line in path.read_text().splitlines()]


def text_of(row):
    """What a model writes: a thought before the answer, unless the row has its own tags."""
    return row["answer"] if "think>" in row["answer"] else f"<think>so</think>{row['answer']}"


@pytest.fixture(scope="module")
def verdicts():
    judge = math_judge(workers=2)
    attempts = [
        (
            Problem(row["id"], (TextPart(row.get("question", "")),), row["gold"]),
            Completion(text_of(row), (), (), FinishReason.LENGTH if row.get("truncated") else FinishReason.STOP),
        )
        for row in ROWS
    ]
    found = dict(zip((row["id"] for row in ROWS), judge(attempts), strict=True))
    judge.pool.close()
    return found


def test_the_set_is_as_large_and_as_hard_as_it_claims():
    assert len(ROWS) >= 400 and len({row["id"] for row in ROWS}) == len(ROWS)
    counts = Counter(row["right"] for row in ROWS)
    assert min(counts.values()) >= 200
    assert sum(row["adversarial"] for row in ROWS) >= len(ROWS) / 2
    assert all(row["why"] and row["source"] for row in ROWS)
    assert len({(row["gold"], row["answer"], row.get("question")) for row in ROWS}) == len(ROWS)


def test_nothing_wrong_is_accepted(verdicts):
    accepted = [row for row in ROWS if not row["right"] and verdicts[row["id"]].right]
    assert accepted == []


def test_hardly_anything_right_is_rejected(verdicts):
    rejected = [row for row in ROWS if row["right"] and not verdicts[row["id"]].right]
    assert len(rejected) <= 0.005 * sum(row["right"] for row in ROWS), rejected
