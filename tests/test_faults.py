"""Fault points: each kind does what it says, and the list of points is the code's."""

from __future__ import annotations

import ast
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rl.faults import FAULT_POINTS, KINDS, FaultRaised, fault

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("rl", "distill", "long2short", "recipes")

# Calls that take the name of a fault point, and the position of that argument.
TAKE_A_SITE = {"fault": 0, "write_file": 2, "write_json": 2}
# Calls that write to disk by themselves. A function that makes one must pass a fault point.
WRITES = {"write_text", "write_bytes", "save_pretrained", "save_file", "savefig", "save_model", "to_csv", "dump"}
# Functions that write without a point in their own body, and why a kill there is harmless and tested.
BEHIND_A_POINT = {
    "rl/runs.py:append_line": "a log; a torn last line is tolerated and mended",
    "rl/policy.py:save_model": "ends in save_tokenizer, which passes model.tokenizer",
    "rl/export.py:export_model": "a resumed run takes the best model from its checkpoint, never from here",
    "distill/training.py:on_save": "passes the point of its method, sft.checkpoint or dpo.checkpoint, as a callback",
    "long2short/pictures.py:draw_png": "draws into memory; its caller writes the bytes",
    "long2short/pictures.py:draw_svg": "as draw_png",
    "long2short/length_preview.py:plot": "as draw_png",
}


def passes(tree: ast.Module) -> set[str]:
    """The names in a module whose call passes a fault point: `fault` only where it is rl.faults' own."""
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("rl.faults", "rl.runs")
        for name in node.names
    }
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return set(TAKE_A_SITE) & imported | set(TAKE_A_SITE) & defined & {"write_file", "write_json"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a tree with the last part of the called name: `a.b.save(x)` gives "save"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                yield called.id, node
            elif isinstance(called, ast.Attribute):
                yield called.attr, node


def site_of(name: str, call: ast.Call) -> ast.expr | None:
    position = TAKE_A_SITE[name]
    for keyword in call.keywords:
        if keyword.arg == "site":
            return keyword.value
    return call.args[position] if len(call.args) > position else None


def sources() -> list[tuple[str, ast.Module]]:
    paths = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def used_sites() -> dict[str, str]:
    """{fault point: where the code names it}."""
    used = {}
    for where, tree in sources():
        own = passes(tree)
        for name, call in calls(tree):
            if name in own:
                site = site_of(name, call)
                if isinstance(site, ast.Constant):
                    used[site.value] = f"{where}:{call.lineno}"
    return used


def test_every_point_in_the_code_is_listed_and_every_listed_point_is_in_the_code():
    used = used_sites()
    assert {site: where for site, where in used.items() if site not in FAULT_POINTS} == {}
    assert [site for site in FAULT_POINTS if site not in used] == []


def test_points_are_named_once_and_in_one_form():
    assert len(set(FAULT_POINTS)) == len(FAULT_POINTS)
    for site in FAULT_POINTS:
        stage, _, name = site.partition(".")
        assert stage.isidentifier() and name.isidentifier(), site


def writes_without_a_point(where: str, tree: ast.Module) -> list[str]:
    """Outermost functions that write to disk and neither pass a fault point nor stand in BEHIND_A_POINT."""
    bare = []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = {id(child) for node in functions for child in ast.walk(node) if child is not node}
    for function in functions:
        if id(function) in inner:
            continue
        names = [name for name, _ in calls(function)]
        opens = [call for name, call in calls(function) if name == "open" and opens_for_writing(call)]
        if (opens or WRITES & set(names)) and not passes(tree) & set(names):
            bare.append(f"{where}:{function.name}")
    return bare


def opens_for_writing(call: ast.Call) -> bool:
    constants = [
        node.value for node in [*call.args, *(k.value for k in call.keywords)] if isinstance(node, ast.Constant)
    ]
    return any(isinstance(value, str) and set(value) & set("wax+") and len(value) <= 3 for value in constants)


def test_every_write_of_a_stage_passes_a_fault_point():
    # No part of a run: what the sandbox writes (scratch folders, what a probe tries), pipes and logs of replicas, the
    # model whose speed is measured.
    apart = ("rl/sandbox/", "rl/samplers/replica", "rl/throughput")
    of_runs = [(where, tree) for where, tree in sources() if not where.startswith(apart)]
    bare = [name for where, tree in of_runs for name in writes_without_a_point(where, tree)]
    assert sorted(bare) == sorted(BEHIND_A_POINT)


def test_the_search_for_bare_writes_finds_one():
    bare = "def f(path):\n    path.write_text('x')\n"
    good = "from rl.faults import fault\ndef g(path):\n    fault('a.b')\n    path.write_text('x')\n"
    assert writes_without_a_point("m.py", ast.parse(good + bare)) == ["m.py:f"]
    assert writes_without_a_point("m.py", ast.parse("def h(p):\n    with p.open('w') as f: pass")) == ["m.py:h"]
    assert writes_without_a_point("m.py", ast.parse("def h(p):\n    with p.open('rb') as f: pass")) == []


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REASON_FAULT", raising=False)
    for site in FAULT_POINTS:
        fault(site)


def test_an_unknown_site_is_an_error_with_and_without_the_variable(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError, match=r"'pool\.nowhere' is not listed"):
        fault("pool.nowhere")
    monkeypatch.setenv("REASON_FAULT", "pool.shard:1:raise")
    with pytest.raises(AssertionError, match=r"'pool\.nowhere' is not listed"):
        fault("pool.nowhere")


def test_the_nth_pass_of_the_named_site_acts_and_no_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REASON_FAULT", "pool.shard:3:raise")
    fault("pool.shard")
    fault("pool.verdicts")
    fault("pool.shard")
    with pytest.raises(FaultRaised, match=r"pool\.shard"):
        fault("pool.shard")
    fault("pool.shard")  # only the third


@pytest.mark.parametrize(("kind", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_disk_kinds_raise_the_error_of_the_disk(kind: str, number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REASON_FAULT", f"write.temp:1:{kind}")
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        fault("write.temp")
    assert caught.value.errno == number


def child(setting: str) -> subprocess.Popen[bytes]:
    code = (
        "from rl.faults import fault\nfault('stage.start')\nprint('first', flush=True)\n"
        "fault('stage.start')\nprint('second')"
    )
    environment = os.environ | {"REASON_FAULT": setting}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE)


def test_kill_is_sigkill_at_the_nth_pass():
    process = child("stage.start:2:kill")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert output == b"first\n"


def test_hang_hangs():
    process = child("stage.start:2:hang")
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    process.communicate(timeout=60)


@pytest.mark.parametrize(
    "setting",
    [
        "pool.shard",
        "pool.shard:1",
        "pool.shard:0:kill",
        "pool.shard:x:kill",
        "pool.shard:1:explode",
        "nowhere.at_all:1:kill",
        ":::",
    ],
)
def test_a_setting_that_cannot_be_read_is_refused(setting: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REASON_FAULT", setting)
    with pytest.raises(ValueError, match="REASON_FAULT") as caught:
        fault("stage.start")
    assert setting in str(caught.value) and all(kind in str(caught.value) for kind in KINDS)
