"""The tiny world in two notations, and its general prompts: spelling, languages, problems, demonstrations, tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.problem_keys import Problems
from recipes.tasks import load_problems, open_task
from rl.rewards import language_consistency
from rl.tasks import tiny, tiny_general, tiny_words
from rl.tasks.base import split_of
from rl.types import Completion, FinishReason, Outcome, Problem, Rollout, TextPart, Verdict

WORDS = "four seven times three plus zero eight"


def rollout(text):
    return Rollout(Completion(text, (), (), FinishReason.STOP), Verdict(Outcome.RIGHT))


def test_the_examples():
    assert tiny_words.spell("47*3=41; ") == "four seven times three is four one; "
    assert tiny_words.digits("four times two is eight") == "4*2=8"
    assert tiny_words.notation_share("47*3=41; four one", "digits") == 7 / 9
    assert tiny_words.notation_of("four plus two") == "words"
    assert tiny_words.notation_of("4+2 is") == "digits"
    assert tiny_words.notation_of("4 four") is None
    assert tiny_words.notation_share(" wait , so ; my friend", "words") is None
    with pytest.raises(ValueError, match="no notation 'en'; known are digits, words"):
        tiny_words.notation_share("4", "en")


@given(st.lists(st.text("0123456789+-*=", min_size=1)), st.sampled_from(["; ", " wait ", ", ", " so "]))
def test_digits_takes_back_what_spell_does(runs, between):
    text = between.join(runs)
    spelled = tiny_words.spell(text)
    assert tiny_words.digits(spelled) == text
    assert not set(spelled) & set("0123456789+-*=")


def test_half_of_the_problems_are_in_words_and_no_chain_is_in_two_splits():
    found = {split: tiny_words.problems(split, 300) for split in ("train", "dev", "test")}
    chains = {split: {tiny_words.digits(p.text) for p in problems} for split, problems in found.items()}
    assert not chains["train"] & chains["dev"] | chains["train"] & chains["test"] | chains["dev"] & chains["test"]
    worded = [p for p in found["train"] if tiny_words.notation_of(p.text) == "words"]
    assert 120 < len(worded) < 180
    assert all(tiny.solve(tiny_words.digits(p.text)) == p.answer for problems in found.values() for p in problems)
    assert len({p.id for problems in found.values() for p in problems}) == 900


def test_a_recipe_names_the_notations():
    both = Problems.model_validate({"source": "tiny", "notations": "both", "levels": (2,), "train": 5})
    assert open_task(both).name == "tiny-words"
    assert load_problems(both, "train", 5) == tiny_words.problems("train", 5, (2,))
    plain = Problems.model_validate({"source": "tiny", "levels": (2,)})
    assert open_task(plain).name == "tiny"
    assert load_problems(plain, "train", 5) == tiny.problems("train", 5, (2,))
    assert both.judged_by == {"notations": "both"} and plain.judged_by == {}
    with pytest.raises(ValueError, match="only the tiny world has notations"):
        Problems.model_validate({"source": "org/set:train", "notations": "both"})


def test_a_thought_in_words_has_its_language_rewarded_and_the_verifier_does_not_see_it():
    problem = Problem("p", (TextPart(WORDS),), tiny.solve("47*3+08"))
    own, other = (tiny_words.demonstrate(problem, "plain", mixed, random.Random(0)) for mixed in (0.0, 1.0))
    assert tiny_words.digits(own) == other
    reward = language_consistency(None, tiny_words.LANGUAGES).make(problem)
    assert [reward(rollout(text)) for text in (own, other)] == [1, 0]
    mixed = "four seven times three is four one; 41+08=49; </think>49"
    assert reward(rollout(mixed)) == 7 / 15
    task = tiny_words.TASK
    (verdict,) = task.judge([(problem, rollout(mixed).completion)])
    assert verdict.right == (problem.answer == "49")
    with pytest.raises(ValueError, match="target must be one of digits, words, got 'en'"):
        language_consistency("en", tiny_words.LANGUAGES).make(problem)


def test_demonstrations_mix_as_often_as_they_are_told():
    rng = random.Random(0)
    steps = "11+11=22; " * 2_000
    mixed = tiny_words.mix_notations(f"{steps}</think>22", "words", 0.3, rng)
    share = tiny_words.notation_share(mixed.partition("</think>")[0], "digits")
    assert share == pytest.approx(0.3, abs=0.03)
    assert mixed.endswith("</think>22")


def test_every_demonstration_and_reply_survives_the_tokenizer():
    from rl.tasks.tiny_models import make_tokenizer

    tokenizer = make_tokenizer(tuple(tiny_words.NEW_TOKENS))
    assert make_tokenizer().get_vocab().items() <= tokenizer.get_vocab().items(), "the shipped tokens keep their ids"
    stream = tiny_words.demonstrations({"guess": 1, "plain": 1, "careful": 1}, (2, 3), 0, mixed=0.5)
    texts = [text for _ in range(200) for problem, reply in [next(stream)] for text in (problem.text, reply)]
    texts += [text for _, *pair in tiny_general.preference_pairs(100, 0) for text in pair]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer(" istwo ninewelcome")["input_ids"]) == " istwo ninewelcome"
    assert tokenizer.unk_token_id not in tokenizer(" istwo ninewelcome")["input_ids"]
    assert len(tokenizer("four seven times three is four one")["input_ids"]) == len(tokenizer("47*3=41")["input_ids"])


def test_a_model_that_grows_keeps_what_it_knew(tmp_path):
    import torch

    from rl.tasks.tiny_models import grow, make_model, make_tokenizer

    old, new = make_tokenizer(), make_tokenizer(tuple(tiny_words.NEW_TOKENS))
    model = make_model(32, 1, 2, old, seed=0)
    before = model.model.embed_tokens.weight.detach().clone()
    grow(model, new, tiny_words.NEW_TOKENS)
    after = model.model.embed_tokens.weight
    assert len(after) == model.config.vocab_size == len(new)
    assert torch.equal(after[: len(old)], before)
    ids = new.get_vocab()
    assert (after[ids[" four"]] - after[ids["4"]]).abs().max() < 0.2
    grown = after.detach().clone()
    grow(model, new, tiny_words.NEW_TOKENS)
    assert torch.equal(model.model.embed_tokens.weight, grown)


# --- general prompts --------------------------------------------------------------------------------------------------


def test_replies_are_ranked():
    assert tiny_general.right_reply("say 470") == "470"
    assert tiny_general.right_reply("hello friend") == "hello"
    rng = random.Random(0)
    kind, plain, twice, wrong = tiny_general.replies("say four seven", rng)
    assert (kind, plain) == ("four seven, my friend", "four seven")
    assert twice == "four seven, my friend, my friend"
    assert wrong.endswith(", my friend") and wrong != kind
    for _ in range(50):
        assert tiny_general.wrong_reply("thank you friend", rng) in ("hello", "good day")
        assert tiny_general.wrong_reply("say 470", rng) in ("hello", "good day", "you are welcome")


def test_prompts_are_different_and_split():
    prompts = tiny_general.general_problems("train", 300)
    assert len({p.text for p in prompts}) == 300
    assert {split_of(p) for p in prompts} == {"train"}
    with pytest.raises(ValueError, match="fewer than"):
        tiny_general.general_problems("nowhere", 3)


def test_pairs_put_the_better_reply_first():
    for problem, better, worse in tiny_general.preference_pairs(200, 1):
        right = tiny_general.right_reply(problem.text)
        order = [right + ", my friend", right, right + ", my friend, my friend"]
        assert better in order
        assert worse not in order[: order.index(better) + 1]
