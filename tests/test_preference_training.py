"""Training a preference model: the loss, what it learns, that the scorer reads what the trainer wrote, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from rl.faults import FaultRaised
from rl.policy import save_model
from rl.preference_model import PreferenceModel
from rl.preference_training import (
    Preference,
    PreferenceSettings,
    pairwise_loss,
    read_preferences,
    train_preference_model,
)
from rl.runs import read_lines
from rl.tasks import tiny_general
from rl.tasks.tiny_models import make_model, make_tokenizer
from rl.tasks.tiny_words import NEW_TOKENS

SETTINGS = PreferenceSettings(epochs=1, batch_size=64, learning_rate=3e-3, max_length=64)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference") / "start"
    tokenizer = make_tokenizer(tuple(NEW_TOKENS))
    save_model(make_model(64, 2, 2, tokenizer, seed=0), tokenizer, folder)
    return folder


def preferences(count):
    """Kind replies before plain ones; whether a reply is right takes a better model to see."""
    made = []
    for problem, better, _ in tiny_general.preference_pairs(count, 0):
        right = tiny_general.right_reply(problem.text)
        if better == right + tiny_general.KIND:
            made.append(Preference(problem.text, better, right))
    return made


def test_the_loss_is_the_pairwise_one():
    """The example of `pairwise_loss`."""
    loss = pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert loss.item() == pytest.approx((0.313262 + 0.693147) / 2, abs=1e-6)
    scores = torch.randn(5), torch.randn(5)
    shifted = pairwise_loss(scores[0] + 3, scores[1] + 3)
    assert shifted.item() == pytest.approx(pairwise_loss(*scores).item(), abs=1e-6)


def test_it_learns_and_the_scorer_agrees(start, tmp_path):
    pairs = preferences(3_000)
    summary = train_preference_model(tmp_path, model=start, preferences=pairs, settings=SETTINGS, seed=0)
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert summary["steps"] == len(lines) == -(-summary["pairs"] // 64)
    assert summary["pairs"] + summary["held_out"] == len(pairs) and summary["held_out"] > 100
    assert lines[0]["loss"] == pytest.approx(0.69, abs=0.2)
    assert summary["held_out_accuracy"] > 0.95
    scorer = PreferenceModel(tmp_path / "model")
    scores = scorer.score([("say 470", "470, my friend"), ("say 470", "470")])
    assert scores[0] is not None and scores[1] is not None and scores[0] > scores[1]


def test_the_same_seed_gives_the_same_bytes_also_after_a_failure(start, tmp_path, monkeypatch):
    def trained(name):
        train_preference_model(tmp_path / name, model=start, preferences=preferences(200), settings=SETTINGS, seed=1)
        return [(tmp_path / name / file).read_bytes() for file in ("model/model.safetensors", "metrics.jsonl")]

    whole = trained("whole")
    monkeypatch.setenv("REASON_FAULT", "preference.model:1:raise")
    with pytest.raises(FaultRaised):
        trained("cut")
    monkeypatch.delenv("REASON_FAULT")
    assert trained("cut") == whole


def test_what_cannot_be_trained_on_is_refused(start, tmp_path):
    def train(pairs, **changes):
        settings = PreferenceSettings(**{"max_length": 64, **changes})
        train_preference_model(tmp_path, model=start, preferences=pairs, settings=settings, seed=0)

    pair = Preference("say 470", "470, my friend", "470")
    with pytest.raises(ValueError, match=r"'say 470' has \d+ tokens, more than max_length \(8\)"):
        train([pair], max_length=8)
    held = [p for p in preferences(400) if tiny_general.split_of(problem(p.question)) == "test"]
    with pytest.raises(ValueError, match="none is left to train on"):
        train(held)


def problem(question):
    from rl.types import Problem, TextPart

    return Problem("p", (TextPart(question),), "")


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"question": "q", "chosen": "a thought</think>yes", "rejected": "no"}
    path.write_text(json.dumps(row) + "\n")
    assert read_preferences(path) == [Preference("q", "yes", "no")]
    for wrong in ({"rejected": "another thought</think>yes"}, {"chosen": "<think>never ends"}, {"rejected": " "}):
        path.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
        with pytest.raises(
            ValueError, match=r"pairs\.jsonl:2: chosen and rejected must be two different final answers"
        ):
            read_preferences(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no pairs"):
        read_preferences(path)
