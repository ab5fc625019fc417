"""Workers that hang, die, lie or eat memory: every request gets its answer, and the pool is whole again."""

import asyncio
import contextlib
import gc
import threading
import time
from pathlib import Path

import pytest

from rl.sandbox.base import SandboxUnavailable
from rl.types import JudgeFailure
from rl.workers import WorkerPool, python_worker

pytestmark = pytest.mark.alone

WORKER = """
import ctypes, os, sys, time
from rl.worker_main import serve

def answer(request):
    what, value = request
    if what == "hang":                    # holds the interpreter lock: no thread of this process can do anything
        ctypes.PyDLL(None).sleep(600)
    if what == "die":
        os._exit(7)
    if what == "raise":
        raise KeyError("no such thing")
    if what == "print":
        print("[0, \\"\\", true]")
        sys.__stdout__.flush()
    if what == "memory":
        return len(bytearray(value))
    if what == "deep":
        return deep(value)
    if what == "lie":
        os.write(3, b"[99999, \\"\\", true]\\n")  # where replies go
    if what == "flood":
        return "x" * value
    return value

def deep(n):
    return deep(n - 1) + 1

if sys.argv[1:] == ["broken"]:
    sys.exit(3)
serve(answer, seconds=float((sys.argv + ["60"])[1]), memory=2**30)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return str(path)


@pytest.fixture
def pool(script):
    pool = WorkerPool(python_worker(script), workers=2, timeout=1.0)
    yield pool
    pool.close()


def states(pids):
    """R, S, Z ... of processes; those that are gone are left out."""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return found


def test_one_answer_a_request_in_order(pool):
    assert pool.ask([]) == [] and pool.pids() == []  # nothing is started before it is needed
    answers = pool.ask([["say", n] for n in range(50)])
    assert [answer.value for answer in answers] == list(range(50))
    assert all(answer.failure is None and answer.seconds < 1 for answer in answers)
    assert len(pool.pids()) == 2


def test_hangs_cost_their_time_and_nothing_else(pool):
    pool.ask([["say", 0]])
    requests = [["say", n] for n in range(30)]
    requests[3] = requests[17] = ["hang", 0]
    started = time.monotonic()
    answers = pool.ask(requests)
    assert time.monotonic() - started < 2 * 2 + 2  # two hangs, even if one worker got both
    for n, answer in enumerate(answers):
        if n in (3, 17):
            assert answer.failure is JudgeFailure.TIMEOUT and 1 <= answer.seconds < 2
            assert "killed after 1." in answer.reason
        else:
            assert answer.value == n


def test_the_pool_is_whole_again_without_zombies(pool):
    pool.ask([["say", n] for n in range(8)])
    before = pool.pids()
    pool.ask([["die", 0], ["hang", 0], ["die", 0]])
    deadline = time.monotonic() + 10
    while len(pool.pids()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    after = pool.pids()
    assert len(after) == 2 and not set(before) & set(after)
    assert states(before) == []  # reaped
    assert [answer.value for answer in pool.ask([["say", 1]] * 4)] == [1] * 4


def test_deaths_errors_floods_and_forged_replies_are_crashes(pool):
    answers = pool.ask([["die", 0], ["raise", 0], ["deep", 10**6], ["flood", 1 << 22], ["lie", 0], ["say", 5]])
    assert [answer.failure for answer in answers[:5]] == [JudgeFailure.CRASH] * 5
    assert "died (7)" in answers[0].reason
    assert answers[1].reason == "KeyError: 'no such thing'"
    assert answers[2].reason == "nested too deeply"
    assert answers[5].value == 5


def test_what_is_printed_is_no_reply(pool):
    assert [answer.value for answer in pool.ask([["print", "a"], ["print", "b"]])] == ["a", "b"]


def test_memory_is_capped(pool):
    (answer,) = pool.ask([["memory", 2 * 2**30]])
    assert (answer.failure, answer.reason) == (JudgeFailure.CRASH, "out of memory")
    assert pool.ask([["memory", 2**20]])[0].value == 2**20


def test_the_kernel_ends_a_hang_whose_parent_is_gone(script):
    """The alarm needs neither the parent nor the interpreter lock."""
    process = python_worker(script, "0.5")()
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b'"ready"\n'
    process.stdin.write(b'[0, ["hang", 0]]\n')
    process.stdin.flush()
    assert process.wait(10) == -14  # SIGALRM
    process.stdin.close()
    process.stdout.close()


def test_a_worker_that_does_not_start_is_infrastructure(script):
    for spawn in (python_worker(script, "broken"), python_worker("/nowhere/at/all.py")):
        pool = WorkerPool(spawn, workers=2, timeout=1.0)
        answers = pool.ask([["say", 1]] * 5)
        assert {answer.failure for answer in answers} == {JudgeFailure.INFRASTRUCTURE}
        assert "died while it started" in answers[0].reason
        pool.close()


def test_a_sandbox_that_is_not_there_is_infrastructure():
    def spawn():
        raise SandboxUnavailable("there is no sandbox here")

    pool = WorkerPool(spawn, workers=1, timeout=1.0)
    (answer,) = pool.ask([["say", 1]])
    assert answer.failure is JudgeFailure.INFRASTRUCTURE and "there is no sandbox here" in answer.reason
    pool.close()


def test_from_threads_and_from_asyncio(pool):
    found = {}

    def ask(name):
        found[name] = [answer.value for answer in pool.ask([["say", [name, n]] for n in range(20)])]

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[name] == [[name, n] for n in range(20)] for name in range(6))

    async def at_once():
        asked = [asyncio.to_thread(pool.ask, [["say", n]]) for n in range(10)]
        return await asyncio.gather(*asked)

    assert [answers[0].value for answers in asyncio.run(at_once())] == list(range(10))


def test_closed_pools_leave_nothing_and_start_again(script):
    pool = WorkerPool(python_worker(script), workers=2, timeout=1.0)
    pool.ask([["say", 1]] * 4)
    pids = pool.pids()
    pool.close()
    assert states(pids) == [] and pool.pids() == []
    assert pool.ask([["say", 2]])[0].value == 2
    pids = pool.pids()
    del pool  # forgotten, not closed
    gc.collect()
    deadline = time.monotonic() + 5
    while states(pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert states(pids) == []


def test_arguments_are_checked():
    for workers, timeout in ((0, 1.0), (1, 0.0)):
        with pytest.raises(ValueError, match="at least 1 worker"):
            WorkerPool(python_worker("x"), workers=workers, timeout=timeout)
