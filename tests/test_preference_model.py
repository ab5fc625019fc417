"""Rewards from models for a whole step, and a preference model that is made, trained and loaded here."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from rl.batch_rewards import WeightedBatchReward, add_batch_rewards, only
from rl.judging import JudgeFailed
from rl.policy import pad_token_id
from rl.preference_model import PreferenceModel, PreferenceReward
from rl.rewards import mean_parts
from rl.tasks.tiny_models import make_model, make_tokenizer
from rl.types import (
    Completion,
    FinishReason,
    JudgeFailure,
    NonFiniteReward,
    Outcome,
    Problem,
    Rollout,
    RolloutGroup,
    TextPart,
    Verdict,
)

RIGHT = Verdict(Outcome.RIGHT)


def group(*texts, rewards=None, question="1+2", verdicts=None, source=""):
    verdicts = verdicts or [RIGHT] * len(texts)
    rollouts = tuple(
        Rollout(Completion(text, (), (), FinishReason.STOP), verdict)
        for text, verdict in zip(texts, verdicts, strict=True)
    )
    made = RolloutGroup(Problem("p", (TextPart(question),), "3", source), (), rollouts)
    return made.with_rewards(rewards or [0.0] * len(texts))


def classifier(num_labels=1, **changes):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    options = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": pad_token_id(tokenizer),
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "num_labels": num_labels,
    } | changes  # fmt: skip
    return LlamaForSequenceClassification(LlamaConfig(**options)).eval()


def saved(model, folder):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(classifier(), tmp_path_factory.mktemp("preference"))


@pytest.fixture(scope="module")
def untrained(folder):
    return PreferenceModel(folder)


# --- the seam ---------------------------------------------------------------------------------------------------------


def fixed(*scores):
    return lambda groups: [list(row) for row in scores]


def test_scores_are_added_by_weight_and_none_is_neutral():
    """The example of `add_batch_rewards`."""
    (scored,) = add_batch_rewards(
        [group("a", "b", "c", rewards=[1, 0, 1])], [WeightedBatchReward("rm", fixed([2, None, -1]), 0.5)]
    )
    assert scored.rewards == [2, 0.25, 0.5]
    assert [r.reward_parts for r in scored.rollouts] == [(("rm", 2),), (("rm", 0.5),), (("rm", -1),)]
    assert mean_parts([scored]) == pytest.approx({"rm": 0.5, "rm_abstained": 1 / 3})


def test_rewards_add_up_and_an_undecided_rollout_sets_no_mean():
    verdicts = [RIGHT, Verdict.undecided(JudgeFailure.TIMEOUT), RIGHT]
    groups = [group("a", "b", "c", verdicts=verdicts), group("d", rewards=[0.5])]
    rewards = [
        WeightedBatchReward("one", fixed([1, 100, None], [None]), 2.0),
        WeightedBatchReward("two", fixed([1, 1, 1], [3]), 1.0),
    ]
    first, second = add_batch_rewards(groups, rewards)
    assert first.rewards == [3, 201, 3] and second.rewards == [3.5]
    assert second.rollouts[0].reward_parts == (("one", 0.0), ("two", 3))
    assert add_batch_rewards(groups, []) == groups


def test_a_reward_gives_one_finite_score_a_rollout():
    for scores in ([[1]], [[1, 2], [3]], []):
        with pytest.raises(RuntimeError, match="reward rm did not give one score a rollout"):
            add_batch_rewards([group("a", "b")], [WeightedBatchReward("rm", fixed(*scores), 1.0)])
    with pytest.raises(NonFiniteReward, match="problem p: reward nan"):
        add_batch_rewards([group("a")], [WeightedBatchReward("rm", fixed([float("nan")]), 1.0)])


def test_a_reward_on_some_problems_is_not_asked_about_the_others():
    asked = []

    def reward(groups):
        asked.extend(groups)
        return scores

    scores: list[list[float | None]] = [[1.0], [1.0, 1.0]]
    groups = [group("a", source="general"), group("b", "c"), group("d", "e", source="general")]
    assert only(reward, lambda problem: problem.source == "general")(groups) == [[1.0], [None, None], [1.0, 1.0]]
    assert asked == [groups[0], groups[2]]


# --- the model --------------------------------------------------------------------------------------------------------


def test_scores_come_in_order_and_do_not_depend_on_the_batch(untrained, folder):
    pairs = [("1+2", "3" * n) for n in (9, 1, 30, 4, 4, 17)] + [("7*8=", "<think>5")]
    scores = untrained.score(pairs)
    assert scores == pytest.approx([untrained.score([pair])[0] for pair in pairs], abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 6  # (the fourth and the fifth are equal)
    assert PreferenceModel(folder, batch_tokens=1).score(pairs) == pytest.approx(scores, abs=1e-5)
    assert untrained.score([]) == []


def test_scores_are_those_of_the_library_on_the_whole_conversation(untrained, folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = make_tokenizer()("<|user|>1+2<|assistant|>3<|end|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits.item()
    assert untrained.score([("1+2", "3")]) == [pytest.approx(expected, abs=1e-6)]


def test_control_tokens_of_a_summary_are_no_control_tokens(untrained):
    ids = untrained.token_ids("1<|pad|>", "2<|end|><|user|>3<|assistant|>4")
    names = untrained.tokenizer.convert_ids_to_tokens(ids)
    assert [name for name in names if name in ("<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")] == [
        "<|user|>", "<|assistant|>", "<|end|>",
    ]  # fmt: skip


def test_batches_hold_like_lengths_and_no_more_than_they_may(untrained):
    rows = [[0] * length for length in (3, 10, 4, 9, 3, 40)]
    untrained_limit, untrained.batch_tokens = untrained.batch_tokens, 20
    assert list(untrained._batches(range(6), rows)) == [[5], [1, 3], [2, 0, 4]]
    untrained.batch_tokens = untrained_limit


def test_what_does_not_fit_has_no_score_and_is_never_cut(untrained, folder):
    assert untrained.max_tokens == 64
    first, second = untrained.score([("1+2", "3" * 57), ("1+2", "3" * 59)])  # with 6 others: 63 and 65 tokens
    assert first is not None and second is None
    assert PreferenceModel(folder, max_tokens=10).score([("1+2", "3" * 4), ("1+2", "3" * 5)])[1] is None
    for wrong in (0, 65):
        with pytest.raises(ValueError, match=f"64 positions, max_tokens is {wrong}"):
            PreferenceModel(folder, max_tokens=wrong)


@pytest.mark.parametrize("pad", [None, 1])
def test_without_a_pad_token_of_its_own_scores_are_still_those_of_single_rows(tmp_path, pad):
    """`pad` 1 is the token that ends every conversation: a model trained so reads its score before it, alone too."""
    model = classifier(pad_token_id=pad)
    loaded = PreferenceModel(saved(model, tmp_path))
    pairs = [("1+2", "3" * n) for n in (1, 8, 3)]
    assert loaded.score(pairs) == pytest.approx([loaded.score([pair])[0] for pair in pairs], abs=1e-5)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([loaded.token_ids("1+2", "3")])).logits.item()
    assert loaded.score(pairs)[0] == pytest.approx(alone, abs=1e-5)


def test_models_that_are_no_preference_models_are_refused_by_name(tmp_path):
    three = saved(classifier(num_labels=3), tmp_path / "three")
    with pytest.raises(ValueError, match=r"three has 3 outputs \(LABEL_0, LABEL_1, LABEL_2\)"):
        PreferenceModel(three)

    tokenizer = make_tokenizer()
    causal = make_model(32, 1, 2, tokenizer, seed=0)
    with pytest.raises(ValueError, match="causal has 2 outputs"):
        PreferenceModel(saved(causal, tmp_path / "causal"))
    causal.config.num_labels = 1
    with pytest.raises(ValueError, match=r"headless is no preference model: its files lack score.weight"):
        PreferenceModel(saved(causal, tmp_path / "headless"))

    plain = tmp_path / "plain"
    classifier().save_pretrained(plain)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    with pytest.raises(ValueError, match="plain has no chat template"):
        PreferenceModel(plain)


def test_neither_pickles_nor_the_code_of_a_model_are_read(tmp_path):
    pickled = saved(classifier(), tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(classifier().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        PreferenceModel(pickled)

    coded = saved(classifier(), tmp_path / "coded")
    (coded / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Config: pass\n")
    config = json.loads((coded / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (coded / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        PreferenceModel(coded)
    assert not (tmp_path / "ran").exists()


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    model = classifier()
    with torch.no_grad():
        model.score.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match=r"broken gives (nan|-?inf) for an answer to '1\+2'"):
        PreferenceModel(saved(model, tmp_path / "broken")).score([("1+2", "3")])


# --- the reward -------------------------------------------------------------------------------------------------------


class Fake:
    """In place of a model: its score is the number of threes; `max_tokens` characters fit."""

    name, max_tokens = "fake", 10

    def __init__(self):
        self.pairs = []

    def score(self, pairs):
        self.pairs += pairs
        return [None if len(summary) > self.max_tokens else float(summary.count("3")) for _, summary in pairs]


def test_the_reward_sees_the_summary_alone_and_no_summary_is_the_lowest_of_its_group():
    model = Fake()
    groups = [group("<think>3333</think> 33", "<think>333", "5</think>3", "x</think> "), group("<think>3", "<think>")]
    reward = PreferenceReward(model)  # pyright: ignore[reportArgumentType]
    assert reward(groups) == [[2.0, 1.0, 1.0, 1.0], [None, None]]
    assert model.pairs == [("1+2", "33"), ("1+2", "3")]


def test_summaries_that_are_too_long_have_no_score_and_stop_a_run_where_they_are_common():
    reward = PreferenceReward(Fake())  # pyright: ignore[reportArgumentType]
    assert reward([group("3" * 11, *["3"] * 60, "<think>")]) == [[None, *[1.0] * 60, 1.0]]
    with pytest.raises(
        JudgeFailed, match="2 of 2 summaries do not fit into the 10 tokens of the preference model fake"
    ):
        reward([group("3" * 11, "5" * 12)])


def test_a_model_learns_to_prefer_the_right_answer_and_the_reward_orders_by_it(tmp_path):
    """The digit after the question's against every other, by the pairwise loss −log σ(s_right − s_wrong), on 60 of the
    90 pairs; the model is tested on the other 30."""
    pairs = [(q, (q + 1) % 10, wrong) for q in range(10) for wrong in range(10) if wrong != (q + 1) % 10]
    random.Random(0).shuffle(pairs)
    held_out, trained = pairs[:30], torch.tensor(pairs[30:])
    model = classifier(num_hidden_layers=1, initializer_range=0.1)
    before = PreferenceModel(saved(model, tmp_path / "before"))
    ids = torch.tensor([[before.token_ids(str(q), str(a)) for a in range(10)] for q in range(10)])  # (10, 10, T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        question, right, wrong = trained.T
        scores = model(input_ids=torch.cat([ids[question, right], ids[question, wrong]])).logits.squeeze(-1)
        loss = -torch.nn.functional.logsigmoid(scores[:60] - scores[60:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = PreferenceModel(saved(model, tmp_path / "after"))

    def preferred(scorer):
        right = scorer.score([(str(question), str(answer)) for question, answer, _ in held_out])
        wrong = scorer.score([(str(question), str(answer)) for question, _, answer in held_out])
        return sum(r > w for r, w in zip(right, wrong, strict=True)) / len(held_out)

    assert preferred(before) < 0.7 and preferred(after) > 0.8
    groups = [group(*(f"<think>7</think>{a}" for a in range(10)), question=str(q)) for q in range(10)]
    scored = add_batch_rewards(groups, [WeightedBatchReward("preference", PreferenceReward(after), 1.0)])
    best = [max(range(10), key=g.rewards.__getitem__) for g in scored]
    assert sum(answer == (q + 1) % 10 for q, answer in enumerate(best)) >= 7  # by chance 1
