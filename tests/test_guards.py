"""The guards: nothing is cut, lost, unknown or left without an end."""

from __future__ import annotations

import pytest

from distill.guards import IGNORED, PairRow, TokenRow, tokenize_pair, tokenize_row, within_length
from rl.prompts import render_prompt
from rl.tasks import tiny
from rl.tasks.tiny_models import CHAT_TEMPLATE, make_tokenizer

TEXT = "47*3=41; 41+08=49; </think>49"


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def test_a_row_is_the_samplers_prompt_the_text_and_a_trained_end(tokenizer):
    row = tokenize_row(tokenizer, "47*3+08", TEXT, "trace 0")
    problem = tiny.problems("train", 1, (2,))[0]
    assert row.prompt_ids[:1] == render_prompt(tokenizer, problem)[:1]
    assert tokenizer.decode(list(row.prompt_ids)) == "<|user|>47*3+08<|assistant|><think>"
    assert tokenizer.decode(list(row.completion_ids)) == TEXT + "<|end|>"
    assert row.completion_ids[-1] == tokenizer.eos_token_id
    assert row.input_ids == [*row.prompt_ids, *row.completion_ids]
    assert row.labels == [IGNORED] * len(row.prompt_ids) + list(row.completion_ids)
    assert len(row) == len(row.labels) == len(row.input_ids)


def test_the_suffix_is_part_of_the_question(tokenizer):
    row = tokenize_row(tokenizer, "47*3", TEXT, "trace 0", suffix="+08")
    assert row.prompt_ids == tokenize_row(tokenizer, "47*3+08", TEXT, "trace 0").prompt_ids


def test_a_model_without_a_template_gets_the_bare_question(tokenizer):
    tokenizer.chat_template = None
    tokenizer.add_tokens(["\n"])
    row = tokenize_row(tokenizer, "47*3", TEXT, "trace 0")
    assert tokenizer.decode(list(row.prompt_ids)) == "47*3\n"
    assert row.completion_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # R1's own template: the thought is dropped from the assistant's message.
        (
            "<|assistant|>{{ message['content'] }}",
            "<|assistant|>{{ message['content'].split('</think>')[-1] }}",
            r"trace 3: the chat template does not round-trip. At character 28 the rendered .* has '49<\|end\|>'",
        ),
        ("<|assistant|>{{ message['content'] }}", "<|assistant|> so {{ message['content'] }}", "does not round-trip"),
        ("{{ message['content'] }}<|end|>", "{{ message['content'] }}<|pad|>", r"ends a turn with '<\|pad\|>'"),
        ("{{ message['content'] }}<|end|>", "{{ message['content'] }}<|end|>x", "ends a turn with"),
    ],
)
def test_a_template_that_changes_the_answer_is_refused(tokenizer, old, new, message):
    assert old in CHAT_TEMPLATE
    tokenizer.chat_template = CHAT_TEMPLATE.replace(old, new)
    with pytest.raises(ValueError, match=message):
        tokenize_row(tokenizer, "47*3+08", TEXT, "trace 3")


@pytest.mark.parametrize("end", ["", "<|end|>\n"])
def test_a_template_may_leave_the_end_to_us_or_follow_it_by_space(tokenizer, end):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ message['content'] }}<|end|>", "{{ message['content'] }}" + end)
    row = tokenize_row(tokenizer, "47*3+08", TEXT, "trace 0")
    assert row.completion_ids.count(tokenizer.eos_token_id) == 1


def test_unknown_special_and_empty_text_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match=r"trace 1: the tokenizer does not know 'é9' at character 10 of the completion"
    ):
        tokenize_row(tokenizer, "47*3+08", "4=</think>é9", "trace 1")
    with pytest.raises(ValueError, match=r"trace 1: the completion contains <\|end\|>, which the tokenizer reads"):
        tokenize_row(tokenizer, "47*3+08", "4=<|end|></think>9", "trace 1")
    with pytest.raises(ValueError, match="trace 1: the completion is empty"):
        tokenize_row(tokenizer, "47*3+08", "", "trace 1")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        tokenize_row(tokenizer, "47*3+08", TEXT, "trace 1")


def test_text_that_the_tokenizer_changes_is_refused(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("9", "8")
    with pytest.raises(ValueError, match=r"At character \d+ it decodes to '8; </think>48' instead of '9; </think>49'"):
        tokenize_row(tokenizer, "47*3+08", TEXT, "trace 1")


def rows(*lengths: int) -> list[TokenRow]:
    return [TokenRow(f"row {i}", (3,) * 10, (5,) * (n - 10)) for i, n in enumerate(lengths)]


def test_overflow_is_an_error_or_a_counted_drop():
    three = rows(90, 100, 101)
    with pytest.raises(
        ValueError, match=r"1 of 3 rows are longer than max_length = 100: row 2 \(101 tokens\)\. Nothing"
    ):
        within_length(three, 100, "refuse")
    assert within_length(three, 100, "drop") == (three[:2], 1)
    assert within_length(three, 101, "refuse") == (three, 0)
    with pytest.raises(ValueError, match=r"row 4 \(50 tokens\) and 3 more.*raise max_length to 50"):
        within_length(rows(*[50] * 8), 40, "refuse")
    with pytest.raises(ValueError, match="all 3 rows"):
        within_length(three, 10, "drop")
    with pytest.raises(ValueError, match="no rows"):
        within_length([], 10, "drop")
    with pytest.raises(ValueError, match='overflow must be "refuse" or "drop", got \'cut\''):
        within_length(three, 100, "cut")  # type: ignore[arg-type]


def test_a_pair_shares_its_prompt_and_ends_on_both_sides(tokenizer):
    longer = "47*3=41 wait 7*3=21, 4*3+2=14 so 41; 41+08=49; </think>49"
    pair = tokenize_pair(tokenizer, "47*3+08", TEXT, longer, "pair 0")
    row = tokenize_row(tokenizer, "47*3+08", longer, "x")
    assert pair == PairRow(
        "pair 0",
        row.prompt_ids,
        tokenize_row(tokenizer, "47*3+08", TEXT, "x").completion_ids,
        row.completion_ids,
    )
    assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == tokenizer.eos_token_id
    # The limit holds for the longer, rejected side, which TRL would cut.
    assert len(pair) == len(row)
    with pytest.raises(ValueError, match="1 of 1 rows"):
        within_length([pair], len(row) - 1, "refuse")


def test_both_sides_of_a_pair_are_guarded_by_name(tokenizer):
    with pytest.raises(ValueError, match="pair 0, rejected: the tokenizer does not know"):
        tokenize_pair(tokenizer, "47*3+08", TEXT, TEXT + "?", "pair 0")
    with pytest.raises(ValueError, match="pair 0, chosen: the completion contains"):
        tokenize_pair(tokenizer, "47*3+08", TEXT + "<|user|>", TEXT, "pair 0")
    with pytest.raises(ValueError, match="the same text"):
        tokenize_pair(tokenizer, "47*3+08", TEXT, TEXT, "pair 0")
