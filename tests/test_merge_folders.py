"""Merging: which files of a folder count, which go along, tied output layers, tensors of nothing, nested configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3TextConfig

from long2short.merge import LINEAR, Parents, merge
from long2short.merge_checks import tied_tensors, unlike_configs
from long2short.merge_files import INDEX, SINGLE, ModelFolder
from long2short.merge_rules import Rule, dare, slerp, ties
from long2short.merge_weights import Weights
from rl.policy import load_model, load_tokenizer, save_model
from rl.runs import folder_hash
from rl.tasks.tiny_models import make_model, make_tokenizer

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def parents(tmp_path) -> list[Path]:
    """Long, short and base."""
    folders = [tmp_path / name for name in ("long", "short", "base")]
    tokenizer = make_tokenizer()
    for seed, folder in enumerate(folders):
        save_model(make_model(32, 2, 2, tokenizer, seed), tokenizer, folder)
    return folders


def edit(folder: Path, change) -> None:
    content = load_file(folder / SINGLE)
    change(content)
    save_file(content, folder / SINGLE, {"format": "pt"})


# --- files ------------------------------------------------------------------------------------------------------------


def test_of_a_single_file_and_shards_the_single_file_counts_as_in_transformers(parents, tmp_path):
    long, short, _ = parents
    make_model(32, 2, 2, make_tokenizer(), 9).save_pretrained(tmp_path / "other", max_shard_size="20KB")
    for path in (tmp_path / "other").glob("model*"):
        path.rename(long / path.name)
    assert (long / INDEX).is_file() and len(list(long.glob("model-*.safetensors"))) > 1
    merge(tmp_path / "model", Parents(long, short), Weights(1.0))
    merged, loaded = load_file(tmp_path / "model" / SINGLE), load_model(long)
    assert torch.equal(merged[EMBEDDING], loaded.state_dict()[EMBEDDING])
    assert not (tmp_path / "model" / INDEX).exists()


def test_further_templates_and_a_plain_vocabulary_go_along(parents, tmp_path):
    long, short, _ = parents
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(long)
    (long / "vocab.txt").write_text("a\n")
    (long / "README.md").write_text("of the long one")
    merge(tmp_path / "model", Parents(long, short), Weights(0.5))
    assert load_tokenizer(tmp_path / "model").chat_template == {"default": "{{ messages }}", "rag": "{{ documents }}"}
    assert (tmp_path / "model/vocab.txt").read_text() == "a\n"
    assert not (tmp_path / "model/README.md").exists()


def test_what_holds_a_parent_is_never_replaced(parents, tmp_path):
    long, short, _ = parents
    before = folder_hash(tmp_path)
    with pytest.raises(ValueError, match="holds one of the parents, which the result would replace"):
        merge(tmp_path, Parents(long, short), Weights(0.5))
    (tmp_path / "link").symlink_to(long)
    with pytest.raises(ValueError, match="link is one of the parents, which the result would replace"):
        merge(tmp_path / "link", Parents(long, short), Weights(0.5))
    (tmp_path / "link").unlink()
    assert folder_hash(tmp_path) == before


# --- tensors ----------------------------------------------------------------------------------------------------------

RULES = [LINEAR, Rule(slerp), ties(0.5), dare(0.5, seed=3)]


@pytest.mark.parametrize("rule", RULES)
def test_a_tied_output_layer_that_is_stored_stays_tied(parents, tmp_path, rule):
    """transformers ties what the config ties if both are equal; each drawn by its own name they would not be."""
    for folder in parents:
        edit(folder, lambda content: content.update({HEAD: content[EMBEDDING].clone()}))
    long, short, base = parents
    assert tied_tensors(ModelFolder.open(long)) == {HEAD: EMBEDDING}
    chosen = Parents(long, short, base if rule.takes_base else None)
    merge(tmp_path / "model", chosen, Weights(0.6), rule)
    merged = load_file(tmp_path / "model" / SINGLE)
    assert torch.equal(merged[HEAD], merged[EMBEDDING])
    loaded = load_model(tmp_path / "model").state_dict()
    assert loaded[HEAD].data_ptr() == loaded[EMBEDDING].data_ptr()
    with pytest.raises(ValueError, match=r"weights: lm_head.weight has 0.3 and model.embed_tokens.weight 0.6, but the"):
        merge(tmp_path / "other", chosen, Weights(0.6, {"lm_head": 0.3}), rule)
    assert not (tmp_path / "other").exists()


def test_nothing_is_tied_where_the_config_does_not_say_so_or_one_is_not_stored(parents):
    long, short, _ = parents
    assert tied_tensors(ModelFolder.open(long)) == {}
    edit(short, lambda content: content.update({HEAD: content[EMBEDDING] + 1}))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert tied_tensors(ModelFolder.open(short)) == {}


@pytest.mark.parametrize("rule", RULES)
def test_a_tensor_of_nothing_is_written_as_one(parents, tmp_path, rule):
    for folder in parents:
        edit(folder, lambda content: content.update({"model.nothing": torch.zeros(0, 3)}))
    long, short, base = parents
    merge(tmp_path / "model", Parents(long, short, base if rule.takes_base else None), Weights(0.5), rule)
    assert load_file(tmp_path / "model" / SINGLE)["model.nothing"].shape == (0, 3)


def test_parents_of_two_dtypes_are_in_the_summary(parents, tmp_path):
    long, short, _ = parents
    edit(short, lambda content: content.update({name: tensor.bfloat16() for name, tensor in content.items()}))
    edit(short, lambda content: content.update({"model.norm.weight": content["model.norm.weight"].float()}))
    summary = merge(tmp_path / "model", Parents(long, short), Weights(0.5))
    assert summary["dtypes"] == {"long": ["F32"], "short": ["BF16", "F32"]}


# --- configs ----------------------------------------------------------------------------------------------------------


def test_free_keys_are_free_in_a_config_within_the_config_too():
    def config(**changes) -> Gemma3Config:
        return Gemma3Config(text_config=Gemma3TextConfig(hidden_size=32, num_hidden_layers=1, **changes))

    names = ("./long", "./short")
    assert unlike_configs(config(dtype="float32"), config(dtype="bfloat16", use_cache=False), names) is None
    assert unlike_configs(config(sliding_window=9), config(sliding_window=7), names) == (
        "config key text_config.sliding_window is 9 in ./long and 7 in ./short: weights trained under one do not fit "
        "the other"
    )
