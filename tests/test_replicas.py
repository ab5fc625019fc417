"""Replicas that are killed, die, hang or cannot start: every shard once, the same completions, no process left over."""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from rl.repetition import RepetitionRule
from rl.samplers.base import OneByOne, SampleRequest, SamplingSettings, sample_seed
from rl.samplers.replica_main import (
    EngineSpec,
    dump_completion,
    dump_work,
    load,
    load_completion,
    load_work,
)
from rl.samplers.replicas import Replicas, ReplicasFailed, replica_environment
from rl.samplers.shard_queue import ShardQueue, Work
from rl.types import Completion, FinishReason, Segment

pytestmark = pytest.mark.alone

SETTINGS = SamplingSettings(temperature=0.7)
TESTS = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def engines(monkeypatch) -> Any:
    """The module of scripted engines, here and in the replicas."""
    monkeypatch.syspath_prepend(TESTS)
    return importlib.import_module("replica_engines")


def shards_of(count: int, size: int) -> list[list[SampleRequest]]:
    return [[SampleRequest((5, i), i, (9,), 30) for i in range(s * size, (s + 1) * size)] for s in range(count)]


def expected(engines, shards, version: int = 0) -> dict[int, list[Completion]]:
    return {i: [engines.scripted_completion(r, SETTINGS, version) for r in shard] for i, shard in enumerate(shards)}


def failing(folder: Path, **events) -> EngineSpec:
    folder.mkdir(exist_ok=True)
    return EngineSpec("replica_engines:failing", {"marks": str(folder), **events})


def draw_until_failure(replicas: Replicas, shards) -> tuple[dict[int, list[Completion]], str]:
    """What was handed over, and the message of the error that came then."""
    drawn = {}
    try:
        for index, completions in replicas.sample_shards(shards, SETTINGS):
            assert index not in drawn
            drawn[index] = completions
    except ReplicasFailed as error:
        return drawn, str(error)
    raise AssertionError("nothing failed")


def states(pids) -> list[str]:
    """R, S, Z ... of processes; those that are gone are left out."""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return found


def wait_until(true: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# What travels


AWKWARD = (0.1, -0.0, 5e-324, 1e308, 1 / 3, -math.inf, -1.7976931348623157e308)


def test_what_travels_arrives_as_it_was():
    requests = (SampleRequest((1, 2**31), 2**64 - 1), SampleRequest((), 0, (3, 4), 7))
    for rule in (None, RepetitionRule(3, 4, 5)):
        work = Work(requests, SamplingSettings(1 / 3, 0.1 + 0.2, 99, rule), 12)
        line = dump_work(work)
        assert load_work(line) == work and line.count(b"\n") == 1 and line.endswith(b"\n")
    for text in ("", "\n\r\u2028\x85\x00", "\ud800", "\udfff x \ud83d", "\ud83d\ude00", "\U0001f600", '"\\'):
        completion = Completion(text, tuple(range(7)), AWKWARD, FinishReason.REPETITION, 3, (Segment(7, 2, False),))
        line = dump_completion(completion)
        back = load_completion(load(line))
        assert back == completion and line.count(b"\n") == 1
        assert [math.copysign(1, x) for x in back.sampler_logprobs] == [math.copysign(1, x) for x in AWKWARD]
        assert type(back.finish_reason) is FinishReason
    (nan,) = load_completion(
        load(dump_completion(Completion("", (1,), (math.nan,), FinishReason.STOP)))
    ).sampler_logprobs
    assert math.isnan(nan)


def test_a_factory_and_its_arguments_are_checked():
    for factory in ("engines", "a.b:", ":f", "a b:f", "a:f()", "a:b:c", "../x:f"):
        with pytest.raises(ValueError, match="is not module:function"):
            EngineSpec(factory)
    for value in (Path("x"), (1, 2), {1: 2}, math.nan, object()):
        with pytest.raises(ValueError, match="argument model = .* is not plain JSON"):
            EngineSpec("a.b:f", {"model": value})


def test_the_environment_is_what_engines_read():
    around = {
        "PATH": "/bin", "HF_HOME": "/h", "VLLM_USE_V1": "1", "LD_PRELOAD": "x.so", "CUDA_HOME": "/c",
        "RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "LOCAL_RANK": "0", "OPENAI_API_KEY": "k",
    }  # fmt: skip
    found = replica_environment(around, 10**6)
    assert found.pop("PYTHONPATH").split(os.pathsep)[0] == str(Path(TESTS).parent)
    kept = {name: around[name] for name in ("PATH", "HF_HOME", "VLLM_USE_V1", "LD_PRELOAD", "CUDA_HOME")}
    assert found == kept | {"OMP_NUM_THREADS": "1"}
    assert int(replica_environment({}, 1)["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))
    assert replica_environment({"OMP_NUM_THREADS": "5"}, 2)["OMP_NUM_THREADS"] == "5"
    on_gpu = replica_environment({}, 2, "3", {"HF_HOME": "/g"})
    assert (on_gpu["CUDA_VISIBLE_DEVICES"], on_gpu["HF_HOME"]) == ("3", "/g") and "OMP_NUM_THREADS" not in on_gpu


def test_counts_are_checked(tmp_path):
    spec = EngineSpec("replica_engines:scripted")
    wrong: list[tuple[int, dict[str, Any]]] = [
        (0, {}), (1, {"restarts": -1}), (1, {"shard_seconds": 0}), (1, {"boot_seconds": 0}), (1, {"shard_size": 0}),
    ]  # fmt: skip
    for count, options in wrong:
        with pytest.raises(ValueError, match="at least|above 0"):
            Replicas(spec, count, logs=tmp_path, **options)
    with pytest.raises(ValueError, match="devices names 1 devices for 2 replicas"):
        Replicas(spec, 2, devices=["0"], logs=tmp_path)


# Drawing


@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_replicas_draws_the_same(engines, count):
    shards = [*shards_of(25, 4), []]
    told: list[int] = []
    with Replicas(EngineSpec("replica_engines:scripted"), count, shard_size=7) as replicas:
        assert replicas.pids() == []  # nothing is started before it is needed
        replicas.policy_version = 4
        drawn = list(replicas.sample_shards(shards, SETTINGS, told.append))
        assert sorted(index for index, _ in drawn) == list(range(26))
        assert dict(drawn) == expected(engines, shards, version=4)
        assert told == sorted(set(told)) and told[-1] == 100
        replicas.policy_version = 5
        flat = [request for shard in shards for request in shard]
        assert replicas.sample(flat, SETTINGS) == [engines.scripted_completion(r, SETTINGS, 5) for r in flat]
        assert replicas.sample([], SETTINGS) == []
        pids = replicas.pids()
        assert len(pids) <= count
    assert states(pids) == [] and replicas.pids() == []


def test_shards_come_as_they_are_done_and_progress_between(tmp_path, engines):
    """A slow first shard does not hold back the others."""
    told: list[int] = []
    shards = [*shards_of(1, 20), *([SampleRequest((1,), 1000 + i)] for i in range(3))]
    with Replicas(failing(tmp_path / "m", wait=[3]), 2) as replicas:
        stream = replicas.sample_shards(shards, SETTINGS, told.append)
        drawn = [next(stream) for _ in range(3)]
        (tmp_path / "m" / "go on").touch()
        drawn += stream
    assert [index for index, _ in drawn] == [1, 2, 3, 0]
    assert dict(drawn) == expected(engines, shards)
    assert told == sorted(set(told)) and told[-1] == 23
    with Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.05}), 1) as replicas:
        told.clear()
        list(replicas.sample_shards(shards_of(1, 12), SETTINGS, told.append))
    assert told[-1] == 12 and len(told) > 3  # not only at the end


def test_two_callers_and_an_abandoned_one_share_the_replicas(engines):
    shards = shards_of(12, 3)
    with Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.002}), 2) as replicas:
        one, two = replicas.sample_shards(shards, SETTINGS), replicas.sample_shards(shards, SETTINGS)
        left = replicas.sample_shards(shards, SETTINGS)
        next(left)
        assert isinstance(left, Generator)
        left.close()
        pairs = list(zip(one, two, strict=True))
        for drawn in zip(*pairs, strict=True):
            assert dict(drawn) == expected(engines, shards)


def test_finished_shards_wait_in_bounded_memory():
    """Replicas stop when the caller does not take what they drew."""
    taken: list[int] = []

    class Instant:
        def ready(self) -> None: ...
        def kill(self) -> None: ...
        def end(self) -> None: ...
        def draw(self, work: Work, progress: Callable[[int], None]) -> list[Completion]:
            taken.append(work.requests[0].seed)
            return [Completion("", (), (), FinishReason.STOP)] * len(work.requests)

    queue = ShardQueue(lambda number: Instant(), 2, 0)
    stream = queue.draw(shards_of(50, 1), SETTINGS, 0, lambda finished: None)
    next(stream)
    time.sleep(0.2)
    assert len(taken) <= 1 + 2 * 2 + 2  # taken by the caller, waiting, in flight
    assert len(list(stream)) == 49
    queue.close()
    queue.join()


def test_an_error_of_our_own_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)

    def broken(number: int) -> Any:
        raise KeyError("no such replica")

    queue = ShardQueue(broken, 2, 0)
    with pytest.raises(
        ReplicasFailed, match=r"thread of replica \d ended by an error.*\n0 of 2 shards are done, 2 left"
    ):
        list(queue.draw(shards_of(2, 1), SETTINGS, 0, lambda finished: None))
    queue.join()


def test_what_an_engine_prints_is_no_reply(tmp_path, engines):
    shards = shards_of(2, 2)
    with Replicas(EngineSpec("replica_engines:chatty"), 1, logs=tmp_path / "logs") as replicas:
        assert dict(replicas.sample_shards(shards, SETTINGS)) == expected(engines, shards)
    assert (tmp_path / "logs" / "replica-0.log").read_text().splitlines() == ["[0]", '"ready"']


def test_a_device_a_replica(tmp_path, engines):
    with Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.2}), 2, devices=["3", "5"]) as replicas:
        list(replicas.sample_shards(shards_of(2, 1), SETTINGS))
        found = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in replicas.pids()]
    assert {line for lines in found for line in lines if line.startswith(b"CUDA_VIS")} == {
        b"CUDA_VISIBLE_DEVICES=3",
        b"CUDA_VISIBLE_DEVICES=5",
    }


# Losses


def test_fifty_kills_lose_nothing_and_double_nothing(engines):
    dice = random.Random(11)
    shards = shards_of(500, 4)
    kills = set(dice.sample(range(1, 480), 50))
    killed = 0
    drawn: list[tuple[int, list[Completion]]] = []
    told: list[int] = []
    with Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.001}), 3, restarts=100) as replicas:
        for shard in replicas.sample_shards(shards, SETTINGS, told.append):
            drawn.append(shard)
            if len(drawn) in kills:
                time.sleep(dice.random() * 0.01)
                pids = []
                while not pids:  # one that is booting may be killed too
                    pids = replicas.pids()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(dice.choice(pids), signal.SIGKILL)
                    killed += 1
        last = replicas.pids()
    assert killed == 50
    assert sorted(index for index, _ in drawn) == list(range(500))
    assert dict(drawn) == expected(engines, shards)
    assert told == sorted(set(told)) and told[-1] == 2000
    assert states(last) == []


def test_a_hang_is_found_and_replaced(tmp_path, engines):
    shards = shards_of(10, 3)
    with Replicas(failing(tmp_path / "m", hang=[7]), 2, shard_seconds=1.5, logs=tmp_path) as replicas:
        started = time.monotonic()
        assert dict(replicas.sample_shards(shards, SETTINGS)) == expected(engines, shards)
        assert time.monotonic() - started > 1.5
    written = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "now at seed 7" in written and "replica_engines.py" in written  # where it hung


def test_a_stopped_process_is_a_hang(engines):
    shards = shards_of(40, 2)
    with Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.002}), 1, shard_seconds=1.5) as replicas:
        stream = replicas.sample_shards(shards, SETTINGS)
        drawn = [next(stream)]
        (stopped,) = replicas.pids()
        os.kill(stopped, signal.SIGSTOP)
        drawn += stream
        assert dict(drawn) == expected(engines, shards) and len(drawn) == 40
        wait_until(lambda: states([stopped]) == [])


def test_signs_of_life_keep_a_slow_shard_alive(engines):
    """Thirty completions of 0.1 s each take longer than the limit; none of them does."""
    shards = shards_of(1, 30)
    with Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.1}), 1, 1, shard_seconds=2.0) as replicas:
        assert dict(replicas.sample_shards(shards, SETTINGS)) == expected(engines, shards)


def test_restarts_used_up_is_an_error_after_what_was_done(tmp_path, engines):
    """Shard 1 kills replicas until one has no restart left; shard 0, in flight elsewhere, is finished first."""
    spec = failing(tmp_path / "m", die=[2], times=99, wait=[1])
    shards = shards_of(6, 2)
    with Replicas(spec, 2, restarts=0, logs=tmp_path) as replicas:
        drawn, message = draw_until_failure(replicas, shards)
        assert drawn == {0: expected(engines, shards)[0]}
        for part in (
            "was lost 1 times, restarts=0 are used up",
            "It died (exit status 7)",
            "It wrote last:\nnow at seed 2",
            "1 of 6 shards are done, 5 left",
        ):
            assert part in message
        with pytest.raises(ReplicasFailed, match="restarts=0 are used up"):
            list(replicas.sample_shards(shards, SETTINGS))
        wait_until(lambda: replicas.pids() == [])
        replicas.close()  # and asked again, it starts anew
        good = [shards[0], *shards[2:]]
        assert dict(replicas.sample_shards(good, SETTINGS)) == expected(engines, good)


def test_a_shard_that_kills_its_replicas_is_named(tmp_path, engines):
    spec = failing(tmp_path / "m", refuse=[4], times=99)
    shards = shards_of(5, 2)
    with Replicas(spec, 2, restarts=9) as replicas:
        drawn, message = draw_until_failure(replicas, shards)
        for part in (
            "shard 2 was given to 3 replicas",
            "2 requests: seed 4 with 3 prompt tokens, seed 5 with 3 prompt tokens",
            "exit status 1",
            "ValueError: this engine takes no such request",
            f"{len(drawn)} of 5 shards are done, {5 - len(drawn)} left",
        ):
            assert part in message
        whole = expected(engines, shards)
        assert 2 not in drawn and all(whole[index] == completions for index, completions in drawn.items())
        # The replicas are whole: the other shards can still be drawn.
        rest = [*shards[:2], *shards[3:]]
        assert dict(replicas.sample_shards(rest, SETTINGS)) == expected(engines, rest)


def test_a_model_that_is_not_there_is_an_error_with_its_traceback(tmp_path):
    with Replicas(EngineSpec("replica_engines:unbuildable", {"model": "/nowhere"}), 1, restarts=1) as replicas:
        drawn, message = draw_until_failure(replicas, shards_of(2, 1))
    assert drawn == {} and "replica 0 was lost 2 times" in message
    assert "FileNotFoundError: there is no model in /nowhere" in message
    with Replicas(EngineSpec("replica_engines:scripted"), 1, restarts=0, boot_seconds=0.001) as replicas:
        assert "It was not ready in 0.001 s (boot_seconds)" in draw_until_failure(replicas, shards_of(2, 1))[1]
    replicas = Replicas(EngineSpec("replica_engines:nothing"), 1, restarts=0)
    with replicas, pytest.raises(ReplicasFailed, match="has no attribute 'nothing'"):
        replicas.sample(shards_of(1, 1)[0], SETTINGS)


def test_shards_that_die_once_are_all_drawn(tmp_path, engines):
    shards = shards_of(20, 2)
    with Replicas(failing(tmp_path / "m", die=[0, 9, 17, 39]), 4, restarts=4) as replicas:
        assert dict(replicas.sample_shards(shards, SETTINGS)) == expected(engines, shards)


# Ends


def test_forgotten_replicas_end(engines):
    replicas = Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.01}), 2)
    list(replicas.sample_shards(shards_of(4, 2), SETTINGS))
    pids = replicas.pids()
    assert pids
    del replicas
    gc.collect()
    wait_until(lambda: states(pids) == [])


def test_closing_ends_a_call_that_waits(tmp_path):
    replicas = Replicas(failing(tmp_path / "m", hang=[0]), 1)
    threading.Timer(0.5, replicas.close).start()
    with pytest.raises(ReplicasFailed, match="the replicas were closed"):
        list(replicas.sample_shards(shards_of(2, 1), SETTINGS))


def test_the_engines_own_processes_end_with_it(tmp_path, engines):
    """Also when the replica is killed and its child holds its pipes open."""
    written = tmp_path / "pids"
    shards = shards_of(60, 2)
    with Replicas(EngineSpec("replica_engines:family", {"pids": str(written)}), 1) as replicas:
        stream = replicas.sample_shards(shards, SETTINGS)
        drawn = [next(stream)]
        os.kill(int(written.read_text().split()[0]), signal.SIGKILL)
        drawn += stream
        assert dict(drawn) == expected(engines, shards)
    pids = written.read_text().split()
    assert len(pids) == 4
    wait_until(lambda: not [state for state in states(pids) if state != "Z"])  # a grandchild is reaped by init


PARENT = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background has it ignored
sys.path.insert(0, sys.argv[1])
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.replicas import EngineSpec, Replicas
replicas = Replicas(EngineSpec("replica_engines:scripted", {"seconds": 0.05}), 3, logs=Path(sys.argv[2]))
for index, _ in replicas.sample_shards([[SampleRequest((1,), i)] for i in range(10**4)], SamplingSettings()):
    if index >= 20:
        print(*replicas.pids(), flush=True)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_replica_outlives_its_parent(tmp_path, end):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(TESTS).parent), *filter(None, sys.path)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, TESTS, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    with parent:
        assert parent.stdout is not None
        pids = parent.stdout.readline().split()
        assert len(pids) == 3 and len(states(pids)) == 3
        os.killpg(parent.pid, end)  # as Ctrl-C does, to all of the parent's group
        _, error = parent.communicate(timeout=20)
    assert parent.returncode == -end or (end is signal.SIGINT and "KeyboardInterrupt" in error)
    wait_until(lambda: not [state for state in states(pids) if state != "Z"])


# A real engine


def test_transformers_replicas_give_the_bytes_of_one_process(tiny_model_folder, engines):
    settings = SamplingSettings(max_tokens=12)
    requests = [SampleRequest((3, 4, 5 + i % 4), sample_seed(0, "replica", i)) for i in range(40)]
    shards = [requests[:7], requests[7:20], requests[20:21], requests[21:]]
    arguments = {"model": str(tiny_model_folder), "batch_size": 16}
    here = dict(OneByOne(engines.transformers_engine(**arguments)).sample_shards(shards, settings))
    with Replicas(EngineSpec("replica_engines:transformers_engine", arguments), 2) as replicas:
        there = dict(replicas.sample_shards(shards, settings))
    assert there == here
    assert {i: [dump_completion(c) for c in drawn] for i, drawn in there.items()} == {
        i: [dump_completion(c) for c in drawn] for i, drawn in here.items()
    }
