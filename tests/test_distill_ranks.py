"""Distillation on two processes against one: on-policy (replicated and sharded) and on stored logits.

The file is also the program of the two processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from recipes.console import PlainReport
from recipes.runner import run_recipe
from recipes.schema import load_recipe
from recipes.stages import COLLECTIVE, METHODS
from rl.ranks import ALONE, Ranks, start
from rl.runs import latest_folder, read_lines

MODEL = Path(__file__).resolve().parents[1] / "recipes" / "models" / "tiny-base"
RECIPE = """name: ranks
problems: {source: tiny, levels: [2, 3], train: 24, dev: 4, test: 4}
sampling: {max_tokens: 64}
stages:
  pool: {method: sample, model: %s, samples: 2}
  kept: {method: traces, pool: pool}
  scores: {method: teacher_logits, model: %s, traces: kept, top_k: 6}
  soft: {method: logit_distill, model: ./student, logits: scores, max_length: 96, epochs: 1, batch_size: 8,
         learning_rate: 1.0e-3, micro_batch_tokens: 128}
  on: {method: on_policy, model: ./student, teacher: %s, steps: 3, problems_per_step: 5, group_size: 2, max_tokens: 8,
       learning_rate: 1.0e-3}
  sharded: {method: on_policy, model: ./student, teacher: %s, steps: 3, problems_per_step: 5, group_size: 2,
            max_tokens: 8, learning_rate: 1.0e-3, shard: true}
"""
STAGES = ("soft", "on", "sharded")


def program(folder: Path, root: Path, ranks: Ranks) -> None:
    run_recipe(
        load_recipe(folder / "ranks.yaml"), root=root, methods=METHODS, report=PlainReport(), ranks=ranks,
        collective=COLLECTIVE,
    )  # fmt: skip


if __name__ == "__main__":
    with start() as started:
        program(Path(sys.argv[1]), Path(sys.argv[1]) / "two", started)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, launch_two) -> Path:
    from rl.policy import save_model
    from rl.tasks.tiny_models import make_model, make_tokenizer

    path = tmp_path_factory.mktemp("ranks")
    tokenizer = make_tokenizer()
    save_model(make_model(32, 2, 2, tokenizer, seed=0), tokenizer, path / "student")
    (path / "ranks.yaml").write_text(RECIPE % ((MODEL,) * 4))
    program(path, path / "one", ALONE)
    codes, errors = launch_two(__file__, path)
    assert codes == [0, 0], "\n".join(errors)
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_are_those_of_one_process(folder, stage):
    one, two = (latest_folder(folder / name / "ranks", stage) for name in ("one", "two"))
    assert one is not None and two is not None
    left, right = read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl")
    assert len(left) == len(right) > 2
    for name in ("loss", "grad_norm", "divergence" if stage == "soft" else "reverse_kl"):
        assert [row[name] for row in right] == pytest.approx([row[name] for row in left], rel=1e-3, abs=2e-5)
    weights = [load_file(x / "model/model.safetensors") for x in (one, two)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name
