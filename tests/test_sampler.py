"""The transformers sampler: the distribution it draws from, its log-probs, its seeds, how completions end."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.policy import load_model, load_tokenizer
from rl.prompts import prefills_think, render_prompt
from rl.repetition import RepetitionRule
from rl.rollout import sample_groups
from rl.samplers.base import SampleRequest, SamplingSettings, sample_seed
from rl.samplers.transformers import TransformersSampler, draw
from rl.tasks import tiny
from rl.types import FinishReason


@pytest.fixture
def sampler(tiny_model_folder):
    return TransformersSampler(load_model(tiny_model_folder), load_tokenizer(tiny_model_folder), batch_size=16)


def requests_for(sampler, count, seed=0):
    problems = tiny.problems("train", count)
    return [SampleRequest(render_prompt(sampler.tokenizer, p), sample_seed(seed, p.id)) for p in problems]


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]]))
    ids, logprobs = draw(logits, torch.tensor([0.6]), SamplingSettings())
    assert (ids.item(), logprobs.item()) == (1, pytest.approx(math.log(0.3)))
    ids, logprobs = draw(logits, torch.tensor([0.6]), SamplingSettings(top_p=0.7))  # the set is {0, 1}
    assert (ids.item(), logprobs.item()) == (0, pytest.approx(math.log(0.625)))


def test_draw_follows_temperature():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(20_000, np.float32))
    ids, _ = draw(logits, uniforms, SamplingSettings(temperature=0.5))
    squares = np.array([0.25, 0.09, 0.04])
    assert np.bincount(ids, minlength=3) / 20_000 == pytest.approx(squares / squares.sum(), abs=0.01)


def test_the_same_seeds_give_the_same_completions_and_others_differ(sampler):
    settings = SamplingSettings(max_tokens=20)
    first = sampler.sample(requests_for(sampler, 6), settings)
    assert sampler.sample(requests_for(sampler, 6), settings) == first
    other = sampler.sample(requests_for(sampler, 6, seed=1), settings)
    assert [c.token_ids for c in other] != [c.token_ids for c in first]


def test_a_completion_does_not_depend_on_its_neighbours(sampler):
    settings = SamplingSettings(max_tokens=20)
    together = sampler.sample(requests_for(sampler, 6), settings)
    alone = [sampler.sample([request], settings)[0] for request in requests_for(sampler, 6)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for left, right in zip(together, alone, strict=True):
        assert left.sampler_logprobs == pytest.approx(right.sampler_logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_logprobs_are_the_trainers(sampler, temperature):
    """Mixed lengths in one batch, so compaction, padding and positions are all in play."""
    requests = requests_for(sampler, 12)
    completions = sampler.sample(requests, SamplingSettings(temperature=temperature, max_tokens=40))
    assert len({c.num_tokens for c in completions}) > 1
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            logits = sampler.model(input_ids=ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
        plain = torch.log_softmax(logits / temperature, dim=-1)
        expected = plain.gather(-1, torch.tensor(completion.token_ids).unsqueeze(-1)).squeeze(-1)
        assert completion.sampler_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_how_completions_end(sampler):
    completions = sampler.sample(requests_for(sampler, 16), SamplingSettings(max_tokens=12))
    eos = sampler.tokenizer.eos_token_id
    reasons = {c.finish_reason for c in completions}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}, "the made model should do both in 16 draws"
    for completion in completions:
        if completion.finish_reason is FinishReason.STOP:
            assert completion.token_ids[-1] == eos and eos not in completion.token_ids[:-1]
            assert sampler.tokenizer.decode(completion.token_ids[:-1]) == completion.text
        else:
            assert completion.num_tokens == 12 and eos not in completion.token_ids


def test_progress_moves_while_a_batch_is_drawn(sampler):
    told = []
    completions = sampler.sample(requests_for(sampler, 24), SamplingSettings(max_tokens=40), told.append)
    first_batch = [count for count in told if count <= sampler.batch_size]
    assert len(first_batch) > 4 and first_batch[-1] == 16 and told[-1] == 24 and told == sorted(set(told))
    assert len(told) >= len({c.num_tokens for c in completions}), "rows that end together are told together"


def test_a_request_has_its_own_limit(sampler):
    settings = SamplingSettings(max_tokens=10)
    requests = [replace(r, max_tokens=1 + i) for i, r in enumerate(requests_for(sampler, 8))]
    free = sampler.sample(requests_for(sampler, 8), settings)
    for index, (completion, whole) in enumerate(zip(sampler.sample(requests, settings), free, strict=True)):
        assert completion.token_ids == whole.token_ids[: 1 + index]
        cut = completion.token_ids[-1] != sampler.tokenizer.eos_token_id
        assert completion.finish_reason is (FinishReason.LENGTH if cut else FinishReason.STOP)


def test_the_limit_counts_the_prefix():
    settings = SamplingSettings(max_tokens=10)
    request = SampleRequest((1, 2), seed=0, prefix=(3,) * 6)
    assert request.context == (1, 2, 3, 3, 3, 3, 3, 3)
    assert [replace(request, max_tokens=asked).budget(settings) for asked in (None, 3, 7)] == [4, 3, 4]
    with pytest.raises(ValueError, match="prefix of 10 tokens and max_tokens None has nothing left .* limit of 10"):
        replace(request, prefix=(3,) * 10).budget(settings)


def test_loops_end_with_their_own_reason(sampler):
    """A rule that is easy to meet. Ended at the first token after which the rule holds, and nothing else is changed;
    in pieces, with part of the loop in the prefix, the same."""
    rule = RepetitionRule(max_period=3, min_repeats=2, min_tokens=2)
    requests = requests_for(sampler, 16)
    free = sampler.sample(requests, SamplingSettings(max_tokens=30))
    stopped = sampler.sample(requests, SamplingSettings(max_tokens=30, stop_repetition=rule))
    for completion, whole in zip(stopped, free, strict=True):
        ids = whole.token_ids
        end = next((n for n in range(1, len(ids) + 1) if rule.repeats(ids[:n])), None)
        if end is None:
            assert completion == whole
        else:
            assert completion.token_ids == ids[:end] and completion.finish_reason is FinishReason.REPETITION
            assert sampler.tokenizer.decode(completion.token_ids) == completion.text
    reasons = [c.finish_reason for c in stopped]
    assert reasons.count(FinishReason.REPETITION) >= 4 and reasons.count(FinishReason.STOP) >= 1
    looped = [i for i, reason in enumerate(reasons) if reason is FinishReason.REPETITION]
    halves = [replace(requests[i], prefix=stopped[i].token_ids[:-1]) for i in looped]
    again = sampler.sample(halves, SamplingSettings(max_tokens=30, stop_repetition=rule))
    assert [c.token_ids for c in again] == [stopped[i].token_ids[-1:] for i in looped]
    assert {c.finish_reason for c in again} == {FinishReason.REPETITION}


def test_no_requests_no_completions(sampler):
    assert sampler.sample([], SamplingSettings()) == []


def test_groups_keep_the_order_and_top_up_draws_the_same_numbers(sampler):
    problems = tiny.problems("train", 5)
    settings = SamplingSettings(max_tokens=10)
    arguments = (sampler, sampler.tokenizer, problems, tiny.TASK)
    whole = sample_groups(*arguments, 4, settings, seed=3)
    more = sample_groups(*arguments, 2, settings, seed=3, first_sample=2)
    assert [g.problem.id for g in whole] == [p.id for p in problems]
    for group, later in zip(whole, more, strict=True):
        assert [r.completion.token_ids for r in group.rollouts[2:]] == [r.completion.token_ids for r in later.rollouts]


def test_the_template_prefills_think(sampler):
    assert prefills_think(sampler.tokenizer)
    text = sampler.tokenizer.decode(render_prompt(sampler.tokenizer, tiny.problems("train", 1)[0]))
    assert text.startswith("<|user|>") and text.endswith("<|assistant|><think>")


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingSettings(**bad)
