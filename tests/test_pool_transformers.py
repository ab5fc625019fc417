"""A pool of the transformers sampler under kills. A batch's composition changes the bits of its logits, so the same
bytes come out only if what is drawn together after a kill is what would have been drawn together without it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.pool import Pool
from tests.test_pool_faults import content

ROOT = Path(__file__).resolve().parents[1]
SHARDS = 3  # 12 samples: 5, 5 and 2
FORWARDS = 2 * 16  # of a shard of two batches, at most

Job = Callable[[Path, str], dict[str, Any]]

# Each a pool: where its process is killed, again and again, until it is let through.
CHAINS = [
    *([f"pool.shard:{n}"] for n in range(1, SHARDS + 1)),  # drawn, not yet there
    *([f"write.rename:{n}"] for n in (2, 3)),  # there, without its line in the manifest or its verdicts
    ["pool.verdicts:1"],
    ["pool.shard:1", "pool.shard:1", "pool.shard:2", "write.rename:1"],  # the first shard is drawn three times
    *([f"forward:{random.Random(seed * 100 + i).randint(1, FORWARDS)}" for i in range(1 + seed)] for seed in range(3)),
]


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """`job(folder, kill)`: fill the pool there in a process of its own."""
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "pool_model_world.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    given, answers = child.stdin, child.stdout

    def run(folder: Path, kill: str = "") -> dict[str, Any]:
        given.write(json.dumps({"folder": str(folder), "kill": kill}) + "\n")
        given.flush()
        return json.loads(answers.readline())

    with child:
        yield run
        given.close()


@pytest.fixture(scope="module")
def whole(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]]]:
    """A pool whose fill nobody disturbed, and what its sampler was asked for, call by call."""
    folder = tmp_path_factory.mktemp("model") / "whole"
    done = job(folder, "")
    assert done["ended"] == 0 and [len(call) for call in done["calls"]] == [5, 5, 2]
    return folder, done["calls"]


def test_two_fills_are_the_same_bytes(job: Job, tmp_path: Path, whole: tuple[Path, list[list[int]]]):
    assert job(tmp_path / "pool", "")["ended"] == 0
    assert content(tmp_path / "pool") == content(whole[0])


@pytest.mark.parametrize("kills", CHAINS, ids=lambda kills: "-".join(kills))
def test_killed_and_filled_on_it_is_the_same_bytes(
    kills: list[str], job: Job, tmp_path: Path, whole: tuple[Path, list[list[int]]]
):
    folder, calls = whole
    drawn = []
    for kill in kills:
        killed = job(tmp_path / "pool", kill)
        assert killed["ended"] == -signal.SIGKILL
        drawn += killed["calls"]
    last = job(tmp_path / "pool", "")
    assert last["ended"] == 0
    # Every call, before and after a kill, was one of the calls of the fill that nobody disturbed, and all were made.
    assert [call for call in drawn + last["calls"] if call not in calls] == []
    assert {tuple(call) for call in drawn + last["calls"]} == set(map(tuple, calls))
    assert content(tmp_path / "pool") == content(folder)
    pool = Pool.open(tmp_path / "pool")
    assert pool.check() == () and pool.canonical_hash() == Pool.open(folder).canonical_hash()
