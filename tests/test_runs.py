"""Files and folders of a run: what is whole appears, what is torn does not, what is finished stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.faults import FaultRaised
from rl.runs import (
    DamagedFolder,
    RunLock,
    RunLocked,
    StageFolder,
    append_line,
    file_hash,
    folder_hash,
    latest_checkpoint,
    latest_folder,
    read_json,
    read_lines,
    rewind_lines,
    save_checkpoint,
    stage_hash,
    versions,
    write_file,
    write_json,
)

ROOT = Path(__file__).resolve().parents[1]


def run_child(code: str, *arguments: object, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "REASON_FAULT"}
    if fault:
        environment["REASON_FAULT"] = fault
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


WRITE_NEW = (
    "import sys\nfrom pathlib import Path\nfrom rl.runs import write_file\n"
    "write_file(Path(sys.argv[1]), 'new', 'pool.shard')\n"
)


# --- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["write.temp", "pool.shard"])
def test_a_kill_before_the_rename_leaves_the_old_file(site: str, tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    write_file(path, "old", "pool.shard")
    assert run_child(WRITE_NEW, path, fault=f"{site}:1:kill").returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert run_child(WRITE_NEW, path).returncode == 0
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["samples.jsonl"]


def test_a_kill_after_the_rename_leaves_the_new_file(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    write_file(path, "old", "pool.shard")
    assert run_child(WRITE_NEW, path, fault="write.rename:1:kill").returncode == -signal.SIGKILL
    assert path.read_text() == "new"


@pytest.mark.parametrize("site", ["write.temp", "pool.shard"])
@pytest.mark.parametrize("kind", ["enospc", "eio"])
def test_a_full_or_broken_disk_names_the_file_and_the_bytes(
    site: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "samples.jsonl"
    monkeypatch.setenv("REASON_FAULT", f"{site}:1:{kind}")
    with pytest.raises(OSError, match="4,096 bytes") as caught:
        write_file(path, b"x" * 4096, "pool.shard")
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == []  # the temporary file is gone too


def test_a_file_size_limit_of_the_system_is_reported_the_same_way(tmp_path: Path):
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom rl.runs import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_file(Path(sys.argv[1]), b'x' * 5000, 'pool.shard')\n"
        "except OSError as error:\n    sys.exit(f'{error}')\n"
    )
    done = run_child(code, tmp_path / "a.jsonl")
    assert done.returncode == 1
    assert "5,000 bytes" in done.stderr and str(tmp_path / "a.jsonl") in done.stderr
    assert os.listdir(tmp_path) == []


def test_json_is_sorted_and_strict(tmp_path: Path):
    path = tmp_path / "deep" / "summary.json"
    write_json(path, {"b": 1, "a": "λ"}, "run.manifest")
    assert path.read_text(encoding="utf-8") == '{\n  "a": "λ",\n  "b": 1\n}\n'
    assert read_json(path) == {"a": "λ", "b": 1}
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_json(path, {"loss": float("nan")}, "run.manifest")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"summary\.json: not JSON"):
        read_json(path)


# --- logs of JSON lines -----------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_then_mended(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    append_line(log, {"step": 1})
    append_line(log, {"step": 2})
    with log.open("a") as file:
        file.write('{"step": 3, "rew')
    assert read_lines(log) == [{"step": 1}, {"step": 2}]
    append_line(log, {"step": 3})
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_line_that_lost_only_its_newline_is_kept(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}')
    assert read_lines(log) == [{"step": 1}, {"step": 2}]
    append_line(log, {"step": 3})
    assert [line["step"] for line in read_lines(log)] == [1, 2, 3]


@given(cut=st.integers(min_value=0, max_value=200))
def test_a_log_cut_at_any_byte_reads_as_a_prefix_and_goes_on(cut: int, tmp_path_factory: pytest.TempPathFactory):
    log = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    values = [{"step": step, "text": "é" * step} for step in range(6)]
    for value in values:
        append_line(log, value)
    log.write_bytes(log.read_bytes()[:cut])
    read = read_lines(log)
    assert read == values[: len(read)]
    append_line(log, {"step": 99})
    assert read_lines(log) == [*read, {"step": 99}]


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step":\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_lines(log)
    log.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not a JSON object"):
        read_lines(log)


def test_a_log_survives_numbers_that_are_not_finite(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    append_line(log, {"step": 1, "loss": float("nan"), "more": [float("inf"), {"x": -float("inf")}, 0.5]})
    assert read_lines(log) == [{"step": 1, "loss": None, "more": [None, {"x": None}, 0.5]}]


def test_rewinding_keeps_what_the_checkpoint_has_seen(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    rewind_lines(log, 3)
    assert not log.exists()
    for step in (1, 2, 3, 4):
        append_line(log, {"step": step})
    rewind_lines(log, 2)
    assert read_lines(log) == [{"step": 1}, {"step": 2}]


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_folder_hash_names_files_below_and_leaves_out_hidden_ones(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "sub/a.txt", ".hidden", ".git/config"):
        (tmp_path / name).write_text("abc")
    # sha256("abc"), FIPS 180-2, appendix B.1
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert folder_hash(tmp_path) == {"b.txt": abc, "sub/a.txt": abc}
    assert file_hash(tmp_path / "b.txt") == abc


CONFIGS = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    min_size=1,
    max_size=6,
)


@given(config=CONFIGS, order=st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_change_a_hash(config: dict[str, Any], order: Any):
    items = list(config.items())
    order.shuffle(items)
    assert stage_hash("grpo", dict(items), {}, "1") == stage_hash("grpo", config, {}, "1")


@given(config=CONFIGS, data=st.data())
def test_any_other_value_changes_a_hash(config: dict[str, Any], data: st.DataObject):
    key = data.draw(st.sampled_from(sorted(config)))
    other = config | {key: [config[key], "other"]}
    without = {name: value for name, value in config.items() if name != key}
    hashes = {stage_hash("grpo", each, {}, "1") for each in (config, other, without)}
    assert len(hashes) == 3


def test_method_inputs_and_version_change_a_hash_and_it_is_stable():
    base = stage_hash("grpo", {"steps": 40}, {"base": "0a1b2c3d"}, "1")
    assert base == "7a535fbb"
    others = [
        stage_hash("length_rl", {"steps": 40}, {"base": "0a1b2c3d"}, "1"),
        stage_hash("grpo", {"steps": 41}, {"base": "0a1b2c3d"}, "1"),
        stage_hash("grpo", {"steps": 40}, {"base": "0a1b2c3e"}, "1"),
        stage_hash("grpo", {"steps": 40}, {"other": "0a1b2c3d"}, "1"),
        stage_hash("grpo", {"steps": 40}, {"base": "0a1b2c3d"}, "2"),
    ]
    assert len({base, *others}) == 6


def test_versions_are_read_without_importing_anything():
    code = (
        "import sys\nfrom rl.runs import versions\n"
        "print(sorted(versions()))\nprint({'torch', 'trl'} & set(sys.modules))\n"
    )
    done = run_child(code)
    assert done.stdout == "['python', 'reason', 'torch', 'transformers', 'trl']\nset()\n"
    assert versions()["python"] == ".".join(map(str, sys.version_info[:3]))


# --- the folder of a stage --------------------------------------------------------------------------------------------


def finish(folder: StageFolder, **files: str) -> Path:
    partial = folder.open()
    for name, text in files.items():
        (partial / f"{name}.txt").write_text(text)
    return folder.commit(method="traces", config={"per_problem": 4}, inputs={"pool": "0a1b2c3d"}, seconds=1.5)


def test_a_folder_is_partial_until_its_manifest_is_written(tmp_path: Path):
    folder = StageFolder(tmp_path / "tiny", "traces", "12345678")
    partial = folder.open()
    assert partial == tmp_path / "tiny" / "traces-12345678.partial"
    assert not folder.finished and latest_folder(folder.root, "traces") is None
    final = finish(folder, a="1")
    assert folder.finished and not partial.exists()
    assert latest_folder(folder.root, "traces") == final
    manifest = folder.manifest()
    assert manifest["config"] == {"per_problem": 4} and manifest["inputs"] == {"pool": "0a1b2c3d"}
    assert manifest["seconds"] == 1.5 and manifest["method"] == "traces"
    assert manifest["files"] == {"a.txt": file_hash(final / "a.txt")}
    assert manifest["versions"] == versions()


def test_what_is_finished_is_never_opened_again(tmp_path: Path):
    folder = StageFolder(tmp_path, "traces", "12345678")
    finish(folder, a="1")
    with pytest.raises(ValueError, match="never overwritten"):
        folder.open()


def test_a_folder_without_a_manifest_is_not_finished_and_not_overwritten(tmp_path: Path):
    folder = StageFolder(tmp_path, "traces", "12345678")
    finish(folder, a="1")
    (folder.final / "manifest.json").unlink()
    assert not folder.finished and not folder.recover()
    with pytest.raises(DamagedFolder, match="move it away"):
        folder.open()


def test_an_open_folder_is_found_again_without_torn_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = StageFolder(tmp_path, "sample", "12345678")
    write_file(folder.open() / "pool" / "samples-00000.jsonl", "whole\n", "pool.shard")
    monkeypatch.setenv("REASON_FAULT", "pool.shard:1:raise")
    with pytest.raises(FaultRaised):
        write_file(folder.partial / "pool" / "samples-00001.jsonl", "torn\n", "pool.shard")
    assert len(os.listdir(folder.partial / "pool")) == 2
    assert os.listdir(folder.open() / "pool") == ["samples-00000.jsonl"]


@pytest.mark.parametrize("site", ["run.manifest", "run.rename", "run.latest"])
def test_a_kill_in_commit_is_recovered_without_doing_the_stage_again(site: str, tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom rl.runs import StageFolder\n"
        "folder = StageFolder(Path(sys.argv[1]), 'traces', '12345678')\n"
        "if not folder.recover():\n"
        "    path = folder.open() / 'made.txt'\n    path.write_text('once' if not path.exists() else 'twice')\n"
        "    (path.parent / 'checkpoints').mkdir(exist_ok=True)\n"
        "    folder.commit(method='traces', config={}, inputs={}, seconds=0.0)\n"
    )
    assert run_child(code, tmp_path, fault=f"{site}:1:kill").returncode == -signal.SIGKILL
    assert run_child(code, tmp_path).returncode == 0
    folder = StageFolder(tmp_path, "traces", "12345678")
    folder.verify()
    assert (folder.final / "made.txt").read_text() == ("twice" if site == "run.manifest" else "once")
    assert latest_folder(tmp_path, "traces") == folder.final
    assert sorted(os.listdir(tmp_path)) == ["traces-12345678", "traces.latest"]
    assert sorted(os.listdir(folder.final)) == ["made.txt", "manifest.json"]


def test_verify_names_every_file_that_differs(tmp_path: Path):
    folder = StageFolder(tmp_path, "traces", "12345678")
    final = finish(folder, a="1", b="2", c="3")
    folder.verify()
    (final / "a.txt").write_text("changed")
    (final / "b.txt").unlink()
    (final / "d.txt").write_text("new")
    with pytest.raises(DamagedFolder) as caught:
        folder.verify()
    for part in ("a.txt has changed", "b.txt is missing", "d.txt is not in the manifest"):
        assert part in str(caught.value)
    assert "c.txt" not in str(caught.value)


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_told_who_runs(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom rl.runs import RunLock\n"
        "with RunLock(Path(sys.argv[1])):\n    print('in')\n"
    )
    with RunLock(tmp_path):
        done = run_child(code, tmp_path)
        assert done.returncode == 1
        assert f"RunLocked: {tmp_path} is in use by process {os.getpid()} on " in done.stderr
        with pytest.raises(RunLocked, match=str(os.getpid())), RunLock(tmp_path):
            pass
    assert run_child(code, tmp_path).stdout == "in\n"


def test_a_killed_holder_leaves_no_lock(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom rl.faults import fault\nfrom rl.runs import RunLock\n"
        "with RunLock(Path(sys.argv[1])):\n    fault('stage.start')\n"
    )
    assert run_child(code, tmp_path, fault="stage.start:1:kill").returncode == -signal.SIGKILL
    assert "pid" in json.loads((tmp_path / ".lock").read_text())  # it never got to tidy up
    with RunLock(tmp_path):
        pass


def test_an_exception_drops_the_lock(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), RunLock(tmp_path):
        raise KeyboardInterrupt
    with RunLock(tmp_path):
        pass


# --- checkpoints ------------------------------------------------------------------------------------------------------


def put(text: str):
    def write(folder: Path) -> None:
        (folder / "weights.txt").write_text(text)

    return write


def test_the_newest_checkpoint_is_kept_alone(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    for step in (10, 20, 30):
        assert save_checkpoint(tmp_path, step, put(str(step))).name == f"step-{step:06d}"
    found = latest_checkpoint(tmp_path)
    assert found is not None
    step, folder = found
    assert (step, (folder / "weights.txt").read_text()) == (30, "30")
    assert os.listdir(tmp_path / "checkpoints") == ["step-000030"]


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("checkpoint.write", 10),
        ("checkpoint.manifest", 10),
        ("checkpoint.commit", 10),
        ("checkpoint.prune", 20),
    ],
)
def test_a_kill_while_saving_leaves_one_good_checkpoint(site: str, expected: int, tmp_path: Path):
    save_checkpoint(tmp_path, 10, put("10"))
    code = (
        "import sys\nfrom pathlib import Path\nfrom rl.runs import save_checkpoint\n"
        "save_checkpoint(Path(sys.argv[1]), 20, lambda folder: (folder / 'weights.txt').write_text('20'))\n"
    )
    assert run_child(code, tmp_path, fault=f"{site}:1:kill").returncode == -signal.SIGKILL
    found = latest_checkpoint(tmp_path)
    assert found is not None and found[0] == expected
    assert (found[1] / "weights.txt").read_text() == str(expected)
    assert run_child(code, tmp_path).returncode == 0
    assert os.listdir(tmp_path / "checkpoints") == ["step-000020"]


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "extra", "no hashes", "torn hashes"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path, 9, put("nine"))
    monkeypatch.setenv("REASON_FAULT", "checkpoint.prune:1:raise")  # keep the older one too
    with pytest.raises(FaultRaised):
        save_checkpoint(tmp_path, 1000000, put("million"))
    newest = tmp_path / "checkpoints" / "step-1000000"
    found = latest_checkpoint(tmp_path)
    assert found == (1000000, newest)  # by number, not by the alphabet
    if damage == "bit":
        (newest / "weights.txt").write_text("milliom")
    elif damage == "truncated":
        (newest / "weights.txt").write_text("milli")
    elif damage == "missing":
        (newest / "weights.txt").unlink()
    elif damage == "extra":
        (newest / "more.txt").write_text("")
    elif damage == "no hashes":
        (newest / "checkpoint.json").unlink()
    else:
        (newest / "checkpoint.json").write_text('{"files": {"wei')
    assert latest_checkpoint(tmp_path) == (9, tmp_path / "checkpoints" / "step-000009")
    monkeypatch.delenv("REASON_FAULT")
    save_checkpoint(tmp_path, 1000000, put("again"))  # the step is done again over the damaged one
    assert (newest / "weights.txt").read_text() == "again"
