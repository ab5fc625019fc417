"""RL on programs through the real sandbox: the reward rises; a judge that dies on the way never teaches anything."""

import os
import random
import signal
from dataclasses import replace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl.collect import Collector, RolloutSettings
from rl.curriculum import Shuffled
from rl.grpo import DevSet, Schedule, train
from rl.judging import JudgeFailed
from rl.learner import Learner, OptimSettings
from rl.objectives import dapo
from rl.policy import PolicyModel, load_model, load_tokenizer, save_model
from rl.rewards import WeightedReward, accuracy_reward
from rl.runs import read_lines
from rl.samplers.base import SamplingSettings
from rl.samplers.transformers import TransformersSampler
from rl.sandbox.base import SandboxUnavailable
from rl.sandbox.ladder import find_sandbox
from rl.schedules import constant
from rl.tasks.base import UndecidedLimit
from rl.tasks.code import code_task
from rl.tasks.code_tests import StdinTests, dump_tests
from rl.tasks.mathematics import math_judge, math_task
from rl.tasks.tiny_models import make_model
from rl.types import Problem, TextPart

pytestmark = [pytest.mark.sandbox, pytest.mark.alone]

HEAD, TAIL = "```python\nprint(int(input())", ")\n```"
OPERATIONS = ("+1", "*2", "-3")
QUESTIONS = ("next", "after", "more")  # three ways to ask for n + 1
SPECIAL = ("<|pad|>", "<|end|>", "<|unk|>", "<|user|>", "<|assistant|>")


def toy_tokenizer():
    words = (*QUESTIONS, "</think>", HEAD, TAIL, *OPERATIONS)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *words))}, unk_token="<|unk|>"))
    pattern = "|".join(w.replace("(", r"\(").replace(")", r"\)").replace("+", r"\+").replace("*", r"\*") for w in words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return wrapped


def solution(operation):
    return f"</think>{HEAD}{operation}{TAIL}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that writes programs, any of the three for any question."""
    tokenizer = toy_tokenizer()
    model = make_model(hidden=32, layers=1, heads=2, tokenizer=tokenizer, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows, rng = [], random.Random(0)
    for _ in range(48):
        asked, written = rng.choice(QUESTIONS), rng.choice(OPERATIONS)
        rows.append(tokenizer(f"<|user|>{asked}<|assistant|>{solution(written)}<|end|>")["input_ids"])
    ids = torch.tensor(rows)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits[:, 2:].flatten(0, 1), ids[:, 3:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("models") / "programmer"
    save_model(model.eval(), tokenizer, path)
    return path


TESTS = dump_tests(StdinTests(tuple((f"{n}\n", f"{n + 1}\n") for n in (5, 12, -4))))
PROBLEMS = [Problem(name, (TextPart(name),), "", spec=TESTS) for name in QUESTIONS]


def run(model_folder, folder, task, steps, problems=PROBLEMS, group=16, on_step=lambda step: None):
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(model_folder, to_train=True), load_tokenizer(model_folder)
    policy, optim = PolicyModel(model), OptimSettings(learning_rate=3e-3)
    learner = Learner(policy, torch.optim.AdamW(policy.parameters(), lr=3e-3), dapo(), optim, 1.0)
    sampling = SamplingSettings(max_tokens=8)
    collector = Collector(
        TransformersSampler(model, tokenizer), tokenizer, Shuffled(problems, 1), task,
        [WeightedReward("accuracy", accuracy_reward, 1.0)],
        RolloutSettings(len(problems), group, sampling, constant(8)), seed=1,
    )  # fmt: skip
    train(
        learner, collector, DevSet([], task, sampling), tokenizer, Schedule(steps, save_every=1), folder, seed=1,
        report=lambda step, total, metrics: on_step(step),
    )  # fmt: skip
    return model


@pytest.mark.timeout(200)
def test_grpo_on_programs_learns_through_the_real_sandbox(folder, tmp_path):
    run(folder, tmp_path, code_task(find_sandbox), steps=12)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines[0]["reward"] < 0.7
    assert lines[-1]["reward"] > 0.9
    assert all(line["undecided"] == 0 and line["judge_seconds"] > 0 for line in lines)


@pytest.mark.timeout(200)
def test_a_sandbox_that_goes_away_stops_the_run_with_the_weights_of_the_step_before(folder, tmp_path):
    left = [2]

    def box():
        left[0] -= 1
        if left[0] < 0:
            raise SandboxUnavailable("bubblewrap was removed")
        return find_sandbox()

    run(folder, tmp_path / "short", code_task(find_sandbox), steps=2)
    with pytest.raises(JudgeFailed, match="of 48 completions .* infrastructure.*bubblewrap was removed"):
        run(folder, tmp_path / "cut", code_task(box), steps=6)
    assert [line["step"] for line in read_lines(tmp_path / "cut" / "metrics.jsonl")] == [1, 2]
    run(folder, tmp_path / "cut", code_task(find_sandbox), steps=2)  # the checkpoint is that of step 2
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("short", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.timeout(200)
def test_a_verifier_that_is_killed_on_the_way_costs_a_verdict_and_never_a_zero(folder, tmp_path):
    """The math task judges the same model's texts: killed workers come back, what they held is undecided."""
    judge = math_judge(workers=1)
    answers = [Problem(name, (TextPart(name),), "1+x") for name in QUESTIONS]

    def extract(completion):
        return f"x{completion.text.removeprefix('</think>').removeprefix(HEAD).removesuffix(TAIL)}"

    class Reads(type(judge)):
        def extract(self, completion):
            return extract(completion)

    reads = Reads(judge.pool, judge.fallback)
    killed = []

    def kill(step):
        if step == 2:
            for pid in judge.pool.pids():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    task = replace(math_task(judge), judge=reads, limit=UndecidedLimit(share=0.5))
    run(folder, tmp_path, task, steps=12, problems=answers, on_step=kill)
    lines = read_lines(tmp_path / "metrics.jsonl")
    judge.pool.close()
    assert killed and lines[-1]["reward"] > 0.9
    undecided = [line["undecided"] for line in lines]
    assert undecided[2] > 0 and undecided[:2] + undecided[3:] == [0.0] * 11
    assert lines[2]["undecided_crash"] >= 1
    assert [row["step"] for row in read_lines(tmp_path / "judging.jsonl") if row["notable"]]
