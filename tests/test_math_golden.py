"""The golden set of the math task: verdicts that were written before any verifier was run on them (golden/README.md)."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rl.tasks.mathematics import math_judge
from rl.types import Completion, FinishReason, Problem, TextPart

ROWS = [json.loads(line) for line in (Path(__file__).parent / "golden" / "math.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def verdicts():
    judge = math_judge(workers=2)
    attempts = [
        (
            Problem(row["id"], (TextPart(row.get("question", "")),), row["gold"]),
            Completion(row["answer"], (), (), FinishReason.LENGTH if row.get("truncated") else FinishReason.STOP),
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
    print(f"{len(ROWS)} cases: {len(rejected)} of {sum(row['right'] for row in ROWS)} right ones rejected")
    assert len(rejected) <= 0.005 * sum(row["right"] for row in ROWS), rejected
