"""GRPO with vLLM as the sampler: it learns as with the transformers sampler, and the two agree after every update."""

import json
from pathlib import Path

import pytest

from recipes.console import PlainReport
from recipes.runner import run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1500), pytest.mark.filterwarnings("ignore")]

MODEL = Path(__file__).resolve().parents[1] / "recipes" / "models" / "tiny-base"
STEPS = 20
RECIPE = """\
name: engines
problems: {{source: tiny, train: 2000, dev: 100, test: 10}}
sampling: {{max_tokens: 120{engine}}}
stages:
  teacher:
    method: grpo
    model: {model}
    steps: {steps}
    problems_per_step: 12
    group_size: 12
    learning_rate: 3e-4
    eval_every: {steps}
    eval_problems: 100
    eval_samples: 2
"""
VLLM = ", engine: vllm, vllm: {{engine: {{max_model_len: 512}}}}".replace("{{", "{").replace("}}", "}")


def trained(folder, engine):
    folder.mkdir()
    path = folder / "engines.yaml"
    path.write_text(RECIPE.format(engine=engine, model=MODEL, steps=STEPS))
    (result,) = run_recipe(load_recipe(str(path)), root=folder / "runs", methods=METHODS, report=PlainReport())
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_it_learns_as_with_the_transformers_sampler(tmp_path, monkeypatch):
    from rl.samplers.synced import SyncedSampler

    agreements = []
    check = SyncedSampler._check

    def noted(self, requests):
        found = check(self, requests)
        agreements.append(found)
        return found

    monkeypatch.setattr(SyncedSampler, "_check", noted)
    runs = {"vllm": trained(tmp_path / "vllm", VLLM), "transformers": trained(tmp_path / "ours", "")}
    assert [a.policy_version for a in agreements] == list(range(STEPS + 1))  # the start, and after every update
    assert max(a.mean for a in agreements) <= 1e-4 and max(a.largest for a in agreements) <= 1e-2
    last = {}
    for name, lines in runs.items():
        assert len(lines) == STEPS
        first = sum(line["accuracy"] for line in lines[:4]) / 4
        last[name] = sum(line["accuracy"] for line in lines[-4:]) / 4
        assert last[name] > first + 0.1, name
    # 4 x 144 completions each at an accuracy near .7: a standard error of .02 each, more with the problems' own spread.
    assert abs(last["vllm"] - last["transformers"]) < 0.1


TWO_RANKS = """\
name: two
problems: {{source: tiny, train: 50, dev: 4, test: 4}}
sampling: {{max_tokens: 40, engine: vllm, vllm: {{engine: {{max_model_len: 256, kv_cache_memory_bytes: 67108864}}}}}}
stages:
  teacher: {{method: grpo, model: {model}, steps: 2, problems_per_step: 4, group_size: 4, learning_rate: 1e-3}}
  again: {{method: grpo, model: teacher, steps: 1, problems_per_step: 4, group_size: 4, learning_rate: 1e-3}}
"""


def test_two_ranks_have_an_engine_each_and_leave_without_a_word(tmp_path, launch_two):
    """The engines live in the launcher's process group; a second stage starts others there."""
    recipe = tmp_path / "two.yaml"
    recipe.write_text(TWO_RANKS.format(model=MODEL))
    codes, errors = launch_two("cli", "run", recipe, "--runs", tmp_path / "runs", flags=("-m",), seconds=900)
    assert codes == [0, 0], errors
    assert not any("Traceback" in error or "Error" in error for error in errors), errors
    for stage, steps in (("teacher", 2), ("again", 1)):
        (folder,) = (tmp_path / "runs" / "two").glob(f"{stage}-*")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == steps and all(line["tokens_mean"] > 0 for line in lines)
