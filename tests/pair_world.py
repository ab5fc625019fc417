"""What the tests of DPO and SimPO share: pairs of the tiny world, settings, log-probs by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from long2short.pair_training import PairSettings
from long2short.preference import PairKind, PreferencePair
from rl.runs import folder_hash
from rl.tasks import tiny

# 6 pairs, 2 epochs, batches of 4: 3 steps.
SETTINGS = PairSettings(epochs=2, learning_rate=3e-3, batch_size=4, max_length=128, seed=5, save_every=2)


def make_pairs(count: int = 6) -> list[PreferencePair]:
    """Plain demonstrations over such with every step checked, which are longer."""
    rng = random.Random(0)
    pairs = []
    for p in tiny.problems("train", count, (2, 3)):
        chosen = tiny.demonstrate(p, "plain", rng)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "CHECKED", dict.fromkeys(tiny.OPERATIONS, 1.0))
            rejected = tiny.demonstrate(p, "careful", rng)
        pairs.append(PreferencePair(p.id, p.text, chosen, rejected, 1, 2, PairKind.LONGER))
    return pairs


def products(folder: Path) -> dict[str, str]:
    """The hashes of all that a run leaves, its checkpoints aside."""
    return {name: value for name, value in folder_hash(folder).items() if not name.startswith("checkpoints/")}


def sum_of_logprobs(model: Any, prompt_ids: tuple[int, ...], completion_ids: tuple[int, ...]) -> float:
    """log pi(completion | prompt), every token of it, EOS included."""
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt_ids, *completion_ids]])).logits[0, :-1].double().log_softmax(-1)
    start = len(prompt_ids) - 1
    return sum(logprobs[start + i, token].item() for i, token in enumerate(completion_ids))
