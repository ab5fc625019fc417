"""Programs that try to get out: none does, as root and as an ordinary user, on every rung, and good jobs do not suffer.

`sandbox_attacks/attacks.py` holds the attacks, with what would show the success of each; `sandbox_attacks/driver.py`
runs them on one rung and looks after what it planted. Where the tests run as root, the ordinary user is one that nobody
is; where they do not, it is their own, and the half of root is left out with a word.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from rl.sandbox import host
from rl.sandbox.base import SandboxUnavailable
from rl.sandbox.bubblewrap import Bubblewrap
from rl.sandbox.landlock import Landlock, closed_above

pytestmark = [pytest.mark.sandbox, pytest.mark.alone]

ROOT = Path(__file__).resolve().parents[1]
DRIVER = Path(__file__).resolve().parent / "sandbox_attacks" / "driver.py"
AS_ANOTHER_USER = """
import json, os, sys
sys.path.append(sys.argv[1])
from rl.sandbox import guard, inside
covered, shown, user = json.loads(sys.argv[2])
if covered:  # an interpreter below a home that the user may not enter
    guard.uncover([os.fsencode(path) for path in covered], [os.fsencode(path) for path in shown])
inside.drop_user(user)
os.execv(sys.argv[3], sys.argv[3:])
"""
# A guard ends these for what they hold, so their own word may be missing; what they reached is seen from outside.
MAY_BE_ENDED = {"files_that_fit", "unlinked_files", "deep_folders", "unfriendly_folders", "kill_all"}
ON_AN_OLD_KERNEL = (  # what Landlock itself does not hold there
    "empty_a_file_outside", "empty_the_library", "hard_link_out", "change_attributes_outside", "kill_victim",
    "kill_all", "signal_by_descriptor", "abstract_socket", "pair_to_abstract", "tcp", "devices", "push_into_terminal",
    "read_secret", "write_outside", "remove_outside", "files_of_another_job", "end_the_guard", "outlive",
)  # fmt: skip


def drive(caller: str, *arguments: str) -> Any:
    """The driver's answer, run by root or by an ordinary user."""
    python = str(host.interpreter().executable)
    command = [python, str(DRIVER), *arguments]
    if caller == "user" and os.geteuid() == 0:
        shown = [*host.interpreter().folders, host.interpreter().executable, ROOT]
        covered = sorted({str(folder) for path in shown if (folder := closed_above(path)) is not None})
        other = json.dumps([covered, [str(path) for path in shown], host.unused_user()])
        command = [python, "-I", "-S", "-c", AS_ANOTHER_USER, str(ROOT), other, *command]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, timeout=280, cwd="/")
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr == b""
    return json.loads(result.stdout)


run_once = cache(drive)


def is_there(make: type[Bubblewrap] | type[Landlock]) -> bool:
    try:
        make()
    except SandboxUnavailable:
        return False
    return True


def rung(name: str, make: type[Bubblewrap] | type[Landlock]) -> Any:
    missing = pytest.mark.skipif(not is_there(make), reason=f"{name} is not there; the other rung is attacked")
    return pytest.param(name, marks=missing)


ROOT_CALLER = pytest.param(
    "root", marks=pytest.mark.skipif(os.geteuid() != 0, reason="not run by root: attacked as an ordinary user only")
)


@pytest.fixture(params=[rung("bubblewrap", Bubblewrap), rung("landlock", Landlock)])
def on_rung(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[ROOT_CALLER, "user"])
def seen(request: pytest.FixtureRequest, on_rung: str) -> dict[str, Any]:
    """All attacks and good jobs on one rung, by one caller; run once."""
    return run_once(request.param, on_rung)


def test_there_is_a_rung_to_attack():
    assert is_there(Bubblewrap) or is_there(Landlock)


def test_every_attack_came_to_nothing(seen: dict[str, Any]):
    endless = set(seen["endless"])
    assert len(seen["attacks"]) >= 80
    for attack in seen["attacks"]:
        assert not attack["token"], attack
        if attack["name"] in endless:
            assert attack["ended"] in ("timeout", "signaled", "output limit"), attack
        elif attack["ended"] == "signaled":
            assert attack["name"] in MAY_BE_ENDED and attack["signal"] == 9, attack
        else:  # it came to its end and says that it reached nothing
            assert (attack["ended"], attack["exit_code"], attack["reached"]) == ("exited", 0, ""), attack
            assert attack["stderr"] == "", attack


def test_nothing_that_was_planted_was_touched(seen: dict[str, Any]):
    assert seen["evidence"] == []
    assert seen["other_job_lived"]


def test_nothing_is_left(seen: dict[str, Any]):
    assert seen["left"] == {}


def test_limits_hold_as_seen_from_outside(seen: dict[str, Any]):
    assert all(count <= seen["processes"] for count in seen["most"].values()), seen["most"]
    assert all(max(attack["bytes"]) <= seen["output_bytes"] for attack in seen["attacks"])
    patience = max(1.0, 6 * seen["calm"])  # on a busy machine a start alone takes its time
    assert [a for a in seen["attacks"] if a["seconds"] > a["wall_seconds"] + patience] == []


def test_good_jobs_beside_them_are_right(seen: dict[str, Any]):
    assert len(seen["good"]) == 60
    assert [job for job in seen["good"] if (job["ended"], job["reached"]) != ("exited", job["expected"])] == []


@pytest.mark.skipif(not is_there(Landlock), reason="Landlock is not there; the other rung is attacked")
def test_what_an_old_landlock_lacks_the_filter_and_the_guard_hold():
    seen = drive("user", "landlock-1", *ON_AN_OLD_KERNEL)
    assert seen["sandbox"] == "Landlock (ABI 1)"
    assert [attack for attack in seen["attacks"] if attack["reached"] or attack["token"]] == []
    assert (seen["evidence"], seen["left"]) == ([], {})


def test_the_attacks_succeed_where_nothing_holds_them():
    reached = drive("user", "none")
    assert len(reached) >= 30
    assert [name for name, found in reached.items() if not found] == []
