"""What every test shares: no network, one thread, fault points counted from zero, a tiny model folder on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before any test module imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("REASON_FAULT", None)

import pytest

from rl.faults import reset_faults


@pytest.fixture(autouse=True)
def _faults_from_zero() -> Iterator[None]:
    reset_faults()
    yield
    reset_faults()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the tiny world as an ordinary HF folder. Read it, never write into it."""
    from rl.policy import save_model
    from rl.tasks.tiny_models import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("models") / "untrained"
    tokenizer = make_tokenizer()
    save_model(make_model(hidden=32, layers=1, heads=2, tokenizer=tokenizer, seed=0), tokenizer, folder)
    return folder
