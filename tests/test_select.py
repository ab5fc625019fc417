"""Choosing on dev problems: the rule, and that the winner's folder is what comes out."""

import json
from functools import partial
from pathlib import Path

import pytest

from long2short.select import choose, select_model
from recipes.engines import EngineChoice, open_engine
from rl.policy import load_tokenizer, save_model
from rl.samplers.base import SamplingSettings
from rl.tasks import tiny
from rl.tasks.tiny_models import make_model, make_tokenizer
from rl.train_metrics import DevScore


def score(accuracy, tokens):
    return DevScore(0, accuracy, tokens, 0.0)


def test_fewest_tokens_within_the_tolerance():
    parent = score(0.90, 60)
    found = {"a": score(0.89, 50), "b": score(0.88, 40), "c": score(0.80, 20)}
    assert choose(found, parent, 0.02) == "b"
    assert choose(found, parent, 0.10) == "c"


def test_the_most_accurate_if_none_is_within_it():
    assert choose({"a": score(0.5, 10), "b": score(0.7, 90)}, score(0.9, 60), 0.02) == "b"


def test_the_first_of_equals_and_no_candidates():
    assert choose({"a": score(0.9, 50), "b": score(0.9, 50)}, score(0.9, 60), 0.02) == "a"
    with pytest.raises(ValueError, match="no candidates"):
        choose({}, score(0.9, 60), 0.02)


def test_the_winners_folder_comes_out(tiny_model_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_model_folder)
    other = tmp_path / "other"
    save_model(make_model(hidden=32, layers=1, heads=2, tokenizer=make_tokenizer(), seed=1), tokenizer, other)
    candidates = {"same": str(tiny_model_folder), "other": str(other)}
    chosen = select_model(
        candidates, str(tiny_model_folder), tiny.problems("dev", 4), tiny.TASK, tmp_path / "out",
        samples=2, settings=SamplingSettings(max_tokens=16), tolerance=0.0, seed=0,
        open_sampler=partial(open_engine, EngineChoice()),
    )  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["chosen"] == chosen
    read = {name: DevScore(0, s["dev_accuracy"], s["dev_tokens"], 0) for name, s in summary["candidates"].items()}
    parent = DevScore(0, summary["parent"]["dev_accuracy"], summary["parent"]["dev_tokens"], 0)
    assert choose({name: read[name] for name in candidates}, parent, 0.0) == chosen
    winner = Path(candidates[chosen]) / "model.safetensors"
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == winner.read_bytes()
