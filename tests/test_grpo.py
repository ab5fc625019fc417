"""The loop: exact resume with everything on, dynamic and partial sampling, refused steps, what is kept and logged."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from long2short.length_objectives import Kimi
from long2short.length_reward import LengthReward
from rl.curriculum import Prioritized
from rl.faults import FaultRaised, reset_faults
from rl.grpo import split
from rl.kl import KLTerm, k3_corrected
from rl.learner import OptimSettings
from rl.objectives import dapo, kimi
from rl.policy import load_model
from rl.refusal import StepRefused
from rl.rewards import WeightedReward
from rl.run_state import PreferBrief, prefer_accurate
from rl.schedules import StepSchedule
from rl.train_metrics import DevScore

SPEEDS = (
    "rollout_tokens_per_second", "train_tokens_per_second", "step_seconds", "judge_seconds", "judge_seconds_max",
)  # fmt: skip


def results(folder):
    """The final weights and the metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]
    return load_file(folder / "model" / "model.safetensors"), kept


def same_weights(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_split_uses_every_group_once():
    assert split(5, 1, seed=0) == [[0, 1, 2, 3, 4]]
    parts = split(6, 3, seed=0)
    assert [len(part) for part in parts] == [2, 2, 2]
    assert sorted(i for part in parts for i in part) == list(range(6))
    assert parts != split(6, 3, seed=1)


def test_which_model_is_kept():
    start = DevScore(0, 0.90, 60, 0)
    brief, short, wrong = DevScore(1, 0.89, 40, 0), DevScore(2, 0.88, 30, 0), DevScore(3, 0.5, 5, 0)
    prefer = PreferBrief(tolerance=0.03)
    assert prefer(brief, start, start) and prefer(short, brief, start)
    assert not prefer(wrong, short, start)
    assert prefer(start, wrong, start)
    assert prefer_accurate(start, brief, start) and not prefer_accurate(brief, start, start)


def is_long(rollout):
    """A reward with which some groups have signal and others not."""
    return float(rollout.num_tokens > 8)


# Everything that a checkpoint must hold, in two runs: plain rollouts with reference, KL, length reward, evaluations and
# priorities; and partial rollouts with Kimi's surrogate and its optimizer reset.
EVERYTHING = {
    "plain": {
        "objective": replace(dapo(), kl=KLTerm(k3_corrected, 0.01)),
        "optim": OptimSettings(learning_rate=1e-3, updates_per_step=2, warmup_steps=6),
        "with_reference": True,
        "refresh_every": 10,
        "shape": LengthReward(Kimi(), 0.5),
        "source": Prioritized,
        "limits": StepSchedule(((1, 10), (4, 16))),
        "prefer": prefer_accurate,
        "eval_every": 4,
    },
    "partial": {
        "objective": kimi(0.1),
        "optim": OptimSettings(learning_rate=1e-3, updates_per_step=2, reset_optimizer=True),
        "budget": 5,
        "train_old_segments": False,
    },
    "dynamic": {
        "dynamic_rounds": 3,
        "rewards": (WeightedReward("long", is_long, 1.0),),
        "eval_every": 3,
        "prefer": PreferBrief(0.1),
    },
}


@pytest.fixture(scope="module")
def whole(tiny_model_folder, train_rl, tmp_path_factory):
    """The uninterrupted runs of 12 steps."""
    found = {}
    for name, settings in EVERYTHING.items():
        folder = tmp_path_factory.mktemp(name)
        train_rl(tiny_model_folder, folder, 12, save_every=3, **settings)
        found[name] = results(folder)
    return found


@pytest.mark.parametrize("kind", sorted(EVERYTHING))
@pytest.mark.parametrize("step", range(1, 13))
def test_a_run_interrupted_at_any_step_ends_in_the_same_bits(
    tiny_model_folder, train_rl, tmp_path, monkeypatch, whole, kind, step
):
    """Interrupted before the rollout of the step, or in the middle of its updates."""
    weights, lines = whole[kind]
    site = f"grpo.update:{step}:raise" if step % 2 == 0 else f"grpo.step:{step}:raise"
    monkeypatch.setenv("REASON_FAULT", site)
    reset_faults()
    with pytest.raises(FaultRaised):
        train_rl(tiny_model_folder, tmp_path, 12, save_every=3, **EVERYTHING[kind])
    monkeypatch.delenv("REASON_FAULT")
    train_rl(tiny_model_folder, tmp_path, 12, save_every=3, **EVERYTHING[kind])
    again, more = results(tmp_path)
    assert [line["step"] for line in more] == list(range(1, 13))
    assert more == lines
    assert same_weights(weights, again)


class StopsInTheMiddle:
    """A sampler that dies in its n-th call after half of the requests were drawn."""

    def __init__(self, sampler, call):
        self.sampler, self.left = sampler, call

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    @property
    def policy_version(self):
        return self.sampler.policy_version

    @policy_version.setter
    def policy_version(self, version):
        self.sampler.policy_version = version

    def sample(self, requests, settings, report=lambda finished: None):
        self.left -= 1
        if self.left == 0:
            self.sampler.sample(requests[: len(requests) // 2], settings, report)
            raise FaultRaised("in the middle of a rollout")
        return self.sampler.sample(requests, settings, report)


@pytest.mark.parametrize("kind", sorted(EVERYTHING))
def test_a_run_interrupted_within_a_rollout_ends_in_the_same_bits(tiny_model_folder, train_rl, tmp_path, whole, kind):
    with pytest.raises(FaultRaised):
        train_rl(
            tiny_model_folder, tmp_path, 12, save_every=3, **EVERYTHING[kind],
            wrap=lambda sampler: StopsInTheMiddle(sampler, 7),
        )  # fmt: skip
    train_rl(tiny_model_folder, tmp_path, 12, save_every=3, **EVERYTHING[kind])
    again, more = results(tmp_path)
    assert more == whole[kind][1]
    assert same_weights(whole[kind][0], again)


def test_the_parts_were_really_on(whole):
    plain, partial, dynamic = (whole[kind][1] for kind in ("plain", "partial", "dynamic"))
    assert max(line["kl"] for line in plain) > 0
    assert (
        plain[5]["kl"] < plain[4]["kl"] / 2 and plain[10]["kl"] < plain[9]["kl"] / 2
    )  # every 10 updates a new reference
    assert {"dev_accuracy", "dev_tokens"} <= plain[3].keys()
    assert plain[0]["tokens_mean"] <= 10 < max(line["tokens_p95"] for line in plain[3:])
    assert max(line["open_completions"] for line in partial) > 0
    assert max(line["stale_versions_max"] for line in partial) == 0  # only the last segment is trained
    assert max(line["dynamic_rounds"] for line in dynamic) > 1
    assert sum(line["dropped_all_wrong"] for line in dynamic) > 0
    assert all("loss" in line for line in dynamic)


def test_metrics_hold_what_a_reader_looks_for(whole):
    wanted = {
        "step", "reward", "accuracy", "reward_accuracy", "reward_format", "tokens_mean", "tokens_median", "tokens_p95",
        "truncated", "repetition", "spread_tokens", "signal_share", "reflection_words", "loss", "entropy", "clip_share",
        "kl", "grad_norm", "mismatch_mean", "mismatch_max",
    }  # fmt: skip
    assert wanted <= whole["plain"][1][0].keys()
    assert whole["plain"][1][0]["mismatch_max"] < 1e-4  # the sampler is the trainer


def test_truncated_sampling_is_refused(tiny_model_folder):
    from rl.collect import Collector, RolloutSettings
    from rl.policy import load_tokenizer
    from rl.samplers.base import SamplingSettings
    from rl.samplers.transformers import TransformersSampler
    from rl.schedules import constant
    from rl.tasks import tiny

    tokenizer = load_tokenizer(tiny_model_folder)
    with pytest.raises(ValueError, match="top_p = 1"):
        Collector(
            TransformersSampler(load_model(tiny_model_folder), tokenizer), tokenizer,
            Prioritized(tiny.problems("train", 2), 0), tiny.TASK, (),
            RolloutSettings(1, 2, SamplingSettings(top_p=0.9), constant(256)), seed=0,
        )  # fmt: skip


class Undefined:
    """A reward that is not a number in the third step."""

    def __init__(self):
        self.calls = 0

    def __call__(self, rollout):
        self.calls += 1
        return float("nan") if self.calls == 40 else float(rollout.num_tokens)


def test_a_reward_that_is_not_finite_stops_the_run_with_its_groups_written_down(tiny_model_folder, train_rl, tmp_path):
    with pytest.raises(StepRefused, match="step 3: a reward is not finite") as caught:
        train_rl(tiny_model_folder, tmp_path, 4, save_every=1, rewards=(WeightedReward("odd", Undefined(), 1.0),))
    (path,) = tmp_path.glob("refused-step-*.jsonl")
    assert path.name == "refused-step-000003.jsonl"
    assert str(path) in str(caught.value)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["problem"] for row in rows} == set(caught.value.groups)
    assert [row["reward"] for row in rows].count("nan") == 1
    checkpoint = load_file(tmp_path / "checkpoints" / "step-000002" / "weights.safetensors")
    train_rl(tiny_model_folder, tmp_path, 3, save_every=1, rewards=(WeightedReward("odd", len_of, 1.0),))
    assert not list(tmp_path.glob("refused-step-*.jsonl"))
    assert checkpoint


def len_of(rollout):
    return float(rollout.num_tokens)


class Broken:
    """A sampler whose log-probs are not finite for one completion of its second call."""

    def __init__(self, sampler):
        self.sampler, self.calls = sampler, 0

    policy_version = 0

    def sample(self, requests, settings, report=lambda finished: None):
        self.calls += 1
        found = self.sampler.sample(requests, settings, report)
        if self.calls == 2:
            found[5] = replace(found[5], sampler_logprobs=(float("-inf"),) * found[5].num_tokens)
        return found


def test_a_sampler_log_prob_that_is_not_finite_stops_the_run(tiny_model_folder, train_rl, tmp_path):
    with pytest.raises(StepRefused, match="step 2: a sampler log-prob is not finite") as caught:
        train_rl(tiny_model_folder, tmp_path, wrap=Broken, rewards=(WeightedReward("length", len_of, 1.0),))
    (path,) = tmp_path.glob("refused-step-*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["problem"] for row in rows} == set(caught.value.groups)
    assert len(rows) == 4
    assert any("-inf" in row["sampler_logprobs"] for row in rows)
