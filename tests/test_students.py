"""Base models made ready to be students; the recipes of the students; every shipped recipe planned without weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from distill.guards import tokenize_row
from distill.plan_gpus import find_device
from distill.students import Preparation, prepare_student
from recipes.plan_stages import Given, NotPlanned, work_of
from recipes.schema import RecipeError, load_recipe, shipped_recipes
from rl.policy import load_tokenizer
from rl.prompts import TEMPLATES, prefills_think, render_text
from rl.types import Problem, TextPart

BASE = Path(__file__).parent.parent / "recipes" / "models" / "tiny-student"

# arXiv 2501.12948 v2, the students' base models and learning rates.
STUDENTS = {
    "r1-distill-qwen-1.5b": ("Qwen/Qwen2.5-Math-1.5B", 1e-4),
    "r1-distill-qwen-7b": ("Qwen/Qwen2.5-Math-7B", 8e-5),
    "r1-distill-qwen-14b": ("Qwen/Qwen2.5-14B", 7e-5),
    "r1-distill-qwen-32b": ("Qwen/Qwen2.5-32B", 6e-5),
    "r1-distill-llama-8b": ("meta-llama/Llama-3.1-8B", 5e-5),
    "r1-distill-llama-70b": ("meta-llama/Llama-3.3-70B-Instruct", 2e-5),
}


def test_a_prepared_base_has_template_context_and_the_same_weights(tmp_path):
    summary = prepare_student(BASE, tmp_path / "model", Preparation("r1", context=4096, rope_theta=50_000.0))
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (BASE / "model.safetensors").read_bytes()
    config = AutoConfig.from_pretrained(str(tmp_path / "model"))
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (4096, 50_000.0)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert prefills_think(tokenizer)
    problem = Problem("p", (TextPart("1+1"),), "2")
    assert render_text(tokenizer, problem).endswith("User: 1+1\n\nAssistant: <think>\n")
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.temperature is None


def test_the_template_of_the_students_keeps_thought_and_end_of_turn():
    """A conversation renders to prompt, completion and EOS: the guards pass a row, and the thought is all there."""
    tokenizer = AutoTokenizer.from_pretrained(str(BASE))
    plain = tokenize_row(tokenizer, "12+34", "12+34=46; </think>46", "row")
    tokens = tokenizer.convert_ids_to_tokens(list(plain.completion_ids))
    assert tokens[-1] == tokenizer.eos_token
    tokenizer.chat_template = TEMPLATES["r1"]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>\nt</think>a"},
        {"role": "user", "content": "r"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token or ""
    turn = f"Assistant: <think>\nt</think>a{tokenizer.eos_token}\n\n"
    assert text == f"{bos}s\n\nUser: q\n\n{turn}User: r\n\nAssistant: <think>\n"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Preparation(pad_token="<nothing>"), "pad_token: '<nothing>' is not in the vocabulary"),
        (Preparation(eos_token="<nothing>"), "eos_token: '<nothing>' is not in the vocabulary"),
        (Preparation(context=2), "context: 2 is less than the"),
    ],
)
def test_what_would_damage_a_base_is_refused(wanted, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        prepare_student(BASE, tmp_path / "model", wanted)
    assert not (tmp_path / "model").exists()


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="has no safetensors weights"):
        prepare_student(tmp_path / "base", tmp_path / "model", Preparation("r1"))


def test_a_stage_that_changes_nothing_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("name: p\nproblems: {source: tiny}\nstages:\n  base: {method: prepare, model: org/name}\n")
    with pytest.raises(RecipeError, match="changes nothing here; give template"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", STUDENTS)
def test_the_students_have_the_settings_of_the_paper(name):
    recipe = load_recipe(name)
    base, student = recipe.stages["base"].config, recipe.stages["student"].config
    assert (base.model, student.learning_rate) == STUDENTS[name]
    assert (student.batch_size, student.max_length, student.min_lr_ratio) == (64, 32_768, 0.1)
    assert student.epochs in (2, 3)
    assert base.template == "r1"
    assert student.packing
    assert student.model == "base"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_planned_without_weights(name):
    recipe, device = load_recipe(name), find_device("H200")
    planned = 0
    for stage in recipe.stages.values():
        try:
            work = work_of(recipe, stage, device, Given(gpus=8))
        except NotPlanned:
            continue
        planned += work is not None
    assert planned > 0
