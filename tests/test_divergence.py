"""The generalised JSD: golden vectors, its direction, gradients, chunks, and TRL's own loss on the same tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import log_softmax
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from distill.divergence import OutputLayer, chunked, divergence, hidden_divergence, token_mean
from rl.logprobs import LogitTransform

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
GOLDEN = {0.0: 0.0822829, 0.5: 0.0210059, 1.0: 0.0871767}
LOGITS = st.lists(st.floats(-8, 8), min_size=5, max_size=5)


@pytest.mark.parametrize("beta", GOLDEN)
def test_golden(beta):
    teacher, student = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.5, 0.5]).log()
    assert divergence(teacher, student, beta).item() == pytest.approx(GOLDEN[beta], abs=1e-7)
    turned = divergence(student, teacher, beta).item()
    assert turned == pytest.approx(GOLDEN[1 - beta], abs=1e-7)  # the other way round it is the other KL


@given(LOGITS, LOGITS, st.sampled_from(BETAS))
def test_it_is_a_divergence(left, right, beta):
    teacher, student = (log_softmax(torch.tensor(x, dtype=torch.float64), -1) for x in (left, right))
    found = divergence(teacher, student, beta).item()
    assert found >= -1e-9
    assert divergence(teacher, teacher, beta).item() == pytest.approx(0, abs=1e-9)
    if 0 < beta < 1:  # bounded by the entropy of the coin that mixes the two
        assert found <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-9
        assert divergence(student, teacher, 1 - beta).item() == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_the_teacher_rules_out(beta):
    """The reverse KL forbids what the teacher rules out; the others stay finite, gradients too."""
    student = torch.tensor([0.2, 0.3, -0.1], requires_grad=True)
    found = divergence(torch.tensor([0.5, 0.5, 0.0]).log(), student.log_softmax(-1), beta)
    if beta == 1:
        assert found.item() == math.inf
        return
    found.backward()
    assert student.grad is not None and torch.isfinite(student.grad).all() and found.item() > 0


def test_a_beta_that_is_none():
    with pytest.raises(ValueError, match=r"beta = 1.5 is not within 0 \(forward KL\) and 1 \(reverse KL\)"):
        divergence(torch.zeros(1), torch.zeros(1), 1.5)


def test_the_mean_is_over_the_tokens_of_the_mask():
    values, mask = torch.tensor([1.0, 3.0, math.nan]), torch.tensor([1, 1, 0])
    assert token_mean(values, mask).item() == 2
    assert token_mean(values, mask, 4).item() == 1
    assert token_mean(values, torch.zeros(3)).item() == 0


# --- from hidden states -----------------------------------------------------------------------------------------------

POSITIONS, VOCAB = (2, 7), 11


@pytest.fixture
def parts():
    """(student hidden, student weight, bias, teacher hidden, teacher weight, mask): the teacher is wider."""
    torch.manual_seed(0)
    student, weight, bias = torch.randn(*POSITIONS, 6), torch.randn(VOCAB, 6), torch.randn(VOCAB)
    teacher, wide = torch.randn(*POSITIONS, 9), torch.randn(VOCAB, 9)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])
    for tensor in (student, weight, bias):
        tensor.requires_grad_()
    return student, weight, bias, teacher, wide, mask


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("temperature", "scale", "softcap"), [(1.0, 1.0, None), (0.7, 1.0, None), (2.0, 0.5, 3.0)])
@pytest.mark.parametrize("count", [None, 20])
def test_parity_with_trls_distillation_trainer(parts, beta, temperature, scale, softcap, count):
    """Loss and gradients of TRL 1.16's `DistillationTrainer` on the same tensors, to 1e-5."""
    student, weight, bias, teacher, wide, mask = parts
    theirs, _, _ = _chunked_divergence_loss(
        student, teacher, weight, wide, mask, beta, num_items_in_batch=count, student_lm_head_bias=bias,
        student_logit_scale=scale, student_final_logit_softcapping=softcap, temperature=temperature,
    )  # fmt: skip
    own = OutputLayer(weight, bias, LogitTransform(scale, softcap), temperature=temperature)
    values = hidden_divergence(
        student.flatten(0, 1), own, teacher.flatten(0, 1), OutputLayer(wide, temperature=temperature), beta, 3
    )
    loss = token_mean(values.view(POSITIONS), mask, count)
    assert loss.item() == pytest.approx(theirs.item(), abs=1e-5)
    for ours, other in zip(
        gradients(loss, student, weight, bias), gradients(theirs, student, weight, bias), strict=True
    ):
        assert torch.allclose(ours, other, atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_chunks_change_rounding_and_nothing_else(parts, chunk_tokens):
    student, weight, bias, teacher, wide, _ = parts
    given = student.flatten(0, 1), OutputLayer(weight, bias), teacher.flatten(0, 1), OutputLayer(wide), 0.5
    found = hidden_divergence(*given, chunk_tokens)
    plain = divergence(
        log_softmax(teacher.flatten(0, 1) @ wide.T, -1), log_softmax(student.flatten(0, 1) @ weight.T + bias, -1), 0.5
    )
    assert torch.allclose(found, plain, atol=1e-6)
    for ours, other in zip(
        gradients(found.sum(), student, weight), gradients(plain.sum(), student, weight), strict=True
    ):
        assert torch.allclose(ours, other, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(hidden_divergence(*given, chunk_tokens), plain, atol=1e-6)


def test_no_positions_have_a_gradient_of_0(parts):
    _, weight, _, _, _, _ = parts
    empty = torch.zeros(0, 6, requires_grad=True)
    found = chunked(empty, OutputLayer(weight), lambda logprobs, place: logprobs.sum(-1))
    assert found.shape == (0,)
    for gradient in gradients(found.sum(), empty, weight):
        assert not gradient.any()
    with pytest.raises(ValueError, match="at least one position"):
        chunked(empty, OutputLayer(weight), lambda logprobs, place: logprobs, 0)


def test_rows_that_pad_the_vocabulary_do_not_count(parts):
    """Qwen2.5's sizes in small: 11 rows for 8 ids in the student, 13 in the teacher, whose padding says nonsense."""
    student, weight, bias, teacher, wide, _ = parts
    longer = torch.cat([wide, torch.full((2, 9), 50.0)])
    found = hidden_divergence(
        student.flatten(0, 1), OutputLayer(weight, bias, vocab=8),
        teacher.flatten(0, 1), OutputLayer(longer, vocab=8), 0.0,
    )  # fmt: skip
    plain = divergence(
        log_softmax(teacher.flatten(0, 1) @ wide[:8].T, -1),
        log_softmax(student.flatten(0, 1) @ weight[:8].T + bias[:8], -1),
    )
    assert torch.allclose(found, plain, atol=1e-6)
    (grown,) = gradients(found.sum(), weight)
    assert grown[:8].any() and not grown[8:].any()
    with pytest.raises(ValueError, match="the student's logits are of 11 ids, the teacher's of 13"):
        hidden_divergence(student, OutputLayer(weight), teacher, OutputLayer(longer))
    with pytest.raises(ValueError, match="the output layer has 11 rows, the tokenizer 12 ids: resize"):
        OutputLayer(weight, vocab=12).logprobs(student)


def test_the_layer_of_the_docstring():
    layer = OutputLayer(torch.tensor([[0.0], [math.log(3)], [9.0]]), vocab=2)
    assert layer.logprobs(torch.ones(1, 1)).exp()[0].tolist() == pytest.approx([0.25, 0.75])
