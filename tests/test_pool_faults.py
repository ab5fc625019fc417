"""A pool under kills, full disks and second writers: nothing lost, nothing drawn twice, the same content."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rl import pool_store
from rl.pool import Pool, PoolFull
from rl.rescore import rescore
from rl.runs import RunLock, RunLocked, read_lines
from rl.tasks import tiny
from tests.pool_world import PROBLEMS, SAMPLES, ScriptedSampler, Shuffled, address, fill

ROOT = Path(__file__).resolve().parents[1]
TOTAL = SAMPLES * len(PROBLEMS)
SHARDS = 4  # 15 samples, 4 a shard
WRITES = 1 + 2 * SHARDS  # the address, samples and verdicts

KILLS = [
    "pool.address:1",
    *[f"pool.shard:{n}" for n in range(1, SHARDS + 1)],  # between two shards: written, not yet renamed
    *[f"pool.verdicts:{n}" for n in range(1, SHARDS + 1)],
    *[f"write.temp:{n}" for n in range(1, WRITES + 1)],  # half of a file is written
    *[f"write.rename:{n}" for n in range(1, WRITES + 1)],  # renamed, and no line in the manifest
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool whose fill nobody disturbed."""
    folder = tmp_path_factory.mktemp("pool") / "whole"
    fill(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Address, samples and verdicts; the manifest and the log have their lines in the order of the threads."""
    names = (name for name in sorted(os.listdir(folder)) if name not in ("files.jsonl", "judging.jsonl", ".lock"))
    return {name: (folder / name).read_bytes() for name in names}


def rows_on_disk(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("samples-*.jsonl"))


def assert_as_whole(folder: Path, whole: Path) -> None:
    assert content(folder) == content(whole)
    pool = Pool.open(folder)
    assert len(pool) == TOTAL and pool.check(PROBLEMS) == ()
    assert pool.canonical_hash() == Pool.open(whole).canonical_hash()
    listed = [(line["file"], line["sha256"]) for line in read_lines(folder / "files.jsonl")]
    assert sorted(listed) == sorted((line["file"], line["sha256"]) for line in read_lines(whole / "files.jsonl"))


@pytest.mark.parametrize("site", KILLS)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(site: str, tmp_path: Path, whole: Path):
    environment = os.environ | {"REASON_FAULT": f"{site}:kill", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "pool_world.py"), str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    there = rows_on_disk(tmp_path)
    if (tmp_path / "pool.json").exists():
        assert len(Pool.open(tmp_path)) == there  # a shard without its line is a shard
        assert Pool.open(tmp_path).check(PROBLEMS) == ()
    again = fill(tmp_path)
    assert len(again.seeds) == TOTAL - there  # none is paid for twice
    assert_as_whole(tmp_path, whole)


def test_a_manifest_cut_anywhere_is_made_whole_and_nothing_is_drawn(tmp_path: Path, whole: Path):
    lines = (whole / "files.jsonl").read_bytes()
    ends = [index + 1 for index, byte in enumerate(lines) if byte == ord("\n")]
    for number, cut in enumerate(sorted({0, *ends, *(end - 1 for end in ends), *(end - 40 for end in ends)})):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        (folder / "files.jsonl").write_bytes(lines[:cut])
        assert Pool.open(folder).canonical_hash() == Pool.open(whole).canonical_hash()
        assert (folder / "files.jsonl").read_bytes() == lines[:cut]  # whoever reads does not write
        with Pool.open(folder).writing():
            pass
        assert_as_whole(folder, whole)
        assert fill(folder).seeds == []


def test_an_older_pool_without_a_manifest_gets_one_when_it_is_written_to(tmp_path: Path, whole: Path):
    shutil.copytree(whole, tmp_path / "old")
    (tmp_path / "old" / "files.jsonl").unlink()
    drawn = fill(tmp_path / "old", samples=SAMPLES + 1)
    assert len(drawn.seeds) == len(PROBLEMS)
    assert len(read_lines(tmp_path / "old" / "files.jsonl")) == 2 * (SHARDS + 2)
    assert Pool.open(tmp_path / "old").check(PROBLEMS) == ()


def test_shards_that_come_in_any_order_survive_a_kill_too(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REASON_FAULT", "pool.shard:3:raise")
    with pytest.raises(RuntimeError, match="asked to fail"):
        fill(tmp_path, sampler=Shuffled())
    monkeypatch.delenv("REASON_FAULT")
    assert len(fill(tmp_path, sampler=Shuffled()).seeds) == TOTAL - 7  # 3 and 4 samples were there
    pool = Pool.open(tmp_path)
    assert pool.check(PROBLEMS) == () and pool.canonical_hash() == Pool.open(whole).canonical_hash()
    assert pool.groups(PROBLEMS, "tiny-1") == Pool.open(whole).groups(PROBLEMS, "tiny-1")


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["pool.address:1", "pool.shard:2", "pool.verdicts:1", "write.temp:4"])
def test_a_full_disk_names_file_and_bytes_and_leaves_nothing_half_written(
    site: str, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REASON_FAULT", f"{site}:enospc")
    with pytest.raises(PoolFull, match=r"[\d,]+ bytes are needed there and [\d,]+ are free") as caught:
        fill(tmp_path)
    assert caught.value.errno == errno.ENOSPC and caught.value.needed > 0 and caught.value.free > 0
    assert Path(caught.value.filename).parent == tmp_path and not Path(caught.value.filename).exists()
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.delenv("REASON_FAULT")
    there = rows_on_disk(tmp_path)
    assert len(fill(tmp_path).seeds) == TOTAL - there
    assert_as_whole(tmp_path, whole)


def test_another_failure_of_the_disk_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REASON_FAULT", "pool.shard:1:eio")
    with pytest.raises(OSError, match="bytes were written") as caught:
        fill(tmp_path)
    assert caught.value.errno == errno.EIO and caught.value.filename == str(tmp_path / "samples-00000.jsonl")
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_disk_that_fills_up_in_the_manifest_costs_no_sample(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
):
    real: Callable[..., None] = pool_store.append_line

    def full(path: Path, value: dict[str, object]) -> None:
        if value.get("file") == "samples-00001.jsonl":
            with path.open("ab") as file:
                file.write(b'{"file": "sam')  # what fitted
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, value)

    monkeypatch.setattr(pool_store, "append_line", full)
    pool = Pool.open(tmp_path, address())
    with pytest.raises(PoolFull, match=r"files\.jsonl"):
        fill(tmp_path)
    monkeypatch.setattr(pool_store, "append_line", real)
    assert len(pool) == 0  # opened before; it looks again when it becomes the writer
    with pool.writing():
        assert len(pool) == 8
    assert len(fill(tmp_path).seeds) == TOTAL - 8
    assert_as_whole(tmp_path, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True, timeout=30
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here; full disks are injected in the tests above")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=30)


def test_on_a_disk_that_is_really_full(small_disk: Path, tmp_path: Path):
    class Chatty(ScriptedSampler):
        def complete(self, request):
            completion = super().complete(request)
            return replace(completion, text=completion.text + "x" * 1500)

    fill(tmp_path / "whole", samples=8, sampler=Chatty())
    folder = small_disk / "pool"
    with pytest.raises(PoolFull) as caught:
        fill(folder, samples=8, sampler=Chatty())
    assert 0 <= caught.value.free < caught.value.needed
    assert not list(folder.glob(".*.tmp"))
    there = rows_on_disk(folder)
    assert 0 < there < 40 and len(Pool.open(folder)) == there and Pool.open(folder).check() == ()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True, timeout=30)
    assert len(fill(folder, samples=8, sampler=Chatty()).seeds) == 40 - there
    assert Pool.open(folder).canonical_hash() == Pool.open(tmp_path / "whole").canonical_hash()


# --- two processes ----------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path: Path, whole: Path):
    shutil.copytree(whole, tmp_path / "pool")
    pool = Pool.open(tmp_path / "pool")
    with RunLock(tmp_path / "pool"):
        with pytest.raises(RunLocked, match=f"in use by process {os.getpid()}"):
            fill(tmp_path / "pool", samples=SAMPLES + 1)
        with pytest.raises(RunLocked):
            pool.add_shard([])
        # Whoever only reads, or has nothing to write, needs no lock.
        assert fill(tmp_path / "pool").seeds == []
        pool.judge(PROBLEMS, tiny.TASK)
        assert pool.groups(PROBLEMS, "tiny-1") == Pool.open(whole).groups(PROBLEMS, "tiny-1")
        with pytest.raises(ValueError, match="no verdicts of another verifier"):
            rescore(pool, PROBLEMS, tiny.TASK)
    assert len(fill(tmp_path / "pool", samples=SAMPLES + 1).seeds) == len(PROBLEMS)


def test_a_writer_takes_in_what_another_wrote_since_it_looked(tmp_path: Path, whole: Path):
    early = Pool.open(tmp_path, address())
    fill(tmp_path)
    assert len(early) == 0
    with early.writing():
        assert early.missing(PROBLEMS, SAMPLES) == []
    assert_as_whole(tmp_path, whole)
