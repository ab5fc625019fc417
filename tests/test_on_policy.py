"""On-policy distillation: advantages by hand, gradients, a tiny world where the reverse KL falls, exact resume."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from distill.on_policy import PromptOf, TeacherRows, require_same_tokens, token_advantages
from recipes.console import PlainReport
from recipes.loader import RecipeError
from recipes.runner import StageFailed, run_recipe
from recipes.schema import load_recipe
from recipes.stages import METHODS
from rl.faults import FaultRaised, reset_faults
from rl.objectives import LossInputs, OffPolicyMask, TokenMean, dapo, kimi, policy_loss
from rl.packing import pack
from rl.policy import eos_token_id, save_model
from rl.prompts import render_prompt
from rl.refusal import StepRefused
from rl.rows import TrainingRow
from rl.runs import read_lines
from rl.tasks import tiny
from rl.tasks.tiny_models import make_model, make_tokenizer
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Rollout, RolloutGroup, Verdict


def test_the_advantage_of_a_token():
    assert token_advantages((-1.2, -0.2), (-0.7, -2.0)) == pytest.approx((0.5, -1.8))
    assert token_advantages((-1.2, -0.2), (-0.7, -2.0), 0.5) == pytest.approx((0.25, -0.9))


# --- an advantage a token through the objective -----------------------------------------------------------------------


def row(advantage, token_ids=(7, 8, 1), **given):
    return TrainingRow((5, 6), token_ids, (-0.5,) * len(token_ids), advantage, **given)


def test_rows_with_one_number_each_are_packed_as_before_and_others_by_token():
    assert pack([row(0.5), row(-1.0, (9, 1))]).advantages.tolist() == [0.5, -1.0]
    mixed = pack([row((0.5, -1.0, 2.0)), row(-1.0, (9, 1))]).advantages
    assert mixed.tolist() == [[0.5, -1.0, 2.0], [-1.0, -1.0, 0.0]]


def test_an_advantage_for_each_token_or_one_for_all():
    with pytest.raises(ValueError, match=r"row p\[2\] has 2 advantages for 3 tokens"):
        row((0.5, -1.0), group="p", sample=2)


def inputs(advantages, policy):
    return LossInputs(policy, policy.detach(), policy.detach(), advantages, torch.ones_like(policy))


def test_the_gradient_of_a_token_is_its_own_advantage():
    """On-policy the ratio is 1, so d loss / d log π_t = −A_t / tokens: −.5/4, 1.8/4, and of a second row 0 and −1/4."""
    policy = torch.tensor([[-1.2, -0.2], [-0.3, -0.4]], requires_grad=True)
    advantages = torch.tensor([[0.5, -1.8], [0.0, 1.0]])
    loss, _ = policy_loss(dapo(), inputs(advantages, policy), TokenMean().denominator([2, 2]))
    loss.backward()
    assert policy.grad is not None
    assert torch.allclose(policy.grad, torch.tensor([[-0.125, 0.45], [0.0, -0.25]]))


def test_the_same_number_for_every_token_is_one_number_for_the_completion():
    policy = torch.tensor([[-1.2, -0.2], [-0.3, -0.4]])
    whole = policy_loss(dapo(), inputs(torch.tensor([0.5, -1.0]), policy), 4.0)[0]
    by_token = policy_loss(dapo(), inputs(torch.tensor([[0.5, 0.5], [-1.0, -1.0]]), policy), 4.0)[0]
    assert torch.equal(whole, by_token)


def test_what_is_defined_on_whole_completions_refuses_an_advantage_a_token():
    given = inputs(torch.tensor([[0.5, -1.0]]), torch.tensor([[-1.2, -0.2]]))
    with pytest.raises(ValueError, match="an advantage a token needs a ratio a token"):
        policy_loss(kimi(0.1), given, 1.0)
    with pytest.raises(ValueError, match="every token has its own"):
        policy_loss(replace(dapo(), mask=OffPolicyMask(0.1)), given, 1.0)


# --- from groups to rows ----------------------------------------------------------------------------------------------


def rollout(logprobs, verdict, finish=FinishReason.STOP):
    ids = tuple(range(3, 3 + len(logprobs)))
    return Rollout(Completion("", ids, logprobs, finish), verdict)


def groups():
    wrong, undecided = Verdict(Outcome.WRONG), Verdict.undecided(JudgeFailure.CRASH)
    return [
        RolloutGroup(problem, (1, 2), (rollout((-1.2, -0.2), verdict), rollout((-0.5,), wrong, FinishReason.LENGTH)))
        for problem, verdict in zip(tiny.problems("train", 2), (wrong, undecided), strict=True)
    ]


def taught(rows):
    """A teacher that gives what the golden row says, and the student's own opinion of single tokens."""
    assert {row.prompt_ids for row in rows} == {(9, 9, 9)}  # its own prompt
    return [(-0.7, -2.0) if row.num_tokens == 2 else (-0.5,) for row in rows]


def test_rows_of_a_step_with_undecided_and_truncated_ones_and_the_students_prompt():
    batches, figures = TeacherRows(taught, lambda problem: (9, 9, 9))(groups(), [[1], [0]])
    for rows, lengths in batches:
        assert lengths == [2, 1]  # the second one teaches nothing, but counts
        assert [row.advantage for row in rows] == [pytest.approx((0.5, -1.8))]
        assert rows[0].prompt_ids == (1, 2)
    assert batches[0][0][0].group == groups()[1].problem.id
    # A completion of two tokens has -1.4 - (-2.7) = 1.3 nats, one of a single token 0.
    assert figures["reverse_kl"] == pytest.approx(1.3 * 2 / 6)
    assert figures["reverse_kl_completion"] == pytest.approx(1.3 / 2)


def test_a_teacher_without_an_opinion_stops_the_step():
    rows_of = TeacherRows(lambda rows: [(-math.inf,) * row.num_tokens for row in rows], lambda problem: (9,))
    with pytest.raises(StepRefused, match="a teacher log-prob is not finite"):
        rows_of(groups(), [[0, 1]])


# --- which teacher ----------------------------------------------------------------------------------------------------


def test_the_teachers_prompt_has_its_own_suffix_and_system_text():
    tokenizer = make_tokenizer()
    problem = tiny.problems("train", 1)[0]
    assert PromptOf(tokenizer)(problem) == render_prompt(tokenizer, problem)
    assert PromptOf(tokenizer, "+1")(problem) == render_prompt(tokenizer, problem, "+1")
    tokenizer.chat_template = "{{ messages[-1].content }}<think>"
    with pytest.raises(ValueError, match="leaves a system message out"):
        PromptOf(tokenizer, system="7*7")(problem)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}<think>"
    assert str(tokenizer.decode(list(PromptOf(tokenizer, system="7*7")(problem)))).startswith("7*7=")
    tokenizer.chat_template = None
    assert str(tokenizer.decode(list(PromptOf(tokenizer, system="7*7")(problem)))).startswith("7*7")


def test_a_teacher_with_other_tokens_is_refused_by_the_first_difference():
    student = make_tokenizer()
    stops = [eos_token_id(student)]
    require_same_tokens(student, make_tokenizer(), stops)
    more = make_tokenizer()
    more.add_tokens(["brief"])
    require_same_tokens(student, more, stops)
    with pytest.raises(ValueError, match=rf"id {len(student)} is 'brief' for the student and nothing for the teacher"):
        require_same_tokens(more, student, stops)
    with pytest.raises(ValueError, match="never ends with the student's EOS"):
        require_same_tokens(student, more, [len(student)])
    more.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="the student's template has opened <think> before a completion begins"):
        require_same_tokens(student, more, stops)


# --- in a recipe ------------------------------------------------------------------------------------------------------

RECIPE = """name: taught
problems: {source: tiny, levels: [2, 3], train: 64, dev: 4, test: 4}
sampling: {max_tokens: 12}
stages:
  student:
    method: on_policy
    model: %s
    teacher: %s
    steps: %d
    problems_per_step: 8
    learning_rate: 3.0e-3
    save_every: 2
"""


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    """A teacher that differs from the untrained student by its seed and is surer of what it says."""
    tokenizer = make_tokenizer()
    model = make_model(hidden=32, layers=1, heads=2, tokenizer=tokenizer, seed=7)
    with torch.no_grad():
        head = model.get_output_embeddings()
        assert head is not None
        for parameter in head.parameters():
            parameter.mul_(4.0)
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_model(model, tokenizer, folder)
    return folder


def recipe_of(tmp_path, student, teacher, steps=12, keys=""):
    path = tmp_path / "taught.yaml"
    path.write_text(RECIPE % (student, teacher, steps) + "".join(f"    {line}\n" for line in keys.splitlines()))
    return load_recipe(path)


def trained(recipe, root):
    (result,) = run_recipe(recipe, root=root, methods=METHODS, report=PlainReport())
    return read_lines(result.folder / "metrics.jsonl"), load_file(result.folder / "model" / "model.safetensors")


def test_the_reverse_kl_to_the_teacher_falls(tmp_path, tiny_model_folder, teacher_folder):
    lines, _ = trained(recipe_of(tmp_path, tiny_model_folder, teacher_folder, steps=25), tmp_path / "runs")
    kls = [line["reverse_kl"] for line in lines]
    assert sum(kls[-5:]) < 0.5 * sum(kls[:5]), kls
    assert {"reverse_kl_completion", "accuracy", "tokens_mean", "entropy", "max_tokens"} <= lines[0].keys()


@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_interrupted_it_ends_in_the_same_bits(tmp_path, tiny_model_folder, teacher_folder, monkeypatch, step):
    recipe = recipe_of(tmp_path, tiny_model_folder, teacher_folder, steps=6)
    lines, weights = trained(recipe, tmp_path / "whole")
    site = "grpo.update" if step % 2 == 0 else "grpo.step"
    monkeypatch.setenv("REASON_FAULT", f"{site}:{step}:raise")
    reset_faults()
    with pytest.raises(StageFailed) as failed:
        trained(recipe, tmp_path / "cut")
    assert isinstance(failed.value.__cause__, FaultRaised)
    monkeypatch.delenv("REASON_FAULT")
    again, resumed = trained(recipe, tmp_path / "cut")
    assert [line["reverse_kl"] for line in again] == [line["reverse_kl"] for line in lines]
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_the_same_model_asked_otherwise_teaches_itself_through_adapters(tmp_path, tiny_model_folder):
    keys = 'teacher_suffix: "+11"\nlora: {rank: 2}\nupdates_per_step: 2\neval_every: 2\nkeep: balance\ngroup_size: 1'
    recipe = recipe_of(tmp_path, tiny_model_folder, tiny_model_folder, steps=2, keys=keys)
    lines, _ = trained(recipe, tmp_path / "runs")
    assert lines[0]["reverse_kl"] != 0
    assert "dev_accuracy" in lines[-1]


def test_what_a_stage_may_not_be_told(tmp_path, tiny_model_folder, teacher_folder):
    with pytest.raises(RecipeError, match="teacher: is the model itself and is asked the same"):
        recipe_of(tmp_path, tiny_model_folder, tiny_model_folder)
    with pytest.raises(RecipeError, match=r"repetition.penalty: has no effect"):
        recipe_of(tmp_path, tiny_model_folder, teacher_folder, keys="repetition: {penalty: 0.5}")
    with pytest.raises(RecipeError, match="top_p: must be 1 for RL"):
        recipe_of(tmp_path, tiny_model_folder, teacher_folder, keys="top_p: 0.9")
    with pytest.raises(RecipeError, match="unknown key of method on_policy"):
        recipe_of(tmp_path, tiny_model_folder, teacher_folder, keys="reward_format: 0.1")


def test_a_teacher_of_another_family_ends_the_stage_by_name(tmp_path, tiny_model_folder):
    path = tmp_path / "other"
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "7"
    save_model(make_model(hidden=32, layers=1, heads=2, tokenizer=tokenizer, seed=0), tokenizer, path)
    with pytest.raises(StageFailed, match="never ends with the student's EOS"):
        trained(recipe_of(tmp_path, tiny_model_folder, path), tmp_path / "runs")


def test_it_belongs_to_distillation_and_to_long2short(tmp_path, tiny_model_folder, teacher_folder):
    recipe = recipe_of(tmp_path, tiny_model_folder, teacher_folder)
    assert recipe.part("distill") == recipe.part("long2short") == ["student"]
    assert json.dumps(recipe.to_json())
