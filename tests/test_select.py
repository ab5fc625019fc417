"""Choosing on dev problems: the rule, and that the winner's folder is what comes out."""

import json
from functools import partial
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from long2short.frontier import non_dominated
from long2short.select import Briefest, balanced, efficiency, prefer_balanced, select_model
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
    assert Briefest(0.02)(found, parent).name == "b"
    assert Briefest(0.02)(found, parent).reason == (
        "fewest tokens (40.0) of the 2 of 3 within 0.02 of the parent's accuracy 0.900"
    )
    assert Briefest(0.10)(found, parent).name == "c"


def test_the_most_accurate_if_none_is_within_it():
    choice = Briefest(0.02)({"a": score(0.5, 10), "b": score(0.7, 90)}, score(0.9, 60))
    assert choice.name == "b"
    assert choice.reason == "most accurate (0.700); none of 2 is within 0.02 of the parent's accuracy 0.900"


def test_the_first_of_equals():
    equal = {"a": score(0.9, 50), "b": score(0.9, 50)}
    assert Briefest(0.02)(equal, score(0.9, 60)).name == balanced(equal, score(0.9, 60)).name == "a"


def test_the_best_balance_by_hand():
    """AES: tokens saved, less five times the accuracy lost, both relative to the parent; three times what is gained."""
    parent = score(0.90, 60)
    found = {"a": score(0.89, 50), "b": score(0.88, 40), "c": score(0.80, 20), "d": score(0.99, 60)}
    assert [round(efficiency(one, parent), 3) for one in found.values()] == [0.111, 0.222, 0.111, 0.3]
    assert balanced(found, parent).name == "d"
    del found["d"]
    choice = balanced(found, parent)
    assert choice.name == "b"
    assert choice.reason == "best balance: AES +0.222, accuracy 0.880 at 40.0 tokens against 0.900 at 60.0"
    assert efficiency(score(0.4, 10), score(0.0, 60)) == 0.4


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 100)), min_size=1), st.floats(0.01, 1), st.floats(1, 100))
def test_a_balanced_choice_is_on_the_frontier_and_the_run_keeps_the_same_one(points, accuracy, tokens):
    parent = score(accuracy, tokens)
    found = {str(index): score(*point) for index, point in enumerate(points)}
    name = balanced(found, parent).name
    best = efficiency(found[name], parent)
    kept = None
    for candidate in found.values():
        if prefer_balanced(candidate, kept, parent):
            kept = candidate
    assert kept == found[name]
    better = [efficiency(one, parent) for point, one in zip(points, found.values(), strict=True)
              if point[0] >= found[name].accuracy and point[1] <= found[name].mean_tokens]  # fmt: skip
    assert max(better) == best
    # On the frontier of the candidates, or on its line: equal AES can only be had by one that equals it in both.
    marks = non_dominated([(one.accuracy, one.mean_tokens) for one in found.values()])
    assert marks[int(name)] or any(
        mark and efficiency(one, parent) == best for mark, one in zip(marks, found.values(), strict=True)
    )


def test_the_winners_folder_comes_out(tiny_model_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_model_folder)
    other = tmp_path / "other"
    save_model(make_model(hidden=32, layers=1, heads=2, tokenizer=make_tokenizer(), seed=1), tokenizer, other)
    candidates = {"same": str(tiny_model_folder), "other": str(other)}
    choice = select_model(
        candidates, str(tiny_model_folder), tiny.problems("dev", 4), tiny.TASK, tmp_path / "out",
        samples=2, settings=SamplingSettings(max_tokens=16), rule=Briefest(0.0), seed=0,
        open_sampler=partial(open_engine, EngineChoice()),
    )  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["chosen"], summary["reason"]) == (choice.name, choice.reason)
    assert all({"aes", "frontier"} <= scores.keys() for scores in summary["candidates"].values())
    read = {name: DevScore(0, s["dev_accuracy"], s["dev_tokens"], 0) for name, s in summary["candidates"].items()}
    parent = DevScore(0, summary["parent"]["dev_accuracy"], summary["parent"]["dev_tokens"], 0)
    assert Briefest(0.0)({name: read[name] for name in candidates}, parent) == choice
    winner = Path(candidates[choice.name]) / "model.safetensors"
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == winner.read_bytes()
