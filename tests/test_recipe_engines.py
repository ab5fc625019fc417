"""Which engine a recipe or a command line names, and that replicas of it fill one pool."""

import json

import pytest

from recipes.console import PlainReport
from recipes.engines import EngineChoice, choose, divide_devices
from recipes.runner import run_recipe
from recipes.schema import RecipeError, load_recipe
from recipes.stages import METHODS
from rl.pool import Pool
from rl.samplers.vllm_settings import closed_settings

RECIPE = """\
name: engines
problems: {{source: tiny, train: 16, dev: 2, test: 2}}
sampling: {{max_tokens: 8{sampling}}}
stages:
  pool: {{method: sample, model: {model}, samples: 4}}
"""


def load(folder, model, sampling=""):
    path = folder / "engines.yaml"
    path.write_text(RECIPE.format(sampling=sampling, model=model))
    return load_recipe(path)


def test_a_command_line_names_an_engine():
    assert choose("transformers", 64, 2, ()) == EngineChoice(batch_size=64, replicas=2)
    found = choose("vllm", 256, 1, ["max_num_seqs=64", "enforce_eager=true"])
    assert found.engine == {"max_num_seqs": 64, "enforce_eager": True}
    for name, settings, message in (
        ("sglang", (), "--engine must be transformers or vllm"),
        ("transformers", ["a=1"], "add --engine vllm"),
        ("vllm", ["a"], "write each as KEY=VALUE"),
        ("vllm", ["a=1", "a=2"], "different keys"),
        ("vllm", ["tokenizer=x"], r"vllm\.engine\.tokenizer is set by the sampler"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(name, 256, 1, settings)
    assert [key for key, _ in closed_settings({}, {"seed": 1, "min_p": 0.1})] == ["request.seed"]


def test_shards_leave_no_replica_idle():
    assert EngineChoice().shard_size(10) == 512
    assert EngineChoice(replicas=8).shard_size(10_000) == 312
    assert EngineChoice(replicas=8).shard_size(100) == 32 and EngineChoice(replicas=2).shard_size(10**6) == 512


def test_each_replica_has_gpus_of_its_own():
    assert divide_devices(["0", "1", "2", "3"], 2, 2) == ["0,1", "2,3"]
    assert divide_devices(["4", "5"], 2, 1) == ["4", "5"]
    with pytest.raises(ValueError, match="2 engines of 2 GPUs each need 4, 3 are visible: ask for 1"):
        divide_devices(["0", "1", "2"], 2, 2)


def test_what_a_recipe_may_say(tmp_path, tiny_model_folder):
    plain = load(tmp_path, tiny_model_folder)
    assert plain.sampling.choice == EngineChoice()
    stage = plain.stages["pool"]
    assert "engine" not in plain.identity(stage)  # so that no folder of before there were engines is made again
    named = load(
        tmp_path, tiny_model_folder, ", engine: vllm, vllm: {engine: {max_num_seqs: 8}, request: {min_p: 0.1}}"
    )
    assert named.sampling.choice.request == {"min_p": 0.1}
    assert named.identity(stage)["vllm"]["engine"] == {"max_num_seqs": 8}
    more = load(tmp_path, tiny_model_folder, ", replicas: 2")
    assert more.identity(stage) == plain.identity(stage)  # who draws changes nothing
    for sampling, message in (
        (", engine: vlm", "engine"),
        (", vllm: {engine: {max_num_seqs: 8}}", "write engine: vllm"),
        (", engine: vllm, vllm: {request: {seed: 1}}", "is set by the sampler"),
        (", replicas: 0", "replicas"),
    ):
        with pytest.raises(RecipeError, match=message):
            load(tmp_path, tiny_model_folder, sampling)


def test_two_replicas_fill_the_pool_that_one_fills(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    drawn = {}
    for name, sampling in (("one", ""), ("two", ", replicas: 2")):
        (tmp_path / name).mkdir()
        recipe = load(tmp_path / name, tiny_model_folder, sampling)
        run_recipe(recipe, root=tmp_path / name / "runs", methods=METHODS, report=PlainReport())
        (folder,) = (tmp_path / name / "runs" / "engines").glob("pool-*")
        pool = Pool.open(folder / "pool")
        drawn[name] = {(problem, i): c.token_ids for problem, i, c in pool.samples()}
        assert pool.check() == ()
        files = [json.loads(line)["file"] for line in (folder / "pool" / "files.jsonl").read_text().splitlines()]
        assert sum(file.startswith("samples") for file in files) == {"one": 1, "two": 2}[name]
    assert len(drawn["one"]) == 64 and drawn["two"] == drawn["one"]
