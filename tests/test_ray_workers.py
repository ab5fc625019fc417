"""Replicas as Ray actors: the same completions, dead and hung actors replaced. Without Ray: an error that names it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rl.samplers.ray_workers import RayReplicas
from rl.samplers.replicas import EngineSpec

pytestmark = pytest.mark.alone

TESTS = Path(__file__).parent

# In a process of its own: Ray's threads and sockets outlive a test, and its warnings are not ours.
SCRIPT = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import ray
from replica_engines import scripted_completion
from rl.samplers.base import SampleRequest, SamplingSettings
from rl.samplers.ray_workers import RayReplicas
from rl.samplers.replicas import EngineSpec, ReplicasFailed

folder, settings, found = sys.argv[2], SamplingSettings(), {}
requests = [SampleRequest((1, 2), seed=n) for n in range(60)]
shards = [requests[n : n + 6] for n in range(0, 60, 6)]
wanted = {i: [scripted_completion(r, settings, 3) for r in shard] for i, shard in enumerate(shards)}
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=None)

def run(name, factory, arguments, **options):
    os.makedirs(f"{folder}/{name}")
    told = []
    with RayReplicas(EngineSpec(f"replica_engines:{factory}", arguments), 2, **options) as replicas:
        replicas.policy_version = 3
        started = time.monotonic()
        drawn = list(replicas.sample_shards(shards, settings, told.append))
        assert [c for c in replicas.sample(requests, settings)] == [c for i in range(10) for c in wanted[i]]
    found[name] = [len(drawn), dict(drawn) == wanted, told == sorted(told) and told[-1], time.monotonic() - started]

run("plain", "scripted", {"seconds": 0.01})
run("die", "failing", {"marks": f"{folder}/die", "die": [8, 40]})
run("hang", "failing", {"marks": f"{folder}/hang", "hang": [8]}, shard_seconds=5.0)
try:
    run("poison", "failing", {"marks": f"{folder}/poison", "refuse": [8], "times": 99})
except ReplicasFailed as error:
    found["poison"] = str(error)
with open(f"{folder}/found.json", "w") as file:  # stdout is also the raylet's
    json.dump(found, file)
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='needs Ray: pip install "reason[ray]"')
def test_two_local_actors_draw_what_one_process_draws(tmp_path):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TESTS), str(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)},  # Ray keeps a token there
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for name in ("plain", "die", "hang"):
        assert found[name][:3] == [10, True, 60]
    assert found["hang"][3] > 5
    assert "shard 1 was given to 3 replicas" in found["poison"]
    assert "6 requests: seed 6 with 2 prompt tokens" in found["poison"]
    assert "this engine takes no such request" in found["poison"]


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install():
    with pytest.raises(ImportError, match=r'pip install "reason\[ray\]"'):
        RayReplicas(EngineSpec("replica_engines:scripted"), 2)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="shard_seconds and boot_seconds must be above 0"):
        RayReplicas(EngineSpec("replica_engines:scripted"), 2, shard_seconds=0)
