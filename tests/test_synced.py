"""An engine that follows the trainer's weights: when they are handed over, and how a stale one is found."""

from functools import partial

import pytest
import torch

from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.prompts import render_prompt
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.synced import StaleEngine, SyncedSampler, agreement, policy_scores, policy_weights
from rl.samplers.transformers import TransformersSampler
from rl.tasks import tiny

SETTINGS = SamplingSettings(max_tokens=12)


class OwnWeights(TransformersSampler):
    """A `WeightedEngine`: the transformers sampler on a copy of the model."""

    def __init__(self, folder):
        super().__init__(load_model(folder), load_tokenizer(folder))
        self.calls = []
        self.drops = False  # what it is handed
        self.policy = PolicyModel(load_model(folder))

    def load_weights(self, weights, policy_version):
        self.calls.append(f"load {policy_version}")
        if not self.drops:
            given = {name: value.clone() for name, value in weights}
            self.model.load_state_dict(given)
            self.policy.model.load_state_dict(given)
        self.policy_version = policy_version

    def score(self, rows):
        return policy_scores(self.policy, rows)

    def sample(self, requests, settings, report=lambda finished: None):
        self.calls.append(f"draw {len(requests)}")
        return super().sample(requests, settings, report)

    def sleep(self):
        self.calls.append("sleep")

    def wake_up(self):
        self.calls.append("wake")


@pytest.fixture
def sides(tiny_model_folder):
    engine = OwnWeights(tiny_model_folder)
    policy = PolicyModel(load_model(tiny_model_folder, to_train=True))
    return engine, policy, SyncedSampler(engine, partial(policy_weights, policy), partial(policy_scores, policy), 1e-4)


def move(policy, size):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn_like(parameter))


def asked(tokenizer, count=3):
    return [SampleRequest(render_prompt(tokenizer, p), sample_seed(p.id)) for p in tiny.problems("train", count)]


def test_agreement_of_the_docstring():
    found = agreement([[-0.1, -0.2]], [[-0.1, -0.5]], 3)
    assert found.policy_version == 3
    assert (found.mean, found.largest) == (pytest.approx(0.15), pytest.approx(0.3))


def test_weights_go_over_when_something_is_drawn_and_only_then(sides):
    engine, policy, sampler = sides
    requests = asked(engine.tokenizer)
    sampler.sample([], SETTINGS)
    assert engine.calls == []
    sampler.sample(requests, SETTINGS)
    assert engine.calls == ["draw 3", "draw 3"]  # the probe's, then ours; it has read the same folder
    sampler.sample(requests, SETTINGS)
    move(policy, 1e-2)
    sampler.policy_version = 2  # two updates, one hand-over
    assert {c.policy_version for c in sampler.sample(requests, SETTINGS)} == {2}
    assert engine.calls[2:] == ["draw 3", "load 2", "draw 3"]
    assert sampler.agreement is not None and sampler.agreement.mean < 1e-6


def test_a_shared_device_is_given_back_and_weights_come_with_it(sides):
    engine, _, sampler = sides
    sampler.share_device = True
    requests = asked(engine.tokenizer)
    first = sampler.sample(requests, SETTINGS)
    assert sampler.sample(requests, SETTINGS) == first
    assert engine.calls[1:] == ["draw 3", "sleep", "wake", "load 0", "draw 3", "sleep"]


@pytest.mark.parametrize(("size", "message"), [(1e-1, "holds other weights"), (1e-5, "did not arrive")])
def test_a_hand_over_that_does_nothing_is_found(sides, size, message):
    engine, policy, sampler = sides
    requests = asked(engine.tokenizer)
    sampler.sample(requests, SETTINGS)
    engine.drops = True
    move(policy, size)
    sampler.policy_version = 1
    for _ in range(2):
        with pytest.raises(StaleEngine, match=message):
            sampler.sample(requests, SETTINGS)
    engine.drops = False
    sampler.policy_version = 2
    sampler.sample(requests, SETTINGS)


def test_small_steps_that_do_nothing_add_up(sides):
    """Steps below a tenth of the difference between the two are let through, but counted from the last real move."""
    engine, policy, sampler = sides
    requests = asked(engine.tokenizer)
    noise = 2e-5
    sampler.scores = lambda rows: [[value + noise for value in row] for row in policy_scores(policy, rows)]
    sampler.sample(requests, SETTINGS)
    engine.drops = True

    def step(version):
        with torch.no_grad():
            policy.model.get_output_embeddings().weight[5] += 3e-7
        sampler.policy_version = version
        sampler.sample(requests, SETTINGS)

    step(1)  # let through
    with pytest.raises(StaleEngine, match="did not arrive"):  # noqa: PT012
        for version in range(2, 200):
            step(version)


def test_another_model_and_numbers_that_are_none_are_found_at_the_start(sides):
    engine, policy, sampler = sides
    move(policy, 1e-1)
    with pytest.raises(StaleEngine, match="at policy version 0"):
        sampler.sample(asked(engine.tokenizer), SETTINGS)
    sampler.scores = lambda rows: [[float("nan")] * len(ids) for _, ids in rows]
    with pytest.raises(StaleEngine, match="nan"):
        sampler.sample(asked(engine.tokenizer), SETTINGS)


def test_a_policy_with_adapters_hands_over_plain_weights(tiny_model_folder):
    from rl.lora import add_lora

    plain = load_model(tiny_model_folder)
    names = {name for name, _ in policy_weights(PolicyModel(plain))}
    assert names == set(plain.state_dict())  # the tied output layer under its own name too
    policy = PolicyModel(add_lora(load_model(tiny_model_folder, to_train=True), 2, 4.0))
    move(policy, 1e-2)
    given = dict(policy_weights(policy))
    assert set(given) == names
    plain.load_state_dict(given)
    rows = [((5, 6, 7), (8, 9, 10))]
    (expected,), (found,) = policy_scores(policy, rows), policy_scores(PolicyModel(plain), rows)
    assert found == pytest.approx(expected, abs=1e-5)
