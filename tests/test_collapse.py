"""The monitor of a length squeeze: its figures by hand, planted collapses, a healthy run, exact state, what is kept."""

import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from long2short.length_objectives import Kimi
from long2short.length_reward import LengthReward, MinSpread
from rl.advantages import StdNormalized, mean_baseline
from rl.collapse import CollapseLimits, CollapseMonitor, StepHealth, ThoughtReader, step_health
from rl.faults import FaultRaised, reset_faults
from rl.learner import OptimSettings
from rl.rewards import WeightedReward, accuracy_reward
from rl.run_state import PreferBrief
from rl.types import Completion, FinishReason, JudgeFailure, Outcome, Problem, Rollout, RolloutGroup, TextPart, Verdict

MODELS = Path(__file__).resolve().parents[1] / "recipes" / "models"
PREFILLED = ThoughtReader(prefilled=True)
UNTAGGED = ThoughtReader(prefilled=False)
HEALTHY = StepHealth(0.9, 0.0, 0.05, 12.0, 0.2)


def rollout(text, right, finish=FinishReason.STOP, tokens=None):
    ids = tuple(range(tokens or len(text) + 1))
    completion = Completion(text, ids, (-0.5,) * len(ids), finish)
    verdict = Verdict(Outcome.RIGHT if right else Outcome.WRONG)
    return Rollout(completion, verdict if right is not None else Verdict.undecided(JudgeFailure.CRASH))


def group(*rollouts):
    return RolloutGroup(Problem("p", (TextPart("1+1"),), "2"), (1, 2), rollouts)


def monitor(stop=True, **limits):
    return CollapseMonitor(CollapseLimits(**limits), PREFILLED, stop=stop)


def fed(watch, figures, first=1):
    for step, health in enumerate(figures, first):
        watch.observe(step, health)
    return [(alarm.step, alarm.signal) for alarm in watch.alarms]


def test_the_thought_is_read_as_the_template_has_it():
    assert PREFILLED("1+1=2</think>2") == 5
    assert PREFILLED("</think>2") == 0
    assert PREFILLED(" \n</think>2") == 0
    assert PREFILLED("1+1=2") is None
    plain = UNTAGGED
    assert plain("2") == 0
    assert plain("<think>1+1") is None
    assert plain("<think>1+1</think>2") == 3
    assert ThoughtReader(True, lambda text: len(text.split()))("one two</think>2") == 2


def test_the_figures_of_a_step_by_hand():
    health = step_health([group(rollout("a</think>4", True), rollout("</think>7", False))], PREFILLED)
    assert health == StepHealth(0.5, 0.5, 1.0, 1.0, 0.5, 0.5)
    assert health.metrics() == {"empty_think": 0.5, "guess_rate": 1.0, "sampled_entropy": 0.5, "guess_accuracy": 0.5}


def test_what_ends_early_without_closing_its_thought_is_a_guess():
    short, longer = rollout("12", True), rollout("12345678", False)  # 3 tokens and 9, the last of each the EOS
    health = step_health([group(short, longer)], PREFILLED)
    assert (health.empty_think, health.guess_rate, health.guess_accuracy) == (0.0, 0.5, 1.0)
    assert step_health([group(rollout("<think>12", False, tokens=4))], UNTAGGED).guess_rate == 1
    watch = monitor(window=2)
    for step in (1, 2):
        watch.read(step, [group(short, rollout("7", False))])
    assert [alarm.signal for alarm in watch.alarms] == ["guess_rate"]


def test_an_unfinished_thought_is_no_guess_and_an_undecided_one_no_verdict():
    cut = rollout("12345", False, FinishReason.LENGTH)
    health = step_health([group(cut, rollout("123456789</think>1", None))], PREFILLED)
    assert (health.accuracy, health.empty_think, health.guess_rate, health.guess_accuracy) == (0.0, 0.0, 0.0, None)
    assert step_health([group(rollout("1</think>1", None))], PREFILLED).accuracy is None


def test_a_floor_and_a_margin_give_the_higher_limit():
    limits = CollapseLimits(accuracy_floor=0.5, accuracy_margin=0.2)
    assert limits.accuracy_limit(0.9) == pytest.approx(0.7)
    assert limits.accuracy_limit(0.6) == 0.5
    assert limits.accuracy_limit(None) == 0.5
    assert CollapseLimits(accuracy_margin=None).accuracy_limit(0.9) is None
    assert CollapseLimits().accuracy_limit(0.4) == pytest.approx(0.2)
    assert CollapseLimits().accuracy_limit(0.18) == 0.09 and CollapseLimits().accuracy_limit(0.0) == 0


@pytest.mark.parametrize(
    ("accuracies", "first"), [([0.18] * 5 + [0.0] * 5, 8), ([0.5, 0.27, 0.44] + [0.0] * 9, 7)], ids=["weak", "early"]
)
def test_a_weak_start_that_loses_everything_is_an_alarm(accuracies, first):
    assert fed(monitor(), [replace(HEALTHY, accuracy=one) for one in accuracies]) == [(first, "accuracy")]
    assert fed(monitor(), [replace(HEALTHY, accuracy=0.0)] * 12) == []  # it has nothing to lose


def test_a_model_that_lost_its_accuracy_inside_the_first_window_is_not_well():
    watch = monitor()
    for step, accuracy in enumerate([0.5, 0.27, 0.44, 0.0], 1):
        watch.observe(step, replace(HEALTHY, accuracy=accuracy))
        assert watch.healthy == (accuracy > 0)
    assert watch.alarms == []


SIGNALS = {
    "accuracy": replace(HEALTHY, accuracy=0.6),
    "empty_think": replace(HEALTHY, empty_think=0.6),
    "guess_rate": replace(HEALTHY, guess_rate=0.7),
    "spread": replace(HEALTHY, spread=0.4),
    "entropy": replace(HEALTHY, entropy=0.001),
}


@pytest.mark.parametrize("signal", sorted(SIGNALS))
def test_a_signal_is_reported_once_when_a_whole_window_is_over_the_line(signal):
    watch = monitor(window=4, entropy=0.01)
    assert fed(watch, [HEALTHY] * 8 + [SIGNALS[signal]] * 8) in ([(step, signal)] for step in (10, 11, 12))
    assert watch.stopped == (watch.alarms[0] if signal not in ("spread", "entropy") else None)
    assert signal in ("spread", "entropy") or not watch.healthy


def test_one_bad_step_is_not_a_window():
    watch = monitor(window=4)
    assert fed(watch, [HEALTHY] * 6 + [SIGNALS["accuracy"]] + [HEALTHY] * 6) == []
    assert fed(monitor(window=5), [SIGNALS["empty_think"]] * 4) == []


def test_batches_drawn_by_success_are_held_to_the_floor_only():
    falling = [replace(HEALTHY, accuracy=0.9 - 0.05 * step) for step in range(12)]
    assert fed(monitor(window=2, batches_compare=False), falling) == []
    assert fed(monitor(window=2, batches_compare=False, accuracy_floor=0.5), falling) == [(10, "accuracy")]
    assert monitor(batches_compare=False).observe_dev(5, 0.6, 0.9) is False


def test_an_evaluation_below_the_limit_is_an_alarm_at_once():
    watch = monitor()
    assert watch.observe_dev(0, 0.9, 0.9) and watch.observe_dev(10, 0.71, 0.9)
    assert watch.stopped is None
    assert not watch.observe_dev(20, 0.69, 0.9)
    assert str(watch.stopped) == "step 20: accuracy on dev problems 0.69 is below 0.70"
    assert monitor(stop=False).observe_dev(20, 0.69, 0.9)


def test_warn_reports_and_never_stops():
    watch = monitor(stop=False, window=2)
    assert fed(watch, [HEALTHY] * 3 + [SIGNALS["guess_rate"]] * 3) == [(5, "guess_rate")]
    assert watch.stopped is None


# --- a model without think tags ---------------------------------------------------------------------------------------


def test_a_model_that_never_had_tags_is_not_held_to_its_thoughts():
    watch = CollapseMonitor(CollapseLimits(), UNTAGGED)
    answers = [group(rollout("1+1 is 2, so 2", True), rollout("2", True))]
    for step in range(1, 9):
        watch.read(step, answers)
        assert watch.healthy and watch.observe_dev(step, 0.9, 0.9)
    assert watch.stopped is None
    (alarm,) = watch.alarms
    assert (alarm.step, alarm.signal, alarm.serious) == (5, "no_think_tags", False)
    assert str(alarm).startswith(
        "step 5: 0% of the first completions hold a think tag (fewer than 10%): empty_think an"
    )
    other = CollapseMonitor(CollapseLimits(empty_think=None, guess_rate=None), UNTAGGED)
    for step in range(1, 9):
        other.read(step, answers)
    assert other.alarms == []  # nothing is lost that would have been watched
    failing = [replace(HEALTHY, accuracy=0.9, tagged=0.0)] * 5 + [replace(HEALTHY, accuracy=0.0, tagged=0.0)] * 5
    assert fed(monitor(), failing) == [(5, "no_think_tags"), (7, "accuracy")]  # the others still are


@pytest.mark.parametrize("reader", [PREFILLED, UNTAGGED], ids=["prefilled", "plain"])
def test_a_planted_empty_thought_is_an_alarm_from_the_first_window_on(reader):
    watch = CollapseMonitor(CollapseLimits(), reader)
    for step in range(1, 6):
        watch.read(step, [group(rollout("</think>2", True), rollout("</think>12", False))])
        assert not watch.healthy
    assert [(alarm.step, alarm.signal) for alarm in watch.alarms[:2]] == [(5, "empty_think"), (5, "guess_rate")]
    assert watch.stopped is not None


def test_a_model_that_gives_its_tags_up_is_held_to_its_thoughts():
    watch = CollapseMonitor(CollapseLimits(window=3, spread=None), UNTAGGED)
    thought, none = group(rollout("<think>1+1 is 2 is 2</think>2", True)), group(rollout("2", True))
    assert (UNTAGGED.tagged("2"), UNTAGGED.tagged("<think>2"), PREFILLED.tagged("2")) == (False, True, True)
    for step in range(1, 9):
        watch.read(step, [thought] if step <= 3 else [none])
    assert [(alarm.step, alarm.signal) for alarm in watch.alarms] == [(5, "empty_think"), (5, "guess_rate")]


# --- a healthy run ----------------------------------------------------------------------------------------------------

# The 60 steps of `brief` of the tiny recipe (86 to 44 tokens): accuracy, empty thoughts, guesses, spread, entropy.
BRIEF = [
    (0.98, 0.000, 0.000, 34.4, 0.015), (0.93, 0.004, 0.004, 33.6, 0.015), (0.95, 0.000, 0.000, 41.1, 0.016),
    (0.95, 0.004, 0.004, 45.2, 0.018), (0.90, 0.008, 0.008, 41.4, 0.018), (0.91, 0.004, 0.004, 31.4, 0.016),
    (0.94, 0.012, 0.012, 48.2, 0.021), (0.93, 0.008, 0.008, 58.9, 0.017), (0.95, 0.000, 0.000, 33.2, 0.017),
    (0.96, 0.000, 0.000, 41.9, 0.021), (0.96, 0.000, 0.000, 39.9, 0.020), (0.94, 0.004, 0.004, 54.5, 0.024),
    (0.93, 0.004, 0.004, 47.4, 0.023), (0.94, 0.008, 0.008, 46.7, 0.026), (0.88, 0.004, 0.004, 49.7, 0.024),
    (0.94, 0.000, 0.000, 47.5, 0.028), (0.98, 0.004, 0.004, 48.8, 0.023), (0.92, 0.000, 0.000, 40.4, 0.022),
    (0.96, 0.004, 0.004, 57.1, 0.028), (0.86, 0.012, 0.012, 53.5, 0.029), (0.88, 0.012, 0.012, 55.3, 0.032),
    (0.91, 0.000, 0.000, 54.6, 0.029), (0.88, 0.008, 0.008, 50.9, 0.031), (0.93, 0.000, 0.000, 52.2, 0.030),
    (0.95, 0.004, 0.004, 47.3, 0.026), (0.87, 0.004, 0.004, 48.5, 0.029), (0.95, 0.000, 0.000, 48.7, 0.027),
    (0.89, 0.004, 0.004, 54.6, 0.031), (0.90, 0.000, 0.000, 41.6, 0.025), (0.91, 0.008, 0.008, 51.2, 0.028),
    (0.90, 0.004, 0.004, 44.4, 0.030), (0.88, 0.008, 0.008, 43.5, 0.022), (0.92, 0.016, 0.016, 41.6, 0.028),
    (0.93, 0.000, 0.000, 38.0, 0.026), (0.92, 0.008, 0.008, 43.1, 0.029), (0.96, 0.000, 0.000, 41.6, 0.025),
    (0.91, 0.008, 0.008, 41.4, 0.024), (0.89, 0.000, 0.000, 33.9, 0.025), (0.96, 0.000, 0.000, 31.8, 0.022),
    (0.88, 0.000, 0.000, 35.4, 0.024), (0.93, 0.008, 0.008, 34.9, 0.024), (0.93, 0.000, 0.000, 24.2, 0.018),
    (0.97, 0.000, 0.000, 25.1, 0.020), (0.91, 0.004, 0.004, 37.6, 0.024), (0.96, 0.000, 0.000, 22.6, 0.016),
    (0.92, 0.000, 0.000, 31.2, 0.022), (0.98, 0.000, 0.000, 28.5, 0.015), (0.97, 0.000, 0.000, 26.2, 0.016),
    (0.85, 0.004, 0.004, 29.5, 0.023), (0.97, 0.008, 0.008, 25.9, 0.016), (0.85, 0.000, 0.000, 20.4, 0.013),
    (0.90, 0.000, 0.000, 25.0, 0.019), (0.92, 0.008, 0.008, 25.1, 0.017), (0.89, 0.000, 0.000, 19.3, 0.013),
    (0.94, 0.000, 0.000, 22.6, 0.013), (0.91, 0.004, 0.004, 29.5, 0.016), (0.98, 0.004, 0.004, 19.4, 0.015),
    (0.95, 0.000, 0.000, 27.3, 0.014), (0.89, 0.000, 0.000, 21.6, 0.018), (0.95, 0.000, 0.000, 13.1, 0.012),
]  # fmt: skip


def test_a_healthy_squeeze_raises_no_alarm():
    watch = monitor()
    assert fed(watch, [StepHealth(*figures) for figures in BRIEF]) == []
    assert watch.healthy


shares = st.floats(0, 1)
steps_of_a_run = st.lists(
    st.builds(
        StepHealth, st.none() | shares, shares, shares, st.floats(0, 20), st.floats(0, 2), st.none() | shares,
        tagged=st.sampled_from([0.0, 0.05, 0.2, 1.0]),
    ),
    max_size=25,
)  # fmt: skip


@given(steps_of_a_run)
def test_its_state_survives_json_at_any_step(figures):
    whole = monitor(window=3, entropy=0.1)
    fed(whole, figures)
    for cut in range(len(figures) + 1):
        first, second = monitor(window=3, entropy=0.1), monitor(window=3, entropy=0.1)
        fed(first, figures[:cut])
        second.restore(json.loads(json.dumps(first.as_json())))
        fed(second, figures[cut:], cut + 1)
        assert second.alarms == whole.alarms and second.as_json() == whole.as_json()


# --- the collapse of a squeeze that is too strong ---------------------------------------------------------------------

NEED = 30  # tokens below which every answer is wrong


def squeezed(rule, weight, gates=(), steps=40):
    """A scripted policy under Kimi's length reward, step by step: lengths from a normal distribution, so narrow that
    those of a problem differ by a token or two, whose mean is trained by the policy gradient."""
    rng, mean, sigma, speed = random.Random(0), 46.0, 0.5, 1.5
    shape = LengthReward(Kimi(), weight, gates=gates)
    for number in range(1, steps + 1):
        drawn = [[max(2, round(rng.gauss(mean, sigma))) for _ in range(8)] for _ in range(8)]
        step = [
            group(*(rollout("x" * (n - 2) + "</think>4", n >= NEED, tokens=n) for n in lengths)) for lengths in drawn
        ]
        step = shape([one.with_rewards([float(right) for right in one.right]) for one in step], number)
        yield step
        advantages = rule([one.rollouts for one in step])
        slopes = [
            advantage * (n - mean) / sigma**2
            for one, row in zip(step, advantages, strict=True)
            for n, advantage in zip(one.num_tokens, row, strict=True)
        ]
        mean = max(2.0, mean + speed * fmean(slopes))


def test_the_scripted_collapse_is_seen_while_there_is_still_a_model_to_save():
    watch, history, tokens = monitor(), [], 46.0
    for step, groups in enumerate(squeezed(StdNormalized(), weight=1.0), 1):
        watch.read(step, groups)
        history.append(step_health(groups, PREFILLED))
        tokens = fmean(n for one in groups for n in one.num_tokens)
    assert tokens == pytest.approx(2, abs=0.2) and history[-1].accuracy == 0  # what becomes of it if nobody stops it
    assert [alarm.signal for alarm in watch.alarms][:1] == ["accuracy"]
    first_zero = next(step for step, health in enumerate(history, 1) if health.accuracy == 0)
    assert watch.stopped is not None and watch.stopped.step <= first_zero + 1
    assert {"empty_think", "guess_rate"} <= {alarm.signal for alarm in watch.alarms}


# Tokens after 80 steps: with r - mean it shortens to what is needed; a spread that is too small is not paid at all.
@pytest.mark.parametrize(
    ("rule", "weight", "gates", "tokens"),
    [(mean_baseline, 0.3, (), NEED), (StdNormalized(), 1.0, (MinSpread(4),), 46)],
    ids=["mean", "min-spread"],
)
def test_with_the_guards_of_the_house_it_stays_right_and_nothing_stops(rule, weight, gates, tokens):
    watch, last = monitor(), []
    for step, groups in enumerate(squeezed(rule, weight, gates, steps=80), 1):
        watch.read(step, groups)
        last = groups
    assert watch.stopped is None
    assert fmean(n for one in last for n in one.num_tokens) == pytest.approx(tokens, abs=1)
    assert fmean(right for one in last for right in one.right) > 0.85


# --- in a run ---------------------------------------------------------------------------------------------------------


class GivesUp:
    """A sampler whose completions, from a policy version on, all are an empty thought with an answer."""

    def __init__(self, sampler, tokenizer, version):
        self.sampler, self.version = sampler, version
        self.ids = (*tokenizer("</think>12", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)

    @property
    def policy_version(self):
        return self.sampler.policy_version

    @policy_version.setter
    def policy_version(self, version):
        self.sampler.policy_version = version

    def sample(self, requests, settings, report=lambda finished: None):
        if self.policy_version < self.version:
            return self.sampler.sample(requests, settings, report)
        logprobs = (-0.1,) * len(self.ids)
        empty = Completion("</think>12", self.ids, logprobs, FinishReason.STOP, self.policy_version)
        return [empty for _ in requests]


def longer(rollout):
    """A reward with signal in most groups of an untrained model."""
    return float(rollout.num_tokens)


def squeeze(train_rl, model_folder, folder, *, version=4, steps=14, watch=None, **changes):
    from rl.policy import load_tokenizer

    tokenizer = load_tokenizer(model_folder)
    # The untrained model gets nothing right and ends its thoughts at random: only empty thoughts are watched.
    watch = watch or monitor(window=3, guess_rate=None, empty_think=0.9, spread=None)
    train_rl(
        model_folder, folder, steps, monitor=watch, rewards=(WeightedReward("longer", longer, 1.0),),
        wrap=lambda sampler: GivesUp(sampler, tokenizer, version), **changes,
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return summary, lines, load_file(folder / "model" / "model.safetensors")


def test_a_planted_policy_without_thoughts_stops_the_run_before_it_is_trained_on(
    train_rl, tiny_model_folder, tmp_path, whole
):
    summary, lines, weights = whole
    # Versions 0 to 3 think; the window of the steps 5, 6 and 7 is empty, and equal completions have no signal.
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert summary["stopped"] == "step 7: 100% of the completions have no thought (limit 90%)"
    assert [alarm["signal"] for alarm in summary["alarms"]] == ["empty_think"]
    assert "loss" not in lines[-1] and lines[-1]["alarms"] == 1
    # Without evaluations: a copy every second step of a policy whose rollouts were well; steps 1 and 3 show 0 and 2.
    assert summary["kept_step"] == 2 and summary["steps"] == 7
    _, _, after_two = squeeze(train_rl, tiny_model_folder, tmp_path / "two", steps=2)
    assert all(torch.equal(weights[name], after_two[name]) for name in after_two)


def test_with_evaluations_the_model_is_one_that_was_evaluated(train_rl, tiny_model_folder, tmp_path):
    # The sampler is also that of the evaluations; all have accuracy near 0, so the margin of .2 never shows.
    summary, _, _ = squeeze(train_rl, tiny_model_folder, tmp_path, eval_every=3, prefer=PreferBrief(1.0))
    assert summary["stopped"].startswith("step 7: 100%")
    assert summary["kept_step"] in {score["step"] for score in summary["dev"]} <= {0, 3, 6}


def test_warning_only_the_run_goes_on_to_its_end(train_rl, tiny_model_folder, tmp_path):
    watch = monitor(stop=False, window=3, guess_rate=None, empty_think=0.9, spread=None)
    summary, lines, _ = squeeze(train_rl, tiny_model_folder, tmp_path, steps=9, watch=watch)
    assert len(lines) == 9 and summary["kept_step"] == 9
    assert summary["stopped"] is None and [alarm["step"] for alarm in summary["alarms"]] == [7]


@pytest.fixture(scope="module")
def whole(train_rl, tiny_model_folder, tmp_path_factory):
    return squeeze(train_rl, tiny_model_folder, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("step", range(1, 8))
def test_interrupted_at_any_step_it_stops_at_the_same_one(
    train_rl, tiny_model_folder, tmp_path, monkeypatch, whole, step
):
    monkeypatch.setenv("REASON_FAULT", f"grpo.step:{step}:raise")
    reset_faults()
    with pytest.raises(FaultRaised):
        squeeze(train_rl, tiny_model_folder, tmp_path)
    monkeypatch.delenv("REASON_FAULT")
    cut = squeeze(train_rl, tiny_model_folder, tmp_path)
    assert cut[0] == whole[0]
    assert [line["alarms"] for line in cut[1]] == [line["alarms"] for line in whole[1]]
    assert all(torch.equal(cut[2][name], whole[2][name]) for name in whole[2])


@pytest.mark.parametrize(("window", "last"), [(3, 8), (5, 8)])
def test_a_trained_collapse_is_stopped_and_the_model_from_before_is_handed_on(train_rl, tmp_path, window, last):
    """The shipped short model knows one length a problem. A length reward of weight 1, divided by the group's deviation
    and with a learning rate that is too high: accuracy 0.5, 0.27, 0.44, 0 in four steps, 6 tokens in sixteen."""
    watch = CollapseMonitor(CollapseLimits(window=window), PREFILLED)
    train_rl(
        MODELS / "tiny-short", tmp_path, 12, per_step=6, group=8, max_tokens=64, train_problems=64, seed=0,
        optim=OptimSettings(3e-3), advantage_rule=StdNormalized(), monitor=watch, save_every=1,
        rewards=(WeightedReward("accuracy", accuracy_reward, 1.0),), shape=LengthReward(Kimi(), 1.0),
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped"] is not None and summary["steps"] <= last
    assert summary["alarms"][0]["signal"] == "accuracy"
    assert summary["kept_step"] <= 2
