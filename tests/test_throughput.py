"""The speed of an engine against what the memory allows."""

import pytest
import torch

from rl.policy import load_model, load_tokenizer
from rl.samplers.transformers import TransformersSampler
from rl.throughput import (
    ModelBytes,
    Speed,
    bytes_of,
    make_probe_model,
    measure,
    memory_bandwidth,
    roofline,
    saturating_batch,
)


def test_the_roofline_of_the_docstring():
    size = ModelBytes(weights=100_000_000, cache_per_token=1000)
    assert roofline(1, 100, size, 1e10) == pytest.approx(99.9, abs=0.05)
    assert roofline(1000, 100, size, 1e10) == pytest.approx(50_000)


def test_the_batch_where_it_saturates():
    speeds = [Speed(batch, speed, 1e6) for batch, speed in ((1, 100), (4, 350), (16, 900), (64, 950))]
    assert saturating_batch(speeds) == 16
    assert speeds[0].share == pytest.approx(1e-4)


def test_a_made_model_is_measured(tmp_path):
    size = make_probe_model(tmp_path / "probe", hidden=128, layers=2, vocabulary=64)
    model = load_model(str(tmp_path / "probe"))
    assert size == bytes_of(model) == ModelBytes(4 * model.num_parameters(), 2 * 2 * 128 * 4)
    bandwidth = memory_bandwidth(torch.device("cpu"), size=2**24, rounds=2)
    assert 1e8 < bandwidth < 1e13
    sampler = TransformersSampler(model, load_tokenizer(str(tmp_path / "probe")))
    speeds = list(measure(sampler, (1, 8), size, bandwidth, tokens=8, rounds=1))
    assert [speed.batch for speed in speeds] == [1, 8]
    assert all(speed.tokens_per_second > 0 and speed.roofline > 0 for speed in speeds)
