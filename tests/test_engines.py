"""vLLM, really started: what it draws, how completions end, its log-probs, and weights handed over to it."""

import math
from collections import Counter

import pytest
import torch

from rl.policy import PolicyModel, load_model, load_tokenizer
from rl.repetition import RepetitionRule
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.synced import StaleEngine, SyncedSampler, agreement, policy_scores, policy_weights
from rl.samplers.vllm import VllmSampler, engine_seed
from rl.types import FinishReason
from tests.engine_world import MODEL, requests_for, trainer_logprobs

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def engine(tokenizer):
    sampler = VllmSampler(MODEL, tokenizer, {"max_model_len": 512})
    yield sampler
    sampler.close()


@pytest.fixture
def fresh(engine, model):
    """The engine with the weights of the model's folder, however the test before left it."""
    engine.load_weights(model.state_dict().items(), 0)
    return engine


@pytest.mark.engine_start
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.9)])
def test_log_probs_are_the_trainers_at_the_processed_distribution(fresh, model, tokenizer, temperature, top_p):
    requests = requests_for(tokenizer, 16, samples=2)
    drawn = fresh.sample(requests, SamplingSettings(temperature, top_p, 100))
    gaps = []
    for request, completion in zip(requests, drawn, strict=True):
        expected = trainer_logprobs(model, request, completion, temperature, top_p)
        gaps += [abs(a - b) for a, b in zip(completion.sampler_logprobs, expected, strict=True)]
    assert len(gaps) > 500
    assert sum(gaps) / len(gaps) <= 1e-4 and max(gaps) <= 1e-2


@pytest.mark.engine_start
def test_seeds_belong_to_requests(fresh, tokenizer):
    settings = SamplingSettings(max_tokens=60)
    requests = requests_for(tokenizer, 4, samples=4)
    seen: list[int] = []
    first = fresh.sample(requests, settings, seen.append)
    assert seen == list(range(1, 17))
    assert fresh.sample(requests, settings) == first
    assert fresh.sample(requests[::-1], settings)[::-1] == first  # another order, the same completions
    assert len({c.token_ids for c in first[:4]}) > 1  # of one prompt
    assert [c.token_ids for c in fresh.sample(requests_for(tokenizer, 4, 4, seed=1), settings)] != [
        c.token_ids for c in first
    ]


def test_how_completions_end(fresh, tokenizer):
    drawn = fresh.sample(requests_for(tokenizer, 32), SamplingSettings(max_tokens=12))
    reasons = Counter(c.finish_reason for c in drawn)
    assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in drawn:
        ended = completion.token_ids[-1] == tokenizer.eos_token_id
        assert ended == (completion.finish_reason is FinishReason.STOP)
        assert ended or completion.num_tokens == 12
        shown = completion.token_ids[:-1] if ended else completion.token_ids
        assert completion.text == tokenizer.decode(shown) and completion.policy_version == 0


def test_the_first_token_follows_the_distribution(fresh, model, tokenizer):
    """4,000 draws against the softmax: Pearson's statistic has mean (cells - 1) and stays below it plus 5 sigma."""
    (request,) = requests_for(tokenizer, 1)
    many = [SampleRequest(request.prompt_ids, sample_seed("first", i)) for i in range(4000)]
    drawn = Counter(c.token_ids[0] for c in fresh.sample(many, SamplingSettings(temperature=2.0, max_tokens=1)))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([request.prompt_ids])).logits[0, -1]
    expected = 4000 * torch.softmax(logits.double() / 2.0, -1)
    cells = [i for i in range(len(expected)) if expected[i] >= 5]
    rest = 4000 - sum(float(expected[i]) for i in cells)
    statistic = sum((drawn[i] - float(expected[i])) ** 2 / float(expected[i]) for i in cells)
    statistic += (4000 - sum(drawn[i] for i in cells) - rest) ** 2 / max(rest, 1.0)
    assert len(cells) >= 5
    assert statistic < len(cells) + 5 * math.sqrt(2 * len(cells))


def test_completions_come_out_as_they_end_and_are_cut_when_told(fresh, tokenizer):
    settings, requests = SamplingSettings(max_tokens=100), requests_for(tokenizer, 8, samples=2)
    whole = fresh.sample(requests, settings)
    lengths = [whole[index].num_tokens for index, _ in fresh.stream(requests, settings)]
    assert lengths == sorted(lengths)  # all begin together, so the shortest end first
    limits = [100] * len(requests)
    limits[3] = 0
    found = {}
    for index, completion in fresh.stream(requests, settings, limits):
        found[index] = completion
        if len(found) == 5:
            limits[:] = [min(limit, completion.num_tokens + 1) for limit in limits]
    assert len(found) == len(requests)
    assert found[3].finish_reason is FinishReason.ABORTED and found[3].num_tokens == 0
    assert Counter(c.finish_reason for c in found.values())[FinishReason.ABORTED] > 5
    for index, completion in found.items():
        assert whole[index].token_ids[: completion.num_tokens] == completion.token_ids
        assert completion.sampler_logprobs == pytest.approx(whole[index].sampler_logprobs[: completion.num_tokens])
    assert fresh.sample(requests, settings) == whole  # nothing is left on the engine


def test_a_stream_that_is_left_early_frees_the_engine(fresh, tokenizer):
    settings, requests = SamplingSettings(max_tokens=60), requests_for(tokenizer, 6)
    whole = fresh.sample(requests, settings)
    stream = fresh.stream(requests, settings)
    next(stream)
    with pytest.raises(RuntimeError, match="already drawing"):
        fresh.sample(requests, settings)
    with pytest.raises(RuntimeError, match="weights cannot change"):
        fresh.load_weights([], 1)
    stream.close()
    assert fresh.sample(requests, settings) == whole


def test_a_continued_completion_has_a_seed_of_its_own(fresh, model, tokenizer):
    (request,) = requests_for(tokenizer, 1)
    begun = fresh.sample([request], SamplingSettings(max_tokens=6))[0]
    going = SampleRequest(request.prompt_ids, request.seed, begun.token_ids)
    assert engine_seed(request) == request.seed & (2**63 - 1) != engine_seed(going) < 2**63
    rest = fresh.sample([going], SamplingSettings(max_tokens=20))[0]
    assert 1 <= rest.num_tokens <= 14
    assert rest.sampler_logprobs == pytest.approx(trainer_logprobs(model, going, rest), abs=1e-4)
    with pytest.raises(ValueError, match=r"more than the engine's max_model_len of 512"):
        fresh.sample([request], SamplingSettings(max_tokens=600))


def test_loops_end_by_the_rule(fresh, model, tokenizer):
    """Weights of zero make every token equal: at a low temperature the model says one token for ever."""
    fresh.load_weights([(name, torch.zeros_like(value)) for name, value in model.state_dict().items()], 1)
    rule = RepetitionRule(max_period=4, min_repeats=3, min_tokens=7)
    asked = requests_for(tokenizer, 2)
    free = fresh.sample(asked, SamplingSettings(max_tokens=400, temperature=1.0))
    stopped = fresh.sample(asked, SamplingSettings(max_tokens=400, temperature=1.0, stop_repetition=rule))
    for before, after in zip(free, stopped, strict=True):
        assert before.token_ids[: after.num_tokens] == after.token_ids
        if after.finish_reason is FinishReason.REPETITION:
            assert rule.repeats(after.token_ids) and not rule.repeats(after.token_ids[:-1])
    with pytest.raises(ValueError, match="min_tokens must be at most max_period x min_repeats"):
        fresh.sample(asked, SamplingSettings(stop_repetition=RepetitionRule(2, 2, 9)))


def test_native_settings_reach_the_request(fresh, tokenizer):
    with pytest.raises(ValueError, match=r"vllm\.request\.seed is set by the sampler"):
        VllmSampler(MODEL, tokenizer, request={"seed": 1})
    requests, before = requests_for(tokenizer, 8), fresh.request
    fresh.request = {"allowed_token_ids": [7, tokenizer.eos_token_id]}
    try:
        drawn = fresh.sample(requests, SamplingSettings(max_tokens=10))
    finally:
        fresh.request = before
    assert {token for c in drawn for token in c.token_ids} <= {7, tokenizer.eos_token_id}


def test_a_thinking_budget_of_the_engine(tokenizer):
    """vLLM's own: after 8 tokens of thought the closing is forced, with log-prob 0 under the processed distribution."""
    reasoning = {"reasoning_start_str": "<think>", "reasoning_end_str": "</think>"}
    sampler = VllmSampler(
        MODEL, tokenizer, {"max_model_len": 512, "reasoning_config": reasoning}, {"thinking_token_budget": 8}
    )
    try:
        drawn = sampler.sample(requests_for(tokenizer, 8), SamplingSettings(max_tokens=60))
    finally:
        sampler.close()
    closing = tokenizer.convert_tokens_to_ids("</think>")
    at = [c.token_ids.index(closing) for c in drawn]
    assert max(at) == 8
    assert all(c.sampler_logprobs[8] == 0 for c, place in zip(drawn, at, strict=True) if place == 8)


# --- weights ----------------------------------------------------------------------------------------------------------


def moved(policy, size):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(size * torch.randn_like(parameter))


@pytest.fixture
def synced(fresh):
    policy = PolicyModel(load_model(MODEL, to_train=True))
    sampler = SyncedSampler(
        fresh, lambda: policy_weights(policy), lambda rows: policy_scores(policy, rows), tolerance=1e-4
    )
    return sampler, policy


@pytest.mark.engine_start
def test_weights_are_handed_over_and_carry_their_version(synced, tokenizer):
    sampler, policy = synced
    requests, settings = requests_for(tokenizer, 6), SamplingSettings(max_tokens=60)
    before = sampler.sample(requests, settings)
    assert sampler.agreement.policy_version == 0 and sampler.agreement.mean < 1e-5
    for version in (1, 2):
        moved(policy, 3e-3)
        sampler.policy_version = version
        after = sampler.sample(requests, settings)
        assert {c.policy_version for c in after} == {version}
        assert sampler.agreement.policy_version == version and sampler.agreement.mean < 1e-5
        rows = [(r.prompt_ids, c.token_ids) for r, c in zip(requests, after, strict=True)]
        drawn = agreement([list(c.sampler_logprobs) for c in after], policy_scores(policy, rows), version)
        assert drawn.mean <= 1e-4 and drawn.largest <= 1e-2
    assert [c.sampler_logprobs for c in after] != [c.sampler_logprobs for c in before]


@pytest.mark.parametrize(("size", "message"), [(1e-2, "holds other weights"), (1e-6, "did not arrive")])
def test_a_skipped_hand_over_is_caught_at_once(synced, tokenizer, monkeypatch, size, message):
    sampler, policy = synced
    requests, settings = requests_for(tokenizer, 6), SamplingSettings(max_tokens=20)
    sampler.sample(requests, settings)
    monkeypatch.setattr(sampler.engine, "load_weights", lambda weights, version: None)
    moved(policy, size)
    sampler.policy_version = 1
    for _ in range(2):  # and again, for whoever catches it
        with pytest.raises(StaleEngine, match=message):
            sampler.sample(requests, settings)


def test_an_engine_of_another_model_is_caught_at_the_start(synced, tokenizer):
    sampler, policy = synced
    moved(policy, 1e-2)
    with pytest.raises(StaleEngine, match="at policy version 0"):
        sampler.sample(requests_for(tokenizer, 2), SamplingSettings(max_tokens=20))


def test_an_output_layer_that_was_forgotten_is_caught(synced, tokenizer):
    """A tied output layer under its other name alone: vLLM's packed copy of it stays what it was."""
    sampler, policy = synced
    assert policy.model.config.tie_word_embeddings
    sampler.weights = lambda: ((n, v) for n, v in policy_weights(policy) if n != "lm_head.weight")
    sampler.sample(requests_for(tokenizer, 2), SamplingSettings(max_tokens=20))
    moved(policy, 1e-2)
    sampler.policy_version = 1
    with pytest.raises(StaleEngine, match="holds other weights"):
        sampler.sample(requests_for(tokenizer, 2), SamplingSettings(max_tokens=20))
