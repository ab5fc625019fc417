"""How a step of SFT is cut, laid out and scored: every row once, whole, and within the budget; the plain loss's
gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from distill.guards import IGNORED, TokenRow
from distill.sft import Forward
from distill.sft_batches import (
    PackedCut,
    PaddedCut,
    RowCut,
    SftSteps,
    packed_inputs,
    sequence_of,
    sequences_of,
    whole_share,
    without_labels,
)
from distill.sft_loss import use_chunked_loss
from recipes.sft_keys import Sft
from rl.logprobs import PLAIN

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(min_value=2, max_value=40), min_size=1, max_size=24)


def row_of(length: int, name: str = "row", prompt: int = 1) -> TokenRow:
    return TokenRow(name, tuple(range(3, 3 + prompt)), (9,) * (length - prompt - 1) + (1,))


def rows_of(*lengths: int) -> list[TokenRow]:
    return [row_of(length, f"row {i}") for i, length in enumerate(lengths)]


def lengths_of(parts: list[list[list[TokenRow]]]) -> list[list[list[int]]]:
    return [[[len(row) for row in batch] for batch in part] for part in parts]


# --- cuts -------------------------------------------------------------------------------------------------------------


def test_a_share_and_a_number_of_rows():
    a, b, c, d, e = rows_of(2, 3, 4, 5, 6)
    assert whole_share([a, b, c], 2) == [[[a, c]], [[b]]]
    assert RowCut(2)([a, b, c, d, e], 1) == [[[a, b], [c, d], [e]]]
    assert RowCut(1)([a, b, c], 2) == [[[a], [c]], [[b], []]]


def test_padded_rows_of_similar_length_come_together():
    assert lengths_of(PaddedCut(18)(rows_of(9, 2, 8, 3), 1)) == [[[9, 8], [3, 2]]]
    assert lengths_of(PaddedCut(9)(rows_of(9, 2, 8, 3), 1)) == [[[9], [8], [3, 2]]]
    # Two processes need as many micro-batches each: the largest is halved, or one stays empty.
    assert lengths_of(PaddedCut(40)(rows_of(9, 2, 8, 3), 2)) == [[[9, 8]], [[3, 2]]]
    assert lengths_of(PaddedCut(40)(rows_of(9), 2)) == [[[9]], [[]]]


@given(LENGTHS, st.integers(min_value=40, max_value=120), st.integers(min_value=1, max_value=3))
@settings(deadline=None, max_examples=60)
def test_every_row_is_run_once_and_whole_within_the_budget(lengths, budget, parts):
    rows = rows_of(*lengths)
    for cut in (PaddedCut(budget), PackedCut(budget), RowCut(3), whole_share):
        found = cut(rows, parts)
        assert len({len(part) for part in found}) == 1 and len(found) == parts
        names = [row.name for part in found for batch in part for row in batch]
        assert sorted(names) == sorted(row.name for row in rows)
    for batch in (batch for part in PaddedCut(budget)(rows, parts) for batch in part if batch):
        assert len(batch) * max(map(len, batch)) <= budget
    packed = [batch for part in PackedCut(budget)(rows, parts) for batch in part]
    assert max(sum(map(len, batch)) for batch in packed) <= budget
    for batch in packed:
        if batch:
            inputs = packed_inputs(batch, CPU)
            assert sorted(sequences_of(inputs)) == sorted(map(sequence_of, batch))
            assert int((inputs["shift_labels"] != IGNORED).sum()) == sum(len(row.completion_ids) for row in batch)


def test_packing_fills_the_fewest_lines():
    # 100 tokens in lines of 50: two lines without a gap, where rows in their order would need three.
    found = lengths_of(PackedCut(50)(rows_of(20, 20, 20, 30, 10), 1))
    assert [sum(line) for line in found[0]] == [50, 50]


def test_a_row_over_the_budget_is_refused_by_name_and_never_cut():
    for cut in (PaddedCut(10), PackedCut(10)):
        with pytest.raises(ValueError, match="row 1 has 11 tokens, more than micro_batch_tokens = 10"):
            cut(rows_of(3, 11), 1)
    with pytest.raises(ValueError, match="micro_batch_tokens = 10 is less than max_length = 11"):
        Forward(micro_batch_tokens=10).cut(11)
    assert Forward(packing=True).cut(64) == PackedCut(64)
    assert Forward().cut(64) is whole_share


def test_steps_share_their_rows_and_count_the_tokens_of_all_processes():
    rows = rows_of(4, 5, 6)  # 3, 4 and 5 completion tokens
    both = [SftSteps(rows, [0, 1, 2], 2, whole_share, rank, 2) for rank in range(2)]
    assert [len(steps) for steps in both] == [2, 2]
    first = [steps[0][0] for steps in both]
    assert [(batch.rows, batch.trained, batch.num_trained) for batch in first] == [
        ((rows[0],), True, 7),
        ((rows[1],), True, 7),
    ]
    idle = both[1][1][0]  # the second step has one row, so the second process runs it without training it
    assert (idle.rows, idle.trained, idle.num_trained) == ((rows[2],), False, 5)
    with pytest.raises(IndexError):
        both[0][2]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_a_packed_line():
    rows = [TokenRow("a", (5, 6), (7, 1)), TokenRow("b", (8,), (9, 1))]
    inputs = packed_inputs(rows, CPU)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert inputs["shift_labels"].tolist() == [[IGNORED, 7, 1, 9, 1]]
    assert sequences_of(inputs) == [([5, 6, 7], [IGNORED, 7, 1]), ([8, 9], [9, 1])]
    assert without_labels(inputs)["shift_labels"].tolist() == [[IGNORED] * 5]


def test_equal_prompts_are_not_shared_so_each_position_has_one_label():
    rows = [TokenRow("a", (5, 6, 4), (7, 1)), TokenRow("b", (5, 6, 4), (9, 1))]
    assert sequences_of(packed_inputs(rows, CPU)) == [sequence_of(row) for row in rows]


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_chunked_loss_is_the_plain_one_with_its_gradients(tied):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=53, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=64, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    ids = torch.randint(0, 53, (2, 11))
    labels = ids.clone()
    labels[0, :4], labels[1, 7:] = IGNORED, IGNORED

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss.backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    logits = model(input_ids=ids).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    wanted = gradients(plain)
    use_chunked_loss(model, PLAIN, chunk_tokens=3)
    output = model(input_ids=ids, labels=labels, fused_lm_head=True)
    assert output.log_probs.shape == output.label_mask.shape == (2, 10)
    assert -output.log_probs.sum().item() == pytest.approx(plain.item(), abs=1e-5)
    found = gradients(-output.log_probs.sum())
    assert max((wanted[name] - found[name]).abs().max().item() for name in wanted) < 1e-5
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    again = model(input_ids=ids, shift_labels=shifted, fused_lm_head=True)
    assert again.log_probs.shape == (2, 11)
    torch.testing.assert_close(again.log_probs[:, :-1], output.log_probs)
    torch.testing.assert_close(model(input_ids=ids).logits, logits)  # every other call is as before
    nothing = model(input_ids=ids, labels=torch.full_like(ids, IGNORED), fused_lm_head=True)
    assert all(not gradient.any() for gradient in gradients(-nothing.log_probs.sum()).values())


# --- keys -------------------------------------------------------------------------------------------------------------

KEYS: dict[str, Any] = {"method": "sft", "model": "./base", "traces": "traces", "max_length": 100}


def test_keys():
    plain = Sft(**KEYS)
    assert (plain.micro_batch_tokens, plain.packing, plain.chunked_loss, plain.shard) == (None, False, False, False)
    assert (plain.lora, plain.gradient_checkpointing, plain.bf16) == (None, None, None)
    assert Sft(**KEYS, micro_batch_tokens=100).micro_batch_tokens == 100
    with pytest.raises(ValidationError, match="99 is less than max_length"):
        Sft(**KEYS, micro_batch_tokens=99)


def test_the_keys_default_to_what_the_trainer_defaults_to():
    keys = Sft(**KEYS)
    assert Forward() == Forward(
        keys.micro_batch_tokens, keys.packing, keys.chunked_loss, keys.gradient_checkpointing, keys.shard, keys.bf16
    )
